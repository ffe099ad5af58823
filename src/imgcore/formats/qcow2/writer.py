"""Write QCOW2 images.

A new file contains, in this order: header, L1 table, data, L2 tables, refcount blocks,
refcount table.  If pending tables take too much memory, final L2 tables and refcount
blocks are written between the data, at certain offsets of the disk.  The L1 table of a
disk whose size is not known at first follows the L2 tables.  With preallocation all
tables precede the data, and guest cluster i is host cluster data_start + i.
`front_writer` puts the tables of images that grow before their data.

Source: QEMU docs/interop/qcow2.rst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from imgcore import limits
from imgcore._core import CHECKSUM_BLOCK_NBYTES
from imgcore.engine.geometry import Geometry, Placing
from imgcore.formats.api import Measurement
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.new_tables import NewTables, in_chunks, referenced_clusters
from imgcore.formats.qcow2.options import (
    Options,
    WriteOptions,
    build_header,
    growing_geometry,
    refcount_clusters,
)
from imgcore.formats.qcow2.refcounts import (
    RefcountBuilder,
    check_table_size,
    encode_refcounts,
)
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.shared.flat_writer import FlatWriter
from imgcore.formats.shared.write_checks import zero_policy

if TYPE_CHECKING:
    from imgcore.engine.extents import Placements
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import WriteRequest
    from imgcore.formats.qcow2.front_writer import FrontWriter

_PIECE_NBYTES: Final = 4 << 20
# The L2 tables of so many steps may be pending.
_STEPS: Final = 4


def writer_for(
    request: WriteRequest[Options],
) -> Qcow2Writer | PreallocatedWriter | FrontWriter:
    """Return the writer for the request's preallocation.

    Raises
    ------
    OptionError
        An option's value is not allowed, or cannot be combined with the others.
    LimitExceededError
        The disk is too large for the options.
    """
    options = WriteOptions.of(request)
    if options.preallocation != "off":
        return PreallocatedWriter(options)
    if request.tables_first:
        from imgcore.formats.qcow2.front_writer import FrontWriter

        return FrontWriter(options)
    return Qcow2Writer(options)


def measure(request: WriteRequest[Options], data_nbytes: int) -> Measurement:
    """Return what ``qemu-img measure -O qcow2`` returns for the same options.

    Parameters
    ----------
    request : WriteRequest
    data_nbytes : int
        Size of the clusters that contain data.

    Returns
    -------
    Measurement
        Sizes without compression.
    """
    options = WriteOptions.of(request)
    cluster_size = options.cluster_size
    per_table = options.l2_entries
    l2_tables = -(-options.n_data_clusters // per_table)
    l1_clusters = -(-l2_tables // per_table)
    n_clusters = 1 + l2_tables + l1_clusters + options.n_data_clusters
    fully_allocated = (n_clusters + sum(refcount_clusters(options, n_clusters))) * cluster_size
    whole = options.n_data_clusters * cluster_size
    if options.preallocation in ("falloc", "full"):
        data_nbytes = whole
    return Measurement(fully_allocated - whole + min(data_nbytes, whole), fully_allocated)


def _step_nbytes(options: WriteOptions) -> int:
    """Return the bytes of the disk whose L2 tables are a part of what may be pending.

    It is a power of two, and has whole tables and whole leaves of checksums.
    """
    n_entries = max(limits.MAX_PENDING_TABLE_NBYTES // _STEPS // layout.ENTRY_NBYTES, 1)
    step_nbytes = (1 << n_entries.bit_length() - 1) * options.cluster_size
    return max(step_nbytes, options.l2_entries * options.cluster_size, CHECKSUM_BLOCK_NBYTES)


class Qcow2Writer:
    """Writes images that grow with their data, plain or compressed."""

    format_name: ClassVar[str] = "qcow2"
    needs_own_blocks: ClassVar[bool] = False

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self._tables = NewTables(options)
        self._refcounts = RefcountBuilder(options)
        self._file: TargetFile | None = None
        self.first_offset: int = (1 + options.l1_clusters) * options.cluster_size
        self._is_open_ended = False
        self.geometry: Geometry = growing_geometry(options)._replace(
            step_nbytes=_step_nbytes(options)
        )

    def begin(self, target: Target) -> TargetFile:
        """Open the target; see `imgcore.formats.api.Writer`."""
        self._file = target.main
        self._counted(0, self.first_offset)
        return self._file

    def leave_end_open(self) -> None:
        """Have the L1 table follow the L2 tables; see `EndsLate` in `formats.api`."""
        self._is_open_ended = True
        self.first_offset = self._options.cluster_size

    def end_disk(self, request: WriteRequest[Options]) -> None:
        """Cut the L1 table; see `imgcore.formats.api.EndsLate`."""
        self._options = WriteOptions.of(request)
        self._tables.end_disk(self._options)
        nbytes = self._options.virtual_size
        self.geometry = self.geometry._replace(guest_nbytes=nbytes)

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Record placements; see `imgcore.formats.api.Writer`."""
        for first, rows in in_chunks(first_block, placements):
            self._tables.add(first, rows)
            self._refcounts.add(referenced_clusters(rows, self._options.cluster_bits))
        frontier = next_offset >> self._options.cluster_bits
        pending = self._tables.nbytes + self._refcounts.pending_nbytes(frontier)
        most = limits.MAX_PENDING_TABLE_NBYTES
        end = (first_block + len(placements)) * self._options.cluster_size
        if end % self.geometry.step_nbytes == 0:
            # The other half is for the tables of the next step, and refcounts.
            most //= 2
        if pending <= most:
            return next_offset
        offset = self._aligned(next_offset)
        offset = self._counted(offset, self._tables.write_complete(self._target_file(), offset))
        n_blocks = self._refcounts.n_complete(offset >> self._options.cluster_bits)
        return self._write_refcount_blocks(n_blocks, offset)

    def finish(self, next_offset: int) -> None:
        """Write the remaining tables; see `imgcore.formats.api.Writer`."""
        options, file = self._options, self._target_file()
        offset = self._aligned(max(next_offset, self.first_offset))
        offset = self._counted(offset, self._tables.write_rest(file, offset))
        l1_offset = options.cluster_size
        if self._is_open_ended:
            l1_offset = offset
            offset = self._counted(offset, offset + options.l1_clusters * options.cluster_size)
        n_used = offset >> options.cluster_bits
        n_blocks, n_table = self._refcounts.n_missing(n_used)
        # All references must be counted before the first of these blocks is encoded.
        self._refcounts.add_range(n_used, n_blocks + n_table)
        encoded = self._refcounts.take(n_blocks, offset)
        file.pwrite(offset, encoded)
        table_offset = offset + n_blocks * options.cluster_size
        file.pwrite(table_offset, self._refcounts.table(n_table))
        self._tables.write_l1(file, l1_offset)
        file.truncate(table_offset + n_table * options.cluster_size)
        file.pwrite(0, build_header(options, l1_offset, table_offset, n_table))

    def _target_file(self) -> TargetFile:
        assert self._file is not None
        return self._file

    def _aligned(self, offset: int) -> int:
        return align_up(offset, self._options.cluster_size)

    def _counted(self, start: int, end: int) -> int:
        """Count the clusters of new tables, and return their end."""
        bits = self._options.cluster_bits
        self._refcounts.add_range(start >> bits, (end - start) >> bits)
        return end

    def _write_refcount_blocks(self, n_blocks: int, offset: int) -> int:
        if not n_blocks:
            return offset
        self._refcounts.add_range(offset >> self._options.cluster_bits, n_blocks)
        self._target_file().pwrite(offset, self._refcounts.take(n_blocks, offset))
        return offset + n_blocks * self._options.cluster_size


