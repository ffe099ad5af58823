"""VHD: the writers of fixed, dynamic and differencing disks.

A dynamic disk's file begins with the footer's copy, the dynamic disk header and the
BAT.  XenServer's batmap and the parent locators follow, then the blocks, each after its
sector bitmap, and at the end the footer.

Sources: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0; blktap
include/vhd.h (batmap).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from imgcore.engine.geometry import Geometry, Placing
from imgcore.errors import LimitExceededError
from imgcore.formats.api import Measurement
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.shared.flat_writer import FlatWriter, flat_geometry
from imgcore.formats.shared.write_checks import zero_policy
from imgcore.formats.vhd import layout
from imgcore.formats.vhd.changes import with_checksum
from imgcore.formats.vhd.header import bitmap_nbytes
from imgcore.formats.vhd.layout import DiskType, DynamicHeader, Footer, Locator
from imgcore.formats.vhd.options import Options, WriteOptions
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from imgcore.engine.extents import Placements
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Writer, WriteRequest

_HEADER_OFFSET: Final = layout.FOOTER_NBYTES
_TABLE_OFFSET: Final = _HEADER_OFFSET + layout.HEADER_NBYTES
# Windows and XenServer align the data of blocks so, which suits disks with 4096-byte
# sectors.
_DATA_ALIGNMENT: Final = 4096


def writer_for(request: WriteRequest[Options]) -> Writer:
    """Return the writer for a request; raises OptionError or LimitExceededError."""
    options = WriteOptions.of(request)
    return FixedWriter(options) if options.disk_type is DiskType.FIXED else BlockWriter(options)


def measure(request: WriteRequest[Options], data_nbytes: int) -> Measurement:
    """Return the file's size with ``data_nbytes`` of data and with a full disk."""
    options = WriteOptions.of(request)
    if options.disk_type is DiskType.FIXED:
        nbytes = options.virtual_size + layout.FOOTER_NBYTES
        return Measurement(nbytes, nbytes)
    return Measurement(
        _file_nbytes(options, min(data_nbytes, options.virtual_size)),
        _file_nbytes(options, options.virtual_size),
    )


