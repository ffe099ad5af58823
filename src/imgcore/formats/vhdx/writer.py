"""VHDX: the writer.

The header section, log, metadata and BAT come before the blocks.  BAT entries are
written as soon as their blocks are placed, so that memory does not grow with the disk.

Source: [MS-VHDX].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from imgcore.engine.extents import PLACEMENT_DTYPE, BlockState
from imgcore.engine.geometry import Geometry, Placing
from imgcore.formats.api import Measurement
from imgcore.formats.shared.flat_writer import FlatWriter, flat_geometry
from imgcore.formats.shared.write_checks import zero_policy
from imgcore.formats.vhdx import layout
from imgcore.formats.vhdx.options import Options, WriteOptions
from imgcore.formats.vhdx.structures import CHUNK_ENTRIES, Structures

if TYPE_CHECKING:
    from imgcore.engine.extents import Placements
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import WriteRequest


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


class DynamicWriter:
    """Writes dynamic and differencing images."""

    format_name: ClassVar[str] = "vhdx"
    holds_sectors: ClassVar[bool] = True
    needs_own_blocks: ClassVar[bool] = False

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self._structures = Structures(options)
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

    def leave_end_open(self) -> None:
        """Do nothing: only the BAT's length in the headers depends on the size."""

    def end_disk(self, request: WriteRequest[Options]) -> None:
        """Set the sizes of disk and BAT; see `imgcore.formats.api.EndsLate`."""
        self._options = WriteOptions.of(request)
        self._structures = Structures(self._options)
        nbytes = self._options.metadata.virtual_size
        self.geometry = self.geometry._replace(guest_nbytes=nbytes)

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Write the entries of blocks; see `imgcore.formats.api.Writer`."""
        assert self._file is not None
        end = self._structures.write_entries(self._file, first_block, placements)
        return max(next_offset, end)

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
        self._structures = Structures(options)
        self.logical_sector_nbytes: int = metadata.logical_sector_nbytes

    def end_disk(self, request: WriteRequest[Options]) -> None:
        """Set the sizes; see `imgcore.formats.api.EndsLate`."""
        options = WriteOptions.of(request)
        self._metadata = metadata = options.metadata
        self._structures = Structures(options)
        file_nbytes = self.first_offset + metadata.n_blocks * metadata.block_nbytes
        self._end(metadata.virtual_size, file_nbytes)

    def finish(self, next_offset: int) -> None:
        """Write everything except the data; see `imgcore.formats.api.Writer`."""
        file, metadata = self._finished_file(), self._metadata
        for first in range(0, metadata.n_blocks, CHUNK_ENTRIES):
            last = min(first + CHUNK_ENTRIES, metadata.n_blocks)
            rows = np.zeros(last - first, dtype=PLACEMENT_DTYPE)
            blocks = np.arange(first, last, dtype=np.uint64)
            rows["host_offset"] = blocks * np.uint64(metadata.block_nbytes)
            rows["host_offset"] += np.uint64(self.first_offset)
            rows["length"] = metadata.block_nbytes
            rows["state"] = BlockState.STORED
            self._structures.write_entries(file, first, rows)
        # A fixed disk has no parent, so no path goes into its headers.
        self._structures.write_headers(file, "")
