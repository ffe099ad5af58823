"""An image that changes its format in its own file, so that no crash can lose it.

Beside the image lies a journal (`imgcore.files.journal`) with up to four records:

1. ``begin``: the file before, and the bytes that will be overwritten.  Then the new
   image is appended; all of the old one stays.
2. ``armed``: the bytes that overwrite them.  From here on the new image is sure to
   come: what a crash interrupts is done again.
3. ``done``: the new image is in its place.  Then files get their names.
4. ``undoing``: from here on the old image is sure to come.

Each record is durable before the next step is taken.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore.errors import ImgcoreError, LimitExceededError, TargetError
from imgcore.files.commit_point import CommitCounter, uninterrupted
from imgcore.files.descriptors import named_errors
from imgcore.files.folder import Folder
from imgcore.files.identity import Identity, file_identity, file_system_magic
from imgcore.files.in_place_job import Job, SideFile, find_journal, open_alone, open_job
from imgcore.files.journal import SUFFIX, Journal, temporary_of
from imgcore.files.locks import end_lease, lease
from imgcore.files.ranges import Range, joined
from imgcore.files.space import punch, require_space, reserve
from imgcore.files.staged_file import StagedFile
from imgcore.limits import MAX_OVERWRITTEN_NBYTES, MAX_SIDE_FILES_NBYTES
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Self

    from imgcore.files.host_file import HostFile

    IsWhole = Callable[[HostFile, Mapping[str, Any]], bool]

# Linux include/uapi/linux/magic.h: FAT and exFAT number inodes anew at each mount.
_WITHOUT_INODES: Final = frozenset({0x4D44, 0x2011BAB0})


class Recovered(NamedTuple):
    """How an interrupted conversion ended.

    Attributes
    ----------
    state : {"old", "new"}
        Which image the file is now.
    path : str
        Its name now.
    job : mapping
        What the caller of `InPlace.start` had put in.
    """

    state: str
    path: str
    job: Mapping[str, Any]


def recover(path: str | os.PathLike[str], is_whole: IsWhole = lambda *_: True) -> Recovered | None:
    """Complete or undo a conversion that was interrupted.

    Parameters
    ----------
    path : str or os.PathLike
        The image.
    is_whole : callable
        Takes the old image's file, only as long as it was before, and what the caller
        of `InPlace.start` had put in.  Tells whether that is all of the image: it may
        have been used, and have grown, since the interruption.

    Returns
    -------
    Recovered or None
        None if there is no journal.  A conversion that is complete, and can be undone,
        counts as recovered to the new image.

    Raises
    ------
    ImgcoreError
        The journal is damaged, of another file or version, or the image was changed.
    TargetError
        The image is in use.
    """
    job = open_job(path)
    if job is None:
        return None
    with job:
        _require_fit(job)
        if job.is_sure():
            job.complete()
            return Recovered("new", job.path, job.begin.job)
        _go_back(job, is_whole)
        return Recovered("old", job.path, job.begin.job)


def _require_fit(job: Job) -> None:
    """Raise ImgcoreError if the interrupted conversion has left another file."""
    if job.has("done") or job.has("undoing"):
        return
    if not (job.is_between() if job.has("armed") else job.is_as_before()):
        raise ImgcoreError(
            f"is not as the interrupted conversion left it, so its journal {job.journal.path} "
            "is damaged, or another program has written to it since; the old image had "
            f"{job.begin.size} bytes",
            path=job.path,
        )


def _go_back(job: Job, is_whole: IsWhole) -> None:
    keep_end = False
    # A small file that goes with it has the tables, if there are any.
    if not (job.has("undoing") or job.begin.removed) and job.is_as_before():
        with job.old_file() as file:
            keep_end = not is_whole(file, job.begin.job)
    if keep_end:
        log.warning(
            "%s: was written to since its conversion was interrupted: nothing is cut off", job.path
        )
    job.go_back(keep_end=keep_end)


def described(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return what the caller of `InPlace.start` had put in for an image's conversion.

    Raises
    ------
    ImgcoreError
        There is no journal.
    TargetError, OSError
        As for `recover`.
    """
    with _require_job(path) as job:
        return job.begin.job


