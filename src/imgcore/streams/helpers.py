"""Threads that help with a stream, as far as the system makes them."""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from concurrent.futures import Future


def started(thread: Thread) -> bool:
    """Start a thread; False if the system makes no more (RLIMIT_NPROC, a cgroup)."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


class _Task(NamedTuple):
    future: Future[Any]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.function(*self.arguments))
        except BaseException as error:
            self.future.set_exception(error)


class Helpers:
    """Calls functions on several threads; without any, on the calling thread.

    Parameters
    ----------
    n_threads : int
        At most so many.
    name : str
        Of the threads.
    """

    def __init__(self, n_threads: int, name: str) -> None:
        # Loaded late: it loads logging, which info does without.
        from concurrent.futures import Future

        self._future: Final[type[Future[Any]]] = Future
        self._tasks: Final[queue.SimpleQueue[_Task | None]] = queue.SimpleQueue()
        self._threads: list[Thread] = []
        try:
            for number in range(n_threads):
                thread = Thread(target=self._work, name=f"{name}-{number}", daemon=True)
                if not started(thread):
                    break
                self._threads.append(thread)
        except BaseException:
            self.close()
            raise

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Call a function, perhaps later; the result is in the future."""
        task = _Task(self._future(), function, arguments)
        if self._threads:
            self._tasks.put(task)
        else:
            task.run()
        return task.future

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            task.run()

    def close(self) -> None:
        """Drop the calls that have not begun, and end the threads."""
        while not self._tasks.empty():
            with suppress(queue.Empty):
                self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()
