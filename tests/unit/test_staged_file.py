"""A staged file: what is appended is written, what would change old bytes is kept."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from imgcore.files.ranges import gaps, is_inside, joined
from imgcore.files.staged_file import StagedFile
from imgcore.files.target_file import TargetFile

SIZE = 64 * 1024


@pytest.fixture
def old() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def file(tmp_path: Path, old: bytes) -> Iterator[TargetFile]:
    path = tmp_path / "disk"
    path.write_bytes(old)
    file = TargetFile(os.open(path, os.O_RDWR), str(path))
    yield file
    file.close()


def staged(file: TargetFile, *overwrites: tuple[int, int]) -> StagedFile:
    return StagedFile(file, SIZE, overwrites or [(0, 8192)])


def content(file: TargetFile) -> bytes:
    return Path(file.path).read_bytes()


def test_old_bytes_stay_until_apply(file: TargetFile, old: bytes) -> None:
    with_new = staged(file)
    with_new.pwrite(SIZE, b"table" * 100)
    with_new.pwrite(4096, b"more")
    with_new.pwrite(0, b"header")
    assert content(file) == old + b"table" * 100
    assert with_new.staged_nbytes == 10
    assert (with_new.appended_nbytes, with_new.appended) == (500, [(SIZE, 500)])
    with_new.apply()
    assert content(file)[:8192] == b"header" + old[6:4096] + b"more" + old[4100:8192]
    assert content(file)[8192:] == old[8192:] + b"table" * 100
    with_new.close()


def test_a_write_across_the_old_end(file: TargetFile, old: bytes) -> None:
    with_new = staged(file, (SIZE - 512, 512))
    with_new.pwrite(SIZE - 512, b"x" * 1024)
    assert content(file) == old + b"x" * 512
    with_new.apply()
    assert content(file) == old[:-512] + b"x" * 1024
    with_new.close()


def test_sizes_are_kept_back(file: TargetFile, old: bytes) -> None:
    with_new = staged(file, (SIZE - 512, 512))
    with_new.truncate(SIZE - 512)
    assert with_new.nbytes == SIZE - 512
    assert content(file) == old
    with_new.apply()
    assert content(file) == old[:-512]
    with_new.close()


def test_the_last_bytes_follow_the_new_size(file: TargetFile, old: bytes) -> None:
    with_new = staged(file)
    with_new.truncate(SIZE + 4096)
    with_new.write_last(b"footer")
    with_new.apply()
    assert content(file) == old + bytes(4090) + b"footer"
    with_new.close()


def test_what_was_not_declared_is_refused(file: TargetFile, old: bytes) -> None:
    with_new = staged(file, (0, 4096), (4096, 4096))
    with_new.pwrite(4000, bytes(200))
    for offset, length in ((8191, 2), (20000, 1), (SIZE - 1, 2)):
        with pytest.raises(AssertionError, match="not declared"):
            with_new.pwrite(offset, bytes(length))
    with pytest.raises(AssertionError, match="not declared"):
        with_new.truncate(SIZE - 1)
    with pytest.raises(AssertionError, match="not declared"):
        with_new.clear_rest(SIZE)
    with pytest.raises(AssertionError, match="in the old content"):
        with_new.zero(SIZE - 1, 1)
    with pytest.raises(AssertionError, match="stay"):
        with_new.clear(0)
    assert content(file) == old
    with_new.close()


def test_the_rest_of_the_front_is_cleared(file: TargetFile, old: bytes) -> None:
    with_new = staged(file)
    with_new.pwrite(512, b"a" * 512)
    with_new.pwrite(3000, b"b")
    with_new.clear_rest(8192)
    assert with_new.staged_nbytes == 8192
    with_new.apply()
    front = bytes(512) + b"a" * 512 + bytes(1976) + b"b" + bytes(5191)
    assert content(file) == front + old[8192:]
    with_new.close()


def test_the_first_sector_is_written_last(
    file: TargetFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_new = staged(file)
    with_new.pwrite(0, b"h" * 2048)
    with_new.pwrite(4096, b"t")
    with_new.clear_rest(8192)
    calls = []
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls.append((offset, len(data), bytes(data[:1])))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with_new.apply()
    assert calls == [
        (512, 1536, b"h"),
        (4096, 1, b"t"),
        (0, 512, b"h"),
        (2048, 2048, b"\0"),
        (4097, 4095, b"\0"),
    ]
    with_new.close()


def test_later_writes_win(file: TargetFile, old: bytes) -> None:
    rng = random.Random(2)
    with_new = staged(file, (0, SIZE))
    wanted = bytearray(old)
    for _ in range(300):
        offset = rng.randrange(SIZE)
        data = rng.randbytes(rng.randrange(min(3000, SIZE - offset)))
        with_new.pwrite(offset, data)
        wanted[offset : offset + len(data)] = data
    with_new.apply()
    assert content(file) == wanted
    with_new.close()


def test_ranges() -> None:
    rng = random.Random(3)
    for _ in range(200):
        ranges = [(rng.randrange(50), rng.randrange(8)) for _ in range(rng.randrange(8))]
        covered = {x for offset, length in ranges for x in range(offset, offset + length)}
        result = joined(ranges)
        assert [x for offset, n in result for x in range(offset, offset + n)] == sorted(covered)
        free = [x for offset, n in gaps(result, 40) for x in range(offset, offset + n)]
        assert free == sorted(set(range(40)) - covered)
        offset, length = rng.randrange(50), rng.randrange(1, 5)
        assert is_inside(offset, length, result) == (set(range(offset, offset + length)) <= covered)
