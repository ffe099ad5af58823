"""VHDX: blocks, bitmaps, parents and sector sizes of images made without the writer."""

from __future__ import annotations

import itertools
import random
import struct
from pathlib import Path

import pytest
from tests.helpers import images, qemu, vhdx
from tests.helpers.reading import extent_rows, open_file, poke
from tests.helpers.vhdx import FULL, MIB, PARTIAL, UNDEFINED, UNMAPPED, ZERO, Vhdx, pattern

import imgcore
from imgcore.engine.extents import Kind
from imgcore.formats.vhdx.reader import VhdxReader

ALL_STATES = {
    0: (FULL, pattern(1, MIB)),
    2: (ZERO, b""),
    3: (UNDEFINED, b""),
    4: (UNMAPPED, b""),
    5: (FULL, pattern(2, MIB)),
    6: (FULL, pattern(3, MIB)),
    8: (FULL, pattern(4, MIB)),
}


def open_vhdx(path: Path) -> VhdxReader:
    return open_file(path, VhdxReader)


def content(path: Path) -> bytes:
    with imgcore.open(path) as image:
        return image.read(0, image.virtual_size)


def random_sectors(n: int, seed: int) -> set[int]:
    """Return runs of sectors, long and short."""
    rng = random.Random(seed)
    own: set[int] = set()
    at = 0
    while at < n:
        length = rng.choice((1, 2, 7, 8, 9, 63, 200))
        if rng.random() < 0.5:
            own.update(range(at, min(at + length, n)))
        at += length
    return own


