"""Overwrites bytes of a disk where they are: the short way of a write.

The engine keeps tables of what may be overwritten.  Such a write changes no table, so
it needs no lock, and any number of threads do it at the same time, also while others
hold ranges of the disk.  What it finds no place for takes the long way.

A write that has begun may end at a place that the disk does not have any more.  Nothing
else is there by then: it is a use of the image like a read, and space is used again
only when nobody reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, SupportsIndex, cast

import numpy as np

from imgcore._core import CoreError
from imgcore.disk.random_access import DiskOfState, span_nbytes
from imgcore.engine.extents import EXTENT_DTYPE, Kind
from imgcore.errors import ImgcoreError
from imgcore.files.descriptors import is_of_system
from imgcore.formats.api import Overwritable
from imgcore.limits import MIB

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from imgcore._core import Uses
    from imgcore.disk.disk_state import DiskState
    from imgcore.engine.extents import Extents
    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.api import Place

_CACHE_NBYTES: Final = 8 * MIB
# A table is made once so many writes would have used it; so many counts are kept.
_MIN_WRITES: Final = 4
_MAX_COUNTS: Final = 4096


class InPlaceWrites(DiskOfState):
    """Writes to the places that an updater states.

    Parameters
    ----------
    state : DiskState
        Stays open while ``uses`` are not closed.
    updater : Overwritable
        It has begun.
    uses : Uses
        The image's reads, of which each write is one.
    lock : context manager
        Held during calls of the updater.
    """

    def __init__(
        self,
        state: DiskState,
        updater: Overwritable,
        *,
        uses: Uses,
        lock: AbstractContextManager[object],
    ) -> None:
        self._updater = updater
        self._span_nbytes = span_nbytes(state.layers[:1])
        self._counts: dict[int, int] = {}
        super().__init__(
            state,
            state.layers[0].sources,
            span=self._span_nbytes,
            cache=_CACHE_NBYTES,
            uses=uses,
            lock=lock,
        )

    def overwrite(self, offset: SupportsIndex, data: object) -> int | None:
        """Write bytes and return their number; None if they must take the long way.

        Then a part of them may be written.
        """
        try:
            return self.write(offset, data)
        except CoreError as error:
            self.explain(error)

    def note(self, start: int) -> None:
        """Note a write that has taken the long way to places that exist."""
        span = start // self._span_nbytes
        count = self._counts.get(span, 0) + 1
        if count >= _MIN_WRITES or self._state.layers[0].is_flat:
            self._counts.pop(span, None)
            self.load(start)
            return
        if len(self._counts) == _MAX_COUNTS:
            self._counts.clear()
        self._counts[span] = count

    def rows(self, start: int, end: int) -> Extents:
        """Return what may be overwritten of a range as DATA, and the rest as holes."""
        rows: list[tuple[int, int, int, int, int, int, int]] = []
        at = start
        for place in self._places(start, end):
            first, last = max(place.guest_offset, at), place.guest_offset + place.length
            last = min(last, end)
            if first >= last or not self._is_in_file(place):
                continue
            if at < first:
                rows.append((at, first - at, 0, 0, 0, Kind.HOLE, 0))
            host_offset = place.host_offset + first - place.guest_offset
            rows.append((first, last - first, host_offset, last - first, place.file, Kind.DATA, 0))
            at = last
        if at < end:
            rows.append((at, end - at, 0, 0, 0, Kind.HOLE, 0))
        return np.array(rows, EXTENT_DTYPE)

    def _places(self, start: int, end: int) -> list[Place]:
        """Return the places of a range; none if they are damaged somewhere."""
        try:
            return self._updater.overwritable(start, end - start)
        except ImgcoreError:
            return []
        except OSError as error:
            if not is_of_system(error):
                raise
            return []

    def _is_in_file(self, place: Place) -> bool:
        file = cast("UpdateFile", self._state.sources[place.file].file)
        # From now on, it may change at any time.
        file.note_written()
        return 0 <= place.host_offset <= file.nbytes - place.length

    def is_damage(self, error: Exception) -> bool:
        """Return False: the long way finds out what is damaged."""
        return False
