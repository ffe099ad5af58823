"""Writing VHDX: structures as in the specification, and reading them back."""

from __future__ import annotations

import os
import struct
import uuid
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import images, vhdx
from tests.helpers.vhdx import HEADERS, MIB, REGION_TABLES, crc32c

import imgcore
from imgcore import LimitExceededError, OptionError
from imgcore.engine.extents import Kind

GUIDS = {
    "virtual_disk_id": "11111111-2222-3333-4444-555555555555",
    "data_write_guid": "{66666666-7777-8888-9999-AAAAAAAAAAAA}",
    "file_write_guid": "bbbbbbbb-cccc-dddd-eeee-ffffffffffff",
}


def raw_disk(path: Path, size: int, *pieces: tuple[int, bytes]) -> Path:
    with open(path, "wb") as file:
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
        file.truncate(size)
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A disk with data in blocks 0, 3 and 9 of 1 MiB, and zeros written to block 5."""
    return raw_disk(
        tmp_path / "disk.raw",
        10 * MIB - 1536,
        (4096, images.noise(9000)),
        (3 * MIB, images.text(MIB)),
        (5 * MIB, bytes(MIB)),
        (9 * MIB + 512, b"the end"),
    )


def convert(source: Path, target: Path, **options: Any) -> Path:
    arguments = {key: options.pop(key) for key in ("backing", "sparse") if key in options}
    if "backing" in arguments:
        arguments["backing_format"] = "vhdx"
    imgcore.convert(source, target, options=options, sync=False, **arguments)
    return target


def bat(path: Path, n: int) -> list[int]:
    raw = path.read_bytes()
    (offset,) = struct.unpack_from("<Q", raw, REGION_TABLES[0] + 16 + 32 + 16)
    return list(struct.unpack_from(f"<{n}Q", raw, offset))


def assert_structure(path: Path) -> bytes:
    """Verify the parts that all images have, with the tests' own checksum."""
    raw = path.read_bytes()
    assert len(raw) % MIB == 0
    assert raw[:8] == b"vhdxfile"
    assert raw[8:520].decode("utf-16-le").startswith("imgcore ")
    for place, nbytes, signature in (
        *((place, 4096, b"head") for place in HEADERS),
        *((place, 65536, b"regi") for place in REGION_TABLES),
    ):
        piece = raw[place : place + nbytes]
        assert piece[:4] == signature
        (stored,) = struct.unpack_from("<I", piece, 4)
        assert stored == crc32c(piece[:4] + bytes(4) + piece[8:])
    first, second = (struct.unpack_from("<Q", raw, place + 8)[0] for place in HEADERS)
    assert first != second
    (version, log_nbytes, log_offset) = struct.unpack_from("<HIQ", raw, HEADERS[0] + 66)
    assert (version, log_nbytes, log_offset) == (1, MIB, MIB)
    assert raw[HEADERS[0] + 48 : HEADERS[0] + 64] == bytes(16)  # no log to replay
    assert raw[MIB : 2 * MIB] == bytes(MIB)
    assert raw[REGION_TABLES[0] :][:65536] == raw[REGION_TABLES[1] :][:65536]
    report = imgcore.check(path)
    assert report.ok, report.problems
    return raw


