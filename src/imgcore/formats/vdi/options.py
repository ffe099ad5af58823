"""VDI: the options for writing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID, uuid5

from imgcore.errors import LimitExceededError, OptionError
from imgcore.formats.options import (
    PREALLOCATION,
    FormatOptions,
    choice,
    flag,
    size_or_auto,
    table_place,
    text,
)
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.shared.identities import random_uuid
from imgcore.formats.shared.write_checks import (
    check_block_size,
    check_virtual_size,
    parse_uuid,
    refuse_compression,
    refuse_idle,
)
from imgcore.formats.vdi import layout
from imgcore.formats.vdi.header import build_header
from imgcore.formats.vdi.layout import ImageType
from imgcore.limits import (
    MAX_VIRTUAL_NBYTES,
    VDI_MAX_DATA_OFFSET,
    VDI_MAX_WRITTEN_BLOCK_NBYTES,
    VDI_MIN_WRITTEN_BLOCK_NBYTES,
)

if TYPE_CHECKING:
    from imgcore.formats.api import BackingReference, WriteRequest


class Options(FormatOptions):
    """The ``-o`` options."""

    subformat: str | None = choice(None, ("dynamic", "fixed"), "Kind of VDI (default: dynamic)")
    static: bool = flag("The same as subformat=fixed")
    # QEMU reads only the default, which also lets more stay than a larger one.
    block_size: int = size_or_auto(
        layout.DEFAULT_BLOCK_NBYTES,
        "Block size, 128k to 128M",
        auto=(VDI_MIN_WRITTEN_BLOCK_NBYTES, layout.DEFAULT_BLOCK_NBYTES),
    )
    uuid: str | None = text(None, "UUID of the image (default: random)")
    modification_uuid: str | None = text(
        None, "UUID of its last change (default: derived from uuid if given, else random)"
    )
    preallocation: str = choice("off", PREALLOCATION, "Reserve the space of a fixed image")
    tables: str | None = table_place()


class WriteOptions(NamedTuple):
    """A verified request; offsets and lengths in bytes."""

    image_type: ImageType
    virtual_size: int
    block_nbytes: int
    n_blocks: int
    data_offset: int
    sparse_nbytes: int
    preallocation: str
    uuid: UUID
    modification_uuid: UUID
    parent_uuid: UUID | None
    parent_modification_uuid: UUID | None

    @classmethod
    def of(cls, request: WriteRequest[Options]) -> WriteOptions:
        """Verify a request; raises OptionError or LimitExceededError."""
        options = request.options
        refuse_compression(request, "VDI")
        check_virtual_size(request.virtual_size, at_most=MAX_VIRTUAL_NBYTES)
        image_type = _image_type(options, request.backing)
        is_fixed = image_type is ImageType.FIXED
        refuse_idle({"preallocation": options.preallocation != "off" and not is_fixed}, "dynamic")
        low, high = VDI_MIN_WRITTEN_BLOCK_NBYTES, VDI_MAX_WRITTEN_BLOCK_NBYTES
        check_block_size("block_size", options.block_size, low, high)
        n_blocks = -(-request.virtual_size // options.block_size)
        image_uuid, modification_uuid = _uuids(request)
        parent_uuid, parent_modification_uuid = _parent_uuids(request.backing)
        return cls(
            image_type=image_type,
            virtual_size=request.virtual_size,
            block_nbytes=options.block_size,
            n_blocks=n_blocks,
            data_offset=_data_offset(request.virtual_size, options.block_size, n_blocks),
            sparse_nbytes=request.sparse_nbytes,
            preallocation=options.preallocation,
            uuid=image_uuid,
            modification_uuid=modification_uuid,
            parent_uuid=parent_uuid,
            parent_modification_uuid=parent_modification_uuid,
        )

    @property
    def is_fixed(self) -> bool:
        """Whether every block is allocated from the start."""
        return self.image_type is ImageType.FIXED

    def file_nbytes(self, n_allocated: int) -> int:
        """Return the size of a file with ``n_allocated`` blocks."""
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


def _image_type(options: Options, backing: BackingReference | None) -> ImageType:
    if options.static and options.subformat == "dynamic":
        raise OptionError("static=on means subformat=fixed, which contradicts subformat=dynamic")
    is_fixed = options.static or options.subformat == "fixed"
    if backing is None:
        return ImageType.FIXED if is_fixed else ImageType.NORMAL
    if is_fixed:
        raise OptionError("a fixed VDI cannot have a parent (-B)")
    return ImageType.DIFF


def _data_offset(virtual_size: int, block_nbytes: int, n_blocks: int) -> int:
    map_end = layout.MAP_OFFSET + n_blocks * layout.ENTRY_NBYTES
    offset = align_up(map_end, max(block_nbytes, layout.DATA_ALIGNMENT))
    if offset > VDI_MAX_DATA_OFFSET:
        raise LimitExceededError(
            f"a disk of {virtual_size} bytes needs {n_blocks} blocks of {block_nbytes}, "
            f"whose map does not fit below {VDI_MAX_DATA_OFFSET:#x}: a larger block_size helps"
        )
    return offset


def _parent_uuids(backing: BackingReference | None) -> tuple[UUID | None, UUID | None]:
    if backing is None:
        return None, None
    if backing.format != "vdi":
        raise OptionError(f"the parent (-B) of a VDI must be a VDI, not {backing.format}")
    known = backing.identities
    return UUID(known[layout.IDENTITY_UUID]), UUID(known[layout.IDENTITY_MODIFICATION])


def _uuids(request: WriteRequest[Options]) -> tuple[UUID, UUID]:
    """Return the UUIDs of the image and of its last change; VirtualBox rejects zero."""
    stated, modification = request.options.uuid, request.options.modification_uuid
    image_uuid = random_uuid(request, "uuid") if stated is None else parse_uuid("uuid", stated)
    if modification is not None:
        return image_uuid, parse_uuid("modification_uuid", modification)
    if stated is None:
        return image_uuid, random_uuid(request, "modification")
    return image_uuid, uuid5(image_uuid, "modification")
