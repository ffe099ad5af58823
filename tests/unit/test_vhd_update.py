"""Writing in place to VHD: where blocks, bits and footers are, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers import qemu, vhd
from tests.helpers.other_readers import assert_libvhdi_reads
from tests.helpers.reading import poke

import imgcore
from imgcore.errors import CorruptImageError, OptionError, UnsupportedFeatureError
from imgcore.formats.api import Rebasable, Updater

KIB, MIB = 1 << 10, 1 << 20
SECTOR = 512
BLOCK = 512 * KIB
STRIDE = BLOCK + 4 * KIB


def entries_of(path: Path) -> list[int]:
    """Return the BAT of an image."""
    with imgcore.open(path) as image:
        header = image.reader.header  # type: ignore[attr-defined]
    raw = path.read_bytes()[header.dynamic.table_offset :][: 4 * header.n_blocks]
    return [int.from_bytes(raw[at : at + 4], "big") for at in range(0, len(raw), 4)]


def bits_of(path: Path, block: int) -> set[int]:
    """Return the sectors that a block has."""
    raw = path.read_bytes()[entries_of(path)[block] * SECTOR :][: BLOCK // SECTOR // 8]
    return {n for n in range(len(raw) * 8) if raw[n // 8] & 0x80 >> n % 8}


def assert_sound(path: Path) -> None:
    """Fail unless both footers are the same, and nothing is leaked."""
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems
    raw = path.read_bytes()
    assert raw[:SECTOR] == raw[-SECTOR:]


def make(path: Path, content: bytes, **options: object) -> Path:
    """Write a VHD of a content."""
    raw = path.with_suffix(".raw")
    raw.write_bytes(content)
    imgcore.convert(raw, path, options={"block_size": "512k", **options})
    return path


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(4 * MIB)


@pytest.fixture
def child(tmp_path: Path, content: bytes) -> Path:
    """Return a child that has nothing itself."""
    parent = make(tmp_path / "base.vhd", content)
    path = tmp_path / "child.vhd"
    imgcore.create(path, backing=parent, backing_format="vhd", options={"block_size": "512k"})
    return path


class TestBlocks:
    def test_a_child_has_the_sectors_that_were_written(
        self, child: Path, content: bytes, tmp_path: Path
    ) -> None:
        with imgcore.open(child, mode="r+") as image:
            image.write(5 * SECTOR, b"a" * 2 * SECTOR)
            image.write(BLOCK + 100, b"b")
            image.zero(3 * BLOCK + SECTOR, SECTOR)
        assert bits_of(child, 0) == {5, 6}
        assert bits_of(child, 1) == {0}
        assert bits_of(child, 3) == {1}
        assert entries_of(child)[2] == vhd.ABSENT
        assert_sound(child)
        new = bytearray(content)
        new[5 * SECTOR : 7 * SECTOR] = b"a" * 2 * SECTOR
        new[BLOCK + 100 : BLOCK + 101] = b"b"
        new[3 * BLOCK + SECTOR : 3 * BLOCK + 2 * SECTOR] = bytes(SECTOR)
        raw = tmp_path / "new.raw"
        raw.write_bytes(new)
        assert imgcore.compare(raw, child).identical

    def test_libvhdi_reads_a_child(self, child: Path, content: bytes, tmp_path: Path) -> None:
        """It takes all sectors of a byte of the bitmap for one: 4 KiB are written."""
        chance = random.Random(3)
        new = bytearray(content)
        with imgcore.open(child, mode="r+") as image:
            for _ in range(40):
                at = chance.randrange(0, len(new), 4 * KIB)
                data = chance.randbytes(4 * KIB * chance.randint(1, 9))[: len(new) - at]
                image.write(at, data)
                new[at : at + len(data)] = data
        raw = tmp_path / "new.raw"
        raw.write_bytes(new)
        assert_libvhdi_reads(raw, child, tmp_path / "base.vhd", piece_nbytes=4 * KIB)

    def test_a_new_block_of_a_dynamic_disk_has_all_sectors(self, tmp_path: Path) -> None:
        path = make(tmp_path / "a.vhd", bytes(4 * MIB))
        with imgcore.open(path, mode="r+") as image:
            image.write(2 * BLOCK + SECTOR, b"a")
        assert bits_of(path, 2) == set(range(BLOCK // SECTOR))
        assert_sound(path)

    def test_sectors_that_a_dynamic_disk_lacks_are_added(self, tmp_path: Path) -> None:
        """Virtual PC sets the bits of those that were written only."""
        path = make(tmp_path / "a.vhd", b"x" * MIB)
        entry = entries_of(path)[0]
        poke(path, (entry * SECTOR, bytes(BLOCK // SECTOR // 8)))
        with imgcore.open(path, mode="r+") as image:
            assert image.read(0, BLOCK) == bytes(BLOCK)
            image.write(SECTOR + 1, b"a")
            assert image.read(0, 3 * SECTOR) == bytes(SECTOR + 1) + b"a" + bytes(2 * SECTOR - 2)
        assert bits_of(path, 0) == {1}

    def test_blocks_are_beside_their_neighbours(self, tmp_path: Path) -> None:
        path = make(tmp_path / "a.vhd", bytes(4 * MIB))
        with imgcore.open(path, mode="r+") as image:
            for at in range(0, 4 * MIB, 64 * KIB):
                image.write(at, b"a" * 64 * KIB)
        entries = entries_of(path)
        assert [entry - entries[0] for entry in entries] == [n * STRIDE // SECTOR for n in range(8)]
        assert (entries[0] * SECTOR + SECTOR) % 4096 == 0

    def test_zeros_give_back_space(self, tmp_path: Path, content: bytes) -> None:
        path = make(tmp_path / "a.vhd", content)
        before = path.stat().st_blocks
        with imgcore.open(path, mode="r+") as image:
            image.zero(0, 2 * MIB)
            image.discard(2 * MIB, MIB)
        assert path.stat().st_blocks * 512 <= before * 512 - 2 * MIB
        assert_sound(path)
        with imgcore.open(path) as image:
            assert image.read(0, 3 * MIB) == bytes(3 * MIB)

    def test_the_footer_moves_rarely(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from imgcore.files.update_file import UpdateFile

        path = tmp_path / "a.vhd"
        imgcore.create(path, 1 << 30)
        syncs: list[int] = []
        sync = UpdateFile.sync
        monkeypatch.setattr(UpdateFile, "sync", lambda file: (syncs.append(1), sync(file))[1])
        with imgcore.open(path, mode="r+") as image:
            begun = len(syncs)
            for at in range(0, 1 << 30, 2 * MIB):
                image.write(at, b"a")
            assert 1 <= len(syncs) - begun <= 12
        assert_sound(path)


class TestResize:
    @pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
    def test_sizes(self, tmp_path: Path, content: bytes, subformat: str) -> None:
        path = tmp_path / "a.vhd"
        raw = tmp_path / "a.raw"
        raw.write_bytes(content)
        imgcore.convert(raw, path, options={"subformat": subformat})
        model = bytearray(content)
        for nbytes in (7 * MIB + SECTOR, 3 * MIB, 8 * MIB, MIB - SECTOR, MIB, 9 * MIB):
            with imgcore.open(path, mode="r+") as image:
                image.resize(nbytes, shrink=True)
                del model[nbytes:]
                model.extend(bytes(nbytes - len(model)))
                assert image.read(0, nbytes) == model
            assert imgcore.check(path).ok
            info = qemu.info(path, "vpc")
            assert info["virtual-size"] == nbytes
        raw.write_bytes(model)
        assert imgcore.compare(raw, path).identical

    @pytest.mark.parametrize("batmap", [False, True])
    def test_the_table_moves_if_it_must(self, tmp_path: Path, batmap: bool) -> None:
        content = random.Random(2).randbytes(MIB) + bytes(59 * MIB)
        path = make(tmp_path / "a.vhd", content, batmap=batmap)
        with imgcore.open(path, mode="r+") as image:
            image.resize(16 << 30)
            image.write((16 << 30) - 3, b"end")
            image.write(59 * MIB, b"mid")
        assert_sound(path)
        with imgcore.open(path) as image:
            assert image.read(0, 59 * MIB) == content[: 59 * MIB]
            assert image.read(59 * MIB, 3) == b"mid"
            assert image.read((16 << 30) - 3, 3) == b"end"
        qemu.run("compare", "-f", "vpc", "-F", "vpc", path, path)
        out = tmp_path / "out.qcow2"
        qemu.run("convert", "-f", "vpc", "-O", "qcow2", path, out)
        assert imgcore.compare(path, out).identical
        if batmap:
            assert b"tdbatmap" in path.read_bytes()[-2 * MIB :]

    def test_a_smaller_disk_has_a_smaller_file(self, tmp_path: Path, content: bytes) -> None:
        path = make(tmp_path / "a.vhd", bytes(4 * MIB))
        with imgcore.open(path, mode="r+") as image:
            for at in range(7, -1, -1):  # the last block of the disk is the first in the file
                image.write(at * BLOCK, content[at * BLOCK : (at + 1) * BLOCK])
            image.resize(MIB, shrink=True)
        assert_sound(path)
        assert path.stat().st_size < 3 * BLOCK
        with imgcore.open(path) as image:
            assert image.read(0, MIB) == content[:MIB]

    def test_an_interrupted_change_of_the_footers_is_completed(self, tmp_path: Path) -> None:
        path = make(tmp_path / "a.vhd", b"x" * MIB)
        old = path.read_bytes()[:SECTOR]
        with imgcore.open(path, mode="r+") as image:
            image.resize(2 * MIB)
        poke(path, (0, old))
        report = imgcore.check(path)
        assert (report.corruptions, report.leaks) == (0, 0), report.problems
        with imgcore.open(path, mode="r+") as image:
            assert image.virtual_size == 2 * MIB
        assert_sound(path)

    def test_a_table_that_grows_onto_the_footer(self, tmp_path: Path) -> None:
        path = tmp_path / "a.vhd"
        # Its entries fill a sector, which the footer follows.
        imgcore.create(path, 256 * MIB)
        with imgcore.open(path, mode="r+") as image:
            image.resize(258 * MIB)
            image.write(257 * MIB, b"x" * MIB)
        with imgcore.open(path) as image:
            assert image.read(256 * MIB, 2 * MIB) == bytes(MIB) + b"x" * MIB
        assert path.stat().st_size < 8 * MIB
        assert_sound(path)

    def test_sizes_that_it_cannot_have(self, tmp_path: Path, child: Path) -> None:
        by_geometry = tmp_path / "chs.vhd"
        qemu.run("create", "-f", "vpc", by_geometry, "64M")
        with imgcore.open(by_geometry, mode="r+") as image:
            with pytest.raises(OptionError, match="is the next size that it can be") as caught:
                image.resize(100 * MIB)
            nbytes = int(str(caught.value).split("bytes: ")[1].split()[0])
            image.resize(nbytes)
        assert imgcore.info(by_geometry)["virtual-size"] == nbytes
        with imgcore.open(by_geometry, mode="r+") as image:
            with pytest.raises(OptionError, match="2040 GiB"):
                image.resize(3 << 40)
        with imgcore.open(child, mode="r+") as image:
            with pytest.raises(OptionError, match="size of its parent"):
                image.resize(8 * MIB)


class TestParents:
    def test_stand_alone_and_back(self, child: Path, content: bytes, tmp_path: Path) -> None:
        def alone(updater: Updater) -> None:
            assert isinstance(updater, Rebasable)
            updater.set_backing(None)

        with imgcore.open(child, mode="r+") as image:
            image.write(0, content[: len(content)])
            image.restructure(alone)
            assert image.read(0, len(content)) == content
        assert_sound(child)
        assert imgcore.info(child)["format-specific"]["data"]["subformat"] == "dynamic"
        raw = tmp_path / "base.raw"
        out = tmp_path / "out.raw"
        qemu.run("convert", "-f", "vpc", "-O", "raw", child, out)
        assert out.read_bytes() == raw.read_bytes()

    @pytest.mark.parametrize("batmap", [False, True])
    def test_drop(self, tmp_path: Path, content: bytes, batmap: bool) -> None:
        make(tmp_path / "base.vhd", content)
        child = tmp_path / "child.vhd"
        (tmp_path / "a.raw").write_bytes(b"a" * 6 * BLOCK + content[6 * BLOCK :])
        imgcore.convert(
            tmp_path / "a.raw",
            child,
            backing=tmp_path / "base.vhd",
            backing_format="vhd",
            options={"block_size": "512k", "batmap": batmap},
            sparse=0,  # whole blocks, which the batmap calls full
        )
        n_bytes = child.stat().st_blocks * 512
        expected = b"a" * BLOCK + content[BLOCK : 4 * BLOCK] + b"a" * 2 * BLOCK
        with imgcore.open(child, mode="r+") as image:
            image._writing()[0].drop(BLOCK, 3 * BLOCK)
            assert image.read(0, 6 * BLOCK) == expected
        assert_sound(child)
        with imgcore.open(child) as image:
            assert image.read(0, 6 * BLOCK) == expected
        assert child.stat().st_blocks * 512 <= n_bytes - 3 * BLOCK + 8 * KIB
        assert batmap or child.stat().st_size < 4 * BLOCK


def with_entry(block: int, sector: int) -> Callable[[Path], Path]:
    return lambda path: poke(path, (vhd.TABLE_OFFSET + 4 * block, sector.to_bytes(4, "big")))


@pytest.mark.parametrize(
    ("sector", "words"),
    [(0, "overlaps"), (2, "overlaps"), (7, "overlaps"), (None, "overlaps"), (1 << 30, "past")],
)
def test_hostile_entries(tmp_path: Path, content: bytes, sector: int | None, words: str) -> None:
    path = make(tmp_path / "a.vhd", content)
    if sector is None:
        sector = entries_of(path)[3] + 8
    with_entry(5, sector)(path)
    before = path.read_bytes()
    with pytest.raises(CorruptImageError, match=words):
        imgcore.open(path, mode="r+")
    assert path.read_bytes() == before


def test_tables_that_overlap_headers(tmp_path: Path, content: bytes) -> None:
    path = make(tmp_path / "a.vhd", content)
    for offset in (0, SECTOR, 2 * SECTOR, vhd.TABLE_OFFSET + 2):
        raw = bytearray(path.read_bytes()[SECTOR : SECTOR + 1024])
        raw[16:24] = offset.to_bytes(8, "big")
        raw[36:40] = vhd.checksum(bytes(raw), 36)
        poke(path, (SECTOR, bytes(raw)))
        before = path.read_bytes()
        with pytest.raises(CorruptImageError, match="must not overlap"):
            imgcore.open(path, mode="r+")
        assert path.read_bytes() == before


def test_blocks_that_another_size_shows_stay(tmp_path: Path) -> None:
    """By its geometry, the disk ends before some blocks of the BAT."""
    path = make(tmp_path / "a.vhd", b"x" * 4 * MIB)
    for at in (0, path.stat().st_size - SECTOR):
        raw = bytearray(path.read_bytes()[at : at + SECTOR])
        raw[28:32] = b"vpc "
        raw[56:60] = bytes((0, 30, 4, 17))
        raw[64:68] = vhd.checksum(bytes(raw), 64)
        poke(path, (at, bytes(raw)))
    with imgcore.open(path, mode="r+") as image:
        assert image.virtual_size == 30 * 4 * 17 * SECTOR
        image.write(0, b"y" * BLOCK)
    with imgcore.open(path, read_options={"size": "current"}) as image:
        assert image.read(0, 4 * MIB) == b"y" * BLOCK + b"x" * 7 * BLOCK


def test_a_failed_place_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    from imgcore.formats.vhd.block_updater import BlockUpdater

    path = make(tmp_path / "a.vhd", bytes(4 * MIB))
    take = BlockUpdater._take
    with imgcore.open(path, mode="r+") as image:
        with monkeypatch.context() as patch:

            def fail(updater: BlockUpdater, block: int) -> int:
                if block == 2:
                    raise OSError(28, "full")
                return take(updater, block)

            patch.setattr(BlockUpdater, "_take", fail)
            with pytest.raises(OSError, match="full"):
                image.write(0, content)
        image.write(3 * BLOCK, b"a")
    assert_sound(path)
    assert path.stat().st_size < 3 * STRIDE
    with imgcore.open(path) as image:
        assert image.read(0, 4 * MIB) == bytes(3 * BLOCK) + b"a" + bytes(5 * BLOCK - 1)


def test_a_saved_state_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a.vhd", bytes(MIB), subformat="dynamic")
    raw = bytearray(path.read_bytes()[:SECTOR])
    raw[84] = 1
    raw[64:68] = vhd.checksum(bytes(raw), 64)
    poke(path, (0, bytes(raw)), (path.stat().st_size - SECTOR, bytes(raw)))
    with pytest.raises(UnsupportedFeatureError, match="saved state"):
        imgcore.open(path, mode="r+")


def test_a_damaged_footer_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a.vhd", bytes(MIB))
    poke(path, (100, b"\1"))
    with pytest.raises(CorruptImageError, match="imgcore check --repair"):
        imgcore.open(path, mode="r+")
    imgcore.check(path, repair=True)
    imgcore.open(path, mode="r+").close()


@pytest.mark.parametrize("writes_first", [False, True])
def test_a_disk_of_qemu_shrinks_by_one_block(writes_first: bool, tmp_path: Path) -> None:
    """QEMU leaves nothing between blocks: a freed one is shorter than a slot."""
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.vhd"
    raw.write_bytes(random.Random(3).randbytes(6 * MIB))
    qemu.require_qemu_img()
    qemu.convert(raw, path, qemu.VHD_DYNAMIC)
    nbytes = path.stat().st_size
    with imgcore.open(path, mode="r+") as image:
        if writes_first:
            image.write(0, b"x")
        image.resize(4 * MIB, shrink=True)
        if writes_first:
            image.write(5, b"y")
    assert_sound(path)
    assert path.stat().st_size == nbytes - (2 * MIB + SECTOR)
