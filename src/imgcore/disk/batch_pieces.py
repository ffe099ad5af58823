"""Batches in pieces that do not take long, so that checkpoints can be between them."""

from __future__ import annotations

import time
from bisect import bisect_left, bisect_right
from itertools import accumulate
from struct import Struct
from typing import TYPE_CHECKING, Any, Final, Protocol

from imgcore._core import extent_table
from imgcore.engine.geometry import ZeroPolicy
from imgcore.engine.kinds import Kind
from imgcore.engine.supply import Batch
from imgcore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.engine.extents import Extents
    from imgcore.engine.geometry import Geometry
    from imgcore.engine.kinds import ExtentRow

# struct imgc_extent.
_ROW: Final = Struct("<QQQQIHH")

# How long a piece is to take.  Between two of them the workers wait for half a
# millisecond.
_SECONDS: Final = 0.0625
# The first piece; a slow job has no shorter ones.
_MIN_NBYTES: Final = 4 * MIB
# A job may get slower while it works on a piece.
_MAX_NBYTES: Final = 256 * MIB
# How much longer than the one before a piece may be.
_MAX_GROWTH: Final = 4


class Pace:
    """How much data a piece has, by the speed of those before it.

    Attributes
    ----------
    nbytes : int
        The most bytes of data for the next piece.
    """

    def __init__(self) -> None:
        self.nbytes: int = _MIN_NBYTES
        self._done_nbytes = 0
        self._noted_at = time.monotonic()

    def note(self, done_nbytes: int) -> None:
        """Note that a piece has ended, and how many bytes are done by now."""
        now = time.monotonic()
        nbytes, seconds = done_nbytes - self._done_nbytes, now - self._noted_at
        self._done_nbytes, self._noted_at = done_nbytes, now
        if nbytes:
            fitting = int(nbytes / max(seconds, 1e-6) * _SECONDS)
            self.nbytes = max(min(fitting, _MAX_GROWTH * self.nbytes, _MAX_NBYTES), _MIN_NBYTES)


def without_front(batch: Batch, position: int) -> Batch:
    """Return a batch without what is before a position of the disk."""
    if position <= batch.start:
        return batch
    return _part(batch, _rows_of(batch), position, batch.end)


def at_steps(batches: Iterator[Batch], geometry: Geometry) -> Iterator[Batch]:
    """Yield batches that end at multiples of ``geometry.step_nbytes``, if it is not 0.

    One of holes only ends at the first multiple that a gap between batches reaches.
    """
    step, unit, done = geometry.step_nbytes, geometry.unit_nbytes, 0
    for batch in batches:
        if not step:
            yield batch
            continue
        line = done + -done % step
        if done < line <= batch.start:
            hole = (line - unit, unit, 0, 0, 0, Kind.HOLE, 0)
            yield Batch(line - unit, line, extent_table([hole]))
        rows, start, done = _rows_of(batch), batch.start, batch.end
        for cut in range(start + step - start % step, done, step):
            yield _part(batch, rows, start, cut)
            start = cut
        yield _part(batch, rows, start, done)


def pieces(batch: Batch, geometry: Geometry, pace: Pace) -> Iterator[Batch]:
    """Yield a batch in pieces of whole units, each with as much data as is fitting."""
    rows = _rows_of(batch)
    total_nbytes = rows.count(zeros_count=geometry.zero_policy is ZeroPolicy.STORE)
    start, wanted = batch.start, 0
    while (wanted := wanted + pace.nbytes) < total_nbytes:
        cut = rows.offset_of(wanted)
        cut += -cut % geometry.unit_nbytes
        if start < cut < batch.end:
            yield _part(batch, rows, start, cut)
            start = cut
    yield _part(batch, rows, start, batch.end)


def _part(batch: Batch, rows: _Rows, start: int, end: int) -> Batch:
    if (start, end) == (batch.start, batch.end):
        return batch
    base = batch.base
    if base is not None:
        base = _ArrayRows(base).part(start, end)
    return batch._replace(start=start, end=end, rows=rows.part(start, end), base=base)


def _rows_of(batch: Batch) -> _Rows:
    return _ArrayRows(batch.rows) if hasattr(batch.rows, "dtype") else _TableRows(batch.rows)


class _Rows(Protocol):
    """The rows of a batch, which is cut by how many bytes count."""

    def count(self, *, zeros_count: bool) -> int:
        """Return how many bytes count: those of data, or all."""
        ...

    def offset_of(self, nbytes: int) -> int:
        """Return the offset of the disk before which so many bytes count."""
        ...

    def part(self, start: int, end: int) -> Extents:
        """Return the rows of a range."""
        ...


class _ArrayRows:
    """Those of an array."""

    def __init__(self, rows: Extents) -> None:
        self._rows = rows

    def count(self, *, zeros_count: bool) -> int:
        import numpy as np

        rows = self._rows
        self._counted = rows["length"].astype(np.int64)
        if not zeros_count:
            self._counted = np.where(rows["kind"] >= Kind.DATA, self._counted, 0)
        self._ends = self._counted.cumsum()
        return int(self._ends[-1])

    def offset_of(self, nbytes: int) -> int:
        row = int(self._ends.searchsorted(nbytes))
        before = int(self._ends[row] - self._counted[row])
        return int(self._rows["guest_offset"][row]) + nbytes - before

    def part(self, start: int, end: int) -> Extents:
        import numpy as np

        from imgcore.engine.extents import EXTENT_DTYPE, clip

        rows = self._rows.astype(EXTENT_DTYPE, copy=False)
        return np.ascontiguousarray(clip(rows, start, end))


class _TableRows:
    """Those of a flat disk's table, without NumPy."""

    def __init__(self, table: Any) -> None:
        self._rows: list[ExtentRow] = list(_ROW.iter_unpack(memoryview(table).tobytes()))
        self._starts = [row[0] for row in self._rows]

    def count(self, *, zeros_count: bool) -> int:
        counted = (row[1] if zeros_count or row[5] >= Kind.DATA else 0 for row in self._rows)
        self._ends = list(accumulate(counted))
        return self._ends[-1]

    def offset_of(self, nbytes: int) -> int:
        row = bisect_left(self._ends, nbytes)
        before = self._ends[row - 1] if row else 0
        return self._starts[row] + nbytes - before

    def part(self, start: int, end: int) -> Extents:
        first, last = bisect_right(self._starts, start) - 1, bisect_left(self._starts, end)
        parts = (_clipped(row, start, end) for row in self._rows[first:last])
        table: Extents = extent_table(list(parts))
        return table


def _clipped(row: ExtentRow, start: int, end: int) -> ExtentRow:
    guest, length, host, _, file, kind, flags = row
    first, last = max(guest, start), min(guest + length, end)
    if kind < Kind.DATA:
        return first, last - first, 0, 0, 0, kind, flags
    return first, last - first, host + first - guest, last - first, file, kind, flags
