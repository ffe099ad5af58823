"""The folder of a target: all files of the target get their names, or none does."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import Final

from imgcore.errors import TargetError
from imgcore.files.attributes import keep_attributes
from imgcore.files.descriptors import (
    close,
    forks_held_back,
    give_up_in_children,
    named_errors,
    open_file,
)
from imgcore.files.identity import file_identity
from imgcore.files.locks import Lock, folder_lock, lock
from imgcore.files.renaming import rename_without_replacing
from imgcore.files.replacing import refuse_append_only, refuse_unreplaceable
from imgcore.files.space import require_space
from imgcore.files.target_file import TargetFile
from imgcore.files.temporary_names import (
    backup_name,
    new_token,
    partial_name,
    remove_stale,
    temporary_name,
    token_of,
)
from imgcore.log import log

# The folder cannot be synced at all, as on some network and FUSE file systems.
NO_SYNC_ERRORS: Final = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)

# The folder takes no new files.
_NO_CREATE_ERRORS: Final = (errno.EACCES, errno.EPERM, errno.EROFS)


class TargetFolder:
    """The open folder of a target, and the temporaries in it.

    Parameters
    ----------
    path : str
        The target's final name.
    force : bool
        Replace existing files.
    sync : bool
        Make each step durable.
    kept_nbytes : int, optional
        The files have fixed names until they get their final ones, and may be there
        already: so many of their first bytes are kept.
    """

    def __init__(
        self, path: str, *, force: bool, sync: bool, kept_nbytes: int | None = None
    ) -> None:
        self._path = path
        self._force = force
        self._sync = sync
        self._kept_nbytes = kept_nbytes
        # Temporary and final name of each file, in the order of creation.
        self._temporaries: dict[str, str] = {}
        self._files: list[TargetFile] = []
        # Backup and final name of each old file that was set aside.
        self._backups: list[tuple[str, str]] = []
        self._folder = os.path.dirname(path) or "."
        with forks_held_back():
            self._fd = _open_folder(self._folder)
            give_up_in_children(self._fd)

    def path_of(self, name: str) -> str:
        """Return the path of a name in the folder, for messages."""
        return os.path.join(os.path.dirname(self._path), name)

    def status(self, name: str) -> os.stat_result:
        """Return the status of a name, without following links."""
        with named_errors(self.path_of(name)):
            return os.stat(name, dir_fd=self._fd, follow_symlinks=False)

    def require_space(self, nbytes: int, path: str) -> None:
        """Raise OSError(ENOSPC) if there are fewer than ``nbytes`` left for a file."""
        require_space(self._fd, nbytes, path)

    def create(self, name: str, old: os.stat_result | None, advice: str = "") -> TargetFile:
        """Create a temporary, under a unique name, for a final name.

        It gets the attributes of the file ``old`` that it will replace, as far as the
        system permits that.  If the folder takes no new files, the error ends with
        ``advice``.
        """
        path = self.path_of(name)
        refuse_append_only(self._fd, self._folder, path)
        if old is None:
            remove_stale(self._fd, self._folder, name)
            return self._create_locked(name, 0o666, advice)
        old_fd = self._open_old(name)
        try:
            with named_errors(path):
                refuse_unreplaceable(old_fd, old, self._fd, path, advice)
            remove_stale(self._fd, self._folder, name)
            file = self._create_locked(name, old.st_mode & 0o777, advice)
            with named_errors(path):
                keep_attributes(old_fd, old, file)
            return file
        finally:
            if old_fd >= 0:
                close(old_fd)

    def _open_old(self, name: str) -> int:
        """Open a file that will be replaced; -1 if it is gone or cannot be read."""
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            return open_file(name, flags, folder_fd=self._fd)
        except OSError:
            return -1

    def _create_locked(self, name: str, mode: int, advice: str) -> TargetFile:
        path = self.path_of(name)
        if self._kept_nbytes is not None:
            return self._open_partial(name, path, mode, advice, self._kept_nbytes)
        while True:
            temporary = temporary_name(name, new_token())
            # Recorded first, so that an interruption at any point leaves no file.
            self._temporaries[temporary] = name
            with forks_held_back():
                try:
                    fd = self._create_new(temporary, path, mode, advice)
                except FileExistsError:
                    del self._temporaries[temporary]
                    continue
                except OSError:
                    del self._temporaries[temporary]
                    raise
                file = TargetFile(fd, path)
                self._files.append(file)
            # Otherwise another process took it for an abandoned one before.
            if lock(file.fd) is not Lock.HELD_BY_OTHER and file.status().st_nlink:
                return file
            self._files.remove(file)
            self.remove(temporary)
            file.close()

    def _open_partial(
        self, name: str, path: str, mode: int, advice: str, kept_nbytes: int
    ) -> TargetFile:
        """Open the file that an earlier run has left, or create it."""
        partial = partial_name(name)
        with forks_held_back():
            fd = self._create_new(partial, path, mode, advice, is_new=False)
            file = TargetFile(fd, path)
            self._files.append(file)
        if lock(fd) is Lock.HELD_BY_OTHER:
            raise TargetError("another run of this conversion is at work", path=path)
        status = file.status()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise TargetError(f"{partial} is no file of a conversion", path=path)
        self._temporaries[partial] = name
        file.keep(kept_nbytes)
        return file

    def _create_new(
        self, temporary: str, path: str, mode: int, advice: str, *, is_new: bool = True
    ) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | (os.O_EXCL if is_new else os.O_NONBLOCK)
        try:
            return open_file(temporary, flags, mode, folder_fd=self._fd, name=path)
        except OSError as error:
            if error.errno not in _NO_CREATE_ERRORS:
                raise
            text = f"{error.strerror}: its folder {self._folder} takes no new files"
            raise OSError(error.errno, text + advice, path) from error

    def inodes(self) -> dict[str, int]:
        """Return the inodes of the files by their final names."""
        files = zip(self._temporaries.values(), self._files, strict=True)
        return {name: file.status().st_ino for name, file in files}

    def give_names(self) -> None:
        """Rename all files; the last rename gives the main file its name.

        After an exception, `has_names` tells whether that was done nevertheless.
        """
        pairs = list(self._temporaries.items())
        pairs.sort(key=lambda pair: pair[1] == os.path.basename(self._path))
        if len(pairs) == 1:
            self._rename(*pairs[0])
        else:
            with folder_lock(self._fd, self._path):
                self._swap_in(pairs)

    @property
    def has_names(self) -> bool:
        """Whether the main file has its name, which it gets last."""
        return self._is_new(os.path.basename(self._path))

    def _rename(self, temporary: str, name: str) -> None:
        path = self.path_of(name)
        try:
            with named_errors(path):
                if self._force:
                    os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
                else:
                    rename_without_replacing(self._fd, temporary, name)
        except FileExistsError:
            raise TargetError("has appeared meanwhile; --force replaces it", path=path) from None

    def _swap_in(self, pairs: list[tuple[str, str]]) -> None:
        """Rename several files, the main one last; an error restores the old ones.

        The old main file is renamed to a backup first, so that it never exists beside a
        new companion.  Each step is durable before the next, so that
        `restore_interrupted` can undo what a crash leaves.
        """
        # The lock on the main temporary shows that the job of these backups is alive.
        is_partial = self._kept_nbytes is not None
        token = new_token() if is_partial else token_of(pairs[-1][0])
        try:
            if self._force:
                for _, name in reversed(pairs):
                    self._set_aside(name, backup_name(name, token))
            for temporary, name in pairs:
                if temporary != pairs[0][0]:
                    self.sync_names()
                self._rename(temporary, name)
        except BaseException:
            self._swap_back(pairs)
            raise

    def _set_aside(self, name: str, backup: str) -> None:
        # Recorded first: an interruption may come at any point.
        self._backups.append((backup, name))
        with contextlib.suppress(FileNotFoundError), named_errors(self.path_of(name)):
            os.rename(name, backup, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            self.sync_names()

    def _swap_back(self, pairs: list[tuple[str, str]]) -> None:
        # A job that goes on later finds its files under their temporary names.
        for temporary, name in reversed(pairs):
            if self._is_new(name):
                try:
                    os.rename(name, temporary, src_dir_fd=self._fd, dst_dir_fd=self._fd)
                except OSError:
                    self.remove(name)
        for backup, name in reversed(self._backups):
            with contextlib.suppress(OSError):
                os.rename(backup, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        self._backups.clear()

    def _is_new(self, name: str) -> bool:
        """Tell whether a name already refers to one of our new files."""
        try:
            identity = file_identity(self.status(name))
        except OSError:
            return False
        return identity in [file_identity(file.status()) for file in self._files]

    def sync_names(self) -> None:
        """Make the names so far durable, if the folder can be synced."""
        if self._sync:
            with named_errors(self._path):
                try:
                    os.fsync(self._fd)
                except OSError as error:
                    if error.errno not in NO_SYNC_ERRORS:
                        raise

    def sync(self) -> None:
        """Make the final names durable; warn if the folder cannot be synced."""
        if not self._sync or self._fd < 0:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            if error.errno is None:
                raise  # what a signal handler raises
            if error.errno not in NO_SYNC_ERRORS:
                text = f"{os.strerror(error.errno)} (syncing the folder; the file is complete)"
                raise OSError(error.errno, text, self._path) from error
            log.warning("%s: the folder cannot be synced: %s", self._folder, error.strerror)

    def remove(self, name: str) -> None:
        """Remove a file; ignore a failure."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._fd)
        self._temporaries.pop(name, None)

    def remove_backups(self) -> None:
        """Remove the old files that were set aside."""
        for backup, _ in self._backups:
            self.remove(backup)
        self._backups.clear()

    def remove_temporaries(self) -> None:
        """Remove the temporaries that do not have their final names yet."""
        for temporary in list(self._temporaries):
            self.remove(temporary)

    def close(self) -> None:
        """Close the folder and its files; more than once is allowed."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close(fd)


def _open_folder(folder: str) -> int:
    try:
        return open_file(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return open_file(folder, os.O_PATH | os.O_DIRECTORY)
