"""Named limits: sizes that a file claims are checked against them before use."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB

SECTOR_NBYTES: Final = 512

# Rows of one extent batch: 2^17 rows of 40 bytes are 5 MiB.
MAX_BATCH_ROWS: Final = 1 << 17

# Pieces in which a disk is read from start to end; a few of them are in memory.
CHUNK_NBYTES: Final = 16 * MIB

# Tables that a writer may keep in memory before it writes them to the file.
MAX_PENDING_TABLE_NBYTES: Final = 32 * MIB

# What a stream may be read ahead of the byte that is taken next, and how much of its
# start, which has tables, may stay in memory.
MAX_AHEAD_NBYTES: Final = 64 * MIB
MAX_KEPT_NBYTES: Final = 64 * MIB
# The latest bytes of an image that comes in order: tables and blocks in another order
# than the disk's are sorted in them.  Three units of the target, with its largest
# blocks, fit in them as well.
STREAM_SEGMENT_NBYTES: Final = 8 * MIB
MIN_STREAM_SEGMENTS: Final = 20
MAX_STREAM_UNIT_NBYTES: Final = 64 * MIB
# What stays of what was used, even if the segments are not all in use.
STREAM_BEHIND_NBYTES: Final = 16 * MIB
# Grains of a streamOptimized VMDK that wait for those before them on the disk.
VMDK_MAX_SORTED_NBYTES: Final = 16 * MIB
# Grain tables that follow in the stream while their grains were read: 64 MiB.
VMDK_MAX_AWAITED_TABLES: Final = 1 << 15

# Images of a chain of parents; each of them stays open.  QEMU has no limit.
MAX_CHAIN_DEPTH: Final = 64

# Tables and decompressed blocks that an open image keeps in memory.
DEFAULT_CACHE_NBYTES: Final = 32 * MIB
MAX_CACHE_NBYTES: Final = 64 * GIB

# A block of a target with a parent (-B), which is compared as a whole:
# IMGC_MAX_BASE_BLOCK_NBYTES.
MAX_BASE_BLOCK_NBYTES: Final = 4 * MIB

# Extents of plain data of one image among which `convert --salvage` finds overlaps, in
# about 300 MiB.
SALVAGE_MAX_ROWS: Final = 1 << 23

# Files whose headers are read in the search for children of an image.
MAX_SEARCHED_FILES: Final = 1 << 14

# Extents of an image that is rewritten without copying: they are held in memory, in
# about 100 bytes each.
MAX_SURVEY_ROWS: Final = 1 << 22

# Zeros after an image whose end has its magic, besides holes of the file: images are
# copied onto larger volumes.
MAX_PADDING_NBYTES: Final = 64 * MIB

# Old bytes between and after the blocks of a file that rewriting cuts off or makes
# zeros: the journal holds a copy.
MAX_DROPPED_NBYTES: Final = 64 * MIB

# Ranges that `check --repair` remembers before it joins those that touch.
MAX_REPAIR_RANGES: Final = 1 << 20

# Workers of a job: IMGC_MAX_THREADS.
MAX_THREADS: Final = 256

# Virtual disks: off_t limits raw files; the other formats' tables limit theirs.
MAX_VIRTUAL_NBYTES: Final = (1 << 63) - SECTOR_NBYTES

# QCOW2: QEMU has the same limits (block/qcow2.h).
QCOW2_MIN_CLUSTER_BITS: Final = 9
QCOW2_MAX_CLUSTER_BITS: Final = 21
QCOW2_MAX_L1_NBYTES: Final = 32 * MIB
QCOW2_MAX_REFCOUNT_TABLE_NBYTES: Final = 8 * MIB
# Refcount blocks that a repair adds: 64 TiB in clusters of 64 KiB need 2 GiB of them,
# or 8 GiB if refcounts have 64 bits.
QCOW2_MAX_NEW_REFCOUNTS_NBYTES: Final = 9 * GIB
# A bit for each host cluster of an image that is rewritten: a file of 256 TiB in
# clusters of 64 KiB.
QCOW2_MAX_REFCOUNT_PLANE_NBYTES: Final = 512 * MIB
QCOW2_MAX_SNAPSHOTS: Final = 65536
QCOW2_MAX_BACKING_NAME_NBYTES: Final = 1023
QCOW2_MAX_SNAPSHOT_TABLE_NBYTES: Final = 64 * MIB
QCOW2_MAX_SNAPSHOT_EXTRA_NBYTES: Final = 1024
QCOW2_MAX_BITMAPS: Final = 65535
QCOW2_MAX_BITMAP_DIRECTORY_NBYTES: Final = 64 * MIB
QCOW2_MIN_BITMAP_GRANULARITY_BITS: Final = 9
QCOW2_MAX_BITMAP_GRANULARITY_BITS: Final = 31
QCOW2_MAX_BITMAP_NBYTES: Final = 512 * MIB

# VMDK.
VMDK_MAX_VERSION: Final = 3
VMDK_MAX_GTES_PER_GT: Final = 512
VMDK_MIN_GRAIN_NBYTES: Final = 4 * KIB
VMDK_MAX_GRAIN_NBYTES: Final = 1 * MIB
VMDK_MAX_DIRECTORY_ENTRIES: Final = 32 * 1024 * 1024
VMDK_MAX_DESCRIPTOR_NBYTES: Final = 1 * MIB
VMDK_MAX_DESCRIPTOR_LINE_NBYTES: Final = 64 * KIB
VMDK_MAX_EXTENTS: Final = 65536
# Zero sectors after the end-of-stream marker: qemu-img leaves up to 127.
VMDK_MAX_TRAILING_ZERO_NBYTES: Final = 1 * MIB
# Offsets in a sparse extent are 32-bit sector numbers.
VMDK_MAX_SPARSE_FILE_NBYTES: Final = 2 * TIB

# VHD.  Dynamic disks count sectors in 32 bits; Microsoft's limit is 2040 GiB.
VHD_MAX_DYNAMIC_NBYTES: Final = 2040 * GIB
VHD_MAX_BLOCK_NBYTES: Final = 256 * MIB
VHD_MAX_LOCATOR_NBYTES: Final = 64 * KIB
# `check` sorts the blocks at once, in up to 200 MiB: 2040 GiB in blocks of 512 KiB.
VHD_MAX_CHECKED_BLOCKS: Final = 1 << 22
# 2040 GiB in blocks of 512 KiB take half a second.
VHD_MAX_BLOCKS_VERIFIED_AT_OPEN: Final = 1 << 22
# XenServer cannot read larger blocks, and no known program writes smaller ones.
VHD_MIN_WRITTEN_BLOCK_NBYTES: Final = 512 * KIB
VHD_MAX_WRITTEN_BLOCK_NBYTES: Final = 2 * MIB

# VDI: VirtualBox 7 reads blocks of 128 KiB to 128 MiB, and writes blocks of 1 MiB.
# imgcore reads half and twice that.
VDI_MIN_BLOCK_NBYTES: Final = 64 * KIB
VDI_MAX_BLOCK_NBYTES: Final = 256 * MIB
VDI_MIN_WRITTEN_BLOCK_NBYTES: Final = 128 * KIB
VDI_MAX_WRITTEN_BLOCK_NBYTES: Final = 128 * MIB
# The offset of the first block is a 32-bit number of bytes.
VDI_MAX_DATA_OFFSET: Final = 4 * GIB - 1
# A map of 256 MiB: a disk of 64 TiB in the usual blocks.
VDI_MAX_CHECKED_BLOCKS: Final = 1 << 26
# A map of 64 MiB, which rewriting stages, and its old bytes: a disk of 16 TiB.
VDI_MAX_REWRITTEN_BLOCKS: Final = 1 << 24
# Files whose headers are read in the search for a differencing image's parent.
VDI_MAX_SEARCHED_FILES: Final = 1024

# VHDX ([MS-VHDX] 2.6.2.1, 2.6.2.2).
VHDX_MIN_BLOCK_NBYTES: Final = 1 * MIB
VHDX_MAX_BLOCK_NBYTES: Final = 256 * MIB
VHDX_MAX_VIRTUAL_NBYTES: Final = 64 * TIB
# A log that must be replayed is held in memory; the usual one has 1 MiB.
VHDX_MAX_LOG_NBYTES: Final = 64 * MIB
# Each write of a log becomes a Python object; 64 MiB have up to 2^14 sectors of data.
VHDX_MAX_LOG_DESCRIPTORS: Final = 1 << 17
VHDX_MAX_LOCATOR_ENTRIES: Final = 256
# Runs of free space that are used when an image is written in place.
VHDX_MAX_FREE_RUNS: Final = 1 << 16
# Metadata that a child takes over from its parent; an item has up to 1 MiB.
VHDX_MAX_INHERITED_NBYTES: Final = 16 * MIB
# The length of a parent locator's text has 16 bits; Windows paths have up to 32767
# characters.
VHDX_MAX_PATH_NBYTES: Final = 2 * 32767
# Bytes are checksummed more than once if entries of a log overlap.
VHDX_MAX_LOG_PASSES: Final = 8
# The offset of a block has 44 bits and counts MiB; the file of a disk of 64 TiB is
# far smaller than that.
VHDX_MAX_FILE_NBYTES: Final = 128 * TIB

# Files that list changed areas.  Lists in JSON are read in pieces, with one object of
# the list at a time in memory; XML is read at once.
AREAS_MAX_JSON_NBYTES: Final = 1 * GIB
AREAS_MAX_JSON_VALUE_CHARS: Final = 64 * KIB
AREAS_MAX_XML_NBYTES: Final = 16 * MIB
# Areas are rounded outwards to blocks of these sizes; bitmaps of QCOW2 have the same.
AREAS_MIN_GRANULARITY: Final = 512
AREAS_MAX_GRANULARITY: Final = 2 * GIB

# A line of a list of checksums; names have at most 4096 bytes on Linux.
MAX_CHECKSUM_LINE_NBYTES: Final = 64 * KIB

# Parts of a sparse file in a tar archive: each takes 24 bytes of the header.
MAX_TAR_SEGMENTS: Final = 1 << 16

# `rewrite` keeps what it overwrites in memory and, before and after, in its journal.  A
# VDI has its map in front of its blocks: 4 MiB for each TiB of the disk.
MAX_OVERWRITTEN_NBYTES: Final = 128 * MIB
# The files beside an image that its new format adds, or no longer needs.
MAX_SIDE_FILES_NBYTES: Final = 4 * MIB
# What a record of the journal says about its bytes: ranges, names, options.
MAX_JOURNAL_HEAD_NBYTES: Final = 16 * MIB
MAX_JOURNAL_BLOB_NBYTES: Final = MAX_OVERWRITTEN_NBYTES + MAX_SIDE_FILES_NBYTES

# A receipt is read as a whole; each bad range and warning takes some hundred bytes.
MAX_RECEIPT_NBYTES: Final = 64 * MIB
