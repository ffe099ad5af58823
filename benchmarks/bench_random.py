"""Compares reads of ranges with `os.preadv`, libyal, dissect, and qemu-nbd with libnbd.

python -m benchmarks.bench_random [--mib 2048] [--rounds 7] [--only WORD] [--require]

Everything runs in this process and in qemu-nbd's, in turns (A B A B).  Figures are
ratios of the processor time of a read, of all processes that take part, unless the line
says that they are of time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import imgcore
from benchmarks import _environment
from benchmarks._readers import READERS, Imgcore, RangeReader, Unavailable
from benchmarks.bench_convert import PLAIN, ROOT, STREAM, SUFFIXES, ZLIB, Kind, work_folder
from imgcore._core import File, Job
from imgcore.disk.image_batches import disk_batches
from imgcore.engine.geometry import Geometry, Placing, ZeroPolicy
from imgcore.engine.job import thread_count
from imgcore.engine.source_file import native_sources

READ_NBYTES = 4096
BLOCK_NBYTES = 64 << 10
# About as long as one turn takes.
TURN_SECONDS = 0.25
N_THREADS = 16
N_OF_THREAD = 500  # reads
N_RANGES = 1000
SEED = 20261130


class Limit(NamedTuple):
    """What is required: our figure is at most ``most`` times the peer's."""

    peer: str
    most: float


class Turn(NamedTuple):
    """What one turn of a contender took for each read (or byte)."""

    seconds: float
    cpu_seconds: float


Work = Callable[[], int]


class Contender(NamedTuple):
    """One side of a comparison; ``work`` returns the number of its reads."""

    name: str
    work: Work
    more_cpu_seconds: Callable[[], float] = lambda: 0.0


def turn(one: Contender) -> Turn:
    """Measure one turn."""
    others, cpu, begun = one.more_cpu_seconds(), time.process_time(), time.perf_counter()
    n = one.work()
    seconds, own = time.perf_counter() - begun, time.process_time() - cpu
    return Turn(seconds / n, (own + one.more_cpu_seconds() - others) / n)


def in_turns(contenders: Sequence[Contender], rounds: int) -> dict[str, list[Turn]]:
    """Let each contender have its turn in each round."""
    series: dict[str, list[Turn]] = {one.name: [] for one in contenders}
    for _ in range(rounds):
        for one in contenders:
            series[one.name].append(turn(one))
    return series


@dataclass(frozen=True)
class Line:
    """One line of the table: what is read, how, and what is required.

    ``of`` is the field of `Turn` that is compared.
    """

    title: str
    kind: Kind | None  # None: the chain of VHDX
    how: str
    limits: tuple[Limit, ...]
    of: str = "cpu_seconds"


WARM_LIMITS = (Limit("preadv", 3.0), Limit("libyal", 1.0))
COLD_READERS = ("imgcore", "libyal", "dissect", "nbd")
COLD_LIMITS = (Limit("libyal", 0.8), Limit("nbd", 0.5))
THREADS_LIMITS = (Limit("nbd", 1 / 3),)
READV_LIMITS = (Limit("preadv", 1 / 1.5),)
WHOLE_LIMITS = (Limit("convert", 1 / 0.9),)
RAW, QCOW2 = PLAIN[:2]

LINES = (
    *(Line(f"4 KiB, {kind.name}", kind, "warm", WARM_LIMITS) for kind in PLAIN),
    Line("4 KiB, VHDX of 3 layers", None, "warm", (Limit("preadv", 5.0),)),
    *(Line(f"4 KiB, cold, {kind.name}", kind, "cold", COLD_LIMITS) for kind in (ZLIB, STREAM)),
    *(
        Line(f"16 threads, {kind.name}", kind, "threads", THREADS_LIMITS, "seconds")
        for kind in (RAW, QCOW2, ZLIB)
    ),
    *(
        Line(f"readv of 1000, {kind.name}", kind, "readv", READV_LIMITS, "seconds")
        for kind in (RAW, QCOW2)
    ),
    *(
        Line(f"as_file 1 MiB, {kind.name}", kind, "whole", WHOLE_LIMITS, "seconds")
        for kind in (RAW, QCOW2, ZLIB)
    ),
)


