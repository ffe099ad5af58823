"""QCOW2 headers: the facts of good ones, the error for each bad one."""

from __future__ import annotations

import logging
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import qemu
from tests.helpers.images import noise
from tests.helpers.qcow2 import create, open_qcow2, qemu_io
from tests.helpers.reading import extent_rows, poke

from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.formats.qcow2 import layout

MIB = 1 << 20


def u16(value: int) -> bytes:
    return struct.pack(">H", value)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a version 3 image, clusters of 64 KiB: refcounts at 1 and 2, L1 at 3."""
    path = create(tmp_path_factory.mktemp("qcow2") / "a.qcow2", 10 * MIB)
    qemu_io(path, "write -P 7 0 128k")
    return path.read_bytes()


FEATURE = layout.EXTENSION.pack(layout.EXTENSION_FEATURE_NAMES, 48)
NAMED_BIT_9 = FEATURE + layout.FEATURE_NAME.pack(0, 9, b"time travel") + bytes(8)
FAR = 1 << 40

BAD: list[tuple[str, list[tuple[int, bytes]], type[ImgcoreError], str]] = [
    ("magic", [(0, b"QFI\xfa")], WrongFormatError, "not a QCOW2 image"),
    ("version-1", [(4, u32(1))], UnsupportedFeatureError, "version 1"),
    ("version-4", [(4, u32(4))], UnsupportedFeatureError, "version 4"),
    ("backing-in-header", [(8, u64(16)), (16, u32(4))], CorruptImageError, "backing file name"),
    ("backing-outside", [(8, u64(65530)), (16, u32(7))], CorruptImageError, "backing file name"),
    ("backing-far", [(8, u64(1 << 63)), (16, u32(7))], CorruptImageError, "backing file name"),
    ("backing-far-and-empty", [(8, u64(1 << 40))], CorruptImageError, "backing file name"),
    ("backing-long", [(8, u64(0x300)), (16, u32(1024))], LimitExceededError, "1024 bytes"),
    ("cluster-bits-8", [(20, u32(8))], CorruptImageError, "cluster bits are 8"),
    ("cluster-bits-22", [(20, u32(22))], CorruptImageError, "cluster bits are 22"),
    ("cluster-bits-64", [(20, u32(64))], CorruptImageError, "cluster bits are 64"),
    ("cluster-bits-max", [(20, u32(0xFFFFFFFF))], CorruptImageError, "cluster bits"),
    ("size-max", [(24, u64(0xFFFFFFFFFFFFFFFF))], LimitExceededError, "virtual size"),
    ("size-l1-limit", [(24, u64((2 << 50) + 512))], LimitExceededError, "L1 table takes 33554440"),
    ("size-needs-l1", [(24, u64(1 << 40))], CorruptImageError, "L1 table has 1 entries"),
    ("aes", [(32, u32(1))], UnsupportedFeatureError, "AES encryption"),
    ("luks", [(32, u32(2))], UnsupportedFeatureError, "LUKS encryption"),
    ("crypt-3", [(32, u32(3))], CorruptImageError, "encryption method 3"),
    ("l1-empty", [(36, u32(0))], CorruptImageError, "L1 table has 0 entries"),
    ("l1-limit", [(36, u32(4 * MIB + 1))], LimitExceededError, "L1 table takes 33554440"),
    ("l1-past-end", [(36, u32(4 * MIB))], CorruptImageError, "L1 table ends at 0x2030000"),
    ("l1-misaligned", [(40, u64(0x30200))], CorruptImageError, "L1 table at 0x30200"),
    ("l1-in-header", [(40, u64(0))], CorruptImageError, "L1 table at 0x0"),
    ("l1-wraps", [(40, u64((1 << 64) - 65536))], CorruptImageError, "past the end of the file"),
    ("refcounts-misaligned", [(48, u64(0x10008))], CorruptImageError, "refcount table at 0x10008"),
    ("refcounts-far", [(48, u64(FAR))], CorruptImageError, "refcount table ends"),
    ("refcounts-cap", [(56, u32(128))], CorruptImageError, "refcount table ends"),
    ("refcounts-limit", [(56, u32(129))], LimitExceededError, "refcount table takes 8454144"),
    ("snapshots-limit", [(60, u32(65537))], LimitExceededError, "65537 snapshots"),
    ("snapshots-cap", [(60, u32(65536)), (64, u64(65536))], CorruptImageError, "snapshot table"),
    ("snapshots-at-0", [(60, u32(1))], CorruptImageError, "snapshot table at 0x0"),
    ("snapshots-far", [(60, u32(1)), (64, u64(FAR))], CorruptImageError, "snapshot table ends"),
    ("data-file", [(72, u64(4))], UnsupportedFeatureError, "external data file"),
    ("extended-l2", [(72, u64(16))], UnsupportedFeatureError, "extended L2 entries"),
    ("both", [(72, u64(20))], UnsupportedFeatureError, "external data file, extended L2 entries"),
    ("unknown-bit", [(72, u64(1 << 63))], UnsupportedFeatureError, r"unknown \(bit 63\)"),
    (
        "named-bit",
        [(72, u64(1 << 9)), (112, NAMED_BIT_9)],
        UnsupportedFeatureError,
        r"time travel \(bit 9\)",
    ),
    ("zstd-without-type", [(72, u64(8))], CorruptImageError, "compression type is 0"),
    ("type-without-bit", [(104, b"\x01")], CorruptImageError, "compression type is 1"),
    (
        "type-2",
        [(72, u64(8)), (104, b"\x02")],
        UnsupportedFeatureError,
        "compression type 2, supported",
    ),
    ("refcount-order", [(96, u32(7))], CorruptImageError, "refcount order is 7"),
    ("header-short", [(100, u32(96))], CorruptImageError, "header length is 96"),
    ("header-odd", [(100, u32(108))], CorruptImageError, "header length is 108"),
    ("header-long", [(100, u32(65544))], CorruptImageError, "header length is 65544"),
    ("extension-long", [(116, u32(65536))], CorruptImageError, "has 65536 bytes"),
    ("extension-max", [(116, u32(0xFFFFFFFF))], CorruptImageError, "has 4294967295 bytes"),
    ("bitmaps-absent", [(88, u64(1))], CorruptImageError, "without a bitmaps extension"),
    (
        "bitmaps-many",
        [(88, u64(1)), (112, u32(layout.EXTENSION_BITMAPS) + u32(24)), (120, u32(65536))],
        LimitExceededError,
        "65536 bitmaps",
    ),
    (
        "bitmaps-far",
        [
            (88, u64(1)),
            (112, u32(layout.EXTENSION_BITMAPS) + u32(24)),
            (120, u32(1) + u32(0) + u64(64) + u64(FAR)),
        ],
        CorruptImageError,
        "bitmap directory ends",
    ),
]


@pytest.mark.parametrize(
    ("changes", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD]
)
def test_bad_header(
    tmp_path: Path,
    image: bytes,
    changes: list[tuple[int, bytes]],
    error: type[ImgcoreError],
    message: str,
) -> None:
    path = tmp_path / "bad.qcow2"
    path.write_bytes(image)
    poke(path, *changes)
    with pytest.raises(error, match=message) as caught:
        open_qcow2(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text


@pytest.mark.parametrize("nbytes", [0, 3, 4, 71, 72, 103, 104, 111, 4096, 65536, 0x30007])
def test_truncated(tmp_path: Path, image: bytes, nbytes: int) -> None:
    path = tmp_path / "short.qcow2"
    path.write_bytes(image[:nbytes])
    expected = WrongFormatError if nbytes < 4 else CorruptImageError
    with pytest.raises(expected):
        open_qcow2(path)


def test_any_byte_of_the_header_may_be_wrong(tmp_path: Path, image: bytes) -> None:
    """Any header gives an image or an ImgcoreError."""
    path = tmp_path / "any.qcow2"
    garbage = noise(512)
    for index in range(512):
        path.write_bytes(image)
        poke(path, (index, garbage[index : index + 1 + index % 5]))
        try:
            reader = open_qcow2(path)
        except ImgcoreError:
            continue
        reader.info()
        for _ in reader.extents(0, min(reader.virtual_size, 1 << 30)):
            pass
        reader.close()


def test_v2_does_not_look_behind_its_header(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB, "compat=0.10")
    # An end marker, then the bytes that are features and refcount order in version 3.
    poke(path, (72, u64(0)), (80, b"\xff" * 64))
    reader = open_qcow2(path)
    assert reader.info()["format-specific"]["data"] == {
        "compat": "0.10",
        "compression-type": "zlib",
        "refcount-bits": 16,
    }
    assert reader.check().problems == []
    reader.close()


@pytest.mark.parametrize(
    ("bits", "warning", "line"),
    [
        (layout.INCOMPATIBLE_DIRTY, "not closed cleanly", "dirty flag"),
        (layout.INCOMPATIBLE_CORRUPT, "marked as corrupt", "corrupt flag"),
    ],
)
def test_marks_are_warnings(
    tmp_path: Path,
    image: bytes,
    caplog: pytest.LogCaptureFixture,
    bits: int,
    warning: str,
    line: str,
) -> None:
    path = tmp_path / "marked.qcow2"
    path.write_bytes(image)
    poke(path, (72, u64(bits)))
    with caplog.at_level(logging.WARNING, "imgcore"):
        reader = open_qcow2(path)
    assert warning in caplog.text
    info = reader.info()
    assert info["dirty-flag"] == (bits == layout.INCOMPATIBLE_DIRTY)
    assert info["format-specific"]["data"]["corrupt"] == (bits == layout.INCOMPATIBLE_CORRUPT)
    assert extent_rows(reader)[0][5] == 2
    report = reader.check()
    assert report.corruptions == 0
    assert line in report.problems[0]
    reader.close()


@pytest.mark.parametrize("change", [(48, u64(0)), (56, u32(0))], ids=["absent", "empty"])
def test_reading_needs_no_refcount_table(
    tmp_path: Path, image: bytes, caplog: pytest.LogCaptureFixture, change: tuple[int, bytes]
) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(image)
    poke(path, change)
    with caplog.at_level(logging.WARNING, "imgcore"):
        reader = open_qcow2(path)
    assert "has no refcount table" in caplog.text
    assert extent_rows(reader)[0][5] == 2
    report = reader.check()
    assert report.corruptions > 0
    assert report.problems[0] == "ERROR the header names no refcount table"
    reader.close()


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("compat=0.10",),
        ("cluster_size=512",),
        ("cluster_size=2M",),
        ("compression_type=zstd",),
        ("lazy_refcounts=on", "refcount_bits=1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_backing", [False, True])
def test_info_equals_qemu_img(tmp_path: Path, options: tuple[str, ...], with_backing: bool) -> None:
    backing = tmp_path / "base.raw"
    backing.write_bytes(bytes(4096))
    path = create(tmp_path / "a.qcow2", MIB, *options, backing=backing if with_backing else None)
    if options != ("lazy_refcounts=on", "refcount_bits=1"):
        qemu.run("snapshot", "-c", "first", path)
        qemu.run("snapshot", "-c", "second one", path)
    _assert_same_info(path)


def test_info_with_bitmaps(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    qemu.run("bitmap", "--add", "-g", "4k", path, "b0")
    qemu.run("bitmap", "--add", "--disable", path, "b1")
    _assert_same_info(path)


def _assert_same_info(path: Path) -> None:
    theirs = qemu.info(path, "qcow2")
    reader = open_qcow2(path)
    ours: dict[str, Any] = reader.info()
    reader.close()
    for key, value in ours.items():
        assert theirs[key] == value, key
    for key in ("snapshots", "backing-filename", "backing-filename-format"):
        assert (key in theirs) == (key in ours)


def test_bad_snapshot_table_is_refused_by_info_only(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    qemu.run("snapshot", "-c", "first", path)
    raw = path.read_bytes()
    table = int.from_bytes(raw[64:72], "big")
    poke(path, (table + 36, u32(0xFFFFFFFF)))
    reader = open_qcow2(path)
    assert extent_rows(reader)
    with pytest.raises(LimitExceededError, match="extra data"):
        reader.info()
    assert reader.check().corruptions > 0
    reader.close()


def test_info_needs_no_numpy(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    code = (
        "import sys\n"
        "from imgcore.files.host_file import HostFile\n"
        "from imgcore.formats.qcow2.driver import DRIVER\n"
        f"DRIVER.open(HostFile.open({str(path)!r}), None).info()\n"
        "assert 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_empty_backing_name_is_none(tmp_path: Path, image: bytes) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(image)
    reader = open_qcow2(poke(path, (8, u64(0x300))))
    assert reader.backing is None
    reader.close()


# A directory of one bitmap of this size at this offset.  At 0x50000 all bytes are 7.
@pytest.mark.parametrize(("nbytes", "offset"), [(16, 0x50000), (24, 0x50000)])
def test_a_bitmap_outside_its_directory(
    tmp_path: Path, image: bytes, nbytes: int, offset: int
) -> None:
    extension = u32(layout.EXTENSION_BITMAPS) + u32(24)
    bitmaps = u32(1) + u32(0) + u64(nbytes) + u64(offset)
    path = tmp_path / "a.qcow2"
    path.write_bytes(image)
    reader = open_qcow2(poke(path, (88, u64(1)), (112, extension + bitmaps)))
    with pytest.raises(CorruptImageError, match="bitmap 0 lies outside its directory"):
        reader.info()
    problems = reader.check().problems
    assert any("ERROR bitmap directory: " in line for line in problems), problems
    reader.close()


def test_a_snapshot_table_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    qemu.run("snapshot", "-c", "first", path)
    monkeypatch.setattr("imgcore.limits.QCOW2_MAX_SNAPSHOT_TABLE_NBYTES", 40)
    reader = open_qcow2(path)
    with pytest.raises(LimitExceededError, match="snapshot table takes more than 40 bytes"):
        reader.info()
    reader.close()
