<<<<<<< HEAD
"""Compares conversions from a pipe with the same from a file, as whole commands.

python -m benchmarks.bench_streams_in FOLDER [--mib 2048] [--rounds 5]

FOLDER is in memory (tmpfs) and needs four times the size.  The pipe is filled by cat.
The disk is half text and half noise, in runs of 1 MiB; a fifth of it are zeros.
=======
"""Compares conversions from a pipe with `cat` from the same pipe, as whole commands.

python -m benchmarks.bench_streams_in [--mib 4096] [--rounds 5]

Each line is ``cat SOURCE | imgcore convert -f raw - TARGET`` against ``cat SOURCE | cat
> TARGET``, in turns, with the ratio of their times and that of their CPU times, which
other work on the machine disturbs less.
>>>>>>> next
"""

from __future__ import annotations

import argparse
<<<<<<< HEAD
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import _environment
from benchmarks._harness import Contender, in_turns, ratio, run

REQUIRED = 0.9
TARGETS = ("raw", "qcow2")
PIECE_NBYTES = 1 << 20


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each target; 1 if one misses the required ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    imgcore = _environment.find_imgcore()
    missed = 0
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
            contenders = [
                Contender("file", (*convert, str(source), str(path)), path),
                Contender("pipe", ("sh", "-c", shell), path),
            ]
            series = in_turns(contenders, options.rounds, lambda _: None)
            file, pipe = series["file"], series["pipe"]
            found = ratio(file, pipe)
            cpu = [statistics.median(run.cpu_seconds for run in each.runs) for each in (file, pipe)]
            missed += found.median < REQUIRED
            print(
                f"to {target:6} file {file.seconds:.2f} s, pipe {pipe.seconds:.2f} s: "
                f"{found.median:.2f} (required {REQUIRED}); "
                f"CPU {cpu[0]:.2f} and {cpu[1]:.2f} s; "
                f"peak {file.peak_nbytes >> 20} and {pipe.peak_nbytes >> 20} MiB"
            )
    return int(missed > 0)
=======
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks import _environment
from benchmarks.bench_convert import ROOT, work_folder

REQUIRED = 0.9


def measured(line: str, target: Path) -> tuple[float, float]:
    """Return the seconds and the CPU seconds of a line of the shell."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], check=True)
    seconds = time.monotonic() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    target.unlink()
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Measure, and print a line for each target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    imgcore = _environment.find_imgcore()
    with work_folder() as folder:
        source = folder / "source.raw"
        maker = ROOT / "tools" / "make_image.py"
        subprocess.run([sys.executable, maker, source, str(arguments.mib)], check=True)
        for suffix in ("raw", "qcow2", "vmdk"):
            target = folder / f"target.{suffix}"
            ours = f"cat {source} | {imgcore} convert -q --no-sync -f raw - {target}"
            theirs = f"cat {source} | cat >{target}"
            pairs = [
                (measured(theirs, target), measured(ours, target)) for _ in range(arguments.rounds)
            ]
            ratios = sorted(peer[0] / own[0] for peer, own in pairs)
            cpu = median(peer[1] / own[1] for peer, own in pairs)
            verdict = "ok" if median(ratios) >= REQUIRED else "missed"
            print(
                f"raw from a pipe to {suffix}: {median(ratios):.2f}x of cat "
                f"({ratios[0]:.2f} to {ratios[-1]:.2f}), CPU {cpu:.2f}x, {verdict}; "
                f"load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    return 0
>>>>>>> next


if __name__ == "__main__":
    sys.exit(main())