class Disks:
    """The raw disk and the images of it, each made when it is needed, one at a time."""

    def __init__(self, folder: Path, mebibytes: int) -> None:
        self.folder, self.nbytes = folder, mebibytes << 20
        self.raw = folder / "source.raw"
        maker = ROOT / "tools" / "make_image.py"
        subprocess.run([sys.executable, maker, self.raw, str(mebibytes)], check=True)
        self.made: tuple[Kind | None, list[Path]] = (RAW, [self.raw])

    def chain(self, kind: Kind | None) -> list[Path]:
        """Return an image's files, the image itself first; removes the last one's."""
        if self.made[0] != kind:
            for path in self.made[1]:
                if path != self.raw:
                    path.unlink()
            self.made = (kind, self.make(kind))
        return self.made[1]

    def make(self, kind: Kind | None) -> list[Path]:
        """Make the files; qemu-img writes all but a chain."""
        if kind is None:
            return self.make_layers()
        if kind == RAW:
            return [self.raw]
        path = self.folder / f"disk{SUFFIXES[kind.format]}"
        command = [_environment.find_qemu_img(), "convert", "-f", "raw", *kind.peer_arguments]
        subprocess.run([*command, str(self.raw), str(path)], check=True)
        return [path]

    def make_layers(self) -> list[Path]:
        """Make three layers of VHDX, each with a third of the disk at random places."""
        rng = random.Random(SEED)
        pieces = list(range(0, self.nbytes, 1 << 20))
        rng.shuffle(pieces)
        state = self.folder / "state.raw"
        layers: list[Path] = []
        with open(self.raw, "rb") as raw, open(state, "w+b") as file:
            file.truncate(self.nbytes)
            for depth in range(3):
                for offset in pieces[depth::3]:
                    file.seek(offset)
                    file.write(os.pread(raw.fileno(), 1 << 20, offset))
                file.flush()
                path = self.folder / f"layer{depth}.vhdx"
                backing = {"backing": layers[0].name, "backing_format": "vhdx"} if layers else {}
                imgcore.convert(state, path, **backing)
                layers.insert(0, path)
        state.unlink()
        return layers


