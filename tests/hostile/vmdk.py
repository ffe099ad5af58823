"""Hostile VMDK: sparse headers, directories, markers, grains, descriptors."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.helpers import vmdk
from tests.hostile.case import Case, Stage, pattern

GRAIN, SECTOR = vmdk.GRAIN, vmdk.SECTOR
N_SECTORS = 4 * GRAIN // SECTOR
GRAINS = {0: pattern(GRAIN), 2: pattern(GRAIN, 2)}
CONTENT = GRAINS[0] + bytes(GRAIN) + GRAINS[2] + bytes(GRAIN)
MAX64 = (1 << 64) - 1

HEADERS = [
    ("version-0", {"version": 0}, "UnsupportedFeatureError", "version 0"),
    ("version-4", {"version": 4}, "UnsupportedFeatureError", "version 4"),
    ("flags-unknown", {"flags": 0x80000003}, "UnsupportedFeatureError", "incompatible flags"),
    ("markers-only", {"flags": 0x20003}, "CorruptImageError", "markers"),
    (
        "compression-unknown",
        {"flags": 0x10003, "compression": 7},
        "UnsupportedFeatureError",
        "algorithm 7",
    ),
    ("grain-0", {"grain": 0}, "LimitExceededError", "grain of 0"),
    ("grain-not-a-power", {"grain": 24}, "LimitExceededError", "powers of two"),
    ("grain-below-cap", {"grain": 4}, "LimitExceededError", "grain of 2048"),
    ("grain-over-cap", {"grain": 4096}, "LimitExceededError", "grain of 2097152"),
    ("grain-max", {"grain": 1 << 63}, "LimitExceededError", "grain"),
    ("gtes-0", {"gtes": 0}, "LimitExceededError", "grain table"),
    ("gtes-513", {"gtes": 513}, "LimitExceededError", "grain table"),
    ("gtes-1024", {"gtes": 1024}, "LimitExceededError", "grain table"),
    ("gtes-max", {"gtes": 0xFFFFFFFF}, "LimitExceededError", "grain table"),
    ("directory-0", {"gd": 0, "rgd": 0}, "CorruptImageError", "no grain directory"),
    ("directory-past-end", {"gd": 1 << 40, "rgd": 1 << 40}, "CorruptImageError", "past the end"),
    ("directory-wraps", {"gd": MAX64 - 1, "rgd": MAX64 - 1}, "CorruptImageError", "past the end"),
    ("descriptor-past-end", {"descriptor": 1 << 50}, "CorruptImageError", "descriptor ends"),
    ("descriptor-cap-plus-1", {"descriptor_size": 2049}, "LimitExceededError", "descriptor of"),
    ("descriptor-size-max", {"descriptor_size": MAX64}, "LimitExceededError", "descriptor of"),
    ("descriptor-absent", {"descriptor": 0}, "UnsupportedFeatureError", "without a descriptor"),
]


def _hosted(**fields: int) -> Callable[[Path], Path]:
    return lambda folder: vmdk.hosted(folder / "disk.vmdk", N_SECTORS, GRAINS, **fields)


def _poked(*changes: tuple[int, bytes], kind: str = "hosted") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "disk.vmdk"
        if kind == "hosted":
            vmdk.hosted(path, N_SECTORS, GRAINS)
        else:
            vmdk.stream(path, N_SECTORS, GRAINS, layout=kind)
        raw = bytearray(path.read_bytes())
        for offset, data in changes:
            place = offset % len(raw)
            raw[place : place + len(data)] = data
        path.write_bytes(raw)
        return path

    return make


def _capacity(n_sectors: int) -> bytes:
    return struct.pack("<Q", n_sectors)


def cases() -> Iterator[Case]:
    """Yield the cases."""
    for name, fields, error, word in HEADERS:
        yield Case(f"vmdk-{name}", _hosted(**fields), error, word)
    for name, offset, data, error, word in (
        ("newlines-translated", 73, b"\r\n \r\n", "CorruptImageError", "end-of-line"),
        ("capacity-other", 12, _capacity(N_SECTORS + 4096), "CorruptImageError", "descriptor says"),
        ("capacity-0", 12, _capacity(0), "CorruptImageError", "descriptor says"),
        ("capacity-pebibyte", 12, _capacity(1 << 41), "CorruptImageError", "past the end"),
        ("capacity-max", 12, _capacity(MAX64), "LimitExceededError", "capacity"),
        ("cowd", 0, b"COWD", "UnsupportedFeatureError", "COWD"),
        ("sesparse", 0, b"\xbe\xba\xfe\xca\0\0\0\0", "UnsupportedFeatureError", "seSparse"),
        ("descriptor-zeros", SECTOR, bytes(1024), "UnsupportedFeatureError", "descriptor"),
    ):
        yield Case(f"vmdk-{name}", _poked((offset, data)), error, word)
    yield from _entries()
    yield from _streams()
    yield from _grains()
    yield from _descriptors()


def _entries() -> Iterator[Case]:
    table = 27 * SECTOR
    for name, offset, value, word in (
        ("table-past-end", 26 * SECTOR, 0xFFFFFF, "grain table 0"),
        ("table-max", 26 * SECTOR, 0xFFFFFFFF, "grain table 0"),
        ("grain-past-end", table, 0xFFFFFF, "past the end"),
        ("grain-max", table, 0xFFFFFFFF, "past the end"),
    ):
        make = _poked((offset, struct.pack("<I", value)))
        yield Case(f"vmdk-entry-{name}", make, "CorruptImageError", word, Stage.TABLES)
    shared = _poked((table + 4, struct.pack("<I", 128)))
    content = GRAINS[0] * 2 + GRAINS[2] + bytes(GRAIN)
    yield Case("vmdk-shared-grain", shared, None, stage=Stage.CHECK, content=content)
    in_table = _poked((table + 4, struct.pack("<I", 1)))
    # Without the flag for zeroed grains, 1 is an ordinary sector: the descriptor's.
    yield Case("vmdk-grain-in-descriptor", in_table, None, stage=Stage.CHECK)


def _streams() -> Iterator[Case]:
    for name, changes, error, word in (
        ("cut-footer", ((-1024 + 0, b"XXXX"),), "CorruptImageError", "truncated"),
        ("no-end", ((-512, b"\1" * 512),), "CorruptImageError", "truncated"),
        ("footer-capacity", ((-1024 + 12, _capacity(9)),), "CorruptImageError", "capacity"),
        ("footer-at-end-too", ((-1024 + 56, b"\xff" * 8),), "CorruptImageError", "does not say"),
        ("footer-past-end", ((-1024 + 56, _capacity(1 << 40)),), "CorruptImageError", "past"),
    ):
        yield Case(f"vmdk-stream-{name}", _poked(*changes, kind="footer"), error, word)
    marker = 128 * SECTOR
    for name, data in (
        ("other-grain", _capacity(128)),
        ("lba-max", b"\xff" * 8),
        ("size-0", _capacity(0) + bytes(4)),
        ("size-max", _capacity(0) + b"\xff" * 4),
        ("garbage", _capacity(0) + struct.pack("<I", 400) + b"\x78\x9c" + b"\xee" * 398),
    ):
        make = _poked((marker, data), kind="footer")
        yield Case(f"vmdk-marker-{name}", make, "CorruptImageError", "", Stage.DATA)


def _grains() -> Iterator[Case]:
    streams = {
        "bomb": zlib.compress(bytes(64 * GRAIN), 9),
        "short": zlib.compress(GRAINS[0][: GRAIN - 512]),
        "checksum": zlib.compress(GRAINS[0])[:-4] + b"\0\0\0\0",
        "dictionary": b"\x78\xbb" + bytes(4) + zlib.compress(GRAINS[0])[2:],
    }
    for name, stream in streams.items():
        record = struct.pack("<QI", 0, len(stream)) + stream

        def make(folder: Path, record: bytes = record) -> Path:
            path = vmdk.stream(folder / "disk.vmdk", N_SECTORS, {0: GRAINS[0]})
            raw = bytearray(path.read_bytes())
            at = len(raw)
            raw += record.ljust(-(-len(record) // SECTOR) * SECTOR, b"\0")
            # Point the only grain's entry to the new record at the end of the image.
            table = raw.find(struct.pack("<I", 128) + bytes(60), 129 * SECTOR)
            raw[table : table + 4] = struct.pack("<I", at // SECTOR)
            footer = bytes(raw[at - 3 * SECTOR : at])
            path.write_bytes(raw + footer)
            return path

        yield Case(f"vmdk-zlib-{name}", make, "CorruptImageError", "compressed", Stage.DATA)


def _descriptor(*lines: str, kind: str = "custom", **more: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "flat.bin").write_bytes(pattern(8 * SECTOR))
        path = folder / "disk.vmdk"
        path.write_bytes(vmdk.descriptor(kind, *lines, **more))
        return path

    return make


_UNSAFE = "UnsafeReferenceError"


def _descriptors() -> Iterator[Case]:
    limit = str((1 << 63) // SECTOR)
    for name, line, error, word in (
        ("parent-folder", 'RW 8 FLAT "../outside/canary.raw" 0', _UNSAFE, "leads out"),
        ("via-subfolder", 'RW 8 FLAT "x/../../outside/canary.raw" 0', _UNSAFE, "leads out"),
        ("etc-passwd", 'RW 1 FLAT "/etc/passwd" 0', _UNSAFE, "leads out"),
        ("proc", 'RW 1 FLAT "/proc/self/environ" 0', _UNSAFE, "leads out"),
        ("device", 'RW 8 FLAT "/dev/zero" 0', _UNSAFE, "leads out"),
        ("json", 'RW 8 FLAT "json:{}" 0', _UNSAFE, "json"),
        ("url", 'RW 8 FLAT "http://127.0.0.1/x" 0', _UNSAFE, "URL"),
        ("nbd", 'RW 8 FLAT "nbd:127.0.0.1:1" 0', _UNSAFE, "URL"),
        ("drive", 'RW 8 FLAT "C:gone.bin" 0', _UNSAFE, "drive"),
        ("no-name", 'RW 8 FLAT "" 0', "CorruptImageError", "has no file name"),
        ("itself", 'RW 1 FLAT "disk.vmdk" 0', "CorruptImageError", "itself"),
        ("missing", 'RW 8 FLAT "gone.bin" 0', "FileNotFoundError", "No such file"),
        ("past-end", 'RW 9 FLAT "flat.bin" 0', "CorruptImageError", "past the end"),
        ("offset-past-end", 'RW 8 FLAT "flat.bin" 1', "CorruptImageError", "past the end"),
        ("sectors-cap-plus-1", f'RW {limit} FLAT "flat.bin" 0', "LimitExceededError", "sectors"),
        ("sectors-of-21-digits", f'RW {"9" * 21} FLAT "flat.bin" 0', "CorruptImageError", "line"),
        ("sectors-negative", 'RW -8 FLAT "flat.bin" 0', "CorruptImageError", "not an extent"),
        ("offset-max", f'RW 8 FLAT "flat.bin" {"9" * 20}', "LimitExceededError", "sectors"),
        ("flat-as-sparse", 'RW 8 SPARSE "flat.bin"', "WrongFormatError", "sparse extent"),
        ("noaccess", 'NOACCESS 8 FLAT "flat.bin" 0', "UnsupportedFeatureError", "NOACCESS"),
        ("rdm", 'RW 8 VMFSRDM "flat.bin"', "UnsupportedFeatureError", "VMFSRDM"),
        ("no-extent", "", "CorruptImageError", "no extent"),
    ):
        yield Case(f"vmdk-extent-{name}", _descriptor(line), error, word)
    flat = 'RW 8 FLAT "flat.bin" 0'
    for name, extra, error, word in (
        ("version-9", "version=9", "CorruptImageError", "version twice"),
        ("cid-twice", "CID=1", "CorruptImageError", "cid twice"),
        ("parent-twice", "parentCID=00000001", "CorruptImageError", "parentcid twice"),
        ("line-cap-plus-1", "x" * 65537, "LimitExceededError", "line"),
        ("too-long", ("x" * 60_000 + "\n") * 18, "LimitExceededError", "descriptor of"),
        ("too-many-extents", "RW 1 ZERO\n" * 65536, "LimitExceededError", "65536 extents"),
        ("sizes-overflow", f"RW {int(limit) - 1} ZERO\n" * 2, "LimitExceededError", "together"),
    ):
        yield Case(f"vmdk-descriptor-{name}", _descriptor(flat, extra=extra), error, word)
    yield Case(
        "vmdk-descriptor-type-unknown",
        _descriptor(flat, kind="fullDevice"),
        "UnsupportedFeatureError",
        "of type",
    )
    yield Case(
        "vmdk-descriptor-delta-without-parent",
        _descriptor(flat, parent="00000001"),
        "CorruptImageError",
        "delta",
    )
    # Python codecs that are not code pages, or run code: the file name keeps its bytes.
    for name in ("rot13", "unicode_escape", "zlib_codec", "idna", "raw_unicode_escape"):
        extra = f'encoding="{name}"'
        yield Case(
            f"vmdk-descriptor-encoding-{name}",
            _descriptor(flat, extra=extra),
            None,
            stage=Stage.NONE,
            content=pattern(8 * SECTOR),
        )
