"""The parts of a disk that hold data: a list of bounded length, or their number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from imgcore.engine.extents import Kind
from imgcore.limits import KIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
    for first, last in _data_ranges(batches):
        starts, ends = first.astype(np.int64), last.astype(np.int64)
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


def count_blocks(batches: Iterable[Extents], block_nbytes: int) -> int:
    """Count the blocks of ``block_nbytes`` bytes that hold data.

    Parameters
    ----------
    batches : iterable of ndarray, dtype EXTENT_DTYPE
        Ascending over all batches together.
    block_nbytes : int
        A power of two.

    Returns
    -------
    int
    """
    total = 0
    last_counted = -1
    shift = np.uint64(block_nbytes.bit_length() - 1)
    for first, last in _data_ranges(batches):
        first_block = (first >> shift).astype(np.int64)
        last_block = ((last - np.uint64(1)) >> shift).astype(np.int64)
        before = np.concatenate(([last_counted], last_block[:-1]))
        # Rows ascend, so a row shares at most its first block with those before it.
        total += int((last_block - first_block + 1).sum()) - int((first_block == before).sum())
        last_counted = int(last_block[-1])
    return total


def _data_ranges(batches: Iterable[Extents]) -> Iterator[tuple[Any, Any]]:
    """Yield the starts and the ends of the data of each batch that has some."""
    for batch in batches:
        rows = batch[batch["kind"] >= Kind.DATA]
        if len(rows):
            yield rows["guest_offset"], rows["guest_offset"] + rows["length"]
