"""Finds where the content of a file ends that is followed by zeros.

Images are copied onto volumes, and some programs pad them to whole blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.formats.shared.alignment import align_up
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource

_PIECE_NBYTES: Final = 65536


def end_of_data(file: ByteSource, max_zeros_nbytes: int) -> int | None:
    """Return the end of the last whole sector that is not all zeros.

    Parameters
    ----------
    file : ByteSource
    max_zeros_nbytes : int
        The most bytes to read in search of it.  Holes of the file do not count.

    Returns
    -------
    int or None
        Host offset in bytes, a multiple of 512; None if more zeros follow.
    """
    position = _end_before_hole(file)
    position -= position % SECTOR_NBYTES
    limit = max(0, position - max_zeros_nbytes)
    while position > limit:
        start = max(limit, position - _PIECE_NBYTES)
        piece = file.pread(start, position - start).rstrip(b"\0")
        if piece:
            return start + align_up(len(piece), SECTOR_NBYTES)
        position = start
    return None


def _end_before_hole(file: ByteSource) -> int:
    """Return where a hole at the end of the file starts, in whole sectors."""
    low, high = 0, file.nbytes
    if not _is_hole_from(file, max(high - 1, 0)):
        return high
    # No data follows `high`, but some follows `low`.
    while high - low > SECTOR_NBYTES:
        middle = (low + high) // 2
        if _is_hole_from(file, middle):
            high = middle
        else:
            low = middle
    return min(align_up(high, SECTOR_NBYTES), file.nbytes)


def _is_hole_from(file: ByteSource, position: int) -> bool:
    start, end = file.next_data(position)
    return start >= end