class TestDynamic:
    def test_blocks(self, tmp_path: Path, disk: Path) -> None:
        path = convert(disk, tmp_path / "a.vhdx", block_size=MIB)
        raw = assert_structure(path)
        entries = bat(path, 10)
        assert [entry & 7 for entry in entries] == [6, 0, 0, 6, 0, 0, 0, 0, 0, 6]
        places = [entry >> 20 << 20 for entry in entries if entry & 7 == 6]
        assert places == [4 * MIB, 5 * MIB, 6 * MIB]
        assert len(raw) == 7 * MIB  # the last block is whole, although the disk ends inside it
        assert imgcore.compare(disk, path).identical

    @pytest.mark.parametrize("block_size", [MIB, 2 * MIB, 32 * MIB, 256 * MIB])
    def test_block_sizes(self, tmp_path: Path, disk: Path, block_size: int) -> None:
        path = convert(disk, tmp_path / "a.vhdx", block_size=block_size)
        assert_structure(path)
        assert imgcore.compare(disk, path).identical
        assert imgcore.info(path)["cluster-size"] == block_size
        # Zeros inside blocks are holes of the file.
        assert path.stat().st_blocks * 512 < 2 * MIB

    def test_defaults(self, tmp_path: Path) -> None:
        imgcore.create(tmp_path / "a.vhdx", 64 * MIB, sync=False)
        info = imgcore.info(tmp_path / "a.vhdx")
        data = info["format-specific"]["data"]
        assert info["cluster-size"] == 32 * MIB
        assert data["subformat"] == "dynamic"
        assert (data["logical-sector-size"], data["physical-sector-size"]) == (512, 4096)
        guids = {data[name] for name in ("virtual-disk-id", "data-write-guid", "file-write-guid")}
        assert len(guids) == 3
        assert str(uuid.UUID(int=0)) not in guids

    def test_every_zero_is_written_if_asked_for(self, tmp_path: Path, disk: Path) -> None:
        path = convert(disk, tmp_path / "a.vhdx", block_size=MIB, sparse=0)
        assert [entry & 7 for entry in bat(path, 10)] == [6] * 10
        assert path.stat().st_blocks * 512 >= 9 * MIB
        assert imgcore.compare(disk, path).identical

    def test_blocks_beyond_one_chunk(self, tmp_path: Path) -> None:
        """A chunk has 4096 blocks of 1 MiB; the entry of a sector bitmap follows."""
        numbers = (0, 4095, 4096, 8191, 8192, 8200)
        pieces = [(n * MIB, f"block {n}".encode().ljust(512)) for n in numbers]
        disk = raw_disk(tmp_path / "disk.raw", 8201 * MIB, *pieces)
        path = convert(disk, tmp_path / "a.vhdx", block_size=MIB)
        entries = bat(path, 8203)
        used = [index for index, entry in enumerate(entries) if entry]
        assert used == [n + n // 4096 for n in numbers]
        assert imgcore.compare(disk, path).identical

    @pytest.mark.parametrize("size", [512, 512 * 3, MIB, MIB + 512])
    def test_small_disks(self, tmp_path: Path, size: int) -> None:
        disk = raw_disk(tmp_path / "disk.raw", size, (0, images.noise(size)))
        path = convert(disk, tmp_path / "a.vhdx")
        assert_structure(path)
        assert imgcore.compare(disk, path, strict=False).identical


class TestFixed:
    @pytest.mark.parametrize("block_size", [MIB, 8 * MIB])
    def test_blocks(self, tmp_path: Path, disk: Path, block_size: int) -> None:
        path = convert(disk, tmp_path / "a.vhdx", subformat="fixed", block_size=block_size)
        raw = assert_structure(path)
        n = -(-10 * MIB // block_size)
        assert bat(path, n) == [4 * MIB + i * block_size | 6 for i in range(n)]
        assert len(raw) == 4 * MIB + n * block_size
        assert imgcore.info(path)["format-specific"]["data"]["subformat"] == "fixed"
        assert imgcore.compare(disk, path).identical

    def test_an_empty_one_is_sparse(self, tmp_path: Path) -> None:
        options = {"subformat": "fixed"}
        imgcore.create(tmp_path / "a.vhdx", 1 << 40, options=options, sync=False)
        status = (tmp_path / "a.vhdx").stat()
        assert status.st_size == (1 << 40) + 4 * MIB
        assert status.st_blocks * 512 < 4 * MIB
        assert imgcore.check(tmp_path / "a.vhdx").allocated_clusters == 32768


class TestOptions:
    def test_guids_that_are_given(self, tmp_path: Path, disk: Path) -> None:
        a = convert(disk, tmp_path / "a.vhdx", **GUIDS)
        b = convert(disk, tmp_path / "b.vhdx", **GUIDS)
        assert a.read_bytes() == b.read_bytes()
        data = imgcore.info(a)["format-specific"]["data"]
        for name, text in GUIDS.items():
            assert data[name.replace("_", "-")] == text.strip("{}").lower()

    @pytest.mark.parametrize("logical", ["512", "4096"])
    @pytest.mark.parametrize("physical", ["512", "4096"])
    def test_sector_sizes(self, tmp_path: Path, logical: str, physical: str) -> None:
        disk = raw_disk(tmp_path / "disk.raw", 3 * MIB, (MIB, images.noise(5000)))
        path = convert(
            disk,
            tmp_path / "a.vhdx",
            logical_sector_size=logical,
            physical_sector_size=physical,
        )
        assert_structure(path)
        data = imgcore.info(path)["format-specific"]["data"]
        assert data["logical-sector-size"] == int(logical)
        assert data["physical-sector-size"] == int(physical)
        assert imgcore.compare(disk, path).identical

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"block_size": 512 * 1024}, "powers of two from 1048576 to 268435456"),
            ({"block_size": 3 * MIB}, "powers of two"),
            ({"block_size": 512 * MIB}, "powers of two"),
            ({"block_size": 0}, "powers of two"),
            ({"logical_sector_size": "1024"}, "512, 4096"),
            ({"physical_sector_size": "0"}, "512, 4096"),
            ({"subformat": "sparse"}, "dynamic, fixed"),
            ({"virtual_disk_id": "x"}, "virtual_disk_id is 'x': 32 hexadecimal digits"),
            ({"log_size": MIB}, "the log has 1 MiB"),
        ],
    )
    def test_bad_ones(
        self, tmp_path: Path, disk: Path, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(OptionError, match=words):
            convert(disk, tmp_path / "a.vhdx", **options)
        assert not (tmp_path / "a.vhdx").exists()

    def test_compression(self, tmp_path: Path, disk: Path) -> None:
        with pytest.raises(OptionError, match="cannot be compressed"):
            imgcore.convert(disk, tmp_path / "a.vhdx", compress=True)

    def test_a_size_between_sectors(self, tmp_path: Path, disk: Path) -> None:
        with pytest.raises(OptionError, match="multiples of its logical sector size 4096"):
            convert(disk, tmp_path / "a.vhdx", logical_sector_size="4096")

    def test_more_than_64_tib(self, tmp_path: Path) -> None:
        imgcore.create(tmp_path / "a.vhdx", 64 << 40, sync=False)
        with pytest.raises(LimitExceededError, match="70368744177664"):
            imgcore.create(tmp_path / "b.vhdx", (64 << 40) + 512, sync=False)


class TestDifferencing:
    def make(self, folder: Path, disk: Path, **options: Any) -> tuple[Path, Path]:
        """Write base.vhdx, and changed.raw, which differs in blocks 0, 3, 4 and 9."""
        convert(disk, folder / "base.vhdx", block_size=2 * MIB, **options)
        changed = bytearray(disk.read_bytes())
        changed[4096:4100] = b"new!"
        changed[3 * MIB : 4 * MIB] = bytes(MIB)
        changed[8 * MIB : 8 * MIB + 4] = b"more"
        return folder / "base.vhdx", raw_disk(folder / "changed.raw", len(changed), (0, changed))

    def test_blocks(self, tmp_path: Path, disk: Path) -> None:
        base, changed = self.make(tmp_path, disk)
        path = convert(changed, tmp_path / "top.vhdx", backing="base.vhdx", block_size=MIB)
        assert_structure(path)
        # Partly present, zero where the parent has data, not present if they are equal.
        assert [entry & 7 for entry in bat(path, 10)] == [7, 0, 0, 2, 0, 0, 0, 0, 7, 0]
        assert imgcore.compare(changed, path).identical
        data = imgcore.info(path)["format-specific"]["data"]
        of_base = imgcore.info(base)["format-specific"]["data"]
        assert data["parent-locator"] == {
            "parent_linkage": f"{{{of_base['data-write-guid']}}}",
            "relative_path": r".\base.vhdx",
        }
        assert data["virtual-disk-id"] == of_base["virtual-disk-id"]
        assert imgcore.info(path)["cluster-size"] == MIB

    def test_sector_sizes_are_the_parents(self, tmp_path: Path) -> None:
        disk = raw_disk(tmp_path / "disk.raw", 10 * MIB, (0, images.noise(MIB)))
        sizes = {"logical_sector_size": "4096", "physical_sector_size": "512"}
        _, changed = self.make(tmp_path, disk, logical_sector_size="4096")
        path = convert(changed, tmp_path / "top.vhdx", backing="base.vhdx")
        with imgcore.open(path) as image:
            assert image.logical_sector_nbytes == 4096
        assert imgcore.compare(changed, path).identical
        with pytest.raises(OptionError, match="the parent has 4096"):
            options = sizes | {"logical_sector_size": "512"}
            convert(changed, tmp_path / "no.vhdx", backing="base.vhdx", **options)

    def test_a_parent_with_a_colon(self, tmp_path: Path, disk: Path) -> None:
        convert(disk, tmp_path / "a:b.vhdx")
        with pytest.raises(OptionError, match="no backslash, no colon"):
            convert(disk, tmp_path / "top.vhdx", backing="./a:b.vhdx")
        assert not (tmp_path / "top.vhdx").exists()

    def test_a_parent_whose_name_is_not_utf_8(self, tmp_path: Path, disk: Path) -> None:
        name = os.fsdecode(b"p\xff.vhdx")
        convert(disk, tmp_path / name)
        with pytest.raises(OptionError, match="not encodable in UTF-16"):
            convert(disk, tmp_path / "top.vhdx", backing=name)
        assert not (tmp_path / "top.vhdx").exists()

    def test_a_parent_elsewhere(self, tmp_path: Path, disk: Path) -> None:
        _, changed = self.make(tmp_path, disk)
        folder = tmp_path / "inner" / "most"
        folder.mkdir(parents=True)
        for name in ("../../base.vhdx", str(tmp_path / "base.vhdx")):
            path = folder / "top.vhdx"
            path.unlink(missing_ok=True)
            imgcore.convert(
                changed, path, backing=name, backing_format="vhdx", allow=[tmp_path], sync=False
            )
            data = imgcore.info(path)["format-specific"]["data"]
            assert data["parent-locator"]["relative_path"] == r"..\..\base.vhdx"
            assert imgcore.compare(changed, path, allow=[tmp_path]).identical

    def test_create(self, tmp_path: Path, disk: Path) -> None:
        self.make(tmp_path, disk)
        imgcore.create(
            tmp_path / "top.vhdx", backing="base.vhdx", backing_format="vhdx", sync=False
        )
        assert imgcore.compare(disk, tmp_path / "top.vhdx").identical
        assert imgcore.check(tmp_path / "top.vhdx").allocated_clusters == 0

    def test_a_parent_that_was_written_to_is_refused(self, tmp_path: Path, disk: Path) -> None:
        _, changed = self.make(tmp_path, disk)
        convert(changed, tmp_path / "top.vhdx", backing="base.vhdx")
        (tmp_path / "base.vhdx").unlink()
        convert(disk, tmp_path / "base.vhdx")
        with pytest.raises(imgcore.CorruptImageError, match="was written to since"):
            imgcore.open(tmp_path / "top.vhdx")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"subformat": "fixed"}, "cannot have a parent"),
            ({"block_size": 8 * MIB}, "powers of two from 1048576 to 4194304 with a parent"),
        ],
    )
    def test_bad_options(
        self, tmp_path: Path, disk: Path, options: dict[str, Any], words: str
    ) -> None:
        _, changed = self.make(tmp_path, disk)
        with pytest.raises(OptionError, match=words):
            convert(changed, tmp_path / "top.vhdx", backing="base.vhdx", **options)

    def test_a_parent_of_another_format(self, tmp_path: Path, disk: Path) -> None:
        imgcore.convert(disk, tmp_path / "base.qcow2", sync=False)
        with pytest.raises(OptionError, match="the parent of a vhdx image must be vhdx, not qcow2"):
            imgcore.convert(
                disk, tmp_path / "top.vhdx", backing="base.qcow2", backing_format="qcow2"
            )


