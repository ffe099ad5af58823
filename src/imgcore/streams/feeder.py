"""A thread that fills buffers in turn, and hands them to the thread that uses them."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Final

from imgcore.engine.thread_budget import Lease
from imgcore.streams.helpers import started

# How often a consumer that waits calls its ``tick``.
_TICK_SECONDS: Final = 0.05
# A filled buffer stays as it is until the second one after it is asked for.
_N_HELD: Final = 2
MIN_BUFFERS: Final = _N_HELD + 2


def filled(
    fill: Callable[[memoryview], int],
    buffers: Sequence[memoryview],
    *,
    tick: Callable[[], None] | None = None,
    cancel: Callable[[], bool] | None = None,
) -> Generator[tuple[int, int], None, None]:
    """Fill buffers on a thread, ahead of their use.

    Parameters
    ----------
    fill : callable
        Fills a buffer, and returns how many bytes; fewer than its length at the end.
    buffers : sequence of memoryview
        At least `MIN_BUFFERS`.
    tick : callable, optional
        Called several times a second while the caller waits; it may raise.
    cancel : callable, optional
        Ends a call of ``fill`` that waits, or returns False if it cannot.  Without it,
        a call ends soon anyway.

    Yields
    ------
    tuple of (int, int)
        Number of a buffer, and bytes in it.  It stays as it is until the second one
        after it is asked for.

    Notes
    -----
    The thread ends with the iterator, or when the iterator is closed.
    """
    feeder = _Feeder(fill, buffers)
    held: deque[int] = deque()
    feeder.begin(waits_for_others=cancel is not None)
    try:
        while (item := feeder.take(tick)) is not None:
            yield item
            held.append(item[0])
            if len(held) == _N_HELD:
                feeder.give_back(held.popleft())
    finally:
        feeder.stop(cancel)


class _Feeder(threading.Thread):
    def __init__(self, fill: Callable[[memoryview], int], buffers: Sequence[memoryview]) -> None:
        super().__init__(name="imgcore-stream", daemon=True)
        self._fill = fill
        self._buffers = buffers
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[tuple[int, int] | BaseException | None]
        self._filled = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._is_alone = False
        self._lease = Lease(2)
        for number in range(len(buffers)):
            self._free.put(number)

    def begin(self, *, waits_for_others: bool) -> None:
        """Start the thread, or work in `take` if there is none for it.

        An object of the caller's that waits can only be left alone on a thread.
        """
        has_thread = self._lease.n_threads > 1 or (waits_for_others and self._lease.take_spare())
        self._is_alone = not (has_thread and started(self))

    def run(self) -> None:
        """Fill buffers until the end, an error, or `stop`."""
        while self._fill_next():
            pass

    def _fill_next(self) -> bool:
        """Fill one buffer; False at the end."""
        number = self._free.get()
        if number is None or self._stopped.is_set():
            return False
        view = self._buffers[number]
        try:
            n = self._fill(view)
        except BaseException as error:
            self._filled.put(error)
            return False
        if n:
            self._filled.put((number, n))
        if n < len(view):
            self._filled.put(None)
            return False
        return True

    def take(self, tick: Callable[[], None] | None) -> tuple[int, int] | None:
        """Return the next buffer, None at the end; raises the thread's exception."""
        if self._is_alone and self._filled.empty():
            self._fill_next()
        item = self._next(tick)
        if isinstance(item, BaseException):
            raise item
        return item

    def _next(self, tick: Callable[[], None] | None) -> tuple[int, int] | BaseException | None:
        if tick is None:
            return self._filled.get()
        while True:
            try:
                return self._filled.get(timeout=_TICK_SECONDS)
            except queue.Empty:
                tick()

    def give_back(self, number: int) -> None:
        """Have a buffer filled again."""
        self._free.put(number)

    def stop(self, cancel: Callable[[], bool] | None) -> None:
        """End the thread, and wait until it has finished its current buffer.

        A read that waits in an object of the caller's cannot be ended.  The thread is
        left alone with it then, and does nothing after it.
        """
        self._stopped.set()
        self._free.put(None)
        self._lease.close()
        if self._is_alone:
            return
        if cancel is None or not self.is_alive() or cancel():
            self.join()