def undo(path: str | os.PathLike[str], is_whole: IsWhole = lambda *_: True) -> str:
    """Restore the old image, byte for byte, and return its path.

    ``is_whole`` is as for `recover`.

    Raises
    ------
    ImgcoreError
        There is no journal, or the new image was written to.
    TargetError, OSError
        As for `recover`.
    """
    with _require_job(path) as job:
        if job.has("done") and not job.has("undoing"):
            changed = job.change_since()
            if changed is not None:
                raise ImgcoreError(
                    f"was written to since it was converted (its {changed} changed): "
                    "the old image cannot be restored",
                    path=job.path,
                )
        _require_fit(job)
        _go_back(job, is_whole)
        return job.path


def finish(path: str | os.PathLike[str], keep: Iterable[Range] | None = None) -> str:
    """Remove the journal of a conversion, which then cannot be undone.

    Parameters
    ----------
    path : str or os.PathLike
        The new image.
    keep : iterable of (offset, length), optional
        The ranges of the file that hold data of the disk.  What neither they nor the
        new tables use of the old file is given back, unless the image was written to
        since its conversion.

    Returns
    -------
    str
        The image's path.
    """
    with _require_job(path) as job:
        if not job.has("done") or job.has("undoing"):
            raise ImgcoreError("its conversion was interrupted and is not complete", path=job.path)
        job.complete()
        free: list[Range] = []
        if keep is not None:
            changed = job.change_since()
            if changed is None:
                free = job.unreferenced(keep)
            else:
                log.warning(
                    "%s: was written to since it was converted (its %s changed): "
                    "unreferenced blocks keep their space",
                    job.path,
                    changed,
                )
        # Nothing can be undone any more before the first block is gone.
        job.journal.remove()
        with named_errors(job.path):
            for offset, length in free:
                if not punch(job.file.fd, offset, length):
                    break
        return job.path


def _require_job(path: str | os.PathLike[str]) -> Job:
    job = open_job(path)
    if job is None:
        raise ImgcoreError(
            f"has no journal ({os.path.basename(os.fspath(path))}{SUFFIX})", path=os.fspath(path)
        )
    return job


