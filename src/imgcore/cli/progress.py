"""Progress of a long verb: a bar, plain lines or JSON lines, or as qemu-img prints it.

All but the last go to stderr.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from functools import wraps
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import click

from imgcore.cli.common import Decorator, Function, discard_stdout, say
from imgcore.cli.signals import State
from imgcore.engine.progress import Rate
from imgcore.errors import OptionError
from imgcore.sizes import format_size
from imgcore.text import one_line

if TYPE_CHECKING:
    import rich.progress

    from imgcore.engine.control import Control

MODES: Final = ("auto", "bar", "plain", "json", "qemu", "none")

# A job that ends sooner does not need a bar, nor the time to import one.
_BAR_DELAY_SECONDS: Final = 0.5
_BAR_INTERVAL_SECONDS: Final = 0.1
_PLAIN_INTERVAL_SECONDS: Final = 5.0
_JSON_INTERVAL_SECONDS: Final = 0.25

# As qemu-img convert: a state is printed if it is more than this above the last one.
_QEMU_STEP_PERCENT: Final = 1.0

_RATE_WINDOW_SECONDS: Final = 10.0


class Counters(Protocol):
    """The values that a verb passes to its callback; all in bytes."""

    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def data(self) -> int: ...
    @property
    def zero(self) -> int: ...
    @property
    def written(self) -> int: ...


def progress_options(function: Any) -> Any:
    """Add ``-p`` and ``--progress=MODE``."""
    decorated = click.option(
        "--progress",
        "progress_mode",
        type=click.Choice(MODES),
        default="auto",
        help="How to report progress: on stderr, or on stdout as qemu-img (qemu); auto: a bar on "
        "a terminal, else with -p plain and qemu.",
    )(function)
    return click.option(
        "-p",
        "wants_progress",
        is_flag=True,
        help="Show progress even if stderr is not a terminal; the same as --progress.",
    )(decorated)


class Reporting(NamedTuple):
    """The options for what a long verb prints while it runs, and for its rate."""

    rate: int | None
    progress_mode: str
    wants_progress: bool

    def begin(self, path: str, *, quiet: bool = False, as_json: bool = False) -> Reporter:
        """Return the reporter; the progress names the file ``path``."""
        return reporter(
            self.progress_mode,
            wanted=self.wants_progress,
            quiet=quiet,
            label=one_line(os.path.basename(path)),
            as_json=as_json,
            rate=self.rate,
        )


def reporting_options(add_rate: Decorator) -> Decorator:
    """Add the options of `Reporting`, which become the argument ``reporting``."""

    def decorate(function: Function) -> Function:
        @wraps(function)
        def collected(*args: Any, **values: Any) -> Any:
            reporting = Reporting(**{name: values.pop(name) for name in Reporting._fields})
            return function(*args, reporting=reporting, **values)

        decorated: Function = progress_options(add_rate(collected))
        return decorated

    return decorate


def reporter(
    mode: str, *, wanted: bool, quiet: bool, label: str, as_json: bool, rate: int | None = None
) -> Reporter:
    """Return the reporter for ``--progress=mode``, ``-p`` and ``-q``.

    ``as_json``: a JSON document or a list will be printed on stdout.  ``rate``: that of
    its control; None or 0 is no limit.
    """
    from imgcore.engine.control import Control

    report = _chosen(mode, wanted=wanted, quiet=quiet, label=label, as_json=as_json)
    report.control = Control(rate=rate or None)
    return report


def _chosen(mode: str, *, wanted: bool, quiet: bool, label: str, as_json: bool) -> Reporter:
    if mode == "qemu" and as_json:
        raise OptionError(
            "--progress=qemu and the result both print on stdout: use --progress=json, "
            "which prints on stderr"
        )
    if quiet or mode == "none":
        return Reporter()
    if mode == "auto":
        if sys.stderr.isatty():
            return BarReporter(label, delay=0.0 if wanted else _BAR_DELAY_SECONDS)
        if not wanted:
            return Reporter()
        if not as_json:
            return BothReporter(PlainReporter(), QemuReporter())
        mode = "plain"
    if mode == "bar":
        return BarReporter(label)
    if mode == "plain":
        return PlainReporter()
    return JsonReporter() if mode == "json" else QemuReporter()


class Reporter:
    """Reports nothing; the base class of the others.

    Attributes
    ----------
    control : Control or None
        Steers the job.
    """

    interval_seconds: float = float("inf")
    control: Control | None = None

    def __init__(self) -> None:
        self._rate = Rate()
        self._start = time.monotonic()
        self._last_shown = -float("inf")
        self._counters: Counters | None = None
        self._shown: Counters | None = None
        self._rate.note(self._start, 0)

    @property
    def callback(self) -> Any:
        """The callback for ``progress=``: SIGUSR1 asks for the state in every mode."""
        return self.update

    def update(self, counters: Counters) -> None:
        now = time.monotonic()
        self._counters = counters
        self._rate.note(now, counters.done)
        if now - self._last_shown >= self.interval_seconds and self.is_due(now - self._start):
            self._last_shown = now
            self._shown = counters
            self.show(counters)

    def rate_and_seconds_left(self, counters: Counters) -> tuple[float, float | None]:
        """Return bytes per second, and how long the job will take; None if unknown."""
        if self.control is not None:
            # It knows what an earlier run has done.
            per_second = self.control.progress().rate
        else:
            per_second = self._rate.per_second(time.monotonic(), counters.done)
        left = counters.total - counters.done
        if left < 0 or (left and not per_second > 0):
            return per_second, None
        return per_second, left / per_second if left else 0.0

    @property
    def keywords(self) -> dict[str, Any]:
        """The keywords of a verb that reports here."""
        return {"progress": self.callback, "control": self.control}

    @property
    def phase(self) -> str:
        """What the job is at."""
        return "waiting" if self.control is None else self.control.progress().phase

    def is_due(self, _elapsed: float) -> bool:
        return True

    def show(self, counters: Counters) -> None:
        """Print the state on stderr."""

    def state(self) -> str:
        """Return one line that tells how far the job is, for SIGUSR1."""
        if self._counters is None:
            return "imgcore: nothing done yet"
        return f"imgcore: {self.state_of(self._counters)}"

    def state_of(self, counters: Counters) -> str:
        text = extent_text(counters)
        rate, left = self.rate_and_seconds_left(counters)
        if left != 0:
            text += f", {rate_text(rate)}"
        if counters.done < counters.total:
            text += f", {time_text(left)} left"
        return text

    def finish(self) -> None:
        """Show the final state of a job that succeeded."""

    def close(self) -> None:
        """Restore the terminal, also after a failure."""

    def __enter__(self) -> Reporter:
        State.told_by(self.state)
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        State.told_by(None)
        if error_type is None:
            self.finish()
        self.close()


class JsonReporter(Reporter):
    """Prints one JSON object per line."""

    interval_seconds: float = _JSON_INTERVAL_SECONDS

    def __init__(self) -> None:
        super().__init__()
        self._phase = ""

    def show(self, counters: Counters) -> None:
        self._phase = self.phase
        say(self.state_of(counters))

    def state(self) -> str:
        return super().state() if self._counters is None else self.state_of(self._counters)

    def state_of(self, counters: Counters) -> str:
        rate, left = self.rate_and_seconds_left(counters)
        share = percent(counters)
        line = {
            "done": counters.done,
            "total": counters.total,
            "data": counters.data,
            "zero": counters.zero,
            "written": counters.written,
            "percent": None if share is None else round(share, 2),
            "rate": round(rate),
            "eta": None if left is None else round(left, 1),
            "phase": self.phase,
        }
        import json

        return json.dumps(line)

    def finish(self) -> None:
        if self._counters is None:
            return
        if self._counters != self._shown or self._phase != self.phase:
            self.show(self._counters)


class PlainReporter(Reporter):
    """Prints a line every few seconds, for logs."""

    interval_seconds: float = _PLAIN_INTERVAL_SECONDS

    def is_due(self, elapsed: float) -> bool:
        return elapsed >= self.interval_seconds

    def show(self, counters: Counters) -> None:
        say(self.state_of(counters))

    def finish(self) -> None:
        if self._counters is not None:
            seconds = time.monotonic() - self._start
            text = extent_text(self._counters)
            rate = rate_text(self._counters.done / max(seconds, 1e-3))
            say(f"{text} in {seconds:.1f} s, {rate}")


class QemuReporter(Reporter):
    """Prints percentages on stdout, in the form of qemu-img.

    Source: QEMU, util/qemu-progress.c.
    """

    interval_seconds: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self._printed = 0.0
        self._is_open = True

    def __enter__(self) -> Reporter:
        self._print(0.0)
        return super().__enter__()

    def show(self, counters: Counters) -> None:
        now = percent(counters)
        if now is not None and now > self._printed + _QEMU_STEP_PERCENT:
            self._print(now)

    def finish(self) -> None:
        if self._printed < 100.0:
            self._print(100.0)

    def close(self) -> None:
        self._write("\n")

    def _print(self, now: float) -> None:
        self._printed = now
        self._write(f"    ({now:.2f}/100%)\r")

    def _write(self, text: str) -> None:
        """Print; a closed or full stdout is not an error."""
        if not self._is_open:
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError:
            self._is_open = False
            discard_stdout()


class BothReporter(Reporter):
    """Prints plain lines on stderr, and on stdout what callers of qemu-img read."""

    interval_seconds: float = 0.0

    def __init__(self, *reporters: Reporter) -> None:
        super().__init__()
        self._reporters = reporters

    def update(self, counters: Counters) -> None:
        for one in self._reporters:
            one.update(counters)

    def finish(self) -> None:
        for one in self._reporters:
            one.finish()

    def close(self) -> None:
        for one in self._reporters:
            one.close()

    def __enter__(self) -> Reporter:
        for one in self._reporters:
            one.__enter__()
        return self


class BarReporter(Reporter):
    """Draws a bar with rate and time left, on the calling thread."""

    interval_seconds: float = _BAR_INTERVAL_SECONDS

    def __init__(self, label: str, *, delay: float = 0.0) -> None:
        super().__init__()
        self._label = label
        self._delay = delay
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def is_due(self, elapsed: float) -> bool:
        return elapsed >= self._delay

    def state(self) -> str:
        # The bar has the terminal's line.
        return super().state() if self._bar is None else f"\n{super().state()}"

    def show(self, counters: Counters) -> None:
        if self._bar is None:
            self._open(counters.total)
        assert self._bar is not None
        assert self._task is not None
        rate, left = self.rate_and_seconds_left(counters)
        state = rate_text(rate)
        if counters.done < counters.total:
            state += f", {time_text(left)} left"
        with suppress(OSError):
            total = counters.total or None
            self._bar.update(self._task, total=total, completed=counters.done, state=state)
            self._bar.refresh()

    def _open(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        class LenientConsole(Console):
            def on_broken_pipe(self) -> None:
                """Stop printing; rich would end the process."""
                self.quiet = True

        # No refresh thread: it would contend for the GIL with the progress callback.
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>5.1f}%"),
            TextColumn("{task.fields[state]}", markup=False),
            console=LenientConsole(file=sys.stderr),
            auto_refresh=False,
        )
        self._task = self._bar.add_task(self._label, total=total or None, state="")
        with suppress(OSError):
            self._bar.start()

    def finish(self) -> None:
        if self._bar is not None and self._counters is not None:
            self.show(self._counters)

    def close(self) -> None:
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()


def percent(counters: Counters) -> float | None:
    """Return how much is done; None while the total is not known."""
    if counters.done > counters.total:
        return None
    return 100.0 * counters.done / counters.total if counters.total else 100.0


def extent_text(counters: Counters) -> str:
    """Return ``12.3% of 4 GiB``, or ``1 GiB`` while the total is not known."""
    share = percent(counters)
    if share is None:
        return format_size(counters.done)
    return f"{share:.1f}% of {format_size(counters.total)}"


def rate_text(rate: float) -> str:
    return f"{format_size(round(rate))}/s"


def time_text(seconds: float | None) -> str:
    """Return ``1:02:03`` or ``2:03``; ``--:--`` if unknown."""
    if seconds is None:
        return "--:--"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}"