def _file_nbytes(options: WriteOptions, data_nbytes: int) -> int:
    end = BlockLayout(options).first_offset
    n_blocks = -(-data_nbytes // options.block_nbytes)
    if n_blocks:
        prefix_nbytes = bitmap_nbytes(options.block_nbytes)
        first_data = align_up(end + prefix_nbytes, _DATA_ALIGNMENT)
        stride = align_up(prefix_nbytes, _DATA_ALIGNMENT) + options.block_nbytes
        end = first_data + options.block_nbytes + (n_blocks - 1) * stride
    return end + layout.FOOTER_NBYTES


def make_footer(options: WriteOptions) -> bytes:
    """Return the 512 bytes of a footer, with its checksum."""
    creator, creator_version = options.creator
    cylinders, heads, sectors_per_track = options.chs
    footer = Footer(
        cookie=layout.FOOTER_COOKIE,
        features=layout.FEATURE_RESERVED,
        version=layout.VERSION,
        data_offset=layout.NO_OFFSET if options.disk_type is DiskType.FIXED else _HEADER_OFFSET,
        timestamp=options.timestamp,
        creator=creator,
        creator_version=creator_version,
        creator_os=layout.CREATOR_OS_WINDOWS,
        original_size=options.virtual_size,
        current_size=options.virtual_size,
        cylinders=cylinders,
        heads=heads,
        sectors_per_track=sectors_per_track,
        disk_type=options.disk_type,
        checksum=0,
        uuid=options.uuid,
        saved_state=0,
    )
    raw = layout.FOOTER.pack(*footer).ljust(layout.FOOTER_NBYTES, b"\0")
    return with_checksum(raw, layout.FOOTER_CHECKSUM_OFFSET)


def make_batmap_header(offset: int, batmap: bytes) -> bytes:
    """Return the header of a batmap at a host offset."""
    header = layout.BATMAP.pack(
        layout.BATMAP_COOKIE,
        offset,
        len(batmap) // SECTOR_NBYTES,
        layout.BATMAP_VERSION,
        ~sum(batmap) & 0xFFFFFFFF,
    )
    return header.ljust(SECTOR_NBYTES, b"\0")


def batmap_nbytes(n_blocks: int) -> int:
    """Return the bytes of a batmap, without its header."""
    return max(SECTOR_NBYTES, align_up(-(-n_blocks // 8), SECTOR_NBYTES))


class FixedWriter(FlatWriter):
    """Writes a fixed disk: the guest's bytes, then the footer."""

    format_name: ClassVar[str] = "vhd"
    writes_in_order: ClassVar[bool] = True

    def __init__(self, options: WriteOptions) -> None:
        super().__init__(
            flat_geometry(options.guest_nbytes, options.sparse_nbytes),
            options.virtual_size + layout.FOOTER_NBYTES,
            options.preallocation,
        )
        self._options = options

    def end_disk(self, request: WriteRequest[Options]) -> None:
        """Set the sizes; see `imgcore.formats.api.EndsLate`."""
        self._options = options = WriteOptions.of(request)
        self._end(options.guest_nbytes, options.virtual_size + layout.FOOTER_NBYTES)

    def finish(self, next_offset: int) -> None:
        """Write the footer."""
        self._finished_file().write_last(make_footer(self._options))


class BlockLayout:
    """Offsets of the parts before the blocks; ``locators`` pairs entries with data."""

    def __init__(self, options: WriteOptions) -> None:
        self.n_blocks: int = -(-options.virtual_size // options.block_nbytes)
        self.table_nbytes: int = align_up(self.n_blocks * layout.ENTRY_NBYTES, SECTOR_NBYTES)
        end = _TABLE_OFFSET + self.table_nbytes
        # XenServer expects the batmap exactly here.
        self.batmap_offset: int = end
        self.batmap_nbytes: int = 0
        if options.batmap:
            self.batmap_nbytes = batmap_nbytes(self.n_blocks)
            end += SECTOR_NBYTES + self.batmap_nbytes
        self.locators: list[tuple[Locator, bytes]] = []
        if options.parent is not None:
            for platform, data in options.parent.locators:
                space = align_up(len(data), SECTOR_NBYTES)
                self.locators.append((Locator(platform, space, len(data), 0, end), data))
                end += space
        self.first_offset: int = end


class BlockWriter:
    """Writes a dynamic or differencing disk; a block is stored whole or not at all.

    Memory: the BAT, with 4 bytes for each block, at most 16 MiB.
    """

    format_name: ClassVar[str] = "vhd"
    holds_sectors: ClassVar[bool] = True
    needs_own_blocks: ClassVar[bool] = False

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self._layout = BlockLayout(options)
        self._file: TargetFile | None = None
        self.first_offset: int = self._layout.first_offset
        self._blocks_end = 0
        self.geometry: Geometry = Geometry(
            block_nbytes=options.block_nbytes,
            guest_nbytes=options.guest_nbytes,
            placing=Placing.APPEND,
            zero_policy=zero_policy(
                options.sparse_nbytes, has_parent=options.parent is not None, can_hide_parent=False
            ),
            stored_alignment=_DATA_ALIGNMENT,
            stored_prefix_nbytes=bitmap_nbytes(options.block_nbytes),
            stored_prefix_byte=0xFF,
            sparse_nbytes=options.sparse_nbytes,
        )

    def begin(self, target: Target) -> TargetFile:
        """Return the file; headers and tables are written at the end."""
        import numpy as np

        from imgcore.formats.vhd.tables import table_format

        self._file = target.main
        block_nbytes = self._options.block_nbytes
        self._format = table_format(block_nbytes, bitmap_nbytes(block_nbytes))
        self._table = np.full(self._layout.table_nbytes, 0xFF, dtype=np.uint8)
        return self._file

    def leave_end_open(self) -> None:
        """Leave less room for tables than a block has, which checks would count."""
        if self.first_offset >= self._options.block_nbytes:
            raise LimitExceededError(
                f"the tables of a disk of {self._options.virtual_size} bytes need more room than "
                f"a block of {self._options.block_nbytes}"
            )

    def end_disk(self, request: WriteRequest[Options]) -> None:
        """Cut the BAT; see `imgcore.formats.api.EndsLate`."""
        self._options = WriteOptions.of(request)
        self._layout = BlockLayout(self._options)
        self._table = self._table[: self._layout.table_nbytes]
        self.geometry = self.geometry._replace(guest_nbytes=self._options.guest_nbytes)

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Record the stored blocks in the BAT."""
        from imgcore._core import CoreError

        entry_nbytes = layout.ENTRY_NBYTES
        entries = self._table[
            first_block * entry_nbytes : (first_block + len(placements)) * entry_nbytes
        ]
        places = placements["host_offset"]
        try:
            self._format.encode(placements, entries)
        except CoreError as error:
            raise LimitExceededError(
                f"block {first_block + error.offset} would be at {int(places[error.offset]):#x}, "
                "beyond what a BAT entry can hold",
                path=self._options.target_name or None,
            ) from error
        last = int(places.max(initial=0))
        if last:
            # The last block is stored whole even if the disk ends inside it.
            self._blocks_end = max(self._blocks_end, last + self._options.block_nbytes)
        return next_offset

    def finish(self, next_offset: int) -> None:
        """Write everything before the blocks, and the footer after them."""
        file, parts = self._file, self._layout
        assert file is not None
        footer = make_footer(self._options)
        file.truncate(max(self._blocks_end, parts.first_offset) + layout.FOOTER_NBYTES)
        file.pwrite(_TABLE_OFFSET, self._table)
        if self._options.batmap:
            file.pwrite(parts.batmap_offset, self._make_batmap())
        for locator, data in parts.locators:
            file.pwrite(locator.data_offset, data)
        file.pwrite(_HEADER_OFFSET, self._make_header())
        file.write_last(footer)
        file.pwrite(0, footer)

    def _make_batmap(self) -> bytes:
        """Return the batmap with its header; every stored block is full."""
        import numpy as np

        n_blocks, parts = self._layout.n_blocks, self._layout
        present = self._table.view(">u4")[:n_blocks] != layout.ENTRY_ABSENT
        batmap = np.packbits(present).tobytes().ljust(parts.batmap_nbytes, b"\0")
        header = make_batmap_header(parts.batmap_offset + SECTOR_NBYTES, batmap)
        return header + batmap

    def _make_header(self) -> bytes:
        parent = self._options.parent
        header = DynamicHeader(
            cookie=layout.HEADER_COOKIE,
            data_offset=layout.NO_OFFSET,
            table_offset=_TABLE_OFFSET,
            version=layout.VERSION,
            max_table_entries=self._layout.n_blocks,
            block_nbytes=self._options.block_nbytes,
            checksum=0,
            parent_uuid=bytes(16) if parent is None else parent.uuid,
            parent_timestamp=0 if parent is None else parent.timestamp,
            reserved=0,
            parent_name=b"" if parent is None else parent.name,
        )
        locators = b"".join(layout.LOCATOR.pack(*entry) for entry, _ in self._layout.locators)
        raw = (layout.HEADER.pack(*header) + locators).ljust(layout.HEADER_NBYTES, b"\0")
        return with_checksum(raw, layout.HEADER_CHECKSUM_OFFSET)
