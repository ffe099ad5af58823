"""Reading VDI: damaged headers, extents of declared maps, parents by UUID, check."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import vdi
from tests.helpers.reading import extent_rows, poke
from tests.helpers.vdi import BLOCK, DATA_OFFSET, FREE, IDS, ZERO, fill, make, open_vdi

import imgcore
from imgcore import limits
from imgcore.engine.extents import Kind
from imgcore.errors import (
    CorruptImageError,
    LimitExceededError,
    OptionError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.formats.vdi import check as vdi_check
from imgcore.formats.vdi import parent as vdi_parent

MIB = 1 << 20


def le32(value: int) -> bytes:
    return struct.pack("<I", value)


def le64(value: int) -> bytes:
    return struct.pack("<Q", value)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make(tmp_path / "a.vdi", [1, FREE, 0, ZERO])


HEADER_DAMAGE: list[tuple[str, int, bytes, type[imgcore.ImgcoreError], str]] = [
    ("signature", vdi.SIGNATURE, le32(0xBEDA1070), WrongFormatError, "signature is not 0xbeda107f"),
    ("version 0", vdi.VERSION, le32(0x00000002), UnsupportedFeatureError, r"VDI version 0\.2, "),
    ("version 0.1", vdi.VERSION, le32(1), UnsupportedFeatureError, r"VDI version 0\.1, only 1\.1"),
    ("version 1.2", vdi.VERSION, le32(0x00010002), UnsupportedFeatureError, r"version 1\.2"),
    ("header size", vdi.HEADER_NBYTES, le32(383), CorruptImageError, "383 bytes, at least 384"),
    ("type 0", vdi.TYPE, le32(0), CorruptImageError, "unknown image type 0"),
    ("type 5", vdi.TYPE, le32(5), CorruptImageError, "unknown image type 5"),
    ("undo", vdi.TYPE, le32(3), UnsupportedFeatureError, "type undo"),
    ("no parent", vdi.TYPE, le32(4), CorruptImageError, "does not name its parent"),
    ("flags", vdi.FLAGS, le32(3), UnsupportedFeatureError, "flags 0x2"),
    ("map in header", vdi.OFF_MAP, le32(455), CorruptImageError, "0x1c7 lies in the header"),
    ("map over data", vdi.OFF_DATA, le32(527), CorruptImageError, "0x210, after the start"),
    ("map past end", vdi.OFF_MAP, le32(0xFFFFFF00), CorruptImageError, "start of the first block"),
    ("sectors", vdi.SECTOR_SIZE, le32(4096), UnsupportedFeatureError, "sectors of 4096 bytes"),
    ("LCHS", vdi.LCHS_SECTOR_SIZE, le32(1024), UnsupportedFeatureError, "sectors of 1024"),
    ("disk", vdi.DISK_SIZE, le64(4 * BLOCK + 1), CorruptImageError, "fit in 4 blocks of 1048576"),
    ("huge disk", vdi.DISK_SIZE, le64(2**64 - 1), LimitExceededError, "at most 9223372036"),
    ("block 0", vdi.BLOCK_SIZE, le32(0), LimitExceededError, "blocks of 0 bytes"),
    ("block odd", vdi.BLOCK_SIZE, le32(3 * MIB), LimitExceededError, "blocks of 3145728"),
    ("block small", vdi.BLOCK_SIZE, le32(32768), LimitExceededError, "from 65536 to 268435456"),
    ("block large", vdi.BLOCK_SIZE, le32(512 * MIB), LimitExceededError, "blocks of 536870912"),
    ("extra", vdi.BLOCK_EXTRA, le32(512), UnsupportedFeatureError, "512 bytes of extra data"),
    ("blocks", vdi.N_BLOCKS, le32(3), CorruptImageError, "in 3 blocks"),
    ("map too long", vdi.N_BLOCKS, le32(0x3FFFFFFF), CorruptImageError, "start of the first block"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("offset", "data", "kind", "words"),
    [row[1:] for row in HEADER_DAMAGE],
    ids=[row[0] for row in HEADER_DAMAGE],
)
def test_header_is_refused(
    image: Path, offset: int, data: bytes, kind: type[imgcore.ImgcoreError], words: str
) -> None:
    poke(image, (offset, data))
    with pytest.raises(kind, match=words) as caught:
        open_vdi(image)
    assert str(caught.value).startswith(f"{image}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (vdi.SECTOR_SIZE, le32(0)),
        (vdi.LCHS_SECTOR_SIZE, le32(0)),
        (vdi.FLAGS, le32(1)),
        (vdi.FLAGS, le32(0x100)),
        (vdi.N_ALLOCATED, le32(77)),  # for `check` to find
        (vdi.HEADER_NBYTES, le32(384) + le32(1)),
    ],
    ids=["sectors", "LCHS", "zero-expand", "zero-expand-vd", "allocated", "short-header"],
)
def test_header_is_accepted(image: Path, offset: int, data: bytes) -> None:
    reader = open_vdi(poke(image, (offset, data)))
    assert reader.virtual_size == 4 * BLOCK
    reader.close()


@pytest.mark.parametrize("nbytes", [0, 63, 71])
def test_no_room_for_a_signature(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / "a.vdi"
    path.write_bytes(bytes(nbytes))
    with pytest.raises(WrongFormatError):
        open_vdi(path)


@pytest.mark.parametrize(("nbytes", "words"), [(455, "header ends"), (520, "past the end")])
def test_truncated(image: Path, nbytes: int, words: str) -> None:
    with image.open("r+b") as file:
        file.truncate(nbytes)
    with pytest.raises(CorruptImageError, match=words):
        open_vdi(image)


@pytest.mark.parametrize(
    "nbytes", [limits.VDI_MIN_BLOCK_NBYTES, 512 * 1024, 4 * MIB], ids=["least", "512k", "4M"]
)
def test_block_sizes(tmp_path: Path, nbytes: int) -> None:
    path = make(tmp_path / "a.vdi", [1, FREE, 0], block=nbytes)
    with imgcore.open(path) as image:
        assert image.block_size == nbytes
        assert image.read(0, 3 * nbytes) == fill(1, nbytes) + bytes(nbytes) + fill(0, nbytes)


def test_largest_block(tmp_path: Path) -> None:
    path = make(tmp_path / "a.vdi", [FREE], block=BLOCK)
    poke(path, (vdi.BLOCK_SIZE, le32(limits.VDI_MAX_BLOCK_NBYTES)))
    with imgcore.open(path) as image:
        assert image.block_size == limits.VDI_MAX_BLOCK_NBYTES
        assert image.read(0, BLOCK) == bytes(BLOCK)


def test_free_and_discarded_blocks_are_kept_apart(image: Path) -> None:
    reader = open_vdi(image)
    assert extent_rows(reader) == [
        (0, BLOCK, DATA_OFFSET + BLOCK, BLOCK, 0, Kind.DATA, 0),
        (BLOCK, BLOCK, 0, 0, 0, Kind.HOLE, 0),
        (2 * BLOCK, BLOCK, DATA_OFFSET, BLOCK, 0, Kind.DATA, 0),
        (3 * BLOCK, BLOCK, 0, 0, 0, Kind.ZERO, 0),
    ]
    reader.close()


def test_neighbours_are_joined_and_cut(tmp_path: Path) -> None:
    path = make(tmp_path / "a.vdi", [0, 1, 2, FREE], virtual_size=3 * BLOCK + 512)
    reader = open_vdi(path)
    start, length = BLOCK + 512, 2 * BLOCK
    assert extent_rows(reader, start, length) == [
        (start, 2 * BLOCK - 512, DATA_OFFSET + start, 2 * BLOCK - 512, 0, Kind.DATA, 0),
        (3 * BLOCK, 512, 0, 0, 0, Kind.HOLE, 0),
    ]
    reader.close()


def test_entry_past_the_end_of_the_file(image: Path) -> None:
    poke(image, (vdi.MAP_OFFSET + 4, le32(2)))
    reader = open_vdi(image)
    with pytest.raises(CorruptImageError, match=r"block 1 is at 0x201000 \(entry 0x2\), past the"):
        extent_rows(reader)
    assert extent_rows(reader, 0, BLOCK)
    reader.close()


def test_file_that_ends_in_a_block(image: Path) -> None:
    with image.open("r+b") as file:
        file.truncate(DATA_OFFSET + 2 * BLOCK - 1)
    with pytest.raises(CorruptImageError, match="block 0 is at"), imgcore.open(image) as disk:
        disk.read(BLOCK - 1, 1)


def test_a_map_with_more_blocks_than_the_disk_has(tmp_path: Path) -> None:
    path = make(tmp_path / "a.vdi", [0, 77], virtual_size=512)
    with imgcore.open(path) as image:
        assert image.read(0, 512) == fill(0, 512)


def test_odd_disk_size_loses_its_last_bytes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(tmp_path / "a.vdi", [0], virtual_size=1025)
    reader = open_vdi(path)
    assert reader.virtual_size == 1024
    assert "last 1 bytes" in caplog.text
    reader.close()


def test_holes_of_a_fixed_image_are_zeros(tmp_path: Path) -> None:
    path = make(tmp_path / "a.vdi", [0, 1, 2], image_type=2)
    with path.open("r+b") as file:
        file.truncate(DATA_OFFSET)
        file.truncate(DATA_OFFSET + 3 * BLOCK)
        file.seek(DATA_OFFSET + BLOCK)
        file.write(fill(8))
    reader = open_vdi(path)
    assert reader.subformat == "fixed"
    assert [(row[0], row[1], row[5]) for row in extent_rows(reader)] == [
        (0, BLOCK, Kind.ZERO),
        (BLOCK, BLOCK, Kind.DATA),
        (2 * BLOCK, BLOCK, Kind.ZERO),
    ]
    reader.close()


def test_info(tmp_path: Path) -> None:
    path = make(tmp_path / "a.vdi", [0, FREE], uuids=[IDS[0], IDS[1], IDS[2], IDS[3]])
    poke(path, (vdi.COMMENT, b"von Hand"))
    answer = imgcore.info(path)
    assert answer["format"] == "vdi"
    assert answer["cluster-size"] == BLOCK
    assert answer["format-specific"]["data"] == {
        "subformat": "differencing",
        "uuid": str(IDS[0]),
        "modification-uuid": str(IDS[1]),
        "allocated-blocks": 1,
        "parent-uuid": str(IDS[2]),
        "parent-modification-uuid": str(IDS[3]),
        "comment": "von Hand",
    }


# -- parents ---------------------------------------------------------------------------


def child_of(path: Path, entries: list[int], parent: tuple[Any, Any], own: int = 4) -> Path:
    return make(path, entries, image_type=4, uuids=[IDS[own], IDS[own + 1], parent[0], parent[1]])


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A child of a child of a base, all in one folder, with other files beside them."""
    make(tmp_path / "base.vdi", [0, 1, 2, FREE])
    child_of(tmp_path / "middle.VDI", [FREE, 0, ZERO, FREE], (IDS[0], IDS[1]), own=2)
    make(tmp_path / "aside.vdi", [0], uuids=[IDS[7], IDS[7], None, None])
    (tmp_path / "broken.vdi").write_bytes(b"short")
    (tmp_path / "folder.vdi").mkdir()
    (tmp_path / "dangling.vdi").symlink_to("nowhere")
    return child_of(tmp_path / "top.vdi", [FREE, FREE, FREE, 0], (IDS[2], IDS[3]))


