"""Writing in place to VDI: slots, their count, the map, and what is refused."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import qemu, vdi
from tests.helpers.reading import poke
from tests.helpers.vdi import BLOCK, FREE, ZERO, fill

import imgcore
from imgcore.errors import CorruptImageError, OptionError
from imgcore.formats.api import Rebasable, Updater

KIB, MIB = 1 << 10, 1 << 20


def facts(path: Path) -> dict[str, Any]:
    """Return what is specific to the format."""
    found: dict[str, Any] = imgcore.info(path)["format-specific"]["data"]
    return found


def map_of(path: Path) -> list[int]:
    """Return the block map."""
    raw = path.read_bytes()
    offset = int.from_bytes(raw[vdi.OFF_MAP : vdi.OFF_MAP + 4], "little")
    n_blocks = int.from_bytes(raw[vdi.N_BLOCKS : vdi.N_BLOCKS + 4], "little")
    return list(struct.unpack_from(f"<{n_blocks}I", raw, offset))


def assert_sound(path: Path, *, by_qemu: bool = True) -> None:
    """Fail unless the map and the count fit, and nothing is leaked."""
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems
    used = [entry for entry in map_of(path) if entry < ZERO]
    assert sorted(used) == list(range(len(used)))
    assert facts(path)["allocated-blocks"] == len(used)
    if by_qemu:
        qemu.run("check", "-f", "vdi", path)


@pytest.fixture
def child(tmp_path: Path) -> Path:
    """Return a child that has nothing itself; its parent has the blocks 0 and 1."""
    parent = vdi.make(tmp_path / "base.vdi", [0, 1, FREE, FREE])
    path = tmp_path / "child.vdi"
    imgcore.create(path, backing=parent, backing_format="vdi")
    return path


def test_blocks_are_appended(tmp_path: Path) -> None:
    path = vdi.make(tmp_path / "a.vdi", [FREE, 0, FREE, ZERO])
    before = facts(path)
    with imgcore.open(path, mode="r+") as image:
        image.write(3 * BLOCK + 5, b"three")
        image.write(1, b"zero")
    assert map_of(path) == [2, 0, FREE, 1]
    after = facts(path)
    assert after["uuid"] == before["uuid"]
    assert after["modification-uuid"] != before["modification-uuid"]
    assert_sound(path)
    with imgcore.open(path) as image:
        assert image.read(0, 6) == b"\0zero\0"
        assert image.read(BLOCK, BLOCK) == fill(0)
        assert image.read(3 * BLOCK, 11) == bytes(5) + b"three\0"


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path = vdi.make(tmp_path / "a.vdi", [FREE, 0])
    before = path.read_bytes()
    with imgcore.open(path, mode="r+") as image:
        assert image.read(BLOCK, 1) == fill(0, 1)
    assert path.read_bytes() == before


def test_zeros_hide_the_parent(child: Path) -> None:
    with imgcore.open(child, mode="r+") as image:
        image.zero(0, BLOCK)
        image.zero(BLOCK + 10, 10)
        assert image.read(0, BLOCK) == bytes(BLOCK)
        assert image.read(BLOCK, 30) == fill(1, 10) + bytes(10) + fill(1, 10)
    assert map_of(child) == [ZERO, 0, FREE, FREE]
    assert_sound(child, by_qemu=False)


def test_zeros_give_back_space(tmp_path: Path) -> None:
    path = vdi.make(tmp_path / "a.vdi", [0, 1, 2, 3])
    before = path.stat().st_blocks
    with imgcore.open(path, mode="r+") as image:
        image.zero(0, 2 * BLOCK)
        image.discard(2 * BLOCK, BLOCK)
    assert path.stat().st_blocks * 512 <= before * 512 - 3 * BLOCK + 64 * KIB
    assert map_of(path) == [0, 1, 2, 3]
    assert_sound(path)


def test_slots_that_an_interrupted_writer_has_counted_are_used(tmp_path: Path) -> None:
    path = vdi.make(tmp_path / "a.vdi", [0, 2, FREE, FREE], n_allocated=5)
    assert imgcore.check(path).corruptions == 0
    with imgcore.open(path, mode="r+") as image:
        image.write(2 * BLOCK, b"a")
        assert image.read(2 * BLOCK, BLOCK) == b"a" + bytes(BLOCK - 1)
    assert map_of(path) == [0, 2, 1, FREE]
    assert_sound(path)


def test_a_slot_that_nobody_uses_is_filled(tmp_path: Path) -> None:
    path = vdi.make(tmp_path / "a.vdi", [0, 2, 4, FREE])
    with imgcore.open(path, mode="r+") as image:
        image.write(0, b"a")
        content = image.read(0, 4 * BLOCK)
    assert_sound(path)
    with imgcore.open(path) as image:
        assert image.read(0, 4 * BLOCK) == content


class TestResize:
    def test_a_map_without_room(self, tmp_path: Path) -> None:
        """QEMU puts the first block directly after the map."""
        path = tmp_path / "a.vdi"
        qemu.run("create", "-f", "vdi", path, "100M")
        chance = random.Random(1)
        first, last = chance.randbytes(3 * MIB), chance.randbytes(2 * MIB)
        with imgcore.open(path, mode="r+") as image:
            image.write(98 * MIB, last)
            image.write(0, first)
            image.resize(20 << 30)
            image.write((20 << 30) - 3, b"end")
            assert image.read(98 * MIB, 2 * MIB) == last
        assert_sound(path)
        assert imgcore.info(path)["virtual-size"] == 20 << 30
        with imgcore.open(path) as image:
            assert image.read(0, 4 * MIB) == first + bytes(MIB)
            assert image.read(98 * MIB, 4 * MIB) == last + bytes(2 * MIB)
            assert image.read((20 << 30) - 3, 3) == b"end"
        out = tmp_path / "out.qcow2"
        qemu.run("convert", "-f", "vdi", "-O", "qcow2", path, out)
        assert imgcore.compare(path, out).identical

    @pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
    def test_sizes(self, tmp_path: Path, subformat: str) -> None:
        raw, path = tmp_path / "a.raw", tmp_path / "a.vdi"
        model = bytearray(random.Random(1).randbytes(4 * MIB))
        raw.write_bytes(model)
        imgcore.convert(raw, path, options={"subformat": subformat})
        for nbytes in (7 * MIB + 512, 3 * MIB, 8 * MIB, MIB - 512, MIB, 9 * MIB):
            with imgcore.open(path, mode="r+") as image:
                image.resize(nbytes, shrink=True)
                del model[nbytes:]
                model.extend(bytes(nbytes - len(model)))
                assert image.read(0, nbytes) == model
            assert_sound(path)
            assert qemu.info(path, "vdi")["virtual-size"] == nbytes
        raw.write_bytes(model)
        qemu.run("compare", "-f", "raw", "-F", "vdi", raw, path)

    def test_a_smaller_disk_has_a_smaller_file(self, tmp_path: Path) -> None:
        path = vdi.make(tmp_path / "a.vdi", [3, 2, 1, 0])
        with imgcore.open(path, mode="r+") as image:
            image.resize(2 * BLOCK, shrink=True)
        assert path.stat().st_size == vdi.DATA_OFFSET + 2 * BLOCK
        assert_sound(path)
        with imgcore.open(path) as image:
            assert image.read(0, 2 * BLOCK) == fill(3) + fill(2)

    def test_a_child_keeps_its_size(self, child: Path) -> None:
        with imgcore.open(child, mode="r+") as image:
            with pytest.raises(OptionError, match="size of its parent"):
                image.resize(8 * BLOCK)


class TestParents:
    def test_stand_alone(self, child: Path) -> None:
        def alone(updater: Updater) -> None:
            assert isinstance(updater, Rebasable)
            updater.set_backing(None)

        with imgcore.open(child, mode="r+") as image:
            image.write(0, b"a" * 2 * BLOCK)
            image.restructure(alone)
            assert image.read(0, 4 * BLOCK) == b"a" * 2 * BLOCK + bytes(2 * BLOCK)
        assert facts(child)["subformat"] == "dynamic"
        assert_sound(child)

    def test_drop(self, child: Path) -> None:
        with imgcore.open(child, mode="r+") as image:
            image.write(0, b"a" * 4 * BLOCK)
            image._writing()[0].drop(0, 2 * BLOCK)
            assert image.read(0, 3 * BLOCK) == fill(0) + fill(1) + b"a" * BLOCK
        assert map_of(child)[:2] == [FREE, FREE]
        assert_sound(child, by_qemu=False)

    def test_a_child_of_a_changed_parent_is_refused(self, child: Path, tmp_path: Path) -> None:
        with imgcore.open(tmp_path / "base.vdi", mode="r+") as image:
            image.write(0, b"a")
        with pytest.raises(imgcore.ImgcoreError):
            imgcore.open(child)


@pytest.mark.parametrize(
    ("entries", "words"), [([0, 0, 1], "where another"), ([0, 9], "ends past the end")]
)
def test_hostile_entries(tmp_path: Path, entries: list[int], words: str) -> None:
    path = vdi.make(tmp_path / "a.vdi", entries)
    if entries == [0, 9]:
        with path.open("r+b") as file:
            file.truncate(vdi.DATA_OFFSET + BLOCK)
    before = path.read_bytes()
    with pytest.raises(CorruptImageError, match=words):
        imgcore.open(path, mode="r+")
    assert path.read_bytes() == before


def test_a_count_that_is_too_high_by_far(tmp_path: Path) -> None:
    """It makes no file grow."""
    path = vdi.make(tmp_path / "a.vdi", [0, FREE], n_allocated=0xFFFFFFF0)
    poke(path)
    with imgcore.open(path, mode="r+") as image:
        image.write(BLOCK, b"a")
    assert path.stat().st_size == vdi.DATA_OFFSET + 2 * BLOCK
    assert_sound(path)


def test_vbox_img_reads_what_was_written(tmp_path: Path) -> None:
    program = qemu.require_vbox_img()
    raw, path = tmp_path / "a.raw", tmp_path / "a.vdi"
    model = bytearray(random.Random(1).randbytes(4 * MIB))
    raw.write_bytes(model)
    imgcore.convert(raw, path)
    with imgcore.open(path, mode="r+") as image:
        image.resize(300 << 30)
        image.resize(9 * MIB + 512, shrink=True)
        image.write(8 * MIB, b"eight")
        model.extend(bytes(5 * MIB + 512))
        model[8 * MIB : 8 * MIB + 5] = b"eight"
    out = tmp_path / "out.raw"
    words = [program, "convert", "--srcformat", "VDI", "--dstformat", "RAW"]
    qemu.checked([*words, "--srcfilename", str(path), "--dstfilename", str(out)])
    assert out.read_bytes() == model
