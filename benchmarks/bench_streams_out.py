"""Compares images that are written to a stream with ``cat`` of the same bytes.

python -m benchmarks.bench_streams_out [--mib 2048] [--rounds 7] [--only WORD]

A stream is a pipe, which ``cat > /dev/null`` reads, or a file that the shell opens.
Ratios are those of wall-clock time, start-up included, and beside them those of the
processor time of all processes of the pipeline: `cat` over ours, so more is better.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks import _environment
from benchmarks._harness import Contender, in_turns, ratio
from benchmarks.bench_convert import work_folder

PIECE_NBYTES: Final = 1 << 20


class Line(NamedTuple):
    """A conversion to a stream, and the ratio that is required of it into a pipe."""

    name: str
    source: str
    words: tuple[str, ...]
    required: float | None = None


LINES: Final = (
    Line("raw to raw", "disk.raw", ("-O", "raw"), 0.9),
    Line("raw to qcow2", "disk.raw", ("-O", "qcow2"), 0.9),
    Line("qcow2 to qcow2", "disk.qcow2", ("-O", "qcow2"), 0.9),
    Line("qcow2 to raw", "disk.qcow2", ("-O", "raw"), 0.9),
    Line("raw to vhdx", "disk.raw", ("-O", "vhdx"), 0.9),
    Line("raw to vmdk", "disk.raw", ("-O", "vmdk"), 0.9),
    Line("raw to raw.zst", "disk.raw", ("-O", "raw.zst")),
)
# What reads the stream, and whether a line's requirement is about it.
READERS: Final = {"pipe": (" | cat > /dev/null", True), "file": (" > {}", False)}


class Found(NamedTuple):
    """The median of the ratios, the smallest and the largest, and that of CPU times."""

    median: float
    low: float
    high: float
    cpu: float
    seconds: float


def make_sources(folder: Path, nbytes: int, imgcore: str) -> None:
    """Write noise, with a hole after each 7 MiB."""
    with open(folder / "disk.raw", "wb") as file:
        for at in range(0, nbytes, 8 * PIECE_NBYTES):
            file.seek(at)
            file.write(os.urandom(7 * PIECE_NBYTES))
        file.truncate(nbytes)
    words = [imgcore, "convert", "-q", "--no-sync", folder / "disk.raw", folder / "disk.qcow2"]
    subprocess.run(words, check=True)


def measure(line: Line, reader: str, folder: Path, imgcore: str, rounds: int) -> Found:
    """Run both sides in turns."""
    ours = shlex.join([imgcore, "convert", "-q", *line.words, str(folder / line.source), "-"])
    image, target = folder / "image", folder / "target"
    subprocess.run(["sh", "-c", f"{ours} > {image}"], check=True)
    end = READERS[reader][0].format(target)
    into_file = target if reader == "file" else None
    contenders = [
        Contender("cat", ("sh", "-c", f"cat {image}{end}"), into_file),
        Contender("imgcore", ("sh", "-c", f"{ours}{end}"), into_file),
    ]
    series = in_turns(contenders, rounds, lambda _: None)
    image.unlink()
    found = ratio(series["cat"], series["imgcore"])
    cpu = statistics.median(
        a.cpu_seconds / b.cpu_seconds
        for a, b in zip(series["cat"].runs, series["imgcore"].runs, strict=True)
    )
    return Found(found.median, found.low, found.high, cpu, series["imgcore"].seconds)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_streams_out")
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="")
    parser.add_argument("--reader", choices=READERS, action="append")
    parser.add_argument("--require", action="store_true", help="fail below a required ratio")
    options = parser.parse_args()
    imgcore = _environment.find_imgcore()
    missed = []
    print("| conversion | into | seconds | of cat's speed | range | processor time | required |")
    print("|---|---|---|---|---|---|---|")
    with work_folder() as folder:
        make_sources(folder, options.mib << 20, imgcore)
        for reader in options.reader or READERS:
            for line in LINES:
                if options.only not in line.name:
                    continue
                found = measure(line, reader, folder, imgcore, options.rounds)
                required = line.required if READERS[reader][1] else None
                verdict = ""
                if required is not None:
                    verdict = f"{required} {'ok' if found.median >= required else 'missed'}"
                    missed += [line.name] if found.median < required else []
                print(
                    f"| {line.name} | {reader} | {found.seconds:.2f} | {found.median:.2f} "
                    f"| {found.low:.2f}..{found.high:.2f} | {found.cpu:.2f} | {verdict} |",
                    flush=True,
                )
    if missed and options.require:
        raise SystemExit(f"below what is required: {', '.join(missed)}")


if __name__ == "__main__":
    main()
