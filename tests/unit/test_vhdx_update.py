"""VHDX written in place: headers, log, sector bitmaps, space, size and parent."""

from __future__ import annotations

import logging
import random
import shutil
import struct
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.helpers import images, other_readers, qemu, vhdx
from tests.helpers.reading import poke
from tests.helpers.vhdx import (
    BAT_OFFSET,
    FULL,
    HEADERS,
    LOG_OFFSET,
    METADATA_OFFSET,
    MIB,
    NIL,
    PARTIAL,
    REGION_TABLES,
    UNMAPPED,
    ZERO,
    Vhdx,
    log_entry,
    pattern,
)

import imgcore
from imgcore import CorruptImageError, ImgcoreError, LimitExceededError, OptionError
from imgcore.disk.image import Image
from imgcore.files.update_file import UpdateFile
from imgcore.formats.vhdx.parent import DATA_WRITE_GUID, LOGICAL_SECTOR_SIZE

SECTOR = 4096
LOG_GUID = vhdx.guid(0x106)


def head_of(path: Path, nbytes: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(nbytes)


def headers(path: Path) -> list[tuple[int, uuid.UUID, uuid.UUID, uuid.UUID]]:
    """Return sequence numbers, and file, data and log GUIDs, of both headers."""
    raw = head_of(path, BAT_OFFSET)
    found = []
    for place in HEADERS:
        assert vhdx.sealed(raw[place : place + 4096]) == raw[place : place + 4096]
        _, _, sequence, *guids = struct.unpack_from("<4sIQ16s16s16s", raw, place)
        found.append((sequence, *(uuid.UUID(bytes_le=guid) for guid in guids)))
    return sorted(found, reverse=True)


def entry(path: Path, index: int) -> int:
    """Return an entry of the BAT of an image that `Vhdx` made."""
    (value,) = struct.unpack_from("<Q", head_of(path, BAT_OFFSET + MIB), BAT_OFFSET + 8 * index)
    return int(value)


def content(path: Path) -> bytes:
    with imgcore.open(path) as image:
        return image.read(0, image.virtual_size)


def is_sound(path: Path) -> bool:
    report = imgcore.check(path)
    return not report.problems


def dynamic(path: Path, n_blocks: int = 4, **more: object) -> Path:
    """Write a disk of blocks of 1 MiB, of which it has the first two."""
    blocks = {number: (FULL, pattern(number, MIB)) for number in range(2)}
    return Vhdx(n_blocks * MIB, blocks=blocks, **more).write(path)  # type: ignore[arg-type]


@contextmanager
def family(folder: Path, n_blocks: int = 4) -> Iterator[tuple[Path, bytearray]]:
    """Yield an empty child, and what it reads; verify it at the end."""
    content_of_parent = pattern(9, n_blocks * MIB)
    parent = {n: (FULL, content_of_parent[n * MIB : (n + 1) * MIB]) for n in range(n_blocks)}
    Vhdx(n_blocks * MIB, blocks=parent).write(folder / "parent.vhdx")
    child = Vhdx(n_blocks * MIB, locator=vhdx.child_locator()).write(folder / "child.vhdx")
    expected = bytearray(content_of_parent)
    yield child, expected
    assert is_sound(child)
    assert content(child) == expected


class TestHeaders:
    def test_nothing_changes_before_the_first_change(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        before = path.read_bytes()
        with imgcore.open(path, mode="r+") as image:
            image.flush()
        assert path.read_bytes() == before

    def test_a_session(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        (old, *_), _ = headers(path)
        with imgcore.open(path, mode="r+") as image:
            image.write(0, b"here")
            (first, file_guid, data_guid, log_guid), (second, *same) = headers(path)
            assert (first, second) == (old + 2, old + 1)
            assert same == [file_guid, data_guid, log_guid]
            assert file_guid != vhdx.guid(2)
            assert data_guid != vhdx.PARENT_GUID
            assert log_guid == NIL
            # An image that is open knows its own identity.
            data = image.info()["format-specific"]["data"]
            assert data["data-write-guid"] == str(data_guid)
            image.write(3 * MIB, b"there")
            assert headers(path)[0][3] == NIL
            image.flush()
            (_, _, _, log_guid), (*_, same_log_guid) = headers(path)
            assert log_guid == same_log_guid != NIL
        for _, *guids in headers(path):
            assert guids == [file_guid, data_guid, NIL]

    def test_a_child_notices_that_its_parent_was_written_to(self, tmp_path: Path) -> None:
        with family(tmp_path):
            pass
        with imgcore.open(tmp_path / "parent.vhdx", mode="r+") as image:
            image.write(0, b"x")
        with pytest.raises(CorruptImageError, match="was written to since"):
            imgcore.open(tmp_path / "child.vhdx")


class TestLog:
    @staticmethod
    def verify_replay(live: Path, before: bytes, expected: bytes) -> None:
        """Verify a live image whose changes of the BAT are lost except in the log."""
        qemu.require_qemu_img()
        crashed = live.with_name("crashed.vhdx")
        shutil.copy(live, crashed)
        poke(crashed, (BAT_OFFSET, before[BAT_OFFSET : BAT_OFFSET + MIB]))
        assert content(crashed) == expected
        qemu.run("check", "-r", "all", crashed)
        assert headers(crashed)[0][3] == NIL
        raw = live.with_name("a.raw")
        qemu.run("convert", "-O", "raw", crashed, raw)
        assert raw.read_bytes() == expected

    def test_changes_are_durable_in_the_log(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        expected = bytearray(content(path))
        with imgcore.open(path, mode="r+") as image:
            for block, data in ((3, b"three"), (2, b"two")):
                before = head_of(path, BAT_OFFSET + MIB)
                expected[block * MIB : block * MIB + len(data)] = data
                image.write(block * MIB, data)
                image.flush()
                self.verify_replay(path, before, bytes(expected))

    def test_a_full_log_begins_anew(self, tmp_path: Path) -> None:
        path = Vhdx(140 * MIB).write(tmp_path / "a.vhdx")
        expected = bytearray(140 * MIB)
        guids = set()
        with imgcore.open(path, mode="r+") as image:
            for block in range(140):
                before = head_of(path, BAT_OFFSET + MIB)
                data = b"%d" % block
                expected[block * MIB : block * MIB + len(data)] = data
                image.write(block * MIB, data)
                image.flush()
                guids.add(headers(path)[0][3])
                if block in (127, 128):
                    self.verify_replay(path, before, bytes(expected))
        assert len(guids) == 2
        assert is_sound(path)

    def test_more_changes_than_the_log_has_room_for(self, tmp_path: Path) -> None:
        """Each change is in another page of the BAT."""
        path = tmp_path / "a.vhdx"
        imgcore.create(path, 512 << 30, format="vhdx", options={"block_size": "1M"})
        places = [number * 512 * MIB for number in range(700)]
        with imgcore.open(path, mode="r+") as image:
            for place in places:
                image.write(place, b"%d" % place)
        with imgcore.open(path) as image:
            assert all(image.read(place, len(b"%d" % place)) == b"%d" % place for place in places)
        assert is_sound(path)

    def test_what_could_not_be_written_is_written_later(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        expected = bytearray(content(path))
        pwrite = UpdateFile.pwrite
        fails_at = [LOG_OFFSET, BAT_OFFSET, HEADERS[0], HEADERS[1]]

        def failing(file: UpdateFile, offset: int, data: bytes) -> None:
            # At most one such error for each place.
            for place in fails_at:
                if place <= offset < place + 4096:
                    fails_at.remove(place)
                    raise OSError(28, "No space left on device")
            pwrite(file, offset, data)

        with imgcore.open(path, mode="r+") as image:
            image.write(0, b"begin")
            expected[:5] = b"begin"
            monkeypatch.setattr(UpdateFile, "pwrite", failing)
            for block in (2, 3):
                image.write(block * MIB, b"data")
                expected[block * MIB : block * MIB + 4] = b"data"
                while True:
                    try:
                        image.flush()
                        break
                    except OSError:
                        assert image.read(block * MIB, 4) == b"data"
        assert not fails_at
        assert content(path) == expected
        assert is_sound(path)


class TestInterrupted:
    BOTH = struct.pack("<QQ", 5 * MIB | 6, 4 * MIB | 6).ljust(SECTOR, b"\0")

    def image(self, path: Path, *writes: vhdx.Write) -> Path:
        """Write an image whose BAT is only in the log."""
        log = log_entry(1, 0, list(writes), log_guid=LOG_GUID, last=8 * MIB)
        dynamic(path, log_guid=LOG_GUID, log=log)
        return poke(path, (BAT_OFFSET, bytes(SECTOR)))

    def test_the_log_is_replayed(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        path = self.image(tmp_path / "a.vhdx", (BAT_OFFSET, self.BOTH), (5 * MIB, SECTOR))
        expected = content(path)
        assert expected == bytes(SECTOR) + pattern(0, MIB)[SECTOR:] + pattern(1, MIB) + bytes(
            2 * MIB
        )
        with caplog.at_level(logging.WARNING, logger="imgcore"):
            imgcore.open(path, mode="r+").close()
        assert "the log that an interrupted writer has left is replayed" in caplog.text
        assert [header[3] for header in headers(path)] == [NIL, NIL]
        assert headers(path)[0][1] != vhdx.guid(2)
        assert headers(path)[0][2] == vhdx.PARENT_GUID
        assert path.stat().st_size == 8 * MIB
        assert content(path) == expected
        assert "log-entries-replayed" not in imgcore.info(path)["format-specific"]["data"]

    @pytest.mark.parametrize(
        ("place", "words"), [(HEADERS[1], "the headers"), (LOG_OFFSET, "the log")]
    )
    def test_a_log_over_itself(self, place: int, words: str, tmp_path: Path) -> None:
        path = self.image(tmp_path / "a.vhdx", (BAT_OFFSET, self.BOTH), (place, bytes(SECTOR)))
        before = path.read_bytes()
        with pytest.raises(CorruptImageError, match=f"its log would overwrite {words}"):
            imgcore.open(path, mode="r+")
        assert path.read_bytes() == before


class TestHostile:
    @pytest.mark.parametrize(
        ("place", "words"),
        [
            (0, "not present|headers"),
            (LOG_OFFSET, "overlaps"),
            (BAT_OFFSET, "overlaps"),
            (METADATA_OFFSET, "overlaps"),
            (4 * MIB, "overlaps"),
            (100 * MIB, "past the end of the file"),
        ],
    )
    def test_a_block_upon_others(self, place: int, words: str, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        poke(path, (BAT_OFFSET, struct.pack("<Q", place | FULL)))
        before = path.read_bytes()
        with pytest.raises(CorruptImageError, match=f"is damaged.*({words})"):
            imgcore.open(path, mode="r+")
        assert path.read_bytes() == before

    def test_a_sector_bitmap_upon_a_block(self, tmp_path: Path) -> None:
        with family(tmp_path):
            pass
        path = tmp_path / "child.vhdx"
        with imgcore.open(path, mode="r+") as image:
            image.write(0, b"x")
        poke(path, (BAT_OFFSET + 8 * 4096, struct.pack("<Q", BAT_OFFSET | 6)))
        with pytest.raises(CorruptImageError, match="sector bitmap block 0 .* overlaps"):
            imgcore.open(path, mode="r+")

    @pytest.mark.parametrize(
        ("field", "words"),
        [
            (struct.pack("<IQ", 0, MIB), "has no log"),
            (struct.pack("<IQ", MIB, 0), "has no log"),
            (struct.pack("<IQ", MIB, 64 * MIB), "past the end of the file"),
            (struct.pack("<IQ", 128 * MIB, 64 * MIB), "at most"),
        ],
    )
    def test_a_log_that_cannot_be_used(self, field: bytes, words: str, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        for place in HEADERS:
            vhdx.seal(poke(path, (place + 68, field)), place, 4096)
        assert content(path)[:MIB] == pattern(0, MIB)
        with pytest.raises(ImgcoreError, match=words):
            imgcore.open(path, mode="r+")

    def test_a_sequence_number_at_its_end(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        vhdx.seal(poke(path, (HEADERS[0] + 8, b"\xff" * 8)), HEADERS[0], 4096)
        with pytest.raises(CorruptImageError, match="sequence number"):
            imgcore.open(path, mode="r+")


class TestChildren:
    def test_scattered_changes(self, tmp_path: Path) -> None:
        """A child has the changed sectors, in blocks that are holes otherwise."""
        chance = random.Random(images.SEED)
        raw, parent, child = (tmp_path / name for name in ("a.raw", "parent.vhdx", "child.vhdx"))
        disk = bytearray(b"".join(chance.randbytes(MIB) for _ in range(256)))
        raw.write_bytes(disk)
        imgcore.convert(raw, parent, target_format="vhdx")
        imgcore.create(child, format="vhdx", backing=parent, backing_format="vhdx")
        n_changes, nbytes = 64, 21_299
        with imgcore.open(child, mode="r+") as image:
            for number in range(n_changes):
                at = number * 4 * MIB + chance.randrange(3 * MIB)
                disk[at : at + nbytes] = data = chance.randbytes(nbytes)
                image.write(at, data)
        raw.write_bytes(disk)
        assert content(child) == disk
        assert is_sound(child)
        n_blocks = sum(value & 7 == PARTIAL for value in _entries(child, 256 // 2))
        assert n_changes <= n_blocks <= 2 * n_changes
        # Headers, log, metadata, BAT and a sector bitmap block.
        assert child.stat().st_size == (5 + 2 * n_blocks) * MIB
        assert qemu.disk_nbytes(child) < 1.5 * (n_changes * (nbytes + 2 * 4096) + 256 * 1024)
        other_readers.assert_libvhdi_reads(raw, child, parent)
        other_readers.assert_dissect_reads(raw, child, "vhdx", "VHDX", "pathlib.Path(sys.argv[1])")

    def test_a_block_that_is_written_completely(self, tmp_path: Path) -> None:
        with family(tmp_path) as (path, expected):
            with imgcore.open(path, mode="r+") as image:
                image.write(MIB, b"a" * MIB)
                for half in range(2):
                    image.write(2 * MIB + half * MIB // 2, b"b" * (MIB // 2))
                image.write(100, b"c")
            expected[MIB : 3 * MIB] = b"a" * MIB + b"b" * MIB
            expected[100] = ord("c")
            states = [entry(path, block) & 7 for block in range(4)]
            assert states == [PARTIAL, FULL, FULL, 0]

    def test_old_bits_are_not_believed(self, tmp_path: Path) -> None:
        """A block that is not present may have left bits."""
        with family(tmp_path) as (path, expected):
            with imgcore.open(path, mode="r+") as image:
                image.write(0, b"x")
            bitmap = entry(path, 4096) & ~0xFFFFF
            poke(path, (bitmap + 256, b"\xff" * 256))
            with imgcore.open(path, mode="r+") as image:
                image.write(MIB + 512, b"y" * 512)
            expected[0] = ord("x")
            expected[MIB + 512 : MIB + 1024] = b"y" * 512

    def test_zeros_and_discards_hide_the_parent(self, tmp_path: Path) -> None:
        with family(tmp_path) as (path, expected):
            with imgcore.open(path, mode="r+") as image:
                image.write(0, b"x" * 1000)
                image.write(MIB, b"y" * 1000)
                image.flush()
                image.zero(0, MIB)
                image.discard(MIB, MIB)
                image.discard(2 * MIB, MIB)
                image.zero(3 * MIB + 512, 1024)
            expected[: 2 * MIB] = bytes(2 * MIB)
            expected[3 * MIB + 512 : 3 * MIB + 1536] = bytes(1024)
            assert [entry(path, block) & 7 for block in range(4)] == [ZERO, ZERO, 0, PARTIAL]
            with imgcore.open(path, mode="r+") as image:
                image.write(MIB + 5, b"again")
            expected[MIB + 5 : MIB + 10] = b"again"
            assert entry(path, 1) & 7 == FULL

    def test_dropped_blocks_show_the_parent(self, tmp_path: Path) -> None:
        with family(tmp_path) as (path, expected):
            with imgcore.open(path, mode="r+") as image:
                image.write(0, b"x" * (2 * MIB))
                image.zero(2 * MIB, MIB)
                _restructure(image, "drop", MIB, 2 * MIB)
            expected[:MIB] = b"x" * MIB
            assert [entry(path, block) & 7 for block in range(4)] == [FULL, 0, 0, 0]

    def test_growth_hides_the_parent(self, tmp_path: Path) -> None:
        with family(tmp_path) as (path, expected):
            with imgcore.open(path, mode="r+") as image:
                image.write(MIB, b"x" * 512)
                for size in (MIB + 1024, 5 * MIB // 2, 3 * MIB + 512, 4 * MIB):
                    image.resize(size, shrink=True)
            expected[MIB:] = bytes(3 * MIB)
            expected[MIB : MIB + 1024] = b"x" * 512 + pattern(9, MIB + 1024)[-512:]


def _entries(path: Path, n_blocks: int) -> list[int]:
    """Return entries of an image that imgcore made; they are at 3 MiB."""
    return list(struct.unpack_from(f"<{n_blocks}Q", path.read_bytes(), 3 * MIB))


def _restructure(image: Image, name: str, *arguments: object) -> None:
    image.restructure(lambda updater: getattr(updater, name)(*arguments))


class TestSpace:
    def test_freed_blocks_are_used_again(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        with imgcore.open(path, mode="r+") as image:
            image.zero(0, MIB)
            image.flush()
            used = qemu.disk_nbytes(path)
            image.write(2 * MIB + 9, b"new")
            image.flush()
            assert path.stat().st_size == 6 * MIB
        assert used < 6 * MIB
        assert content(path) == bytes(MIB) + pattern(1, MIB) + bytes(9) + b"new" + bytes(
            2 * MIB - 12
        )
        assert [entry(path, block) & 7 for block in range(4)] == [ZERO, FULL, FULL, 0]
        assert is_sound(path)

    def test_a_place_that_an_unmapped_block_has_kept(self, tmp_path: Path) -> None:
        blocks = {0: (UNMAPPED, pattern(0, MIB)), 1: (FULL, pattern(1, MIB))}
        path = Vhdx(4 * MIB, blocks=blocks).write(tmp_path / "a.vhdx")
        kept = entry(path, 0) - UNMAPPED
        with imgcore.open(path, mode="r+") as image:
            image.write(0, b"x")
            image.flush()
            image.write(2 * MIB, b"y")
        assert entry(path, 2) == kept | FULL
        assert content(path) == b"x" + bytes(MIB - 1) + pattern(1, MIB) + b"y" + bytes(2 * MIB - 1)
        assert is_sound(path)

    def test_a_kept_place_that_the_file_does_not_have(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        poke(path, (BAT_OFFSET + 16, struct.pack("<Q", 100 * MIB | UNMAPPED)))
        with imgcore.open(path, mode="r+") as image:
            for block in (2, 3):
                image.write(block * MIB, b"x")
                image.flush()
            image.discard(3 * MIB, MIB)
        assert [entry(path, block) for block in (2, 3)] == [6 * MIB | FULL, UNMAPPED]
        assert path.stat().st_size == 7 * MIB
        assert is_sound(path)

    def test_a_file_that_ends_with_the_disk(self, tmp_path: Path) -> None:
        """The last block is longer than the rest of the file."""
        size = 8 * MIB + 512
        blocks = {2: (FULL, pattern(2, 4 * MIB))}
        path = Vhdx(size, block_nbytes=4 * MIB, blocks=blocks).write(tmp_path / "a.vhdx")
        with open(path, "r+b") as file:
            file.truncate(4 * MIB + 512)
        with imgcore.open(path, mode="r+") as image:
            image.write(0, b"x" * MIB)
            image.resize(12 * MIB)
        data = content(path)
        assert data[: 8 * MIB] == b"x" * MIB + bytes(7 * MIB)
        assert data[8 * MIB :] == pattern(2, 512) + bytes(4 * MIB - 512)
        assert is_sound(path)

    def test_the_file_ends_after_its_last_block(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        with imgcore.open(path, mode="r+") as image:
            image.discard(0, 2 * MIB)
        assert path.stat().st_size == 4 * MIB
        assert [entry(path, block) for block in range(2)] == [UNMAPPED, UNMAPPED]
        assert is_sound(path)

    def test_old_data_in_free_space_is_never_shown(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        poke(path, (BAT_OFFSET, bytes(8)))
        with imgcore.open(path, mode="r+") as image:
            image.write(0, b"x")
        assert content(path) == b"x" + bytes(MIB - 1) + pattern(1, MIB) + bytes(2 * MIB)

    def test_zeros_that_keep_their_space(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        with imgcore.open(path, mode="r+") as image:
            image.zero(0, 3 * MIB, unmap=False)
        assert content(path) == bytes(4 * MIB)
        assert [entry(path, block) & 7 for block in range(4)] == [FULL, FULL, 0, 0]

    def test_a_fixed_disk_keeps_its_blocks(self, tmp_path: Path) -> None:
        path = Vhdx(2 * MIB, leave_allocated=True, blocks={1: (FULL, pattern(1, MIB))}).write(
            tmp_path / "a.vhdx"
        )
        with open(path, "r+b") as file:
            file.truncate(6 * MIB)
        with imgcore.open(path, mode="r+") as image:
            image.zero(MIB, MIB)
            image.discard(0, 2 * MIB)
        assert path.stat().st_size == 6 * MIB
        with imgcore.open(path, mode="r+") as image:
            image.write(0, b"x")
            image.resize(4 * MIB)
        assert [entry(path, block) & 7 for block in range(4)] == [FULL] * 4
        assert path.stat().st_size == 8 * MIB
        assert content(path) == b"x" + bytes(4 * MIB - 1)
        assert is_sound(path)


class TestResize:
    @pytest.mark.parametrize("has_parent", [False, True])
    def test_the_bat_moves(self, has_parent: bool, tmp_path: Path) -> None:
        """The BAT of 1 MiB has room for 128 GiB in blocks of 1 MiB."""
        size = 120 * 1024 * MIB
        path = tmp_path / "a.vhdx"
        disk = Vhdx(size, blocks={1: (FULL, pattern(1, MIB))})
        if has_parent:
            Vhdx(4 * MIB, blocks={0: (FULL, pattern(0, MIB))}).write(tmp_path / "parent.vhdx")
            disk.locator = vhdx.child_locator()
        disk.write(path)
        new_size = 300 * 1024 * MIB
        with imgcore.open(path, mode="r+") as image:
            image.write(size - 5, b"last")
            image.resize(new_size)
            image.write(new_size - 4, b"last")
            assert image.virtual_size == new_size
        raw = path.read_bytes()[: 8 * MIB]
        tables = [raw[place : place + 65536] for place in REGION_TABLES]
        assert tables[0] == tables[1]
        assert struct.unpack_from("<Q", tables[0], 32)[0] != BAT_OFFSET
        with imgcore.open(path) as image:
            assert image.read(MIB, MIB) == pattern(1, MIB)
            assert image.read(0, MIB) == (pattern(0, MIB) if has_parent else bytes(MIB))
            assert image.read(size - 5, 10) == b"last" + bytes(6)
            assert image.read(new_size - 8, 8) == bytes(4) + b"last"
        assert is_sound(path)
        if not has_parent:
            qemu.run("check", path)
            assert qemu.info(path, "vhdx")["virtual-size"] == new_size

    def test_stale_entries_after_the_end(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        poke(path, (BAT_OFFSET + 8 * 4, struct.pack("<QQ", 4 * MIB | FULL, 9 * MIB | FULL)))
        with imgcore.open(path, mode="r+") as image:
            image.resize(6 * MIB)
        assert content(path)[2 * MIB :] == bytes(4 * MIB)
        assert is_sound(path)

    def test_old_data_after_the_end(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx")
        with imgcore.open(path, mode="r+") as image:
            image.resize(MIB + 512, shrink=True)
            image.resize(2 * MIB)
        assert content(path) == pattern(0, MIB) + pattern(1, 512) + bytes(MIB - 512)

    def test_sizes_that_the_format_cannot_have(self, tmp_path: Path) -> None:
        path = dynamic(tmp_path / "a.vhdx", logical=4096)
        before = path.read_bytes()
        with imgcore.open(path, mode="r+") as image:
            with pytest.raises(OptionError, match="multiples of its logical sector size 4096"):
                image.resize(5 * MIB + 512)
            with pytest.raises(LimitExceededError, match="at most"):
                image.resize(1 << 47)
        assert content(path) == pattern(0, MIB) + pattern(1, MIB) + bytes(2 * MIB)
        assert len(path.read_bytes()) == len(before)


class TestParents:
    @staticmethod
    def reference(path: Path, **more: str) -> imgcore.formats.api.BackingReference:
        with imgcore.open(path) as image:
            identities = dict(image.reader.identities)
        return imgcore.formats.api.BackingReference(
            path.name, "vhdx", {**identities, **more}, path=str(path)
        )

    def test_another_parent(self, tmp_path: Path) -> None:
        with family(tmp_path) as (path, expected):
            new = tmp_path / "a parent with a much longer name.vhdx"
            Vhdx(4 * MIB, data_guid=vhdx.guid(77)).write(new)
            with imgcore.open(path, mode="r+") as image:
                image.write(700, b"child")
                _restructure(image, "set_backing", self.reference(new))
                assert image.layers[1].identities[DATA_WRITE_GUID] == str(vhdx.guid(77))
            expected[:] = bytes(512) + expected[512:1024] + bytes(4 * MIB - 1024)
            expected[700:705] = b"child"

    def test_no_parent(self, tmp_path: Path) -> None:
        with family(tmp_path) as (path, expected):
            with imgcore.open(path, mode="r+") as image:
                image.write(700, b"child")
                image.write(MIB, pattern(5, 3 * MIB))
                _restructure(image, "set_backing", None)
            expected[:] = bytes(4 * MIB)
            expected[512:1024] = pattern(9, 1024)[512:]
            expected[700:705] = b"child"
            expected[MIB : 4 * MIB] = pattern(5, 3 * MIB)
            (tmp_path / "parent.vhdx").unlink()
            data = imgcore.info(path)["format-specific"]["data"]
            assert data["subformat"] == "dynamic"
            qemu.run("check", path)

    def test_a_first_parent(self, tmp_path: Path) -> None:
        path, parent = dynamic(tmp_path / "a.vhdx"), tmp_path / "parent.vhdx"
        Vhdx(4 * MIB, blocks={3: (FULL, pattern(3, MIB))}).write(parent)
        with imgcore.open(path, mode="r+") as image:
            _restructure(image, "set_backing", self.reference(parent))
            image.write(3 * MIB, b"x")
        assert (
            content(path)
            == pattern(0, MIB) + pattern(1, MIB) + bytes(MIB) + b"x" + pattern(3, MIB)[1:]
        )
        assert is_sound(path)

    def test_parents_that_the_format_cannot_have(self, tmp_path: Path) -> None:
        path, parent = dynamic(tmp_path / "a.vhdx"), dynamic(tmp_path / "b.vhdx")
        reference = self.reference(parent)
        for wrong, words in (
            (reference._replace(format="vhd"), "must be vhdx"),
            (self.reference(parent, **{LOGICAL_SECTOR_SIZE: "4096"}), "must be the same"),
        ):
            with imgcore.open(path, mode="r+") as image, pytest.raises(OptionError, match=words):
                _restructure(image, "set_backing", wrong)
        with open(path, "r+b") as file, imgcore.open(file.fileno(), mode="r+") as image:
            with pytest.raises(OptionError, match="has no folder"):
                _restructure(image, "set_backing", reference)
        assert content(path)[: 2 * MIB] == pattern(0, MIB) + pattern(1, MIB)


def test_virtualbox_reads_it(tmp_path: Path) -> None:
    program = qemu.require_vbox_img()
    path, raw = dynamic(tmp_path / "a.vhdx"), tmp_path / "a.raw"
    with imgcore.open(path, mode="r+") as image:
        image.write(3 * MIB - 100, b"across" * 100)
        image.discard(0, MIB)
        image.resize(6 * MIB)
    command = [program, "convert", "--srcfilename", str(path), "--srcformat", "VHDX"]
    done = subprocess.run(
        [*command, "--dstfilename", str(raw), "--dstformat", "RAW"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert raw.read_bytes() == content(path)
