"""VDI: the writers.

Layout of a new file: header, block map, then blocks from a multiple of 1 MiB on, as VirtualBox
aligns them.  The map's place is known from the start, so entries go into the file as blocks are
placed, and no more than a piece of the map is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final
from uuid import UUID, uuid4, uuid5

from imgcore.engine.geometry import Geometry, ZeroPolicy
from imgcore.errors import LimitExceededError, OptionError, UnsupportedFeatureError
from imgcore.formats import _vdi_layout as layout
from imgcore.formats._vdi_header import build_header
from imgcore.formats._vdi_layout import ImageType
from imgcore.formats.api import Measurement
from imgcore.formats.shared.flat import flat_geometry
from imgcore.limits import (
    MAX_VIRTUAL_NBYTES,
    SECTOR_NBYTES,
    VDI_MAX_DATA_OFFSET,
    VDI_MAX_WRITTEN_BLOCK_NBYTES,
    VDI_MIN_WRITTEN_BLOCK_NBYTES,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray

    from imgcore.engine.extents import Placements
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import BackingReference, Writer, WriteRequest

# Entries that are made and written at a time: 1 MiB.
_PIECE_ENTRIES: Final = 1 << 18


@dataclass(frozen=True)
class VdiPlan:
    """A request with its options verified; places and lengths in bytes."""

    image_type: ImageType
    virtual_size: int
    block_nbytes: int
    n_blocks: int
    data_offset: int
    sparse_nbytes: int
    preallocation: str
    uuid: UUID
    modification_uuid: UUID
    parent_uuid: UUID | None = None
    parent_modification_uuid: UUID | None = None

    @property
    def is_fixed(self) -> bool:
        """Every block has its place from the start."""
        return self.image_type is ImageType.FIXED

    @property
    def zero_policy(self) -> ZeroPolicy:
        """Zeros are told from the parent's content where there is one."""
        if self.sparse_nbytes == 0:
            return ZeroPolicy.STORE
        return ZeroPolicy.SKIP if self.parent_uuid is None else ZeroPolicy.EXPLICIT

    def file_nbytes(self, n_allocated: int) -> int:
        """Return the size of the file with that many blocks in it."""
        return self.data_offset + n_allocated * self.block_nbytes

    def header(self, n_allocated: int) -> bytes:
        """Return the header of the finished image."""
        return build_header(
            image_type=self.image_type,
            data_offset=self.data_offset,
            virtual_size=self.virtual_size,
            block_nbytes=self.block_nbytes,
            n_blocks=self.n_blocks,
            n_allocated=n_allocated,
            image_uuid=self.uuid,
            modification_uuid=self.modification_uuid,
            parent_uuid=self.parent_uuid,
            parent_modification_uuid=self.parent_modification_uuid,
        )


def writer_for(request: WriteRequest) -> Writer:
    """Return the writer that the options ask for; raises OptionError or LimitExceededError."""
    plan = _plan(request)
    return FixedWriter(plan) if plan.is_fixed else DynamicWriter(plan)


