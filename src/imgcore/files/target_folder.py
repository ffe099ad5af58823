"""The folder of a target: all files of the target get their names, or none does."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final

from imgcore.errors import TargetError
from imgcore.files.identity import file_identity
from imgcore.files.locks import folder_lock, lock, refuse_image_in_use
from imgcore.files.renaming import rename_without_replacing
from imgcore.files.target_file import TargetFile, named_errors
from imgcore.files.temporary_names import backup_name, new_token, remove_stale, temporary_name
from imgcore.log import log

# The folder cannot be synced at all, as on some network and FUSE file systems.
_NO_SYNC_ERRORS: Final = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES)


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
    """

    def __init__(self, path: str, *, force: bool, sync: bool) -> None:
        self._path = path
        self._force = force
        self._sync = sync
        # Temporary and final name of each file, in the order of creation.
        self._temporaries: dict[str, str] = {}
        self._files: list[TargetFile] = []
        self._fd = _open_folder(os.path.dirname(path) or ".")

    def path_of(self, name: str) -> str:
        """Return the path of a name in the folder, for messages."""
        return os.path.join(os.path.dirname(self._path), name)

    def status(self, name: str) -> os.stat_result:
        """Return the status of a name, without following links."""
        return os.stat(name, dir_fd=self._fd, follow_symlinks=False)

    def free_nbytes(self) -> int | None:
        """Return the bytes that this process may still write; None if not known."""
        try:
            status = os.fstatvfs(self._fd)
        except OSError:
            return None
        n_blocks = status.f_bfree if os.geteuid() == 0 else status.f_bavail
        return n_blocks * status.f_frsize if status.f_blocks else None

    def create(self, name: str, old: os.stat_result | None) -> TargetFile:
        """Create a temporary, under a unique name, for a final name.

        It gets the mode of the file ``old`` that it will replace, and its owner if the
        system permits that.
        """
        path = self.path_of(name)
        if old is not None:
            self._refuse_in_use(name, path)
        remove_stale(self._fd, name)
        mode = 0o666 if old is None else old.st_mode & 0o777
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            temporary = temporary_name(name, new_token())
            # Recorded first, so that an interruption at any point leaves no file.
            self._temporaries[temporary] = name
            try:
                fd = os.open(temporary, flags, mode, dir_fd=self._fd)
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
                    self._files.append(file)
                    return file
            except BaseException:
                file.close()
                raise
            # Another process took it for a stale one before it was locked.
            self.remove(temporary)
            file.close()

    def _refuse_in_use(self, name: str, path: str) -> None:
        """Refuse to replace an image to which a virtual machine would keep writing."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=self._fd)
        except OSError:
            return  # gone meanwhile, or not readable for us
        try:
            refuse_image_in_use(fd, path)
        finally:
            os.close(fd)

    def give_names(self) -> list[str]:
        """Rename all files, and return the names of backups of old ones."""
        pairs = list(self._temporaries.items())
        pairs.sort(key=lambda pair: pair[1] == os.path.basename(self._path))
        if len(pairs) == 1:
            self._rename(*pairs[0])
            return []
        with folder_lock(self._fd, self._path):
            return self._swap_in(pairs)

    def _rename(self, temporary: str, name: str) -> None:
        path = self.path_of(name)
        try:
            if self._force:
                os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            else:
                rename_without_replacing(self._fd, temporary, name)
        except FileExistsError:
            raise TargetError("has appeared meanwhile; --force replaces it", path=path) from None
        except OSError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), path) from error

    def _swap_in(self, pairs: list[tuple[str, str]]) -> list[str]:
        """Rename several files, the main one last; an error restores the old ones.

        The old main file is renamed to a backup first, so that it never exists beside a
        new companion.  Each step is durable before the next, so that
        `restore_interrupted` can undo what a crash leaves.
        """
        fd = self._fd
        token = new_token()
        backups: list[tuple[str, str]] = []
        try:
            if self._force:
                for _, name in reversed(pairs):
                    # Recorded first: an interruption may come at any point.
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
                    self.remove(name)
            for backup, name in reversed(backups):
                with contextlib.suppress(OSError):
                    os.rename(backup, name, src_dir_fd=fd, dst_dir_fd=fd)
            raise
        return [backup for backup, _ in backups]

    def _is_new(self, name: str) -> bool:
        """Tell whether a name already refers to one of our new files."""
        try:
            identity = file_identity(self.status(name))
        except OSError:
            return False
        return identity in [file_identity(os.fstat(file.fd)) for file in self._files]

    def _sync_names(self) -> None:
        """Make the names so far durable, if the folder can be synced."""
        if self._sync:
            with named_errors(self._path):
                try:
                    os.fsync(self._fd)
                except OSError as error:
                    if error.errno not in _NO_SYNC_ERRORS:
                        raise

    def sync(self) -> None:
        """Make the final names durable; warn if the folder cannot be synced."""
        if not self._sync:
            return
        try:
            os.fsync(self._fd)
        except OSError as error:
            if error.errno not in _NO_SYNC_ERRORS:
                text = f"{os.strerror(error.errno or 0)} (syncing the folder; the file is complete)"
                raise OSError(error.errno, text, self._path) from error
            folder = os.path.dirname(self._path) or "."
            log.warning("%s: the folder cannot be synced: %s", folder, error.strerror)

    def remove(self, name: str) -> None:
        """Remove a file; ignore a failure."""
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self._fd)
        self._temporaries.pop(name, None)

    def remove_temporaries(self) -> None:
        """Remove the temporaries that do not have their final names yet."""
        for temporary in list(self._temporaries):
            self.remove(temporary)

    def close(self) -> None:
        """Close the folder; more than once is allowed."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _open_folder(folder: str) -> int:
    flags = os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(folder, os.O_RDONLY | flags)
    except PermissionError:
        return os.open(folder, os.O_PATH | flags)
