"""Hostile VHD: footers, dynamic headers, BATs, parent locators."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.helpers import vhd
from tests.helpers.vhd import Block, be32, be64
from tests.hostile.case import Case, Stage, pattern

BLOCK, SECTOR = 8192, 512
SIZE = 4 * BLOCK
BLOCKS = {0: Block(pattern(BLOCK)), 2: Block(pattern(BLOCK, 2))}
CONTENT = pattern(BLOCK) + bytes(BLOCK) + pattern(BLOCK, 2) + bytes(BLOCK)
MAX32, MAX64 = (1 << 32) - 1, (1 << 64) - 1
HEADER = vhd.HEADER_OFFSET
# Offsets of fields in the footer and, from `HEADER` on, in the dynamic header.
DATA_OFFSET, CURRENT_SIZE, DISK_TYPE, VERSION = 16, 48, 60, 12
TABLE_OFFSET, HEADER_VERSION, N_ENTRIES, BLOCK_SIZE = (HEADER + n for n in (16, 24, 28, 32))


def _disk(folder: Path) -> Path:
    return vhd.dynamic(folder / "disk.vhd", SIZE, BLOCKS, block_nbytes=BLOCK)


def _poked(*changes: tuple[int, bytes]) -> Callable[[Path], Path]:
    """Return a maker of images with damage and valid checksums."""
    return lambda folder: vhd.poke_sound(_disk(folder), *changes)


def _raw(*changes: tuple[int, bytes]) -> Callable[[Path], Path]:
    """Return a maker of images with damage that checksums detect."""

    def make(folder: Path) -> Path:
        path = _disk(folder)
        raw = bytearray(path.read_bytes())
        for offset, data in changes:
            place = offset % len(raw)
            raw[place : place + len(data)] = data
        path.write_bytes(raw)
        return path

    return make


FIELDS = [
    ("version-2", VERSION, be32(0x20000), "UnsupportedFeatureError", "version"),
    ("type-0", DISK_TYPE, be32(0), "UnsupportedFeatureError", "disk type 0"),
    ("type-5", DISK_TYPE, be32(5), "UnsupportedFeatureError", "disk type 5"),
    ("type-max", DISK_TYPE, be32(MAX32), "UnsupportedFeatureError", "disk type"),
    ("header-past-end", DATA_OFFSET, be64(1 << 40), "CorruptImageError", "past the end"),
    ("header-max", DATA_OFFSET, be64(MAX64), "CorruptImageError", "past the end"),
    ("header-wraps", DATA_OFFSET, be64(MAX64 - 1023), "CorruptImageError", "past the end"),
    ("header-on-footer", DATA_OFFSET, be64(0), "CorruptImageError", "cookie"),
    ("header-cookie", HEADER, b"cxsparsX", "CorruptImageError", "cookie"),
    ("header-version", HEADER_VERSION, be32(0x30000), "UnsupportedFeatureError", "version"),
    ("size-odd", CURRENT_SIZE, be64(SIZE - 1), "CorruptImageError", "multiple of 512"),
    (
        "size-over-cap",
        CURRENT_SIZE,
        be64((2040 << 30) + 512),
        "LimitExceededError",
        "at most 2190433320960 are allowed",
    ),
    ("size-cap", CURRENT_SIZE, be64(2040 << 30), "CorruptImageError", "BAT of 4 entries"),
    ("size-pebibyte", CURRENT_SIZE, be64(1 << 50), "LimitExceededError", "dynamic disk of"),
    ("size-max", CURRENT_SIZE, be64(MAX64 - 511), "LimitExceededError", "dynamic disk of"),
    ("block-0", BLOCK_SIZE, be32(0), "LimitExceededError", "blocks of 0"),
    ("block-1", BLOCK_SIZE, be32(1), "LimitExceededError", "blocks of 1"),
    ("block-511", BLOCK_SIZE, be32(511), "LimitExceededError", "blocks of 511"),
    ("block-not-a-power", BLOCK_SIZE, be32(3 * 512), "LimitExceededError", "powers of two"),
    ("block-over-cap", BLOCK_SIZE, be32(512 << 20), "LimitExceededError", "blocks of"),
    ("block-max", BLOCK_SIZE, be32(MAX32), "LimitExceededError", "blocks of"),
    ("block-2-31", BLOCK_SIZE, be32(1 << 31), "LimitExceededError", "blocks of"),
    ("entries-0", N_ENTRIES, be32(0), "CorruptImageError", "BAT of 0"),
    ("entries-one-less", N_ENTRIES, be32(3), "CorruptImageError", "BAT of 3"),
    ("entries-max", N_ENTRIES, be32(MAX32), "CorruptImageError", "BAT ends"),
    ("table-past-end", TABLE_OFFSET, be64(1 << 40), "CorruptImageError", "BAT ends"),
    ("table-max", TABLE_OFFSET, be64(MAX64), "CorruptImageError", "BAT ends"),
]


def cases() -> Iterator[Case]:
    """Yield the cases."""
    for name, offset, data, error, word in FIELDS:
        yield Case(f"vhd-{name}", _poked((offset, data)), error, word)
    yield Case(
        "vhd-both-footers-damaged",
        _raw((8, b"X"), (-SECTOR + 8, b"X")),
        "CorruptImageError",
        "checksum",
    )
    yield Case("vhd-header-checksum", _raw((HEADER + 40, b"X")), "CorruptImageError", "checksum")
    yield Case(
        "vhd-footer-damaged", _raw((-SECTOR + 8, b"X")), None, stage=Stage.CHECK, content=CONTENT
    )
    yield Case("vhd-copy-damaged", _raw((8, b"X")), None, stage=Stage.CHECK, content=CONTENT)
    for name, entry in (
        ("past-end", 1 << 20),
        ("max", 0xFFFFFFFE),
        ("on-footer", 0),
        ("on-header", 1),
        ("on-table", 3),
    ):
        make = _raw((vhd.TABLE_OFFSET, be32(entry)))
        yield Case(f"vhd-entry-{name}", make, "CorruptImageError", "block 0", Stage.TABLES)
    yield Case(
        "vhd-table-of-zeros",
        _sparse,
        "CorruptImageError",
        "overlaps the footer",
        Stage.TABLES,
        target="qcow2",
    )
    first = struct.unpack_from(">I", _entries(), 0)[0]
    shared = _raw((vhd.TABLE_OFFSET + 4, be32(first)))
    content = CONTENT[:BLOCK] * 2 + CONTENT[2 * BLOCK :]
    yield Case("vhd-shared-block", shared, None, stage=Stage.CHECK, content=content)
    yield from _cuts()
    yield from _fixed()
    yield from _locators()


def _sparse(folder: Path) -> Path:
    """Make a disk of 2040 GiB whose BAT is a hole: 4 million blocks at sector 0."""
    path, size, block = folder / "disk.vhd", 2040 << 30, 512 << 10
    footer = vhd.footer(size, vhd.DYNAMIC)
    with open(path, "wb") as file:
        file.write(footer + vhd.header(size // block, block))
        file.seek(vhd.TABLE_OFFSET + size // block * 4)
        file.write(footer)
    return path


def _entries() -> bytes:
    """Return the BAT that `vhd.dynamic` writes for `BLOCKS`."""
    place = vhd.TABLE_OFFSET + SECTOR
    step = SECTOR + BLOCK
    return struct.pack(">4I", place // SECTOR, MAX32, (place + step) // SECTOR, MAX32)


def _cuts() -> Iterator[Case]:
    def cut(nbytes: int) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            path = _disk(folder)
            path.write_bytes(path.read_bytes()[:nbytes])
            return path

        return make

    # Old versions have footers of 511 bytes: this is one, but without its disk.
    yield Case("vhd-cut-at-511", cut(511), "CorruptImageError", "past the end")
    yield Case("vhd-cut-at-100", cut(100), "WrongFormatError", "no VHD footer")
    yield Case("vhd-cut-at-512", cut(512), "CorruptImageError", "past the end")
    yield Case("vhd-cut-in-header", cut(1000), "CorruptImageError", "past the end")
    yield Case("vhd-cut-in-table", cut(vhd.TABLE_OFFSET + 8), "CorruptImageError", "BAT ends")
    yield Case(
        "vhd-cut-in-block", cut(vhd.TABLE_OFFSET + 5 * SECTOR), "CorruptImageError", "truncated"
    )


def _fixed() -> Iterator[Case]:
    def fixed(held: int, stated: int = SIZE, **fields: Any) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            path = folder / "disk.vhd"
            path.write_bytes(pattern(held) + vhd.footer(stated, vhd.FIXED, **fields))
            return path

        return make

    yield Case("vhd-fixed-truncated", fixed(SIZE - SECTOR), "CorruptImageError", "truncated")
    yield Case("vhd-fixed-pebibyte", fixed(SIZE, stated=1 << 50), "CorruptImageError", "truncated")
    yield Case("vhd-fixed-max", fixed(SIZE, stated=MAX64 - 511), "CorruptImageError", "truncated")
    yield Case(
        "vhd-fixed-larger-file",
        fixed(SIZE + BLOCK),
        None,
        stage=Stage.NONE,
        content=pattern(SIZE + BLOCK)[:SIZE],
    )

    # A guest may write a footer into its first sector, but only the one at the end
    # counts.
    def guest_footer(folder: Path) -> Path:
        content = vhd.footer(1 << 40, vhd.DYNAMIC) + pattern(SIZE - SECTOR)
        return vhd.fixed(folder / "disk.vhd", content)

    yield Case(
        "vhd-fixed-guest-wrote-a-footer",
        guest_footer,
        None,
        stage=Stage.NONE,
        content=vhd.footer(1 << 40, vhd.DYNAMIC) + pattern(SIZE - SECTOR),
    )


def utf16(text: str) -> bytes:
    """Return a name in the encoding of locators."""
    return text.encode("utf-16-le")


def child(
    locators: dict[bytes, bytes], changes: tuple[tuple[int, bytes], ...] = (), **fields: Any
) -> Callable[[Path], Path]:
    """Return a maker of differencing disks with a parent outside their folder."""

    def make(folder: Path) -> Path:
        path = vhd.differencing(
            folder / "disk.vhd", SIZE, BLOCKS, locators, block_nbytes=BLOCK, **fields
        )
        return vhd.poke_sound(path, *changes) if changes else path

    return make


LOCATOR = HEADER + 576  # the first entry: code, space, length, reserved, offset


def _locators() -> Iterator[Case]:
    outside = "..\\outside\\canary.vhd"
    ok = {b"W2ru": utf16("gone.vhd")}
    for name, locators in (
        ("relative", {b"W2ru": utf16(outside)}),
        ("deep", {b"W2ru": utf16("a\\..\\" + outside)}),
        ("slashes", {b"W2ru": utf16(outside.replace("\\", "/"))}),
        ("url", {b"MacX": b"file://../outside/canary.vhd"}),
        ("escaped", {b"MacX": b"file://%2e%2e/outside/canary.vhd"}),
    ):
        make = child(locators)
        yield Case(f"vhd-parent-{name}", make, "UnsafeReferenceError", "leads out", Stage.CHAIN)
    for name, locators, error, word in (
        ("missing", ok, "FileNotFoundError", ""),
        ("device", {b"W2ku": utf16("\\\\.\\PhysicalDrive0")}, "FileNotFoundError", ""),
        (
            "http",
            {b"MacX": b"http://127.0.0.1/p.vhd"},
            "CorruptImageError",
            "does not name its parent",
        ),
        ("nothing", {}, "CorruptImageError", "does not name its parent"),
        ("dots", {b"W2ru": utf16("..")}, "CorruptImageError", "does not name its parent"),
        ("bad-utf16", {b"W2ru": b"\x00\xd8x\0"}, "CorruptImageError", "UTF-16"),
        ("bad-url", {b"MacX": b"file://%ff"}, "CorruptImageError", "UTF-8"),
    ):
        stage = Stage.CHAIN if error == "FileNotFoundError" else Stage.OPEN
        yield Case(f"vhd-parent-{name}", child(locators), error, word, stage)
    for name, offset, data, error, word in (
        ("length-max", 8, be32(MAX32), "LimitExceededError", "parent locator has"),
        ("length-cap-plus-1", 8, be32(65537), "LimitExceededError", "parent locator has"),
        ("offset-past-end", 16, be64(1 << 40), "CorruptImageError", "past the end"),
        ("offset-max", 16, be64(MAX64), "CorruptImageError", "past the end"),
    ):
        make = child(ok, ((LOCATOR + offset, data),))
        yield Case(f"vhd-locator-{name}", make, error, word)
    yield Case(
        "vhd-parent-is-itself",
        child({b"W2ru": utf16("disk.vhd")}, footer_fields={"uuid": vhd.PARENT_UUID}),
        "CorruptImageError",
        "leads back",
        Stage.CHAIN,
    )
