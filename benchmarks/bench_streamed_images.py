"""Compares conversions from a pipe with the same from a file, as whole commands.

python -m benchmarks.bench_streamed_images FOLDER [--mib 2048] [--rounds 5]

FOLDER is in memory (tmpfs) and needs four times the size.  The pipe is filled by cat.
The disk is half text and half noise, in runs of 1 MiB; a fifth of it are zeros.

The floor is what the cores have to do at least: the CPU time of the conversion from the
file, and that of ``cat | dd bs=32M``, which moves the same bytes through a pipe into
memory, divided by the number of cores.  A pipe that is slower than the requirement is
accepted if it has 0.9 times the speed of the floor.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import _environment
from benchmarks._harness import Contender, Series, in_turns, ratio, run

REQUIRED = 0.9
TARGETS = ("raw", "qcow2")
PIECE_NBYTES = 1 << 20
WARM_NBYTES = 3 << 30


def write_disk(path: Path, mib: int) -> None:
    """Write a raw disk."""
    numbers = random.Random(15)
    words = [numbers.randbytes(5).hex().encode() for _ in range(4096)]
    with open(path, "wb") as file:
        file.truncate(mib * PIECE_NBYTES)
        for at in range(mib):
            file.seek(at * PIECE_NBYTES)
            if at % 5 == 4:
                continue
            if at % 2:
                file.write(numbers.randbytes(PIECE_NBYTES))
            else:
                text = b" ".join(numbers.choices(words, k=PIECE_NBYTES // 11))
                file.write(text[:PIECE_NBYTES])


def cpu_seconds(series: Series) -> float:
    """Return the CPU time of a contender."""
    return statistics.median(run.cpu_seconds for run in series.runs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each target; 1 if one misses the required ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    imgcore = _environment.find_imgcore()
    missed, n_cpus = 0, len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        raw, source = folder / "disk.raw", folder / "disk.vmdk"
        write_disk(raw, options.mib)
        words = ["convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "--no-sync"]
        run([imgcore, *words, str(raw), str(source)])
        raw.unlink()
        print(f"streamOptimized, {options.mib} MiB, {source.stat().st_size >> 20} MiB of it stored")
        for target in TARGETS:
            path = folder / f"target.{target}"
            convert = [imgcore, "convert", "-f", "vmdk", "-O", target, "--no-sync"]
            piped = shlex.join([*convert, "-", str(path)])
            shell = f"cat {shlex.quote(str(source))} | {piped}"
            pump = f"cat {shlex.quote(str(source))} | dd bs=32M iflag=fullblock of={os.devnull}"
            contenders = [
                Contender("file", (*convert, str(source), str(path)), path),
                Contender("pipe", ("sh", "-c", shell), path),
                Contender("pump", ("sh", "-c", f"{pump} status=none")),
            ]
            series = in_turns(contenders, options.rounds, lambda _: None, WARM_NBYTES)
            file, pipe, pump = series["file"], series["pipe"], series["pump"]
            found = ratio(file, pipe).median
            cpu = {name: cpu_seconds(each) for name, each in series.items()}
            floor = (cpu["file"] + cpu["pump"]) / n_cpus
            missed += max(found, floor / pipe.seconds) < REQUIRED
            print(
                f"to {target:6} file {file.seconds:.2f} s, pipe {pipe.seconds:.2f} s: "
                f"{found:.2f} (required {REQUIRED}); "
                f"floor {floor:.2f} s: {floor / pipe.seconds:.2f}; "
                f"CPU {cpu['file']:.2f}, {cpu['pipe']:.2f} and {cpu['pump']:.2f} s; "
                f"peak {file.peak_nbytes >> 20} and {pipe.peak_nbytes >> 20} MiB"
            )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
