"""Reads, verifies and builds the headers of VDI images.

Nothing here imports NumPy, so that ``info`` starts fast.

Source: VirtualBox src/VBox/Storage/VDICore.h, VDI.cpp (vdiValidateHeader).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple
from uuid import UUID

from imgcore.errors import (
    CorruptImageError,
    LimitExceededError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.vdi import layout
from imgcore.formats.vdi.layout import HeaderFields, ImageType
from imgcore.limits import (
    MAX_VIRTUAL_NBYTES,
    SECTOR_NBYTES,
    VDI_MAX_BLOCK_NBYTES,
    VDI_MIN_BLOCK_NBYTES,
)
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource


class VdiHeader(NamedTuple):
    """A verified header; offsets and lengths in bytes.

    ``n_blocks`` is the number of entries in the block map, which may be more than the
    disk needs.  ``parent_uuid`` is None for an image without a parent.
    """

    image_type: ImageType
    comment: str
    map_offset: int
    data_offset: int
    virtual_size: int
    block_nbytes: int
    n_blocks: int
    n_allocated: int
    uuid: UUID
    modification_uuid: UUID
    parent_uuid: UUID | None
    parent_modification_uuid: UUID | None

    @property
    def subformat(self) -> str:
        """``dynamic``, ``fixed`` or ``differencing``."""
        if self.parent_uuid is not None:
            return layout.SUBFORMATS[ImageType.DIFF]
        return layout.SUBFORMATS[self.image_type]

    @property
    def identities(self) -> dict[str, str]:
        """The UUIDs by which a child recognises this image."""
        return _identities(self.uuid, self.modification_uuid)

    @property
    def parent_identities(self) -> dict[str, str]:
        """The UUIDs that the parent must have; empty for an image without a parent."""
        return _identities(self.parent_uuid, self.parent_modification_uuid)


def read_header(file: ByteSource, damage: Damage = STRICT) -> VdiHeader:
    """Read and verify the header of an image.

    Parameters
    ----------
    file : ByteSource
        The caller closes it.

    Raises
    ------
    WrongFormatError
        The signature is absent.
    CorruptImageError
        The header contradicts itself or the file.
    UnsupportedFeatureError
        The version, the type or a feature is not supported.
    LimitExceededError
        A claimed size is over its limit.
    """
    raw = file.pread(0, min(layout.HEAD_NBYTES, file.nbytes))
    _verify_pre_header(file.path, raw)
    if len(raw) < layout.PRE_HEADER.size + layout.HEADER.size:
        raise CorruptImageError(
            f"the header ends at {layout.PRE_HEADER.size + layout.HEADER.size:#x}, past the end "
            f"of the file ({file.nbytes:#x})",
            path=file.path,
        )
    fields = HeaderFields._make(layout.HEADER.unpack_from(raw, layout.PRE_HEADER.size))
    _verify_kind(file.path, fields, raw)
    _verify_sizes(file.path, fields)
    _verify_places(file, fields, damage)
    return VdiHeader(
        image_type=ImageType(fields.image_type),
        comment=fields.comment.split(b"\0")[0].decode("utf-8", "replace"),
        map_offset=fields.map_offset,
        data_offset=fields.data_offset,
        virtual_size=_virtual_size(file.path, fields),
        block_nbytes=fields.block_nbytes,
        n_blocks=fields.n_blocks,
        n_allocated=fields.n_allocated,
        uuid=UUID(bytes_le=fields.uuid),
        modification_uuid=UUID(bytes_le=fields.modification_uuid),
        parent_uuid=_uuid_or_none(fields.parent_uuid),
        parent_modification_uuid=_uuid_or_none(fields.parent_modification_uuid),
    )


def read_identities(file: ByteSource) -> dict[str, str]:
    """Return the identities of a file; empty if it is not a VDI 1.1."""
    nbytes = layout.PRE_HEADER.size + layout.HEADER.size
    if file.nbytes < nbytes:
        return {}
    raw = file.pread(0, nbytes)
    if layout.PRE_HEADER.unpack_from(raw)[1:] != (layout.SIGNATURE, layout.VERSION_1_1):
        return {}
    fields = HeaderFields._make(layout.HEADER.unpack_from(raw, layout.PRE_HEADER.size))
    return _identities(UUID(bytes_le=fields.uuid), UUID(bytes_le=fields.modification_uuid))


def build_header(
    *,
    image_type: ImageType,
    data_offset: int,
    virtual_size: int,
    block_nbytes: int,
    n_blocks: int,
    n_allocated: int,
    image_uuid: UUID,
    modification_uuid: UUID,
    parent_uuid: UUID | None,
    parent_modification_uuid: UUID | None,
) -> bytes:
    """Return the header of a new image; VirtualBox calculates the geometry itself."""
    fields = HeaderFields(
        header_nbytes=layout.HEADER_V1PLUS_NBYTES,
        image_type=image_type,
        flags=0,
        comment=b"",
        map_offset=layout.MAP_OFFSET,
        data_offset=data_offset,
        cylinders=0,
        heads=0,
        sectors=0,
        sector_nbytes=layout.SECTOR_NBYTES,
        translation=0,
        disk_nbytes=virtual_size,
        block_nbytes=block_nbytes,
        block_extra_nbytes=0,
        n_blocks=n_blocks,
        n_allocated=n_allocated,
        uuid=image_uuid.bytes_le,
        modification_uuid=modification_uuid.bytes_le,
        parent_uuid=_raw_uuid(parent_uuid),
        parent_modification_uuid=_raw_uuid(parent_modification_uuid),
    )
    return (
        layout.PRE_HEADER.pack(layout.FILE_INFO, layout.SIGNATURE, layout.VERSION_1_1)
        + layout.HEADER.pack(*fields)
        + layout.GEOMETRY.pack(0, 0, 0, layout.SECTOR_NBYTES)
    )


def _verify_pre_header(path: str, raw: bytes) -> None:
    if len(raw) < layout.PRE_HEADER.size:
        raise WrongFormatError(f"no VDI header in {len(raw)} bytes", path=path)
    _, signature, version = layout.PRE_HEADER.unpack_from(raw)
    if signature != layout.SIGNATURE:
        raise WrongFormatError(
            f"not a VDI image: its signature is not {layout.SIGNATURE:#010x}",
            path=path,
        )
    if version != layout.VERSION_1_1:
        raise UnsupportedFeatureError(
            f"VDI version {version >> 16}.{version & 0xFFFF}, only 1.1 is supported: VirtualBox "
            "(VBoxManage clonemedium) converts older images",
            path=path,
        )


def _verify_kind(path: str, fields: HeaderFields, raw: bytes) -> None:
    if fields.header_nbytes < layout.HEADER_V1_NBYTES:
        raise CorruptImageError(
            f"header of {fields.header_nbytes} bytes, at least {layout.HEADER_V1_NBYTES} are "
            "needed",
            path=path,
            offset=layout.PRE_HEADER.size,
        )
    if fields.image_type == ImageType.UNDO:
        raise UnsupportedFeatureError("VDI image of type undo", path=path)
    if fields.image_type not in layout.SUBFORMATS:
        raise CorruptImageError(f"unknown image type {fields.image_type}", path=path)
    if unknown := fields.flags & ~layout.KNOWN_FLAGS:
        raise UnsupportedFeatureError(f"unknown image flags {unknown:#x}", path=path)
    sector_sizes = {fields.sector_nbytes}
    geometry_offset = layout.PRE_HEADER.size + layout.HEADER.size
    if fields.header_nbytes >= layout.HEADER_V1PLUS_NBYTES and len(raw) >= layout.HEAD_NBYTES:
        sector_sizes.add(layout.GEOMETRY.unpack_from(raw, geometry_offset)[3])
    # 0 means that the producer left the geometry out.
    if odd := sector_sizes - {0, layout.SECTOR_NBYTES}:
        raise UnsupportedFeatureError(
            f"sectors of {max(odd)} bytes, only {layout.SECTOR_NBYTES} are supported", path=path
        )
    if fields.image_type == ImageType.DIFF and fields.parent_uuid == layout.NULL_UUID:
        raise CorruptImageError("a differencing image that does not name its parent", path=path)


def _verify_sizes(path: str, fields: HeaderFields) -> None:
    block_nbytes = fields.block_nbytes
    if (
        block_nbytes & (block_nbytes - 1)
        or not VDI_MIN_BLOCK_NBYTES <= block_nbytes <= VDI_MAX_BLOCK_NBYTES
    ):
        raise LimitExceededError(
            f"blocks of {block_nbytes} bytes, allowed: powers of two from "
            f"{VDI_MIN_BLOCK_NBYTES} to {VDI_MAX_BLOCK_NBYTES}",
            path=path,
        )
    if fields.block_extra_nbytes:
        raise UnsupportedFeatureError(
            f"{fields.block_extra_nbytes} bytes of extra data before each block", path=path
        )
    if fields.disk_nbytes > MAX_VIRTUAL_NBYTES:
        raise LimitExceededError(
            f"disk of {fields.disk_nbytes} bytes, at most {MAX_VIRTUAL_NBYTES} are allowed",
            path=path,
        )
    if fields.disk_nbytes > fields.n_blocks * block_nbytes:
        raise CorruptImageError(
            f"a disk of {fields.disk_nbytes} bytes does not fit in {fields.n_blocks} blocks of "
            f"{block_nbytes}",
            path=path,
        )


def _verify_places(file: ByteSource, fields: HeaderFields, damage: Damage) -> None:
    map_end = fields.map_offset + fields.n_blocks * layout.ENTRY_NBYTES
    header_end = layout.PRE_HEADER.size + layout.HEADER_V1_NBYTES
    if fields.map_offset < header_end:
        raise CorruptImageError(
            f"the block map at {fields.map_offset:#x} lies in the header, which ends at "
            f"{header_end:#x}",
            path=file.path,
        )
    if map_end > fields.data_offset:
        raise CorruptImageError(
            f"the block map ends at {map_end:#x}, after the start of the first block "
            f"({fields.data_offset:#x})",
            path=file.path,
        )
    if map_end > file.nbytes:
        damage.report(
            CorruptImageError(
                f"the block map ends at {map_end:#x}, past the end of the file ({file.nbytes:#x})",
                path=file.path,
            )
        )


def _virtual_size(path: str, fields: HeaderFields) -> int:
    """Return the disk's size in whole sectors, as VirtualBox shows it to guests."""
    n_odd = fields.disk_nbytes % SECTOR_NBYTES
    if n_odd:
        log.warning(
            "%s: the last %d bytes of the disk are not a whole sector; like VirtualBox, "
            "imgcore ignores them",
            path,
            n_odd,
        )
    return fields.disk_nbytes - n_odd


def _uuid_or_none(raw: bytes) -> UUID | None:
    return None if raw == layout.NULL_UUID else UUID(bytes_le=raw)


def _raw_uuid(value: UUID | None) -> bytes:
    return layout.NULL_UUID if value is None else value.bytes_le


def _identities(image: UUID | None, modification: UUID | None) -> dict[str, str]:
    values = {layout.IDENTITY_UUID: image, layout.IDENTITY_MODIFICATION: modification}
    return {name: str(value) for name, value in values.items() if value is not None}
