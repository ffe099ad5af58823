"""VDI: the options of a new disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from uuid import UUID, uuid4, uuid5

from imgcore.engine.geometry import ZeroPolicy
from imgcore.errors import LimitExceededError, OptionError
from imgcore.formats.api import Option
from imgcore.formats.vdi import layout
from imgcore.formats.vdi.header import build_header
from imgcore.formats.vdi.layout import ImageType
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

    from imgcore.formats.api import BackingReference, WriteRequest


OPTIONS: Final = (
    Option(
        "subformat",
        "choice",
        None,
        "Kind of VDI (dynamic unless given)",
        ("dynamic", "fixed"),
    ),
    Option("static", "bool", False, "The same as subformat=fixed"),
    Option("block_size", "size", layout.DEFAULT_BLOCK_NBYTES, "Block size, 128k to 128M"),
    Option("uuid", "str", None, "UUID of the image (random unless given)"),
    Option(
        "modification_uuid",
        "str",
        None,
        "UUID of its last change (random; it follows from uuid if that is given)",
    ),
    Option(
        "preallocation",
        "choice",
        "off",
        "Reserve the space of a fixed image",
        ("off", "falloc", "full"),
    ),
)


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


def plan_request(request: WriteRequest) -> VdiPlan:
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
