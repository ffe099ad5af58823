"""Refuses to replace a file before anything is written, not at the end of the job."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from typing import Final

from imgcore.errors import TargetError
from imgcore.files.locks import refuse_image_in_use

# Linux include/uapi/linux/fs.h: FS_IOC_GETFLAGS, FS_IMMUTABLE_FL and FS_APPEND_FL.
_FS_IOC_GETFLAGS: Final = 0x80086601
_IMMUTABLE: Final = 0x10
_APPEND_ONLY: Final = 0x20


def refuse_append_only(folder_fd: int, folder: str, path: str) -> None:
    """Refuse a folder in which a temporary could be created, but never renamed."""
    if _flags(folder_fd) & _APPEND_ONLY:
        raise TargetError(
            f"its folder {folder} is append-only, where no file can be renamed; "
            f"chattr -a {folder} permits it",
            path=path,
        )


def refuse_unreplaceable(
    old_fd: int, old: os.stat_result, folder_fd: int, path: str, advice: str
) -> None:
    """Refuse to replace an old file that is in use, or that a rename cannot replace.

    ``old_fd`` is -1 if the file cannot be opened.  ``advice`` ends the error if only
    the owner may replace it.
    """
    if old_fd >= 0:
        # A virtual machine would keep writing to the old file.
        refuse_image_in_use(old_fd, path)
        if _flags(old_fd) & (_IMMUTABLE | _APPEND_ONLY):
            raise TargetError(
                "is immutable or append-only and cannot be replaced; "
                f"chattr -i -a {path} permits it",
                path=path,
            )
    folder = os.fstat(folder_fd)
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in (0, old.st_uid, folder.st_uid):
        raise TargetError(
            f"belongs to user {old.st_uid}, and only its owner may replace it in this folder "
            f"(sticky, as /tmp){advice}",
            path=path,
        )


def _flags(fd: int) -> int:
    """Return the flags that lsattr shows; 0 if the file system does not have them."""
    try:
        answer = fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8))
    except OSError:
        return 0
    return int(struct.unpack_from("@I", answer)[0])
