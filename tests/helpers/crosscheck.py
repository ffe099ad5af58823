"""Random cases that can be run again: seeds, a time budget, random disks.

A case is a function of a `random.Random`, so its seed repeats a failure.
``CROSSCHECK_SEED`` selects one seed; ``CROSSCHECK_SECONDS`` is the time of long runs.
"""

from __future__ import annotations

import os
import random
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from tests.helpers import images
from tests.helpers.images import KIB, MIB

Case = Callable[[random.Random, Path], None]

ONE_SEED = os.environ.get("CROSSCHECK_SEED")
SECONDS = float(os.environ.get("CROSSCHECK_SECONDS", "120"))
# A long run ends after this many failures.
MAX_FAILURES = 8


def seeds(count: int) -> list[int]:
    """Return the seeds of an ordinary run: the first few, or ``CROSSCHECK_SEED``."""
    return [int(ONE_SEED)] if ONE_SEED else [images.SEED + i for i in range(count)]


def run(name: str, case: Case, seed: int, folder: Path) -> None:
    """Run one case in a new folder, which stays if the case fails."""
    place = folder / f"{name}-{seed}"
    place.mkdir()
    case(random.Random(f"{name} {seed}"), place)
    shutil.rmtree(place)


def run_for_a_while(cases: Mapping[str, Case], folder: Path, seconds: float = SECONDS) -> int:
    """Run all cases in turn, with new seeds, until time is up; return their number.

    A failure does not end the run; the AssertionError at its end has all of them.
    """
    deadline = time.monotonic() + seconds
    first = int(ONE_SEED) if ONE_SEED else int(time.time()) % 10**8 * 1000
    print(f"seeds from {first} on")
    failures: list[str] = []
    n_done = 0
    for number in range(1 if ONE_SEED else 10**6):
        for name, case in cases.items():
            if time.monotonic() > deadline or len(failures) >= MAX_FAILURES:
                assert not failures, "\n\n".join(failures)
                return n_done
            seed = first + number
            try:
                run(name, case, seed, folder)
            except Exception:
                failures.append(
                    f"CROSSCHECK_SEED={seed}, {name}:\n{traceback.format_exc(limit=-4)}"
                )
            n_done += 1
    assert not failures, "\n\n".join(failures)
    return n_done


def random_size(rng: random.Random, unit: int = 512, largest: int = 20 * MIB) -> int:
    """Return a disk size, often small, often close to a power of two."""
    kind = rng.randrange(4)
    if kind == 0:
        nbytes = rng.randrange(1, 200 * KIB)
    elif kind == 1:
        nbytes = (1 << rng.randrange(12, 25)) + rng.randrange(-3, 4) * unit
    else:
        nbytes = rng.randrange(1, largest)
    return max(unit, min(nbytes, largest) // unit * unit)


def random_content(rng: random.Random, nbytes: int) -> bytearray:
    """Return a disk's bytes: runs of noise, text, one byte or zeros, long and short."""
    content = bytearray(nbytes)
    if rng.random() < 0.05:
        return content
    at = 0
    typical = rng.choice((512, 4 * KIB, 64 * KIB, 700 * KIB))
    while at < nbytes:
        length = min(nbytes - at, max(1, round(rng.expovariate(1 / typical))))
        if rng.random() < 0.7:
            length = min(nbytes - at, -(-length // 512) * 512)
        content[at : at + length] = piece(rng, length)
        at += length
    return content


def piece(rng: random.Random, nbytes: int) -> bytes:
    """Return one run of bytes; half of the runs are zeros."""
    kind = rng.randrange(8)
    if kind == 0:
        return np.random.default_rng(rng.getrandbits(32)).bytes(nbytes)
    if kind == 1:
        return images.text(nbytes, rng.getrandbits(32))
    if kind == 2:
        return bytes([rng.randrange(1, 256)]) * nbytes
    if kind == 3:  # a single byte in zeros
        data = bytearray(nbytes)
        data[rng.choice((0, nbytes - 1, rng.randrange(nbytes)))] = 1
        return bytes(data)
    return bytes(nbytes)


def write_sparse(path: Path, content: bytes | bytearray, rng: random.Random) -> None:
    """Write a raw image, in which zeros are holes or bytes at random."""
    with open(path, "wb") as file:
        file.truncate(len(content))
        for offset, data in _pieces(content):
            if any(data) or rng.random() < 0.3:
                file.seek(offset)
                file.write(data)


def _pieces(content: bytes | bytearray, nbytes: int = 4096) -> Iterator[tuple[int, bytes]]:
    for offset in range(0, len(content), nbytes):
        yield offset, bytes(content[offset : offset + nbytes])


def random_changes(rng: random.Random, content: bytearray) -> None:
    """Change some ranges of a disk in place: other bytes, or zeros."""
    for _ in range(rng.randrange(8)):
        length = min(len(content), rng.choice((1, 512, 4096, 65536, 300_000)))
        offset = rng.randrange(len(content) - length + 1)
        content[offset : offset + length] = piece(rng, length)
