"""The findings of a check, as every format reports them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar, Final

_ERROR: Final = "ERROR "


@dataclass
class CheckReport:
    """The findings of ``check``, filled by a format's `Reader.check`.

    Attributes
    ----------
    corruptions : int
        Contradictions in the image: guest data may be wrong or unreachable.
    leaks : int
        Allocation units of the file that nothing uses.
    total_clusters, allocated_clusters : int
        Allocation units of the disk, and those that the image stores.
    fragmented_clusters, compressed_clusters : int
        Of the allocated ones: those that do not follow their predecessor in the file,
        and those that are compressed.
    image_end_offset : int
        End of the used part of the file, in bytes.
    problems : list of str
        A line for each problem, at most ``MAX_PROBLEM_LINES``.  The counters count all.
    """

    corruptions: int = 0
    leaks: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    image_end_offset: int = 0
    problems: list[str] = field(default_factory=list)

    MAX_PROBLEM_LINES: ClassVar[int] = 1000

    @property
    def first_corruption(self) -> str:
        """The line of the first corruption, empty without one."""
        lines = (line.removeprefix(_ERROR) for line in self.problems if line.startswith(_ERROR))
        return next(lines, "")

    def corruption(self, line: str) -> None:
        """Count a corruption and keep its line."""
        self.corruptions_among(1, [line])

    def corruptions_among(self, count: int, lines: Iterable[str]) -> None:
        """Count ``count`` corruptions; read only those lines that can be kept."""
        self.corruptions += count
        self._keep(_ERROR, lines)

    def leak(self, line: str, count: int = 1) -> None:
        """Count ``count`` leaked units and keep the line about them."""
        self.leaks_among(count, [line])

    def leaks_among(self, count: int, lines: Iterable[str]) -> None:
        """Count ``count`` leaked units; read only those lines that can be kept."""
        self.leaks += count
        self._keep("Leaked ", lines)

    def _keep(self, what: str, lines: Iterable[str]) -> None:
        room = self.MAX_PROBLEM_LINES - len(self.problems)
        self.problems += [f"{what}{line}" for line in islice(lines, max(0, room))]
