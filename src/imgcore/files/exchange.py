"""Puts a new version of a small file in the place of the old one, in one step."""

from __future__ import annotations

import contextlib
import os

from imgcore.errors import TargetError
from imgcore.files.attributes import keep_attributes
from imgcore.files.descriptors import close, duplicate, forks_held_back, open_file
from imgcore.files.host_file import OpenFile
from imgcore.files.identity import file_identity
from imgcore.files.locks import ImageLock
from imgcore.files.replacing import refuse_append_only
from imgcore.files.target_folder import NO_SYNC_ERRORS
from imgcore.files.temporary_names import new_token, remove_stale, temporary_name


def new_version(old_fd: int, absolute_path: str, path: str, content: bytes) -> int:
    """Replace a file by its name; return the descriptor of the new one, locked.

    The name is durable only after `sync_folder_of`.

    Parameters
    ----------
    old_fd : int
        The old file, which stays open.
    absolute_path : str
        Its name.
    path : str
        The name in messages.
    content : bytes
        What the new one has.
    """
    folder, name = os.path.split(os.path.realpath(absolute_path))
    with forks_held_back():
        folder_fd = open_file(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        old = os.fstat(old_fd)
        if file_identity(os.stat(name, dir_fd=folder_fd)) != file_identity(old):
            raise TargetError("its name is that of another file by now", path=path)
        refuse_append_only(folder_fd, folder, path)
        remove_stale(folder_fd, folder, name)
        temporary = temporary_name(name, new_token())
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            mode = old.st_mode & 0o777
            fd = open_file(temporary, flags, mode, folder_fd=folder_fd)
            with contextlib.closing(OpenFile(fd, path)) as new:
                ImageLock.for_writing(fd, path)
                keep_attributes(old_fd, old, new)
                with open(fd, "wb", closefd=False) as writer:
                    writer.write(content)
                os.fsync(fd)
                os.rename(temporary, name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
                return duplicate(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder_fd)
            raise
    finally:
        close(folder_fd)


def sync_folder_of(absolute_path: str) -> None:
    """Make the names in the folder of a file durable."""
    folder_fd = open_file(os.path.dirname(os.path.realpath(absolute_path)), os.O_RDONLY)
    try:
        os.fsync(folder_fd)
    except OSError as error:
        if error.errno not in NO_SYNC_ERRORS:
            raise
    finally:
        close(folder_fd)
