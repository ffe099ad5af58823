"""The window on an image that comes in order; reading ahead changes nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from imgcore.disk import streamed_window
from imgcore.disk.streamed_window import StreamedWindow
from imgcore.engine.extents import EXTENT_DTYPE, Kind
from imgcore.errors import ImgcoreError
from imgcore.files.stream_input import StreamInput
from imgcore.limits import KIB, MIB

SEGMENT_NBYTES = 64 * KIB
N_SEGMENTS = 12
NBYTES = 3 * MIB + 4321
SEEDS = range(1, 200)
CONTENT = np.random.default_rng(15).integers(0, 256, NBYTES, np.uint8).tobytes()
CONTENT += bytes(SEGMENT_NBYTES)


class Origin:
    """Gives bytes at once, or says that none are there yet."""

    identity: Any = None

    def __init__(self, numbers: random.Random) -> None:
        self._numbers = numbers
        self._at = 0

    def readinto(self, view: memoryview, _tick: Callable[[], None] | None, /) -> int:
        n = min(len(view), len(CONTENT) - self._at, self._numbers.choice([1000, 70_000, MIB]))
        view[:n] = CONTENT[self._at : self._at + n]
        self._at += n
        return n

    def read_now(self, view: memoryview) -> int | None:
        return self.readinto(view, None) if self._numbers.random() < 0.7 else None

    def open_core(self, head: bytes, *, open_ended: bool, tail_nbytes: int) -> None:
        return None

    def cancel(self) -> bool:
        return True

    def close(self) -> None:
        """There is nothing to free."""


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    room_nbytes = streamed_window._ROOM_NBYTES
    monkeypatch.setattr(streamed_window, "BUFFER_NBYTES", room_nbytes + SEGMENT_NBYTES)
    monkeypatch.setattr(streamed_window, "STREAM_SEGMENT_NBYTES", SEGMENT_NBYTES)
    monkeypatch.setattr(streamed_window, "STREAM_BEHIND_NBYTES", SEGMENT_NBYTES)
    monkeypatch.setattr(streamed_window, "MIN_STREAM_SEGMENTS", N_SEGMENTS)
    monkeypatch.setattr(streamed_window, "_PULL_NBYTES", 10 * KIB)


def placed_bytes(window: StreamedWindow, start: int, end: int) -> bytes:
    """Return what the engine would read of two rows at a place of the stream."""
    half = (end - start) // 2
    rows = np.zeros(2, EXTENT_DTYPE)
    rows["guest_offset"] = (0, half)
    rows["length"] = rows["host_length"] = (half, end - start - half)
    rows["host_offset"] = (start, start + half)
    rows["kind"] = Kind.DATA
    pieces = []
    for row in window.place(rows, 1):
        at = int(row["host_offset"])
        pieces.append(window._buffers[row["file"]][at : at + int(row["length"])].tobytes())
    return b"".join(pieces)


def steps(seed: int) -> Iterator[tuple[str, int, int]]:
    """Yield what is asked of a window: mostly in order, and also a little back."""
    numbers = random.Random(seed)
    back = numbers.choice([SEGMENT_NBYTES // 2, 2 * SEGMENT_NBYTES])
    yield "place", 0, 1000
    at = 1000
    while at < len(CONTENT):
        start = max(at - numbers.choice([0] * 9 + [back]), 0)
        start = min(start + numbers.choice([0] * 9 + [5000, 12 * SEGMENT_NBYTES]), NBYTES)
        end = min(start + numbers.choice([2, 3000, 50_000, 2 * SEGMENT_NBYTES]), len(CONTENT) + 5)
        yield numbers.choice(["place"] * 8 + ["pread", "look"]), start, end
        at = max(at, end)
    yield "drain", 0, 0


@contextmanager
def opened_window(numbers: random.Random) -> Iterator[tuple[StreamedWindow, StreamInput]]:
    with StreamInput(Origin(numbers), "stream") as stream:
        window = StreamedWindow(stream)
        yield window, stream
        window.release()


def result(window: StreamedWindow, step: str, start: int, end: int) -> object:
    """Return what a step gives; bytes of the stream must be the right ones."""
    if step == "drain":
        return window.drain()
    if step == "look":
        return bytes(window.look(start, end - start))
    if step == "pread":
        data = window.pread(start, end - start)
    else:
        data = placed_bytes(window, start, end)
    assert data == CONTENT[start:end]
    return len(data)


def outcome(seed: int, *, reads_ahead: bool) -> list[object]:
    """Return what each step gives or raises."""
    numbers = random.Random(-seed)
    found: list[object] = []
    with opened_window(numbers) as (window, _):
        for step, start, end in steps(seed):
            for _ in range(numbers.randrange(40) if reads_ahead else 0):
                assert window.read_ahead() in (0, 1, 50)
            try:
                found.append(result(window, step, start, end))
            except ImgcoreError as error:
                return [*found, str(error)]
            found.append((window.nbytes, window.used_end))
        assert window.read_ahead() == 50
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_reading_ahead_changes_nothing(seed: int) -> None:
    assert outcome(seed, reads_ahead=True) == outcome(seed, reads_ahead=False)


def test_steps_meet_each_outcome() -> None:
    found = [each for seed in SEEDS for each in outcome(seed, reads_ahead=True)]
    texts = " ".join(each for each in found if isinstance(each, str))
    for words in ("needed after those at", "needed before those at", "ends too early"):
        assert texts.count(words) > 3
    assert sum(isinstance(each, int) for each in found) > 300
    assert sum(isinstance(each, tuple) and isinstance(each[1], bytes) for each in found) > 3


def test_no_more_is_read_ahead_than_fits() -> None:
    with opened_window(random.Random(0)) as (window, stream):
        while window.read_ahead() != 50:
            pass
        assert stream.position == 2 * SEGMENT_NBYTES
        assert window.pread(0, 8) == CONTENT[:8]


def test_a_segment_before_a_gap_is_complete() -> None:
    with opened_window(random.Random(0)) as (window, _):
        assert placed_bytes(window, 0, 1000) == CONTENT[:1000]
        far = 12 * SEGMENT_NBYTES
        assert placed_bytes(window, far, far + 9) == CONTENT[far : far + 9]
        assert placed_bytes(window, 30_000, 31_000) == CONTENT[30_000:31_000]
