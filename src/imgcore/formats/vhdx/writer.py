"""VHDX: the writer.

The header section, log, metadata and BAT come before the blocks.  BAT entries are
written as soon as their blocks are placed, so that memory does not grow with the disk.


Source: [MS-VHDX].
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from imgcore._version import __version__
from imgcore.engine.extents import PLACEMENT_DTYPE, BlockState
from imgcore.engine.geometry import Geometry, Placing
from imgcore.formats.api import Measurement
from imgcore.formats.shared.flat_writer import FlatWriter, flat_geometry
from imgcore.formats.shared.sparse_tables import write_with_holes
from imgcore.formats.shared.write_checks import zero_policy
from imgcore.formats.vhdx import layout
from imgcore.formats.vhdx.header import with_checksum
from imgcore.formats.vhdx.options import (
    LOG_NBYTES,
    LOG_OFFSET,
    METADATA_OFFSET,
    Options,
    WriteOptions,
)
from imgcore.formats.vhdx.parent import parent_locator
from imgcore.formats.vhdx.tables import payload_indices, table_format

if TYPE_CHECKING:
    from imgcore.engine.extents import Placements
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import WriteRequest

# BAT entries that are encoded at once: 1 MiB.
_CHUNK_ENTRIES: Final = 1 << 17


def writer_for(request: WriteRequest[Options]) -> DynamicWriter | FixedWriter:
    """Return the writer for a request; raises OptionError or LimitExceededError."""
    options = WriteOptions.of(request)
    return FixedWriter(options) if options.is_fixed else DynamicWriter(options)


def measure(request: WriteRequest[Options], data_nbytes: int) -> Measurement:
    """Return the file's size with ``data_nbytes`` of data and with a full disk."""
    options = WriteOptions.of(request)
    whole = options.fully_allocated_nbytes
    required = whole if options.is_fixed else min(options.data_offset + data_nbytes, whole)
    return Measurement(required, whole)


class _Structures:
    """Writes the structures before the blocks, for both writers."""

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self._format = table_format(options.metadata.block_nbytes)

    def write_entries(self, file: TargetFile, first_block: int, placements: Placements) -> None:
        """Write the BAT entries of up to 2^17 blocks."""
        ratio = self._options.metadata.chunk_ratio
        indices = payload_indices(first_block, first_block + len(placements), ratio)
        base = int(indices[0])
        entries = np.empty(len(placements), dtype=np.uint64)
        # Every place fits into an entry, which counts MiB in 44 bits.
        self._format.encode(placements, entries.view(np.uint8))
        # The entry of a sector bitmap block separates the payload blocks of two chunks.
        table = np.zeros(int(indices[-1]) + 1 - base, dtype=np.uint64)
        table[indices - base] = entries
        offset = self._options.bat_offset + base * layout.BAT_ENTRY_NBYTES
        write_with_holes(file, offset, table)

    def write_headers(self, file: TargetFile, target_path: str) -> None:
        """Write metadata, region tables, headers and the file identifier."""
        options = self._options
        file.pwrite(METADATA_OFFSET, _metadata_region(options, target_path))
        for offset in layout.REGION_TABLE_OFFSETS:
            file.pwrite(offset, _region_table(options))
        for sequence, offset in enumerate(layout.HEADER_OFFSETS, 1):
            file.pwrite(offset, _header(options, sequence))
        file.pwrite(0, _file_identifier())


