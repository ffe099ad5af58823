"""The space that blocks of an image are put in when it is written in place."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class FreeSpace:
    """Space of a file for blocks of one size.

    A block that is freed may still be referred to after a crash, or be read by another
    thread.  So it is used again only after the next flush.

    Parameters
    ----------
    end : int
        Host offset from which on nothing is used; blocks are put there.
    block_nbytes : int
        Bytes from one block to the next.
    free : iterable of int
        Host offsets of blocks before the end that nothing uses, ascending.
    """

    def __init__(self, end: int, block_nbytes: int, free: Iterable[int] = ()) -> None:
        self.end: int = end
        self._block_nbytes = block_nbytes
        self._free: list[int] = list(free)
        self._released: list[int] = []

    def take(self, after: int | None = None) -> int:
        """Return the host offset of space for a block.

        It is that of ``after``, the end of the block before it on the disk, if that is
        free; else the first that is.
        """
        if after is not None and after in (self.end, self._first_at(after)):
            return self._taken(after)
        return self._taken(self._free[0] if self._free else self.end)

    def _first_at(self, offset: int) -> int | None:
        index = bisect_left(self._free, offset)
        return self._free[index] if index < len(self._free) else None

    def _taken(self, offset: int) -> int:
        if offset == self.end:
            self.end += self._block_nbytes
        else:
            del self._free[bisect_left(self._free, offset)]
        return offset

    @property
    def free(self) -> list[int]:
        """The free blocks before the end, ascending."""
        return self._free

    def give_back(self, offset: int) -> None:
        """Take back a block that no table has referred to: it is free at once."""
        insort(self._free, offset)

    def release(self, offset: int) -> None:
        """Take back a block that tables refer to until the next flush."""
        self._released.append(offset)

    def withhold(self, file_end: int) -> None:
        """Let no block be free before the next flush after which nothing is read.

        Nor is what follows the last block, up to the end of the file.
        """
        blocks = range(self.end, file_end, self._block_nbytes)
        self._released += [*self._free, *blocks]
        self._free = []
        self.end += len(blocks) * self._block_nbytes

    def trim(self) -> int:
        """Forget free blocks at the end, and return the end, which may be lower now."""
        while self._free and self._free[-1] == self.end - self._block_nbytes:
            self.end = self._free.pop()
        return self.end

    def settle(self, *, is_unread: bool) -> list[int]:
        """Free what was released, after a flush; return those blocks.

        Nothing is freed while reads may use it.
        """
        if not is_unread:
            return []
        freed, self._released = sorted(self._released), []
        for offset in freed:
            insort(self._free, offset)
        return freed
