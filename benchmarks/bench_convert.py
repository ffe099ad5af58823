"""Compares imgcore with qemu-img, as whole commands: the table that the README quotes.

python -m benchmarks [--mib 2048] [--rounds 3] [--only WORD] [--require]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks import _environment
from benchmarks._harness import CommandFailed, Contender, Ratio, Series, in_turns, ratio, run

ROOT = Path(__file__).resolve().parent.parent
MEMORY_LIMIT_NBYTES = 256 << 20
# A peer that takes longer is run three times at most.
SLOW_SECONDS = 15.0

SUFFIXES = {
    "raw": ".raw",
    "qcow2": ".qcow2",
    "vmdk": ".vmdk",
    "vpc": ".vhd",
    "vhdx": ".vhdx",
    "vdi": ".vdi",
}


@dataclass(frozen=True)
class Kind:
    """A format with the flags that select it: ``-O``, ``-o`` and ``-c``."""

    name: str
    format: str
    options: tuple[str, ...] = ()
    compress: bool = False
    # Options that make the peer do what imgcore does by default.
    peer_options: tuple[str, ...] = ()
    # Out-of-order writes help qemu-img, but not with streamOptimized, where readers
    # need the grains in order.
    peer_flags: tuple[str, ...] = ("-m", "16", "-W")

    def arguments(self, more: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Return the target's flags; ``more`` are options of one side only."""
        flags = ("-c",) if self.compress else ()
        options = (*self.options, *more)
        return ("-O", self.format, *flags, *(("-o", ",".join(options)) if options else ()))

    @property
    def peer_arguments(self) -> tuple[str, ...]:
        """Return the target's flags for the peer."""
        return (*self.arguments(self.peer_options), *self.peer_flags)


RAW = Kind("raw", "raw")
QCOW2 = Kind("QCOW2", "qcow2")
ZLIB = Kind("QCOW2 zlib", "qcow2", (), True)
ZSTD = Kind("QCOW2 zstd", "qcow2", ("compression_type=zstd",), True)
SPARSE = Kind("VMDK monolithicSparse", "vmdk", ("subformat=monolithicSparse",))
VHD = Kind("VHD", "vpc", peer_options=("force_size=on",))
VHDX = Kind("VHDX", "vhdx")
VDI = Kind("VDI", "vdi")
PLAIN = (RAW, QCOW2, SPARSE, VHD, VHDX, VDI)
STREAM = Kind("streamOptimized", "vmdk", ("subformat=streamOptimized",), peer_flags=("-m", "16"))


@dataclass(frozen=True)
class Line:
    """One line of the table: required ratio, our extra options, largest size ratio.

    ``flags`` are further flags of imgcore's command.
    """

    title: str
    required: float
    extra: tuple[str, ...] = ()
    size_limit: float | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """Lines that are measured against the same runs of the peer."""

    source: Kind
    target: Kind
    lines: tuple[Line, ...]
    verb: str = "convert"


def one(source: Kind, target: Kind, required: float, size_limit: float | None = None) -> Group:
    """Return a conversion without extra options."""
    line = Line(f"{source.name} to {target.name}", required, (), size_limit)
    return Group(source, target, (line,))


def reusing(
    source: Kind,
    target: Kind,
    title: str,
    required: tuple[float, float],
    size_limit: float,
    extra: tuple[str, ...] = (),
) -> Group:
    """Return a conversion that takes compressed blocks over: verified, and trusted."""
    verified, trusted = required
    lines = (
        Line(title, verified, extra, size_limit),
        Line(f"{title}, trusted", trusted, extra, size_limit, ("--trust-blocks",)),
    )
    return Group(source, target, lines)


def plain(source: Kind, target: Kind) -> Group:
    """Return a conversion without compression; qemu-img is slow with VMDK."""
    return one(source, target, 1.8 if SPARSE in (source, target) else 1.0)


