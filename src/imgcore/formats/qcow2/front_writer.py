"""Write QCOW2 images whose tables precede all data.

The file contains, in this order: header, L1 table, refcount table, refcount blocks, L2
tables, data.  So the number of L2 tables and the size of the data must be known first.

Source: QEMU docs/interop/qcow2.rst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from imgcore.formats.qcow2.new_tables import NewTables, in_chunks, referenced_clusters
from imgcore.formats.qcow2.options import (
    WriteOptions,
    build_header,
    growing_geometry,
    refcount_clusters,
)
from imgcore.formats.qcow2.refcounts import RefcountBuilder, check_table_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from imgcore.engine.extents import Placements
    from imgcore.engine.geometry import Geometry
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile


class FrontWriter:
    """Writes tables in the order of the disk, as blocks are placed."""

    format_name: ClassVar[str] = "qcow2"
    needs_own_blocks: ClassVar[bool] = False

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self.geometry: Geometry = growing_geometry(options)._replace(packs_in_order=True)
        # Until the blocks are known.
        self.first_offset: int = options.cluster_size
        self._file: TargetFile | None = None

    def know_blocks(self, blocks: Iterable[tuple[int, Placements]], data_nbytes: int) -> None:
        """Find the size of all tables; see `imgcore.formats.api.NeedsBlocks`."""
        options = self._options
        size = options.cluster_size
        n_front = 1 + options.l1_clusters + self._count_l2_tables(blocks)
        n_clusters = n_front + -(-data_nbytes // size)
        self._n_blocks, self._n_table = refcount_clusters(options, n_clusters)
        check_table_size(options, self._n_table * size)
        self._table_offset = (1 + options.l1_clusters) * size
        self._blocks_offset = self._table_offset + self._n_table * size
        self._l2_offset = self._blocks_offset + self._n_blocks * size
        self.first_offset = (n_front + self._n_table + self._n_blocks) * size

    def _count_l2_tables(self, blocks: Iterable[tuple[int, Placements]]) -> int:
        count, last = 0, -1
        for first_block, rows in blocks:
            used = np.flatnonzero(rows["state"]) + first_block
            tables = np.unique(used // self._options.l2_entries)
            if tables.size:
                count += len(tables) - int(tables[0] == last)
                last = int(tables[-1])
        return count

    def begin(self, target: Target) -> TargetFile:
        """Open the target; see `imgcore.formats.api.Writer`."""
        options = self._options
        self._file = target.main
        self._tables = NewTables(options)
        self._next_l2 = self._l2_offset
        self._refcounts = RefcountBuilder(options)
        self._refcounts.add_range(0, self.first_offset >> options.cluster_bits)
        return self._file

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Write the tables that are complete; see `imgcore.formats.api.Writer`."""
        assert self._file is not None
        bits = self._options.cluster_bits
        for first, rows in in_chunks(first_block, placements):
            self._tables.add(first, rows)
            self._refcounts.add(referenced_clusters(rows, bits))
        self._next_l2 = self._tables.write_complete(self._file, self._next_l2)
        # More compressed clusters may go into the last host cluster.
        frontier = (next_offset >> bits) - 1
        self._write_refcounts(self._refcounts.n_complete(frontier))
        return next_offset

    def _write_refcounts(self, n_blocks: int) -> None:
        assert self._file is not None
        done = len(self._refcounts.block_offsets) * self._options.cluster_size
        offset = self._blocks_offset + done
        if n_blocks:
            self._file.pwrite(offset, self._refcounts.take(n_blocks, offset))

    def finish(self, next_offset: int) -> None:
        """Write the remaining tables; see `imgcore.formats.api.Writer`."""
        options, file = self._options, self._file
        assert file is not None
        end = max(next_offset, self.first_offset)
        file.truncate(-(-end // options.cluster_size) * options.cluster_size)
        self._next_l2 = self._tables.write_rest(file, self._next_l2)
        self._write_refcounts(self._n_blocks - len(self._refcounts.block_offsets))
        file.pwrite(self._table_offset, self._refcounts.table(self._n_table))
        self._tables.write_l1(file, options.cluster_size)
        header = build_header(options, options.cluster_size, self._table_offset, self._n_table)
        file.pwrite(0, header)
