"""The ranges that a salvaging conversion could not read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

_BROKEN: Final = "does not decompress"


class BadRange(NamedTuple):
    """A range of the virtual disk, in bytes, that could not be read.

    It is zeros in the target.
    """

    guest_offset: int
    length: int
    path: str
    reason: str


def named_bad_ranges(
    rows: Iterable[tuple[int, int, int, int]], paths: Sequence[str]
) -> tuple[BadRange, ...]:
    """Return the engine's rows (guest_offset, length, source, errno or 0) as ranges."""
    return tuple(
        BadRange(offset, length, paths[source], os.strerror(code) if code else _BROKEN)
        for offset, length, source, code in rows
    )