FIRST_PAIRS = ((RAW, SPARSE), (SPARSE, RAW), (RAW, RAW), (RAW, QCOW2), (QCOW2, RAW))
GROUPS = (
    Group(
        RAW,
        STREAM,
        (
            Line("raw to streamOptimized", 5.0, (), 1.0),
            Line("raw to streamOptimized, fastest level", 15.0, ("level=fastest",)),
        ),
    ),
    Group(
        RAW,
        ZLIB,
        (
            Line("raw to QCOW2 zlib, 4 KiB window", 8.0, (), 1.12),
            Line("raw to QCOW2 zlib, 32 KiB window", 5.0, ("window=32k",), 1.0),
        ),
    ),
    one(RAW, ZSTD, 1.8, 1.02),
    one(STREAM, RAW, 4.0),
    one(ZLIB, RAW, 2.0),
    one(ZSTD, RAW, 2.0),
    reusing(STREAM, ZLIB, "streamOptimized to QCOW2 zlib", (20.0, 20.0), 1.0, ("window=32k",)),
    # A block of QEMU's QCOW2 has the small window, and keeps its size.
    reusing(ZLIB, STREAM, "QCOW2 zlib to streamOptimized", (15.0, 15.0), 1.1),
    reusing(ZSTD, ZSTD, "QCOW2 zstd to QCOW2 zstd", (4.0, 10.0), 1.02),
    reusing(STREAM, STREAM, "streamOptimized to streamOptimized", (10.0, 20.0), 1.01),
    *(plain(a, b) for a, b in FIRST_PAIRS),
    Group(RAW, STREAM, (Line("compare raw with streamOptimized", 4.0),), "compare"),
    *(plain(a, b) for a in PLAIN for b in PLAIN if (a, b) not in FIRST_PAIRS),
    *(one(a, b, 3.0) for a in (STREAM, ZLIB) for b in (QCOW2, SPARSE, VHD, VHDX, VDI)),
)


@dataclass(frozen=True)
class Result:
    """One line with its figures; ``met`` is True if all requirements are met."""

    title: str
    required: float
    ratio: Ratio
    peer_seconds: float
    seconds: float
    size_ratio: float | None
    size_limit: float | None
    peak_nbytes: int
    met: bool


