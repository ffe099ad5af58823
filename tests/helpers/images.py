"""Raw images with known content from a seed, the same on every machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

SEED = int(os.environ.get("IMGCORE_TEST_SEED", "20240229"))


def noise(nbytes: int, seed: int = SEED) -> bytes:
    """Return bytes that cannot be compressed."""
    return np.random.default_rng(seed).bytes(nbytes)


def text(nbytes: int, seed: int = SEED) -> bytes:
    """Return bytes that deflate to about a third, with matches beyond 4 KiB."""
    rng = np.random.default_rng(seed)
    words: NDArray[np.uint8] = rng.integers(97, 123, size=(4096, 8), dtype=np.uint8)
    words[:, 7] = 32
    picks = rng.zipf(1.3, size=nbytes // 8 + 1) % 4096
    return words[picks].tobytes()[:nbytes]


@dataclass(frozen=True)
class RawImage:
    """The recipe of a raw image: pieces of data in a sparse file."""

    name: str
    virtual_size: int
    pieces: Callable[[], list[tuple[int, bytes]]]

    def write(self, path: Path) -> None:
        """Write the image; all but data stays a hole."""
        with open(path, "wb") as file:
            for offset, data in self.pieces():
                file.seek(offset)
                file.write(data)
            file.truncate(self.virtual_size)


def _dense() -> list[tuple[int, bytes]]:
    return [(0, text(4 * MIB)), (4 * MIB, noise(1 * MIB)), (5 * MIB, text(1 * MIB, SEED + 1))]


def _sparse() -> list[tuple[int, bytes]]:
    return [
        (64 * KIB, text(300 * KIB)),
        (3 * MIB + 512, noise(700)),
        (9 * MIB - 4096, text(64 * KIB, SEED + 2)),
        (23 * MIB, b"\x00" * (2 * MIB)),  # written zeros, which tools find to be empty
        (31 * MIB + 65024, noise(512, SEED + 3)),
    ]


def _fragmented() -> list[tuple[int, bytes]]:
    return [(i * 128 * KIB, text(64 * KIB, SEED + i % 7)) for i in range(64)]


def _small_fragments() -> list[tuple[int, bytes]]:
    return [(i * 8 * KIB, noise(4 * KIB, SEED + i % 7)) for i in range(256)]


def _far() -> list[tuple[int, bytes]]:
    end = 5 * GIB
    return [
        (0, text(70_000)),
        (4 * GIB - 65536, text(131072, SEED + 4)),
        (end - 70_000, noise(70_000 - 512)),
    ]


def _nearly_zero() -> list[tuple[int, bytes]]:
    """Clusters whose only set bit is at an edge: hard cases for the zero test."""
    return [
        (offset, b"\x01")
        for i in range(24)
        for offset in (i * 128 * KIB, i * 128 * KIB + 64 * KIB - 1)
    ]


EMPTY = RawImage("empty", 16 * MIB, list)
DENSE = RawImage("dense", 6 * MIB, _dense)
INCOMPRESSIBLE = RawImage("incompressible", 3 * MIB, lambda: [(0, noise(3 * MIB))])
SPARSE = RawImage("sparse", 32 * MIB, _sparse)
FRAGMENTED = RawImage("fragmented", 8 * MIB, _fragmented)
SMALL_FRAGMENTS = RawImage("small-fragments", 2 * MIB, _small_fragments)
NEARLY_ZERO = RawImage("nearly-zero", 3 * MIB, _nearly_zero)
TINY = RawImage("one-sector", 512, lambda: [(0, noise(512))])
TINY_EMPTY = RawImage("one-sector-empty", 512, list)
ODD = RawImage("odd-size", 3 * MIB + 5 * 512, lambda: [(0, text(3 * MIB + 5 * 512))])
ODD_TAIL = RawImage(
    "odd-sparse-tail", 2 * MIB + 63 * 512, lambda: [(4096, text(9000)), (2 * MIB + 512, noise(999))]
)
FAR = RawImage("beyond-4-gib", 5 * GIB, _far)

RAW_IMAGES = (
    EMPTY,
    DENSE,
    INCOMPRESSIBLE,
    SPARSE,
    FRAGMENTED,
    SMALL_FRAGMENTS,
    NEARLY_ZERO,
    TINY,
    TINY_EMPTY,
    ODD,
    ODD_TAIL,
    FAR,
)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