class DynamicWriter:
    """Writes dynamic and differencing images."""

    format_name: ClassVar[str] = "vhdx"
    needs_own_blocks: ClassVar[bool] = False

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self._structures = _Structures(options)
        self._file: TargetFile | None = None
        self._target_path = ""
        self.first_offset: int = options.data_offset
        self.logical_sector_nbytes: int = options.metadata.logical_sector_nbytes
        self.geometry: Geometry = Geometry(
            block_nbytes=options.metadata.block_nbytes,
            guest_nbytes=options.metadata.virtual_size,
            placing=Placing.APPEND,
            zero_policy=zero_policy(options.sparse_nbytes, has_parent=options.backing is not None),
            stored_alignment=layout.ALIGNMENT,
            sparse_nbytes=options.sparse_nbytes,
        )

    def begin(self, target: Target) -> TargetFile:
        """Return the file; see `imgcore.formats.api.Writer`."""
        self._file = target.main
        self._target_path = target.path
        return self._file

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Write the entries of blocks; see `imgcore.formats.api.Writer`."""
        assert self._file is not None
        for start in range(0, len(placements), _CHUNK_ENTRIES):
            rows = placements[start : start + _CHUNK_ENTRIES]
            if rows["state"].any():
                self._structures.write_entries(self._file, first_block + start, rows)
        stored = np.flatnonzero(placements["state"] == BlockState.STORED)
        if not stored.size:
            return next_offset
        # The last block is stored whole even if the disk ends inside it.
        last = int(placements["host_offset"][stored[-1]])
        return max(next_offset, last + self._options.metadata.block_nbytes)

    def finish(self, next_offset: int) -> None:
        """Write everything before the blocks; see `imgcore.formats.api.Writer`."""
        assert self._file is not None
        self._file.truncate(max(next_offset, self.first_offset))
        self._structures.write_headers(self._file, self._target_path)


class FixedWriter(FlatWriter):
    """Writes fixed images, in which every block is allocated from the start."""

    format_name: ClassVar[str] = "vhdx"

    def __init__(self, options: WriteOptions) -> None:
        metadata = options.metadata
        super().__init__(
            flat_geometry(
                metadata.virtual_size, options.sparse_nbytes, host_base=options.data_offset
            ),
            options.fully_allocated_nbytes,
        )
        self._metadata = metadata
        self._structures = _Structures(options)
        self.logical_sector_nbytes: int = metadata.logical_sector_nbytes

    def finish(self, next_offset: int) -> None:
        """Write everything except the data; see `imgcore.formats.api.Writer`."""
        file, metadata = self._finished_file(), self._metadata
        for first in range(0, metadata.n_blocks, _CHUNK_ENTRIES):
            last = min(first + _CHUNK_ENTRIES, metadata.n_blocks)
            rows = np.zeros(last - first, dtype=PLACEMENT_DTYPE)
            blocks = np.arange(first, last, dtype=np.uint64)
            rows["host_offset"] = blocks * np.uint64(metadata.block_nbytes)
            rows["host_offset"] += np.uint64(self.first_offset)
            rows["length"] = metadata.block_nbytes
            rows["state"] = BlockState.STORED
            self._structures.write_entries(file, first, rows)
        # A fixed disk has no parent, so no path goes into its headers.
        self._structures.write_headers(file, "")


def _file_identifier() -> bytes:
    """Return the file type identifier (2.2.1)."""
    creator = f"imgcore {__version__}".encode("utf-16-le")
    return layout.SIGNATURE + creator.ljust(layout.CREATOR_NBYTES, b"\0")


def _header(options: WriteOptions, sequence: int) -> bytes:
    """Return one of the two headers (2.2.2); the log is empty."""
    raw = layout.HEADER.pack(
        layout.HEADER_SIGNATURE,
        0,
        sequence,
        options.file_write_guid.bytes_le,
        options.data_write_guid.bytes_le,
        bytes(16),
        layout.LOG_VERSION,
        layout.VERSION,
        LOG_NBYTES,
        LOG_OFFSET,
    )
    return with_checksum(raw.ljust(layout.HEADER_NBYTES, b"\0"))


def _region_table(options: WriteOptions) -> bytes:
    """Return the region table (2.2.3)."""
    regions = (
        (layout.METADATA_REGION, METADATA_OFFSET, options.metadata_nbytes),
        (layout.BAT_REGION, options.bat_offset, options.bat_nbytes),
    )
    raw = layout.REGION_TABLE_HEADER.pack(layout.REGION_TABLE_SIGNATURE, 0, len(regions), 0)
    for guid, offset, nbytes in regions:
        raw += layout.REGION_ENTRY.pack(guid.bytes_le, offset, nbytes, layout.REGION_REQUIRED)
    return with_checksum(raw.ljust(layout.REGION_TABLE_NBYTES, b"\0"))


def _metadata_region(options: WriteOptions, target_path: str) -> bytes:
    """Return the metadata table (2.6.1) and its items (2.6.2)."""
    metadata = options.metadata
    flags = layout.LEAVE_BLOCK_ALLOCATED if metadata.leave_block_allocated else 0
    flags |= layout.HAS_PARENT if metadata.has_parent else 0
    of_file = layout.ITEM_IS_REQUIRED
    of_disk = layout.ITEM_IS_REQUIRED | layout.ITEM_IS_VIRTUAL_DISK
    items: list[tuple[uuid.UUID, int, bytes]] = [
        (
            layout.FILE_PARAMETERS_ITEM,
            of_file,
            layout.FILE_PARAMETERS.pack(metadata.block_nbytes, flags),
        ),
        (
            layout.VIRTUAL_DISK_SIZE_ITEM,
            of_disk,
            layout.VIRTUAL_DISK_SIZE.pack(metadata.virtual_size),
        ),
        (layout.VIRTUAL_DISK_ID_ITEM, of_disk, metadata.virtual_disk_id.bytes_le),
        (
            layout.LOGICAL_SECTOR_SIZE_ITEM,
            of_disk,
            layout.SECTOR_SIZE.pack(metadata.logical_sector_nbytes),
        ),
        (
            layout.PHYSICAL_SECTOR_SIZE_ITEM,
            of_disk,
            layout.SECTOR_SIZE.pack(metadata.physical_sector_nbytes),
        ),
    ]
    if options.backing is not None:
        locator = parent_locator(options.backing, target_path)
        items.append((layout.PARENT_LOCATOR_ITEM, of_file, locator))
    items += options.inherited
    table = layout.METADATA_HEADER.pack(layout.METADATA_SIGNATURE, 0, len(items), bytes(20))
    data = b""
    for guid, item_flags, item in items:
        offset = layout.METADATA_TABLE_NBYTES + len(data) if item else 0
        table += layout.METADATA_ENTRY.pack(guid.bytes_le, offset, len(item), item_flags, 0)
        data += item
    return table.ljust(layout.METADATA_TABLE_NBYTES, b"\0") + data
