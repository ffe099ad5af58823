"""Where a disk differs from its parent, in the journal of a job that can go on.

A child is written in place, so a break leaves it between two states.  It is small, and
finding what differs takes the time: that is what the checkpoints keep.  A job that goes
on begins a new child, copies the areas that are recorded, and searches on.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.areas.area import Area
from imgcore.engine.inflating import inflated
from imgcore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.disk.checkpoints import Checkpoints
    from imgcore.disk.differences import Differences
    from imgcore.files.record_file import Record

# Of each area: its offset, its length, and whether it is zeros.
_COLUMNS: Final = 3
_DTYPE: Final = np.dtype("<i8")
_LEVEL: Final = 1
# A batch has at most so much of the disk, so that the next checkpoint need not wait.
_BATCH_NBYTES: Final = 32 * MIB


class AreaJournal:
    """Records the areas that a search finds, and knows those of earlier runs.

    Parameters
    ----------
    checkpoints : Checkpoints
    nbytes : int
        Bytes of the disk.

    Attributes
    ----------
    position : int
        Where the earlier runs have come to on the disk.
    read_nbytes : int
        Bytes of files that they have read for it.
    """

    def __init__(self, checkpoints: Checkpoints, nbytes: int) -> None:
        self._checkpoints = checkpoints
        self._nbytes = nbytes
        self._pending: list[Area] = []
        self.position: int = 0
        self.read_nbytes: int = 0
        last = checkpoints.last()
        if last is not None:
            with checkpoints.reading():
                self.position = int(last.head["position"])
                self.read_nbytes = int(last.head["read"])
        self._saved = self.position

    @property
    def limits(self) -> dict[str, int]:
        """Keywords of `Differences`: it goes on from there, in short batches."""
        return {"position": self.position, "batch_nbytes": _BATCH_NBYTES}

    def areas(self, found: Differences) -> Iterator[Area]:
        """Yield the areas of earlier runs, and then what a search finds."""
        for record in self._checkpoints.saved():
            yield from self._unpacked(record)
        for area in found.areas():
            self._pending.append(area)
            yield area

    def save_if_due(self, found: Differences) -> None:
        """Save a checkpoint of what a search has found, if it is time."""
        position = found.position
        if position == self._saved or not self._checkpoints.is_due(0):
            return
        n_done = len(self._pending)
        while n_done and self._pending[n_done - 1].offset >= position:
            n_done -= 1
        done, self._pending = self._pending[:n_done], self._pending[n_done:]
        rows = np.array(done, _DTYPE).reshape(-1, _COLUMNS)
        head = {
            "position": position,
            "read": self.read_nbytes + found.read_nbytes,
            "areas": len(rows),
        }
        # Columns of differences compress better.
        rows[1:, 0] = np.diff(rows[:, 0])
        self._checkpoints.save(None, 0, head, [zlib.compress(rows.T.tobytes(), _LEVEL)])
        self._saved = position

    def finish(self) -> None:
        """Wait for the last checkpoint."""
        self._checkpoints.finish()

    def _unpacked(self, record: Record) -> Iterator[Area]:
        with self._checkpoints.reading():
            n_areas, position = int(record.head["areas"]), int(record.head["position"])
            content = inflated(record.blob, n_areas * _COLUMNS * _DTYPE.itemsize)
            gaps, lengths, zeros = np.frombuffer(content, _DTYPE).reshape(_COLUMNS, n_areas)
            offsets = gaps.cumsum()
            ends = offsets + lengths
            if (lengths <= 0).any() or (offsets[1:] < ends[:-1]).any():
                raise ValueError("areas that do not ascend")
            if n_areas and not 0 <= offsets[0] < ends[-1] <= position <= self._nbytes:
                raise ValueError("areas of another disk")
        for row in zip(offsets.tolist(), lengths.tolist(), zeros.tolist(), strict=True):
            yield Area(row[0], row[1], bool(row[2]))
