"""Lists of byte ranges: (offset, length), ascending, none touching the next."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

Range = tuple[int, int]


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Return ranges in ascending order, those that touch or overlap as one."""
    result: list[Range] = []
    for offset, length in sorted(ranges):
        add_range(result, offset, length)
    return result


def add_range(ranges: list[Range], offset: int, length: int) -> None:
    """Append a range, or extend the last one that it continues."""
    if length <= 0:
        return
    if ranges:
        start, before = ranges[-1]
        if start <= offset <= start + before:
            ranges[-1] = start, max(before, offset + length - start)
            return
    ranges.append((offset, length))


def gaps(ranges: Iterable[Range], end: int) -> Iterator[Range]:
    """Yield what ascending ranges leave free before ``end``."""
    position = 0
    for offset, length in ranges:
        if position < min(offset, end):
            yield position, min(offset, end) - position
        position = max(position, offset + length)
    if position < end:
        yield position, end - position


def is_inside(offset: int, length: int, ranges: Sequence[Range]) -> bool:
    """Tell whether one of the ranges holds all of another one."""
    at = bisect_right(ranges, (offset, 1 << 63)) - 1
    return at >= 0 and offset + length <= sum(ranges[at])
