"""What two disks have in common by their extents alone, without reading it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from imgcore.engine.extents import Kind, split, zeroed_at_ranges
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.engine.source_file import SourceFile

    Offsets = NDArray[np.uint64]

_LAST: Final = np.uint64(SECTOR_NBYTES - 1)
# A gap is long if it takes more than one part of so many of a range.
_GAPS_OF_A_RANGE: Final = 16


class SameRanges(NamedTuple):
    """The ranges in which two disks are the same, inside one range of both.

    Attributes
    ----------
    starts, ends : ndarray, shape (n,), dtype uint64
        Ranges that neither of the disks stores, or both in the same place: ascending
        and disjoint.
    stored_starts, stored_ends : ndarray, shape (m,), dtype uint64
        The parts of them that are stored.
    end : int
        The end of the range of both.
    """

    starts: Offsets
    ends: Offsets
    stored_starts: Offsets
    stored_ends: Offsets
    end: int

    def without(self, rows: Extents) -> Extents:
        """Return the rows of one of the disks, with ZERO for what is the same."""
        # Data starts at sectors.
        starts, ends = (self.starts + _LAST) & ~_LAST, self.ends & ~_LAST
        ends[self.ends == self.end] = self.end
        is_left = starts < ends
        return zeroed_at_ranges(rows, starts[is_left], ends[is_left])

    def other_ranges(self, start: int, unit: int, max_nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield ranges in whole units, ascending and disjoint, that have all the rest.

        Parameters
        ----------
        start : int
            The start of the range of both disks, a multiple of ``unit``.
        unit : int
            A power of two.
        max_nbytes : int
            The most bytes of a range, a multiple of ``unit``.
        """
        edge = np.array([start], np.uint64), np.array([self.end], np.uint64)
        firsts = np.concatenate((edge[0], self.ends))
        lasts = np.concatenate((self.starts, edge[1]))
        is_range = firsts < lasts
        firsts, lasts = firsts[is_range], lasts[is_range]
        # Ranges end at long gaps, too.
        is_long = firsts[1:] - lasts[:-1] > np.uint64(max_nbytes // _GAPS_OF_A_RANGE)
        group_ends = np.append(np.flatnonzero(is_long) + 1, len(firsts))
        index, done = 0, start
        while index < len(firsts):
            first = int(firsts[index])
            first = max(first - first % unit, done)
            done = first + max_nbytes
            group_end = group_ends[np.searchsorted(group_ends, index, side="right")]
            last = int(lasts[min(group_end, np.searchsorted(firsts, done)) - 1])
            done = min(done, last + -last % unit, self.end)
            yield first, done
            index = int(np.searchsorted(lasts, done, side="right"))

    def store_something(self, starts: Offsets, ends: Offsets) -> NDArray[np.bool_]:
        """Tell for each of some ranges whether a part of it is the same and stored."""
        index = np.searchsorted(self.stored_ends, starts, side="right")
        # One more range, after all others.
        stored_starts = np.append(self.stored_starts, np.uint64(self.end))
        return stored_starts[index] < ends


class Places:
    """Compares extents by where they are stored.

    Parameters
    ----------
    sources : sequence of SourceFile
        The files that extents of either disk refer to by index.
    """

    def __init__(self, sources: Sequence[SourceFile]) -> None:
        self._files = _numbers([source.file.identity for source in sources])
        blocks = [(s.file.identity, s.guest_base, s.block_nbytes) for s in sources]
        # Where compressed blocks of a file start differs from image to image.
        self._blocks = _numbers(blocks)

    def compare(self, a: Extents, b: Extents) -> SameRanges:
        """Return what is the same in two gap-free batches over one range."""
        starts = np.union1d(a["guest_offset"], b["guest_offset"])
        end = a["guest_offset"][-1] + a["length"][-1]
        ends = np.append(starts[1:], end)
        a, b = split(a, starts), split(b, starts)
        is_empty = (a["kind"] < Kind.DATA) & (b["kind"] < Kind.DATA)
        is_stored = (a["kind"] >= Kind.DATA) & (self._file_of(a) == self._file_of(b))
        for name in ("kind", "flags", "host_offset", "host_length"):
            is_stored &= a[name] == b[name]
        is_same = is_empty | is_stored
        return SameRanges(
            *_joined(starts[is_same], ends[is_same]),
            *_joined(starts[is_stored], ends[is_stored]),
            int(end),
        )

    def _file_of(self, rows: Extents) -> NDArray[np.int64]:
        index = np.where(rows["kind"] >= Kind.DATA, rows["file"], len(self._files) - 1)
        return np.where(rows["kind"] == Kind.DATA, self._files[index], self._blocks[index])


def _numbers(keys: Sequence[object]) -> NDArray[np.int64]:
    """Return a number for each key, equal for equal ones, and -1 at the end."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys] + [-1], np.int64)


def _joined(starts: Offsets, ends: Offsets) -> tuple[Offsets, Offsets]:
    """Join ascending ranges that touch."""
    if not len(starts):
        return starts, ends
    is_gap = starts[1:] != ends[:-1]
    return starts[np.append(True, is_gap)], ends[np.append(is_gap, True)]
