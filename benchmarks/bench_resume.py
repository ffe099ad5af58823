"""Measures what --resume costs, and how long a conversion that goes on takes.

python -m benchmarks.bench_resume [--mib 2048] [--rounds 5] [--only WORD]

Each conversion runs with and without --resume in turns: the ratio of their times, and
of their CPU times.  Then it is killed after half of the disk, and goes on: how long
that takes, and how much of a whole run it is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

from benchmarks import _environment
from benchmarks.bench_convert import ROOT, work_folder

JOBS: Final = {
    "raw to raw": ("raw",),
    "raw to QCOW2": ("qcow2",),
    "raw to QCOW2, zstd": ("qcow2", "-c", "-o", "compression_type=zstd"),
    "raw to streamOptimized": ("vmdk", "-o", "subformat=streamOptimized"),
    "raw to raw.zst": ("raw.zst",),
    "raw to raw.gz": ("raw.gz",),
    "raw to QCOW2, tables in front": ("qcow2", "-o", "tables=front"),
    "the same, compressed": ("qcow2", "-c", "-o", "tables=front,compression_type=zstd"),
    "raw to a child of VHD": ("vhd", "-F", "vhd", "-B", "parent.vhd"),
}
# Of each 16 MiB of the disk, so much is other in the parent of a child.
_STEP_NBYTES: Final = 16 << 20
_CHANGED_NBYTES: Final = 512 << 10

# What is required: --resume without a break, times the same without it; and what a run
# that was killed after half of the disk may still take: of a whole run, and in seconds.
MOST_SLOWER: Final = 1.03
REST_SHARE: Final = 0.55
REST_SECONDS: Final = 0.3


class Cost(NamedTuple):
    """Seconds of a command: by the clock, and of the CPUs."""

    wall: float
    cpu: float


def cost_of(command: list[str]) -> Cost:
    """Run a command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def killed_at_half(command: list[str]) -> None:
    """Start a command, and kill it when it has done half of the disk."""
    told = [*command[:2], "--progress=json", *(word for word in command[2:] if word != "-q")]
    with subprocess.Popen(told, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            progress = json.loads(line)
            if 2 * progress["done"] >= progress["total"]:
                break
        process.kill()


def make_parent(source: Path) -> None:
    """Make the parent of a child: an older state of the disk."""
    older = source.with_name("older.raw")
    subprocess.run(["cp", "--sparse=always", source, older], check=True)
    with older.open("r+b") as file:
        for offset in range(0, source.stat().st_size, _STEP_NBYTES):
            file.seek(offset)
            file.write(os.urandom(_CHANGED_NBYTES))
    parent = source.with_name("parent.vhd")
    command = [_environment.find_imgcore(), "convert", "-q", "-f", "raw", str(older), str(parent)]
    subprocess.run(command, check=True)
    older.unlink()


def measure(title: str, words: tuple[str, ...], source: Path, rounds: int) -> None:
    """Print a line of the table."""
    target = source.with_name(f"target.{words[0]}")
    plain = [_environment.find_imgcore(), "convert", "-q", "--force", "--no-reflink", "-f", "raw"]
    plain += ["-O", *words, str(source), str(target)]
    resumed = [*plain[:2], "--resume", *plain[2:]]
    without, with_it, rests = [], [], []
    for _ in range(rounds):
        without.append(cost_of(plain))
        target.unlink()
        with_it.append(cost_of(resumed))
        target.unlink()
        killed_at_half(resumed)
        if not target.exists():
            rests.append(cost_of(resumed))
        target.unlink()
    pairs = list(zip(with_it, without, strict=True))
    wall = median(ours.wall / theirs.wall for ours, theirs in pairs)
    cpu = median(ours.cpu / theirs.cpu for ours, theirs in pairs)
    seconds = median(each.wall for each in with_it)
    most = REST_SHARE * seconds + REST_SECONDS
    rest = median(each.wall for each in rests) if rests else float("nan")
    rest_cpu = sum(each.cpu for each in rests) / sum(each.cpu for each in with_it)
    print(
        f"| {title} | {seconds:.2f} s | {wall:.3f} {verdict(wall <= MOST_SLOWER)} | {cpu:.3f} "
        f"| {rest:.2f} s, {rest / seconds:.2f} | {rest_cpu:.2f} "
        f"| {most:.2f} s {verdict(rest <= most)} |",
        flush=True,
    )


def verdict(is_met: bool) -> str:
    """Return the word for a requirement."""
    return "ok" if is_met else "missed"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_resume")
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="jobs whose title has this word")
    arguments = parser.parse_args()
    with work_folder() as folder:
        source = folder / "source.raw"
        maker = ROOT / "tools" / "make_image.py"
        subprocess.run([sys.executable, maker, source, str(arguments.mib)], check=True)
        print(f"{arguments.mib} MiB, {os.cpu_count()} CPUs, in {folder}")
        print("| job | with --resume | time | CPU | rest after half | its CPU | at most |")
        print("|---|---|---|---|---|---|---|")
        for title, words in JOBS.items():
            if arguments.only in title:
                if "parent.vhd" in words:
                    make_parent(source)
                measure(title, words, source, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
