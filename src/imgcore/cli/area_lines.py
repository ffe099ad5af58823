"""Areas of a disk as a table for people, and their number for the exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from imgcore.areas.area import Area


class Counted:
    """Areas, and their number so far."""

    def __init__(self, areas: Iterator[Area]) -> None:
        self._areas = areas
        self.n_areas: int = 0

    def __iter__(self) -> Iterator[Area]:
        return self

    def __next__(self) -> Area:
        area = next(self._areas)
        self.n_areas += 1
        return area


def area_lines(areas: Iterable[Area]) -> Iterator[str]:
    """Yield a line for each area, the first one with a header; none without areas."""
    header = f"{'Offset':<16}{'Length':<16}Content\n"
    for area in areas:
        content = "zeros" if area.is_zero else "data"
        yield f"{header}{area.offset:<#16x}{area.length:<#16x}{content}\n"
        header = ""
