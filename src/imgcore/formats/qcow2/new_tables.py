"""The L1 and L2 tables of a QCOW2 image that is being written.

Source: QEMU docs/interop/qcow2.rst, "Cluster mapping".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore._core import CoreError
from imgcore.engine.extents import BlockState
from imgcore.errors import LimitExceededError
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.tables import table_format
from imgcore.formats.shared.sparse_tables import write_with_holes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from imgcore.engine.extents import Placements
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.qcow2.options import WriteOptions

# Placements that are encoded at once: 1 MiB of entries.
_CHUNK_ENTRIES: Final = 1 << 17


def in_chunks(first_block: int, placements: Placements) -> Iterator[tuple[int, Placements]]:
    """Yield (number of the first block, placements) in chunks that have data."""
    for start in range(0, len(placements), _CHUNK_ENTRIES):
        rows = placements[start : start + _CHUNK_ENTRIES]
        if rows["state"].any():
            yield first_block + start, rows


def referenced_clusters(rows: Placements, cluster_bits: int) -> NDArray[np.int64]:
    """Return the host clusters that placements refer to, each once for each block."""
    state = rows["state"]
    # Offsets in an image have at most 61 bits, so signed integers can hold them.
    offsets = rows["host_offset"].astype(np.int64)
    parts = [offsets[state == BlockState.STORED] >> cluster_bits]
    packed = state == BlockState.COMPRESSED
    if packed.any():
        begin = offsets[packed]
        cluster = begin >> cluster_bits
        last = (begin + rows["length"][packed].astype(np.int64) - 1) >> cluster_bits
        while cluster.size:
            parts.append(cluster)
            goes_on = cluster < last
            cluster, last = cluster[goes_on] + 1, last[goes_on]
    return np.concatenate(parts)


class NewTables:
    """The L1 table, and the L2 tables still to be written.

    Attributes
    ----------
    nbytes : int
        Size of the complete L2 tables.
    """

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self._per_table = options.l2_entries
        self._format = table_format(options.cluster_bits, version=options.version)
        self._l1 = np.zeros(options.l1_entries, dtype=np.uint64)
        # Complete tables: indices in L1, and rows to write.
        self._chunks: list[tuple[NDArray[np.int64], NDArray[np.uint64]]] = []
        # The table that is being filled.
        self._tail_index = -1
        self._tail = np.zeros(0, dtype=np.uint64)
        self.nbytes: int = 0

    def add(self, first_block: int, placements: Placements) -> None:
        """Encode placements; LimitExceededError if one does not fit in an entry."""
        per_table = self._per_table
        first = first_block // per_table
        last = (first_block + len(placements) - 1) // per_table
        lead = first_block - first * per_table
        tables = np.zeros((last - first + 1) * per_table, dtype=np.uint64)
        self._encode(placements, tables[lead : lead + len(placements)].view(np.uint8))
        if self._tail_index == first:
            tables[:lead] = self._tail[:lead]
        else:
            self._close_tail()
        rows = tables.reshape(-1, per_table)
        complete = last - first + 1
        if first_block + len(placements) < (last + 1) * per_table:
            complete -= 1
            self._tail_index, self._tail = last, rows[-1].copy()
        else:
            self._tail_index = -1
        self._keep(first, rows[:complete])

    def _encode(self, placements: Placements, out: NDArray[np.uint8]) -> None:
        try:
            self._format.encode(placements, out)
        except CoreError as error:
            row = placements[error.offset]
            raise LimitExceededError(
                f"host offset {int(row['host_offset']):#x} with {int(row['length'])} bytes does "
                "not fit in an L2 entry",
                path=self._options.target_name or None,
            ) from None

    def _close_tail(self) -> None:
        """Treat the table being filled as complete."""
        if self._tail_index >= 0:
            self._keep(self._tail_index, self._tail.reshape(1, -1))
            self._tail_index = -1

    def _keep(self, first: int, tables: NDArray[np.uint64]) -> None:
        used = np.flatnonzero(tables.any(axis=1))
        if used.size:
            kept = tables if used.size == len(tables) else tables[used]
            self._chunks.append((used.astype(np.int64) + first, kept))
            self.nbytes += kept.nbytes

    def write_complete(self, file: TargetFile, offset: int) -> int:
        """Write the complete L2 tables at ``offset``; return the end."""
        for indices, rows in self._chunks:
            file.pwrite(offset, rows.view(np.uint8).reshape(-1))
            places = np.arange(len(rows), dtype=np.uint64)
            places = places * np.uint64(self._options.cluster_size) + np.uint64(offset)
            self._l1[indices] = places | np.uint64(layout.COPIED)
            offset += rows.nbytes
        self._chunks, self.nbytes = [], 0
        return offset

    def write_rest(self, file: TargetFile, offset: int) -> int:
        """Write the L2 tables that are left at ``offset``; return the end."""
        self._close_tail()
        return self.write_complete(file, offset)

    def end_disk(self, options: WriteOptions) -> None:
        """Cut the L1 table to that of a smaller disk."""
        self._options = options
        self._l1 = self._l1[: options.l1_entries]

    def write_l1(self, file: TargetFile, offset: int) -> None:
        """Write the L1 table into a hole of the file."""
        write_with_holes(file, offset, self._l1.astype(">u8"))
