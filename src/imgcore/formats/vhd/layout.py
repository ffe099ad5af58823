"""VHD on disk: structures and constants, without logic.

Sources: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0 (2006), sections
named below; libvhdi, "Virtual Hard Disk (VHD) image format" (contents of real files).
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final, NamedTuple

SECTOR_NBYTES: Final = 512

# "Hard Disk Footer Format".  The checksum includes the reserved bytes after the last
# field.
FOOTER: Final = struct.Struct(">8sIIQI4sI4sQQHBBII16sB")
FOOTER_NBYTES: Final = 512
# Virtual PC before version 2004 wrote one reserved byte fewer.
OLD_FOOTER_NBYTES: Final = 511
FOOTER_COOKIE: Final = b"conectix"
FOOTER_CHECKSUM_OFFSET: Final = 64
FEATURE_RESERVED: Final = 0x00000002
VERSION: Final = 0x00010000
NO_OFFSET: Final = 0xFFFFFFFFFFFFFFFF

# Seconds from the Unix epoch to 2000-01-01 00:00:00 UTC, the epoch of timestamps.
EPOCH_UNIX_SECONDS: Final = 946684800
MAX_TIMESTAMP: Final = 0xFFFFFFFF


class Footer(NamedTuple):
    """The fields of `FOOTER`."""

    cookie: bytes
    features: int
    version: int
    data_offset: int
    timestamp: int
    creator: bytes
    creator_version: int
    creator_os: bytes
    original_size: int
    current_size: int
    cylinders: int
    heads: int
    sectors_per_track: int
    disk_type: int
    checksum: int
    uuid: bytes
    saved_state: int


class DiskType(IntEnum):
    """Values of the footer's "Disk Type"."""

    FIXED = 2
    DYNAMIC = 3
    DIFFERENCING = 4


# "Dynamic Disk Header Format", 1024 bytes; the locators and 256 reserved bytes follow
# the name.
HEADER: Final = struct.Struct(">8sQQIIII16sII512s")
HEADER_NBYTES: Final = 1024
HEADER_COOKIE: Final = b"cxsparse"
HEADER_CHECKSUM_OFFSET: Final = 36
PARENT_NAME_NBYTES: Final = 512


class DynamicHeader(NamedTuple):
    """The fields of `HEADER`."""

    cookie: bytes
    data_offset: int
    table_offset: int
    version: int
    max_table_entries: int
    block_nbytes: int
    checksum: int
    parent_uuid: bytes
    parent_timestamp: int
    reserved: int
    parent_name: bytes


# "Parent Locator Entries".  ``data_space`` should count sectors; Windows and XenServer
# write bytes.
LOCATOR: Final = struct.Struct(">4sIIIQ")
LOCATORS_OFFSET: Final = 576
N_LOCATORS: Final = 8
NO_PLATFORM: Final = b"\0\0\0\0"
RELATIVE_PATH: Final = b"W2ru"  # UTF-16, little-endian
ABSOLUTE_PATH: Final = b"W2ku"  # UTF-16, little-endian
FILE_URL: Final = b"MacX"  # UTF-8, RFC 2396


class Locator(NamedTuple):
    """The fields of `LOCATOR`."""

    platform: bytes
    data_space: int
    data_nbytes: int
    reserved: int
    data_offset: int


# "Block Allocation Table and Data Blocks": the sector of the block's sector bitmap.
ENTRY: Final = struct.Struct(">I")
ENTRY_NBYTES: Final = 4
ENTRY_MASK: Final = 0xFFFFFFFF
ENTRY_ABSENT: Final = 0xFFFFFFFF

# "CHS Calculation"; a geometry of these three maxima does not tell the size.
MAX_CYLINDERS: Final = 65535
MAX_HEADS: Final = 16
MAX_SECTORS_PER_TRACK: Final = 255
MAX_CHS_NSECTORS: Final = MAX_CYLINDERS * MAX_HEADS * MAX_SECTORS_PER_TRACK

# Creators that state the size as the geometry: Virtual PC, Virtual Server, and QEMU
# without force_size (QEMU block/vpc.c).
CHS_CREATORS: Final = (b"vpc ", b"vs  ", b"qemu")

# The creators that this writer states.  All readers use the current size of an image by
# Hyper-V, but some use the geometry of one by Virtual PC.  XenServer looks for a batmap
# only in its own images.
CREATOR_WINDOWS: Final = (b"win ", 0x000A0000)
CREATOR_VIRTUAL_PC: Final = (b"vpc ", 0x00050003)
CREATOR_XENSERVER: Final = (b"tap\0", 0x00010003)
CREATOR_OS_WINDOWS: Final = b"Wi2k"

# XenServer's map of the blocks whose sector bitmap is all ones.  Its header is in the
# sector after the BAT (blktap include/vhd.h, struct dd_batmap_hdr).
BATMAP: Final = struct.Struct(">8sQIII")
BATMAP_COOKIE: Final = b"tdbatmap"
BATMAP_VERSION: Final = 0x00010002
