"""Batches are cut so that a checkpoint is never far away, however slow the job is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from imgcore._core import extent_table
from imgcore.disk import batch_pieces
from imgcore.disk.batch_pieces import Pace, at_steps, pieces, without_front
from imgcore.engine.extents import EXTENT_DTYPE, Kind, clip
from imgcore.engine.geometry import Geometry, Placing, ZeroPolicy
from imgcore.engine.supply import Batch
from imgcore.limits import KIB, MIB

LEAST = 4 * MIB


class Clock:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(batch_pieces, "time", clock)
    return clock


def run(pace: Pace, clock: Clock, speed: int, n_pieces: int) -> list[int]:
    """Return the sizes of pieces that are done at a speed."""
    sizes, done = [], 0
    for _ in range(n_pieces):
        sizes.append(pace.nbytes)
        done += pace.nbytes
        clock.now += pace.nbytes / speed
        pace.note(done)
    return sizes


def test_a_fast_job_gets_longer_pieces_and_a_slow_one_short_ones(clock: Clock) -> None:
    assert run(Pace(), clock, 4096 * MIB, 8) == [
        size * MIB for size in (4, 16, 64, 256, 256, 256, 256, 256)
    ]
    assert run(Pace(), clock, 1 * MIB, 4) == [LEAST] * 4
    assert run(Pace(), clock, 80 * MIB, 4)[-1] == 5 * MIB


def test_a_job_that_gets_slower_has_short_pieces_at_once(clock: Clock) -> None:
    pace = Pace()
    run(pace, clock, 4096 * MIB, 8)
    clock.now += 1000.0
    pace.note(1024 * MIB)
    assert pace.nbytes == LEAST


def test_holes_say_nothing_about_the_speed(clock: Clock) -> None:
    pace = Pace()
    pace.note(LEAST)
    before = pace.nbytes
    clock.now += 1000.0
    pace.note(LEAST)
    assert pace.nbytes == before


def geometry(zero_policy: ZeroPolicy = ZeroPolicy.SKIP) -> Geometry:
    return Geometry(
        block_nbytes=64 * KIB,
        placing=Placing.APPEND,
        guest_nbytes=1024 * MIB,
        zero_policy=zero_policy,
        group_nblocks=32,
    )


def batch() -> Batch:
    """Return 60 MiB of holes, 100 MiB of data, 20 of holes and 20 of data."""
    at, rows = 0, []
    for kind, mib in ((Kind.HOLE, 60), (Kind.DATA, 100), (Kind.HOLE, 20), (Kind.DATA, 20)):
        rows.append((at, mib * MIB, at, mib * MIB, 0, kind, 0))
        at += mib * MIB
    return Batch(0, at, np.array(rows, EXTENT_DTYPE))


@pytest.mark.parametrize("is_table", [False, True])
@pytest.mark.parametrize("start", [0, 2 * MIB, 62 * MIB])
def test_pieces_are_the_batch_and_end_with_whole_units(
    start: int, is_table: bool, clock: Clock
) -> None:
    pace, given, found = Pace(), batch(), []
    if is_table:
        given = given._replace(rows=extent_table(given.rows.tolist()))
    for piece in pieces(without_front(given, start), geometry(), pace):
        piece = piece._replace(rows=np.asarray(piece.rows))
        found.append(piece)
        data = piece.rows[piece.rows["kind"] == Kind.DATA]["length"].sum()
        assert data <= pace.nbytes + geometry().unit_nbytes
        clock.now += 0.001
        pace.note(sum(int(one.end - one.start) for one in found))
    assert len(found) > 3
    assert (found[0].start, found[-1].end) == (start, 200 * MIB)
    for before, after in itertools.pairwise(found):
        assert before.end == after.start
        assert before.end % geometry().unit_nbytes == 0
    rows = np.concatenate([piece.rows for piece in found])
    assert rows["guest_offset"][0] == start
    assert (np.diff(rows["guest_offset"].astype(np.int64)) == rows["length"][:-1]).all()
    data = rows[rows["kind"] == Kind.DATA]
    assert (data["host_offset"] == data["guest_offset"]).all()


def test_zeros_that_are_stored_count_as_data() -> None:
    holes = Batch(0, 32 * MIB, np.array([(0, 32 * MIB, 0, 0, 0, Kind.HOLE, 0)], EXTENT_DTYPE))
    assert len(list(pieces(holes, geometry(), Pace()))) == 1
    assert len(list(pieces(holes, geometry(ZeroPolicy.STORE), Pace()))) == 8


@pytest.mark.parametrize("is_table", [False, True])
def test_batches_end_at_steps(is_table: bool) -> None:
    """Also in a gap between batches, where a batch of holes ends at the first one."""
    step = 16 * MIB
    rows = batch().rows
    first = Batch(0, 65 * MIB, clip(rows, 0, 65 * MIB))
    last = Batch(110 * MIB, 200 * MIB, clip(rows, 110 * MIB, 200 * MIB))
    given = [first, last]
    if is_table:
        given = [one._replace(rows=extent_table(one.rows.tolist())) for one in given]
    one_step = geometry()._replace(step_nbytes=step)
    found = list(at_steps(iter(given), one_step))
    ends = [piece.end for piece in found]
    assert ends == sorted({*range(step, 200 * MIB, step), 65 * MIB, 200 * MIB} - {96 * MIB})
    hole = next(piece for piece in found if piece.end == 80 * MIB)
    assert hole.end - hole.start == one_step.unit_nbytes
    assert np.asarray(hole.rows)["kind"].tolist() == [Kind.HOLE]
    for piece in found:
        table = np.asarray(piece.rows)
        assert table["guest_offset"][0] == piece.start
        assert table["length"].sum() == piece.end - piece.start
    assert list(at_steps(iter(given), geometry())) == given
