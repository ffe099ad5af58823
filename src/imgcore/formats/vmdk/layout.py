"""Structures of VMDK sparse extents on disk: data only.

Sources: VMware "Virtual Disk Format 5.0" (technical note), "Hosted Sparse Extents" and
"Stream-Optimized Compressed Sparse Extents"; libvmdk, "VMware Virtual Disk Format
(VMDK)".  All numbers are little-endian.  Offsets and lengths are in sectors of 512
bytes.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

SPARSE_MAGIC: Final = b"KDMV"
# Extents of ESX(i) hosts, which are not supported: vmfsSparse (COWD) and seSparse.
COWD_MAGIC: Final = b"COWD"
SESPARSE_MAGIC: Final = b"\xbe\xba\xfe\xca\x00\x00\x00\x00"

# magic, version, flags, capacity, grainSize, descriptorOffset, descriptorSize,
# numGTEsPerGT, rgdOffset, gdOffset, overHead, uncleanShutdown, four end-of-line bytes,
# compressAlgorithm
SPARSE_HEADER: Final = struct.Struct("<4sIIQQQQIQQQB4sH")
HEADER_NBYTES: Final = 512
# uncleanShutdown.
UNCLEAN_OFFSET: Final = 72

# The grain directory follows the grains; the footer has its offset.
GD_AT_END: Final = (1 << 64) - 1
# singleEndLineChar, nonEndLineChar, doubleEndLineChar1, doubleEndLineChar2
NEWLINE_TEST: Final = b"\n \r\n"
COMPRESSION_NONE: Final = 0
COMPRESSION_DEFLATE: Final = 1

ENTRY_NBYTES: Final = 4
GTES_PER_GT: Final = 512
GT_NBYTES: Final = GTES_PER_GT * ENTRY_NBYTES
# Entries that are not offsets: never written; explicit zeros (Flags.ZEROED_GRAIN).
ENTRY_ABSENT: Final = 0
ENTRY_ZEROED: Final = 1

DEFAULT_GRAIN_NBYTES: Final = 65536
DESCRIPTOR_SECTOR: Final = 1
DESCRIPTOR_NSECTORS: Final = 20
# The first grain of a streamOptimized file, as all known producers place it.
STREAM_OVERHEAD_NSECTORS: Final = 128

# val (number of sectors that follow), size (0: not a grain), type
MARKER: Final = struct.Struct("<QII")
# lba, size; the compressed bytes follow directly
GRAIN_MARKER: Final = struct.Struct("<QI")
# QEMU's limit of a compressed grain's size, in grains.
MAX_COMPRESSED_GRAINS: Final = 2

NO_PARENT_CID: Final = 0xFFFFFFFF
# Some software takes these for "no parent" and "use the long content ID".
RESERVED_CIDS: Final = (0xFFFFFFFF, 0xFFFFFFFE)


class Flags(IntFlag):
    """Bits of the sparse header's ``flags``.

    A reader must reject unknown bits of the upper half.
    """

    NEWLINE_TEST = 1 << 0
    REDUNDANT_GD = 1 << 1
    ZEROED_GRAIN = 1 << 2
    COMPRESSED = 1 << 16
    MARKERS = 1 << 17


INCOMPATIBLE_FLAGS: Final = 0xFFFF0000
KNOWN_INCOMPATIBLE_FLAGS: Final = int(Flags.COMPRESSED | Flags.MARKERS)


class Marker(IntEnum):
    """Types of markers in a streamOptimized file."""

    EOS = 0
    GT = 1
    GD = 2
    FOOTER = 3


class SparseHeader(NamedTuple):
    """The unverified fields of ``SPARSE_HEADER``; offsets and lengths in sectors."""

    magic: bytes
    version: int
    flags: int
    capacity: int
    grain_size: int
    descriptor_offset: int
    descriptor_size: int
    n_gtes_per_gt: int
    rgd_offset: int
    gd_offset: int
    overhead: int
    unclean_shutdown: int
    newline_test: bytes
    compression: int
