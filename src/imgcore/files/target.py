"""Files that are written: under a temporary name, then renamed when they are whole.

At every instant the final name is absent, the old file, or the complete new one.  Only a target
written in place (a block device, or on request an existing file) is exempt from that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING, Final

from imgcore.errors import TargetError
from imgcore.files.identity import Identity, describe_file_type, file_identity
from imgcore.files.locks import QEMU_DENIES_WRITING, QEMU_WRITES, is_locked_by_other
from imgcore.files.target_file import TargetFile, named_errors
from imgcore.files.temporary_names import (
    backup_name,
    folder_lock,
    lock,
    new_token,
    remove_stale,
    rename_without_replacing,
    restore_interrupted,
    temporary_name,
)
from imgcore.log import log
from imgcore.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from imgcore.files.byte_source import ByteSource

# A folder that cannot be synced at all, as on some network and FUSE file systems.
_NO_SYNC_ERRORS: Final = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)


def _refuse_in_use(fd: int, path: str) -> None:
    if is_locked_by_other(fd, QEMU_WRITES) or is_locked_by_other(fd, QEMU_DENIES_WRITING):
        raise TargetError("in use by another process (QEMU's image lock)", path=path)


class Target:
    """The place where an image is to appear, as a context manager.

    Leaving the ``with`` block without `commit` removes what was written.

    Parameters
    ----------
    path : str or path-like
        The final name.
    force : bool
        Replace an existing file (on success only).
    sync : bool
        Make everything durable in `commit`.
    in_place : bool
        Write straight into an existing regular file or block device; a block device is written
        in no other way.  A failure leaves such a target incomplete.

    Attributes
    ----------
    path : str
    in_place, is_block_device : bool
    identity : tuple of two ints, or None
        Of what has the final name now, links followed; for `imgcore.files.host_file.same_file`.

    Raises
    ------
    TargetError
        The name is taken, or no place for an image.
    OSError
        The folder is missing or cannot be written to; with the name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        force: bool = False,
        sync: bool = True,
        in_place: bool = False,
    ) -> None:
        self.path = os.fspath(path)
        self.force = force
        self.sync = sync
        folder, self._name = os.path.split(self.path)
        self._folder = folder or "."
        self._main: TargetFile | None = None
        # Temporary and final name of each file, companions in the order of their making.
        self._temporaries: dict[str, str] = {}
        self._companions: list[TargetFile] = []
        self._committed = False
        self._old: os.stat_result | None = None
        self.identity: Identity | None = None
        self._protected: dict[Identity | None, str] = {}
        self.is_block_device = False
        if self._name in ("", ".", "..") or self.path == "-":
            raise TargetError("is not the name of a file", path=self.path)
        if not in_place:
            restore_interrupted(self._folder, self._name)
        self._examine(in_place)
        self.in_place = in_place
        self._folder_fd = -1 if self.in_place else self._open_folder()

    def _examine(self, in_place: bool) -> None:
        """Look at what has the final name now, and refuse what cannot be a target."""
        try:
            link = os.lstat(self.path)
        except FileNotFoundError:
            if in_place:
                raise
            return
        try:
            status = os.stat(self.path)
        except OSError:
            status = link  # a dangling link, or a loop of links
        mode = status.st_mode
        self.is_block_device = stat.S_ISBLK(mode)
        if self.is_block_device:
            if not in_place:
                raise TargetError(
                    "is a block device: what is on it is overwritten only on request "
                    "(convert -n; in_place=True in Python)",
                    path=self.path,
                )
            self.identity = file_identity(status)
            return
        if stat.S_ISLNK(link.st_mode):
            if in_place or not self.force:
                hint = "" if in_place else "; --force replaces the link itself"
                raise TargetError(f"is a symbolic link, not written through{hint}", path=self.path)
        elif not stat.S_ISREG(mode):
            raise TargetError(
                f"is {describe_file_type(mode)}, not a regular file or a block device",
                path=self.path,
            )
        elif not in_place and not self.force:
            raise TargetError("exists already; --force replaces it", path=self.path)
        self.identity = file_identity(status)
        if stat.S_ISREG(link.st_mode):
            self._old = link

    def _open_folder(self) -> int:
        flags = os.O_DIRECTORY | os.O_CLOEXEC
        try:
            return os.open(self._folder, os.O_RDONLY | flags)
        except PermissionError:
            return os.open(self._folder, os.O_PATH | flags)

    def protect(self, sources: Iterable[ByteSource]) -> None:
        """Refuse to replace any of these files, which the conversion reads.

        Raises
        ------
        TargetError
            The target is one of them, by whatever name; `companion` raises it as well.
        """
        self._protected = {source.identity: source.path for source in sources}
        self._refuse_protected(self.identity, self.path)

    def _refuse_protected(self, identity: Identity | None, path: str) -> None:
        if identity in self._protected:
            source = self._protected[identity]
            raise TargetError(f"is read by this conversion ({source})", path=path)

    @property
    def main(self) -> TargetFile:
        """The file that gets the final name; made on first use."""
        if self._main is None:
            if self.in_place:
                self._main = TargetFile(self._open_in_place(), self.path)
            else:
                self._main = self._create(self._name, self.path, self._old)
        return self._main

    def companion(self, name: str) -> TargetFile:
        """Make a second file beside the target, renamed just before it.

        Parameters
        ----------
        name : str
            Its final name, without a folder.  An existing file of that name is refused
            without ``force``.

        Raises
        ------
        TargetError
            The name is taken, or the target is written in place.
        """
        path = os.path.join(os.path.dirname(self.path), name)
        if self.in_place:
            raise TargetError("a target of several files cannot be written in place", path=path)
        if not name or "/" in name or name in (".", "..", self._name):
            raise TargetError("is no name for a second file", path=path)
        restore_interrupted(self._folder, name)
        old = None
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(name, dir_fd=self._folder_fd, follow_symlinks=False)
            self._refuse_protected(file_identity(status), path)
            if not self.force:
                raise TargetError("exists already; --force replaces it", path=path)
            if stat.S_ISREG(status.st_mode):
                old = status
            elif not stat.S_ISLNK(status.st_mode):
                kind = describe_file_type(status.st_mode)
                raise TargetError(f"is {kind}, not a regular file", path=path)
        file = self._create(name, path, old)
        self._companions.append(file)
        return file

    def _open_in_place(self) -> int:
        # O_EXCL on a block device: refused by the kernel while it is mounted.
        exclusive = os.O_EXCL if self.is_block_device else os.O_NOFOLLOW
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | exclusive)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            text = "The block device is in use or mounted"
            raise OSError(errno.EBUSY, text, self.path) from error
        try:
            if file_identity(os.fstat(fd)) != self.identity:
                raise TargetError("was replaced while it was opened", path=self.path)
            _refuse_in_use(fd, self.path)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _create(self, name: str, path: str, old: os.stat_result | None) -> TargetFile:
        """Make a temporary beside the target, of a name that nobody else has.

        It has the mode of the file that it is to replace, and its owner as far as we may.
        """
        if old is not None:
            self._refuse_replaced_in_use(name, path)
        remove_stale(self._folder_fd, name)
        mode = 0o666 if old is None else old.st_mode & 0o777
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            temporary = temporary_name(name, new_token())
            # Noted first, so that an interruption at any point leaves nothing.
            self._temporaries[temporary] = name
            try:
                fd = os.open(temporary, flags, mode, dir_fd=self._folder_fd)
            except OSError as error:
                del self._temporaries[temporary]
                if error.errno == errno.EEXIST:
                    continue
                raise OSError(error.errno, os.strerror(error.errno or 0), path) from error
            file = TargetFile(fd, path)
            try:
                if old is not None:
                    with contextlib.suppress(OSError):
                        os.fchown(fd, old.st_uid, old.st_gid)
                    os.fchmod(fd, mode)
                if lock(fd) and os.fstat(fd).st_nlink:
                    return file
            except BaseException:
                file.close()
                raise
            # Taken for a stale one before it was locked.
            self._remove(temporary)
            file.close()

    def _refuse_replaced_in_use(self, name: str, path: str) -> None:
        """Refuse to replace what a virtual machine would go on writing to, without a name."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=self._folder_fd)
        except OSError:
            return  # gone meanwhile, or not ours to read
        try:
            _refuse_in_use(fd, path)
        finally:
            os.close(fd)

    def require_capacity(self, nbytes: int) -> None:
        """Refuse to write in place into what is smaller than ``nbytes``."""
        if self.in_place and self.main.nbytes < nbytes:
            raise TargetError(
                f"holds {self.main.nbytes} bytes, fewer than the {nbytes} of the disk",
                path=self.path,
            )

    def require_space(self, nbytes: int) -> None:
        """Raise OSError(ENOSPC) if the file system has no ``nbytes`` bytes left.

        A target in place has its space already.
        """
        if self.in_place:
            return
        try:
            status = os.fstatvfs(self._folder_fd)
        except OSError:
            return  # writing will tell
        n_blocks = status.f_bfree if os.geteuid() == 0 else status.f_bavail
        free = n_blocks * status.f_frsize
        if status.f_blocks and free < nbytes:
            text = f"{os.strerror(errno.ENOSPC)}: {format_size(nbytes)} needed, "
            raise OSError(errno.ENOSPC, text + f"{format_size(free)} free", self.path)

    def commit(self) -> None:
        """Give the files their final names, durably unless ``sync=False``.

        Raises
        ------
        OSError
            Data could not be written after all, or the name could not be given; the former
            target is then untouched and nothing else is left.
        TargetError
            A file has appeared under the name meanwhile, and ``force`` was not given.
        """
        if self._committed:
            raise RuntimeError(f"{self.path}: committed twice")
        for file in (*self._companions, self.main):
            if self.sync:
                file.sync()
            file.check_written()
        backups = [] if self.in_place else self._give_names()
        self._committed = True
        self._close()
        try:
            # What was set aside goes when the new names are durable, not before.
            if not self.in_place:
                self._sync_folder()
        finally:
            for backup in backups:
                self._remove(backup)
            self._close_folder()

    def _give_names(self) -> list[str]:
        """Rename all files; return the names of old ones that were set aside."""
        pairs = list(self._temporaries.items())
        pairs.sort(key=lambda pair: pair[1] == self._name)
        if len(pairs) == 1:
            self._rename(*pairs[0])
            return []
        with folder_lock(self._folder_fd, self.path):
            return self._swap_in(pairs)

    def _rename(self, temporary: str, name: str) -> None:
        path = os.path.join(os.path.dirname(self.path), name)
        try:
            if self.force:
                fd = self._folder_fd
                os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
            else:
                rename_without_replacing(self._folder_fd, temporary, name)
        except FileExistsError:
            raise TargetError("has appeared meanwhile; --force replaces it", path=path) from None
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), path) from error

    def _swap_in(self, pairs: list[tuple[str, str]]) -> list[str]:
        """Rename several files, the main one last; an error brings the old ones back.

        The old main file goes out of the way first, so that it never stands beside a new
        companion.  Each step is durable before the next: what a crash leaves is then what
        `restore_interrupted` knows.
        """
        fd = self._folder_fd
        token = new_token()
        backups: list[tuple[str, str]] = []
        try:
            if self.force:
                for _, name in reversed(pairs):
                    # Noted first: an interruption comes before or after any of this.
                    backups.append((backup_name(name, token), name))
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(name, backups[-1][0], src_dir_fd=fd, dst_dir_fd=fd)
                        self._sync_names()
            for temporary, name in pairs:
                if temporary != pairs[0][0]:
                    self._sync_names()
                self._rename(temporary, name)
        except BaseException:
            for _, name in reversed(pairs):
                if self._is_new(name):
                    self._remove(name)
            for backup, name in reversed(backups):
                with contextlib.suppress(OSError):
                    os.rename(backup, name, src_dir_fd=fd, dst_dir_fd=fd)
            raise
        return [backup for backup, _ in backups]

    def _is_new(self, name: str) -> bool:
        """Tell whether a name is that of a file of ours already."""
        try:
            status = os.stat(name, dir_fd=self._folder_fd, follow_symlinks=False)
        except OSError:
            return False
        files = (self.main, *self._companions)
        return file_identity(status) in [file_identity(os.fstat(file.fd)) for file in files]

    def _sync_names(self) -> None:
        """Make the names so far durable, where the folder can do that at all."""
        if self.sync:
            with named_errors(self.path):
                try:
                    os.fsync(self._folder_fd)
                except OSError as error:
                    if error.errno not in _NO_SYNC_ERRORS:
                        raise

    def _sync_folder(self) -> None:
        if not self.sync:
            return
        try:
            os.fsync(self._folder_fd)
        except OSError as error:
            if error.errno not in _NO_SYNC_ERRORS:
                text = f"{os.strerror(error.errno or 0)} (syncing the folder; the file is complete)"
                raise OSError(error.errno, text, self.path) from error
            log.warning("%s: the folder cannot be synced: %s", self._folder, error.strerror)

    def abort(self) -> None:
        """Remove what was written; a target in place stays as it is by now.

        After `commit`, or a second time, it does nothing.
        """
        if not self._committed:
            for temporary in list(self._temporaries):
                self._remove(temporary)
        self._close()
        self._close_folder()

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._folder_fd)
        self._temporaries.pop(name, None)

    def _close(self) -> None:
        for file in (*self._companions, self._main):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def _close_folder(self) -> None:
        fd, self._folder_fd = self._folder_fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        try:
            _ = self.main
        except BaseException:
            self.abort()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
