"""Checking VHDs: sound images have no problems; each damage is named; repairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers import vhd
from tests.helpers.images import noise
from tests.helpers.reading import poke
from tests.helpers.vhd import Block, be32, be64, poke_sound

import imgcore
from imgcore import limits

BLOCK = 8192
SECTOR = vhd.SECTOR
N_BLOCKS = 6
STRIDE = SECTOR + BLOCK
# The blocks' bitmaps are at sectors 4, 21 and 38; the footer is at sector 55.
BLOCKS = {0: Block(noise(BLOCK)), 1: Block(noise(BLOCK, 1)), 4: Block(noise(BLOCK, 4))}
END = 55 * SECTOR


def _dynamic(tmp_path: Path) -> Path:
    return vhd.dynamic(tmp_path / "a.vhd", N_BLOCKS * BLOCK, BLOCKS, block_nbytes=BLOCK)


def _entry(block: int, sector: int) -> tuple[int, bytes]:
    return vhd.TABLE_OFFSET + 4 * block, be32(sector)


def test_sound_image(tmp_path: Path) -> None:
    path = _dynamic(tmp_path)
    assert path.stat().st_size == END + SECTOR
    report = imgcore.check(path)
    assert report.ok
    assert (report.total_clusters, report.allocated_clusters) == (N_BLOCKS, 3)
    assert report.fragmented_clusters == 1
    assert report.image_end_offset == END


def test_empty_and_fixed(tmp_path: Path) -> None:
    empty = vhd.dynamic(tmp_path / "e.vhd", N_BLOCKS * BLOCK, {}, block_nbytes=BLOCK)
    assert imgcore.check(empty).ok
    fixed = imgcore.check(vhd.fixed(tmp_path / "f.vhd", bytes(BLOCK)))
    assert fixed.ok
    assert fixed.total_clusters == 0


@pytest.mark.parametrize(
    ("change", "corruptions", "leaks", "word"),
    [
        ((_entry(2, 4)), 1, 0, "block 2 at sector 4 overlaps block 0"),
        ((_entry(2, 30)), 2, 0, "overlaps block"),
        ((_entry(2, 39)), 1, 0, "block 2 at sector 39 ends past the end of the blocks (55)"),
        ((_entry(2, 0x00FFFFFF)), 1, 0, "block 2 at sector 16777215 ends past the end"),
        ((_entry(0, 0)), 3, 0, "block 0 at sector 0 overlaps the footer's copy"),
        ((_entry(0, 3)), 1, 0, "block 0 at sector 3 overlaps the BAT"),
        ((_entry(4, vhd.ABSENT)), 0, 1, "1 blocks from sector 38 on"),
        ((_entry(1, vhd.ABSENT)), 0, 1, "1 blocks from sector 21 on"),
        ((100, b"\x01"), 1, 0, "the footer at 0x0 states the checksum"),
        ((0, bytes(SECTOR)), 1, 0, "there is no footer at the start"),
        ((END + 90, b"\x01"), 1, 0, f"the footer at {END:#x} states the checksum"),
        ((END, bytes(SECTOR)), 1, 0, "there is no footer at the end"),
        ((0, vhd.footer(N_BLOCKS * BLOCK, timestamp=1)), 1, 0, "the footer and its copy"),
    ],
)
def test_damage(
    tmp_path: Path, change: tuple[int, bytes], corruptions: int, leaks: int, word: str
) -> None:
    report = imgcore.check(poke(_dynamic(tmp_path), change))
    assert (report.corruptions, report.leaks) == (corruptions, leaks), report.problems
    assert any(word in line for line in report.problems), report.problems


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ((8, be32(0)), "reserved feature bit"),
        ((512 + 8, be64(0)), "header states the data offset 0x0"),
    ],
)
def test_fields(tmp_path: Path, change: tuple[int, bytes], word: str) -> None:
    report = imgcore.check(vhd.poke_sound(_dynamic(tmp_path), change))
    assert report.corruptions == 1
    assert word in report.problems[0]


def test_table_off_a_sector(tmp_path: Path) -> None:
    path = _dynamic(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[1538:1562] = raw[1536:1560]
    path.write_bytes(raw)
    report = imgcore.check(vhd.poke_sound(path, (512 + 16, be64(1538))))
    assert report.problems == ["ERROR the BAT at 0x602 is not aligned to 512 bytes"]


def test_fixed_footer_with_a_header_place(tmp_path: Path) -> None:
    path = vhd.fixed(tmp_path / "f.vhd", bytes(BLOCK), data_offset=512)
    assert "states the data offset 0x200" in imgcore.check(path).problems[0]


def test_locator_outside_the_file(tmp_path: Path) -> None:
    path = vhd.differencing(tmp_path / "d.vhd", BLOCK, {}, {b"W2ru": "p.vhd".encode("utf-16-le")})
    assert imgcore.check(path).ok
    with pytest.raises(imgcore.CorruptImageError, match=r"W2ru parent locator ends at 0x"):
        imgcore.check(vhd.poke_sound(path, (512 + 576 + 16, be64(1 << 40))))


def test_too_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imgcore.formats.vhd.check.VHD_MAX_CHECKED_BLOCKS", N_BLOCKS)
    assert imgcore.check(_dynamic(tmp_path)).ok
    monkeypatch.setattr("imgcore.formats.vhd.check.VHD_MAX_CHECKED_BLOCKS", N_BLOCKS - 1)
    with pytest.raises(
        imgcore.LimitExceededError, match="a disk of 6 blocks, at most 5 can be checked"
    ):
        imgcore.check(_dynamic(tmp_path))
    assert limits.VHD_MAX_CHECKED_BLOCKS == 1 << 22


def _batmap_image(tmp_path: Path) -> Path:
    raw = tmp_path / "a.raw"
    raw.write_bytes(noise(3 << 20) + bytes(5 << 20))
    path = tmp_path / "b.vhd"
    imgcore.convert(raw, path, options=["batmap=on"])
    return path


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ((2560, b"\xc4"), "the batmap states the checksum"),
        ((2560, b"\xe0"), "the batmap marks block 2 as full, but it is absent"),
        ((2048 + 16, be32(0)), "is incomplete"),
        ((2048 + 8, be64(1 << 40)), "is incomplete"),
    ],
)
def test_batmap(tmp_path: Path, change: tuple[int, bytes], word: str) -> None:
    path = _batmap_image(tmp_path)
    assert imgcore.check(path).ok
    report = imgcore.check(poke(path, change))
    assert any(word in line for line in report.problems), report.problems


def test_a_batmap_that_is_missing(tmp_path: Path) -> None:
    """XenServer's VHDs may lack it, and may end before its offset."""
    bare = tmp_path / "bare.vhd"
    bare.write_bytes(_dynamic(tmp_path).read_bytes())
    poke_sound(bare, (28, b"tap\0"))
    assert imgcore.check(bare).ok
    path = _batmap_image(tmp_path)
    assert imgcore.check(poke(path, (2048, b"another."))).ok