class Bench:
    """The disks, and the ways to read them."""

    def __init__(self, disks: Disks, rounds: int) -> None:
        self.disks, self.rounds = disks, rounds
        self.rng = random.Random(SEED)

    def offsets(self, n: int) -> list[int]:
        """Return ``n`` random offsets, of which many repeat."""
        return [
            self.rng.randrange(self.disks.nbytes // READ_NBYTES) * READ_NBYTES for _ in range(n)
        ]

    def open(
        self, line: Line, names: Sequence[str], stack: ExitStack, **nbd: int
    ) -> dict[str, RangeReader]:
        """Open the disk in every program that reads it, and verify what it reads."""
        chain, kind = self.disks.chain(line.kind), line.kind
        format = "vhdx" if kind is None else {"vpc": "vhd"}.get(kind.format, kind.format)
        readers: dict[str, RangeReader] = {}
        for name in names:
            of = ([self.disks.raw], "raw") if name == "preadv" else (chain, format)
            try:
                reader = READERS[name](*of, **(nbd if name == "nbd" else {}))
            except Unavailable:
                continue
            stack.callback(reader.close)
            readers[name] = reader
        self.verify(readers)
        return readers

    def verify(self, readers: Mapping[str, RangeReader]) -> None:
        """Fail if a program other than libyal does not read the raw disk's bytes."""
        with open(self.disks.raw, "rb") as raw:
            for offset in self.offsets(50):
                expected = os.pread(raw.fileno(), READ_NBYTES, offset)
                for name, reader in readers.items():
                    if name != "libyal" and bytes_at(reader, offset) != expected:
                        raise SystemExit(f"benchmarks: {name} reads other bytes at {offset}")

    def warm(self, line: Line, stack: ExitStack) -> list[Contender]:
        """Random reads, after all tables and pages have been read once."""
        readers = self.open(line, list(READERS), stack)
        return [self.repeated(name, reader) for name, reader in readers.items()]

    def repeated(self, name: str, reader: RangeReader) -> Contender:
        """Return random reads for about a quarter of a second."""
        buffer = bytearray(READ_NBYTES)
        for offset in range(0, self.disks.nbytes, BLOCK_NBYTES):
            reader.read(offset, buffer)
        begun = time.process_time()
        for offset in self.offsets(500):
            reader.read(offset, buffer)
        each = (time.process_time() - begun) / 500
        offsets = self.offsets(max(500, int(TURN_SECONDS / each)))

        def work() -> int:
            read = reader.read
            for offset in offsets:
                read(offset, buffer)
            return len(offsets)

        return Contender(name, work, reader.more_cpu_seconds)

    def cold(self, line: Line, stack: ExitStack) -> list[Contender]:
        """Every block of the disk at most once, in random order."""
        readers = self.open(line, COLD_READERS, stack)
        blocks = list(range(0, self.disks.nbytes, BLOCK_NBYTES))
        self.rng.shuffle(blocks)
        blocks = self.read_by_libyal(line, blocks[: 4000 * self.rounds])
        n = min(2000, len(blocks) // self.rounds)
        return [self.once(name, reader, blocks, n) for name, reader in readers.items()]

    def read_by_libyal(self, line: Line, blocks: list[int]) -> list[int]:
        """Return the blocks that libyal reads right, all of them without libyal.

        Of QCOW2 it reads half of the compressed blocks as zeros, without an error.
        """
        with ExitStack() as stack, open(self.disks.raw, "rb") as raw:
            for reader in self.open(line, ["libyal"], stack).values():
                return [
                    offset
                    for offset in blocks
                    if bytes_at(reader, offset) == os.pread(raw.fileno(), READ_NBYTES, offset)
                ]
        return blocks

    def once(self, name: str, reader: RangeReader, blocks: list[int], n: int) -> Contender:
        """Return reads of the next ``n`` blocks at each turn."""
        following, buffer = iter(blocks), bytearray(READ_NBYTES)

        def work() -> int:
            for offset in islice(following, n):
                reader.read(offset, buffer)
            return n

        return Contender(name, work, reader.more_cpu_seconds)

    def threads(self, line: Line, stack: ExitStack) -> list[Contender]:
        """Random reads over the whole disk by 16 threads."""
        names = ["preadv", "imgcore", "nbd"]
        readers = self.open(line, names, stack, n_connections=N_THREADS + 1)
        return [self.parallel(name, reader, stack) for name, reader in readers.items()]

    def parallel(self, name: str, reader: RangeReader, stack: ExitStack) -> Contender:
        """Return reads by threads that exist already."""
        pool = stack.enter_context(ThreadPoolExecutor(N_THREADS))
        parts = [self.offsets(N_OF_THREAD) for _ in range(N_THREADS)]

        def read(offsets: Sequence[int]) -> None:
            read, buffer = reader.read, bytearray(READ_NBYTES)
            for offset in offsets:
                read(offset, buffer)

        def work() -> int:
            list(pool.map(read, parts))
            return N_OF_THREAD * N_THREADS

        work()
        return Contender(name, work, reader.more_cpu_seconds)

    def readv(self, line: Line, stack: ExitStack) -> list[Contender]:
        """A thousand ranges at once, against as many calls."""
        readers = self.open(line, ["preadv", "imgcore"], stack)
        ours, preadv = readers["imgcore"], readers["preadv"]
        assert isinstance(ours, Imgcore)
        readv = ours.image.readv
        buffers = [bytearray(READ_NBYTES) for _ in range(N_RANGES)]
        lists = cycle([list(zip(self.offsets(N_RANGES), buffers, strict=True)) for _ in range(20)])

        def loop() -> int:
            read = preadv.read
            for _ in range(20):
                for offset, buffer in next(lists):
                    read(offset, buffer)
            return 20 * N_RANGES

        def at_once() -> int:
            for _ in range(20):
                readv(next(lists))
            return 20 * N_RANGES

        at_once()
        return [Contender("preadv", loop), Contender("imgcore", at_once)]

    def whole(self, line: Line, stack: ExitStack) -> list[Contender]:
        """The whole disk in order, against a conversion to nothing."""
        (ours,) = self.open(line, ["imgcore"], stack).values()
        assert isinstance(ours, Imgcore)
        image, buffer = ours.image, bytearray(1 << 20)

        def read() -> int:
            with image.as_file() as file:
                while file.readinto(buffer):
                    pass
            return self.disks.nbytes

        def convert() -> int:
            convert_to_nothing(image)
            return self.disks.nbytes

        return [Contender("imgcore", read), Contender("convert", convert)]


def bytes_at(reader: RangeReader, offset: int) -> bytes:
    """Return what a program reads at an offset."""
    buffer = bytearray(READ_NBYTES)
    answer = reader.read(offset, buffer)
    return bytes(answer if isinstance(answer, bytes | bytearray) else buffer)


def convert_to_nothing(image: imgcore.Image) -> None:
    """Do a conversion's work up to its writes."""
    geometry = Geometry(
        BLOCK_NBYTES,
        image.virtual_size,
        placing=Placing.IDENTITY,
        zero_policy=ZeroPolicy.SKIP,
    )
    sources = native_sources(image.sources)
    job = Job(sources=sources, geometry=geometry, target=File.null(), threads=thread_count(None))
    try:
        for batch in disk_batches(image.data_extents(), image.virtual_size, geometry):
            job.run(batch.start, batch.end, batch.rows)
    finally:
        job.close()


class Figure(NamedTuple):
    """A line's ratio to one peer: the median, the least and the largest round.

    ``cpu`` is the median ratio of processor time, whatever the line compares.
    """

    peer: str
    median: float
    low: float
    high: float
    cpu: float
    most: float | None

    @property
    def met(self) -> bool:
        return self.most is None or self.median <= self.most


class Result(NamedTuple):
    """A line with its figures; ``each`` has the microseconds of a read (or MiB)."""

    title: str
    of: str
    figures: list[Figure]
    each: dict[str, float]


def compare(line: Line, series: Mapping[str, Sequence[Turn]]) -> Result:
    """Compare our turns with those of every peer in the same rounds."""

    def ratios(name: str, of: str) -> list[float]:
        pairs = zip(series["imgcore"], series[name], strict=True)
        return [getattr(ours, of) / getattr(peer, of) for ours, peer in pairs]

    most = dict(line.limits)
    figures = []
    for name in series:
        if name != "imgcore":
            found = ratios(name, line.of)
            cpu = statistics.median(ratios(name, "cpu_seconds"))
            spread = (statistics.median(found), min(found), max(found))
            figures.append(Figure(name, *spread, cpu, most.get(name)))
    scale = 1e6 * ((1 << 20) if line.how == "whole" else 1)
    each = {
        name: scale * statistics.median(getattr(turn, line.of) for turn in turns)
        for name, turns in series.items()
    }
    return Result(line.title, line.of, figures, each)


def show(result: Result) -> Iterator[str]:
    """Yield lines of the table, one for each peer."""
    title = result.title
    for one in result.figures:
        spread = f"{one.low:.2f}..{one.high:.2f}"
        limit = "" if one.most is None else f"{one.most:.2f}x"
        verdict = "" if one.most is None else "ok" if one.met else "MISSED"
        ours, peer = result.each["imgcore"], result.each[one.peer]
        yield (
            f"{title:<32} {one.peer:<8} {limit:>6} {one.median:>6.2f}x {spread:>13} "
            f"{one.cpu:>6.2f}x {ours:>8.2f} {peer:>8.2f}  {verdict}"
        )
        title = ""


def measure(bench: Bench, line: Line) -> Result:
    """Measure a line."""
    with ExitStack() as stack:
        contenders: list[Contender] = getattr(bench, line.how)(line, stack)
        return compare(line, in_turns(contenders, bench.rounds))


HEADER = (
    f"{'job':<32} {'peer':<8} {'limit':>6} {'ours':>7} {'spread':>13} {'CPU':>7} "
    f"{'ours us':>8} {'peer us':>8}"
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's choices."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_random")
    parser.add_argument("--mib", type=int, default=2048, help="size of the disk")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each program")
    parser.add_argument("--only", default="", help="lines whose title holds this word")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--require", action="store_true", help="exit 1 if a line is missed")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    choice = parse(arguments)
    results: list[Result] = []
    with work_folder() as folder:
        recipe = f"ext4 of installed files, {choice.mib} MiB (tools/make_image.py)"
        environment = _environment.describe(folder, _environment.find_qemu_img(), recipe)
        print(f"{environment['cpu']}, {environment['n_cpus']} CPUs; {environment['peer']}")
        print(f"{recipe}; {environment['file_system']}\n{HEADER}")
        bench = Bench(Disks(folder, choice.mib), choice.rounds)
        for line in LINES:
            if choice.only in line.title:
                results.append(measure(bench, line))
                print("\n".join(show(results[-1])), flush=True)
    if choice.json:
        record = {"environment": environment, "lines": [one._asdict() for one in results]}
        choice.json.write_text(json.dumps(record, indent=1) + "\n")
    missed = [one.title for one in results if not all(figure.met for figure in one.figures)]
    print(f"missed: {', '.join(missed)}" if missed else "every line is reached")
    return 1 if missed and choice.require else 0


if __name__ == "__main__":
    sys.exit(main())
