"""Named limits that every size claimed by a file meets before memory is spent on it."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB

SECTOR_NBYTES: Final = 512

# Rows of one extent batch: 2^17 rows of 40 bytes are 5 MiB, whatever the fragmentation.
MAX_BATCH_ROWS: Final = 1 << 17

# Pieces in which a disk is read from its start to its end; a few of them are held.
CHUNK_NBYTES: Final = 16 * MIB

# Tables that a writer may hold back before it must put them into the file.
MAX_PENDING_TABLE_NBYTES: Final = 32 * MIB

# A chain of backing files; each of them stays open, and QEMU itself has no limit.
MAX_CHAIN_DEPTH: Final = 64

# A block of a target with a parent (-B), which is compared as a whole: IMGC_MAX_BASE_BLOCK_NBYTES.
MAX_BASE_BLOCK_NBYTES: Final = 4 * MIB

# What `check --repair` writes into its copy of an image, all repairs together.
MAX_REPAIR_NBYTES: Final = 64 * MIB

# Workers of a job.
MAX_THREADS: Final = 256

# Virtual disks: raw files are limited by off_t, all others by their own tables.
MAX_VIRTUAL_NBYTES: Final = (1 << 63) - SECTOR_NBYTES

# QCOW2 (QEMU enforces the same, block/qcow2.h).
QCOW2_MIN_CLUSTER_BITS: Final = 9
QCOW2_MAX_CLUSTER_BITS: Final = 21
QCOW2_MAX_L1_NBYTES: Final = 32 * MIB
QCOW2_MAX_REFCOUNT_TABLE_NBYTES: Final = 8 * MIB
QCOW2_MAX_SNAPSHOTS: Final = 65536
QCOW2_MAX_BACKING_NAME_NBYTES: Final = 1023
QCOW2_MAX_SNAPSHOT_TABLE_NBYTES: Final = 64 * MIB
QCOW2_MAX_SNAPSHOT_EXTRA_NBYTES: Final = 1024
QCOW2_MAX_BITMAPS: Final = 65535
QCOW2_MAX_BITMAP_DIRECTORY_NBYTES: Final = 64 * MIB

# VMDK.
VMDK_MAX_VERSION: Final = 3
VMDK_MAX_GTES_PER_GT: Final = 512
VMDK_MIN_GRAIN_NBYTES: Final = 4 * KIB
VMDK_MAX_GRAIN_NBYTES: Final = 1 * MIB
VMDK_MAX_DIRECTORY_ENTRIES: Final = 32 * 1024 * 1024
VMDK_MAX_DESCRIPTOR_NBYTES: Final = 1 * MIB
VMDK_MAX_DESCRIPTOR_LINE_NBYTES: Final = 64 * KIB
VMDK_MAX_EXTENTS: Final = 65536
# Zero sectors behind the end-of-stream marker: qemu-img leaves up to 127.
VMDK_MAX_TRAILING_ZERO_NBYTES: Final = 1 * MIB
# Places in a sparse extent are 32-bit sector numbers.
VMDK_MAX_SPARSE_FILE_NBYTES: Final = 2 * TIB

# VHD.  Sectors and file places are 32-bit numbers in dynamic disks: Microsoft's limit is 2040 GiB.
VHD_MAX_DYNAMIC_NBYTES: Final = 2040 * GIB
VHD_MAX_BLOCK_NBYTES: Final = 256 * MIB
VHD_MAX_LOCATOR_NBYTES: Final = 64 * KIB
# What `check` sorts at once, in up to 200 MiB: 2040 GiB with blocks of 512 KiB.
VHD_MAX_CHECKED_BLOCKS: Final = 1 << 22
# 2040 GiB with blocks of 512 KiB: half a second.
VHD_MAX_BLOCKS_VERIFIED_AT_OPEN: Final = 1 << 22
# XenServer reads no larger blocks, and nobody writes smaller ones.
VHD_MIN_WRITTEN_BLOCK_NBYTES: Final = 512 * KIB
VHD_MAX_WRITTEN_BLOCK_NBYTES: Final = 2 * MIB

# VDI: VirtualBox 7 reads blocks of 128 KiB to 128 MiB and writes 1 MiB; what is read here is twice
# as wide.
VDI_MIN_BLOCK_NBYTES: Final = 64 * KIB
VDI_MAX_BLOCK_NBYTES: Final = 256 * MIB
VDI_MIN_WRITTEN_BLOCK_NBYTES: Final = 128 * KIB
VDI_MAX_WRITTEN_BLOCK_NBYTES: Final = 128 * MIB
# The place of the first block is a 32-bit number of bytes.
VDI_MAX_DATA_OFFSET: Final = 4 * GIB - 1
# A map of 256 MiB: 64 TiB of disk with the usual blocks.
VDI_MAX_CHECKED_BLOCKS: Final = 1 << 26
# Files whose headers are looked at for the parent of a differencing image.
VDI_MAX_SEARCHED_FILES: Final = 1024

# VHDX ([MS-VHDX] 2.6.2.1, 2.6.2.2).
VHDX_MIN_BLOCK_NBYTES: Final = 1 * MIB
VHDX_MAX_BLOCK_NBYTES: Final = 256 * MIB
VHDX_MAX_VIRTUAL_NBYTES: Final = 64 * TIB
# A log that has to be replayed is held in memory; the usual one has 1 MiB.
VHDX_MAX_LOG_NBYTES: Final = 64 * MIB
# Each of its writes becomes a Python object; a log of 64 MiB has up to 2^14 sectors of data.
VHDX_MAX_LOG_DESCRIPTORS: Final = 1 << 17
VHDX_MAX_LOCATOR_ENTRIES: Final = 256
# Texts of a parent locator have a length of 16 bits; Windows has paths of up to 32767 letters.
VHDX_MAX_PATH_NBYTES: Final = 2 * 32767
# Where entries of a log overlap, bytes are checksummed more than once.
VHDX_MAX_LOG_PASSES: Final = 8
# The place of a block has 44 bits of 1 MiB; no file of a disk of 64 TiB is anywhere near that.
VHDX_MAX_FILE_NBYTES: Final = 128 * TIB

# Parts of a sparse file in a tar archive: 24 bytes of header each, which stand before the data.
MAX_TAR_SEGMENTS: Final = 1 << 16
