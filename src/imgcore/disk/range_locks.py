"""Keeps changes of one range of a disk apart, and lets all others go on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_Result = TypeVar("_Result")

_END: Final = 1 << 64


class _Turn(NamedTuple):
    """A change of a range; it lasts as long as its lock is held."""

    start: int
    end: int
    lock: threading.Lock

    def meets(self, start: int, end: int) -> bool:
        return self.start < end and start < self.end and self.lock.locked()


class _Thread(threading.local):
    """Of each thread: a lock that is held while it changes something."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class RangeLocks:
    """Locks on ranges of a disk, which are given in the order of the requests.

    A thread has one at a time, so that none waits for itself or in a circle.

    What is locked follows from locks alone that ``with`` blocks hold.  So an exception
    of a signal handler, which may end a call anywhere, leaves nothing locked.
    """

    def __init__(self) -> None:
        self._thread = _Thread()
        self._changing = threading.RLock()
        self._turns: list[_Turn] = []

    def holding(self, start: int, end: int, work: Callable[[], _Result]) -> _Result:
        """Call a function while ``[start, end)`` is held, and return its result.

        RuntimeError if this thread holds a range already, as in a signal handler.
        """
        mine = self._thread.lock
        if mine.locked():
            raise RuntimeError(
                "the image is changed in the middle of a change by the same thread "
                "(by a signal handler?)"
            )
        turn = _Turn(start, end, threading.Lock())
        with mine, turn.lock:
            for other in self._begin(turn):
                with other.lock:  # until it ends
                    pass
            return work()

    def holding_all(self, work: Callable[[], _Result]) -> _Result:
        """Call a function once all changes in progress have ended, before any other."""
        return self.holding(0, _END, work)

    def _begin(self, turn: _Turn) -> list[_Turn]:
        """Queue up, and return what is before in the queue and meets the range."""
        with self._changing:
            turns = [other for other in self._turns if other.lock.locked()]
            self._turns = [*turns, turn]
        return [other for other in turns if other.meets(turn.start, turn.end)]
