"""Compares conversions from a pipe with `cat` from the same pipe, as whole commands.

python -m benchmarks.bench_streams_in [--mib 4096] [--rounds 5]

Each line is ``cat SOURCE | imgcore convert -f raw - TARGET`` against ``cat SOURCE | cat
> TARGET``, in turns, with the ratio of their times and that of their CPU times, which
other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
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


if __name__ == "__main__":
    sys.exit(main())
