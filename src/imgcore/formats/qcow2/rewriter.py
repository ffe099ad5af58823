"""Make a QCOW2 image around clusters that stay where they are in a file.

What is new is appended: L1 table, moved clusters, L2 tables, refcount table, refcount
blocks.  The header is in the first sector, so that one sector turns the file into the
new image.  Host clusters that nothing refers to have the refcount 0: QEMU uses them for
data that comes later.

Source: QEMU docs/interop/qcow2.rst.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from imgcore import limits
from imgcore.engine.extents import Kind
from imgcore.errors import OptionError
from imgcore.formats.api import BlockRule
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.new_tables import NewTables, in_chunks, referenced_clusters
from imgcore.formats.qcow2.options import Options, WriteOptions, build_header
from imgcore.formats.qcow2.rebuild import MAX_BLOCKS, place_structure
from imgcore.formats.qcow2.refcounts import RefcountMap, check_table_size
from imgcore.formats.qcow2.references import RefcountStructure
from imgcore.formats.shared.alignment import align_up
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imgcore.engine.extents import Placements
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Survey, WriteRequest

# Offsets in L1 and L2 entries have bits 9..55.
_MAX_OFFSET: Final = 1 << 56
# Refcounts that are encoded at once.
_PIECE_ENTRIES: Final = 1 << 20


def rewriter_for(request: WriteRequest[Options], survey: Survey) -> Qcow2Rewriter:
    """Return the rewriter; see `imgcore.formats.api.Driver.rewriter`."""
    options = WriteOptions.of(request)
    if options.preallocation != "off":
        raise OptionError(
            "qcow2: only what the source allocates stays allocated: leave out "
            f"preallocation={options.preallocation}"
        )
    n_blocks = -(-survey.file_nbytes // (options.refcounts_per_block << options.cluster_bits))
    check_table_size(options, n_blocks * layout.ENTRY_NBYTES)
    return Qcow2Rewriter(options, survey.file_nbytes)


class Qcow2Rewriter:
    """Writes header and tables; see `imgcore.formats.api.Rewriter`.

    Memory: one bit for each cluster of the file, the L1 table, and L2 tables of up to
    MAX_PENDING_TABLE_NBYTES.
    """

    format_name: ClassVar[str] = "qcow2"
    overwrites: ClassVar[Sequence[tuple[int, int]]] = ((0, SECTOR_NBYTES),)

    def __init__(self, options: WriteOptions, file_nbytes: int) -> None:
        self._options = options
        self._tables = NewTables(options)
        self._refcounts = RefcountMap(options, -(-file_nbytes >> options.cluster_bits))
        self._refcounts.add_range(0, 1)
        self._file: TargetFile | None = None
        self._l1_offset = 0
        is_zlib = options.compression_type == layout.COMPRESSION_ZLIB
        covered = MAX_BLOCKS * options.refcounts_per_block << options.cluster_bits
        self.rule: BlockRule = BlockRule(
            block_nbytes=options.cluster_size,
            alignment=options.cluster_size,
            first_offset=options.cluster_size,
            end_offset=min(_MAX_OFFSET, covered),
            takes_compressed=frozenset((Kind.DEFLATE if is_zlib else Kind.ZSTD,)),
        )

    def begin(self, file: TargetFile, append_offset: int) -> int:
        """Reserve the L1 table; see `imgcore.formats.api.Rewriter`."""
        options = self._options
        self._file = file
        self._l1_offset = align_up(append_offset, options.cluster_size)
        return self._counted(
            self._l1_offset, self._l1_offset + options.l1_clusters * options.cluster_size
        )

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Record placements; see `imgcore.formats.api.Rewriter`."""
        assert self._file is not None
        for first, rows in in_chunks(first_block, placements):
            self._tables.add(first, rows)
            self._refcounts.add(referenced_clusters(rows, self._options.cluster_bits))
        if self._tables.nbytes <= limits.MAX_PENDING_TABLE_NBYTES:
            return next_offset
        offset = align_up(next_offset, self._options.cluster_size)
        return self._counted(offset, self._tables.write_complete(self._file, offset))

    def finish(self, next_offset: int) -> None:
        """Write the remaining tables; see `imgcore.formats.api.Rewriter`."""
        options, file = self._options, self._file
        assert file is not None
        offset = align_up(next_offset, options.cluster_size)
        offset = self._counted(offset, self._tables.write_rest(file, offset))
        self._tables.write_l1(file, self._l1_offset)
        structure = self._write_refcounts(file, offset >> options.cluster_bits)
        n_table = structure.table_nbytes >> options.cluster_bits
        header = build_header(options, self._l1_offset, structure.table_offset, n_table)
        file.pwrite(0, header.ljust(SECTOR_NBYTES, b"\0"))

    def _counted(self, start: int, end: int) -> int:
        """Count the clusters of new tables, and return their end."""
        bits = self._options.cluster_bits
        self._refcounts.add_range(start >> bits, (end - start) >> bits)
        return end

    def _write_refcounts(self, file: TargetFile, first_free: int) -> RefcountStructure:
        """Write the refcount table and blocks at the file's end, and set its size."""
        options, refcounts = self._options, self._refcounts
        needed = np.zeros(MAX_BLOCKS, dtype=np.bool_)
        # New structures follow all clusters, and `place_structure` limits their number.
        used = refcounts.used_blocks()[:MAX_BLOCKS]
        needed[: len(used)] = used
        none = RefcountStructure(0, 0, np.zeros(0, dtype=np.int64))
        structure, first, n_new = place_structure(options, none, needed, first_free)
        # All references must be counted before the first block is encoded.
        refcounts.add_range(first, n_new)
        file.truncate((first + n_new) << options.cluster_bits)
        file.pwrite(structure.table_offset, structure.blocks.astype(">u8").view(np.uint8))
        present = np.flatnonzero(structure.blocks)
        step = max(1, _PIECE_ENTRIES // options.refcounts_per_block)
        for start in range(0, len(present), step):
            numbers = present[start : start + step]
            # Blocks follow each other in the file.
            file.pwrite(int(structure.blocks[numbers[0]]), refcounts.encoded(numbers))
        return structure