def test_a_file_that_ends_before_its_batmap(tmp_path: Path) -> None:
    fields = {"creator": b"tap\0"}
    path = vhd.dynamic(tmp_path / "a.vhd", BLOCK, {}, block_nbytes=BLOCK, footer_fields=fields)
    path.write_bytes(path.read_bytes()[:-SECTOR])
    assert [line for line in imgcore.check(path).problems if "batmap" in line] == []


def test_one_of_two_locators_is_damaged(tmp_path: Path) -> None:
    names = {b"W2ru": "p.vhd".encode("utf-16-le"), b"W2ku": b"\x00\xd8"}
    report = imgcore.check(vhd.differencing(tmp_path / "d.vhd", BLOCK, {}, names))
    assert report.corruptions == 1
    assert "W2ku" in report.problems[0]


def _apply(path: Path) -> list[str]:
    """Apply the repairs; return their problems."""
    reader = vhd.open_vhd(path)
    repairs = reader.repairs()
    reader.close()
    for repair in repairs:
        with open(path, "r+b") as file:
            if repair.file_nbytes is not None:
                file.truncate(repair.file_nbytes)
            for offset, data in repair.writes:
                file.seek(offset)
                file.write(data)
    return [repair.problem for repair in repairs]


def _cut_footer(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-SECTOR])


def _make_old(path: Path) -> None:
    """Cut the footer to 511 bytes and damage it."""
    path.write_bytes(path.read_bytes()[:-1])
    poke(path, (END + 90, b"\x01"))


@pytest.mark.parametrize(
    ("damage", "word", "file_nbytes"),
    [
        (lambda path: poke(path, (END + 90, b"\x01")), "footer at 0x6e00 is damaged", None),
        (lambda path: poke(path, (END, bytes(SECTOR))), "no footer at the end", None),
        (_cut_footer, "no footer at the end", END + SECTOR),
        (_make_old, "footer at 0x6e00 is damaged", END + SECTOR - 1),
        (lambda path: poke(path, (100, b"\x01")), "copy at the start is missing or wrong", None),
        (
            lambda path: poke(path, (0, bytes(SECTOR))),
            "copy at the start is missing or wrong",
            None,
        ),
        (
            lambda path: poke(path, (0, vhd.footer(N_BLOCKS * BLOCK, timestamp=1))),
            "copy at the start is missing or wrong",
            None,
        ),
        (
            lambda path: poke(path, _entry(4, vhd.ABSENT)),
            "1 blocks after the last one are leaked",
            END + SECTOR - STRIDE,
        ),
    ],
)
def test_repairs(
    tmp_path: Path, damage: Callable[[Path], None], word: str, file_nbytes: int | None
) -> None:
    path = _dynamic(tmp_path)
    before = path.stat().st_size
    damage(path)
    with imgcore.open(path) as image:
        content = image.read(0, image.virtual_size)
    problems = _apply(path)
    assert len(problems) == 1
    assert word in problems[0]
    assert imgcore.check(path).ok
    assert path.stat().st_size == (before if file_nbytes is None else file_nbytes)
    with imgcore.open(path) as image:
        assert image.read(0, image.virtual_size) == content


@pytest.mark.parametrize("sector", [0, 30, 0x00FFFFFF])
def test_no_repair_where_blocks_are_doubtful(tmp_path: Path, sector: int) -> None:
    path = poke(_dynamic(tmp_path), _entry(2, sector), (END + 90, b"\x01"))
    assert _apply(path) == []


def test_nothing_to_repair(tmp_path: Path) -> None:
    assert _apply(_dynamic(tmp_path)) == []
    assert _apply(vhd.fixed(tmp_path / "f.vhd", bytes(BLOCK))) == []
