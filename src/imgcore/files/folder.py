"""A folder whose entries change one durable step at a time."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from imgcore.files.descriptors import close, named_errors, open_file
from imgcore.files.renaming import rename_without_replacing
from imgcore.files.target_folder import NO_SYNC_ERRORS

if TYPE_CHECKING:
    from typing import Self


class Folder:
    """An open folder; a context manager, which closes it.

    Attributes
    ----------
    path : str
        Its name, as in the names of its files; empty for the current folder.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd: int = open_file(path or ".", os.O_RDONLY | os.O_DIRECTORY)

    def path_of(self, name: str) -> str:
        """Return the path of an entry."""
        return os.path.join(self.path, name)

    def names(self) -> list[str]:
        """Return the names of all entries."""
        with named_errors(self.path or "."):
            return os.listdir(self.fd)

    def find(self, name: str) -> os.stat_result | None:
        """Return the status of an entry, links not followed; None if it is missing."""
        with contextlib.suppress(FileNotFoundError), named_errors(self.path_of(name)):
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        return None

    def open(self, name: str, flags: int, mode: int = 0o600) -> int:
        """Open an entry, which is no link."""
        more = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        return open_file(name, flags | more, mode, folder_fd=self.fd, name=self.path_of(name))

    def read(self, name: str, max_nbytes: int) -> bytes | None:
        """Return the first bytes of a file, one more than asked for if there are more.

        None if there is no such file.
        """
        try:
            fd = self.open(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            with named_errors(self.path_of(name)):
                return _read(fd, max_nbytes + 1)
        finally:
            close(fd)

    def put(
        self, name: str, content: bytes, mode: int, temporary: str, *, like: os.stat_result
    ) -> None:
        """Create a file, at once whole; the folder is not synced.

        It may be there already, with this content.  ``temporary`` is a name that nobody
        else uses; what has it is removed.  The file gets the owner of ``like``, if this
        user may give it away.
        """
        self.remove(temporary)
        fd = self.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with named_errors(self.path_of(name)):
                done = 0
                while done < len(content):
                    done += os.pwrite(fd, memoryview(content)[done:], done)
                with contextlib.suppress(PermissionError):
                    os.fchown(fd, like.st_uid, like.st_gid)
                os.fchmod(fd, mode & 0o777)
                os.fsync(fd)
        finally:
            close(fd)
        try:
            self.rename(temporary, name)
        except FileExistsError:
            self.remove(temporary)
            if self.read(name, len(content)) != content:
                raise

    def rename(self, old: str, new: str) -> None:
        """Rename an entry; FileExistsError if the new name is taken."""
        with named_errors(self.path_of(new)):
            rename_without_replacing(self.fd, old, new)

    def remove(self, name: str) -> None:
        """Remove a file; it may be missing."""
        with contextlib.suppress(FileNotFoundError), named_errors(self.path_of(name)):
            os.unlink(name, dir_fd=self.fd)

    def sync(self) -> None:
        """Make the names durable, unless the file system cannot do that."""
        with named_errors(self.path or "."):
            try:
                os.fsync(self.fd)
            except OSError as error:
                if error.errno not in NO_SYNC_ERRORS:
                    raise

    def close(self) -> None:
        """Close it; more than once is allowed."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(fd: int, nbytes: int) -> bytes:
    pieces = []
    while nbytes > 0 and (piece := os.read(fd, nbytes)):
        pieces.append(piece)
        nbytes -= len(piece)
    return b"".join(pieces)
