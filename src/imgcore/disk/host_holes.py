"""Turns holes of host files into zeros, so that they need not be read.

An image with preallocated tables refers to its whole file, which may be almost empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.engine.kinds import FLAG_UNREAD, Kind
from imgcore.formats.shared.flat_reader import HostData, flat_rows
from imgcore.limits import MAX_BATCH_ROWS, MIB

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.engine.source_file import SourceFile
    from imgcore.files.byte_source import ByteSource

# A row costs up to two system calls, which is worth it only for long reads.
_MIN_ROW_NBYTES: Final = 1 * MIB
# Files are searched if holes take more than 1/16 of their size.
_MIN_HOLES_DIVISOR: Final = 16


class HostHoles:
    """Finds the extents of an image that lie in holes of its files.

    Parameters
    ----------
    sources : sequence of SourceFile
        The files that extents refer to by index.
    known : set of int
        The indices of files whose holes the extents state already.
    """

    def __init__(
        self, sources: Sequence[SourceFile], known: AbstractSet[int] = frozenset()
    ) -> None:
        self._sources = sources
        self._known = known
        self._is_sparse: NDArray[np.bool_] | None = None
        self._data = [HostData(source.file) for source in sources]

    def cut(self, rows: Extents) -> Iterator[Extents]:
        """Yield a gap-free batch, its long DATA rows cut at holes of their files.

        Yields
        ------
        ndarray, shape (n,), dtype EXTENT_DTYPE, 1 <= n <= MAX_BATCH_ROWS
            The holes are ZERO, since they hide the data of a parent.
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
        """Yield the rows in order: unchanged runs, and the parts of cut rows."""
        if self._is_sparse is None:
            sparse = [
                index not in self._known and is_sparse(source.file)
                for index, source in enumerate(self._sources)
            ]
            self._is_sparse = np.array(sparse, dtype=np.bool_)
        done = 0
        is_read = (rows["kind"] == Kind.DATA) & ((rows["flags"] & FLAG_UNREAD) == 0)
        long = np.flatnonzero(is_read & (rows["length"] >= _MIN_ROW_NBYTES))
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
        data_start, data_end = self._data[int(row["file"])].next(start)
        return data_start > start or data_end < start + int(row["length"])

    def _parts(self, row: np.void) -> Iterator[Extents]:
        index, start = int(row["file"]), int(row["guest_offset"])
        return flat_rows(
            self._data[index],
            start,
            start + int(row["length"]),
            shift=int(row["host_offset"]) - start,
            file_index=index,
            hole=Kind.ZERO,
            max_rows=MAX_BATCH_ROWS,
        )


def is_sparse(file: ByteSource) -> bool:
    """Tell whether a file has so many holes that it is worth to look for them."""
    holes_nbytes = file.nbytes - file.allocated_nbytes
    return not file.is_block_device and holes_nbytes > file.nbytes // _MIN_HOLES_DIVISOR
