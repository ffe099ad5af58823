"""Finds the grains of a streamOptimized VMDK without its tables, by their markers."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

import numpy as np

from imgcore.engine.extents import EXTENT_DTYPE, FLAG_GRAIN_MARKER, Kind, clip
from imgcore.formats.vmdk.layout import Marker
from imgcore.formats.vmdk.stream_walk import walk
from imgcore.limits import MAX_BATCH_ROWS, SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.engine.extents import Extents
    from imgcore.formats.vmdk.header import SparseExtent


class StreamGrains:
    """The grains that a walk of the whole stream finds.

    A grain that is not found is a hole only if nothing is missing from the stream where
    it would be; otherwise it is LOST.

    Parameters
    ----------
    extent : SparseExtent
        With compressed grains and markers.
    guest_base, guest_end : int
        Where the extent is on the disk, in bytes.

    Notes
    -----
    Memory: 16 bytes for each grain found.
    """

    def __init__(self, extent: SparseExtent, guest_base: int, guest_end: int) -> None:
        self._extent = extent
        self._guest_base, self._guest_end = guest_base, guest_end
        grains, places, is_lost_before = array("q"), array("q"), array("b")
        grain_nsectors = extent.grain_nbytes // SECTOR_NBYTES
        is_damaged, is_complete, in_order = False, False, True
        for item in walk(extent.file, extent.header, resumes=True):
            is_damaged |= item.is_after_damage
            if item.kind is None:
                grain = item.lba // grain_nsectors
                in_order &= not grains or grain > grains[-1]
                grains.append(grain)
                places.append(item.offset)
                is_lost_before.append(is_damaged)
                is_damaged = False
            elif item.kind in (Marker.GD, Marker.FOOTER):
                # The directory follows the last grain.
                is_complete = True
        # Without it, there may have been more grains.
        is_lost_after = is_damaged or not is_complete
        lost = np.array(is_lost_before, dtype=np.bool_)
        if not in_order:
            # Nothing tells where the missing grains would be.
            is_lost_after |= bool(lost.any())
            lost[:] = is_lost_after
        self._grains, first = np.unique(np.array(grains, dtype=np.int64), return_index=True)
        self._places = np.array(places, dtype=np.int64)[first]
        # Whether the grains before each found one, and after the last, are LOST.
        self._is_lost = np.append(lost[first], is_lost_after)

    def place_of(self, grain: int) -> int | None:
        """Return the host offset of a grain's marker, None if it was not found."""
        index = int(np.searchsorted(self._grains, grain))
        found = index < len(self._grains) and int(self._grains[index]) == grain
        return int(self._places[index]) if found else None

    def extents(self, start: int, stop: int, file_index: int) -> Iterator[Extents]:
        """Yield batches of ZLIB, HOLE and LOST that cover guest range [start, stop)."""
        grain_nbytes = self._extent.grain_nbytes
        first = (start - self._guest_base) // grain_nbytes
        last = -(-(stop - self._guest_base) // grain_nbytes)
        low, high = np.searchsorted(self._grains, (first, last)).tolist()
        step = MAX_BATCH_ROWS // 4
        at = start
        for index in range(low, high, step):
            end = min(index + step, high)
            until = stop
            if end < high:
                until = self._guest_base + int(self._grains[end]) * grain_nbytes
            yield self._batch(index, end, at, until, file_index)
            at = until
        if at < stop:
            yield self._batch(high, high, at, stop, file_index)

    def _batch(self, first: int, last: int, start: int, stop: int, file_index: int) -> Extents:
        """Return the rows of found grains [first, last), and of those between them."""
        extent, base = self._extent, self._guest_base
        grains, places = self._grains[first:last], self._places[first:last]
        starts = base + grains * extent.grain_nbytes
        ends = np.minimum(starts + extent.grain_nbytes, self._guest_end)
        # Before each grain, and after the last one.
        gap_starts, gap_ends = np.append(start, ends), np.append(starts, stop)
        is_gap = gap_starts < gap_ends
        gaps = np.zeros(int(is_gap.sum()), dtype=EXTENT_DTYPE)
        gaps["guest_offset"] = gap_starts[is_gap]
        gaps["length"] = (gap_ends - gap_starts)[is_gap]
        gaps["kind"] = np.where(self._is_lost[first : last + 1][is_gap], Kind.LOST, Kind.HOLE)
        found = np.zeros(len(grains), dtype=EXTENT_DTYPE)
        found["guest_offset"], found["length"] = starts, ends - starts
        found["host_offset"] = places
        found["host_length"] = np.minimum(extent.compressed_bound, extent.file.nbytes - places)
        found["file"] = file_index
        found["kind"] = Kind.ZLIB
        found["flags"] = FLAG_GRAIN_MARKER
        rows = np.concatenate((gaps, found))
        return clip(rows[np.argsort(rows["guest_offset"], kind="stable")], start, stop)
