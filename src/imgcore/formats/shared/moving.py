"""Moves blocks of an image that is written in place to the start of its file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable

    from imgcore.files.update_file import UpdateFile


def moves_into_gaps(used: Iterable[int], free: Iterable[int]) -> list[tuple[int, int]]:
    """Return which blocks go where, so that no free place is before a used one.

    Parameters
    ----------
    used, free : iterable of int
        Places in the file, in any order.

    Returns
    -------
    list of (int, int)
        Pairs of a used and a free place.  Each used one is after all free ones of the
        list, so that they can be moved together.
    """
    pairs = zip(sorted(used, reverse=True), sorted(free), strict=False)
    return [(source, target) for source, target in pairs if target < source]


def copy_block(file: UpdateFile, source: int, target: int, nbytes: int) -> None:
    """Copy bytes to a place that nothing refers to; zeros take no space there."""
    from imgcore._core import is_zero

    file.zero(target, nbytes)
    for done in range(0, nbytes, MIB):
        piece = file.pread(source + done, min(MIB, nbytes - done))
        if not is_zero(piece):
            file.pwrite(target + done, piece)
