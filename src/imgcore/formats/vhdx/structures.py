"""VHDX: writes the structures of an image; the engine stores its blocks.

Source: [MS-VHDX], by section.
"""

from __future__ import annotations

import uuid
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore._version import __version__
from imgcore.engine.extents import BlockState
from imgcore.formats.shared.sparse_tables import write_with_holes
from imgcore.formats.vhdx import layout
from imgcore.formats.vhdx.header import FileHeader, pack_header, with_checksum
from imgcore.formats.vhdx.options import LOG_NBYTES
from imgcore.formats.vhdx.parent import NIL, parent_locator
from imgcore.formats.vhdx.tables import payload_indices, table_format

if TYPE_CHECKING:
    from imgcore._core import TableFormat
    from imgcore.engine.extents import Placements
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.vhdx.options import WriteOptions

# BAT entries that are encoded at once: 1 MiB.
CHUNK_ENTRIES: Final = 1 << 17


class Structures:
    """Writes BAT entries, metadata and headers to the places that the options state."""

    def __init__(self, options: WriteOptions) -> None:
        self._options = options

    @cached_property
    def _format(self) -> TableFormat:
        return table_format(self._options.metadata.block_nbytes)

    def write_entries(self, file: TargetFile, first_block: int, placements: Placements) -> int:
        """Write the BAT entries of blocks, which the file does not have yet.

        Returns
        -------
        int
            Host offset where the last block in the file ends; 0 without one.  The
            disk's last block is stored whole even if the disk ends inside it.
        """
        for start in range(0, len(placements), CHUNK_ENTRIES):
            rows = placements[start : start + CHUNK_ENTRIES]
            if rows["state"].any():
                self._write_chunk(file, first_block + start, rows)
        stored = placements["host_offset"][placements["state"] == BlockState.STORED]
        return int(stored.max()) + self._options.metadata.block_nbytes if stored.size else 0

    def _write_chunk(self, file: TargetFile, first_block: int, placements: Placements) -> None:
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
        file.pwrite(options.metadata_offset, _metadata_region(options, target_path))
        for offset in layout.REGION_TABLE_OFFSETS:
            file.pwrite(offset, _region_table(options))
        for sequence, offset in enumerate(layout.HEADER_OFFSETS, 1):
            file.pwrite(offset, _header(options, sequence))
        file.pwrite(0, _file_identifier())


def _file_identifier() -> bytes:
    """Return the file type identifier (2.2.1)."""
    creator = f"imgcore {__version__}".encode("utf-16-le")
    return layout.SIGNATURE + creator.ljust(layout.CREATOR_NBYTES, b"\0")


def _header(options: WriteOptions, sequence: int) -> bytes:
    """Return one of the two headers (2.2.2); the log is empty."""
    return pack_header(
        FileHeader(
            sequence=sequence,
            file_write_guid=options.file_write_guid,
            data_write_guid=options.data_write_guid,
            log_guid=NIL,
            log_version=layout.LOG_VERSION,
            version=layout.VERSION,
            log_nbytes=LOG_NBYTES,
            log_offset=options.log_offset,
        )
    )


def _region_table(options: WriteOptions) -> bytes:
    """Return the region table (2.2.3)."""
    regions = (
        (layout.METADATA_REGION, options.metadata_offset, options.metadata_nbytes),
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
