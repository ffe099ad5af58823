"""Signals: those that end a job, and the one that asks how far it is."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

from imgcore.files.commit_point import CommitCounter

# All whose default is to end the process, except for KILL, which cannot be caught;
# those of faults in the program (ILL, TRAP, BUS, FPE, SEGV, SYS), which cannot go on;
# PIPE and XFSZ, which Python ignores, so that the system call fails; and USR1.
_ENDING: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGABRT,
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGIO,
    signal.SIGPWR,
    signal.SIGSTKFLT,
    signal.SIGXCPU,
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)

_REPEAT_SECONDS: Final = 0.01


class Terminated(BaseException):
    """A signal asked the process to end.

    Like KeyboardInterrupt, it is not caught by ``except Exception``.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


def signal_name(number: int) -> str:
    """Return ``SIGTERM`` or ``SIGRTMIN+3``."""
    if number <= signal.SIGRTMIN:
        return signal.Signals(number).name
    return f"SIGRTMIN+{number - signal.SIGRTMIN}"


_started: Final = time.monotonic()


def _running() -> str:
    return f"imgcore: running for {time.monotonic() - _started:.1f} s"


class State:
    """How far the command is; SIGUSR1 prints the line that ``tell`` returns."""

    tell: Callable[[], str] = staticmethod(_running)

    @classmethod
    def told_by(cls, tell: Callable[[], str] | None) -> None:
        """Have a function tell it; None goes back to the time that has passed."""
        cls.tell = staticmethod(_running if tell is None else tell)


def _report_state(_number: int, _frame: FrameType | None) -> None:
    # RuntimeError: the signal interrupted the printing of another line.
    if sys.stderr is not None:
        with suppress(OSError, ValueError, RuntimeError):
            # In one piece: the next signal may come in between.
            sys.stderr.write(f"{State.tell()}\n")
            sys.stderr.flush()


class EndingSignals:
    """Turns the first signal that ends a job into an exception.

    Later ones are ignored, so that they cannot interrupt the clean-up.  Nor does a
    signal change anything once the target has its name: the command then ends with the
    exit code of a job that is done.
    """

    def __init__(self) -> None:
        self._n_committed = CommitCounter.count
        self._is_over = False
        self._previous: dict[int, Any] = {}
        self._previous_hook = sys.unraisablehook

    @property
    def is_late(self) -> bool:
        """Whether a target got its name since this object was made."""
        return CommitCounter.count != self._n_committed

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt or Terminated, if there is something to end."""
        if self._is_over or self.is_late:
            return
        self._is_over = True
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)

    def ignore(self) -> None:
        """Ignore all signals from now on: the exit code is known."""
        self._is_over = True

    def _repeat(self, lost: sys.UnraisableHookArgs) -> None:
        # Python drops exceptions that are raised in a finalizer: send the signal again.
        if not isinstance(lost.exc_value, KeyboardInterrupt | Terminated):
            self._previous_hook(lost)
            return
        self._is_over = False
        number = getattr(lost.exc_value, "signal_number", signal.SIGINT)
        threading.Timer(_REPEAT_SECONDS, os.kill, (os.getpid(), number)).start()

    def install(self) -> None:
        """Handle the signals, except for those that the caller ignores (nohup)."""
        sys.unraisablehook = self._repeat
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (*_ENDING, signal.SIGUSR1):
            handler = signal.getsignal(number)
            if handler is not signal.SIG_IGN:
                self._previous[number] = handler
                signal.signal(number, _report_state if number == signal.SIGUSR1 else self.handle)

    def restore(self) -> None:
        """Restore the former handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._previous_hook


@contextmanager
def handled_signals() -> Iterator[EndingSignals]:
    """Handle signals while the block runs."""
    signals = EndingSignals()
    signals.install()
    try:
        yield signals
    finally:
        signals.restore()
