"""VHDX: the writer.

Everything but the blocks has its place before the data: header section, log, metadata, BAT.
BAT entries go into the file as their blocks get a place, so that nothing is held back.

Source: [MS-VHDX].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from imgcore._core import CoreError
from imgcore.engine.extents import PLACEMENT_DTYPE, BlockState
from imgcore.engine.geometry import Geometry, Placing, ZeroPolicy
from imgcore.errors import LimitExceededError
from imgcore.formats.api import Measurement
from imgcore.formats.shared.flat import flat_geometry
from imgcore.formats.shared.sparse_tables import write_with_holes
from imgcore.formats.vhdx import layout, options
from imgcore.formats.vhdx.tables import payload_indices, table_format

if TYPE_CHECKING:
    from imgcore.engine.extents import Placements
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import WriteRequest
    from imgcore.formats.vhdx.options import VhdxParams

# BAT entries that are encoded at a time: 1 MiB.
_CHUNK_ENTRIES: Final = 1 << 17


def writer_for(request: WriteRequest) -> DynamicWriter | FixedWriter:
    """Return the writer that the options ask for; raises OptionError or LimitExceededError."""
    params = options.check_request(request)
    kind = FixedWriter if params.is_fixed else DynamicWriter
    return kind(params, request.sparse_nbytes)


def measure(request: WriteRequest, data_nbytes: int) -> Measurement:
    """Return the file size needed for ``data_nbytes`` of allocated blocks."""
    params = options.check_request(request)
    whole = params.fully_allocated_nbytes
    required = whole if params.is_fixed else min(params.data_offset + data_nbytes, whole)
    return Measurement(required, whole)


class _VhdxWriter:
    """What both kinds have: the structures before the blocks."""

    format_name: ClassVar[str] = "vhdx"
    geometry: Geometry

    def __init__(self, params: VhdxParams) -> None:
        self._params = params
        self._file: TargetFile | None = None
        self._target_path = ""
        self._format = table_format(params.metadata.block_nbytes)
        self.first_offset = params.data_offset
        self.logical_sector_nbytes = params.metadata.logical_sector_nbytes

    def begin(self, target: Target) -> TargetFile:
        """Open the target; see :class:`imgcore.formats.api.Writer`."""
        self._file = target.main
        self._target_path = target.path
        return self._file

    def _target_file(self) -> TargetFile:
        if self._file is None:
            raise RuntimeError("begin() was not called")
        return self._file

    def _write_entries(self, first_block: int, placements: Placements) -> None:
        """Put the BAT entries of up to 2^17 blocks into the file."""
        ratio = self._params.metadata.chunk_ratio
        indices = payload_indices(first_block, first_block + len(placements), ratio)
        base = int(indices[0])
        entries = np.empty(len(placements), dtype=np.uint64)
        try:
            self._format.encode(placements, entries.view(np.uint8))
        except CoreError as error:
            place = int(placements["host_offset"][error.offset])
            raise LimitExceededError(
                f"host offset {place:#x} does not fit a BAT entry",
                path=self._params.target_name or None,
            ) from None
        # Between the payload blocks of two chunks stands the entry of a sector bitmap block.
        table = np.zeros(int(indices[-1]) + 1 - base, dtype=np.uint64)
        table[indices - base] = entries
        offset = options.BAT_OFFSET + base * layout.BAT_ENTRY_NBYTES
        write_with_holes(self._target_file(), offset, table)

    def _write_structures(self, file_nbytes: int) -> None:
        file, params = self._target_file(), self._params
        file.truncate(file_nbytes)
        file.pwrite(options.METADATA_OFFSET, options.metadata_region(params, self._target_path))
        for offset in layout.REGION_TABLE_OFFSETS:
            file.pwrite(offset, options.region_table(params))
        for sequence, offset in enumerate(layout.HEADER_OFFSETS, 1):
            file.pwrite(offset, options.header(params, sequence))
        file.pwrite(0, options.file_identifier())


class DynamicWriter(_VhdxWriter):
    """Writes images that grow with their data: dynamic and differencing ones."""

    def __init__(self, params: VhdxParams, sparse_nbytes: int) -> None:
        super().__init__(params)
        self.geometry = Geometry(
            block_nbytes=params.metadata.block_nbytes,
            guest_nbytes=params.metadata.virtual_size,
            placing=Placing.APPEND,
            zero_policy=_zero_policy(params, sparse_nbytes),
            stored_alignment=layout.ALIGNMENT,
            sparse_nbytes=sparse_nbytes,
        )

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Write the entries of blocks; see :class:`imgcore.formats.api.Writer`."""
        for start in range(0, len(placements), _CHUNK_ENTRIES):
            rows = placements[start : start + _CHUNK_ENTRIES]
            if rows["state"].any():
                self._write_entries(first_block + start, rows)
        stored = np.flatnonzero(placements["state"] == BlockState.STORED)
        if not stored.size:
            return next_offset
        # The file holds the disk's last block as a whole, also where the disk ends inside it.
        last = int(placements["host_offset"][stored[-1]])
        return max(next_offset, last + self._params.metadata.block_nbytes)

    def finish(self, next_offset: int) -> None:
        """Write what stands before the blocks; see :class:`imgcore.formats.api.Writer`."""
        self._write_structures(max(next_offset, self.first_offset))


class FixedWriter(_VhdxWriter):
    """Writes images in which block i has its place from the start."""

    def __init__(self, params: VhdxParams, sparse_nbytes: int) -> None:
        super().__init__(params)
        self.geometry = flat_geometry(
            params.metadata.virtual_size, sparse_nbytes, host_base=params.data_offset
        )

    def begin(self, target: Target) -> TargetFile:
        """Give the file its size; see :class:`imgcore.formats.api.Writer`."""
        file = super().begin(target)
        file.truncate(self._params.fully_allocated_nbytes)
        return file

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Do nothing: all places are known."""
        return next_offset

    def finish(self, next_offset: int) -> None:
        """Write everything but the data; see :class:`imgcore.formats.api.Writer`."""
        metadata = self._params.metadata
        for first in range(0, metadata.n_blocks, _CHUNK_ENTRIES):
            last = min(first + _CHUNK_ENTRIES, metadata.n_blocks)
            rows = np.zeros(last - first, dtype=PLACEMENT_DTYPE)
            blocks = np.arange(first, last, dtype=np.uint64)
            rows["host_offset"] = blocks * np.uint64(metadata.block_nbytes)
            rows["host_offset"] += np.uint64(self._params.data_offset)
            rows["length"] = metadata.block_nbytes
            rows["state"] = BlockState.STORED
            self._write_entries(first, rows)
        self._write_structures(self._params.fully_allocated_nbytes)


def _zero_policy(params: VhdxParams, sparse_nbytes: int) -> ZeroPolicy:
    if sparse_nbytes == 0:
        return ZeroPolicy.STORE
    return ZeroPolicy.SKIP if params.backing is None else ZeroPolicy.EXPLICIT