class TestMeasure:
    @pytest.mark.parametrize("options", [{}, {"block_size": MIB}, {"subformat": "fixed"}])
    def test_it_is_what_comes(self, tmp_path: Path, disk: Path, options: dict[str, Any]) -> None:
        measured = imgcore.measure(disk, target_format="vhdx", options=options)
        path = convert(disk, tmp_path / "a.vhdx", **options)
        n_blocks = -(-disk.stat().st_size // imgcore.info(path)["cluster-size"])
        whole = 4 * MIB + n_blocks * imgcore.info(path)["cluster-size"]
        assert measured.fully_allocated == whole
        assert path.stat().st_size <= measured.required <= whole

    def test_64_tib(self) -> None:
        measured = imgcore.measure(size=64 << 40, target_format="vhdx")
        # 2^21 entries, and one for each chunk of 128 blocks except the last.
        bat_nbytes = -(-((1 << 21) + (1 << 14) - 1) * 8 // MIB) * MIB
        assert measured.required == 3 * MIB + bat_nbytes


@pytest.mark.parametrize("target", ["a.qcow2", "b.vhdx"])
def test_an_empty_disk_of_64_tib_there_and_back(tmp_path: Path, target: str) -> None:
    first = tmp_path / "first.vhdx"
    imgcore.create(first, 64 << 40, sync=False)
    options = {"cluster_size": "2M"} if target.endswith("qcow2") else {}
    imgcore.convert(first, tmp_path / target, options=options, sync=False)
    back = convert(tmp_path / target, tmp_path / "back.vhdx", block_size=MIB)
    assert back.stat().st_blocks * 512 < 2 * MIB
    with imgcore.open(back) as image:
        assert image.virtual_size == 64 << 40
        assert all((rows["kind"] == Kind.HOLE).all() for rows in image.extents())


class TestCheck:
    def write(self, path: Path, *entries: int) -> Path:
        """Write an image of four blocks from 4 MiB on, its first entries replaced."""
        blocks = {n: (vhdx.FULL, vhdx.pattern(n, 2 * MIB)) for n in range(4)}
        vhdx.Vhdx(8 * MIB, 2 * MIB, blocks=blocks).write(path)
        with open(path, "r+b") as file:
            file.seek(vhdx.BAT_OFFSET)
            file.write(struct.pack(f"<{len(entries)}Q", *entries))
        return path

    @pytest.mark.parametrize(
        ("entries", "n", "words"),
        [
            ((4 * MIB | 6,), 2, "block 0 at 0x400000 overlaps"),
            ((5 * MIB | 6,), 3, "block 0 at 0x500000 overlaps"),
            ((2 * MIB | 6,), 1, "block 0 at 0x200000 overlaps"),
            ((MIB | 6,), 1, "block 0 at 0x100000 overlaps"),
            ((4 * MIB | 1,), 2, "block 0 at 0x400000 overlaps"),
            ((4 * MIB | 3,), 2, "block 0 at 0x400000 overlaps"),
        ],
        ids=["same", "shifted", "bat", "log", "undefined", "unmapped"],
    )
    def test_overlaps(self, tmp_path: Path, entries: tuple[int, ...], n: int, words: str) -> None:
        report = imgcore.check(self.write(tmp_path / "a.vhdx", *entries))
        assert report.corruptions == n
        assert any(words in line for line in report.problems)

    def test_leaks(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.vhdx", 0)
        report = imgcore.check(path)
        assert (report.corruptions, report.leaks) == (0, 2)
        assert report.image_end_offset == 10 * MIB
        assert imgcore.check(path, repair=True).ok
        assert path.stat().st_size == 10 * MIB

    def test_free_space_between_blocks_is_no_leak(self, tmp_path: Path) -> None:
        path = self.write(tmp_path / "a.vhdx", 10 * MIB | 6, 0)
        assert imgcore.check(path).ok
        assert imgcore.check(path, repair=True).repairs == []

    @pytest.mark.parametrize(("file_mib", "n_leaks"), [(4, 0), (8, 0), (9, 5), (20, 16)])
    def test_what_qemu_keeps_in_front_of_blocks(
        self, tmp_path: Path, file_mib: int, n_leaks: int
    ) -> None:
        path = vhdx.Vhdx(8 * MIB).write(tmp_path / "a.vhdx")
        with open(path, "r+b") as file:
            file.truncate(file_mib * MIB)
        assert imgcore.check(path).leaks == n_leaks
        assert imgcore.check(path, repair=True).ok
        assert path.stat().st_size == (4 if n_leaks else file_mib) * MIB

    def test_a_fixed_disk_keeps_its_room(self, tmp_path: Path) -> None:
        """As QEMU writes them: the file has room for all blocks, entries are ZERO."""
        blocks = {0: (vhdx.FULL, vhdx.pattern(0, MIB)), 3: (vhdx.ZERO, b"")}
        path = vhdx.Vhdx(8 * MIB, blocks=blocks, leave_allocated=True).write(tmp_path / "a.vhdx")
        for file_mib, n_leaks in ((11, 0), (12, 0), (14, 2)):
            with open(path, "r+b") as file:
                file.truncate(file_mib * MIB)
            assert imgcore.check(path).leaks == n_leaks
        assert imgcore.check(path, repair=True).ok
        assert path.stat().st_size == 12 * MIB

    @pytest.mark.parametrize("state", [1, 2, 3])
    def test_space_that_a_block_keeps_is_no_leak(self, tmp_path: Path, state: int) -> None:
        path = self.write(tmp_path / "a.vhdx", 10 * MIB | state)
        assert imgcore.check(path).ok

    def test_windows(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The result is the same in pieces of five units."""
        from imgcore.formats.vhdx import check as vhdx_check

        for entries in ((5 * MIB | 6,), (10 * MIB | 6,), (4 * MIB | 6, 8 * MIB | 6)):
            path = self.write(tmp_path / "a.vhdx", *entries)
            whole = imgcore.check(path)
            with monkeypatch.context() as patch:
                patch.setattr(vhdx_check, "WINDOW_UNITS", 5)
                pieces = imgcore.check(path)
            assert (pieces.corruptions > 0) == (whole.corruptions > 0)
            assert pieces.image_end_offset == whole.image_end_offset

    def test_a_bitmap_in_a_disk_without_parent(self, tmp_path: Path) -> None:
        disk = vhdx.Vhdx(8193 * MIB)
        path = disk.write(tmp_path / "a.vhdx")
        with open(path, "r+b") as file:
            file.truncate(5 * MIB)
            file.seek(vhdx.BAT_OFFSET + 8 * disk.bitmap_index(0))
            file.write(struct.pack("<Q", 4 * MIB | 6))
        report = imgcore.check(path)
        assert report.corruptions == 1
        assert "no parent" in report.problems[0]

    @pytest.mark.parametrize("place", [MIB, 2 * MIB, 3 * MIB, 4 * MIB, 6 * MIB])
    def test_a_bitmap_upon_something_else(self, tmp_path: Path, place: int) -> None:
        """Log, BAT, metadata, the other chunk's bitmap, a block."""
        disk = vhdx.Vhdx(
            4097 * MIB,
            locator=vhdx.child_locator(),
            blocks={n: (vhdx.PARTIAL, vhdx.pattern(n, MIB)) for n in (0, 4096)},
            own_sectors={0: {1}, 4096: {2}},
        )
        path = disk.write(tmp_path / "a.vhdx")
        assert imgcore.check(path).ok
        with open(path, "r+b") as file:
            file.seek(vhdx.BAT_OFFSET + 8 * disk.bitmap_index(4096))
            file.write(struct.pack("<Q", place | 6))
        lines = imgcore.check(path).problems
        assert any(f"bitmap block 1 at {place:#x} overlaps" in line for line in lines), lines
