"""Space of a file: reserved before it is needed, and given back."""

from __future__ import annotations

import errno
import os
from typing import Final

from imgcore.sizes import format_size

# Linux include/uapi/linux/falloc.h.
_KEEP_SIZE: Final = 1
_PUNCH_HOLE: Final = 2
_ZERO_RANGE: Final = 16

_NOT_SUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


def free_nbytes(fd: int) -> int | None:
    """Return the bytes that this process may still write to an open file's system.

    None if that is not known.
    """
    try:
        status = os.fstatvfs(fd)
    except OSError:
        return None
    n_blocks = status.f_bfree if os.geteuid() == 0 else status.f_bavail
    return n_blocks * status.f_frsize if status.f_blocks else None


def require_space(fd: int, nbytes: int, path: str) -> None:
    """Raise OSError(ENOSPC) if a file system has fewer than ``nbytes`` left."""
    free = free_nbytes(fd)
    if free is not None and free < nbytes:
        text = f"{os.strerror(errno.ENOSPC)}: {format_size(nbytes)} needed, "
        raise OSError(errno.ENOSPC, text + f"{format_size(free)} free", path)


def reserve(fd: int, offset: int, length: int) -> None:
    """Reserve space for a range, whose content and whose file's size stay.

    It does nothing if the file system cannot reserve.
    """
    _fallocate(fd, _KEEP_SIZE, offset, length)


def punch(fd: int, offset: int, length: int) -> bool:
    """Give back the space of a range, which then reads as zeros.

    False if the file system has no holes, or the device cannot do that, perhaps because
    the range is not whole sectors.
    """
    return _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_in_place(fd: int, offset: int, length: int) -> bool:
    """Make a range read as zeros whose space stays reserved; False if that fails."""
    return _fallocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, length)


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if length <= 0 or not hasattr(libc, "fallocate64"):
        return False
    libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while libc.fallocate64(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code in _NOT_SUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True
