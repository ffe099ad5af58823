"""VHDX: logs that wait to be replayed; the file itself does not change."""

from __future__ import annotations

import hashlib
import os
import resource
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tests.helpers import vhdx
from tests.helpers.reading import open_file, poke
from tests.helpers.vhdx import (
    BAT_OFFSET,
    FULL,
    HEADERS,
    LOG_NBYTES,
    LOG_OFFSET,
    MIB,
    Vhdx,
    Write,
    log_entry,
    pattern,
)

import imgcore
from imgcore import CorruptImageError, LimitExceededError
from imgcore.disk.image import open_image
from imgcore.disk.open_options import OpenOptions
from imgcore.formats.vhdx.reader import VhdxReader
from imgcore.limits import VHDX_MAX_LOG_NBYTES

GUID = vhdx.guid(0x106)
SECTOR = 4096
# The file has two blocks, 0 at 5 MiB and 1 at 4 MiB; the BAT has one of them.
OLD = Vhdx(4 * MIB, blocks={0: (FULL, pattern(1, MIB)), 1: (FULL, pattern(2, MIB))})


def bat_sector(*entries: int) -> bytes:
    """Return the BAT's first 4096 bytes."""
    return struct.pack(f"<{len(entries)}Q", *entries).ljust(SECTOR, b"\0")


def with_log(path: Path, *entries: bytes, at: int = 0, forget: bool = True) -> Path:
    """Write an image whose log has entries from an offset on, around its end."""
    ring = bytearray(LOG_NBYTES)
    for entry in entries:
        for index, byte_offset in enumerate(range(0, len(entry), SECTOR)):
            place = (at + index * SECTOR) % LOG_NBYTES
            ring[place : place + SECTOR] = entry[byte_offset : byte_offset + SECTOR]
        at += len(entry)
    disk = Vhdx(OLD.virtual_size, blocks=OLD.blocks, log_guid=GUID, log=bytes(ring))
    disk.write(path)
    if forget:
        poke(path, (BAT_OFFSET, bat_sector()))
    return path


def entry(sequence: int, tail: int, *writes: Write, **more: int) -> bytes:
    return log_entry(sequence, tail, list(writes), log_guid=GUID, **more)


def content(path: Path) -> bytes:
    """Return the content of a disk; verify that reading does not change the file."""
    before = hashlib.sha256(path.read_bytes()).digest()
    with imgcore.open(path) as image:
        data = image.read(0, image.virtual_size)
    assert hashlib.sha256(path.read_bytes()).digest() == before
    return data


BOTH = bat_sector(5 * MIB | 6, 4 * MIB | 6)
ONLY_0 = bat_sector(5 * MIB | 6)
ONLY_1 = bat_sector(0, 4 * MIB | 6)
B0, B1, B_ = pattern(1, MIB), pattern(2, MIB), bytes(MIB)


