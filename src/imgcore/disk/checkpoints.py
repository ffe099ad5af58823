"""Checkpoints: what of a target is durable, written down beside it while a job runs."""

from __future__ import annotations

import time
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING, Any, Final

from imgcore.errors import ImgcoreError
from imgcore.files.resume_journal import MALFORMED
from imgcore.limits import GIB
from imgcore.streams.helpers import started

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Self

    from imgcore.files.record_file import Record
    from imgcore.files.resume_journal import ResumeJournal
    from imgcore.files.target import Target

# A checkpoint is due after so many bytes of data, or so much time: of a short job a
# moment, of a long one a share of its time so far.  More is not lost by a break.
_DUE_NBYTES: Final = 1 * GIB
_DUE_SECONDS: Final = 0.1
_DUE_SHARE: Final = 0.02
_MAX_DUE_SECONDS: Final = 10.0
# Where it takes long to save one, it is so many times longer until the next one.
_DUE_PAUSES: Final = 4


class Checkpoints:
    """Writes the checkpoints of a job; a context manager.

    A thread makes the target durable and adds to the journal, while the job goes on.
    Leaving the ``with`` block waits for it.

    Parameters
    ----------
    journal : ResumeJournal
        Open, and closed by the caller.
    verifies_all : bool
        Whether a job that goes on verifies all of the target, or the last checkpoint.

    Attributes
    ----------
    resumes : bool
        Whether an earlier run has left a checkpoint.
    kept_nbytes : int
        Bytes of the target that an earlier run has left; 0 without one.
    """

    def __init__(self, journal: ResumeJournal, *, verifies_all: bool) -> None:
        self._journal = journal
        self._verifies_all = verifies_all
        self._running: _Saving | None = None
        self._started_at = self._saved_at = time.monotonic()
        self._last_seconds = 0.0
        self.resumes: bool = journal.n_checkpoints > 0
        self.kept_nbytes: int = journal.kept_nbytes

    @property
    def path(self) -> str:
        """The journal's path."""
        return self._journal.path

    @property
    def seed(self) -> bytes:
        """What random identities are drawn from."""
        return bytes.fromhex(self._journal.begin_head["seed"])

    @property
    def began(self) -> int:
        """When the first run began, in seconds since 1970."""
        return int(self._journal.begin_head["began"])

    def saved(self, part: int = 0) -> Iterator[Record]:
        """Yield the checkpoints of a part of the job, in order."""
        return self._journal.checkpoints(part)

    def last(self, part: int = 0) -> Record | None:
        """Return the last checkpoint of a part of the job."""
        return next(self._journal.checkpoints(part, only_last=True), None)

    def to_verify(self, part: int = 0) -> Iterator[Record]:
        """Yield the checkpoints of a part that a job which goes on verifies."""
        return self._journal.checkpoints(part, only_last=not self._verifies_all)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn what a record that contradicts itself leads to into one line."""
        try:
            yield
        except MALFORMED:
            raise ImgcoreError(
                "the journal is damaged: a checkpoint contradicts itself", path=self.path
            ) from None

    def is_due(self, nbytes: int) -> bool:
        """Tell whether to save a checkpoint.

        Parameters
        ----------
        nbytes : int
            Bytes of data since the last one.
        """
        if self._running is not None:
            if not self._running.is_done:
                return False
            self.finish()
        now = time.monotonic()
        seconds = _DUE_SECONDS + _DUE_SHARE * (now - self._started_at)
        seconds = min(max(seconds, _DUE_PAUSES * self._last_seconds), _MAX_DUE_SECONDS)
        return nbytes >= _DUE_NBYTES or now - self._saved_at >= seconds

    def save(
        self,
        target: Target | None,
        kept_nbytes: int,
        head: Mapping[str, Any],
        blobs: Sequence[bytes],
        part: int = 0,
    ) -> None:
        """Begin to save a checkpoint, once the one before is saved.

        Parameters
        ----------
        target : Target, optional
            What is written of it so far becomes durable first.  None: nothing of it is
            kept.
        kept_nbytes : int
            Bytes of its file with data that are complete.
        head, blobs
            The content of the record.
        part : int
            Of the job: what goes on separately.
        """
        self.finish()

        def write() -> None:
            if target is not None:
                target.datasync()
            self._journal.add(kept_nbytes, head, blobs, part)

        self._running = _Saving(write)
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Wait for the checkpoint that is being saved.

        Raises
        ------
        OSError
            It could not be saved.
        """
        running, self._running = self._running, None
        if running is not None:
            running.end()
            self._last_seconds = running.seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running is not None:
            self._running.wait()


class _Saving:
    """A checkpoint that a thread saves, or the caller if the system makes no thread.

    `Helpers` would do, but its futures take as long to load as a short job saves.
    ``seconds`` is how long it took.
    """

    seconds = 0.0

    def __init__(self, save: Callable[[], None]) -> None:
        self._save = save
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="imgcore-checkpoint", daemon=True)
        self._has_thread = started(self._thread)
        if not self._has_thread:
            self._run()

    def _run(self) -> None:
        began = time.monotonic()
        try:
            self._save()
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - began

    @property
    def is_done(self) -> bool:
        """Whether it is saved, or has failed."""
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until it is."""
        if self._has_thread:
            self._thread.join()

    def end(self) -> None:
        """Wait for it, and raise its error."""
        self.wait()
        if self._error is not None:
            raise self._error
