"""VHDX: the space of the file that payload and sector bitmap blocks are put in."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from imgcore import limits
from imgcore.errors import LimitExceededError
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.vhdx import layout

# The end of the last run, which no block reaches.
_ENDLESS: Final = 1 << 63


class FreeSpace:
    """Free space in runs; a block takes a part of one.

    A block that is freed may still be referred to after a crash, or be read by another
    thread.  So it is used again only after the next flush.

    Parameters
    ----------
    runs : sequence of (int, int)
        Start and end of free space, in bytes, ascending.
    end : int
        Host offset from which on nothing is used.
    """

    def __init__(self, runs: Sequence[tuple[int, int]], end: int) -> None:
        self._starts = [start for start, _ in runs if start < end]
        self._ends = [stop for start, stop in runs if start < end]
        self._starts.append(end)
        self._ends.append(_ENDLESS)
        self._released: list[tuple[int, int]] = []

    @property
    def end(self) -> int:
        """Host offset from which on nothing is used."""
        return self._starts[-1]

    def take(self, nbytes: int, after: int | None = None) -> int:
        """Return the host offset of space: at ``after`` if possible, or the first.

        LimitExceededError if the file would become too large.
        """
        if after is not None:
            index = bisect_right(self._starts, after) - 1
            if index >= 0 and after + nbytes <= self._ends[index]:
                return self._cut(index, after, nbytes)
        runs = enumerate(zip(self._starts, self._ends, strict=True))
        index = next(index for index, (start, end) in runs if end - start >= nbytes)
        return self._cut(index, self._starts[index], nbytes)

    def _cut(self, index: int, offset: int, nbytes: int) -> int:
        if offset + nbytes > limits.VHDX_MAX_FILE_NBYTES:
            raise LimitExceededError(
                f"the file would have {offset + nbytes} bytes, at most "
                f"{limits.VHDX_MAX_FILE_NBYTES} are allowed"
            )
        start, end = self._starts[index], self._ends[index]
        rest = [(a, b) for a, b in ((start, offset), (offset + nbytes, end)) if a < b]
        self._starts[index : index + 1] = [a for a, _ in rest]
        self._ends[index : index + 1] = [b for _, b in rest]
        return offset

    def give_back(self, start: int, nbytes: int) -> None:
        """Take back space that no table has referred to: it is free at once."""
        end = start + nbytes
        index = bisect_right(self._starts, start)
        # The runs that it touches become one with it.
        low = index - 1 if index and self._ends[index - 1] == start else index
        high = index + 1 if index < len(self._starts) and self._starts[index] == end else index
        joined = self._starts[low:index] or [start], self._ends[index:high] or [end]
        self._starts[low:high], self._ends[low:high] = joined

    def release(self, start: int, nbytes: int) -> None:
        """Take back space that tables refer to until the next flush."""
        self._released.append((start, nbytes))

    def withhold(self, file_end: int) -> None:
        """Let nothing in the file be free before the next flush without reads."""
        end = max(self.end, align_up(file_end, layout.ALIGNMENT))
        for start, stop in zip(self._starts, (*self._ends[:-1], end), strict=True):
            if start < stop:
                self.release(start, stop - start)
        self._starts, self._ends = [end], [_ENDLESS]

    def settle(self, *, is_unread: bool) -> list[tuple[int, int]]:
        """Free what was released, after a flush; return its offsets and sizes.

        Nothing is freed while reads may use it.
        """
        if not is_unread:
            return []
        freed, self._released = self._released, []
        for start, nbytes in freed:
            self.give_back(start, nbytes)
        return freed
