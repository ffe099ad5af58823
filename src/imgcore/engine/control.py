"""Steers jobs from other threads, and tells how far they are."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, NamedTuple, Self, SupportsIndex
from weakref import WeakSet

from imgcore._core import RateLimit
from imgcore.border import integer
from imgcore.engine.progress import NOTHING_DONE, Progress, Rate
from imgcore.errors import ConversionCancelled, OptionError
from imgcore.sizes import MAX_SIZE, parse_size


class ControlProgress(NamedTuple):
    """How far the jobs of a `Control` are.

    Attributes
    ----------
    done, total, data, zero, written : int
        As in `Progress`; the sums of all jobs that the control was given to.  They
        never decrease.
    rate : float
        Bytes of the disk a second, over the last seconds.  What an earlier run has done
        (``resume``) does not count.
    seconds : float
        Time since the first job began, until the last one ended.
    eta : float or None
        Seconds left at this rate; None if that is unknown.
    phase : str
        What the job that began last is at: ``"preparing"`` (it opens files),
        ``"measuring"`` (the first of two passes, which learns sizes), ``"working"``,
        ``"syncing"`` (it waits until all is on stable storage),
        ``"verifying"``; or how it has ended: ``"done"``, ``"failed"``,
        ``"cancelled"``.  Before the first one it is ``"waiting"``.
    """

    done: int
    total: int
    data: int
    zero: int
    written: int
    rate: float
    seconds: float
    eta: float | None
    phase: str


class Control:
    """Steers the jobs that get it as ``control``, and tells how far they are.

    Any thread, and any signal handler, may use it at any time.  Jobs that get the same
    control are steered together, and their sum does not exceed its rate.

    Parameters
    ----------
    rate : int or str, optional
        The attribute ``rate``.

    Attributes
    ----------
    rate : int or None
        Bytes of the disk that may be handled in a second; None is no limit.  It may be
        set to a text as well (``"50M"``).  A change takes effect at once, and while the
        jobs are paused it is kept for later.
    eta : float or None
        Seconds left; None if that is unknown.
    is_paused, is_cancelled : bool
        What was last asked for.
    """

    def __init__(self, *, rate: SupportsIndex | str | None = None) -> None:
        self.limit: RateLimit = RateLimit()
        # A signal handler may come in while its thread has it: then what it sets stays.
        self._lock = threading.RLock()
        self._rate: int | None = None
        self._is_paused = False
        self._is_cancelled = False
        self._jobs = _Jobs()
        self.rate = rate
        _controls.add(self)

    @property
    def rate(self) -> int | None:
        """Bytes of the disk a second; None is no limit."""
        return self._rate

    @rate.setter
    def rate(self, rate: SupportsIndex | str | None) -> None:
        nbytes = None if rate is None else _rate_nbytes(rate)
        with self._lock:
            self._rate = nbytes
            self.limit.set(self._rate or 0)

    @property
    def eta(self) -> float | None:
        """Seconds left; None if that is unknown."""
        return self.progress().eta

    @property
    def is_paused(self) -> bool:
        """Whether the jobs wait for `resume`."""
        return self._is_paused

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled

    def progress(self) -> ControlProgress:
        """Return how far the jobs are."""
        return self._jobs.progress()

    def pause(self) -> None:
        """Let the jobs handle nothing more until `resume`.

        What they have begun to read or write, some MiB, still ends.  They keep their
        files, memory and threads.
        """
        self._pause(True)

    def resume(self) -> None:
        """Let the jobs go on."""
        self._pause(False)

    def _pause(self, is_paused: bool) -> None:
        with self._lock:
            self._is_paused = is_paused
            self.limit.pause(self._is_paused)

    def cancel(self) -> None:
        """End the jobs, and those that get this control from now on.

        Each of them raises `ConversionCancelled` and leaves what an error would leave:
        no target.  A job that has already made its result final is not cancelled.
        """
        self._is_cancelled = True

    def _begin_child(self) -> None:
        """Forget, in a forked child, the jobs and the locks of the parent."""
        self._lock = threading.RLock()
        self.limit = RateLimit()
        self.limit.set(self._rate or 0)
        self.limit.pause(self._is_paused)
        self._jobs = _Jobs()


class Run:
    """One run of a verb, as its control and its callback see it; a context manager.

    Attributes
    ----------
    control : Control or None
    phase : str
        That of `ControlProgress`.
    counts : Progress
        How far it is.

    Parameters
    ----------
    control : Control, optional
    progress : callable, optional
        Gets each `Progress`, on the calling thread.

    Raises
    ------
    ConversionCancelled
        At its beginning, and where it reports: the control is cancelled.
    """

    def __init__(
        self, control: Control | None, progress: Callable[[Progress], None] | None
    ) -> None:
        self.control: Final = control
        self.phase: str = "preparing"
        self.counts: Progress = NOTHING_DONE
        self._progress = progress
        self._is_final = False

    @classmethod
    def of(
        cls,
        rate: SupportsIndex | str | None,
        control: Control | None,
        progress: Callable[[Progress], None] | None,
    ) -> Run:
        """Return a run for the keywords of a verb."""
        return cls(control_of(rate, control), progress)

    @property
    def limit(self) -> RateLimit | None:
        """The rate that the run keeps to, and that pauses it."""
        return None if self.control is None else self.control.limit

    @property
    def pauses(self) -> RateLimit | None:
        """The same for reading that the rate is not about: only the pauses count."""
        return None if self.control is None else RateLimit(pauses_of=self.control.limit)

    def report(self, counts: Progress) -> None:
        """Tell how far it is; wait while it is paused, and raise if it is cancelled.

        It is called at most every 50 ms, and so is the caller's callback.
        """
        if self.phase == "preparing":
            self.phase = "working"
        self.counts = Progress(*map(max, self.counts, counts))
        control = self.control
        if control is not None:
            control._jobs.note()
        self._tell(counts)
        self.wait(counts)

    def wait(self, counts: Progress | None = None) -> None:
        """Wait while it is paused, and raise if it is cancelled."""
        control = self.control
        if control is None or self._is_final:
            return
        self.check()
        while control.is_paused:
            # Comes back several times a second, also for signal handlers.
            if not control.limit.take(0) and counts is not None:
                self._tell(counts)
            self.check()

    def skip(self, nbytes: int) -> None:
        """Note that so much more of what is done is the work of an earlier run."""
        if self.control is not None:
            self.control._jobs.skip(nbytes)

    def report_done(self, counts: Progress) -> None:
        """Report for a job that does not tell data from zeros."""
        self.report(counts._replace(data=0, zero=0))

    def _tell(self, counts: Progress) -> None:
        if self._progress is not None:
            self._progress(counts)

    def check(self) -> None:
        """Raise ConversionCancelled if the control is cancelled."""
        if self.control is not None and self.control.is_cancelled and not self._is_final:
            raise ConversionCancelled("cancelled")

    def keep(self) -> None:
        """Let nothing cancel or pause it any more: what it has done stays."""
        self.check()
        self._is_final = True

    def __enter__(self) -> Self:
        if self.control is not None:
            self.control._jobs.add(self)
        try:
            self.check()
        except ConversionCancelled as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.phase = "done"
        elif isinstance(error, Exception) and not isinstance(error, ConversionCancelled):
            self.phase = "failed"
        else:
            self.phase = "cancelled"
        if self.control is not None:
            self.control._jobs.remove(self)


class _State(NamedTuple):
    """The jobs in progress, in the order of their beginnings, and the sum of others."""

    running: tuple[Run, ...]
    ended: Progress
    phase: str

    def sum(self) -> Progress:
        return _sum(self.ended, *(run.counts for run in self.running))


def _sum(*counts: Progress) -> Progress:
    return Progress(*map(sum, zip(*counts, strict=True)))


class _Jobs:
    """The jobs of a control.

    A snapshot takes no lock: a signal handler may ask for one anywhere.  So states and
    counts are immutable, and replaced at once.
    """

    def __init__(self) -> None:
        # A signal handler may run a verb while its thread is in here.
        self._lock = threading.RLock()
        self._state = _State((), NOTHING_DONE, "waiting")
        self._rate = Rate()
        # Bytes of the sum that were done by earlier runs.
        self._skipped_nbytes = 0
        self._began: float | None = None
        self._ended: float | None = None

    def add(self, run: Run) -> None:
        with self._lock:
            now = time.monotonic()
            if self._began is None:
                self._began = now
            if not self._state.running:
                self._rate.start(now, self._worked_nbytes(self._state.sum()))
            self._ended = None
            self._state = self._state._replace(running=(*self._state.running, run))

    def remove(self, run: Run) -> None:
        with self._lock:
            state = self._state
            running = tuple(one for one in state.running if one is not run)
            if not running:
                self._ended = time.monotonic()
            self._state = _State(running, _sum(state.ended, run.counts), run.phase)

    def note(self) -> None:
        """Remember how far the jobs are at this moment."""
        self._rate.note(time.monotonic(), self._worked_nbytes(self._state.sum()))

    def skip(self, nbytes: int) -> None:
        with self._lock:
            self._skipped_nbytes += nbytes

    def _worked_nbytes(self, counts: Progress) -> int:
        """Return what these jobs have done themselves: it says how fast they are."""
        return max(counts.done - self._skipped_nbytes, 0)

    def progress(self) -> ControlProgress:
        state, began, ended = self._state, self._began, self._ended
        now = ended or time.monotonic()
        counts = state.sum()
        rate = self._rate.per_second(now, self._worked_nbytes(counts))
        left: float | None = None
        if state.running and counts.done < counts.total:
            left = (counts.total - counts.done) / rate if rate > 0 else None
        elif counts.done == counts.total > 0 or state.phase == "done":
            left = 0.0
        return ControlProgress(
            *counts,
            rate=rate,
            seconds=0.0 if began is None else now - began,
            eta=left,
            phase=state.running[-1].phase if state.running else state.phase,
        )


def control_of(rate: SupportsIndex | str | None, control: Control | None) -> Control | None:
    """Return the control of a job: the one that was given, or one for a rate."""
    if rate is None:
        return control
    if control is not None:
        raise OptionError("rate and control are both given: set the rate of the control")
    return Control(rate=rate)


def _rate_nbytes(rate: SupportsIndex | str) -> int:
    nbytes = parse_size(rate) if isinstance(rate, str) else integer(rate, "rate")
    if not 0 < nbytes <= MAX_SIZE:
        raise OptionError(
            f"a rate of {nbytes} bytes a second, 1 to {MAX_SIZE} are allowed; None is no limit"
        )
    return nbytes


_controls: Final[WeakSet[Control]] = WeakSet()


def _start_anew() -> None:
    for control in _controls:
        control._begin_child()


os.register_at_fork(after_in_child=_start_anew)
