"""Ranges of a disk: cut at its blocks, and joined."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def block_parts(start: int, length: int, block_nbytes: int) -> Iterator[tuple[int, int, int]]:
    """Yield (block, start, end) for the parts of a range that are in one block."""
    end = start + length
    while start < end:
        block = start // block_nbytes
        stop = min(end, (block + 1) * block_nbytes)
        yield block, start, stop
        start = stop


def add_range(ranges: list[tuple[int, int]], start: int, length: int) -> None:
    """Add a range (start, length), which may continue the last one."""
    if ranges and sum(ranges[-1]) == start:
        first, nbytes = ranges[-1]
        ranges[-1] = first, nbytes + length
    else:
        ranges.append((start, length))
