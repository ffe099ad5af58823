"""Renames a file only if the new name is free."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import Final

_RENAME_NOREPLACE: Final = 1  # Linux include/uapi/linux/fs.h


def rename_without_replacing(folder_fd: int, old: str, new: str) -> None:
    """Rename inside a folder; raises FileExistsError if the new name is taken."""
    import ctypes

    code = errno.ENOSYS
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "renameat2"):
        names = os.fsencode(old), os.fsencode(new)
        if not libc.renameat2(folder_fd, names[0], folder_fd, names[1], _RENAME_NOREPLACE):
            return
        code = ctypes.get_errno()
    # These mean that the file system or the kernel does not know the flag.
    if code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):
        raise OSError(code, os.strerror(code), new)
    try:
        os.link(old, new, src_dir_fd=folder_fd, dst_dir_fd=folder_fd, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
    else:
        os.unlink(old, dir_fd=folder_fd)
        return
    # Neither works (on FAT, for example): check the name first, which leaves a race.
    with contextlib.suppress(FileNotFoundError):
        os.stat(new, dir_fd=folder_fd, follow_symlinks=False)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
    os.rename(old, new, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