class TestReplay:
    def test_one_entry(self, tmp_path: Path) -> None:
        path = with_log(tmp_path / "a.vhdx", entry(1, 0, (BAT_OFFSET, BOTH)))
        assert content(path) == B0 + B1 + B_ + B_
        data = imgcore.info(path)
        assert data["dirty-flag"] is True
        assert data["format-specific"]["data"]["log-entries-replayed"] == 1

    def test_the_last_write_counts(self, tmp_path: Path) -> None:
        writes = (
            entry(n, 0, (BAT_OFFSET, data)) for n, data in enumerate((BOTH, ONLY_0, ONLY_1), 7)
        )
        assert content(with_log(tmp_path / "a.vhdx", *writes)) == B_ + B1 + B_ + B_

    def test_a_later_tail_leaves_out_what_is_done(self, tmp_path: Path) -> None:
        done = entry(7, 0, (BAT_OFFSET, BOTH))
        head = entry(8, len(done), (BAT_OFFSET + SECTOR, bytes(SECTOR)))
        assert content(with_log(tmp_path / "a.vhdx", done, head)) == B_ * 4

    def test_zeros(self, tmp_path: Path) -> None:
        path = with_log(tmp_path / "a.vhdx", entry(1, 0, (BAT_OFFSET, 16 * SECTOR)), forget=False)
        assert content(path) == B_ * 4

    @pytest.mark.parametrize(
        ("writes", "expected"),
        [
            (((BAT_OFFSET, BOTH), (BAT_OFFSET, SECTOR)), B_ * 4),
            (((BAT_OFFSET, SECTOR), (BAT_OFFSET, BOTH)), B0 + B1 + B_ + B_),
            (((BAT_OFFSET, BOTH), (BAT_OFFSET - SECTOR, 2 * SECTOR)), B_ * 4),
            (((BAT_OFFSET, 0), (BAT_OFFSET, BOTH)), B0 + B1 + B_ + B_),
        ],
    )
    def test_zeros_and_data_in_their_order(
        self, tmp_path: Path, writes: tuple[Write, ...], expected: bytes
    ) -> None:
        assert content(with_log(tmp_path / "a.vhdx", entry(1, 0, *writes))) == expected

    def test_an_entry_without_writes(self, tmp_path: Path) -> None:
        path = with_log(tmp_path / "a.vhdx", entry(1, 0), forget=False)
        assert content(path) == OLD.expected()

    def test_metadata_and_region_tables_come_out_of_the_log(self, tmp_path: Path) -> None:
        table = Vhdx(8 * MIB).metadata()
        writes = [
            (vhdx.METADATA_OFFSET + n, table[n : n + SECTOR].ljust(SECTOR, b"\0"))
            for n in range(0, len(table), SECTOR)
        ]
        path = with_log(tmp_path / "a.vhdx", entry(1, 0, *writes), forget=False)
        assert content(path) == B0 + B1 + B_ * 6

    def test_around_the_end_of_the_log(self, tmp_path: Path) -> None:
        at = LOG_NBYTES - 3 * SECTOR
        first = entry(1, at, (BAT_OFFSET, ONLY_0))
        second = entry(2, at, (BAT_OFFSET, BOTH))
        path = with_log(tmp_path / "a.vhdx", first, second, at=at)
        assert content(path) == B0 + B1 + B_ + B_

    def test_more_descriptors_than_one_sector_holds(self, tmp_path: Path) -> None:
        writes: list[Write] = [(BAT_OFFSET + n * SECTOR, SECTOR) for n in range(1, 200)]
        path = with_log(tmp_path / "a.vhdx", entry(1, 0, *writes, (BAT_OFFSET, BOTH)))
        assert content(path) == B0 + B1 + B_ + B_

    def test_an_entry_with_free_sectors_behind_its_data(self, tmp_path: Path) -> None:
        first = entry(1, 0, (BAT_OFFSET, ONLY_0), pad_sectors=14)
        path = with_log(tmp_path / "a.vhdx", first, entry(2, 0, (BAT_OFFSET, BOTH)))
        assert content(path) == B0 + B1 + B_ + B_

    def test_the_file_grows_by_zeros(self, tmp_path: Path) -> None:
        far = bat_sector(5 * MIB | 6, 32 * MIB | 6, 8 * MIB | 6)
        writes = ((BAT_OFFSET, far), (32 * MIB + SECTOR, b"z" * SECTOR))
        path = with_log(tmp_path / "a.vhdx", entry(1, 0, *writes, last=64 * MIB))
        block = bytearray(MIB)
        block[SECTOR : 2 * SECTOR] = b"z" * SECTOR
        assert content(path) == B0 + bytes(block) + B_ + B_

    def test_payload_is_patched(self, tmp_path: Path) -> None:
        """The specification does not allow payload in the log, but it is replayed."""
        writes = (
            (5 * MIB + 8 * SECTOR, b"p" * SECTOR),
            (5 * MIB + 16 * SECTOR, 3 * SECTOR),
            (4 * MIB, b"q" * SECTOR),
            (5 * MIB - SECTOR, 2 * SECTOR),
        )
        path = with_log(tmp_path / "a.vhdx", entry(1, 0, *writes), forget=False)
        first, second = bytearray(B0), bytearray(B1)
        first[8 * SECTOR : 9 * SECTOR] = b"p" * SECTOR
        first[16 * SECTOR : 19 * SECTOR] = bytes(3 * SECTOR)
        first[:SECTOR] = bytes(SECTOR)
        second[:SECTOR] = b"q" * SECTOR
        second[-SECTOR:] = bytes(SECTOR)
        expected = bytes(first + second) + B_ + B_
        assert content(path) == expected
        with imgcore.open(path) as image:
            for offset in range(0, 2 * MIB, 77 * 512):
                assert image.read(offset, 5000) == expected[offset : offset + 5000]
        imgcore.convert(path, tmp_path / "flat.raw", sync=False)
        assert (tmp_path / "flat.raw").read_bytes() == expected

    def test_many_patches_in_a_place_that_many_blocks_share(self, tmp_path: Path) -> None:
        """Each block is changed in 8192 places, not all in memory at once."""
        n_blocks = 1 << 11
        writes: list[Write] = [(64 * MIB + 2 * SECTOR * n, SECTOR) for n in range(8192)]
        log = entry(1, 0, *writes)
        disk = Vhdx(n_blocks * 64 * MIB, 64 * MIB, log_guid=GUID, log=log)
        path = disk.write(tmp_path / "a.vhdx")
        table = np.full(disk.bat_index(n_blocks - 1) + 1, 64 * MIB | 6, dtype="<u8")
        table[disk.ratio :: disk.ratio + 1] = 0
        poke(path, (BAT_OFFSET, table.tobytes()), (64 * MIB + SECTOR, b"x" * SECTOR))
        with open(path, "r+b") as file:
            file.truncate(128 * MIB)
        with imgcore.open(path) as image, pytest.raises(CorruptImageError, match="overlap"):
            image.read(9 * 64 * MIB, 3 * SECTOR)
        # Such blocks are read only when salvaging.
        tracemalloc.start()
        with open_image(path, OpenOptions(salvage=True)) as image:
            batches = image.extents()
            n_rows = sum(len(next(batches)) for _ in range(4))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n_rows > 100_000
        assert peak < 100 * MIB

    def test_no_room_for_what_is_replayed(self, tmp_path: Path) -> None:
        path = with_log(tmp_path / "a.vhdx", entry(1, 0, *((BAT_OFFSET, BOTH),) * 9))
        before = os.listdir("/proc/self/fd")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SECTOR, limits[1]))
        try:
            with pytest.raises(OSError, match=r"too large.*a\.vhdx \(log\)"):
                imgcore.open(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir("/proc/self/fd") == before


class TestActiveSequence:
    def test_a_torn_entry_ends_it(self, tmp_path: Path) -> None:
        sound, torn = entry(1, 0, (BAT_OFFSET, ONLY_0)), entry(2, 0, (BAT_OFFSET, ONLY_1))
        for cut in range(0, len(torn), 512):
            path = with_log(tmp_path / "a.vhdx", sound, torn[:cut].ljust(len(torn), b"\xee"))
            assert content(path) == B0 + B_ * 3, cut

    @pytest.mark.parametrize("damaged", [0, 4, 8, 12, 16, 24, 32, 64, 80, 4096, 4100, 8188])
    def test_a_changed_byte_ends_it(self, tmp_path: Path, damaged: int) -> None:
        sound = entry(1, 0, (BAT_OFFSET, ONLY_0))
        torn = bytearray(entry(2, 0, (BAT_OFFSET, ONLY_1)))
        torn[damaged] ^= 0x40
        assert content(with_log(tmp_path / "a.vhdx", sound, bytes(torn))) == B0 + B_ * 3

    # Damage with a valid checksum: offset in the entry, bytes.
    @pytest.mark.parametrize(
        ("offset", "data"),
        [
            (8, struct.pack("<I", 8191)),  # EntryLength
            (8, struct.pack("<I", 0)),
            (12, struct.pack("<I", 512)),  # Tail
            (12, struct.pack("<I", LOG_NBYTES)),
            (24, struct.pack("<I", 0x10000)),  # DescriptorCount
            (32, vhdx.guid(1).bytes_le),  # LogGuid
            (64, b"nope"),  # a descriptor's signature
            (80, struct.pack("<Q", BAT_OFFSET + 512)),  # FileOffset
            (88, struct.pack("<Q", 3)),  # SequenceNumber
            (4096, b"date"),  # the data sector's signature
            (4100, struct.pack("<I", 1)),  # SequenceHigh
            (8188, struct.pack("<I", 3)),  # SequenceLow
        ],
    )
    def test_an_entry_at_odds_with_itself_ends_it(
        self, tmp_path: Path, offset: int, data: bytes
    ) -> None:
        sound = entry(1, 0, (BAT_OFFSET, ONLY_0))
        bad = bytearray(entry(2, 0, (BAT_OFFSET, ONLY_1)))
        bad[offset : offset + len(data)] = data
        path = with_log(tmp_path / "a.vhdx", sound, vhdx.sealed(bytes(bad)))
        assert content(path) == B0 + B_ * 3

    @pytest.mark.parametrize("sequence", [1, 3, 100])
    def test_a_gap_in_the_sequence_numbers(self, tmp_path: Path, sequence: int) -> None:
        """The second entry starts another sequence, which does not have its tail."""
        first = entry(1, 0, (BAT_OFFSET, ONLY_0))
        path = with_log(tmp_path / "a.vhdx", first, entry(sequence, 0, (BAT_OFFSET, ONLY_1)))
        assert content(path) == B0 + B_ * 3

    def test_the_newer_of_two(self, tmp_path: Path) -> None:
        old = entry(5, 0, (BAT_OFFSET, ONLY_0))
        new = entry(9, len(old), (BAT_OFFSET, ONLY_1))
        assert content(with_log(tmp_path / "a.vhdx", old, new)) == B_ + B1 + B_ + B_
        old = entry(9, 0, (BAT_OFFSET, ONLY_0))
        new = entry(5, len(old), (BAT_OFFSET, ONLY_1))
        assert content(with_log(tmp_path / "a.vhdx", old, new)) == B0 + B_ * 3

    def test_a_run_whose_tail_was_overwritten(self, tmp_path: Path) -> None:
        first = entry(5, 0, (BAT_OFFSET, ONLY_0))
        rest = [entry(n, 0, (BAT_OFFSET, ONLY_1)) for n in (6, 7)]
        path = with_log(tmp_path / "a.vhdx", b"\xee" * len(first), *rest)
        with pytest.raises(CorruptImageError, match="no valid sequence"):
            imgcore.open(path)

    def test_entries_of_another_guid_are_none(self, tmp_path: Path) -> None:
        other = log_entry(9, 2 * SECTOR, [(BAT_OFFSET, ONLY_1)], log_guid=vhdx.guid(7))
        first = entry(1, 0, (BAT_OFFSET, ONLY_0))
        assert content(with_log(tmp_path / "a.vhdx", first, other)) == B0 + B_ * 3
        with pytest.raises(CorruptImageError, match="no valid sequence"):
            imgcore.open(with_log(tmp_path / "b.vhdx", other))

    def test_a_log_is_ignored_if_the_header_names_none(self, tmp_path: Path) -> None:
        ring = entry(1, 0, (BAT_OFFSET, SECTOR))
        path = Vhdx(4 * MIB, blocks=OLD.blocks, log=ring).write(tmp_path / "a.vhdx")
        assert content(path) == OLD.expected()
        assert imgcore.info(path)["dirty-flag"] is False

    def test_an_empty_log_that_the_header_names(self, tmp_path: Path) -> None:
        with pytest.raises(CorruptImageError, match="no valid sequence") as caught:
            imgcore.open(with_log(tmp_path / "a.vhdx"))
        assert caught.value.offset == LOG_OFFSET


class TestBounds:
    def test_a_file_that_was_cut_off(self, tmp_path: Path) -> None:
        for flushed, fits in ((6 * MIB, True), (6 * MIB + 4096, False), (1 << 63, False)):
            path = with_log(tmp_path / "a.vhdx", entry(1, 0, (BAT_OFFSET, BOTH), flushed=flushed))
            if fits:
                assert content(path) == B0 + B1 + B_ + B_
                continue
            with pytest.raises(CorruptImageError, match="file is truncated"):
                imgcore.open(path)

    @pytest.mark.parametrize(
        "more", [{"last": 1 << 63}, {"write": (1 << 62, SECTOR)}, {"write": (0, 1 << 63)}]
    )
    def test_a_file_of_exabytes(self, tmp_path: Path, more: dict[str, object]) -> None:
        write = more.get("write", (BAT_OFFSET, BOTH))
        last = int(str(more.get("last", 0)))
        log = log_entry(1, 0, [write], log_guid=GUID, last=last)  # type: ignore[list-item]
        with pytest.raises(LimitExceededError, match="its log makes the file"):
            imgcore.open(with_log(tmp_path / "a.vhdx", log))

    def test_a_log_too_large_to_replay(self, tmp_path: Path) -> None:
        path = with_log(tmp_path / "a.vhdx", entry(1, 0, (BAT_OFFSET, BOTH)))
        with open(path, "r+b") as file:
            file.truncate(VHDX_MAX_LOG_NBYTES + 512 * MIB)
        for nbytes, words in (
            (VHDX_MAX_LOG_NBYTES + MIB, f"at most {VHDX_MAX_LOG_NBYTES} are allowed"),
            (0xFFF00000, f"at most {VHDX_MAX_LOG_NBYTES} are allowed"),
        ):
            for place in HEADERS:
                poke(path, (place + 68, struct.pack("<IQ", nbytes, 100 * MIB)))
                vhdx.seal(path, place, 4096)
            with pytest.raises(LimitExceededError, match=words):
                imgcore.open(path)

    def test_a_log_past_the_end_of_the_file(self, tmp_path: Path) -> None:
        path = with_log(tmp_path / "a.vhdx", entry(1, 0, (BAT_OFFSET, BOTH)))
        for place in HEADERS:
            poke(path, (place + 72, struct.pack("<Q", 1 << 50)))
            vhdx.seal(path, place, 4096)
        with pytest.raises(CorruptImageError, match="past the end of the file"):
            imgcore.open(path)

    def test_entries_upon_each_other_end_soon(self, tmp_path: Path) -> None:
        """Headers in every sector that claim the rest of the log take linear time."""
        ring = bytearray(LOG_NBYTES)
        for at in range(0, LOG_NBYTES, SECTOR):
            head = entry(1, 0)[:64]
            ring[at : at + 64] = head[:8] + struct.pack("<I", LOG_NBYTES) + head[12:]
        disk = Vhdx(MIB, log_guid=GUID, log=bytes(ring))
        with pytest.raises(CorruptImageError, match="overlap"):
            imgcore.open(disk.write(tmp_path / "a.vhdx"))


def test_check_says_that_it_looked_behind_the_log(tmp_path: Path) -> None:
    path = with_log(tmp_path / "a.vhdx", entry(1, 0, (BAT_OFFSET, BOTH)))
    report = imgcore.check(path)
    assert report.ok
    assert report.allocated_clusters == 2
    assert "1 entries to replay" in report.problems[0]


def test_the_log_of_a_parent_is_replayed_too(tmp_path: Path) -> None:
    with_log(tmp_path / "parent.vhdx", entry(1, 0, (BAT_OFFSET, BOTH)))
    child = Vhdx(4 * MIB, locator=vhdx.child_locator(), blocks={1: (FULL, pattern(3, MIB))})
    path = child.write(tmp_path / "child.vhdx")
    assert content(path) == B0 + pattern(3, MIB) + B_ + B_


def test_there_is_no_repair_before_the_log_is_replayed(tmp_path: Path) -> None:
    path = with_log(tmp_path / "a.vhdx", entry(1, 0, (BAT_OFFSET, BOTH)))
    reader = open_file(path, VhdxReader)
    assert reader.repairs() == []
    reader.close()


def test_a_read_past_the_end_of_a_replayed_file(tmp_path: Path) -> None:
    path = with_log(tmp_path / "a.vhdx", entry(1, 0, (BAT_OFFSET, BOTH)))
    reader = open_file(path, VhdxReader)
    view = reader._image.view
    with pytest.raises(CorruptImageError, match="past the end of the file"):
        view.pread(view.nbytes - 1, 2)
    reader.close()


def test_too_many_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_log(tmp_path / "a.vhdx", entry(1, 0, (BAT_OFFSET, BOTH), (BAT_OFFSET, ONLY_0)))
    monkeypatch.setattr("imgcore.limits.VHDX_MAX_LOG_DESCRIPTORS", 1)
    with pytest.raises(LimitExceededError, match="its log has more than 1 descriptors"):
        imgcore.open(path)


def test_zeros_that_are_not_whole_sectors(tmp_path: Path) -> None:
    odd = entry(2, 0, (BAT_OFFSET, SECTOR + 1))
    path = with_log(tmp_path / "a.vhdx", entry(1, 0, (BAT_OFFSET, BOTH)), odd)
    assert content(path) == B0 + B1 + B_ + B_
