"""How far a job is: the record that callers get, and what counts and limits it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol


class Progress(NamedTuple):
    """The progress of a job in bytes of the virtual disk (``written``: of the target).

    The values never decrease, but for ``zero`` where blocks of a stream come late: what
    was a hole then gets data.
    """

    done: int
    total: int
    data: int
    zero: int
    written: int


NOTHING_DONE: Final = Progress(0, 0, 0, 0, 0)

_REPORT_SECONDS: Final = 0.05

# Only the last seconds count: a job may start fast while the page cache fills.
_RATE_SECONDS: Final = 10.0
_SAMPLE_SECONDS: Final = 0.1


class Rate:
    """Bytes per second over the last seconds; any thread may ask for it."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def start(self, now: float, done: int) -> None:
        """Forget the past."""
        self._samples = deque([(now, done)])

    def note(self, now: float, done: int) -> None:
        """Remember how much is done at a time."""
        samples = self._samples
        if samples and now - samples[-1][0] < _SAMPLE_SECONDS:
            return
        samples.append((now, done))
        while len(samples) > 2 and now - samples[0][0] > _RATE_SECONDS:
            samples.popleft()

    def per_second(self, now: float, done: int) -> float:
        """Return the rate, given how much is done now."""
        last = [sample for sample in self._samples.copy() if sample[0] < now]
        recent = [sample for sample in last if now - sample[0] <= _RATE_SECONDS]
        for then, before in recent or last[-1:]:
            return (done - before) / (now - then)
        return 0.0


class Watcher(Protocol):
    """Is told about a job what its counters do not say.

    Attributes
    ----------
    phase : str
        What the job is at; see `ControlProgress`.
    """

    phase: str

    def skip(self, nbytes: int) -> None:
        """Note that so much more of ``done`` is the work of an earlier run."""
        ...


class Tally:
    """The progress of a conversion, in bytes.

    Parameters
    ----------
    total_nbytes : int
        Bytes of the disk that is written.
    report : callable, optional
        Called with `Progress` at most every 50 ms, and when the disk is done.  Its
        exceptions are not caught.
    watcher : Watcher, optional

    Attributes
    ----------
    done_nbytes : int
        The position on the disk that was counted last.
    data_nbytes : int
        Bytes of the disk that are data.
    read_nbytes, written_nbytes : int
        Bytes read from the source's files and written to the target's.
    reflinked_nbytes : int
        Bytes that were not written, since their blocks were reflinked.
    reused_nbytes, trusted_nbytes : int
        Bytes of the disk whose compressed blocks were taken over from the source, and
        of these, bytes that were not decompressed.
    """

    def __init__(
        self,
        total_nbytes: int,
        report: Callable[[Progress], None] | None,
        watcher: Watcher | None = None,
    ) -> None:
        self.total_nbytes = total_nbytes
        self.done_nbytes: int = 0
        self.data_nbytes: int = 0
        self.read_nbytes: int = 0
        self.written_nbytes: int = 0
        self.reflinked_nbytes: int = 0
        self.reused_nbytes: int = 0
        self.trusted_nbytes: int = 0
        self._report = report
        self._watcher = watcher
        # The first of two passes over the disk, once it has ended.
        self._first: Tally | None = None
        self._next_time = -float("inf")

    def count(
        self,
        done: int,
        *,
        data: int,
        read: int,
        written: int,
        reflinked: int = 0,
        reused: int = 0,
        trusted: int = 0,
    ) -> None:
        """Set the sums so far; ``done`` is the position on the disk."""
        self.done_nbytes, self.data_nbytes, self.read_nbytes = done, data, read
        self.written_nbytes, self.reflinked_nbytes = written, reflinked
        self.reused_nbytes, self.trusted_nbytes = reused, trusted
        if self._report is None:
            return
        now = time.monotonic()
        if done == self.total_nbytes or now >= self._next_time:
            self._next_time = now + _REPORT_SECONDS
            zero = done - data
            if self._first is not None:
                before = self._first
                data = (before.data_nbytes + data) // 2
                zero = (before.done_nbytes - before.data_nbytes + zero) // 2
            if done == self.total_nbytes:
                zero = done - data
            self._report(Progress(data + zero, self.total_nbytes, data, zero, written))

    def skip(self, done: int) -> None:
        """Note where on the disk an earlier run has come to, before it is counted."""
        if self._watcher is not None:
            self._watcher.skip(done // 2 if self._first is not None else done)

    def enter(self, phase: str) -> None:
        """Set what the job is at."""
        if self._watcher is not None:
            self._watcher.phase = phase

    def first_of_two(self) -> Tally:
        """Return a tally of the first of two passes: each is half of the progress.

        `go_on_from` begins the second one.
        """
        return _FirstPass(self)

    def go_on_from(self, first: Tally) -> None:
        """Count the second pass from now on."""
        first.done_nbytes = self.total_nbytes
        self._first = first
        self.repeat()

    def position(self, done: int) -> None:
        """Set the position on the disk; nothing else is counted."""
        self.count(done, data=0, read=0, written=0)

    def before_start(self) -> Tally:
        """Return a tally of work that precedes the first byte: it reports 0 bytes."""
        report, total_nbytes = self._report, self.total_nbytes

        def report_nothing(_: Progress) -> None:
            assert report is not None
            report(Progress(0, total_nbytes, 0, 0, 0))

        return Tally(total_nbytes, None if report is None else report_nothing)

    def finish(self) -> None:
        """Report that the whole disk is done."""
        self.done_nbytes = self.total_nbytes
        self.repeat()

    def repeat(self) -> None:
        """Report the same again, so that a job that waits can be cancelled."""
        self.count(
            self.done_nbytes,
            data=self.data_nbytes,
            read=self.read_nbytes,
            written=self.written_nbytes,
            reflinked=self.reflinked_nbytes,
            reused=self.reused_nbytes,
            trusted=self.trusted_nbytes,
        )


class _FirstPass(Tally):
    """The first of two passes: counts half of what is done, and writes nothing."""

    def __init__(self, whole: Tally) -> None:
        report = None if whole._report is None else self._report_half
        super().__init__(whole.total_nbytes, report)
        self._whole = whole

    def _report_half(self, counts: Progress) -> None:
        assert self._whole._report is not None
        data, zero = counts.data // 2, counts.zero // 2
        self._whole._report(Progress(data + zero, counts.total, data, zero, 0))

    def skip(self, done: int) -> None:
        """Note where an earlier run has come to: half of it counts."""
        if self._whole._watcher is not None:
            self._whole._watcher.skip(done // 2)