class PreallocatedWriter(FlatWriter):
    """Writes images in which every cluster is allocated from the start."""

    format_name: ClassVar[str] = "qcow2"

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        size = options.cluster_size
        self._n_l2 = -(-options.n_data_clusters // options.l2_entries)
        n_clusters = 1 + options.l1_clusters + self._n_l2 + options.n_data_clusters
        self._n_blocks, self._n_table = refcount_clusters(options, n_clusters)
        check_table_size(options, self._n_table * size)
        self._l2_offset = (1 + options.l1_clusters) * size
        self._table_offset = self._l2_offset + self._n_l2 * size
        self._blocks_offset = self._table_offset + self._n_table * size
        self._data_start = self._blocks_offset + self._n_blocks * size
        geometry = Geometry(
            block_nbytes=size,
            guest_nbytes=options.virtual_size,
            placing=Placing.IDENTITY,
            zero_policy=zero_policy(options.sparse_nbytes, has_parent=False),
            host_base=self._data_start,
            stored_alignment=size,
            sparse_nbytes=options.sparse_nbytes,
        )
        file_nbytes = self._data_start + options.n_data_clusters * size
        super().__init__(geometry, file_nbytes, options.preallocation)

    def finish(self, next_offset: int) -> None:
        """Write all tables; see `imgcore.formats.api.Writer`."""
        file, options, size = self._finished_file(), self._options, self._options.cluster_size
        l1 = np.zeros(options.l1_entries, dtype=np.uint64)
        l1[: self._n_l2] = np.arange(self._n_l2, dtype=np.uint64) * np.uint64(size)
        l1[: self._n_l2] += np.uint64(self._l2_offset | layout.COPIED)
        file.pwrite(size, l1.astype(">u8").view(np.uint8))
        self._write_l2(file)
        blocks = np.arange(self._n_blocks, dtype=np.uint64) * np.uint64(size)
        table = np.zeros(self._n_table * options.l2_entries, dtype=">u8")
        table[: self._n_blocks] = blocks + np.uint64(self._blocks_offset)
        file.pwrite(self._table_offset, table.view(np.uint8))
        self._write_refcounts(file)
        file.pwrite(0, build_header(options, size, self._table_offset, self._n_table))

    def _write_l2(self, file: TargetFile) -> None:
        step = _PIECE_NBYTES // layout.ENTRY_NBYTES
        n_entries = self._n_l2 * self._options.l2_entries
        for first in range(0, n_entries, step):
            last = min(first + step, n_entries)
            entries = np.arange(first, last, dtype=np.uint64) << np.uint64(
                self._options.cluster_bits
            )
            entries += np.uint64(self._data_start | layout.COPIED)
            entries[max(0, self._options.n_data_clusters - first) :] = 0
            offset = self._l2_offset + first * layout.ENTRY_NBYTES
            file.pwrite(offset, entries.astype(">u8").view(np.uint8))

    def _write_refcounts(self, file: TargetFile) -> None:
        per_block, size = self._options.refcounts_per_block, self._options.cluster_size
        total = self._file_nbytes // size
        step = max(1, _PIECE_NBYTES // per_block)
        for block in range(0, self._n_blocks, step):
            n_blocks = min(step, self._n_blocks - block)
            used = total - block * per_block
            cells = np.zeros(n_blocks * per_block, dtype=np.uint16)
            cells[: min(cells.size, used)] = 1
            encoded = encode_refcounts(cells, self._options.refcount_order)
            file.pwrite(self._blocks_offset + block * size, encoded)
