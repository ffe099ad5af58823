"""Keeps changes of one range of a disk apart, and lets all others go on."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_WHOLE: Final = (0, 1 << 64)


class _Turn(NamedTuple):
    number: int
    start: int
    end: int
    thread: int

    def meets(self, other: _Turn) -> bool:
        return self.start < other.end and other.start < self.end


class RangeLocks:
    """Locks on ranges of a disk, which are given in the order of the requests."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self._turns: dict[int, _Turn] = {}
        self._next_number = 0

    @contextmanager
    def held(self, start: int, end: int) -> Iterator[None]:
        """Hold ``[start, end)`` in a ``with`` block.

        RuntimeError if this thread holds a part of it already, which happens in signal
        handlers: it would wait for itself.
        """
        with self._changed:
            turn = _Turn(self._next_number, start, end, threading.get_ident())
            if any(turn.meets(t) and t.thread == turn.thread for t in self._turns.values()):
                raise RuntimeError("a signal handler changes what the same thread is changing")
            self._next_number += 1
            self._turns[turn.number] = turn
        try:
            with self._changed:
                while any(t.number < turn.number and turn.meets(t) for t in self._turns.values()):
                    self._changed.wait()
            yield
        finally:
            with self._changed:
                self._turns.pop(turn.number, None)
                self._changed.notify_all()

    @contextmanager
    def all_held(self) -> Iterator[None]:
        """Hold the whole disk, once all changes in progress have ended."""
        with self.held(*_WHOLE):
            yield