class TestStates:
    @pytest.mark.parametrize("size", [9 * MIB, 9 * MIB - 512, 8 * MIB + 512])
    def test_content(self, tmp_path: Path, size: int) -> None:
        disk = Vhdx(size, blocks=ALL_STATES)
        assert content(disk.write(tmp_path / "a.vhdx")) == disk.expected()

    def test_extents(self, tmp_path: Path) -> None:
        path = Vhdx(9 * MIB, blocks=ALL_STATES).write(tmp_path / "a.vhdx")
        reader = open_vhdx(path)
        rows = [(row[0] // MIB, row[1] // MIB, Kind(row[5])) for row in extent_rows(reader)]
        reader.close()
        assert rows == [
            (0, 1, Kind.DATA),
            (1, 1, Kind.HOLE),
            (2, 3, Kind.ZERO),
            (5, 1, Kind.DATA),
            (6, 1, Kind.DATA),  # after its neighbour on the disk, before it in the file
            (7, 1, Kind.HOLE),
            (8, 1, Kind.DATA),
        ]

    def test_extents_in_pieces_are_the_whole(self, tmp_path: Path) -> None:
        disk = Vhdx(9 * MIB - 512, blocks=ALL_STATES)
        path = disk.write(tmp_path / "a.vhdx")
        expected, rng = disk.expected(), random.Random(images.SEED)
        with imgcore.open(path) as image:
            for _ in range(40):
                offset = rng.randrange(disk.virtual_size)
                length = min(rng.choice((1, 512, 70_000, 3 * MIB)), disk.virtual_size - offset)
                assert image.read(offset, length) == expected[offset : offset + length]

    def test_blocks_beyond_one_chunk(self, tmp_path: Path) -> None:
        """Payload entries 4096 and 8192 follow the entries of bitmap blocks."""
        numbers = (0, 4095, 4096, 8191, 8192, 8200)
        blocks = {number: (FULL, pattern(number, MIB)) for number in numbers}
        path = Vhdx(8201 * MIB, blocks=blocks).write(tmp_path / "a.vhdx")
        with imgcore.open(path) as image:
            for number in numbers:
                assert image.read(number * MIB, MIB) == pattern(number, MIB)
            assert image.read(4097 * MIB, MIB) == bytes(MIB)
            assert sum(len(rows) for rows in image.extents()) == 9

    def test_a_block_larger_than_the_disk(self, tmp_path: Path) -> None:
        block = pattern(1, 4 * MIB)
        disk = Vhdx(3 * 512, block_nbytes=4 * MIB, blocks={0: (FULL, block)})
        assert content(disk.write(tmp_path / "a.vhdx")) == block[: 3 * 512]

    def test_no_sectors_at_all(self, tmp_path: Path) -> None:
        path = Vhdx(0).write(tmp_path / "a.vhdx")
        with imgcore.open(path) as image:
            assert image.virtual_size == 0


class TestSubformats:
    @pytest.mark.parametrize(
        ("disk", "name"),
        [
            (Vhdx(MIB), "dynamic"),
            (Vhdx(MIB, leave_allocated=True), "fixed"),
            (Vhdx(MIB, locator=vhdx.child_locator()), "differencing"),
            (Vhdx(MIB, locator=vhdx.child_locator(), leave_allocated=True), "differencing"),
        ],
    )
    def test_name(self, tmp_path: Path, disk: Vhdx, name: str) -> None:
        reader = open_vhdx(disk.write(tmp_path / "a.vhdx"))
        assert reader.subformat == name
        assert reader.info()["format-specific"]["data"]["subformat"] == name
        reader.close()


@pytest.mark.parametrize("logical", [512, 4096])
class TestSectorSizes:
    def test_content(self, tmp_path: Path, logical: int) -> None:
        disk = Vhdx(9 * MIB, blocks=ALL_STATES, logical=logical)
        path = disk.write(tmp_path / "a.vhdx")
        assert content(path) == disk.expected()
        with imgcore.open(path) as image:
            assert image.logical_sector_nbytes == logical

    def test_chunk_ratio(self, tmp_path: Path, logical: int) -> None:
        """A chunk has eight times as many blocks with 4096-byte sectors."""
        number = (1 << 23) * logical // (256 * MIB)
        block = b"in the second chunk".ljust(256 * MIB, b"\0")
        disk = Vhdx(
            (number + 1) * 256 * MIB,
            block_nbytes=256 * MIB,
            logical=logical,
            blocks={number: (FULL, block)},
        )
        path = disk.write(tmp_path / "a.vhdx")
        with imgcore.open(path) as image:
            assert image.read(number * 256 * MIB, 19) == b"in the second chunk"
            assert image.read((number - 1) * 256 * MIB, 19) == bytes(19)

    def test_bitmaps(self, tmp_path: Path, logical: int) -> None:
        parent, child = family(tmp_path, logical)
        assert content(tmp_path / "child.vhdx") == child.expected(parent.expected())

    def test_a_4096_byte_disk_stays_one(
        self, tmp_path: Path, logical: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        disk = Vhdx(9 * MIB, blocks=ALL_STATES, logical=logical)
        path = disk.write(tmp_path / "a.vhdx")
        imgcore.convert(path, tmp_path / "b.vhdx", sync=False)
        assert not caplog.records
        with imgcore.open(tmp_path / "b.vhdx") as image:
            assert image.logical_sector_nbytes == logical
        assert content(tmp_path / "b.vhdx") == disk.expected()
        imgcore.convert(path, tmp_path / "c.qcow2", sync=False)
        warned = [record.getMessage() for record in caplog.records]
        assert len(warned) == (1 if logical == 4096 else 0), warned


def family(folder: Path, logical: int = 512, block_nbytes: int = MIB) -> tuple[Vhdx, Vhdx]:
    """Write parent.vhdx and child.vhdx; the child has blocks of each state."""
    size = 9 * block_nbytes + 5 * logical
    n_sectors = block_nbytes // logical
    parent = Vhdx(
        size - block_nbytes,
        block_nbytes,
        logical,
        blocks={n: (FULL, pattern(100 + n, block_nbytes)) for n in (0, 1, 2, 3, 4, 5, 7)},
    )
    parent.write(folder / "parent.vhdx")
    child = Vhdx(
        size,
        block_nbytes,
        logical,
        locator=vhdx.child_locator(),
        data_guid=vhdx.guid(9),
        blocks={
            0: (PARTIAL, pattern(1, block_nbytes)),
            1: (PARTIAL, pattern(2, block_nbytes)),
            2: (ZERO, b""),
            3: (FULL, pattern(3, block_nbytes)),
            4: (PARTIAL, pattern(4, block_nbytes)),
            6: (PARTIAL, pattern(5, block_nbytes)),
            9: (PARTIAL, pattern(6, block_nbytes)),
        },
        own_sectors={
            0: random_sectors(n_sectors, 1),
            1: set(range(n_sectors)),
            4: {0, n_sectors - 1},
            6: set(),
            9: {0, 2, 4, 6},
        },
    )
    child.write(folder / "child.vhdx")
    return parent, child


class TestParents:
    def test_reads_of_any_range(self, tmp_path: Path) -> None:
        parent, child = family(tmp_path)
        expected, rng = child.expected(parent.expected()), random.Random(images.SEED)
        with imgcore.open(tmp_path / "child.vhdx") as image:
            for _ in range(60):
                offset = rng.randrange(child.virtual_size)
                length = min(rng.choice((1, 512, 9000, MIB)), child.virtual_size - offset)
                assert image.read(offset, length) == expected[offset : offset + length]

    def test_large_blocks_come_in_bounded_batches(self, tmp_path: Path) -> None:
        """The child has every other sector of 64 MiB: as many rows as sectors."""
        block_nbytes = 64 * MIB
        child = Vhdx(
            block_nbytes,
            block_nbytes,
            locator=vhdx.child_locator(),
            blocks={0: (PARTIAL, bytes(block_nbytes))},
            own_sectors={0: set(range(0, block_nbytes // 512, 2))},
        )
        reader = open_vhdx(child.write(tmp_path / "child.vhdx"))
        lengths = [len(batch) for batch in reader.extents(0, block_nbytes)]
        reader.close()
        assert sum(lengths) == block_nbytes // 512
        assert max(lengths) <= 1 << 17

    def test_a_chain_of_three(self, tmp_path: Path) -> None:
        parent, child = family(tmp_path)
        top = Vhdx(
            child.virtual_size,
            locator=vhdx.child_locator(r".\child.vhdx", child.data_guid),
            blocks={4: (PARTIAL, pattern(50, MIB)), 8: (FULL, pattern(51, MIB))},
            own_sectors={4: random_sectors(2048, 3)},
        )
        top.write(tmp_path / "top.vhdx")
        below = child.expected(parent.expected())
        assert content(tmp_path / "top.vhdx") == top.expected(below)
        imgcore.convert(tmp_path / "top.vhdx", tmp_path / "flat.raw", sync=False)
        assert (tmp_path / "flat.raw").read_bytes() == top.expected(below)

    @pytest.mark.parametrize(
        "locator",
        [
            {"relative_path": r".\gone\parent.vhdx"},
            {"volume_path": r"\\?\Volume{26a21bda-a627-11d7-9931-806e6f6e6963}\vm\parent.vhdx"},
            {"absolute_win32_path": r"\\?\D:\machines\parent.vhdx"},
            {"relative_path": r"..\other\x.vhdx", "absolute_win32_path": r"C:\a\parent.vhdx"},
        ],
        ids=lambda locator: ",".join(locator),
    )
    def test_names(self, tmp_path: Path, locator: dict[str, str]) -> None:
        parent, _ = family(tmp_path)
        linkage = {"parent_linkage": f"{{{vhdx.guid(1)}}}".upper()}
        child = Vhdx(parent.virtual_size, locator=linkage | locator)
        child.write(tmp_path / "child.vhdx")
        assert content(tmp_path / "child.vhdx") == parent.expected()

    @pytest.mark.parametrize(
        ("linkage", "linkage2", "fits"),
        [(1, None, True), (5, 1, True), (1, 5, True), (1, 0, True), (5, 0, False), (5, 6, False)],
    )
    def test_identity(self, tmp_path: Path, linkage: int, linkage2: int | None, fits: bool) -> None:
        parent, _ = family(tmp_path)
        locator = vhdx.child_locator(linkage=vhdx.guid(linkage))
        if linkage2 is not None:
            second = vhdx.guid(linkage2) if linkage2 else vhdx.NIL
            locator["parent_linkage2"] = f"{{{second}}}"
        path = Vhdx(parent.virtual_size, locator=locator).write(tmp_path / "child.vhdx")
        if fits:
            assert content(path) == parent.expected()
        else:
            with pytest.raises(imgcore.CorruptImageError, match="data write GUID"):
                imgcore.open(path)

    def test_a_parent_that_was_written_to(self, tmp_path: Path) -> None:
        parent, _ = family(tmp_path)
        parent.data_guid = vhdx.guid(77)
        parent.write(tmp_path / "parent.vhdx")
        with pytest.raises(imgcore.CorruptImageError, match="was written to since"):
            imgcore.open(tmp_path / "child.vhdx")
        with pytest.raises(imgcore.CorruptImageError, match="was written to since"):
            imgcore.open(tmp_path / "child.vhdx", parent=tmp_path / "parent.vhdx")

    def test_a_parent_of_other_sectors(self, tmp_path: Path) -> None:
        family(tmp_path)
        Vhdx(9 * MIB, logical=4096).write(tmp_path / "parent.vhdx")
        with pytest.raises(imgcore.CorruptImageError, match="logical sector size 512"):
            imgcore.open(tmp_path / "child.vhdx")

    def test_a_parent_that_is_missing(self, tmp_path: Path) -> None:
        family(tmp_path)
        (tmp_path / "parent.vhdx").rename(tmp_path / "elsewhere.vhdx")
        with pytest.raises(FileNotFoundError, match="parent.vhdx"):
            imgcore.open(tmp_path / "child.vhdx")
        with imgcore.open(tmp_path / "child.vhdx", parent=tmp_path / "elsewhere.vhdx") as image:
            assert len(image.layers) == 2

    def test_a_loop(self, tmp_path: Path) -> None:
        for name, other, own, theirs in (("a", "b", 1, 2), ("b", "a", 2, 1)):
            locator = vhdx.child_locator(rf".\{other}.vhdx", vhdx.guid(theirs))
            Vhdx(MIB, locator=locator, data_guid=vhdx.guid(own)).write(tmp_path / f"{name}.vhdx")
        with pytest.raises(imgcore.CorruptImageError, match="leads back to"):
            imgcore.open(tmp_path / "a.vhdx")

    def test_a_name_outside_the_folder(self, tmp_path: Path) -> None:
        inner = tmp_path / "inner"
        inner.mkdir()
        family(tmp_path)
        locator = vhdx.child_locator(r"..\parent.vhdx")
        Vhdx(MIB, locator=locator).write(inner / "child.vhdx")
        with pytest.raises(imgcore.UnsafeReferenceError, match="--allow"):
            imgcore.open(inner / "child.vhdx")
        with imgcore.open(inner / "child.vhdx", allow=[tmp_path]) as image:
            assert len(image.layers) == 2


# The first entries of the BAT, and the words of the error.
BAD_ENTRIES = {
    "past-the-end": (0xFFF00000_00006, "past the end of the file"),
    "petabytes": (0xFFFFFFFF_FFF00006, "past the end of the file"),
    "one-mib-too-far": (5 * MIB | 6, "past the end of the file"),
    "inside-the-headers": (6, "inside the headers"),
    "reserved-bits": (4 * MIB | 0x80 | 6, "reserved bits"),
    "reserved-state-4": (4 * MIB | 4, "reserved state 4"),
    "partial-without-parent": (4 * MIB | 7, "no parent"),
}


def test_unmapped_blocks_of_the_first_specification(tmp_path: Path) -> None:
    """State 5, which version 0.95 of the specification had, reads as zeros."""
    path = Vhdx(2 * MIB, blocks={1: (FULL, pattern(1, MIB))}).write(tmp_path / "a.vhdx")
    for entry in (5, 6 * MIB | 5):
        poke(path, (vhdx.BAT_OFFSET, struct.pack("<Q", entry)))
        imgcore.convert(path, tmp_path / "a.raw", force=True)
        assert (tmp_path / "a.raw").read_bytes() == bytes(MIB) + pattern(1, MIB)
        qemu.assert_same(tmp_path / "a.raw", path, source_format="raw", target_format="vhdx")
        assert not imgcore.check(path).corruptions


# Where the first of two blocks of 1 MiB is: on every other part of the file.
STRUCTURES = {
    "headers": (0, "the headers"),
    "log": (vhdx.LOG_OFFSET, "the log"),
    "bat": (vhdx.BAT_OFFSET, "the BAT region"),
    "metadata": (vhdx.METADATA_OFFSET, "the metadata region"),
    "other-region": (8 * MIB, "the region a0000000"),
    "block": (4 * MIB, "two blocks overlap at 0x400000"),
}


@pytest.mark.parametrize("block_nbytes", [MIB, 2 * MIB])
@pytest.mark.parametrize(("place", "words"), STRUCTURES.values(), ids=STRUCTURES)
def test_blocks_on_other_structures(
    tmp_path: Path, place: int, words: str, block_nbytes: int
) -> None:
    disk = Vhdx(2 * block_nbytes, block_nbytes, blocks={1: (FULL, pattern(1, block_nbytes))})
    disk.extra_regions = [(vhdx.guid(9), 8 * MIB, MIB, 0)]
    path = disk.write(tmp_path / "a.vhdx")
    with open(path, "r+b") as file:
        file.truncate(12 * MIB)
    # Blocks that start inside the structure, and before it.
    for start in range(place, max(place - block_nbytes, -1), -MIB):
        poke(path, (vhdx.BAT_OFFSET, struct.pack("<Q", start | 6)))
        with pytest.raises(imgcore.CorruptImageError, match="overlap|inside") as error:
            imgcore.convert(path, tmp_path / "a.raw")
        assert start != place or block_nbytes > MIB or words in str(error.value)
        assert not (tmp_path / "a.raw").exists()
        assert imgcore.check(path).corruptions


def test_a_block_on_a_sector_bitmap(tmp_path: Path) -> None:
    base = Vhdx(2 * MIB, blocks={0: (FULL, pattern(1, MIB))}).write(tmp_path / "base.vhdx")
    child = Vhdx(
        2 * MIB,
        blocks={0: (PARTIAL, pattern(2, MIB))},
        own_sectors={0: {1, 2}},
        locator=vhdx.child_locator("base.vhdx"),
    ).write(tmp_path / "child.vhdx")
    imgcore.convert(child, tmp_path / "a.raw")
    poke(child, (vhdx.BAT_OFFSET + 8, struct.pack("<Q", 4 * MIB | 6)))
    assert base.exists()
    with pytest.raises(imgcore.CorruptImageError, match="two blocks overlap at 0x400000"):
        imgcore.convert(child, tmp_path / "b.raw")


@pytest.mark.parametrize(("entry", "words"), BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_bad_entries(tmp_path: Path, entry: int, words: str) -> None:
    path = Vhdx(3 * MIB, blocks={1: (FULL, pattern(1, MIB))}).write(tmp_path / "a.vhdx")
    poke(path, (vhdx.BAT_OFFSET, struct.pack("<Q", entry)))
    with imgcore.open(path) as image, pytest.raises(imgcore.CorruptImageError, match=words) as e:
        image.read(0, 512)
    assert "block 0" in str(e.value)
    report = imgcore.check(path)
    assert report.corruptions
    assert words in report.problems[0]


@pytest.mark.parametrize("entry", [0, 4 * MIB | 7, 6, 1 << 60 | 6])
def test_bad_bitmap_entries(tmp_path: Path, entry: int) -> None:
    _, child = family(tmp_path)
    path = tmp_path / "child.vhdx"
    place = vhdx.BAT_OFFSET + 8 * child.bitmap_index(0)
    poke(path, (place, struct.pack("<Q", entry)))
    with imgcore.open(path) as image, pytest.raises(imgcore.CorruptImageError):
        image.read(0, 512)
    assert imgcore.check(path).corruptions >= 1


def test_an_empty_disk_of_64_tib_is_covered_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.vhdx"
    imgcore.create(path, 64 << 40, options={"block_size": MIB}, sync=False)
    with imgcore.open(path) as image:
        assert image.virtual_size == 64 << 40
        assert all((rows["kind"] == Kind.HOLE).all() for rows in image.extents())
        assert image.read((64 << 40) - 512, 512) == bytes(512)


def test_info_needs_no_numpy(tmp_path: Path) -> None:
    """Replaying a log does not do so either."""
    import subprocess
    import sys

    entry = vhdx.log_entry(1, 0, [(5 * MIB, bytes(4096))], log_guid=vhdx.guid(8))
    disk = Vhdx(MIB, log_guid=vhdx.guid(8), log=entry)
    path = disk.write(tmp_path / "a.vhdx")
    code = (
        "import sys, imgcore; info = imgcore.info(sys.argv[1]); "
        "assert 'numpy' not in sys.modules; assert info['dirty-flag']"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True, timeout=60)


def test_batches_are_gap_free(tmp_path: Path) -> None:
    _, child = family(tmp_path)
    reader = open_vhdx(tmp_path / "child.vhdx")
    rows = extent_rows(reader, 512, child.virtual_size - 1024)
    reader.close()
    assert rows[0][0] == 512
    assert all(a[0] + a[1] == b[0] for a, b in itertools.pairwise(rows))
    assert rows[-1][0] + rows[-1][1] == child.virtual_size - 512
