"""Many jobs in one process, and how well a rate is kept.

``python -m benchmarks.bench_jobs`` prints the table of BENCHMARKING.md.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

MIB = 1 << 20
N_JOBS = 50
N_ROUNDS = 3
DISK_NBYTES = 64 * MIB
TARGETS = (
    ("qcow2", False),
    ("qcow2", True),
    ("vmdk", True),
    ("raw", False),
    ("raw.zst", False),
    ("raw.gz", False),
)
RATES = (20 * MIB, 100 * MIB, 400 * MIB)
RATE_SECONDS = 10.0

# One way to run the conversions; prints seconds, threads besides its own two, peak.
_CHILD = """
import os, resource, sys, threading, time
import imgcore

folder, way, compress, names = sys.argv[1], sys.argv[2], sys.argv[3] == "1", sys.argv[4:]
most, is_over = 0, threading.Event()


def watch():
    global most
    while not is_over.wait(0.005):
        most = max(most, len(os.listdir("/proc/self/task")))


def convert(name):
    target = os.path.join(folder, name)
    imgcore.convert(os.path.join(folder, "disk.raw"), target, compress=compress, sync=False)
    os.unlink(target)


watcher = threading.Thread(target=watch)
watcher.start()
started = time.perf_counter()
if way == "at once":
    jobs = [threading.Thread(target=convert, args=(name,)) for name in names]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
else:
    for name in names:
        convert(name)
seconds = time.perf_counter() - started
is_over.set()
watcher.join()
print(seconds, most - 2, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def run(folder: Path, way: str, suffix: str, *, compress: bool) -> tuple[float, int, int]:
    """Return seconds, the most threads and the peak of one run."""
    names = [f"o{number}.{suffix}" for number in range(N_JOBS)]
    line = [sys.executable, "-c", _CHILD, str(folder), way, str(int(compress)), *names]
    seconds, n_threads, peak = subprocess.check_output(line, text=True).split()
    return float(seconds), int(n_threads), int(peak)


def measure_jobs(folder: Path) -> None:
    """Print a line for each format: all at once against one after another."""
    print(f"{N_JOBS} conversions of {DISK_NBYTES // MIB} MiB, {os.cpu_count()} CPUs")
    print("| target | at once / one after another | threads | peak MiB |")
    print("|---|---|---|---|")
    for suffix, compress in TARGETS:
        ratios, threads, peaks = [], [], []
        for _ in range(N_ROUNDS):
            alone = run(folder, "one after another", suffix, compress=compress)
            at_once = run(folder, "at once", suffix, compress=compress)
            ratios.append(at_once[0] / alone[0])
            threads.append(at_once[1])
            peaks.append(at_once[2])
        name = f"{suffix}, compressed" if compress else suffix
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(
            f"| {name} | {statistics.median(ratios):.2f} ({spread}) | {max(threads)} "
            f"| {max(peaks) // MIB} |",
            flush=True,
        )


def measure_rates(path: Path) -> None:
    """Print how well a job keeps its rate, and how soon it takes a new one."""
    import imgcore

    print("| rate MiB/s | over 10 s | after a change: the next 0.5 s |")
    print("|---|---|---|")
    for rate in RATES:
        control = imgcore.Control(rate=rate)

        def read(control: imgcore.Control = control) -> None:
            try:
                while True:
                    imgcore.checksum(path, control=control)
            except imgcore.ConversionCancelled:
                pass

        job = threading.Thread(target=read)
        job.start()
        time.sleep(1.0)
        before, started = control.progress().done, time.perf_counter()
        time.sleep(RATE_SECONDS)
        found = (control.progress().done - before) / (time.perf_counter() - started)
        control.pause()
        control.rate = rate // 2
        time.sleep(0.3)
        control.resume()
        time.sleep(0.1)
        before, started = control.progress().done, time.perf_counter()
        time.sleep(0.5)
        changed = (control.progress().done - before) / (time.perf_counter() - started)
        control.cancel()
        job.join()
        print(f"| {rate // MIB} | {found / rate:.3f} | {2 * changed / rate:.2f} |", flush=True)


def main() -> int:
    """Measure both; the folder is in memory."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("IMGCORE_BENCH_DIR", "/dev/shm")))
    try:
        half = DISK_NBYTES // 2
        text = b"".join(b"%015d\n" % (number * number) for number in range(half // 16))
        (folder / "disk.raw").write_bytes(os.urandom(half) + text)
        measure_jobs(folder)
        measure_rates(folder / "disk.raw")
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
