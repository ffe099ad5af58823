"""The check of VMDK tables: sound images are clean, each damage is reported."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import vmdk
from tests.helpers.images import noise, text
from tests.helpers.reading import poke
from tests.helpers.vmdk import GRAIN, SECTOR

import imgcore
from imgcore.formats.vmdk import check as vmdk_check

N_SECTORS = 20 * GRAIN // SECTOR
CONTENTS = {0: noise(GRAIN), 1: text(GRAIN), 7: noise(GRAIN, 3)}


def _hosted(folder: Path) -> Path:
    return vmdk.hosted(folder / "a.vmdk", N_SECTORS, CONTENTS)


def _stream(folder: Path) -> Path:
    return vmdk.stream(folder / "a.vmdk", N_SECTORS, CONTENTS)


@pytest.mark.parametrize("make", [_hosted, _stream])
def test_sound_images(tmp_path: Path, make: object) -> None:
    path = _hosted(tmp_path) if make is _hosted else _stream(tmp_path)
    report = imgcore.check(path)
    assert report.ok
    assert (report.total_clusters, report.allocated_clusters) == (20, 3)
    assert report.compressed_clusters == (0 if make is _hosted else 3)
    assert report.fragmented_clusters == (1 if make is _hosted else 0)
    assert 0 < report.image_end_offset <= path.stat().st_size


def _gte(number: int, value: int) -> tuple[tuple[int, bytes], ...]:
    """Change an entry in both grain tables of a hosted image."""
    raw = struct.pack("<I", value)
    return tuple((table * SECTOR + number * 4, raw) for table in (22, 27))


@pytest.mark.parametrize(
    ("changes", "corruptions", "leaks", "word"),
    [
        (_gte(3, 128), 1, 0, "sector 128 overlaps"),
        (_gte(3, 130), 2, 0, "overlaps"),
        (_gte(3, 0xFFFFFF), 1, 0, "grain 3 is at sector 16777215"),
        (_gte(3, 27), 2, 0, "sector 27 overlaps"),
        (_gte(1, 0), 0, 1, "1 grains from sector 256"),
        (_gte(7, 0), 0, 1, "1 grains from sector 384"),
        (((22 * SECTOR, struct.pack("<I", 0)),), 0, 1, "redundant grain table 0 differs"),
        (((21 * SECTOR, struct.pack("<I", 1 << 30)),), 1, 0, "grain table 0 is at sector"),
        (((26 * SECTOR, struct.pack("<I", 1 << 30)),), 1, 3, "grain table 0 is at sector"),
    ],
)
def test_damage(
    tmp_path: Path,
    changes: tuple[tuple[int, bytes], ...],
    corruptions: int,
    leaks: int,
    word: str,
) -> None:
    report = imgcore.check(poke(_hosted(tmp_path), *changes))
    assert (report.corruptions, report.leaks) == (corruptions, leaks), report.problems
    assert word in "\n".join(report.problems)


def test_leaked_grains_at_the_end(tmp_path: Path) -> None:
    path = _hosted(tmp_path)
    with open(path, "ab") as file:
        file.write(bytes(3 * GRAIN))
    assert imgcore.check(path).leaks == 3


def test_holes_of_the_file_are_not_leaked(tmp_path: Path) -> None:
    path = poke(_hosted(tmp_path), *_gte(7, 0))
    with open(path, "r+b") as file:
        file.seek(16 * GRAIN, os.SEEK_END)
        file.write(bytes(2 * GRAIN))
        file.truncate(file.tell() + 32 * GRAIN)
    # Two grains after the hole, and the one that no table names any more.
    assert imgcore.check(path).leaks == 3


def test_two_tables_at_one_place(tmp_path: Path) -> None:
    n_sectors = 1024 * GRAIN // SECTOR
    path = vmdk.hosted(tmp_path / "a.vmdk", n_sectors, CONTENTS)
    poke(path, (26 * SECTOR, struct.pack("<2I", 27, 28)), (21 * SECTOR, struct.pack("<2I", 22, 0)))
    report = imgcore.check(path)
    assert report.corruptions == 1
    assert "two grain tables overlap at sector 27" in report.problems[0]


@pytest.mark.parametrize(
    ("offset", "data", "word"),
    [
        (0, struct.pack("<Q", 128), "is for LBA 128, not for grain 0"),
        (8, struct.pack("<I", 0), "says 0 bytes"),
        (8, struct.pack("<I", 2 * GRAIN + 1), "says 131073 bytes"),
        (8, struct.pack("<I", 2 * GRAIN), "overlaps"),
    ],
)
def test_markers(tmp_path: Path, offset: int, data: bytes, word: str) -> None:
    path = poke(_stream(tmp_path), (128 * SECTOR + offset, data))
    report = imgcore.check(path)
    assert report.corruptions >= 1
    assert word in "\n".join(report.problems)


def test_unused_windows_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _hosted(tmp_path)
    windows: list[int] = []
    regions = vmdk_check._ExtentCheck._regions

    def counted(self: Any, low: int, high: int, *, count: bool) -> Any:
        windows.append(low)
        return regions(self, low, high, count=count)

    monkeypatch.setattr(vmdk_check._ExtentCheck, "_regions", counted)
    os.truncate(path, 5 << 40)
    report = imgcore.check(path)
    assert windows == [0]
    assert report.corruptions == 0
    assert report.leaks == 0


def test_all_problems_are_counted_and_few_are_listed(tmp_path: Path) -> None:
    n_sectors = 512 * 512 * GRAIN // SECTOR
    path = tmp_path / "a.vmdk"
    head = vmdk.header(n_sectors, gd=256, rgd=0, flags=1)
    text_ = vmdk.descriptor("monolithicSparse", f'RW {n_sectors} SPARSE "x"')
    directory = struct.pack("<512I", *range(512, 512 + 512 * 4, 4))
    image = bytearray()
    vmdk.put(image, 0, head + text_)
    vmdk.put(image, 256, directory)
    vmdk.put(image, 512, struct.pack("<I", 0xFFFFFF00) * (512 * 512))
    path.write_bytes(image)
    report = imgcore.check(path)
    assert report.corruptions == 512 * 512
    assert len(report.problems) == 1000


def test_zeroed_grains_are_not_counted(tmp_path: Path) -> None:
    contents: dict[int, bytes | int] = {0: noise(GRAIN), 3: 1}
    path = vmdk.hosted(tmp_path / "a.vmdk", N_SECTORS, contents, version=2, flags=7)
    report = imgcore.check(path)
    assert (report.corruptions, report.allocated_clusters) == (0, 1)


def test_more_regions_than_fit_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole file is one window, but 20 grains begin in the same sector."""
    contents: dict[int, bytes | int] = {0: noise(GRAIN), **dict.fromkeys(range(1, 20), 128)}
    path = vmdk.hosted(tmp_path / "a.vmdk", N_SECTORS, contents)
    monkeypatch.setattr(vmdk_check, "_MAX_REGIONS", 12)
    report = imgcore.check(path)
    assert report.allocated_clusters == 20
    assert any("sector 128 overlaps" in line for line in report.problems), report.problems


