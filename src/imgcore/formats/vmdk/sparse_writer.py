"""Write the sparse kinds of VMDK: streamOptimized and monolithicSparse.

Source: Virtual Disk Format 5.0, "Hosted Sparse Extents", "Stream-Optimized Compressed
Sparse Extents".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from imgcore.engine.geometry import CodecId, Geometry, Prefix, Reuse
from imgcore.errors import OptionError
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.shared.write_checks import zero_policy
from imgcore.formats.vmdk import layout
from imgcore.formats.vmdk.layout import Flags
from imgcore.formats.vmdk.options import Options, WriteOptions
from imgcore.formats.vmdk.sparse_structures import (
    FRONT_NBYTES,
    GT_NSECTORS,
    HostedLayout,
    HostedTables,
    directory_nbytes,
    embedded_descriptor,
    encode_entries,
    make_header,
    n_directory_entries,
    table_format,
    too_large,
)
from imgcore.limits import SECTOR_NBYTES, VMDK_MAX_SPARSE_FILE_NBYTES

if TYPE_CHECKING:
    from imgcore.engine.extents import Placements
    from imgcore.engine.placement_log import PlacementLog
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import WriteRequest

# In a streamOptimized file a marker and the table follow the table's grains.
_GT_GAP_NBYTES: Final = SECTOR_NBYTES + layout.GT_NBYTES
_STREAM_FIRST_OFFSET: Final = layout.STREAM_OVERHEAD_NSECTORS * SECTOR_NBYTES


def stream_bound_nbytes(options: WriteOptions, data_nbytes: int) -> int:
    """Return the largest streamOptimized file for ``data_nbytes`` in whole grains."""
    grain_nbytes = options.grain_nbytes
    n_grains = -(-min(data_nbytes, options.virtual_size) // grain_nbytes)
    # A stored block of DEFLATE costs 5 bytes; 1/512 covers blocks of 4 KiB and more.
    grain_bound = align_up(
        layout.GRAIN_MARKER.size + grain_nbytes + grain_nbytes // 512 + 64, SECTOR_NBYTES
    )
    n_entries = n_directory_entries(options)
    n_tables = min(n_grains, n_entries)
    # Markers of directory and footer, the footer, the end-of-stream marker.
    end_nbytes = directory_nbytes(n_entries) + 4 * SECTOR_NBYTES
    return _STREAM_FIRST_OFFSET + n_grains * grain_bound + n_tables * _GT_GAP_NBYTES + end_nbytes


def sparse_file_nbytes(options: WriteOptions, data_nbytes: int) -> int:
    """Return the size of monolithicSparse for ``data_nbytes`` in whole grains."""
    n_grains = -(-min(data_nbytes, options.virtual_size) // options.grain_nbytes)
    return HostedLayout(options).end + n_grains * options.grain_nbytes


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
    writes_in_order: ClassVar[bool] = True
    _FLAGS: ClassVar[Flags] = Flags.NEWLINE_TEST | Flags.COMPRESSED | Flags.MARKERS
    _VERSION: ClassVar[int] = 3

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self._n_entries = n_directory_entries(options)
        self.logical_sector_nbytes: int = options.database.logical_sector_nbytes
        self.first_offset: int = _STREAM_FIRST_OFFSET
        self.geometry: Geometry = self._make_geometry()
        self._file: TargetFile | None = None
        self._group = -1
        self._gap_offset = 0
        self._is_pending = False
        self._is_open_ended = False

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
            reuse=Reuse.REUSE if self._options.level is None else Reuse.NONE,
            group_nblocks=layout.GTES_PER_GT,
            group_gap_nbytes=_GT_GAP_NBYTES,
        )

    def begin(self, target: Target) -> TargetFile:
        """Return the file; its header is written last, unless it must come first."""
        import numpy as np

        self._file = target.main
        self._table_format = table_format(self._options)
        self._directory = np.zeros(self._n_entries, dtype="<u4")
        self._table = np.zeros(layout.GTES_PER_GT, dtype="<u4")
        if self._file.in_order:
            if self._is_open_ended:
                raise OptionError(
                    "the header of streamOptimized comes first and states the disk's size, which "
                    "is not known before the end of the source: give it (--size)",
                    path=self._file.path,
                )
            self._write_front(layout.GD_AT_END)
        return self._file

    def leave_end_open(self) -> None:
        """Have the header written last; see `imgcore.formats.api.EndsLate`."""
        self._is_open_ended = True

    def end_disk(self, request: WriteRequest[Options]) -> None:
        """Cut the directory; see `imgcore.formats.api.EndsLate`."""
        self._options = WriteOptions.of(request)
        self._n_entries = n_directory_entries(self._options)
        self._directory = self._directory[: self._n_entries]
        nbytes = self._options.virtual_size
        self.geometry = self.geometry._replace(guest_nbytes=nbytes)

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Write the table of every group that has placed grains.

        If a group continues in the next call, that call writes a second, complete
        table.  The first one stays in the file, unreferenced.
        """
        import numpy as np

        assert self._file is not None
        entries = encode_entries(self._table_format, placements, self._file.path)
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
            raise too_large(self._gap_offset, self._file.path)
        marker = _marker(GT_NSECTORS, layout.Marker.GT)
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
        nbytes = directory_nbytes(self._n_entries)
        gd_offset = end + SECTOR_NBYTES
        if gd_offset >= VMDK_MAX_SPARSE_FILE_NBYTES:
            raise too_large(gd_offset, self._file.path)
        tail = b"".join(
            (
                _marker(nbytes // SECTOR_NBYTES, layout.Marker.GD),
                self._directory.tobytes().ljust(nbytes, b"\0"),
                _marker(1, layout.Marker.FOOTER),
                self._header(gd_offset),
                _marker(0, layout.Marker.EOS),
            )
        )
        self._file.pwrite(end, tail)
        self._file.truncate(end + len(tail))
        if not self._file.in_order:
            at_end = not self._file.is_block_device
            self._write_front(layout.GD_AT_END if at_end else gd_offset)

    def _write_front(self, gd_offset: int) -> None:
        assert self._file is not None
        self._file.pwrite(0, self._header(gd_offset))
        descriptor = embedded_descriptor(self._options, "RDONLY")
        self._file.pwrite(layout.DESCRIPTOR_SECTOR * SECTOR_NBYTES, descriptor)

    def _header(self, gd_offset: int) -> bytes:
        return make_header(
            self._options, self._VERSION, self._FLAGS, gd_offset, 0, _STREAM_FIRST_OFFSET
        )


class SparseWriter:
    """Writes monolithicSparse: two sets of tables, then plain grains.

    The tables of a disk whose size is not known at first follow the grains.
    """

    format_name: ClassVar[str] = "vmdk"
    needs_own_blocks: ClassVar[bool] = False

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self._layout = HostedLayout(options)
        self.logical_sector_nbytes: int = options.database.logical_sector_nbytes
        self.first_offset: int = self._layout.end
        self.geometry: Geometry = Geometry(
            block_nbytes=options.grain_nbytes,
            guest_nbytes=options.virtual_size,
            zero_policy=zero_policy(options.sparse_nbytes, has_parent=False),
            stored_alignment=options.grain_nbytes,
            compressed_alignment=options.grain_nbytes,
            sparse_nbytes=options.sparse_nbytes,
        )
        self._file: TargetFile | None = None
        # The placements so far, if the tables come last.
        self._log: PlacementLog | None = None

    def leave_end_open(self) -> None:
        """Have the tables follow the grains; see `imgcore.formats.api.EndsLate`."""
        from imgcore.engine.placement_log import PlacementLog

        self._log = PlacementLog()
        self.first_offset = align_up(FRONT_NBYTES, self._options.grain_nbytes)

    def begin(self, target: Target) -> TargetFile:
        """Return the file; ``finish`` writes its header."""
        self._file = target.main
        self._tables = HostedTables(self._options, self._file, self._layout)
        return self._file

    def end_disk(self, request: WriteRequest[Options]) -> None:
        """Set the size; see `imgcore.formats.api.EndsLate`."""
        self._options = WriteOptions.of(request)
        nbytes = self._options.virtual_size
        self.geometry = self.geometry._replace(guest_nbytes=nbytes)

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Write the entries of the placed grains, or keep them."""
        if self._log is None:
            self._tables.place(first_block, placements)
        else:
            self._log.add(first_block, placements)
        return next_offset

    def finish(self, next_offset: int) -> None:
        """Write directories, descriptor and header; round up to whole grains."""
        if self._log is None:
            self._tables.finish(next_offset, self._layout.end)
            return
        assert self._file is not None
        start = align_up(max(next_offset, self.first_offset), self._options.grain_nbytes)
        parts = HostedLayout(self._options, start)
        tables = HostedTables(self._options, self._file, parts)
        for first_block, placements in self._log:
            tables.place(first_block, placements)
        tables.finish(parts.end, FRONT_NBYTES)
