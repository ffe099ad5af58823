"""Write the sparse kinds of VMDK: streamOptimized and monolithicSparse.

Source: Virtual Disk Format 5.0, "Hosted Sparse Extents", "Stream-Optimized Compressed
Sparse Extents".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from imgcore.engine.geometry import CodecId, Geometry, Prefix
from imgcore.errors import LimitExceededError
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.shared.write_checks import zero_policy
from imgcore.formats.vmdk import layout
from imgcore.formats.vmdk.descriptor import compose_descriptor
from imgcore.formats.vmdk.layout import Flags, SparseHeader
from imgcore.formats.vmdk.options import WriteOptions, is_plain_name
from imgcore.limits import (
    SECTOR_NBYTES,
    VMDK_MAX_DIRECTORY_ENTRIES,
    VMDK_MAX_SPARSE_FILE_NBYTES,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from imgcore._core import TableFormat
    from imgcore.engine.extents import Placements
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile

_GT_NSECTORS: Final = layout.GT_NBYTES // SECTOR_NBYTES
# In a streamOptimized file a marker and the table follow the table's grains.
_GT_GAP_NBYTES: Final = SECTOR_NBYTES + layout.GT_NBYTES
_STREAM_FIRST_OFFSET: Final = layout.STREAM_OVERHEAD_NSECTORS * SECTOR_NBYTES


def _n_directory_entries(options: WriteOptions) -> int:
    count = -(-options.virtual_size // (options.grain_nbytes * layout.GTES_PER_GT))
    if count > VMDK_MAX_DIRECTORY_ENTRIES:
        raise LimitExceededError(
            f"{options.virtual_size} bytes need {count} grain directory entries, allowed up to "
            f"{VMDK_MAX_DIRECTORY_ENTRIES}: use a larger grain_size"
        )
    return count


def _directory_nbytes(n_entries: int) -> int:
    return align_up(n_entries * layout.ENTRY_NBYTES, SECTOR_NBYTES)


def stream_bound_nbytes(options: WriteOptions, data_nbytes: int) -> int:
    """Return the largest streamOptimized file for ``data_nbytes`` in whole grains."""
    grain_nbytes = options.grain_nbytes
    n_grains = -(-min(data_nbytes, options.virtual_size) // grain_nbytes)
    # A stored block of DEFLATE costs 5 bytes; 1/512 covers blocks of 4 KiB and more.
    grain_bound = align_up(
        layout.GRAIN_MARKER.size + grain_nbytes + grain_nbytes // 512 + 64, SECTOR_NBYTES
    )
    n_entries = _n_directory_entries(options)
    n_tables = min(n_grains, n_entries)
    # Markers of directory and footer, the footer, the end-of-stream marker.
    end_nbytes = _directory_nbytes(n_entries) + 4 * SECTOR_NBYTES
    return _STREAM_FIRST_OFFSET + n_grains * grain_bound + n_tables * _GT_GAP_NBYTES + end_nbytes


def sparse_file_nbytes(options: WriteOptions, data_nbytes: int) -> int:
    """Return the size of monolithicSparse for ``data_nbytes`` in whole grains."""
    n_grains = -(-min(data_nbytes, options.virtual_size) // options.grain_nbytes)
    return HostedLayout(options).overhead + n_grains * options.grain_nbytes


def _table_format(options: WriteOptions) -> TableFormat:
    from imgcore._core import TableFormat

    return TableFormat(
        entry_nbytes=layout.ENTRY_NBYTES,
        big_endian=False,
        block_nbytes=options.grain_nbytes,
        offset_mask=0xFFFFFFFF,
        offset_lshift=SECTOR_NBYTES.bit_length() - 1,
        absent_entry=layout.ENTRY_ABSENT,
        zero_entry=layout.ENTRY_ZEROED if options.zeroed_grain else layout.ENTRY_ABSENT,
    )


def _encode(table: TableFormat, placements: Placements, path: str) -> NDArray[np.uint32]:
    """Return placements as grain table entries, shape (n,)."""
    import numpy as np

    from imgcore._core import CoreError

    entries = np.zeros(len(placements), dtype="<u4")
    try:
        table.encode(placements, entries.view(np.uint8))
    except CoreError as error:
        place = int(placements["host_offset"][error.offset])
        raise _too_large(place, path) from error
    return entries


def _too_large(place: int, path: str) -> LimitExceededError:
    return LimitExceededError(
        f"data at {place:#x}: a sparse VMDK file holds at most {VMDK_MAX_SPARSE_FILE_NBYTES} "
        "bytes (use a flat subformat)",
        path=path,
    )


def _embedded_descriptor(options: WriteOptions, access: str) -> bytes:
    # Readers ignore the name that a sparse file gives itself.
    name = options.name if is_plain_name(options.name) else "disk.vmdk"
    line = f'{access} {options.n_sectors} SPARSE "{name}"'
    text = compose_descriptor(options.subformat, line, options.n_sectors, options.database)
    assert len(text) <= layout.DESCRIPTOR_NSECTORS * SECTOR_NBYTES
    return text


def _header(
    options: WriteOptions,
    version: int,
    flags: Flags,
    gd_offset: int,
    rgd_offset: int,
    overhead: int,
) -> bytes:
    """Return a header sector; offsets in bytes, or ``GD_AT_END``."""
    header = SparseHeader(
        magic=layout.SPARSE_MAGIC,
        version=version,
        flags=int(flags),
        capacity=options.n_sectors,
        grain_size=options.grain_nbytes // SECTOR_NBYTES,
        descriptor_offset=layout.DESCRIPTOR_SECTOR,
        descriptor_size=layout.DESCRIPTOR_NSECTORS,
        n_gtes_per_gt=layout.GTES_PER_GT,
        rgd_offset=rgd_offset // SECTOR_NBYTES,
        gd_offset=(gd_offset if gd_offset == layout.GD_AT_END else gd_offset // SECTOR_NBYTES),
        overhead=overhead // SECTOR_NBYTES,
        unclean_shutdown=0,
        newline_test=layout.NEWLINE_TEST,
        compression=(
            layout.COMPRESSION_DEFLATE if Flags.COMPRESSED in flags else layout.COMPRESSION_NONE
        ),
    )
    return layout.SPARSE_HEADER.pack(*header).ljust(layout.HEADER_NBYTES, b"\0")


def _marker(n_sectors: int, kind: layout.Marker) -> bytes:
    return layout.MARKER.pack(n_sectors, 0, kind).ljust(SECTOR_NBYTES, b"\0")


class StreamWriter:
    """Writes streamOptimized: compressed grains in guest order, with tables between.

    The header refers to the footer, which is the last sector but one, or on a block
    device, whose end may be far away, to the directory.  Memory: the grain directory
    and one grain table.
    """

    format_name: ClassVar[str] = "vmdk"
    needs_own_blocks: ClassVar[bool] = False
    _FLAGS: ClassVar[Flags] = Flags.NEWLINE_TEST | Flags.COMPRESSED | Flags.MARKERS
    _VERSION: ClassVar[int] = 3

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self._n_entries = _n_directory_entries(options)
        self.logical_sector_nbytes: int = options.database.logical_sector_nbytes
        self.first_offset: int = _STREAM_FIRST_OFFSET
        self.geometry: Geometry = self._make_geometry()
        self._file: TargetFile | None = None
        self._group = -1
        self._gap_offset = 0
        self._is_pending = False

    def _make_geometry(self) -> Geometry:
        from imgcore.engine.compression_levels import DEFAULT_LEVEL, deflate_codec

        return Geometry(
            block_nbytes=self._options.grain_nbytes,
            guest_nbytes=self._options.virtual_size,
            zero_policy=zero_policy(self._options.sparse_nbytes, has_parent=False),
            compressed_alignment=SECTOR_NBYTES,
            prefix=Prefix.GRAIN_MARKER,
            store_incompressible=False,
            codec=deflate_codec(self._options.level or DEFAULT_LEVEL, 15, CodecId.ZLIB),
            sparse_nbytes=self._options.sparse_nbytes,
            reuse_blocks=self._options.level is None,
            group_nblocks=layout.GTES_PER_GT,
            group_gap_nbytes=_GT_GAP_NBYTES,
        )

    def begin(self, target: Target) -> TargetFile:
        """Return the file; ``finish`` writes its header."""
        import numpy as np

        self._file = target.main
        self._table_format = _table_format(self._options)
        self._directory = np.zeros(self._n_entries, dtype="<u4")
        self._table = np.zeros(layout.GTES_PER_GT, dtype="<u4")
        return self._file

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Write the table of every group that has placed grains.

        If a group continues in the next call, that call writes a second, complete
        table.  The first one stays in the file, unreferenced.
        """
        import numpy as np

        assert self._file is not None
        entries = _encode(self._table_format, placements, self._file.path)
        ends = placements["host_offset"] + placements["length"].astype(np.uint64)
        used = np.flatnonzero(entries)
        for group in np.unique((used + first_block) // layout.GTES_PER_GT).tolist():
            if group != self._group:
                self._write_table()
                self._group = group
                self._table[:] = layout.ENTRY_ABSENT
            group_start = group * layout.GTES_PER_GT
            low = max(group_start, first_block)
            high = min(group_start + layout.GTES_PER_GT, first_block + len(entries))
            piece = slice(low - first_block, high - first_block)
            self._table[low - group_start : high - group_start] = entries[piece]
            self._gap_offset = align_up(int(ends[piece].max()), SECTOR_NBYTES)
            self._is_pending = True
            if self._gap_offset + _GT_GAP_NBYTES <= next_offset:
                self._write_table()
        return next_offset

    def _write_table(self) -> None:
        """Write the pending table into the gap after the last grain of its group."""
        if not self._is_pending:
            return
        assert self._file is not None
        self._is_pending = False
        sector = self._gap_offset // SECTOR_NBYTES + 1
        if sector * SECTOR_NBYTES >= VMDK_MAX_SPARSE_FILE_NBYTES:
            raise _too_large(self._gap_offset, self._file.path)
        marker = _marker(_GT_NSECTORS, layout.Marker.GT)
        self._file.pwrite(self._gap_offset, marker + self._table.tobytes())
        self._directory[self._group] = sector

    def finish(self, next_offset: int) -> None:
        """Write directory, footer and end marker after the grains, then the header."""
        assert self._file is not None
        self._write_table()
        end = max(next_offset, self.first_offset)
        if self._group >= 0:
            end = max(end, self._gap_offset + _GT_GAP_NBYTES)
        end = align_up(end, SECTOR_NBYTES)
        directory_nbytes = _directory_nbytes(self._n_entries)
        gd_offset = end + SECTOR_NBYTES
        if gd_offset >= VMDK_MAX_SPARSE_FILE_NBYTES:
            raise _too_large(gd_offset, self._file.path)
        tail = b"".join(
            (
                _marker(directory_nbytes // SECTOR_NBYTES, layout.Marker.GD),
                self._directory.tobytes().ljust(directory_nbytes, b"\0"),
                _marker(1, layout.Marker.FOOTER),
                self._header(gd_offset),
                _marker(0, layout.Marker.EOS),
            )
        )
        self._file.pwrite(end, tail)
        self._file.truncate(end + len(tail))
        descriptor = _embedded_descriptor(self._options, "RDONLY")
        self._file.pwrite(layout.DESCRIPTOR_SECTOR * SECTOR_NBYTES, descriptor)
        at_end = not self._file.is_block_device
        self._file.pwrite(0, self._header(layout.GD_AT_END if at_end else gd_offset))

    def _header(self, gd_offset: int) -> bytes:
        return _header(
            self._options, self._VERSION, self._FLAGS, gd_offset, 0, _STREAM_FIRST_OFFSET
        )


class HostedLayout:
    """The parts of a monolithicSparse file; offsets in bytes.

    Each directory is followed by its tables, which are contiguous, so that the entry of
    grain ``i`` is at ``gt_offset + 4 * i``.
    """

    def __init__(self, options: WriteOptions) -> None:
        self.n_entries: int = _n_directory_entries(options)
        directory_nbytes = _directory_nbytes(self.n_entries)
        tables_nbytes = self.n_entries * layout.GT_NBYTES
        self.rgd_offset: int = (
            layout.DESCRIPTOR_SECTOR + layout.DESCRIPTOR_NSECTORS
        ) * SECTOR_NBYTES
        self.rgt_offset: int = self.rgd_offset + directory_nbytes
        self.gd_offset: int = self.rgt_offset + tables_nbytes
        self.gt_offset: int = self.gd_offset + directory_nbytes
        self.overhead: int = align_up(self.gt_offset + tables_nbytes, options.grain_nbytes)


class SparseWriter:
    """Writes monolithicSparse: two sets of tables, then plain grains."""

    format_name: ClassVar[str] = "vmdk"
    needs_own_blocks: ClassVar[bool] = False

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self._layout = HostedLayout(options)
        self.logical_sector_nbytes: int = options.database.logical_sector_nbytes
        self.first_offset: int = self._layout.overhead
        self.geometry: Geometry = Geometry(
            block_nbytes=options.grain_nbytes,
            guest_nbytes=options.virtual_size,
            zero_policy=zero_policy(options.sparse_nbytes, has_parent=False),
            stored_alignment=options.grain_nbytes,
            compressed_alignment=options.grain_nbytes,
            sparse_nbytes=options.sparse_nbytes,
        )
        self._file: TargetFile | None = None

    def begin(self, target: Target) -> TargetFile:
        """Return the file; ``finish`` writes its header."""
        self._file = target.main
        self._table_format = _table_format(self._options)
        return self._file

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Write the entries of the placed grains; unused tables stay holes."""
        import numpy as np

        assert self._file is not None
        entries = _encode(self._table_format, placements, self._file.path)
        tables = np.unique((np.flatnonzero(entries) + first_block) // layout.GTES_PER_GT)
        # Consecutive tables are adjacent in the file.
        for run in np.split(tables, np.flatnonzero(np.diff(tables) > 1) + 1):
            if not len(run):
                continue
            low = max(int(run[0]) * layout.GTES_PER_GT, first_block)
            high = min((int(run[-1]) + 1) * layout.GTES_PER_GT, first_block + len(entries))
            raw = entries[low - first_block : high - first_block].view(np.uint8)
            for offset in (self._layout.rgt_offset, self._layout.gt_offset):
                self._file.pwrite(offset + low * layout.ENTRY_NBYTES, raw)
        return next_offset

    def finish(self, next_offset: int) -> None:
        """Write both directories, descriptor and header; round up to whole grains."""
        assert self._file is not None
        parts = self._layout
        end = align_up(max(next_offset, parts.overhead), self._options.grain_nbytes)
        if end > VMDK_MAX_SPARSE_FILE_NBYTES:
            raise _too_large(end, self._file.path)
        self._file.truncate(end)
        self._write_directory(parts.rgd_offset, parts.rgt_offset)
        self._write_directory(parts.gd_offset, parts.gt_offset)
        descriptor = _embedded_descriptor(self._options, "RW")
        self._file.pwrite(layout.DESCRIPTOR_SECTOR * SECTOR_NBYTES, descriptor)
        flags = Flags.NEWLINE_TEST | Flags.REDUNDANT_GD
        if self._options.zeroed_grain:
            flags |= Flags.ZEROED_GRAIN
        version = 2 if self._options.zeroed_grain else 1
        self._file.pwrite(
            0,
            _header(
                self._options, version, flags, parts.gd_offset, parts.rgd_offset, parts.overhead
            ),
        )

    def _write_directory(self, offset: int, first_table: int) -> None:
        """Write a directory that names every table, even those in holes of the file."""
        import numpy as np

        assert self._file is not None
        numbers = np.arange(self._layout.n_entries, dtype=np.int64) * _GT_NSECTORS
        entries = (numbers + first_table // SECTOR_NBYTES).astype("<u4")
        self._file.pwrite(offset, entries.view(np.uint8))
