"""The structures of sparse VMDK files that are written: header, descriptor, tables.

Source: Virtual Disk Format 5.0, "Hosted Sparse Extents".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.errors import LimitExceededError
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.vmdk import layout
from imgcore.formats.vmdk.descriptor import compose_descriptor
from imgcore.formats.vmdk.layout import Flags, SparseHeader
from imgcore.formats.vmdk.options import is_plain_name
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
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.vmdk.options import WriteOptions

GT_NSECTORS: Final = layout.GT_NBYTES // SECTOR_NBYTES
# Header and descriptor.
FRONT_NBYTES: Final = (layout.DESCRIPTOR_SECTOR + layout.DESCRIPTOR_NSECTORS) * SECTOR_NBYTES
# Directory entries that are written at once: 1 MiB.
_PIECE_ENTRIES: Final = 1 << 18


def n_directory_entries(options: WriteOptions) -> int:
    count = -(-options.virtual_size // (options.grain_nbytes * layout.GTES_PER_GT))
    if count > VMDK_MAX_DIRECTORY_ENTRIES:
        raise LimitExceededError(
            f"{options.virtual_size} bytes need {count} grain directory entries, allowed up to "
            f"{VMDK_MAX_DIRECTORY_ENTRIES}: use a larger grain_size"
        )
    return count


def directory_nbytes(n_entries: int) -> int:
    return align_up(n_entries * layout.ENTRY_NBYTES, SECTOR_NBYTES)


def table_format(options: WriteOptions) -> TableFormat:
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


def encode_entries(table: TableFormat, placements: Placements, path: str) -> NDArray[np.uint32]:
    """Return placements as grain table entries, shape (n,)."""
    import numpy as np

    from imgcore._core import CoreError

    entries = np.zeros(len(placements), dtype="<u4")
    try:
        table.encode(placements, entries.view(np.uint8))
    except CoreError as error:
        place = int(placements["host_offset"][error.offset])
        raise too_large(place, path) from error
    return entries


def too_large(place: int, path: str) -> LimitExceededError:
    return LimitExceededError(
        f"data at {place:#x}: a sparse VMDK file holds at most {VMDK_MAX_SPARSE_FILE_NBYTES} "
        "bytes (use a flat subformat)",
        path=path,
    )


def embedded_descriptor(options: WriteOptions, access: str) -> bytes:
    # Readers ignore the name that a sparse file gives itself.
    name = options.name if is_plain_name(options.name) else "disk.vmdk"
    line = f'{access} {options.n_sectors} SPARSE "{name}"'
    text = compose_descriptor(options.subformat, line, options.n_sectors, options.database)
    assert len(text) <= layout.DESCRIPTOR_NSECTORS * SECTOR_NBYTES
    return text


def make_header(
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


class HostedLayout:
    """The tables of a monolithicSparse file; offsets in bytes.

    Each directory is followed by its tables, which are contiguous, so that the entry of
    grain ``i`` is at ``gt_offset + 4 * i``.

    Parameters
    ----------
    options : WriteOptions
    start : int
        Where the first directory is, at a whole sector.
    """

    def __init__(self, options: WriteOptions, start: int = FRONT_NBYTES) -> None:
        self.n_entries: int = n_directory_entries(options)
        gd_nbytes = directory_nbytes(self.n_entries)
        tables_nbytes = self.n_entries * layout.GT_NBYTES
        self.rgd_offset: int = start
        self.rgt_offset: int = self.rgd_offset + gd_nbytes
        self.gd_offset: int = self.rgt_offset + tables_nbytes
        self.gt_offset: int = self.gd_offset + gd_nbytes
        # The first grain that fits after the tables.
        self.end: int = align_up(self.gt_offset + tables_nbytes, options.grain_nbytes)


class HostedTables:
    """Writes header, descriptor and both sets of tables of a monolithicSparse file."""

    def __init__(self, options: WriteOptions, file: TargetFile, parts: HostedLayout) -> None:
        self._options = options
        self._file = file
        self._layout = parts
        self._format = table_format(options)

    def place(self, first_block: int, placements: Placements) -> None:
        """Write the entries of the placed grains; unused tables stay holes."""
        import numpy as np

        entries = encode_entries(self._format, placements, self._file.path)
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

    def finish(self, next_offset: int, overhead: int) -> None:
        """Write both directories, descriptor and header; round up to whole grains.

        ``overhead`` is the size of the metadata at the file's start in bytes.
        """
        parts = self._layout
        end = align_up(max(next_offset, parts.end), self._options.grain_nbytes)
        if end > VMDK_MAX_SPARSE_FILE_NBYTES:
            raise too_large(end, self._file.path)
        self._file.truncate(end)
        self._write_directory(parts.rgd_offset, parts.rgt_offset)
        self._write_directory(parts.gd_offset, parts.gt_offset)
        descriptor = embedded_descriptor(self._options, "RW")
        self._file.pwrite(layout.DESCRIPTOR_SECTOR * SECTOR_NBYTES, descriptor)
        flags = Flags.NEWLINE_TEST | Flags.REDUNDANT_GD
        if self._options.zeroed_grain:
            flags |= Flags.ZEROED_GRAIN
        version = 2 if self._options.zeroed_grain else 1
        header = make_header(
            self._options, version, flags, parts.gd_offset, parts.rgd_offset, overhead
        )
        self._file.pwrite(0, header)

    def _write_directory(self, offset: int, first_table: int) -> None:
        """Write a directory that names every table, even those in holes of the file.

        QEMU destroys a file in whose directory a table is missing: it writes the new
        grain's entry into the first sectors.
        """
        import numpy as np

        n_entries = self._layout.n_entries
        for first in range(0, n_entries, _PIECE_ENTRIES):
            numbers = np.arange(first, min(first + _PIECE_ENTRIES, n_entries), dtype=np.int64)
            entries = (numbers * GT_NSECTORS + first_table // SECTOR_NBYTES).astype("<u4")
            self._file.pwrite(offset + first * layout.ENTRY_NBYTES, entries.view(np.uint8))