def measure(request: WriteRequest, data_nbytes: int) -> Measurement:
    """Return the size of the file with ``data_nbytes`` of whole blocks, and with a full disk."""
    plan = _plan(request)
    full = plan.file_nbytes(plan.n_blocks)
    if plan.is_fixed:
        return Measurement(full, full)
    n_data = min(-(-data_nbytes // plan.block_nbytes), plan.n_blocks)
    return Measurement(plan.file_nbytes(n_data), full)


class DynamicWriter:
    """Writes images that grow with their data, with a parent or without."""

    format_name: ClassVar[str] = "vdi"

    def __init__(self, plan: VdiPlan) -> None:
        self._plan = plan
        self._file: TargetFile | None = None
        self._n_allocated = 0
        # Entries of the map before this one are in the file.
        self._n_written = 0
        self.first_offset = plan.data_offset
        self.geometry = Geometry(
            block_nbytes=plan.block_nbytes,
            guest_nbytes=plan.virtual_size,
            zero_policy=plan.zero_policy,
            stored_alignment=plan.block_nbytes,
            sparse_nbytes=plan.sparse_nbytes,
        )

    def begin(self, target: Target) -> TargetFile:
        """Return the file; its header is written at the end."""
        from imgcore.formats._vdi_tables import table_format

        _refuse_in_place(target)
        self._file = target.main
        self._format = table_format(self._plan.block_nbytes, self._plan.data_offset)
        return self._file

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Write the entries of these blocks, and of those before them that have no data."""
        import numpy as np

        assert self._file is not None
        self._write_free(first_block)
        for start in range(0, len(placements), _PIECE_ENTRIES):
            entries = np.empty(min(_PIECE_ENTRIES, len(placements) - start), dtype="<u4")
            rows = placements[start : start + len(entries)]
            # A place that does not fit an entry cannot come up: blocks are in guest order,
            # and there are fewer of them than entries have values.
            self._format.encode(rows, entries.view(np.uint8))
            _write_entries(self._file, first_block + start, entries)
            self._n_allocated += int((entries < layout.BLOCK_ZERO).sum())
        self._n_written = first_block + len(placements)
        return next_offset

    def _write_free(self, until: int) -> None:
        """Fill the map with free blocks up to ``until``."""
        import numpy as np

        assert self._file is not None
        for first in range(self._n_written, until, _PIECE_ENTRIES):
            count = min(_PIECE_ENTRIES, until - first)
            _write_entries(self._file, first, np.full(count, layout.BLOCK_FREE, dtype="<u4"))
        self._n_written = max(self._n_written, until)

    def finish(self, next_offset: int) -> None:
        """Complete the map and the last block, write the header."""
        assert self._file is not None
        self._write_free(self._plan.n_blocks)
        self._file.truncate(self._plan.file_nbytes(self._n_allocated))
        self._file.pwrite(0, self._plan.header(self._n_allocated))


class FixedWriter:
    """Writes images in which every block has its place from the start."""

    format_name: ClassVar[str] = "vdi"

    def __init__(self, plan: VdiPlan) -> None:
        self._plan = plan
        self._file: TargetFile | None = None
        self.first_offset = plan.file_nbytes(plan.n_blocks)
        self.geometry = flat_geometry(
            plan.virtual_size, plan.sparse_nbytes, host_base=plan.data_offset
        )

    def begin(self, target: Target) -> TargetFile:
        """Give the file its size, so that it reads as zeros, and return it."""
        _refuse_in_place(target)
        self._file = target.main
        if self._plan.preallocation != "off":
            target.require_space(self.first_offset)
        self._file.truncate(self.first_offset)
        self._file.preallocate(self._plan.preallocation, self.first_offset)
        return self._file

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Do nothing: all places are known."""
        return next_offset

    def finish(self, next_offset: int) -> None:
        """Write the block map and the header."""
        import numpy as np

        assert self._file is not None
        n_blocks = self._plan.n_blocks
        for first in range(0, n_blocks, _PIECE_ENTRIES):
            last = min(first + _PIECE_ENTRIES, n_blocks)
            _write_entries(self._file, first, np.arange(first, last, dtype="<u4"))
        self._file.truncate(self.first_offset)
        self._file.pwrite(0, self._plan.header(n_blocks))


def _write_entries(file: TargetFile, first: int, entries: NDArray[np.uint32]) -> None:
    file.pwrite(layout.MAP_OFFSET + first * layout.ENTRY_NBYTES, entries)


def _refuse_in_place(target: Target) -> None:
    if target.in_place:
        raise UnsupportedFeatureError(
            "VDI is written to a new file only, not in place (-n) nor to a block device",
            path=target.path,
        )


def _plan(request: WriteRequest) -> VdiPlan:
    options = request.options
    if request.compress:
        raise OptionError("VDI knows no compression (-c)")
    if request.virtual_size % SECTOR_NBYTES or not 0 <= request.virtual_size <= MAX_VIRTUAL_NBYTES:
        raise OptionError(
            f"virtual size {request.virtual_size} is not a multiple of {SECTOR_NBYTES}"
        )
    image_type = _image_type(options, request.backing)
    preallocation = str(options.get("preallocation") or "off")
    if preallocation != "off" and image_type is not ImageType.FIXED:
        raise OptionError("option preallocation goes with subformat=fixed only")
    block_nbytes = _block_nbytes(options)
    n_blocks = -(-request.virtual_size // block_nbytes)
    map_end = layout.MAP_OFFSET + n_blocks * layout.ENTRY_NBYTES
    unit = max(block_nbytes, layout.DATA_ALIGNMENT)
    data_offset = -(-map_end // unit) * unit
    if data_offset > VDI_MAX_DATA_OFFSET:
        raise LimitExceededError(
            f"a disk of {request.virtual_size} bytes needs {n_blocks} blocks of {block_nbytes}, "
            f"whose map does not fit below {VDI_MAX_DATA_OFFSET:#x}: a larger block_size helps"
        )
    image_uuid, modification_uuid = _uuids(options)
    parent_uuid, parent_modification_uuid = _parent_uuids(request.backing)
    return VdiPlan(
        image_type=image_type,
        virtual_size=request.virtual_size,
        block_nbytes=block_nbytes,
        n_blocks=n_blocks,
        data_offset=data_offset,
        sparse_nbytes=request.sparse_nbytes,
        preallocation=preallocation,
        uuid=image_uuid,
        modification_uuid=modification_uuid,
        parent_uuid=parent_uuid,
        parent_modification_uuid=parent_modification_uuid,
    )


def _image_type(options: Mapping[str, Any], backing: BackingReference | None) -> ImageType:
    subformat = options.get("subformat")
    is_static = bool(options.get("static"))
    if is_static and subformat == "dynamic":
        raise OptionError("static=on asks for subformat=fixed, not for dynamic")
    is_fixed = is_static or subformat == "fixed"
    if backing is None:
        return ImageType.FIXED if is_fixed else ImageType.NORMAL
    if is_fixed:
        raise OptionError("a fixed VDI has no parent (-B)")
    return ImageType.DIFF


def _parent_uuids(backing: BackingReference | None) -> tuple[UUID | None, UUID | None]:
    if backing is None:
        return None, None
    if backing.format != "vdi":
        raise OptionError(f"the parent (-B) of a VDI is a VDI, not {backing.format}")
    known = backing.identities
    return UUID(known[layout.IDENTITY_UUID]), UUID(known[layout.IDENTITY_MODIFICATION])


def _block_nbytes(options: Mapping[str, Any]) -> int:
    nbytes = int(options.get("block_size") or layout.DEFAULT_BLOCK_NBYTES)
    if (
        nbytes & (nbytes - 1)
        or not VDI_MIN_WRITTEN_BLOCK_NBYTES <= nbytes <= VDI_MAX_WRITTEN_BLOCK_NBYTES
    ):
        raise OptionError(
            f"block_size is {nbytes}: allowed are powers of two from "
            f"{VDI_MIN_WRITTEN_BLOCK_NBYTES} to {VDI_MAX_WRITTEN_BLOCK_NBYTES}"
        )
    return nbytes


def _uuids(options: Mapping[str, Any]) -> tuple[UUID, UUID]:
    """Return the UUIDs of the image and of its modification; neither is ever null."""
    image_uuid = _given_uuid(options, "uuid")
    modification_uuid = _given_uuid(options, "modification_uuid")
    if modification_uuid is None:
        modification_uuid = uuid5(image_uuid, "modification") if image_uuid else uuid4()
    return image_uuid or uuid4(), modification_uuid


def _given_uuid(options: Mapping[str, Any], name: str) -> UUID | None:
    text = options.get(name)
    if text is None:
        return None
    try:
        value = UUID(str(text))
    except ValueError:
        raise OptionError(
            f"{name} is {str(text)[:60]!r}: 32 hexadecimal digits are expected"
        ) from None
    if value.bytes_le == layout.NULL_UUID:
        raise OptionError(f"{name} is null: VirtualBox refuses such an image")
    return value
