"""The list of what a salvaging conversion could not read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

_BROKEN: Final = "does not decompress"


class BadRange(NamedTuple):
    """A part of the virtual disk that could not be read, and is zeros in the target; bytes."""

    guest_offset: int
    length: int
    path: str
    reason: str


def joined_bad_ranges(
    rows: Iterable[tuple[int, int, int, int]], paths: Sequence[str]
) -> tuple[BadRange, ...]:
    """Return the engine's rows in order, neighbours joined.

    They are (guest_offset, length, source, errno or 0).
    """
    joined: list[BadRange] = []
    for offset, length, source, code in sorted(rows):
        row = BadRange(offset, length, paths[source], os.strerror(code) if code else _BROKEN)
        last = joined[-1] if joined else None
        if last is not None and last.guest_offset + last.length == offset and last[2:] == row[2:]:
            joined[-1] = last._replace(length=last.length + length)
        else:
            joined.append(row)
    return tuple(joined)
