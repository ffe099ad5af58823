"""Targets: files written under a temporary name and renamed when they are complete.

The final name is always absent, the old file, or the complete new one.  Targets
written in place (a block device, or on request an existing file) are the exception.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from imgcore.errors import ImgcoreError, TargetError
from imgcore.files.block_devices import below, refuse_read_only
from imgcore.files.commit_point import CommitCounter, report_late, uninterrupted
from imgcore.files.descriptors import forks_held_back, named_errors, open_file
from imgcore.files.identity import Identity, file_identity
from imgcore.files.locks import refuse_image_in_use
from imgcore.files.page_cache import CacheMode
from imgcore.files.special_files import refuse_absent_device, refuse_special
from imgcore.files.target_file import TargetFile
from imgcore.files.target_folder import TargetFolder
from imgcore.files.temporary_names import restore_interrupted
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from imgcore.files.byte_source import ByteSource
    from imgcore.files.host_file import HostFile
    from imgcore.files.resume_journal import ResumeJournal


class Target:
    """The files of an image that is being written; a context manager.

    Leaving the ``with`` block without `commit` removes them.

    Parameters
    ----------
    path : str or os.PathLike
        The final name.
    force : bool
        Replace an existing file (on success only).
    sync : bool
        Make everything durable in `commit`.
    in_place : bool
        Write directly into an existing regular file or block device; a block device can
        only be written in place.  A failure leaves such a target incomplete.
    in_place_nbytes : int, optional
        The size of a file that could be written in place.  Where the folder takes no
        new files, the error then advises that.
    journal : ResumeJournal, optional
        What is durable of the files outlives a failure once it has a checkpoint;
        `commit` removes it.
    cache : CacheMode
        What of the files stays in the page cache.
    job_nbytes : int
        What the job reads, about, which the mode may depend on.

    Attributes
    ----------
    path : str
    in_place, is_block_device : bool
    is_committed : bool
        Whether `commit` has passed the commit point.
    late_error : OSError, ImgcoreError or None
        The error after the commit point: the folder cannot be synced, or a receipt does
        not get its name.
    identity : tuple of two ints, or None
        The identity of the file that has the final name now, links followed; see
        `imgcore.files.identity.same_file`.

    Raises
    ------
    TargetError
        The name is taken, or cannot be an image's.
    OSError
        The folder is missing or cannot be written to.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        force: bool = False,
        sync: bool = True,
        in_place: bool = False,
        in_place_nbytes: int | None = None,
        journal: ResumeJournal | None = None,
        cache: CacheMode = CacheMode.KEEP,
        job_nbytes: int = 0,
    ) -> None:
        self.path: str = os.fspath(path)
        self.force = force
        self.sync = sync
        folder, self._name = os.path.split(self.path)
        self._main: TargetFile | None = None
        self._companions: list[TargetFile] = []
        self._in_place_nbytes = in_place_nbytes
        self._journal = journal
        self._cache = cache
        self._job_nbytes = job_nbytes
        self.is_committed: bool = False
        self.late_error: OSError | ImgcoreError | None = None
        self._is_prepared = False
        self._has_durable_names = False
        self._old: os.stat_result | None = None
        self.identity: Identity | None = None
        self._protected: dict[Identity | None, str] = {}
        self.is_block_device: bool = False
        if self._name in ("", ".", "..") or self.path == "-":
            raise TargetError("is not the name of a file", path=self.path)
        if not in_place:
            restore_interrupted(folder or ".", self._name)
        self._examine(in_place)
        self.in_place = in_place
        # A target in place is neither created nor renamed.
        self._folder: TargetFolder | None = None
        if not in_place:
            kept_nbytes = None if journal is None else journal.kept_nbytes
            self._folder = TargetFolder(self.path, force=force, sync=sync, kept_nbytes=kept_nbytes)

    def _examine(self, in_place: bool) -> None:
        """Examine the file that has the final name now, and reject unsuitable ones."""
        try:
            link = os.lstat(self.path)
        except FileNotFoundError:
            if in_place:
                raise
            refuse_absent_device(self.path)
            return
        end = _status_of_end(self.path)
        self.is_block_device = end is not None and stat.S_ISBLK(end.st_mode)
        if end is not None and self.is_block_device:
            if not in_place:
                raise TargetError(
                    "is a block device: what is on it is overwritten only on request "
                    "(convert -n; in_place=True in Python)",
                    path=self.path,
                )
            self.identity = file_identity(end)
            return
        refuse_special(self.path, link, end)
        if stat.S_ISLNK(link.st_mode):
            if in_place or not self.force:
                where = "" if end is not None else f" to {os.readlink(self.path)}, which is missing"
                hint = "" if in_place else "; --force replaces the link itself"
                raise TargetError(
                    f"is a symbolic link{where}, not written through{hint}", path=self.path
                )
        elif not in_place and not self.force:
            raise TargetError("exists already; --force replaces it", path=self.path)
        self.identity = file_identity(end or link)
        if stat.S_ISREG(link.st_mode):
            self._old = link

    def protect(self, sources: Iterable[ByteSource]) -> None:
        """Refuse to replace any of these files, which the conversion reads.

        Raises
        ------
        TargetError
            The target is one of them, under any name, or one is a part of the other: a
            loop device and its file, a disk and its partition.  `companion` raises it
            as well.
        """
        self._protected = {source.identity: source.path for source in sources}
        for identity in (self.identity, *(below(self.identity) if self.identity else ())):
            self._refuse_protected(identity, self.path)
        for source, path in list(self._protected.items()):
            if source is not None:
                self._protected |= dict.fromkeys(below(source), path)
        self._refuse_protected(self.identity, self.path)

    def _refuse_protected(self, identity: Identity | None, path: str) -> None:
        if identity in self._protected:
            source = self._protected[identity]
            raise TargetError(f"is read by this conversion ({source})", path=path)

    @property
    def main(self) -> TargetFile:
        """The file that gets the final name; created on first use."""
        if self._main is None:
            if self._folder is None:
                self._main = self._open_in_place()
                self._main.reads_as_zeros = False
                if self._journal is not None:
                    self._main.kept_nbytes = self._journal.kept_nbytes
            else:
                advice = ""
                if self._would_fit_in_place():
                    advice = "; -n (in_place=True) writes into the existing file"
                self._main = self._folder.create(self._name, self._old, advice)
            self._use_cache(self._main)
        return self._main

    def _use_cache(self, file: TargetFile) -> None:
        if not file.use_cache(self._cache, self._job_nbytes):
            self._cache = CacheMode.DROP  # of the other files as well: one warning is enough

    def _would_fit_in_place(self) -> bool:
        return (
            self._in_place_nbytes is not None
            and self._old is not None
            and self._old.st_size >= self._in_place_nbytes
            and os.access(self.path, os.R_OK | os.W_OK, effective_ids=True)
        )

    def companion(self, name: str) -> TargetFile:
        """Create a second file beside the target, renamed just before it.

        Parameters
        ----------
        name : str
            Its final name, without a folder.  An existing file of that name is replaced
            only with ``force``.

        Raises
        ------
        TargetError
            The name is taken, or the target is written in place.
        """
        path = os.path.join(os.path.dirname(self.path), name)
        if self._folder is None:
            raise TargetError("a target of several files cannot be written in place", path=path)
        if not name or "/" in name or name in (".", "..", self._name):
            raise TargetError("is not a valid name for a second file", path=path)
        if self._journal is not None:
            self._journal.note_file(name)
        restore_interrupted(os.path.dirname(self.path) or ".", name)
        file = self._folder.create(name, self._examine_companion(self._folder, name, path))
        self._companions.append(file)
        self._use_cache(file)
        return file

    def _examine_companion(
        self, folder: TargetFolder, name: str, path: str
    ) -> os.stat_result | None:
        """Return the status of the file that a companion replaces, None without one."""
        try:
            status = folder.status(name)
        except FileNotFoundError:
            return None
        self._refuse_protected(file_identity(status), path)
        refuse_special(path, status, _status_of_end(path))
        if not self.force:
            raise TargetError("exists already; --force replaces it", path=path)
        return status if stat.S_ISREG(status.st_mode) else None

    def _open_in_place(self) -> TargetFile:
        # O_EXCL: the kernel refuses to open a block device that is mounted.
        exclusive = os.O_EXCL if self.is_block_device else os.O_NOFOLLOW
        try:
            with forks_held_back():
                fd = open_file(self.path, os.O_RDWR | os.O_NOCTTY | exclusive)
                file = TargetFile(fd, self.path)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            text = "The block device is in use or mounted"
            raise OSError(errno.EBUSY, text, self.path) from error
        try:
            if file_identity(file.status()) != self.identity:
                raise TargetError("was replaced while it was opened", path=self.path)
            if self.is_block_device:
                with named_errors(self.path):
                    refuse_read_only(file.fd, self.path)
            refuse_image_in_use(file.fd, self.path)
        except BaseException:
            file.close()
            raise
        return file

    def require_capacity(self, nbytes: int) -> None:
        """Raise TargetError if a target in place is smaller than ``nbytes``."""
        if self.in_place and self.main.nbytes < nbytes:
            raise TargetError(
                f"holds {self.main.nbytes} bytes, fewer than the {nbytes} of the disk",
                path=self.path,
            )

    def require_space(self, nbytes: int) -> None:
        """Raise OSError(ENOSPC) if the file system has fewer than ``nbytes`` left.

        A target in place already has its space.
        """
        if self._folder is not None:
            if self._journal is not None:
                files = (*self._companions, self.main)
                nbytes -= sum(file.allocated_nbytes for file in files)
            self._folder.require_space(max(nbytes, 0), self.path)

    def prepare(self) -> None:
        """Finish the files, durably unless ``sync=False``; only names are missing then.

        Raises
        ------
        OSError
            Data could not be written.
        """
        for file in (*self._companions, self.main):
            if self.sync:
                file.sync()
            file.check_written()
        self._is_prepared = True

    def reopened(self, name: str) -> list[HostFile]:
        """Return the files open for reading, the main one first; `prepare` has ended.

        The main file is called ``name``; the others have their absolute paths, under
        which images refer to them.  What the page cache has of them is dropped.  The
        caller closes them.
        """
        files: list[HostFile] = []
        try:
            for file in (self.main, *self._companions):
                file.drop_cached()
                path = name if file is self.main else os.path.abspath(file.path)
                files.append(file.reopened(path))
        except BaseException:
            for opened in files:
                opened.close()
            raise
        return files

    def datasync(self) -> None:
        """Make the content so far of all files durable, and their present names."""
        for file in self.written():
            file.datasync()
        if self._folder is not None and not self._has_durable_names:
            self._folder.sync_names()
            self._has_durable_names = True

    def written(self) -> list[TargetFile]:
        """Return the files, the main one first; their paths are the final names."""
        return [self.main, *self._companions]

    def commit(self) -> None:
        """Give the files their final names, durably unless ``sync=False``.

        Once the main file has its name the target is committed.  Exceptions that a
        signal raises afterwards are logged.

        Raises
        ------
        OSError
            Data could not be written, or a file could not be renamed.  The old target
            is then unchanged, and the new files are removed.
        TargetError
            A file has appeared under the name meanwhile, and ``force`` is False.
        """
        if self.is_committed:
            raise RuntimeError(f"{self.path}: committed twice")
        if not self._is_prepared:
            self.prepare()
        try:
            if self._folder is not None:
                if self._journal is not None and self._journal.n_checkpoints:
                    self._journal.note_names(self._folder.inodes())
                self._folder.give_names()
        except BaseException as error:
            # The rename may be done although it was interrupted, or although a server
            # answered a repeated request with an error.
            if self._folder is None or not self._folder.has_names:
                raise
            self.is_committed = True
            report_late(self.path, error)
            self._folder.remove_temporaries()
        self.is_committed = True
        CommitCounter.count += 1
        self.conclude()
        if self.late_error is not None:
            raise self.late_error

    def conclude(self) -> None:
        """Do what follows the commit point, or what is left to do of it."""
        if self._folder is not None:
            # Old files are removed only when the new names are durable.
            error = uninterrupted(self.path, self._folder.sync)
            self.late_error = self.late_error or error
            uninterrupted(self.path, self._folder.remove_backups)
        if self._journal is not None and not self._journal.is_removed:
            uninterrupted(self.path, self._journal.remove)
        uninterrupted(self.path, self._close)

    def abort(self) -> None:
        """Remove the files written, unless a journal has a checkpoint of them.

        A target in place stays as it is now.
        After `commit`, or when called again, it removes nothing.
        """
        if self.is_committed:
            self.conclude()
            return
        is_kept = self._journal is not None and self._journal.n_checkpoints > 0
        if is_kept:
            log.warning(
                "%s: what is done of it is kept for the same command, until imgcore jobs --remove "
                "gives it up",
                self.path,
            )
        elif self._folder is not None:
            self._folder.remove_temporaries()
        self._close()

    def _close(self) -> None:
        if self._folder is not None:
            self._folder.close()
        elif self._main is not None:
            with contextlib.suppress(OSError):
                self._main.close()

    def __enter__(self) -> Self:
        try:
            _ = self.main
        except BaseException:
            self.abort()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


def _status_of_end(path: str) -> os.stat_result | None:
    """Return the status of what a name leads to, None if that does not exist."""
    try:
        return os.stat(path)
    except OSError:
        return None  # a dangling link, or a loop of links
