"""What the modes of ``--source-cache`` and ``--target-cache`` cost and leave.

``python -m benchmarks.bench_page_cache [MIB [ROUNDS [FILE_SYSTEM ...]]]`` needs root:
source and target are on ext4, or on other file systems, on a loop device over a file on
a tmpfs, so that no medium is measured.  ``tmpfs`` itself has no loop device.

``python -m benchmarks.bench_page_cache table`` measures all file systems with sizes
from 64 MiB to 4 GiB, as far as memory suffices, and writes results/page_cache.json,
from which ``auto`` follows.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from tests.helpers.images import MIB, noise
from tests.helpers.mounts import make_file_system, mounted

import imgcore
from imgcore.files.page_cache import free_memory_nbytes

_FORMATS: Final = ("raw", "qcow2")
_MODES: Final = ("keep", "drop", "direct")
_FILE_SYSTEMS: Final = ("ext4", "xfs", "btrfs", "tmpfs")
_TABLE_MIB: Final = (64, 512, 2048, 4096)
_RESULTS: Final = Path(__file__).parent / "results" / "page_cache.json"


class _Run(NamedTuple):
    seconds: float
    cpu_seconds: float
    left_nbytes: int


def _cached_nbytes(path: Path) -> int:
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


def _forget(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _run(source: Path, target: Path, mode: str) -> _Run:
    target.unlink(missing_ok=True)
    _forget(source)
    os.sync()
    started, before = time.monotonic(), os.times()
    imgcore.convert(source, target, source_cache=mode, target_cache=mode, reflink=False)
    seconds, after = time.monotonic() - started, os.times()
    cpu_seconds = after.user + after.system - before.user - before.system
    return _Run(seconds, cpu_seconds, _cached_nbytes(source) + _cached_nbytes(target))


def _measure(folder: Path, nbytes: int, rounds: int) -> Iterator[dict[str, object]]:
    """Give a row for each format and mode; ratios are of neighbouring runs."""
    source, part = folder / "source.raw", noise(64 * MIB)
    with source.open("wb") as file:
        for offset in range(0, nbytes, len(part)):
            file.write(part[: nbytes - offset])
    for name in _FORMATS:
        target = folder / f"target.{name}"
        found = [{mode: _run(source, target, mode) for mode in _MODES} for _ in range(rounds)]
        target.unlink()
        for mode in _MODES:
            ratios = [one[mode].seconds / one["keep"].seconds for one in found]
            yield {
                "format": name,
                "mode": mode,
                "seconds": round(statistics.median(one[mode].seconds for one in found), 3),
                "cpu_seconds": round(statistics.median(one[mode].cpu_seconds for one in found), 3),
                "of_keep": round(statistics.median(ratios), 2),
                "left_kib": max(one[mode].left_nbytes for one in found) // 1024,
            }
    source.unlink()


@contextmanager
def _place(kind: str, folder: Path, nbytes: int) -> Iterator[Path]:
    """Give a folder on a new file system with room for two files of ``nbytes``."""
    # Btrfs frees a file some time after it is removed.
    size = (3 if kind == "btrfs" else 2) * nbytes + nbytes // 8 + 512 * MIB
    with mounted("tmpfs", folder / "tmpfs", "-t", "tmpfs", "-o", f"size={size}") as memory:
        if kind == "tmpfs":
            yield memory
            return
        image = make_file_system(kind, memory / "image", size)
        with mounted(image, folder / kind, "-o", "loop") as top:
            yield top


def _rows(kind: str, mib: int, rounds: int) -> Iterator[dict[str, object]]:
    nbytes = mib * MIB
    with (
        tempfile.TemporaryDirectory(prefix="imgcore-bench-") as name,
        _place(kind, Path(name), nbytes) as folder,
    ):
        for row in _measure(folder, nbytes, rounds):
            print(
                f"{kind}, {mib} MiB, raw to {row['format']}: {row['mode']} "
                f"{row['seconds']:.2f} s, {row['cpu_seconds']:.2f} s of CPU, "
                f"{row['left_kib']} KiB left; / keep {row['of_keep']:.2f}",
                flush=True,
            )
            yield {"file_system": kind, "mib": mib, **row}


def _write_table() -> None:
    rows: list[dict[str, object]] = []
    for mib in _TABLE_MIB:
        # Two files on the tmpfs, and both again in the page cache.
        if free_memory_nbytes() < 5 * mib * MIB:
            print(f"{mib} MiB left out: there is not enough memory")
            continue
        for kind in _FILE_SYSTEMS:
            rows += _rows(kind, mib, 5 if mib < 1024 else 3)
    head = {"kernel": os.uname().release, "cpus": os.cpu_count(), "load": os.getloadavg()[2]}
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    _RESULTS.write_text(f'{{"machine": {json.dumps(head)}, "rows": [\n  {lines}\n]}}\n')


def main(words: list[str]) -> None:
    """Measure with a source of so many MiB, so often; or make the table."""
    if words == ["table"]:
        _write_table()
        return
    mib = int(words[0]) if words else 4096
    rounds = int(words[1]) if words[1:] else 5
    for kind in words[2:] or ["ext4"]:
        for _ in _rows(kind, mib, rounds):
            pass


if __name__ == "__main__":
    main(sys.argv[1:])
