"""What ``convert --source-cache=drop --target-cache=drop`` costs, and what it leaves.

``python -m benchmarks.bench_page_cache [MIB [ROUNDS]]`` needs root: source and target
are on ext4, on a loop device over a file on a tmpfs, so that no medium is measured.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.helpers.images import MIB, noise
from tests.helpers.mounts import make_file_system, mounted

import imgcore

_FORMATS: Final = ("raw", "qcow2")


def _cached_nbytes(path: Path) -> int:
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


def _forget(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _run(source: Path, target: Path, mode: str) -> tuple[float, int]:
    """Return the seconds of a conversion, and the bytes that it leaves in the cache."""
    target.unlink(missing_ok=True)
    _forget(source)
    os.sync()
    started = time.monotonic()
    imgcore.convert(source, target, source_cache=mode, target_cache=mode)
    seconds = time.monotonic() - started
    return seconds, _cached_nbytes(source) + _cached_nbytes(target)


def _measure(folder: Path, nbytes: int, rounds: int) -> None:
    source, part = folder / "source.raw", noise(64 * MIB)
    with source.open("wb") as file:
        for offset in range(0, nbytes, len(part)):
            file.write(part[: nbytes - offset])
    for name in _FORMATS:
        target = folder / f"target.{name}"
        pairs = [[_run(source, target, mode) for mode in ("keep", "drop")] for _ in range(rounds)]
        target.unlink()
        keep, drop = (statistics.median(pair[i][0] for pair in pairs) for i in (0, 1))
        ratio = statistics.median(pair[1][0] / pair[0][0] for pair in pairs)
        left = [max(pair[i][1] for pair in pairs) // 1024 for i in (0, 1)]
        print(
            f"raw to {name}: keep {keep:.2f} s, {left[0]} KiB left; drop {drop:.2f} s, "
            f"{left[1]} KiB left; drop / keep {ratio:.2f}",
            flush=True,
        )


def main(words: list[str]) -> None:
    """Measure with a source of so many MiB, so often."""
    nbytes = int(words[0]) * MIB if words else 4096 * MIB
    rounds = int(words[1]) if words[1:] else 5
    with tempfile.TemporaryDirectory(prefix="imgcore-bench-") as name:
        folder, size = Path(name), 2 * nbytes + 512 * MIB
        with mounted("tmpfs", folder / "tmpfs", "-t", "tmpfs", "-o", f"size={size}") as memory:
            image = make_file_system("ext4", memory / "image", size)
            with mounted(image, folder / "ext4", "-o", "loop") as top:
                _measure(top, nbytes, rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
