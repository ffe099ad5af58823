"""The parts of a disk that hold data, as a list of bounded length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.engine.extents import Kind
from imgcore.limits import KIB

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents

# Parts start and end at multiples of this, or of larger units if data is scattered.
_MIN_GRANULE_NBYTES: Final = 64 * KIB


def data_parts(
    batches: Iterable[Extents], virtual_size: int, max_parts: int
) -> list[tuple[int, int]]:
    """Return (offset, length) of the parts that may hold data, ascending.

    Parameters
    ----------
    batches : iterable of ndarray, dtype EXTENT_DTYPE
        Ascending extents of the disk.
    virtual_size : int
        Bytes of the disk.
    max_parts : int
        The most parts to return: scattered data is joined, with the holes in between.
    """
    granule = _MIN_GRANULE_NBYTES
    ranges: NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)
    for rows in batches:
        data = rows[rows["kind"] >= Kind.DATA]
        starts = data["guest_offset"].astype(np.int64)
        ends = starts + data["length"].astype(np.int64)
        new = np.stack((starts // granule, -(-ends // granule)), axis=1)
        ranges = _joined(np.concatenate((ranges, new)))
        while len(ranges) > max_parts:
            granule *= 2
            ranges[:, 0] //= 2
            ranges[:, 1] = -(-ranges[:, 1] // 2)
            ranges = _joined(ranges)
    clipped = np.minimum(ranges * granule, virtual_size)
    return [(start, end - start) for start, end in clipped.tolist()]


def _joined(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join ascending ranges that touch or overlap their neighbours."""
    if not len(ranges):
        return ranges
    is_first = np.concatenate(([True], ranges[1:, 0] > ranges[:-1, 1]))
    is_last = np.concatenate((is_first[1:], [True]))
    return np.stack((ranges[is_first, 0], ranges[is_last, 1]), axis=1)
