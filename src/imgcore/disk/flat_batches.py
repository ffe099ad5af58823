"""Cuts a disk that one file stores unchanged into batches for a flat target.

NumPy is not imported: it takes longer than a small conversion, and the engine starts
on a large one before it would be there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore._core import extent_table
from imgcore.engine.kinds import FLAG_UNREAD, ExtentRow, Kind
from imgcore.engine.supply import Batch
from imgcore.files.host_file import may_lend_pages
from imgcore.formats.shared.flat_reader import HostData, flat_ranges

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.engine.geometry import Geometry
    from imgcore.files.byte_source import ByteSource

# Each row takes two system calls to find, so a small batch makes the first one come
# soon.
_BATCH_ROWS: Final = 1 << 14


def flat_batches(file: ByteSource, nbytes: int, geometry: Geometry) -> Iterator[Batch]:
    """Yield the batches of a disk; each ends with a block of the target.

    Parameters
    ----------
    file : ByteSource
        It has guest byte n at offset n.
    nbytes : int
        Bytes of the disk.
    geometry : Geometry
        The target's.  Its disk may be larger and then ends in zeros.  It may also be
        smaller, by less than a sector.
    """
    unit = geometry.unit_nbytes
    moved_end = geometry.moved_end if may_lend_pages(file) else 0
    # Without leaves only the rows take memory: a batch may be the whole disk.
    most = geometry.max_batch_nbytes if geometry.leaf_nbytes else geometry.guest_nbytes + 1
    rows: list[ExtentRow] = []
    start = 0
    ranges = _cut(_cut_at(_ranges(file, nbytes, geometry.guest_nbytes), moved_end), most)
    for first, last, kind in ranges:
        flags = FLAG_UNREAD if last <= moved_end else 0
        cut = last - last % unit
        is_full = len(rows) >= _BATCH_ROWS or last % most == 0
        if is_full and cut > start and cut >= first:
            if first < cut:
                rows.append(_row(first, cut, kind, flags))
            yield Batch(start, cut, extent_table(rows))
            rows = []
            start = first = cut
        if first < last:
            rows.append(_row(first, last, kind, flags))
    if rows:
        yield Batch(start, geometry.guest_nbytes, extent_table(rows))


def _ranges(file: ByteSource, nbytes: int, disk_end: int) -> Iterator[tuple[int, int, Kind]]:
    held = min(nbytes, disk_end)
    for first, last, has_data in flat_ranges(HostData(file), 0, held, 0):
        yield first, last, Kind.DATA if has_data else Kind.HOLE
    if held < disk_end:
        yield held, disk_end, Kind.ZERO


def _cut(ranges: Iterator[tuple[int, int, Kind]], step: int) -> Iterator[tuple[int, int, Kind]]:
    """Yield the ranges cut at multiples of ``step``."""
    for first, last, kind in ranges:
        while first < last:
            stop = min(last, first - first % step + step)
            yield first, stop, kind
            first = stop


def _cut_at(
    ranges: Iterator[tuple[int, int, Kind]], offset: int
) -> Iterator[tuple[int, int, Kind]]:
    """Yield the ranges, one of which is cut at an offset."""
    for first, last, kind in ranges:
        if first < offset < last:
            yield first, offset, kind
            first = offset
        yield first, last, kind


def _row(first: int, last: int, kind: Kind, flags: int) -> ExtentRow:
    nbytes = last - first
    if kind is Kind.DATA:
        return first, nbytes, first, nbytes, 0, kind, flags
    return first, nbytes, 0, 0, 0, kind, 0