class InPlace:
    """An image that becomes one of another format in its own file.

    A context manager; leaving it without `commit` restores the old image.

    Parameters
    ----------
    path : str or os.PathLike
        The image.  Readers of it must be closed before `commit`.

    Attributes
    ----------
    path : str
        Its name now; `commit` may change it.
    nbytes : int
        Its size before.
    identity : tuple of two ints
        The identity of the file; see `imgcore.files.identity`.
    is_committed : bool
        Whether the file is the new image.

    Raises
    ------
    TargetError, OSError
        It cannot be rewritten: it is a link, has other names, is read-only or in use.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: str = os.fspath(path)
        parent, self._name = os.path.split(self.path)
        self._job: Job | None = None
        self._staged: StagedFile | None = None
        self.is_committed: bool = False
        self._folder = Folder(parent)
        try:
            self._file = open_alone(self._folder, self._name)
            # Readers will open it next.
            end_lease(self._file.fd)
            self._status = self._file.status()
        except BaseException:
            self._folder.close()
            raise
        self.nbytes: int = self._status.st_size
        self.identity: Identity = file_identity(self._status)

    def require_space(self, nbytes: int) -> None:
        """Raise OSError(ENOSPC) if the file system has fewer than ``nbytes`` left."""
        require_space(self._file.fd, nbytes, self.path)

    def start(
        self,
        head: Mapping[str, Any],
        overwrites: Iterable[Range],
        *,
        name: str | None = None,
        created: Mapping[str, bytes] | None = None,
        removed: Sequence[str] = (),
        reserve_nbytes: int = 0,
    ) -> StagedFile:
        """Write the journal, and return the file that takes the new image.

        Parameters
        ----------
        head : mapping
            JSON that `recover` gives back: formats, options.
        overwrites : iterable of (offset, length)
            The parts of the file that may be overwritten or cut off.
        name : str, optional
            The image's new name in its folder.
        created : mapping of str to bytes, optional
            Names and contents of small files that the new image needs beside it.
        removed : sequence of str
            Names of small files that only the old image needs.
        reserve_nbytes : int
            Space that will be needed after the old end.

        Raises
        ------
        TargetError
            A name is taken, or the image was converted before and can still be undone.
        LimitExceededError
            More would be overwritten than the journal may hold.
        ImgcoreError
            The image was changed since it was opened.
        """
        self._require_unchanged()
        new_name = name or self._name
        mode = self._status.st_mode & 0o777
        new = [SideFile(*item, mode) for item in (created or {}).items()]
        old = [self._side_file(name) for name in removed]
        self._require_free([new_name, *(side.name for side in new)], [self._name, *removed])
        ranges = joined(
            (offset, min(length, self.nbytes - offset))
            for offset, length in overwrites
            if offset < self.nbytes
        )
        _require_limit(sum(n for _, n in ranges), MAX_OVERWRITTEN_NBYTES, "bytes", self.path)
        begin = {
            "inode": self._lasting_inode(),
            "device": self._status.st_dev,
            "size": self.nbytes,
            "mtime_ns": self._status.st_mtime_ns,
            "name": self._name,
            "new_name": new_name,
            "ranges": ranges,
            "created": [(side.name, len(side.content), side.mode) for side in new],
            "removed": [(side.name, len(side.content), side.mode) for side in old],
            "job": dict(head),
        }
        with named_errors(self.path):
            blobs = [os.pread(self._file.fd, length, offset) for offset, length in ranges]
        blobs += [side.content for side in (*new, *old)]
        journal = Journal.create(self._folder, self._name + SUFFIX, "begin", begin, blobs)
        self._job = Job(self._folder, journal, self._file, self._name)
        with named_errors(self.path):
            reserve(self._file.fd, self.nbytes, reserve_nbytes)
        self._staged = StagedFile(self._file, self.nbytes, ranges)
        return self._staged

    def commit(self) -> None:
        """Make the new image valid, durably, and give it its name.

        Raises
        ------
        TargetError
            Another program has the image open.
        OSError
            The system failed.  The old image is there, or the error says what is.
        """
        job, staged = self._job, self._staged
        if job is None or staged is None:
            raise RuntimeError(f"{self.path}: committed before it was started")
        lease(self._file.fd, self.path)
        try:
            job.arm(staged.change, staged.appended)
            CommitCounter.count += 1
            error = uninterrupted(self.path, job.complete)
        finally:
            end_lease(self._file.fd)
        if job.has("done"):
            self.is_committed = True
            self.path = job.path
        if error is not None:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> OSError:
        if not self.is_committed:
            return error
        text = f"{error.strerror} (the image is converted; only names are missing)"
        return OSError(error.errno, text, error.filename)

    @property
    def journal_path(self) -> str | None:
        """The journal's path; None before `start`."""
        return self._job.journal.path if self._job else None

    def _go_back(self) -> None:
        job = self._job
        if job is None or self.is_committed:
            return
        try:
            job.go_back()
        except OSError as error:
            text = f"{error.strerror} (while the old image was restored: its journal stays)"
            raise OSError(error.errno, text, error.filename) from error

    def _require_unchanged(self) -> None:
        now, before = self._file.status(), self._status
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise ImgcoreError("changed while it was read", path=self.path)

    def _require_free(self, names: Sequence[str], old_names: Sequence[str]) -> None:
        """Refuse new names that are taken, and an image that can still be undone."""
        journal = find_journal(self._folder, self._name)
        if journal is not None:
            journal.close()
            raise TargetError(
                f"its last conversion can still be undone ({journal.name}): imgcore rewrite "
                "--finish keeps the image as it is, --undo restores the one before",
                path=self.path,
            )
        # For the error of a name that is too long, which else came after the commit.
        self._folder.find(temporary_of(names[0] + SUFFIX))
        for name in (*names, names[0] + SUFFIX):
            if name not in old_names and self._folder.find(name) is not None:
                raise TargetError("exists already", path=self._folder.path_of(name))

    def _side_file(self, name: str) -> SideFile:
        status = self._folder.find(name)
        content = self._folder.read(name, MAX_SIDE_FILES_NBYTES) if status else None
        if status is None or content is None:
            path = self._folder.path_of(name)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        _require_limit(len(content), MAX_SIDE_FILES_NBYTES, "bytes of a file beside it", self.path)
        return SideFile(name, content, status.st_mode & 0o777)

    def _lasting_inode(self) -> int | None:
        magic = file_system_magic(self._file.fd)
        return None if magic in _WITHOUT_INODES else self._status.st_ino

    def close(self) -> None:
        """Restore the old image, unless `commit` has passed, and close the file."""
        try:
            self._go_back()
        finally:
            if self._staged is not None:
                self._staged.close()
            if self._job is not None:
                self._job.journal.close()
            self._file.close()
            self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _require_limit(nbytes: int, limit: int, what: str, path: str) -> None:
    if nbytes > limit:
        raise LimitExceededError(
            f"{nbytes} {what} would have to be kept in the journal: at most {limit}", path=path
        )
