"""The engine's side of writing in place: tables of what may be overwritten, epochs."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imgcore._core import CoreError, Disk, File, Uses
from imgcore.engine.extents import EXTENT_DTYPE, Kind

KIB = 1024
SPAN = 64 * KIB


class Overwritable(Disk):
    """A disk of a file's first bytes, of which a hole may not be overwritten."""

    def __init__(
        self, file: File, nbytes: int, hole: tuple[int, int], uses: Uses, span: int = SPAN
    ) -> None:
        self.hole = hole
        self.nbytes = nbytes
        self.n_tables = 0
        super().__init__(
            [(file, nbytes, 0, 0)],
            virtual_size=nbytes,
            span=span,
            cache=1 << 20,
            uses=uses,
            lock=threading.RLock(),
        )

    def rows(self, start: int, end: int) -> Any:
        self.n_tables += 1
        first, last = (min(max(at, start), end) for at in self.hole)
        parts = ((start, first, Kind.DATA), (first, last, Kind.HOLE), (last, end, Kind.DATA))
        rows = [
            (a, b - a, a if kind == Kind.DATA else 0, b - a if kind == Kind.DATA else 0, 0, kind, 0)
            for a, b, kind in parts
            if a < b
        ]
        return np.array(rows, EXTENT_DTYPE)

    def is_damage(self, error: Exception) -> bool:
        return isinstance(error, CoreError)

    def range(self, offset: Any, length: Any) -> tuple[int, int]:
        if offset + length > self.nbytes:
            raise ValueError("outside")
        return offset, length


def refuse() -> None:
    raise ValueError("closed")


@pytest.fixture
def uses() -> Uses:
    return Uses(lambda: None, refuse)


def test_only_what_may_be_overwritten_is_written(tmp_path: Path, uses: Uses) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * SPAN))
    fd = os.open(path, os.O_RDWR)
    file = File.from_fd(fd)
    disk = Overwritable(file, 4 * SPAN, (SPAN + 8 * KIB, SPAN + 12 * KIB), uses)
    data = os.urandom(2 * SPAN)
    assert disk.write(0, data) is None  # no table is kept yet
    assert disk.n_tables == 0
    for offset in (0, SPAN, SPAN + 1):
        disk.load(offset)
    assert disk.n_tables == 2
    assert disk.write(5, data) is None  # but a part is written
    assert disk.write(SPAN + 12 * KIB, b"") == 0
    assert disk.write(SPAN + 12 * KIB, memoryview(data)[:100]) == 100
    assert file.take_written()
    assert not file.take_written()
    disk.forget(SPAN, SPAN + 1)
    assert disk.write(SPAN + 12 * KIB, data) is None
    assert disk.write(0, b"x") == 1
    disk.stop_writing()
    assert disk.write(0, b"y") is None
    disk.resume_writing()
    assert disk.write(0, b"y") == 1
    with pytest.raises(ValueError, match="outside"):
        disk.write(4 * SPAN, b"y")
    assert disk.write(0, memoryview(data)[::2]) is None
    file.refuse_writes()
    assert disk.write(0, b"z") is None
    with pytest.raises(CoreError):
        file.zero(0, 1)
    expected = bytearray(4 * SPAN)
    expected[0:1] = b"y"
    expected[5 : SPAN + 8 * KIB] = data[: SPAN + 8 * KIB - 5]
    expected[SPAN + 12 * KIB : SPAN + 12 * KIB + 100] = data[:100]
    assert path.read_bytes() == expected
    assert uses.close()
    with pytest.raises(ValueError, match="closed"):
        disk.write(0, b"x")
    os.close(fd)


def test_an_error_has_its_place(tmp_path: Path, uses: Uses) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(SPAN))
    fd = os.open(path, os.O_RDONLY)
    disk = Overwritable(File.from_fd(fd), SPAN, (0, 0), uses)
    disk.load(0)
    with pytest.raises(CoreError) as caught:
        disk.write(700, b"x")
    assert (caught.value.os_errno, caught.value.offset, caught.value.source) == (9, 700, 0)
    os.close(fd)


def test_reads_are_over_though_others_go_on(uses: Uses) -> None:
    """A read lasts until it gets its table."""
    inside, go_on = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]

    class Waiting(Overwritable):
        def rows(self, start: int, end: int) -> Any:
            number = start // SPAN
            inside[number].set()
            assert go_on[number].wait(30)
            return super().rows(start, end)

    memory = File.from_memory(bytearray(2 * SPAN), writable=True)
    disks = [Waiting(memory, 2 * SPAN, (0, 0), uses) for _ in range(2)]
    threads = [threading.Thread(target=disks[i].read, args=(i * SPAN, 10)) for i in range(2)]
    assert uses.is_over(uses.epoch())
    threads[0].start()
    assert inside[0].wait(30)
    first = uses.epoch()
    assert not uses.is_over(first)
    threads[1].start()
    assert inside[1].wait(30)
    assert not uses.is_over(first)
    assert not uses.is_idle
    go_on[0].set()
    threads[0].join()
    assert uses.is_over(first)  # the second one is still reading
    go_on[1].set()
    threads[1].join()
    assert uses.is_idle


def test_long_writes_see_signals(tmp_path: Path, uses: Uses) -> None:
    nbytes = 512 << 20
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, nbytes)
    fd = os.open(path, os.O_RDWR)

    disk = Overwritable(File.from_fd(fd), nbytes, (0, 0), uses, span=1 << 63)
    disk.load(0)

    data = bytes(nbytes)

    class Interrupted(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(Interrupted):
            while True:
                disk.write(0, data)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    os.close(fd)
