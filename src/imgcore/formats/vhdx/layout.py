"""VHDX: on-disk structures and constants, without logic.

All numbers are little-endian; GUIDs are mixed-endian (``uuid.UUID.bytes_le``).

Source: [MS-VHDX] Virtual Hard Disk v2 (VHDX) File Format, by section.
"""

from __future__ import annotations

import struct
import uuid
from typing import Final

from imgcore.limits import KIB, MIB

# 2.2: structures start at multiples of 1 MiB; the header section takes the first MiB.
ALIGNMENT: Final = MIB
HEADER_SECTION_NBYTES: Final = MIB

# 2.2.1 File Type Identifier: signature, creator as UTF-16.
SIGNATURE: Final = b"vhdxfile"
CREATOR_OFFSET: Final = 8
CREATOR_NBYTES: Final = 512

# 2.2.2 Headers: two copies, the checksum covers 4 KiB.
HEADER_OFFSETS: Final = (64 * KIB, 128 * KIB)
HEADER_NBYTES: Final = 4 * KIB
HEADER_SIGNATURE: Final = b"head"
# Signature, Checksum, SequenceNumber, FileWriteGuid, DataWriteGuid, LogGuid,
# LogVersion, Version, LogLength, LogOffset.
HEADER: Final = struct.Struct("<4sIQ16s16s16sHHIQ")
CHECKSUM_OFFSET: Final = 4
CHECKSUM: Final = struct.Struct("<I")
SEQUENCE_OFFSET: Final = 8
SEQUENCE: Final = struct.Struct("<Q")
VERSION: Final = 1
LOG_VERSION: Final = 0

# 2.2.3 Region Table: two copies of 64 KiB.
REGION_TABLE_OFFSETS: Final = (192 * KIB, 256 * KIB)
REGION_TABLE_NBYTES: Final = 64 * KIB
REGION_TABLE_SIGNATURE: Final = b"regi"
# Signature, Checksum, EntryCount, Reserved.
REGION_TABLE_HEADER: Final = struct.Struct("<4sIII")
# Guid, FileOffset, Length, Required.
REGION_ENTRY: Final = struct.Struct("<16sQII")
REGION_REQUIRED: Final = 1
MAX_TABLE_ENTRIES: Final = 2047

BAT_REGION: Final = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA_REGION: Final = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")

# 2.3.1 Log Entry: sectors of 4 KiB; the header is followed by descriptors, then by data
# sectors.
LOG_SECTOR_NBYTES: Final = 4 * KIB
LOG_ENTRY_SIGNATURE: Final = b"loge"
# Signature, Checksum, EntryLength, Tail, SequenceNumber, DescriptorCount, Reserved,
# LogGuid, FlushedFileOffset, LastFileOffset.
LOG_ENTRY: Final = struct.Struct("<4sIIIQII16sQQ")
# Signature, TrailingBytes, LeadingBytes or ZeroLength, FileOffset, SequenceNumber.
LOG_DESCRIPTOR: Final = struct.Struct("<4s4s8sQQ")
LOG_ZERO_SIGNATURE: Final = b"zero"
LOG_DATA_SIGNATURE: Final = b"desc"
LOG_SECTOR_SIGNATURE: Final = b"data"
# Signature, SequenceHigh; SequenceLow in the last four bytes.
LOG_SECTOR_HEAD: Final = struct.Struct("<4sI")
LOG_SECTOR_TAIL: Final = struct.Struct("<I")

# 2.4 Blocks: a sector bitmap block has 1 MiB, so 2^23 bits.
BITMAP_BLOCK_NBYTES: Final = MIB
SECTORS_PER_CHUNK: Final = 1 << 23

# 2.5.1 BAT Entry: State, 17 reserved bits, FileOffsetMB.  A mask gives the place in
# bytes.
BAT_ENTRY_NBYTES: Final = 8
BAT_STATE_MASK: Final = 0x7
BAT_RESERVED_MASK: Final = 0xFFFF8
BAT_OFFSET_MASK: Final = 0xFFFF_FFFF_FFF0_0000
# 2.5.1.1 Payload BAT Entry States; 4 is reserved.
BLOCK_NOT_PRESENT: Final = 0
BLOCK_UNDEFINED: Final = 1
BLOCK_ZERO: Final = 2
BLOCK_UNMAPPED: Final = 3
# In version 0.95 of the specification; reserved since (QEMU block/vhdx.h).
BLOCK_UNMAPPED_V095: Final = 5
BLOCK_FULLY_PRESENT: Final = 6
BLOCK_PARTIALLY_PRESENT: Final = 7
# 2.5.1.2 Sector Bitmap BAT Entry States.
BITMAP_NOT_PRESENT: Final = 0
BITMAP_PRESENT: Final = 6

# 2.6.1 Metadata Table: 64 KiB at the start of the metadata region.
METADATA_TABLE_NBYTES: Final = 64 * KIB
METADATA_SIGNATURE: Final = b"metadata"
# Signature, Reserved, EntryCount, Reserved2.
METADATA_HEADER: Final = struct.Struct("<8sHH20s")
# ItemID, Offset, Length, flags, Reserved2.
METADATA_ENTRY: Final = struct.Struct("<16sIIII")
ITEM_IS_USER: Final = 1
ITEM_IS_VIRTUAL_DISK: Final = 2
ITEM_IS_REQUIRED: Final = 4
MAX_ITEM_NBYTES: Final = MIB
MAX_USER_ITEMS: Final = 1024

# 2.6.2 Known Metadata Items.
FILE_PARAMETERS_ITEM: Final = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
VIRTUAL_DISK_SIZE_ITEM: Final = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
VIRTUAL_DISK_ID_ITEM: Final = uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL_SECTOR_SIZE_ITEM: Final = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL_SECTOR_SIZE_ITEM: Final = uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556")
PARENT_LOCATOR_ITEM: Final = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")

# 2.6.2.1 File Parameters: BlockSize, flags.
FILE_PARAMETERS: Final = struct.Struct("<II")
LEAVE_BLOCK_ALLOCATED: Final = 1
HAS_PARENT: Final = 2
# 2.6.2.2 to 2.6.2.5.
VIRTUAL_DISK_SIZE: Final = struct.Struct("<Q")
VIRTUAL_DISK_ID: Final = struct.Struct("<16s")
SECTOR_SIZE: Final = struct.Struct("<I")
SECTOR_SIZES: Final = (512, 4096)

# 2.6.2.6 Parent Locator: LocatorType, Reserved, KeyValueCount; then KeyOffset,
# ValueOffset, KeyLength, ValueLength for each pair, in bytes of UTF-16.
LOCATOR_HEADER: Final = struct.Struct("<16sHH")
LOCATOR_ENTRY: Final = struct.Struct("<IIHH")
VHDX_LOCATOR: Final = uuid.UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")
# 2.6.2.6.3: the identity of the parent's data, and its paths in the order to try them.
LINKAGE_KEY: Final = "parent_linkage"
LINKAGE2_KEY: Final = "parent_linkage2"
RELATIVE_PATH_KEY: Final = "relative_path"
PATH_KEYS: Final = (RELATIVE_PATH_KEY, "volume_path", "absolute_win32_path")
