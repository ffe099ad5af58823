"""Batches in pieces that do not take long, so that checkpoints can be between them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from imgcore.engine.extents import EXTENT_DTYPE, Kind, clip
from imgcore.engine.geometry import ZeroPolicy
from imgcore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.engine.geometry import Geometry
    from imgcore.engine.supply import Batch

# How long a piece is to take.
_SECONDS: Final = 0.125
# The first piece; a slow job has no shorter ones.
_MIN_NBYTES: Final = 4 * MIB
# A job may get slower while it works on a piece.
_MAX_NBYTES: Final = 128 * MIB


class Pace:
    """How much data a piece has, by the speed of those before it.

    Attributes
    ----------
    nbytes : int
        The most bytes of data for the next piece.  It doubles at most.
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
            self.nbytes = max(min(fitting, 2 * self.nbytes, _MAX_NBYTES), _MIN_NBYTES)


def without_front(batch: Batch, position: int) -> Batch:
    """Return a batch without what is before a position of the disk."""
    if position <= batch.start:
        return batch
    return _part(batch, np.asarray(batch.rows), position, batch.end)


def pieces(batch: Batch, geometry: Geometry, pace: Pace) -> Iterator[Batch]:
    """Yield a batch in pieces of whole units, each with as much data as is fitting."""
    rows = np.asarray(batch.rows)
    counted = rows["length"].astype(np.int64)
    if geometry.zero_policy is not ZeroPolicy.STORE:
        counted = np.where(rows["kind"] >= Kind.DATA, counted, 0)
    ends = counted.cumsum()
    start, wanted = batch.start, 0
    while (wanted := wanted + pace.nbytes) < int(ends[-1]):
        row = int(np.searchsorted(ends, wanted))
        before = int(ends[row] - counted[row])
        cut = int(rows["guest_offset"][row]) + wanted - before
        cut += -cut % geometry.unit_nbytes
        if start < cut < batch.end:
            yield _part(batch, rows, start, cut)
            start = cut
    yield _part(batch, rows, start, batch.end)


def _part(batch: Batch, rows: Any, start: int, end: int) -> Batch:
    if (start, end) == (batch.start, batch.end):
        return batch
    base = batch.base
    if base is not None:
        base = np.ascontiguousarray(clip(base, start, end))
    own = np.ascontiguousarray(clip(rows.astype(EXTENT_DTYPE, copy=False), start, end))
    return batch._replace(start=start, end=end, rows=own, base=base)
