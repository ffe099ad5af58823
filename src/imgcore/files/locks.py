"""The locks by which QEMU marks an image as in use."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final

# Bytes that QEMU locks in an image (QEMU block/file-posix.c): 100 + p while it uses
# permission p, 200 + p while it does not tolerate p in others.
QEMU_WRITES: Final = 101


QEMU_DENIES_READING: Final = 200


QEMU_DENIES_WRITING: Final = 201


# From Linux include/uapi/asm-generic/fcntl.h; Python's fcntl lacks it before 3.9 and on some libcs.
_F_OFD_GETLK: Final[int] = getattr(fcntl, "F_OFD_GETLK", 36)


# struct flock with 64-bit offsets: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK: Final = struct.Struct("@hhqqi4x")


def is_locked_by_other(fd: int, byte: int) -> bool:
    """Tell whether another open file holds a lock of any kind on one byte of the file."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, request)
    except OSError:
        return False  # a file system without locks: QEMU cannot hold one either
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
