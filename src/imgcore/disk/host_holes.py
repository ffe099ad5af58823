"""Turns holes of host files into zeros, so that they need not be read.

Images with preallocated tables refer to all of their file, which may be nearly empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.engine.extents import EXTENT_DTYPE, Kind
from imgcore.limits import MAX_BATCH_ROWS, MIB, SECTOR_NBYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.engine.sources import SourceFile
    from imgcore.files.byte_source import ByteSource

# A row costs up to two system calls, which pays where there is much to read.
_MIN_ROW_NBYTES: Final = 1 * MIB
# Files that lack less than this share of their size are not looked at.
_MIN_HOLES_SHARE: Final = 16


class HostHoles:
    """Finds the extents of an image that lie in holes of its files.

    Parameters
    ----------
    sources : sequence of SourceFile
        What extents refer to by index.
    """

    def __init__(self, sources: Sequence[SourceFile]) -> None:
        self._sources = sources
        self._is_sparse: NDArray[np.bool_] | None = None
        # The data found last in each file: to find its end may take the kernel long.
        self._data: dict[int, tuple[int, int]] = {}

    def cut(self, rows: Extents) -> Iterator[Extents]:
        """Yield a gap-free batch with its long DATA rows cut where their file has holes.

        Yields
        ------
        ndarray, shape (n,), dtype EXTENT_DTYPE, 1 <= n <= MAX_BATCH_ROWS
            The holes are ZERO, since they hide what a parent has there.
        """
        pending: list[Extents] = []
        n_rows = 0
        for piece in self._pieces(rows):
            if n_rows + len(piece) > MAX_BATCH_ROWS:
                yield np.concatenate(pending)
                pending, n_rows = [], 0
            pending.append(piece)
            n_rows += len(piece)
        yield np.concatenate(pending) if len(pending) > 1 else pending[0]

    def _pieces(self, rows: Extents) -> Iterator[Extents]:
        """Yield runs of rows that stay as they are, and the parts of each that is cut."""
        if self._is_sparse is None:
            sparse = [_is_sparse(source.file) for source in self._sources]
            self._is_sparse = np.array(sparse, dtype=np.bool_)
        done = 0
        long = np.flatnonzero((rows["kind"] == Kind.DATA) & (rows["length"] >= _MIN_ROW_NBYTES))
        for index in long[self._is_sparse[rows["file"][long]]].tolist():
            if not self._has_hole(rows[index]):
                continue
            if done < index:
                yield rows[done:index]
            yield from self._parts(rows[index])
            done = index + 1
        if done < len(rows):
            yield rows[done:]

    def _has_hole(self, row: np.void) -> bool:
        start = int(row["host_offset"])
        data_start, data_end = self._next_data(int(row["file"]), start)
        return data_start > start or data_end < start + int(row["length"])

    def _next_data(self, index: int, position: int) -> tuple[int, int]:
        """Return the next data at or after a place in a file, in whole sectors."""
        start, end = self._data.get(index, (0, 0))
        if not start <= position < end:
            file = self._sources[index].file
            start, end = file.next_data(position)
            if start >= end:
                start = end = max(file.nbytes, position + SECTOR_NBYTES)
            start -= start % SECTOR_NBYTES
            end += -end % SECTOR_NBYTES
            self._data[index] = start, end
        return max(start, position), end

    def _parts(self, row: np.void) -> Iterator[Extents]:
        index, shift = int(row["file"]), int(row["host_offset"]) - int(row["guest_offset"])
        position, stop = int(row["guest_offset"]), int(row["guest_offset"]) + int(row["length"])
        parts: list[tuple[int, int, int, int, int, int, int]] = []
        while position < stop:
            start, end = self._next_data(index, position + shift)
            start, end = min(start - shift, stop), min(end - shift, stop)
            if position < start:
                parts.append((position, start - position, 0, 0, 0, Kind.ZERO, 0))
            if start < end:
                parts.append((start, end - start, start + shift, end - start, index, Kind.DATA, 0))
            position = max(start, end)
            if len(parts) >= MAX_BATCH_ROWS - 1 or position >= stop:
                yield np.array(parts, dtype=EXTENT_DTYPE)
                parts.clear()


def _is_sparse(file: ByteSource) -> bool:
    holes_nbytes = file.nbytes - file.allocated_nbytes
    return not file.is_block_device and holes_nbytes > file.nbytes // _MIN_HOLES_SHARE
