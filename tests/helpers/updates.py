"""Random changes of an image in place, and the same changes of a byte array."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imgcore

SECTOR = 512
KIB = 1024


def some_content(seed: int, nbytes: int = 2048 * KIB) -> bytes:
    """Return a disk of data and zeros in pieces of odd lengths."""
    chance = random.Random(seed)
    pieces = bytearray()
    while len(pieces) < nbytes:
        length = chance.randint(1, 200_000)
        pieces += chance.randbytes(length) if chance.random() < 0.5 else bytes(length)
    return bytes(pieces[:nbytes])


class Model:
    """The content that a disk must have after some changes.

    A discarded byte may be zero, or as it was: until the next write it is either.
    """

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.is_discarded = bytearray(len(content))

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        self.is_discarded[offset : offset + len(data)] = bytes(len(data))

    def discard(self, offset: int, length: int) -> None:
        self.is_discarded[offset : offset + length] = b"\1" * length

    def resize(self, nbytes: int) -> None:
        for array in (self.content, self.is_discarded):
            del array[nbytes:]
            array.extend(bytes(nbytes - len(array)))

    def check(self, offset: int, found: bytes) -> None:
        """Fail unless bytes of the disk are the model's; discarded ones settle."""
        end = offset + len(found)
        expected = self.content[offset:end]
        if found == expected:
            return
        for at in range(0, len(found), SECTOR):
            piece = slice(at, at + SECTOR)
            if found[piece] == expected[piece]:
                continue
            for byte in range(at, min(at + SECTOR, len(found))):
                if found[byte] != expected[byte]:
                    where = offset + byte
                    assert self.is_discarded[where] and not found[byte], f"differs at {where:#x}"
                    self.content[where] = 0


def change_at_random(
    path: Path,
    model: Model,
    *,
    seed: int,
    n_changes: int = 200,
    max_nbytes: int = 200 * KIB,
    sizes: tuple[int, ...] = (),
    verify: Callable[[], object] = lambda: None,
    **keywords: Any,
) -> None:
    """Change an image and its model in the same way, and compare them.

    Parameters
    ----------
    path, model
        The image, and what it has now.
    seed, n_changes, max_nbytes
        Which changes, how many, and how long the longest is.
    sizes
        Sizes in bytes that the disk may get.
    verify
        Called whenever the image is closed, for other tools.
    keywords
        For `imgcore.open`.
    """
    chance = random.Random(seed)
    image = imgcore.open(path, mode="r+", **keywords)
    try:
        for _ in range(n_changes):
            size = len(model.content)
            nbytes = min(chance.choice((1, SECTOR, 4 * KIB, 64 * KIB, max_nbytes)), size)
            nbytes = chance.randint(1, nbytes)
            offset = chance.randint(0, size - nbytes)
            if chance.random() < 0.5:
                offset -= offset % (4 * KIB)
            action = chance.random()
            if action < 0.55:
                data = chance.randbytes(nbytes)
                image.write(offset, data)
                model.write(offset, data)
            elif action < 0.70:
                image.zero(offset, nbytes, unmap=chance.random() < 0.5)
                model.write(offset, bytes(nbytes))
            elif action < 0.80:
                image.discard(offset, nbytes)
                model.discard(offset, nbytes)
            elif action < 0.90:
                image.flush()
            elif action < 0.93 and sizes:
                size = chance.choice(sizes)
                image.resize(size, shrink=True)
                model.resize(size)
            elif action < 0.96:
                image.close()
                verify()
                image = imgcore.open(path, mode="r+", **keywords)
            else:
                model.check(offset, image.read(offset, nbytes))
        model.check(0, image.read(0, len(model.content)))
    finally:
        image.close()
    verify()
    with imgcore.open(path, **keywords) as reopened:
        model.check(0, reopened.read(0, len(model.content)))
