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


def named_bad_ranges(
    rows: Iterable[tuple[int, int, int, int]], paths: Sequence[str]
) -> tuple[BadRange, ...]:
    """Return the engine's rows, (guest_offset, length, source, errno or 0), in words."""
    return tuple(
        BadRange(offset, length, paths[source], os.strerror(code) if code else _BROKEN)
        for offset, length, source, code in rows
    )
