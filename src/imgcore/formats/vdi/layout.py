"""VDI on disk: structures and constants, without logic.

Source: VirtualBox src/VBox/Storage/VDICore.h; each item names its structure.  All
numbers are little-endian, also the first three fields of UUIDs.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple

# VDIPREHEADER: 64 bytes of text, signature, version (major << 16 | minor).
PRE_HEADER: Final = struct.Struct("<64sII")
SIGNATURE: Final = 0xBEDA107F
VERSION_1_1: Final = 0x0001_0001
# The text is for people; readers use the signature.
FILE_INFO: Final = b"<<< imgcore VirtualBox Disk Image >>>\n"

# VDIHEADER1, without the geometry that VDIHEADER1PLUS adds.
HEADER: Final = struct.Struct("<III256sIIIIIIIQIIII16s16s16s16s")
# VDIDISKGEOMETRY: cylinders, heads, sectors, bytes per sector.
GEOMETRY: Final = struct.Struct("<IIII")
# Host offset of cBlocksAllocated, and its type.
N_ALLOCATED_OFFSET: Final = 0x184
COUNT: Final = struct.Struct("<I")
HEADER_V1_NBYTES: Final = HEADER.size
HEADER_V1PLUS_NBYTES: Final = HEADER.size + GEOMETRY.size
SECTOR_NBYTES: Final = 512  # VDI_GEOMETRY_SECTOR_SIZE
COMMENT_NBYTES: Final = 256  # VDI_IMAGE_COMMENT_SIZE
# Bytes that hold any header.
HEAD_NBYTES: Final = 512

# New blocks were filled with zeros: the flag in files, and the one in VirtualBox's API
# (vd.h), which VirtualBox also accepts in files.
FLAG_ZERO_EXPAND: Final = 1 << 0
FLAG_ZERO_EXPAND_VD: Final = 1 << 8
KNOWN_FLAGS: Final = FLAG_ZERO_EXPAND | FLAG_ZERO_EXPAND_VD

# VDIIMAGEBLOCKPOINTER: the number of a block in the data area, or one of two special
# values.
ENTRY_NBYTES: Final = 4
ENTRY_MASK: Final = 0xFFFF_FFFF
BLOCK_FREE: Final = 0xFFFF_FFFF  # never written: the parent's content, zeros without one
BLOCK_ZERO: Final = 0xFFFF_FFFE  # discarded: zeros

# VDI_DATA_ALIGN, VDI_IMAGE_DEFAULT_BLOCK_SIZE.
DATA_ALIGNMENT: Final = 1 << 20
DEFAULT_BLOCK_NBYTES: Final = 1 << 20
# Host offset of the block map in a new image: the second page.
MAP_OFFSET: Final = 4096

NULL_UUID: Final = bytes(16)

# Names of the facts that identify a parent; they appear in messages.
IDENTITY_UUID: Final = "UUID"
IDENTITY_MODIFICATION: Final = "modification UUID"


class ImageType(IntEnum):
    """VDIIMAGETYPE."""

    NORMAL = 1
    FIXED = 2
    UNDO = 3
    DIFF = 4


SUBFORMATS: Final = {
    ImageType.NORMAL: "dynamic",
    ImageType.FIXED: "fixed",
    ImageType.DIFF: "differencing",
}


class HeaderFields(NamedTuple):
    """The fields of VDIHEADER1."""

    header_nbytes: int
    image_type: int
    flags: int
    comment: bytes
    map_offset: int
    data_offset: int
    cylinders: int
    heads: int
    sectors: int
    sector_nbytes: int
    translation: int
    disk_nbytes: int
    block_nbytes: int
    block_extra_nbytes: int
    n_blocks: int
    n_allocated: int
    uuid: bytes
    modification_uuid: bytes
    parent_uuid: bytes
    parent_modification_uuid: bytes
