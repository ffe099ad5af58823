"""Blocks of a stream that come after others that follow them on the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore._core import File
    from imgcore.engine.extents import Extents


class LateBatch(NamedTuple):
    """Compressed blocks, ascending on the disk, with gaps between them.

    Attributes
    ----------
    rows : ndarray, shape (n,), dtype EXTENT_DTYPE
        One for each block.  Only the last may be shorter.
    block_nbytes : int
        Bytes of a decompressed block.
    files : list of tuple
        The files that ``rows`` refer to, as the engine takes them.
    """

    rows: Extents
    block_nbytes: int
    files: list[tuple[File, int, int, int]]


@runtime_checkable
class MayBeLate(Protocol):
    """A source whose blocks may come late.

    Optional: other sources have the order of the disk.
    """

    @property
    def path(self) -> str:
        """The stream's name."""
        ...

    def take_late(self) -> None:
        """Let the supply have no block from the first one on that comes late.

        Called before the supply is asked for; without it, such a block is an error.
        """
        ...

    @property
    def has_late(self) -> bool:
        """Whether blocks are left after the last batch of the supply."""
        ...

    def late_batches(self) -> Iterator[LateBatch]:
        """Yield the blocks that are left, and then verify the end of the stream.

        A batch stays valid until the second batch after it is taken.
        """
        ...
