"""Streams that come in pieces of random sizes."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from tests.helpers.images import SEED

_SIZES = (1, 7, 511, 512, 4096, 4097, 65536, 1 << 20)


class Dripping:
    """A binary file object whose reads return fewer bytes than asked for."""

    def __init__(self, file: IO[bytes], seed: int = SEED) -> None:
        self._file = file
        self._random = random.Random(seed)

    def read(self, nbytes: int, /) -> bytes:
        return self._file.read(min(nbytes, self._random.choice(_SIZES)))


@contextmanager
def dripping(path: Path) -> Iterator[Dripping]:
    """Open a file as `Dripping`."""
    with open(path, "rb") as file:
        yield Dripping(file)


@contextmanager
def piped(content: bytes | Path, seed: int = SEED) -> Iterator[IO[bytes]]:
    """Yield the read end of a pipe that another thread fills in random pieces."""
    data = content.read_bytes() if isinstance(content, Path) else content
    r, w = os.pipe()

    def write() -> None:
        sizes = random.Random(seed)
        at = 0
        with suppress(BrokenPipeError), os.fdopen(w, "wb", buffering=0) as file:
            while at < len(data):
                at += file.write(data[at : at + sizes.choice(_SIZES)])

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    with os.fdopen(r, "rb", buffering=0) as file:
        yield file
    thread.join()
