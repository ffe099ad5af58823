"""Free clusters of a QCOW2 image, as far as they are known."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class FreeRuns:
    """Ranges of clusters, ascending; they neither overlap nor touch each other."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __len__(self) -> int:
        return len(self._starts)

    def first_of(self, n: int) -> int | None:
        """Return the lowest cluster from which on ``n`` follow each other."""
        pairs = zip(self._starts, self._ends, strict=True)
        return next((start for start, end in pairs if end - start >= n), None)

    def n_from(self, cluster: int) -> int:
        """Return how many clusters follow each other from this one on."""
        index = bisect_right(self._starts, cluster) - 1
        return max(0, self._ends[index] - cluster) if index >= 0 else 0

    def add(self, start: int, end: int) -> None:
        """Add the clusters ``[start, end)``."""
        low, high = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if low < high:
            start, end = min(start, self._starts[low]), max(end, self._ends[high - 1])
        self._starts[low:high], self._ends[low:high] = [start], [end]

    def remove(self, start: int, end: int) -> None:
        """Remove the clusters ``[start, end)``, as far as they are there."""
        low, high = bisect_right(self._ends, start), bisect_left(self._starts, end)
        if low >= high:
            return
        rest = [(self._starts[low], start), (end, self._ends[high - 1])]
        rest = [(first, last) for first, last in rest if first < last]
        self._starts[low:high] = [first for first, _ in rest]
        self._ends[low:high] = [last for _, last in rest]

    def drop_last(self) -> int:
        """Forget the last range; return its first cluster."""
        self._ends.pop()
        return self._starts.pop()
