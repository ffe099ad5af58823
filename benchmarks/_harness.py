"""Runs commands in turns, as whole processes, and measures time and peak memory."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SETTLE_SECONDS = 2.5


@dataclass(frozen=True)
class Run:
    """A process that succeeded."""

    seconds: float
    cpu_seconds: float
    peak_nbytes: int


class CommandFailed(Exception):
    """A command of the benchmark failed."""


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run a command to its end; measure its wall-clock time, start-up included.

    The peak is the child's ``ru_maxrss``.  On Linux a child inherits the peak of the
    process that started it, so this program stays small and does not import NumPy.
    """
    begun = time.perf_counter()
    with open(os.devnull, "wb") as null:
        child = subprocess.Popen(command, stdout=null, stderr=subprocess.PIPE, env=environment)
        assert child.stderr is not None
        errors = child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    child.stderr.close()
    if child.returncode != 0:
        text = errors.decode(errors="replace").strip()
        raise CommandFailed(f"{' '.join(command)}: exit {child.returncode}: {text}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


@dataclass(frozen=True)
class Contender:
    """One side of a comparison: a command, and the target that it writes, if any."""

    name: str
    command: tuple[str, ...]
    target: Path | None = None
    environment: Mapping[str, str] | None = None


@dataclass
class Series:
    """The runs of one contender, with the size of its output."""

    runs: list[Run] = field(default_factory=list)
    file_nbytes: int = 0

    @property
    def seconds(self) -> float:
        return statistics.median(run.seconds for run in self.runs)

    @property
    def peak_nbytes(self) -> int:
        return max(run.peak_nbytes for run in self.runs)


def in_turns(
    contenders: Sequence[Contender],
    rounds: int,
    verify: Callable[[Contender], None],
    warm_nbytes: int = 0,
) -> dict[str, Series]:
    """Run every contender once a round, A B A B.

    Each output is verified, which is not timed, and removed.  Before each run that
    writes an output, `warm_memory` provides ``warm_nbytes`` for it.
    """
    series = {contender.name: Series() for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            remove(contender.target)
            if contender.target is not None:
                warm_memory(contender.target, warm_nbytes)
            series[contender.name].runs.append(run(contender.command, contender.environment))
            if contender.target is not None:
                series[contender.name].file_nbytes = contender.target.stat().st_size
                verify(contender)
            remove(contender.target)
    return series


def warm_memory(target: Path, nbytes: int) -> None:
    """Make sure that the system has as much free memory as an output takes.

    A virtual machine returns memory to its host two seconds after it has become free,
    and fetches it again page by page.  This would slow down either side at random, up
    to fivefold.
    """
    if nbytes == 0:
        return
    time.sleep(SETTLE_SECONDS)
    piece = bytes(4 << 20)
    warmer = target.with_name("warmer")
    with warmer.open("wb", buffering=0) as file:
        for _ in range(nbytes // len(piece)):
            file.write(piece)
    warmer.unlink()


def remove(target: Path | None) -> None:
    """Remove a target, if it is there."""
    if target is not None:
        target.unlink(missing_ok=True)


@dataclass(frozen=True)
class Ratio:
    """The speed ratio: the peer's seconds divided by ours, for each round."""

    median: float
    low: float
    high: float


def ratio(peer: Series, ours: Series) -> Ratio:
    """Return the pairwise ratio of two series that ran in turns."""
    pairs = [a.seconds / b.seconds for a, b in zip(peer.runs, ours.runs, strict=True)]
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))
