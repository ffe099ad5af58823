"""VDI images made without imgcore's writer, and their readers."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

from imgcore.files.reference_gate import ReferenceGate
from imgcore.formats.vdi.reader import VdiReader
from tests.helpers.reading import open_file

FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE
BLOCK = 1 << 20
MAP_OFFSET, DATA_OFFSET = 512, 4096

# Offsets of fields in the file.
SIGNATURE, VERSION, HEADER_NBYTES, TYPE, FLAGS, COMMENT = 0x40, 0x44, 0x48, 0x4C, 0x50, 0x54
OFF_MAP, OFF_DATA, SECTOR_SIZE, DISK_SIZE, BLOCK_SIZE = 0x154, 0x158, 0x168, 0x170, 0x178
BLOCK_EXTRA, N_BLOCKS, N_ALLOCATED = 0x17C, 0x180, 0x184
CREATION_UUID, MODIFICATION_UUID, PARENT_UUID, PARENT_MODIFICATION = 0x188, 0x198, 0x1A8, 0x1B8
LCHS_SECTOR_SIZE = 0x1D4

IDS = tuple(UUID(int=0x11111111_2222_3333_4444_000000000000 + i) for i in range(1, 9))


def fill(number: int, nbytes: int = BLOCK) -> bytes:
    """Return the content of a block: its number in every byte."""
    return bytes([number % 255 + 1]) * nbytes


def make(
    path: Path,
    entries: Sequence[int],
    *,
    virtual_size: int | None = None,
    image_type: int = 1,
    block: int = BLOCK,
    uuids: Sequence[UUID | None] = (IDS[0], IDS[1], None, None),
    n_allocated: int | None = None,
) -> Path:
    """Write an image with this block map.

    The file has blocks up to the last one in use, but at most twice as many as the map
    has entries.  Block ``n`` of the file holds ``fill(n)``.
    """
    used = [entry for entry in entries if entry < ZERO]
    size = len(entries) * block if virtual_size is None else virtual_size
    head = bytearray(DATA_OFFSET)
    struct.pack_into("<64sIIIII", head, 0, b"test", 0xBEDA107F, 0x00010001, 400, image_type, 0)
    struct.pack_into(
        "<IIIIIIIQIIII",
        head,
        OFF_MAP,
        MAP_OFFSET,
        DATA_OFFSET,
        0,
        0,
        0,
        512,
        0,
        size,
        block,
        0,
        len(entries),
        len(used) if n_allocated is None else n_allocated,
    )
    for index, value in enumerate(uuids):
        start = CREATION_UUID + 16 * index
        head[start : start + 16] = bytes(16) if value is None else value.bytes_le
    struct.pack_into("<I", head, LCHS_SECTOR_SIZE, 512)
    assert MAP_OFFSET + 4 * len(entries) <= DATA_OFFSET
    struct.pack_into(f"<{len(entries)}I", head, MAP_OFFSET, *entries)
    with open(path, "wb") as file:
        file.write(head)
        for number in range(min(max(used, default=-1) + 1, 2 * len(entries))):
            file.write(fill(number, block))
    return path


def open_vdi(path: Path, allowed: Sequence[Path] = ()) -> VdiReader:
    """Open one image."""
    gate = ReferenceGate(str(path.parent), [str(folder) for folder in allowed])
    return open_file(path, lambda file: VdiReader(file, gate))