def test_parent_is_found_by_its_uuid(chain: Path) -> None:
    with imgcore.open(chain) as image:
        assert [Path(file.path).name for file in image.files] == [
            "top.vdi",
            "middle.VDI",
            "base.vdi",
        ]
        expected = fill(0) + fill(0) + bytes(BLOCK) + fill(0)
        assert image.read(0, 4 * BLOCK) == expected


def test_discarded_block_hides_the_parent(tmp_path: Path) -> None:
    make(tmp_path / "base.vdi", [0, 1])
    child = child_of(tmp_path / "child.vdi", [ZERO, FREE], (IDS[0], IDS[1]))
    with imgcore.open(child) as image:
        assert image.read(0, 2 * BLOCK) == bytes(BLOCK) + fill(1)


def test_parent_that_was_written_to(chain: Path) -> None:
    poke(chain.parent / "middle.VDI", (vdi.MODIFICATION_UUID, IDS[6].bytes_le))
    with pytest.raises(CorruptImageError, match="modification UUID .* was written to since"):
        imgcore.open(chain)


def test_of_two_copies_the_unchanged_one_is_taken(chain: Path) -> None:
    copy = chain.parent / "a-changed-copy.vdi"
    copy.write_bytes((chain.parent / "middle.VDI").read_bytes())
    poke(copy, (vdi.MODIFICATION_UUID, IDS[6].bytes_le))
    with imgcore.open(chain) as image:
        assert image.files[1].path.endswith("middle.VDI")


