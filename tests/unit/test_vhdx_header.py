"""VHDX: damage in headers, region tables, metadata and locators."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import vhdx
from tests.helpers.reading import poke
from tests.helpers.vhdx import FULL, HEADERS, KIB, MIB, REGION_TABLES, Vhdx, pattern

import imgcore
from imgcore import CorruptImageError, LimitExceededError, UnsupportedFeatureError
from imgcore.limits import VHDX_MAX_LOCATOR_ENTRIES, VHDX_MAX_VIRTUAL_NBYTES

DISK = Vhdx(3 * MIB, blocks={0: (FULL, pattern(1, MIB))})
CHILD = Vhdx(3 * MIB, locator=vhdx.child_locator())
UNKNOWN = vhdx.guid(0xBAD)


def u16(value: int) -> bytes:
    return struct.pack("<H", value)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def refused(path: Path, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        imgcore.open(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


# Offset in both headers, bytes, error, words.
HEADER_FIELDS: dict[str, tuple[int, bytes, type[Exception], str]] = {
    "version-2": (66, u16(2), UnsupportedFeatureError, "VHDX version 2, supported is 1"),
    "version-0": (66, u16(0), UnsupportedFeatureError, "VHDX version 0"),
    "log-unaligned": (72, u64(MIB + 4096), CorruptImageError, "not aligned"),
    "log-length-odd": (68, u32(MIB + 512), CorruptImageError, "not aligned"),
    "log-on-the-bat": (72, u64(2 * MIB), CorruptImageError, "inside"),
    "log-over-all": (68, u32(0xFFF00000), CorruptImageError, "inside"),
}


@pytest.mark.parametrize(
    ("offset", "data", "error", "words"), HEADER_FIELDS.values(), ids=HEADER_FIELDS
)
def test_header_fields(
    tmp_path: Path, offset: int, data: bytes, error: type[Exception], words: str
) -> None:
    path = DISK.write(tmp_path / "a.vhdx")
    for place in HEADERS:
        vhdx.seal(poke(path, (place + offset, data)), place, 4096)
    refused(path, error, words)


REGION_FIELDS: dict[str, tuple[int, bytes, type[Exception], str]] = {
    "entries-2048": (8, u32(2048), CorruptImageError, "2048 entries, at most 2047"),
    "entries-4-billion": (8, u32(0xFFFFFFFF), CorruptImageError, "at most 2047 are allowed"),
    "entries-none": (8, u32(0), CorruptImageError, "has no metadata region"),
    "entries-one": (8, u32(1), CorruptImageError, "has no metadata region"),
    "same-guid": (48, vhdx.BAT.bytes_le, CorruptImageError, "the same GUID"),
    "unknown-required": (16, UNKNOWN.bytes_le, UnsupportedFeatureError, str(UNKNOWN)),
    "bat-unaligned": (32, u64(2 * MIB + 4096), CorruptImageError, "multiples of"),
    "bat-in-the-headers": (32, u64(0), CorruptImageError, "after the headers"),
    "bat-past-the-end": (32, u64(1 << 40), CorruptImageError, "BAT region ends at"),
    "bat-on-the-metadata": (32, u64(3 * MIB), CorruptImageError, "inside"),
    "bat-length-odd": (40, u32(4096), CorruptImageError, "multiples of"),
    "bat-length-0": (40, u32(0), CorruptImageError, "the BAT region has 0 bytes"),
    "metadata-past-the-end": (64, u64(1 << 62), CorruptImageError, "metadata region ends"),
}


@pytest.mark.parametrize(
    ("offset", "data", "error", "words"), REGION_FIELDS.values(), ids=REGION_FIELDS
)
def test_region_fields(
    tmp_path: Path, offset: int, data: bytes, error: type[Exception], words: str
) -> None:
    path = DISK.write(tmp_path / "a.vhdx")
    for place in REGION_TABLES:
        vhdx.seal(poke(path, (place + offset, data)), place, 64 * KIB)
    refused(path, error, words)


TABLE = vhdx.METADATA_OFFSET
# Offset in the file, bytes, error, words.
METADATA_FIELDS: dict[str, tuple[int, bytes, type[Exception], str]] = {
    "signature": (TABLE, b"metadat?", CorruptImageError, "starts with b'metadat"),
    "entries-2048": (TABLE + 10, u16(2048), CorruptImageError, "at most 2047 are allowed"),
    "entries-none": (TABLE + 10, u16(0), CorruptImageError, "no metadata item file parameters"),
    "entries-two": (TABLE + 10, u16(2), CorruptImageError, "no metadata item virtual disk ID"),
    "twice": (TABLE + 64, vhdx.FILE_PARAMETERS.bytes_le, CorruptImageError, "two metadata items"),
    "unknown": (TABLE + 32, UNKNOWN.bytes_le, UnsupportedFeatureError, str(UNKNOWN)),
    "known-as-user": (TABLE + 56, u32(5), UnsupportedFeatureError, str(vhdx.FILE_PARAMETERS)),
    "item-in-the-table": (TABLE + 48, u32(4096), CorruptImageError, "bytes after 0x10000"),
    "item-past-the-region": (TABLE + 48, u32(MIB - 4), CorruptImageError, "bytes after 0x10000"),
    "item-wraps": (TABLE + 48, u32(0xFFFFFFFC), CorruptImageError, "bytes after 0x10000"),
    "item-of-4-gib": (TABLE + 52, u32(0xFFFFFFFF), CorruptImageError, "allowed: at most"),
    "item-too-short": (TABLE + 52, u32(4), CorruptImageError, "has 4 bytes, 8 are needed"),
    "item-empty": (TABLE + 48, bytes(8), CorruptImageError, "has 0 bytes, 8 are needed"),
}


def _item_fields() -> dict[str, tuple[int, bytes, type[Exception], str]]:
    parameters, size = DISK.item_offset(vhdx.FILE_PARAMETERS), DISK.item_offset(vhdx.DISK_SIZE)
    logical, physical = DISK.item_offset(vhdx.LOGICAL), DISK.item_offset(vhdx.PHYSICAL)
    limit = VHDX_MAX_VIRTUAL_NBYTES
    return {
        **{
            f"block-size-{value:#x}": (parameters, u32(value), CorruptImageError, "block size is")
            for value in (0, 512, MIB // 2, 3 * MIB, MIB + 1, 512 * MIB, 0xFFFFFFFF)
        },
        **{
            f"{name}-sectors-{value}": (at, u32(value), CorruptImageError, f"{name} sector size")
            for name, at in (("logical", logical), ("physical", physical))
            for value in (0, 256, 1024, 8192, 0xFFFFFFFF)
        },
        "size-odd": (size, u64(MIB + 1), CorruptImageError, "not a multiple"),
        "size-65-tib": (size, u64(limit + 512), LimitExceededError, f"at most {limit}"),
        "size-petabytes": (
            size,
            u64((1 << 64) - 512),
            LimitExceededError,
            "at most 70368744177664",
        ),
        "size-64-tib": (size, u64(limit), CorruptImageError, "the BAT region has 1048576 bytes"),
        "parent-without-locator": (parameters + 4, u32(2), CorruptImageError, "no parent locator"),
    }


@pytest.mark.parametrize(
    ("offset", "data", "error", "words"),
    [*METADATA_FIELDS.values(), *_item_fields().values()],
    ids=[*METADATA_FIELDS, *_item_fields()],
)
def test_metadata_fields(
    tmp_path: Path, offset: int, data: bytes, error: type[Exception], words: str
) -> None:
    refused(poke(DISK.write(tmp_path / "a.vhdx"), (offset, data)), error, words)


AT = CHILD.item_offset(vhdx.LOCATOR)
LOCATOR_FIELDS: dict[str, tuple[int, bytes, type[Exception], str]] = {
    "other-type": (AT, UNKNOWN.bytes_le, UnsupportedFeatureError, str(UNKNOWN)),
    "no-entries": (AT + 18, u16(0), CorruptImageError, "does not name a file"),
    "more-entries-than-bytes": (AT + 18, u16(100), CorruptImageError, "need more"),
    "too-many-entries": (
        AT + 18,
        u16(VHDX_MAX_LOCATOR_ENTRIES + 1),
        LimitExceededError,
        f"at most {VHDX_MAX_LOCATOR_ENTRIES} are allowed",
    ),
    "key-outside": (AT + 20, u32(0xFFFFFFFF), CorruptImageError, "one of its texts ends at"),
    "value-outside": (AT + 24, u32(5000), CorruptImageError, "one of its texts ends at"),
    "key-twice": (AT + 32, u32(44) + u32(72) + u16(28), CorruptImageError, "twice"),
    "no-utf-16": (AT + 44, b"\x00\xd8\x00\xd8", CorruptImageError, "not valid UTF-16"),
    "no-guid": (AT + 72, "x".encode("utf-16-le"), CorruptImageError, "not a GUID"),
    "other-key": (AT + 44, "q".encode("utf-16-le"), CorruptImageError, "does not identify"),
}


@pytest.mark.parametrize(
    ("offset", "data", "error", "words"), LOCATOR_FIELDS.values(), ids=LOCATOR_FIELDS
)
def test_locator_fields(
    tmp_path: Path, offset: int, data: bytes, error: type[Exception], words: str
) -> None:
    refused(poke(CHILD.write(tmp_path / "a.vhdx"), (offset, data)), error, words)


class TestCopies:
    """One sound copy is enough; check reports and repairs the damaged one."""

    PLACES: tuple[tuple[str, int], ...] = (
        ("header 1", HEADERS[0]),
        ("header 2", HEADERS[1]),
        ("region table 1", REGION_TABLES[0]),
        ("region table 2", REGION_TABLES[1]),
    )
    DAMAGE: tuple[tuple[str, Callable[[int], tuple[int, bytes]]], ...] = (
        ("checksum", lambda place: (place + 4, b"\xff" * 4)),
        ("starts with", lambda place: (place, b"????")),
        ("checksum", lambda place: (place + 1000, b"x")),
    )

    @pytest.mark.parametrize(("name", "place"), PLACES)
    @pytest.mark.parametrize(("words", "damage"), DAMAGE)
    def test_one_is_damaged(
        self,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        name: str,
        place: int,
        words: str,
        damage: Any,
    ) -> None:
        path = poke(DISK.write(tmp_path / "a.vhdx"), damage(place))
        with caplog.at_level(logging.WARNING), imgcore.open(path) as image:
            assert image.read(0, 3 * MIB) == DISK.expected()
        assert any(name in record.getMessage() for record in caplog.records)
        report = imgcore.check(path)
        assert report.corruptions == 1
        assert name in report.problems[0]
        assert words in report.problems[0]
        report = imgcore.check(path, repair=True)
        assert report.corruptions == 0
        assert imgcore.check(path).ok
        raw = path.read_bytes()
        assert len({raw[offset + 8 : offset + 16] for offset in HEADERS}) == 2

    @pytest.mark.parametrize("places", [HEADERS, REGION_TABLES])
    def test_both_are_damaged(self, tmp_path: Path, places: tuple[int, int]) -> None:
        path = DISK.write(tmp_path / "a.vhdx")
        poke(path, *((place + 100, b"x") for place in places))
        refused(path, CorruptImageError, "has the checksum 0x.*; .* has the checksum 0x")

    @pytest.mark.parametrize("first", [1, 9])
    def test_the_higher_sequence_number_wins(self, tmp_path: Path, first: int) -> None:
        path = DISK.write(tmp_path / "a.vhdx")
        for place, sequence, name in ((HEADERS[0], first, 21), (HEADERS[1], 5, 22)):
            poke(path, (place + 8, u64(sequence)), (place + 32, vhdx.guid(name).bytes_le))
            vhdx.seal(path, place, 4096)
        data = imgcore.info(path)["format-specific"]["data"]
        assert data["data-write-guid"] == str(vhdx.guid(21 if first == 9 else 22))

    def test_equal_headers_are_one(self, tmp_path: Path) -> None:
        """Disk2vhd writes both with the sequence number 1."""
        path = DISK.write(tmp_path / "a.vhdx")
        poke(path, *((place, DISK.header(1)) for place in HEADERS))
        with imgcore.open(path) as image:
            assert image.virtual_size == 3 * MIB

    def test_two_headers_of_one_sequence_number(self, tmp_path: Path) -> None:
        path = DISK.write(tmp_path / "a.vhdx")
        poke(path, *((place, DISK.header(1)) for place in HEADERS))
        vhdx.seal(poke(path, (HEADERS[1] + 16, b"x")), HEADERS[1], 4096)
        refused(path, CorruptImageError, "both headers have the sequence number 1, but differ")

    def test_region_tables_that_differ(self, tmp_path: Path) -> None:
        path = DISK.write(tmp_path / "a.vhdx")
        vhdx.seal(poke(path, (REGION_TABLES[1] + 60, b"x")), REGION_TABLES[1], 64 * KIB)
        report = imgcore.check(path)
        assert report.corruptions == 1
        assert "region tables differ" in report.problems[0]


class TestUnknownThings:
    def test_optional_ones_do_no_harm(self, tmp_path: Path) -> None:
        disk = Vhdx(
            3 * MIB,
            blocks={0: (FULL, pattern(1, MIB))},
            extra_regions=[(UNKNOWN, 64 * MIB, MIB, 0)],
            extra_items=[(UNKNOWN, 0, b"of a program"), (vhdx.guid(5), 1, b"of a user")],
        )
        with imgcore.open(disk.write(tmp_path / "a.vhdx")) as image:
            assert image.read(0, 3 * MIB) == disk.expected()

    @pytest.mark.parametrize(
        "disk",
        [
            Vhdx(MIB, extra_regions=[(UNKNOWN, 64 * MIB, MIB, 1)]),
            Vhdx(MIB, extra_items=[(UNKNOWN, 4, b"x")]),
            Vhdx(MIB, extra_items=[(UNKNOWN, 5, b"x")]),
        ],
        ids=["region", "item", "user-item"],
    )
    def test_required_ones_are_refused_by_name(self, tmp_path: Path, disk: Vhdx) -> None:
        refused(disk.write(tmp_path / "a.vhdx"), UnsupportedFeatureError, str(UNKNOWN))


@pytest.mark.parametrize("nbytes", [8, 100, 64 * KIB, 64 * KIB + 4096, 200 * KIB, MIB, 3 * MIB])
def test_a_file_that_ends_early(tmp_path: Path, nbytes: int) -> None:
    path = DISK.write(tmp_path / "a.vhdx")
    with open(path, "r+b") as file:
        file.truncate(nbytes)
    refused(path, CorruptImageError, "past the end of the file")


def test_a_block_that_is_cut_off(tmp_path: Path) -> None:
    path = DISK.write(tmp_path / "a.vhdx")
    with open(path, "r+b") as file:
        file.truncate(5 * MIB - 512)
    with imgcore.open(path) as image, pytest.raises(CorruptImageError, match="past the end"):
        image.read(0, 512)


@pytest.mark.parametrize("change", [(68, u32(0)), (72, u64(0))])
def test_a_log_in_use_has_a_place(tmp_path: Path, change: tuple[int, bytes]) -> None:
    path = Vhdx(3 * MIB, log_guid=vhdx.guid(9)).write(tmp_path / "a.vhdx")
    for place in HEADERS:
        vhdx.seal(poke(path, (place + change[0], change[1])), place, 4096)
    refused(path, CorruptImageError, "must be replayed, but it is empty or inside the headers")


def test_a_locator_without_a_whole_header(tmp_path: Path) -> None:
    path = poke(CHILD.write(tmp_path / "a.vhdx"), (TABLE + 32 + 5 * 32 + 20, u32(19)))
    refused(path, CorruptImageError, "the parent locator has 19 bytes")


def test_a_file_too_large_to_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = DISK.write(tmp_path / "a.vhdx")
    monkeypatch.setattr("imgcore.limits.VHDX_MAX_FILE_NBYTES", path.stat().st_size - 1)
    with pytest.raises(LimitExceededError, match="can be checked"):
        imgcore.check(path)
