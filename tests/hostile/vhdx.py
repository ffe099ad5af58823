"""Hostile VHDX: headers, regions, metadata, BAT entries, logs, parent locators."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.helpers import vhdx
from tests.helpers.vhdx import FULL, MIB, PARTIAL, Vhdx
from tests.hostile.case import Case, Stage, pattern

SIZE = 4 * MIB
MAX32, MAX64 = (1 << 32) - 1, (1 << 64) - 1
TEXT = pattern(MIB)
CONTENT = TEXT + bytes(MIB) + TEXT[::-1] + bytes(MIB)
LOG_GUID = vhdx.guid(9)
Poke = tuple[int, bytes]


def _image(**fields: object) -> Vhdx:
    values: dict[str, object] = {"blocks": {0: (FULL, TEXT), 2: (FULL, TEXT[::-1])}}
    return Vhdx(SIZE, **(values | fields))  # type: ignore[arg-type]


def _write(*changes: Poke, seal: bool = True, **fields: object) -> Callable[[Path], Path]:
    """Return a maker of images with damage; ``seal`` makes their checksums valid."""

    def make(folder: Path) -> Path:
        path = _image(**fields).write(folder / "disk.vhdx")
        with open(path, "r+b") as file:
            for offset, data in changes:
                file.seek(offset)
                file.write(data)
        if seal and changes:
            for offset in vhdx.HEADERS:
                vhdx.seal(path, offset, 4096)
            for offset in vhdx.REGION_TABLES:
                vhdx.seal(path, offset, 65536)
        return path

    return make


def _both(offset: int, data: bytes, places: tuple[int, ...] = vhdx.HEADERS) -> tuple[Poke, ...]:
    return tuple((place + offset, data) for place in places)


def _region(offset: int, data: bytes) -> tuple[Poke, ...]:
    return _both(offset, data, vhdx.REGION_TABLES)


def _u16(value: int) -> bytes:
    return struct.pack("<H", value)


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def _item(guid: uuid.UUID, data: bytes) -> tuple[Poke]:
    return ((_image().item_offset(guid), data),)


STRUCTURES = [
    ("headers-cleared", _both(0, bytes(4096)), "CorruptImageError", "header"),
    ("version-2", _both(66, _u16(2)), "UnsupportedFeatureError", "version 2"),
    (
        "log-version-1",
        _both(64, _u16(1)) + _both(48, LOG_GUID.bytes_le),
        "UnsupportedFeatureError",
        "log has version",
    ),
    ("log-misaligned", _both(72, _u64(MIB + 4096)), "CorruptImageError", "not aligned"),
    ("log-length-odd", _both(68, _u32(4096)), "CorruptImageError", "not aligned"),
    ("log-over-bat", _both(72, _u64(2 * MIB)), "CorruptImageError", "inside"),
    (
        "log-wraps",
        _both(72, _u64(MAX64 - MIB + 1)) + _both(48, LOG_GUID.bytes_le),
        "CorruptImageError",
        "past the end",
    ),
    (
        "log-in-header",
        _both(72, _u64(0)) + _both(48, LOG_GUID.bytes_le),
        "CorruptImageError",
        "empty or inside the headers",
    ),
    (
        "log-length-0",
        _both(68, _u32(0)) + _both(48, LOG_GUID.bytes_le),
        "CorruptImageError",
        "empty or inside the headers",
    ),
    (
        "log-over-cap",
        _both(68, _u32(65 * MIB)) + _both(48, LOG_GUID.bytes_le),
        "LimitExceededError",
        "log of",
    ),
    ("log-empty", _both(48, LOG_GUID.bytes_le), "CorruptImageError", "no valid sequence"),
    ("regions-cleared", _region(0, bytes(65536)), "CorruptImageError", "region table"),
    ("regions-cap-plus-1", _region(8, _u32(2048)), "CorruptImageError", "2048 entries"),
    ("regions-max", _region(8, _u32(MAX32)), "CorruptImageError", "entries"),
    ("regions-none", _region(8, _u32(0)), "CorruptImageError", "no metadata region"),
    ("regions-one", _region(8, _u32(1)), "CorruptImageError", "no metadata region"),
    (
        "region-unknown",
        _region(16, bytes(range(16))),
        "UnsupportedFeatureError",
        "needs the region",
    ),
    ("region-misaligned", _region(32, _u64(2 * MIB + 1)), "CorruptImageError", "multiples"),
    ("region-in-header", _region(32, _u64(0)), "CorruptImageError", "after the headers"),
    ("region-past-end", _region(32, _u64(1 << 45)), "CorruptImageError", "past the end"),
    ("region-wraps", _region(32, _u64(MAX64 - MIB + 1)), "CorruptImageError", "past the end"),
    ("region-overlaps", _region(32, _u64(3 * MIB)), "CorruptImageError", "inside"),
    ("region-twice", _region(48, vhdx.BAT.bytes_le), "CorruptImageError", "same GUID"),
    ("region-length-0", _region(40, _u32(0)), "CorruptImageError", "BAT region has 0"),
    (
        "metadata-signature",
        ((vhdx.METADATA_OFFSET, b"metadatX"),),
        "CorruptImageError",
        "metadata table",
    ),
    (
        "metadata-cap-plus-1",
        ((vhdx.METADATA_OFFSET + 10, _u16(2048)),),
        "CorruptImageError",
        "2048 entries",
    ),
    (
        "metadata-none",
        ((vhdx.METADATA_OFFSET + 10, _u16(0)),),
        "CorruptImageError",
        "no metadata item",
    ),
    (
        "item-unknown",
        ((vhdx.METADATA_OFFSET + 32, bytes(range(16))),),
        "UnsupportedFeatureError",
        "needs the metadata item",
    ),
    (
        "item-in-table",
        ((vhdx.METADATA_OFFSET + 48, _u32(8)),),
        "CorruptImageError",
        "allowed: at most",
    ),
    (
        "item-past-region",
        ((vhdx.METADATA_OFFSET + 48, _u32(MIB - 4)),),
        "CorruptImageError",
        "allowed: at most",
    ),
    (
        "item-offset-max",
        ((vhdx.METADATA_OFFSET + 48, _u32(MAX32)),),
        "CorruptImageError",
        "allowed: at most",
    ),
    (
        "item-length-max",
        ((vhdx.METADATA_OFFSET + 52, _u32(MAX32)),),
        "CorruptImageError",
        "allowed: at most",
    ),
    ("item-short", ((vhdx.METADATA_OFFSET + 52, _u32(4)),), "CorruptImageError", "are needed"),
    (
        "item-twice",
        ((vhdx.METADATA_OFFSET + 64, vhdx.FILE_PARAMETERS.bytes_le),),
        "CorruptImageError",
        "two metadata items",
    ),
    ("block-0", _item(vhdx.FILE_PARAMETERS, _u32(0)), "CorruptImageError", "block size is 0"),
    (
        "block-not-a-power",
        _item(vhdx.FILE_PARAMETERS, _u32(3 * MIB)),
        "CorruptImageError",
        "powers of two",
    ),
    (
        "block-below-cap",
        _item(vhdx.FILE_PARAMETERS, _u32(MIB // 2)),
        "CorruptImageError",
        "block size",
    ),
    (
        "block-over-cap",
        _item(vhdx.FILE_PARAMETERS, _u32(512 * MIB)),
        "CorruptImageError",
        "block size",
    ),
    ("block-max", _item(vhdx.FILE_PARAMETERS, _u32(MAX32)), "CorruptImageError", "block size"),
    ("sector-0", _item(vhdx.LOGICAL, _u32(0)), "CorruptImageError", "sector size is 0"),
    ("sector-1024", _item(vhdx.LOGICAL, _u32(1024)), "CorruptImageError", "sector size is 1024"),
    ("physical-max", _item(vhdx.PHYSICAL, _u32(MAX32)), "CorruptImageError", "physical sector"),
    ("size-cap", _item(vhdx.DISK_SIZE, _u64(64 << 40)), "CorruptImageError", "BAT region has"),
    (
        "size-cap-plus-1",
        _item(vhdx.DISK_SIZE, _u64((64 << 40) + 512)),
        "LimitExceededError",
        "disk has",
    ),
    ("size-pebibyte", _item(vhdx.DISK_SIZE, _u64(1 << 50)), "LimitExceededError", "disk has"),
    ("size-max", _item(vhdx.DISK_SIZE, _u64(MAX64)), "LimitExceededError", "disk has"),
    ("size-odd", _item(vhdx.DISK_SIZE, _u64(SIZE - 1)), "CorruptImageError", "multiple"),
    (
        "parent-without-locator",
        _item(vhdx.FILE_PARAMETERS, _u32(MIB) + _u32(2)),
        "CorruptImageError",
        "no parent locator",
    ),
]


def cases() -> Iterator[Case]:
    """Yield the cases."""
    for name, changes, error, word in STRUCTURES:
        yield Case(f"vhdx-{name}", _write(*changes), error, word)
    yield Case(
        "vhdx-header-checksums",
        _write(*_both(100, b"X"), seal=False),
        "CorruptImageError",
        "checksum",
    )
    yield Case(
        "vhdx-region-checksums",
        _write(*_region(100, b"X"), seal=False),
        "CorruptImageError",
        "checksum",
    )
    same = _write((vhdx.HEADERS[0] + 8, _u64(6)), (vhdx.HEADERS[0] + 16, b"XX"))
    yield Case("vhdx-headers-contend", same, "CorruptImageError", "sequence number")
    one = _write((vhdx.HEADERS[0] + 100, b"X"), seal=False)
    yield Case("vhdx-one-header-damaged", one, None, stage=Stage.CHECK, content=CONTENT)
    yield from _entries()
    yield from _cuts()
    yield from _logs()
    yield from _locators()


def _entries() -> Iterator[Case]:
    for name, entry, word in (
        ("reserved-state-4", 4 | 5 << 20, "reserved state"),
        ("partial-without-parent", PARTIAL | 5 << 20, "no parent"),
        ("reserved-bits", FULL | 5 << 20 | 8, "reserved bits"),
        ("in-headers", FULL, "inside the headers"),
        ("past-end", FULL | 1 << 40, "past the end"),
        ("max", FULL | 0xFFFFFFFFFFF00000, "past the end"),
    ):
        make = _write((vhdx.BAT_OFFSET, _u64(entry)))
        yield Case(f"vhdx-entry-{name}", make, "CorruptImageError", word, Stage.TABLES)
    shared = _write((vhdx.BAT_OFFSET + 8, _u64(FULL | 4 << 20)))
    overlap = "two blocks overlap"
    yield Case("vhdx-shared-block", shared, "CorruptImageError", overlap, Stage.TABLES)
    for name, place, word in (
        ("log", vhdx.LOG_OFFSET, "the log"),
        ("bat", vhdx.BAT_OFFSET, "the BAT region"),
        ("metadata", vhdx.METADATA_OFFSET, "the metadata region"),
    ):
        make = _write((vhdx.BAT_OFFSET + 8, _u64(FULL | place)))
        yield Case(f"vhdx-block-in-{name}", make, "CorruptImageError", word, Stage.TABLES)


def _cuts() -> Iterator[Case]:
    def cut(nbytes: int) -> Callable[[Path], Path]:
        def make(folder: Path) -> Path:
            path = _image().write(folder / "disk.vhdx")
            with open(path, "r+b") as file:
                file.truncate(nbytes)
            return path

        return make

    for nbytes, word in (
        (8, "past the end"),
        (65536, "past the end"),
        (300_000, "past the end"),
        (2 * MIB, "past the end"),
        (3 * MIB + 4096, "past the end"),
    ):
        yield Case(f"vhdx-cut-at-{nbytes}", cut(nbytes), "CorruptImageError", word)
    yield Case(
        "vhdx-cut-in-block", cut(5 * MIB + 512), "CorruptImageError", "past the end", Stage.TABLES
    )


def _log(*entries: bytes, at: int = 0) -> dict[str, object]:
    return {"log_guid": LOG_GUID, "log": bytes(at) + b"".join(entries)}


def _entry(sequence: int, tail: int, writes: list[vhdx.Write], **more: object) -> bytes:
    values: dict[str, object] = {"log_guid": LOG_GUID}
    return vhdx.log_entry(sequence, tail, writes, **(values | more))  # type: ignore[arg-type]


def _logs() -> Iterator[Case]:
    sector = pattern(4096, 77)
    into_block = [(5 * MIB, sector)]
    good = _entry(5, 0, into_block, flushed=6 * MIB, last=6 * MIB)
    torn = bytearray(good)
    torn[4200] ^= 1
    foreign = vhdx.log_entry(5, 0, into_block, log_guid=vhdx.guid(10))
    for name, log, word in (
        ("torn", _log(bytes(torn)), "no valid sequence"),
        ("foreign", _log(foreign), "no valid sequence"),
        ("garbage", _log(b"loge" + b"\xff" * 8188), "no valid sequence"),
        ("tail-elsewhere", _log(_entry(5, 8192, into_block)), "no valid sequence"),
        ("tail-past-end", _log(_entry(5, 1 << 30, into_block)), "no valid sequence"),
        ("sequence-0", _log(_entry(0, 0, into_block)), "no valid sequence"),
        ("misaligned-target", _log(_entry(5, 0, [(5 * MIB + 1, sector)])), "no valid sequence"),
        ("flushed-beyond-end", _log(_entry(5, 0, into_block, flushed=1 << 40)), "is truncated"),
        (
            "first-of-two-torn",
            _log(bytes(torn), _entry(6, 0, into_block)),
            "no valid sequence",
        ),
    ):
        yield Case(f"vhdx-log-{name}", _write(**log), "CorruptImageError", word)
    yield Case(
        "vhdx-log-zeros-over-cap",
        _write(**_log(_entry(5, 0, [(8 * MIB, 1 << 60)]))),
        "LimitExceededError",
        "bytes long",
    )
    yield Case(
        "vhdx-log-last-offset-max",
        _write(**_log(_entry(5, 0, into_block, last=MAX64 - MIB))),
        "LimitExceededError",
        "bytes long",
    )
    # A log that clears the metadata; only the headers are safe from the log.
    yield Case(
        "vhdx-log-clears-metadata",
        _write(**_log(_entry(5, 0, [(3 * MIB, MIB)]))),
        "CorruptImageError",
        "metadata table",
    )
    replayed = bytearray(CONTENT)
    # Block 0 is after block 2, at 5 MiB.
    replayed[:4096] = sector
    yield Case(
        "vhdx-log-into-a-block",
        _write(**_log(good)),
        None,
        stage=Stage.NONE,
        content=bytes(replayed),
    )
    second = _entry(6, len(good), [(5 * MIB, 4096)])
    yield Case(
        "vhdx-log-only-the-newest",
        _write(**_log(good, second)),
        None,
        stage=Stage.NONE,
        content=bytes(4096) + CONTENT[4096:],
    )


def _locators() -> Iterator[Case]:
    guid = vhdx.PARENT_GUID
    for name, pairs, error, word, stage in (
        (
            "outside",
            vhdx.child_locator("..\\outside\\canary.vhdx"),
            "UnsafeReferenceError",
            "leads out",
            Stage.CHAIN,
        ),
        (
            "deep",
            vhdx.child_locator("a\\..\\..\\outside\\canary.vhdx"),
            "UnsafeReferenceError",
            "leads out",
            Stage.CHAIN,
        ),
        ("drive", vhdx.child_locator("C:\\vm\\gone.vhdx"), "FileNotFoundError", "", Stage.CHAIN),
        (
            "volume",
            vhdx.child_locator("\\\\?\\Volume{1}\\gone.vhdx"),
            "FileNotFoundError",
            "",
            Stage.CHAIN,
        ),
        ("itself", vhdx.child_locator("disk.vhdx"), "CorruptImageError", "leads back", Stage.CHAIN),
        ("dots", vhdx.child_locator(".."), "CorruptImageError", "does not name a file", Stage.OPEN),
        ("no-linkage", {"relative_path": "p.vhdx"}, "CorruptImageError", "identify", Stage.OPEN),
        (
            "linkage-no-guid",
            {"parent_linkage": "x", "relative_path": "p"},
            "CorruptImageError",
            "not a GUID",
            Stage.OPEN,
        ),
        (
            "no-path",
            {"parent_linkage": f"{{{guid}}}"},
            "CorruptImageError",
            "does not name a file",
            Stage.OPEN,
        ),
        (
            "entries-cap-plus-1",
            {f"k{n}": "v" for n in range(257)},
            "LimitExceededError",
            "257 entries",
            Stage.OPEN,
        ),
    ):
        yield Case(f"vhdx-parent-{name}", _write(locator=pairs), error, word, stage)
    locator = bytearray(Vhdx.parent_locator(vhdx.child_locator()))
    at = _image(locator=vhdx.child_locator()).item_offset(vhdx.LOCATOR)
    for name, offset, data, error, word in (
        ("type", 0, b"X", "UnsupportedFeatureError", "of the type"),
        ("count-max", 18, _u16(0xFF), "CorruptImageError", "need more"),
        ("text-past-end", 20, _u32(MAX32), "CorruptImageError", "ends at"),
        ("bad-utf16", len(locator) - 2, b"\x00\xd8", "CorruptImageError", "UTF-16"),
    ):
        make = _write((at + offset, data), locator=vhdx.child_locator())
        yield Case(f"vhdx-locator-{name}", make, error, word)
