"""What verbs that copy areas in place have in common: their keywords and progress."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

from imgcore.disk.block_copy import Copied
from imgcore.engine.control import Control, Run
from imgcore.engine.job import thread_count
from imgcore.engine.progress import Progress, Tally

if TYPE_CHECKING:
    from typing import Self


class CopySettings(NamedTuple):
    """The keywords of a verb that say how to copy, verified.

    Attributes
    ----------
    threads : int
    run : Run
        What the control and the callback for progress see of it.
    started : float
        When the verb was called, as `time.monotonic` has it.
    """

    threads: int
    run: Run
    started: float

    @classmethod
    def from_keywords(
        cls,
        threads: SupportsIndex | None,
        rate: SupportsIndex | str | None,
        control: Control | None,
        progress: Callable[[Progress], None] | None,
    ) -> Self:
        """Return the record; OptionError if the rate is stated twice."""
        return cls(thread_count(threads), Run.of(rate, control, progress), time.monotonic())


class CopyJob:
    """A job that copies areas of a disk; it reports how far it is.

    What was searched or copied is done, and data and zeros are what was copied.

    Parameters
    ----------
    nbytes : int
        Bytes of the disk.
    settings : CopySettings
    """

    def __init__(self, nbytes: int, settings: CopySettings) -> None:
        self.threads: int = settings.threads
        self.run: Run = settings.run
        self._started = settings.started
        self._copied = Copied()
        self._done = 0
        self._tally = Tally(nbytes, self._report)

    def _report(self, state: Progress) -> None:
        self.run.report(state._replace(zero=self._copied.zeroed))

    @property
    def control(self) -> Control | None:
        """What limits the rate."""
        return self.run.control

    def note_searched(self, position: int) -> None:
        """Note how far the search for areas is."""
        self._count(position)

    def note_copied(self, copied: Copied) -> None:
        """Note what is copied."""
        self._copied = copied
        self._count(copied.position)

    def _count(self, position: int) -> None:
        self._done = max(self._done, position)
        copied = self._copied
        self._tally.count(self._done, data=copied.written, read=copied.read, written=copied.written)

    def finish(self) -> float:
        """Report that all is done; return the seconds that it took."""
        self._tally.finish()
        return time.monotonic() - self._started
