"""Compares images that are written into a pipe with ``cat`` of the same bytes.

python -m benchmarks.bench_streams [--mib 1024] [--rounds 7] [--only WORD] [--require]

Both sides are read by ``cat > /dev/null``.  Ratios are those of wall-clock time, and
beside them those of the processor time of all processes of the pipeline.
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
    """A conversion into a pipe, and the ratio that is required."""

    name: str
    source: str
    words: tuple[str, ...]
    required: float | None = None


LINES: Final = (
    Line("raw to qcow2", "disk.raw", ("-O", "qcow2"), 0.9),
    Line("qcow2 to qcow2", "disk.qcow2", ("-O", "qcow2"), 0.9),
    Line("qcow2 to raw", "disk.qcow2", ("-O", "raw")),
    Line("raw to vhdx", "disk.raw", ("-O", "vhdx")),
    Line("raw to vmdk", "disk.raw", ("-O", "vmdk")),
)


def make_sources(folder: Path, nbytes: int, imgcore: str) -> None:
    """Write noise, with a hole after each 7 MiB."""
    with open(folder / "disk.raw", "wb") as file:
        for at in range(0, nbytes, 8 * PIECE_NBYTES):
            file.seek(at)
            file.write(os.urandom(7 * PIECE_NBYTES))
        file.truncate(nbytes)
    words = [imgcore, "convert", "-q", "--no-sync", folder / "disk.raw", folder / "disk.qcow2"]
    subprocess.run(words, check=True)


def measure(
    line: Line, folder: Path, imgcore: str, rounds: int
) -> tuple[float, float, float, float]:
    """Return the ratio, its range, and the ratio of processor time."""
    ours = [imgcore, "convert", "-q", *line.words, str(folder / line.source), "-"]
    image = folder / "image"
    with open(image, "wb") as file:
        subprocess.run(ours, stdout=file, check=True)
    contenders = [
        Contender("cat", ("sh", "-c", f"cat {shlex.quote(str(image))} | cat > /dev/null")),
        Contender("imgcore", ("sh", "-c", f"{shlex.join(ours)} | cat > /dev/null")),
    ]
    series = in_turns(contenders, rounds, lambda _: None)
    image.unlink()
    found = ratio(series["cat"], series["imgcore"])
    cpu = statistics.median(
        a.cpu_seconds / b.cpu_seconds
        for a, b in zip(series["cat"].runs, series["imgcore"].runs, strict=True)
    )
    return found.median, found.low, found.high, cpu


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_streams")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="")
    parser.add_argument("--require", action="store_true", help="fail below a required ratio")
    options = parser.parse_args()
    imgcore = _environment.find_imgcore()
    missed = []
    print("| pipeline | of cat's speed | range | processor time | required |")
    print("|---|---|---|---|---|")
    with work_folder() as folder:
        make_sources(folder, options.mib << 20, imgcore)
        for line in LINES:
            if options.only not in line.name:
                continue
            middle, low, high, cpu = measure(line, folder, imgcore, options.rounds)
            required = "" if line.required is None else f"{line.required}"
            print(
                f"| {line.name} | {middle:.2f} | {low:.2f}..{high:.2f} | {cpu:.2f} | {required} |"
            )
            if line.required is not None and middle < line.required:
                missed.append(line.name)
    if missed and options.require:
        raise SystemExit(f"below what is required: {', '.join(missed)}")


if __name__ == "__main__":
    main()
