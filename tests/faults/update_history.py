"""Changes of an image in place, and what its disk may have after a crash among them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

import imgcore

SECTOR = 512
KIB = 1024
MIB = 1024 * KIB


@lru_cache(maxsize=256)
def _noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


class Change(NamedTuple):
    """One call of an `imgcore.Image`.

    Attributes
    ----------
    action : str
        ``write``, ``writev``, ``zero``, ``unmap``, ``discard``, ``resize``, ``flush``,
        or ``reopen``.
    offset, length : int
        The range of the disk; the new size as ``length``.
    seed : int
        Of the bytes that are written.
    """

    action: str
    offset: int = 0
    length: int = 0
    seed: int = 0

    @property
    def data(self) -> bytes:
        """The bytes that the range gets."""
        return _noise(self.seed, self.length) if self.is_write else bytes(self.length)

    @property
    def is_write(self) -> bool:
        """Whether it is not zeros that the range gets."""
        return self.action in ("write", "writev")

    @property
    def is_flush(self) -> bool:
        """Whether all changes are durable once it has ended."""
        return self.action in ("flush", "reopen", "resize")

    def make(self, image: imgcore.Image) -> None:
        """Change an open image."""
        if self.action == "write":
            image.write(self.offset, self.data)
        elif self.action == "writev":
            # No sector has a state in which one of the two is written.
            middle = self.offset + self.length // 2
            half = max(middle - middle % SECTOR - self.offset, 0)
            data = self.data
            image.writev([(self.offset, data[:half]), (self.offset + half, data[half:])])
        elif self.action == "discard":
            image.discard(self.offset, self.length)
        elif self.action == "resize":
            image.resize(self.length, shrink=True)
        elif self.action == "flush":
            image.flush()
        else:
            image.zero(self.offset, self.length, unmap=self.action == "unmap")


# How often each action is taken.
_WEIGHTS = {
    "write": 44,
    "writev": 8,
    "zero": 7,
    "unmap": 7,
    "discard": 10,
    "flush": 14,
    "resize": 4,
    "reopen": 6,
}


def random_changes(
    chance: random.Random, n_changes: int, nbytes: int, sizes: Sequence[int] = ()
) -> list[Change]:
    """Return changes of a disk of ``nbytes``; many of them meet the same few places."""
    changes = []
    places = [chance.randrange(nbytes) // (64 * KIB) * 64 * KIB for _ in range(4)]
    for _ in range(n_changes):
        # To resize a disk to the size that it has is no flush.
        (action,) = chance.choices([*_WEIGHTS], [*_WEIGHTS.values()])
        if action == "resize" and (others := [size for size in sizes if size != nbytes]):
            nbytes = chance.choice(others)
            changes.append(Change(action, 0, nbytes))
        elif action in ("flush", "reopen", "resize"):
            changes.append(Change("flush" if action == "resize" else action))
        else:
            is_write = action.startswith("write")
            unit = chance.choice((1, SECTOR, 4 * KIB, 64 * KIB, 256 * KIB))
            length = min(unit * chance.randint(1, 4 if is_write else 9), nbytes)
            place = chance.choice(places) if chance.random() < 0.6 else chance.randrange(nbytes)
            place += chance.choice((0, 0, chance.randrange(64 * KIB)))
            offset = min(place - place % min(unit, 64 * KIB), nbytes - length)
            changes.append(Change(action, offset, length, chance.getrandbits(30)))
    return changes


class _Sector(NamedTuple):
    """A sector of the disk; discarded bytes may be zero instead."""

    content: bytes
    is_discarded: bytes

    def allows(self, found: bytes) -> bool:
        if found == self.content:
            return True
        return all(
            f == c or (d and not f)
            for f, c, d in zip(found, self.content, self.is_discarded, strict=True)
        )


class History:
    """The content of a disk at the last flush, and the changes since.

    Each sector has the content that it had then, or after one of the changes since.
    """

    def __init__(self, content: bytes) -> None:
        self._content = bytearray(content)
        self._is_discarded = bytearray(len(content))
        self._pending: list[Change] = []
        self._is_running = False

    def begin(self, change: Change) -> None:
        """Note that a change has begun."""
        self._pending.append(change)
        self._is_running = True

    def end(self, change: Change) -> None:
        """Note that a change has ended: after a flush, all are durable."""
        self._is_running = False
        if change.is_flush:
            self.settle()

    def settle(self) -> None:
        """Note that all changes that have ended are durable; one may have failed."""
        failed = self._pending[-1:] if self._is_running else []
        for change in self._pending[: len(self._pending) - len(failed)]:
            for array, data in (
                (self._content, change.data),
                (self._is_discarded, bytes(change.length)),
            ):
                if change.action == "resize":
                    del array[change.length :]
                    array.extend(bytes(change.length - len(array)))
                elif change.action != "discard":
                    array[change.offset : change.offset + change.length] = data
            if change.action == "discard":
                end = change.offset + change.length
                self._is_discarded[change.offset : end] = b"\1" * change.length
        self._pending = failed

    @property
    def sizes(self) -> set[int]:
        """The sizes in bytes that the disk may have."""
        resizes = [change.length for change in self._pending if change.action == "resize"]
        return {len(self._content), *resizes}

    def check(self, found: bytes) -> None:
        """Fail unless the disk may have this content after a crash."""
        assert len(found) in self.sizes, f"the disk has {len(found)} bytes, not {self.sizes}"
        expected = bytes(self._content[: len(found)]).ljust(len(found), b"\0")
        if found == expected:
            return
        pairs = (np.frombuffer(b, np.uint8).reshape(-1, SECTOR) for b in (found, expected))
        differs = np.not_equal(*pairs).any(axis=1)
        for number in np.flatnonzero(differs).tolist():
            start = number * SECTOR
            sector = found[start : start + SECTOR]
            states = self._states(start)
            if not any(state.allows(sector) for state in states):
                older = "zeros" if not any(sector) else sector[:8].hex()
                raise AssertionError(
                    f"the sector at 0x{start:x} has {older}: none of its {len(states)} states, "
                    f"{[state.content[:8].hex() for state in states]}"
                )

    def _states(self, start: int) -> list[_Sector]:
        """Return what a sector of the disk may have."""
        end = start + SECTOR
        content = bytes(self._content[start:end]).ljust(SECTOR, b"\0")
        state = _Sector(content, bytes(self._is_discarded[start:end]).ljust(SECTOR, b"\0"))
        states = [state]
        for change in self._pending:
            a, b = max(change.offset, start), min(change.offset + change.length, end)
            if change.action == "resize":
                # What the disk loses may be lost before the disk is smaller.
                if change.length <= start:
                    state = state._replace(is_discarded=b"\1" * SECTOR)
                    states += [state, _Sector(bytes(SECTOR), bytes(SECTOR))]
            elif a < b:
                state = _changed(state, change, slice(a - start, b - start), a - change.offset)
                states.append(state)
        return states


def _changed(state: _Sector, change: Change, part: slice, at: int) -> _Sector:
    content, is_discarded = bytearray(state.content), bytearray(state.is_discarded)
    length = part.stop - part.start
    if change.action == "discard":
        is_discarded[part] = b"\1" * length
    else:
        content[part] = change.data[at : at + length]
        is_discarded[part] = bytes(length)
    return _Sector(bytes(content), bytes(is_discarded))
