"""QCOW2 structures on disk: data only.

Source: QEMU docs/interop/qcow2.rst; quoted comments name its sections.  All numbers
are big-endian.
"""

from __future__ import annotations

import struct
from typing import Final

# "Header".
MAGIC: Final = b"QFI\xfb"
HEADER_V2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
HEADER_V2_NBYTES: Final = 72
# Offset and length of the name.
BACKING_FIELDS: Final = (8, struct.Struct(">QI"))
VIRTUAL_SIZE_FIELD: Final = (24, struct.Struct(">Q"))
# Entries and offset.
L1_FIELDS: Final = (36, struct.Struct(">IQ"))
REFCOUNT_TABLE_FIELD_OFFSET: Final = 48
# Offset and clusters.
REFCOUNT_TABLE_FIELDS: Final = (48, struct.Struct(">QI"))
# Number and offset of the table.
SNAPSHOT_FIELDS: Final = (60, struct.Struct(">IQ"))
INCOMPATIBLE_FIELD_OFFSET: Final = 72
AUTOCLEAR_FIELD_OFFSET: Final = 88
AUTOCLEAR_FIELD: Final = (88, struct.Struct(">Q"))
# incompatible, compatible, autoclear features, refcount order, header length.
HEADER_V3_TAIL: Final = struct.Struct(">QQQII")
HEADER_V3_MIN_NBYTES: Final = 104
# "Additional fields": one byte of compression type, padded to a multiple of 8.
COMPRESSION_TYPE_OFFSET: Final = 104
HEADER_V3_NBYTES: Final = 112
V2_REFCOUNT_ORDER: Final = 4
MAX_REFCOUNT_ORDER: Final = 6

CRYPT_NONE: Final = 0
CRYPT_NAMES: Final = {1: "AES encryption", 2: "LUKS encryption"}

COMPRESSION_ZLIB: Final = 0
COMPRESSION_ZSTD: Final = 1
COMPRESSION_NAMES: Final = {COMPRESSION_ZLIB: "zlib", COMPRESSION_ZSTD: "zstd"}

# "Header": feature bits.
INCOMPATIBLE_DIRTY: Final = 1 << 0
INCOMPATIBLE_CORRUPT: Final = 1 << 1
INCOMPATIBLE_DATA_FILE: Final = 1 << 2
INCOMPATIBLE_COMPRESSION: Final = 1 << 3
INCOMPATIBLE_EXTENDED_L2: Final = 1 << 4
INCOMPATIBLE_READABLE: Final = INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT | INCOMPATIBLE_COMPRESSION
COMPATIBLE_LAZY_REFCOUNTS: Final = 1 << 0
AUTOCLEAR_BITMAPS: Final = 1 << 0
AUTOCLEAR_RAW_DATA: Final = 1 << 1

# "Header extensions": type and length before the data, padded to a multiple of 8.
EXTENSION: Final = struct.Struct(">II")
EXTENSION_END: Final = 0x00000000
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
# QEMU's names of formats, which images store, if they differ from imgcore's.
BACKING_FORMAT_NAMES: Final = {"vhd": "vpc"}
EXTENSION_FEATURE_NAMES: Final = 0x6803F857
EXTENSION_BITMAPS: Final = 0x23852875

# "Feature name table": type, bit, name.
FEATURE_NAME: Final = struct.Struct(">BB46s")
FEATURE_INCOMPATIBLE: Final = 0
FEATURE_COMPATIBLE: Final = 1
FEATURE_AUTOCLEAR: Final = 2
# The table that QEMU 11 writes.
FEATURE_NAMES: Final = (
    (FEATURE_INCOMPATIBLE, 0, b"dirty bit"),
    (FEATURE_INCOMPATIBLE, 1, b"corrupt bit"),
    (FEATURE_INCOMPATIBLE, 2, b"external data file"),
    (FEATURE_INCOMPATIBLE, 3, b"compression type"),
    (FEATURE_INCOMPATIBLE, 4, b"extended L2 entries"),
    (FEATURE_COMPATIBLE, 0, b"lazy refcounts"),
    (FEATURE_AUTOCLEAR, 0, b"bitmaps"),
    (FEATURE_AUTOCLEAR, 1, b"raw external data"),
)

# "Cluster mapping": L1 and L2 tables.
ENTRY_NBYTES: Final = 8
# Bits 9..55.
OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
ZERO_FLAG: Final = 1 << 0
# Bits 0..8 and 56..62.
L1_RESERVED: Final = 0x7F00_0000_0000_01FF
# Bits 1..8 and 56..61.
L2_RESERVED_V3: Final = 0x3F00_0000_0000_01FE
# "With version 2 ... this is always 0".
L2_RESERVED_V2: Final = L2_RESERVED_V3 | ZERO_FLAG
COMPRESSED_UNIT_NBYTES: Final = 512
# "Compressed Clusters Descriptor": x = 62 - (cluster_bits - 8).
COMPRESSED_SHIFT_AT_BITS_0: Final = 70
COMPRESSED_LENGTH_BITS_LESS: Final = 8

# "Host cluster management".
# Bits 9..63.
REFCOUNT_TABLE_OFFSET_MASK: Final = 0xFFFF_FFFF_FFFF_FE00
REFCOUNT_TABLE_RESERVED: Final = 0x1FF

# "Snapshots": L1 offset and size, lengths of id and name, date s and ns, VM clock ns,
# VM state size, length of extra data.
SNAPSHOT: Final = struct.Struct(">QIHHIIQII")
# VM state size, virtual size, icount.
SNAPSHOT_EXTRA: Final = struct.Struct(">QQQ")
SNAPSHOT_EXTRA_VM_STATE_NBYTES: Final = 8
SNAPSHOT_EXTRA_SIZE_NBYTES: Final = 16
SNAPSHOT_EXTRA_ICOUNT_NBYTES: Final = 24
SNAPSHOT_NO_ICOUNT: Final = (1 << 64) - 1

# "Bitmaps extension": number, reserved, size and offset of the directory.
BITMAPS: Final = struct.Struct(">IIQQ")
# "Bitmap directory": table offset and size, flags, type, granularity bits, lengths of
# name and extra data.
BITMAP_ENTRY: Final = struct.Struct(">QIIBBHI")
BITMAP_FLAGS_OFFSET: Final = 12
BITMAP_IN_USE: Final = 1 << 0
BITMAP_AUTO: Final = 1 << 1
BITMAP_EXTRA_DATA_COMPATIBLE: Final = 1 << 2
BITMAP_FLAGS: Final = ((BITMAP_IN_USE, "in-use"), (BITMAP_AUTO, "auto"))
# Bits 3..31.
BITMAP_FLAGS_RESERVED: Final = 0xFFFF_FFF8
BITMAP_TYPE_DIRTY_TRACKING: Final = 1
# "Bitmap table": of an entry without an offset, bit 0 says that all bits are set.
BITMAP_ALL_ONES: Final = 1 << 0
# Bits 1..8 and 56..63.
BITMAP_RESERVED: Final = 0xFF00_0000_0000_01FE
BITMAP_OFFSET_MASK: Final = OFFSET_MASK