class Bench:
    """The sources, the two programs, and the folder of all files."""

    def __init__(self, folder: Path, mebibytes: int, rounds: int) -> None:
        self.folder = folder
        self.rounds = rounds
        # A little more than the largest output.
        self.warm_nbytes = (mebibytes << 20) * 5 // 4
        self.qemu_img = _environment.find_qemu_img()
        self.imgcore = _environment.find_imgcore()
        # Both sides use the peer's libzstd: otherwise two versions of it are compared.
        self.libzstd = _environment.peer_libzstd(self.qemu_img)
        self.environment = (
            None if self.libzstd is None else _environment.lend_library(self.libzstd, folder)
        )
        self.sources: dict[str, Path] = {}
        raw = folder / "source.raw"
        maker = ROOT / "tools" / "make_image.py"
        subprocess.run([sys.executable, maker, raw, str(mebibytes)], check=True)
        self.sources[RAW.name] = raw

    def source(self, kind: Kind) -> Path:
        """Return the image of a kind; qemu-img writes it once, from the raw one."""
        if kind.name not in self.sources:
            path = self.folder / f"source-{kind.name.replace(' ', '-')}{SUFFIXES[kind.format]}"
            peer = (self.qemu_img, "convert", "-f", "raw", *kind.peer_arguments)
            run((*peer, str(self.sources[RAW.name]), str(path)))
            self.sources[kind.name] = path
        return self.sources[kind.name]

    def drop_sources(self, following: Group | None) -> None:
        """Remove large images that the next group does not read, to free memory."""
        for kind in PLAIN[1:]:
            if kind.name in self.sources and (following is None or following.source != kind):
                self.sources.pop(kind.name).unlink()

    def contenders(self, group: Group) -> list[Contender]:
        """Return the peer, then one contender for each line."""
        source = self.source(group.source)
        if group.verb == "compare":
            formats = ("-f", group.source.format, "-F", group.target.format)
            words = (*formats, str(source), str(self.source(group.target)))
            return [
                Contender("peer", (self.qemu_img, "compare", *words)),
                Contender(group.lines[0].title, (self.imgcore, "compare", "-q", *words)),
            ]
        suffix = SUFFIXES[group.target.format]
        peer_target = self.folder / f"peer{suffix}"
        words = ("convert", "-f", group.source.format)
        peer = (self.qemu_img, *words, *group.target.peer_arguments, str(source), str(peer_target))
        found = [Contender("peer", peer, peer_target)]
        for line in group.lines:
            target = self.folder / f"ours{suffix}"
            ours = (self.imgcore, *words, *group.target.arguments(line.extra), "-q", "--no-sync")
            ours = (*ours, *line.flags, str(source), str(target))
            found.append(Contender(line.title, ours, target, self.environment))
        return found

    def verify(self, contender: Contender, target: Kind) -> None:
        """Compare an output of imgcore with the raw source, using qemu-img."""
        if contender.name == "peer" or contender.target is None:
            return
        words = ("compare", "-f", "raw", "-F", target.format)
        run((self.qemu_img, *words, str(self.sources[RAW.name]), str(contender.target)))
        if target.format == "qcow2":
            run((self.qemu_img, "check", "-q", "-f", "qcow2", str(contender.target)))

    def measure(self, group: Group) -> Iterator[Result]:
        """Run a group in turns and yield its lines."""
        contenders = self.contenders(group)
        # Blocks for reflinks must be on the disk; syncing them must not be timed.
        os.sync()

        def turns(rounds: int) -> dict[str, Series]:
            return in_turns(
                contenders, rounds, lambda one: self.verify(one, group.target), self.warm_nbytes
            )

        first = turns(1)
        slow = first["peer"].seconds > SLOW_SECONDS
        more = min(self.rounds, 3) if slow else self.rounds
        series = first
        if more > 1:
            rest = turns(more - 1)
            for name, one in series.items():
                one.runs += rest[name].runs
        for line in group.lines:
            yield result(line, series["peer"], series[line.title])


def result(line: Line, peer: Series, ours: Series) -> Result:
    """Compare a line's figures with its requirements."""
    speed = ratio(peer, ours)
    size_ratio = ours.file_nbytes / peer.file_nbytes if peer.file_nbytes else None
    fits = line.size_limit is None or (size_ratio is not None and size_ratio <= line.size_limit)
    met = speed.median >= line.required and fits and ours.peak_nbytes < MEMORY_LIMIT_NBYTES
    return Result(
        line.title,
        line.required,
        speed,
        peer.seconds,
        ours.seconds,
        size_ratio,
        line.size_limit,
        ours.peak_nbytes,
        met,
    )


@dataclass(frozen=True)
class Absolute:
    """A figure in seconds, with a limit."""

    title: str
    limit_seconds: float
    seconds: float
    peak_nbytes: int
    met: bool


def absolute(bench: Bench) -> Iterator[Absolute]:
    """Measure jobs with a limit in seconds: ``info``, and empty images of 64 TiB."""
    empty = {name: bench.folder / f"empty.{name}" for name in ("qcow2", "vhdx")}
    run((bench.qemu_img, "create", "-q", "-f", "qcow2", str(empty["qcow2"]), "64T"))
    run((bench.imgcore, "create", "-q", "-f", "vhdx", str(empty["vhdx"]), "64T"))
    jobs = [("imgcore info", 0.2, Contender("x", (bench.imgcore, "info", str(empty["qcow2"]))))]
    for a, b in (("qcow2", "qcow2"), ("vhdx", "qcow2"), ("qcow2", "vhdx")):
        target = bench.folder / f"empty-out.{b}"
        words = ("convert", "-q", "--no-sync", "-f", a, "-O", b, str(empty[a]), str(target))
        contender = Contender("x", (bench.imgcore, *words), target)
        jobs.append((f"empty 64 TiB {a} to {b}", 2.0, contender))
    for title, limit, contender in jobs:
        series = in_turns([contender], max(bench.rounds, 3), lambda _: None)["x"]
        met = series.seconds < limit and series.peak_nbytes < MEMORY_LIMIT_NBYTES
        yield Absolute(title, limit, series.seconds, series.peak_nbytes, met)


