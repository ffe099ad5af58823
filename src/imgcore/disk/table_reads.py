"""Lets a control steer what reads only the tables of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore.disk.limited_chunks import await_rate
from imgcore.engine.progress import Tally
from imgcore.files.host_file import HostFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from imgcore.engine.control import Run
    from imgcore.engine.extents import Extents


class TableReads:
    """What a run reads of some files.

    Each read waits for the rate of the run and while it is paused, and raises if it is
    cancelled.

    Attributes
    ----------
    run : Run

    Parameters
    ----------
    run : Run
    disk_nbytes : int, optional
        Bytes of the disk that is gone through; `passed` then counts the progress.
        Without it, the bytes that are read do, and their sum is not known before the
        end.
    """

    def __init__(self, run: Run, disk_nbytes: int | None = None) -> None:
        self.run: Run = run
        self._counts_reads = disk_nbytes is None
        self._tally = Tally(disk_nbytes or 0, run.report)

    def watch(self, files: Iterable[object]) -> None:
        """Let the reads of these files be steered from now on."""
        for file in files:
            if isinstance(file, HostFile):
                file.on_read = self._before_read

    def _before_read(self, nbytes: int) -> None:
        await_rate(self.run.limit, nbytes, self._tally.repeat)
        if self._counts_reads:
            self._tally.position(self._tally.done_nbytes + nbytes)
        else:
            self._tally.repeat()

    def passed(self, batches: Iterable[Extents]) -> Iterator[Extents]:
        """Yield the extents of the disk; their end is how far the run is."""
        for batch in batches:
            yield batch
            last = batch[-1]
            self._tally.position(int(last["guest_offset"]) + int(last["length"]))

    def finish(self) -> None:
        """Report that all is read."""
        if self._counts_reads:
            self._tally.total_nbytes = self._tally.done_nbytes
        self._tally.finish()