def test_a_window_without_sound_grains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, {0: noise(GRAIN)}, layout="front")
    monkeypatch.setattr(vmdk_check, "_MAX_REGIONS", 256)
    poke(path, (128 * SECTOR, struct.pack("<Q", 128)))
    report = imgcore.check(path)
    assert report.problems == [
        f"ERROR {path}: the marker at sector 128 is for LBA 128, not for grain 0"
    ]


def test_compressed_grains_without_markers(tmp_path: Path) -> None:
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, CONTENTS, layout="front")
    report = imgcore.check(poke(path, (8, struct.pack("<I", 0x10001))))
    assert (report.corruptions, report.compressed_clusters) == (0, 3)


def test_a_file_that_ends_within_its_last_sector(tmp_path: Path) -> None:
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, {0: b"A" * GRAIN}, layout="front")
    (nbytes,) = struct.unpack_from("<I", path.read_bytes(), 128 * SECTOR + 8)
    assert nbytes + 12 < SECTOR
    os.truncate(path, 128 * SECTOR + 12 + nbytes)
    assert imgcore.check(path).ok


@pytest.mark.parametrize(
    ("held", "word"),
    [(8, "is at sector"), (13, "ends past the end"), (500, "ends past the end"), (1024, "ends")],
)
def test_a_stream_that_is_cut_in_its_last_grain(tmp_path: Path, held: int, word: str) -> None:
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, {0: noise(GRAIN)}, layout="front")
    os.truncate(path, 128 * SECTOR + held)
    report = imgcore.check(path)
    assert report.corruptions == 1
    assert word in report.problems[0]