HEADER = (
    f"{'job':<40} {'required':>8} {'ours':>7} {'spread':>13} {'peer s':>7} {'ours s':>7} "
    f"{'size':>6} {'limit':>6} {'peak MiB':>8}"
)


def show(one: Result) -> str:
    """Return a line of the table."""
    spread = f"{one.ratio.low:.2f}..{one.ratio.high:.2f}"
    size = "" if one.size_ratio is None else f"{one.size_ratio:.3f}"
    limit = "" if one.size_limit is None else f"{one.size_limit:.2f}"
    return (
        f"{one.title:<40} {one.required:>7.1f}x {one.ratio.median:>6.2f}x {spread:>13} "
        f"{one.peer_seconds:>7.2f} {one.seconds:>7.2f} {size:>6} {limit:>6} "
        f"{one.peak_nbytes / (1 << 20):>8.0f}  {'ok' if one.met else 'MISSED'}"
    )


def show_absolute(one: Absolute) -> str:
    """Return a line of the second table."""
    return (
        f"{one.title:<40} {'< ' + str(one.limit_seconds) + ' s':>8} {one.seconds:>6.3f}s "
        f"{'':>46} {one.peak_nbytes / (1 << 20):>8.0f}  {'ok' if one.met else 'MISSED'}"
    )


@contextmanager
def work_folder() -> Iterator[Path]:
    """Create a folder in $IMGCORE_BENCH_DIR, by default in memory, and remove it."""
    parent = os.environ.get("IMGCORE_BENCH_DIR") or "/dev/shm"
    if not os.path.isdir(parent):
        parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="imgcore-bench-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's choices."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--mib", type=int, default=2048, help="size of the source image")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each command")
    parser.add_argument("--only", default="", help="lines whose title holds this word")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/latest.json")
    parser.add_argument("--require", action="store_true", help="exit 1 if a line is missed")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    choice = parse(arguments)
    results: list[Result] = []
    absolutes: list[Absolute] = []
    recipe = f"ext4 of installed files, {choice.mib} MiB (tools/make_image.py)"
    with work_folder() as folder:
        bench = Bench(folder, choice.mib, choice.rounds)
        environment = _environment.describe(folder, bench.qemu_img, recipe, bench.libzstd)
        print(f"{environment['cpu']}, {environment['n_cpus']} CPUs; {environment['peer']}")
        versions = environment["libraries"]
        print(", ".join(f"{name} {version}" for name, version in versions.items()))
        print(f"{recipe}; {environment['file_system']}; no sync on either side\n{HEADER}")
        try:
            chosen = [g for g in GROUPS if any(choice.only in line.title for line in g.lines)]
            for group, following in zip_longest(chosen, chosen[1:]):
                for figure in bench.measure(group):
                    results.append(figure)
                    print(show(figure), flush=True)
                bench.drop_sources(following)
            for figure in absolute(bench):
                if choice.only in figure.title:
                    absolutes.append(figure)
                    print(show_absolute(figure), flush=True)
        except CommandFailed as error:
            print(f"benchmarks: {error}", file=sys.stderr)
            return 1
    write_json(choice.json, environment, results, absolutes)
    missed = [one.title for one in (*results, *absolutes) if not one.met]
    print(f"missed: {', '.join(missed)}" if missed else "every line is reached")
    return 1 if missed and choice.require else 0


def write_json(
    path: Path,
    environment: dict[str, Any],
    results: Sequence[Result],
    absolutes: Sequence[Absolute],
) -> None:
    """Write the figures that were printed, and their environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment,
        "ratios": [asdict(one) for one in results],
        "seconds": [asdict(one) for one in absolutes],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