def test_parent_without_a_stated_modification(tmp_path: Path) -> None:
    make(tmp_path / "base.vdi", [0])
    child = child_of(tmp_path / "child.vdi", [FREE], (IDS[0], None))
    with imgcore.open(child) as image:
        assert image.read(0, 1) == fill(0, 1)


def test_parent_that_is_not_there(chain: Path) -> None:
    (chain.parent / "middle.VDI").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        imgcore.open(chain)
    assert f"{{{IDS[2]}}}.vdi" in str(caught.value)


def test_parent_in_an_allowed_folder(chain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (chain.parent / "base.vdi").rename(folder / "base.vdi")
    with pytest.raises(FileNotFoundError):
        imgcore.open(chain)
    with imgcore.open(chain, allow=[folder]) as image:
        assert image.read(0, 1) == fill(0, 1)


def test_parent_given(chain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    for name in ("middle.VDI", "base.vdi"):
        (chain.parent / name).rename(folder / name)
    with imgcore.open(chain, parent=folder / "middle.VDI") as image:
        assert image.read(3 * BLOCK, 1) == fill(0, 1)
    with pytest.raises(CorruptImageError, match="another disk"):
        imgcore.open(chain, parent=folder / "base.vdi")
    with pytest.raises(OptionError, match="has none"):
        imgcore.open(folder / "base.vdi", parent=chain)


def test_loop(tmp_path: Path) -> None:
    child_of(tmp_path / "a.vdi", [FREE], (IDS[4], IDS[5]), own=2)
    path = child_of(tmp_path / "b.vdi", [FREE], (IDS[2], IDS[3]))
    with pytest.raises(CorruptImageError, match="leads back"):
        imgcore.open(path)
    own = child_of(tmp_path / "own.vdi", [FREE], (IDS[6], IDS[7]), own=6)
    with pytest.raises(CorruptImageError, match="leads back"):
        imgcore.open(own)


def test_search_is_bounded(
    chain: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    names = sorted(p.name for p in chain.parent.iterdir() if p.suffix.lower() == ".vdi")
    monkeypatch.setattr(vdi_parent, "VDI_MAX_SEARCHED_FILES", len(names))
    imgcore.open(chain).close()
    assert not caplog.records
    n_files = names.index("middle.VDI")
    monkeypatch.setattr(vdi_parent, "VDI_MAX_SEARCHED_FILES", n_files)
    with pytest.raises(FileNotFoundError, match="--parent"):
        imgcore.open(chain)
    assert f"only {n_files} *.vdi files" in caplog.text
    assert imgcore.info(chain)["backing-filename"].endswith(".vdi")
    with imgcore.open(chain, parent=chain.parent / "middle.VDI") as image:
        assert image.read(3 * BLOCK, 1) == fill(0, 1)


# -- check -----------------------------------------------------------------------------


def test_check_of_a_sound_image(image: Path) -> None:
    result = imgcore.check(image)
    assert result.ok
    assert (result.total_clusters, result.allocated_clusters) == (4, 2)
    assert result.fragmented_clusters == 2
    assert result.image_end_offset == DATA_OFFSET + 2 * BLOCK


CHECKS: list[tuple[str, list[int], int | None, int, int, list[str]]] = [
    ("twice", [0, 0, 1], None, 1, 0, ["ERROR block 1 is at 0x1000, where another block is"]),
    ("thrice", [1, 1, 0, 1], None, 2, 0, ["ERROR block 1 is at 0x101000", "ERROR block 3 is"]),
    ("outside", [0, 9], None, 1, 0, ["ERROR block 1 is at 0x901000 and ends past the end"]),
    ("count low", [0, 1, ZERO], 1, 1, 0, ["ERROR the header counts 1 allocated blocks, the block"]),
    ("count", [0, FREE, ZERO], 3, 0, 2, ["Leaked blocks, 2: the header counts 3 allocated"]),
    ("leaked", [2, FREE, 0], None, 0, 1, ["Leaked blocks at 0x101000, 1: nothing"]),
    ("leaked run", [4, FREE, 1], None, 0, 3, ["blocks at 0x1000, 1: ", "at 0x201000, 2: "]),
    ("leaked end", [0, FREE], None, 0, 2, ["Leaked blocks at 0x101000, 2: nothing"]),
]  # fmt: skip


@pytest.mark.parametrize("window", [1 << 26, 1, 2], ids=["one-pass", "window-1", "window-2"])
@pytest.mark.parametrize(
    ("entries", "n_allocated", "corruptions", "leaks", "lines"),
    [row[1:] for row in CHECKS],
    ids=[row[0] for row in CHECKS],
)
def test_check_finds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    window: int,
    entries: list[int],
    n_allocated: int | None,
    corruptions: int,
    leaks: int,
    lines: list[str],
) -> None:
    monkeypatch.setattr(vdi_check, "_WINDOW_BLOCKS", window)
    path = make(tmp_path / "a.vdi", entries, n_allocated=n_allocated)
    if entries == [0, 9]:
        with path.open("r+b") as file:
            file.truncate(DATA_OFFSET + BLOCK)
    if entries == [0, FREE]:
        poke(path, (DATA_OFFSET + BLOCK, fill(1, 2 * BLOCK)))
        with path.open("r+b") as file:
            # A hole takes no space.
            file.truncate(DATA_OFFSET + 9 * BLOCK)
    result = imgcore.check(path)
    assert (result.corruptions, result.leaks) == (corruptions, leaks)
    if window > 2 or not leaks:
        assert len(result.problems) == len(lines)
        for problem, line in zip(result.problems, lines, strict=True):
            assert line in problem


def test_check_of_an_absurd_entry_is_quick(tmp_path: Path) -> None:
    """A sparse file of 8 TiB whose only entry is past its end."""
    path = make(tmp_path / "a.vdi", [ZERO - 1, FREE], block=64 * 1024)
    with path.open("r+b") as file:
        file.truncate(1 << 43)
    poke(path, ((1 << 43) - BLOCK, fill(1, BLOCK)))
    result = imgcore.check(path)
    assert result.corruptions == 1
    assert BLOCK // (64 * 1024) <= result.leaks < 10 * BLOCK // (64 * 1024)


class TestRepair:
    def test_a_wrong_count(self, tmp_path: Path) -> None:
        path = make(tmp_path / "a.vdi", [1, FREE, 0, ZERO], n_allocated=7)
        with imgcore.open(path) as image:
            content = image.read(0, 4 * BLOCK)
        result = imgcore.check(path, repair=True)
        assert result.ok
        assert (result.leaks_fixed, len(result.repairs)) == (5, 1)
        assert imgcore.info(path)["format-specific"]["data"]["allocated-blocks"] == 2
        with imgcore.open(path) as image:
            assert image.read(0, 4 * BLOCK) == content

    def test_leaked_blocks_at_the_end(self, tmp_path: Path) -> None:
        path = make(tmp_path / "a.vdi", [0, FREE, 1], n_allocated=4)
        with open(path, "ab") as file:
            file.write(bytes(2 * BLOCK))
        result = imgcore.check(path, repair=True)
        assert result.ok
        assert result.leaks_fixed == 2
        assert path.stat().st_size == DATA_OFFSET + 2 * BLOCK
        assert imgcore.check(path).ok

    def test_a_count_beside_a_gap_stays(self, tmp_path: Path) -> None:
        """With the count of the map, VirtualBox would write over a block in use."""
        path = make(tmp_path / "a.vdi", [0, 2], n_allocated=3)
        before = path.read_bytes()
        result = imgcore.check(path, repair=True)
        assert (result.corruptions, result.leaks, result.repairs) == (0, 1, [])
        assert path.read_bytes() == before

    def test_overlapping_blocks_stay(self, tmp_path: Path) -> None:
        path = make(tmp_path / "a.vdi", [0, 0], n_allocated=7)
        before = path.read_bytes()
        result = imgcore.check(path, repair=True)
        assert (result.corruptions, result.repairs) == (2, [])
        assert path.read_bytes() == before


def test_check_of_a_map_full_of_one_block_is_quick(tmp_path: Path) -> None:
    """A map that is a hole of the file: every entry is block 0."""
    path = make(tmp_path / "a.vdi", [0])
    n_blocks, data_offset = 1 << 22, 1 << 25
    with open(path, "r+b") as file:
        for offset, value in (
            (vdi.OFF_DATA, data_offset),
            (vdi.N_BLOCKS, n_blocks),
            (vdi.N_ALLOCATED, 1),
        ):
            file.seek(offset)
            file.write(value.to_bytes(4, "little"))
        file.seek(vdi.MAP_OFFSET)
        file.write(bytes(DATA_OFFSET - vdi.MAP_OFFSET + BLOCK))
        file.truncate(data_offset + BLOCK)
    result = imgcore.check(path)
    assert result.corruptions == n_blocks
    assert len(result.problems) == 1000


def test_more_blocks_than_can_be_checked(tmp_path: Path) -> None:
    path = make(tmp_path / "a.vdi", [0])
    with open(path, "r+b") as file:
        for offset, value in ((vdi.OFF_DATA, 1 << 29), (vdi.N_BLOCKS, (1 << 26) + 1)):
            file.seek(offset)
            file.write(value.to_bytes(4, "little"))
        file.truncate((1 << 29) + BLOCK)
    with pytest.raises(imgcore.LimitExceededError, match="at most 67108864 can be checked"):
        imgcore.check(path)


def test_other_files_beside_a_child_are_passed_over(chain: Path) -> None:
    (chain.parent / "0.vdi").write_bytes(b"no VDI" * 1000)
    (chain.parent / "short.vdi").write_bytes(b"x")
    with imgcore.open(chain) as image:
        assert image.read(0, 1)


def test_zeros_of_a_fixed_image(tmp_path: Path) -> None:
    path = vdi.make(tmp_path / "a.vdi", [0, vdi.ZERO, 1], image_type=2)
    with imgcore.open(path) as image:
        assert image.read(0, 3 * vdi.BLOCK) == vdi.fill(0) + bytes(vdi.BLOCK) + vdi.fill(1)


def test_an_allowed_folder_that_vanishes(chain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    reader = open_vdi(chain, [folder])
    folder.rmdir()
    assert reader.backing is not None
    assert reader.backing.name == "middle.VDI"
    reader.close()
