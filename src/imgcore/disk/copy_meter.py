"""The progress of copying areas, and of the search for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore.disk.block_copy import Copied
from imgcore.engine.progress import Progress, Tally

if TYPE_CHECKING:
    from collections.abc import Callable


class CopyMeter:
    """Reports how far a job is that copies areas.

    Parameters
    ----------
    nbytes : int
        Bytes of the disk.
    progress : callable, optional
        Gets a `Progress`: what was searched or copied is done, and data and zeros are
        what was copied.
    """

    def __init__(self, nbytes: int, progress: Callable[[Progress], None] | None) -> None:
        self._progress = progress
        self._copied = Copied()
        self._done = 0
        self._tally = Tally(nbytes, None if progress is None else self._report)

    def _report(self, state: Progress) -> None:
        assert self._progress is not None
        self._progress(state._replace(zero=self._copied.zeroed))

    def search(self, position: int) -> None:
        """Take how far the search is."""
        self._count(position)

    def copy(self, copied: Copied) -> None:
        """Take what is copied."""
        self._copied = copied
        self._count(copied.position)

    def _count(self, position: int) -> None:
        self._done = max(self._done, position)
        copied = self._copied
        self._tally.count(self._done, data=copied.written, read=copied.read, written=copied.written)

    def finish(self) -> None:
        """Report that all is done."""
        self._tally.finish()
