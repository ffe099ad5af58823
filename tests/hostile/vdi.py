"""Hostile VDI: headers, block maps, parents."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.helpers import vdi
from tests.hostile.case import Case, Stage

BLOCK = vdi.BLOCK
MAX32 = 0xFFFFFFFF
ENTRIES = (1, vdi.FREE, 0, vdi.ZERO)
CONTENT = vdi.fill(1) + bytes(BLOCK) + vdi.fill(0) + bytes(BLOCK)


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


FIELDS = [
    ("version-0", vdi.VERSION, _u32(1), "UnsupportedFeatureError", "version 0.1"),
    ("version-2", vdi.VERSION, _u32(0x20000), "UnsupportedFeatureError", "version 2.0"),
    ("header-size-0", vdi.HEADER_NBYTES, _u32(0), "CorruptImageError", "header of 0"),
    ("type-0", vdi.TYPE, _u32(0), "CorruptImageError", "image type 0"),
    ("type-undo", vdi.TYPE, _u32(3), "UnsupportedFeatureError", "undo"),
    ("type-max", vdi.TYPE, _u32(MAX32), "CorruptImageError", "image type"),
    (
        "type-diff-without-parent",
        vdi.TYPE,
        _u32(4),
        "CorruptImageError",
        "does not name its parent",
    ),
    ("flags-unknown", vdi.FLAGS, _u32(1 << 31), "UnsupportedFeatureError", "flags"),
    ("map-in-header", vdi.OFF_MAP, _u32(0), "CorruptImageError", "lies in the header"),
    ("map-past-data", vdi.OFF_MAP, _u32(1 << 30), "CorruptImageError", "start of the first block"),
    ("map-max", vdi.OFF_MAP, _u32(MAX32), "CorruptImageError", "start of the first block"),
    ("data-in-header", vdi.OFF_DATA, _u32(0), "CorruptImageError", "start of the first block"),
    ("sector-4096", vdi.SECTOR_SIZE, _u32(4096), "UnsupportedFeatureError", "sectors of 4096"),
    ("sector-max", vdi.LCHS_SECTOR_SIZE, _u32(MAX32), "UnsupportedFeatureError", "sectors of"),
    ("disk-max", vdi.DISK_SIZE, _u64((1 << 64) - 1), "LimitExceededError", "disk of"),
    ("disk-cap-plus-1", vdi.DISK_SIZE, _u64(1 << 63), "LimitExceededError", "disk of"),
    ("disk-pebibyte", vdi.DISK_SIZE, _u64(1 << 50), "CorruptImageError", "in 4 blocks"),
    ("disk-beyond-map", vdi.DISK_SIZE, _u64(4 * BLOCK + 1), "CorruptImageError", "in 4 blocks"),
    ("block-0", vdi.BLOCK_SIZE, _u32(0), "LimitExceededError", "blocks of 0"),
    ("block-1", vdi.BLOCK_SIZE, _u32(1), "LimitExceededError", "blocks of 1"),
    ("block-not-a-power", vdi.BLOCK_SIZE, _u32(3 << 20), "LimitExceededError", "powers of two"),
    ("block-below-cap", vdi.BLOCK_SIZE, _u32(32768), "LimitExceededError", "blocks of 32768"),
    ("block-over-cap", vdi.BLOCK_SIZE, _u32(512 << 20), "LimitExceededError", "blocks of"),
    ("block-max", vdi.BLOCK_SIZE, _u32(1 << 31), "LimitExceededError", "blocks of"),
    ("block-extra", vdi.BLOCK_EXTRA, _u32(512), "UnsupportedFeatureError", "extra"),
    ("blocks-0", vdi.N_BLOCKS, _u32(0), "CorruptImageError", "in 0 blocks"),
    ("blocks-max", vdi.N_BLOCKS, _u32(MAX32), "CorruptImageError", "block map ends"),
]


def _poked(*changes: tuple[int, bytes]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = vdi.make(folder / "disk.vdi", ENTRIES)
        raw = bytearray(path.read_bytes())
        for offset, data in changes:
            raw[offset : offset + len(data)] = data
        path.write_bytes(raw)
        return path

    return make


def _cut(nbytes: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = vdi.make(folder / "disk.vdi", ENTRIES)
        path.write_bytes(path.read_bytes()[:nbytes])
        return path

    return make


def cases() -> Iterator[Case]:
    """Yield the cases."""
    for name, offset, data, error, word in FIELDS:
        yield Case(f"vdi-{name}", _poked((offset, data)), error, word)
    for name, entry in (("past-end", 2), ("far", 0x7FFFFFFF), ("max", 0xFFFFFFFD)):
        make = _poked((vdi.MAP_OFFSET, _u32(entry)))
        yield Case(f"vdi-entry-{name}", make, "CorruptImageError", "past the end", Stage.TABLES)
    shared = vdi.fill(0) + CONTENT[BLOCK:]
    yield Case(
        "vdi-shared-block",
        _poked((vdi.MAP_OFFSET, _u32(0))),
        None,
        stage=Stage.CHECK,
        content=shared,
    )
    # Space that the header does not count, and a count that no map has.
    yield Case(
        "vdi-count-max",
        _poked((vdi.N_ALLOCATED, _u32(MAX32))),
        None,
        stage=Stage.CHECK,
        content=CONTENT,
    )
    for nbytes, error, word in (
        (64, "WrongFormatError", "no known format"),
        (72, "CorruptImageError", "header ends"),
        (400, "CorruptImageError", "header ends"),
        (vdi.MAP_OFFSET + 8, "CorruptImageError", "block map ends"),
    ):
        yield Case(f"vdi-cut-at-{nbytes}", _cut(nbytes), error, word)
    yield Case(
        "vdi-cut-in-block",
        _cut(vdi.DATA_OFFSET + 2 * BLOCK - 1),
        "CorruptImageError",
        "past the end",
        Stage.TABLES,
    )
    yield Case(
        "vdi-odd-size",
        lambda folder: vdi.make(folder / "disk.vdi", ENTRIES, virtual_size=3 * BLOCK + 100),
        None,
        stage=Stage.NONE,
        content=CONTENT[: 3 * BLOCK],
    )
