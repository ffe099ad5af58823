"""What sources that are read in order answer alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.extents import Extents
    from imgcore.engine.reflinks import ReflinkRule


class OrderedSource:
    """The members of a `Source` that are the same for all streams."""

    if TYPE_CHECKING:

        @property
        def virtual_size(self) -> int: ...

    def data_extents(self, rule: ReflinkRule | None = None) -> Iterator[Extents]:
        """Yield one extent: only reading a stream shows where it holds zeros."""
        from imgcore.engine.extents import all_data

        yield from all_data(self.virtual_size)

    def lost(self) -> Sequence[BadRange]:
        """Return nothing: streams are not salvaged."""
        return ()
