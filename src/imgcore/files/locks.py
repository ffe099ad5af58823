"""Locks: QEMU's on images in use, and those between imgcore's own processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import struct
import time
from enum import Enum
from typing import TYPE_CHECKING, Final

from imgcore.errors import ImgcoreError, TargetError
from imgcore.files.identity import file_system_magic

if TYPE_CHECKING:
    from collections.abc import Iterator

# Bytes that QEMU locks in an image (QEMU block/file-posix.c): 100 + p while it uses
# permission p, 200 + p while it denies p to others.
_QEMU_WRITES: Final = 101
_QEMU_DENIES_READING: Final = 200
_QEMU_DENIES_WRITING: Final = 201

# Offset and number of the bytes that a writer needs for itself.
_QEMU_BYTES: Final = ((100, 4), (200, 5))

# Linux include/uapi/asm-generic/fcntl.h; Python's fcntl lacks them on some libcs.
_F_OFD_GETLK: Final[int] = getattr(fcntl, "F_OFD_GETLK", 36)
_F_OFD_SETLK: Final[int] = getattr(fcntl, "F_OFD_SETLK", 37)

# Linux include/uapi/linux/magic.h: NFS, CIFS, SMB 2.  Their servers decide about
# leases, so a refusal does not tell whether another program has the file open.
_NETWORK_MAGICS: Final = frozenset({0x6969, 0xFF534D42, 0xFE534D42})


# struct flock with 64-bit offsets: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK: Final = struct.Struct("@hhqqi4x")

_FOLDER_LOCK_SECONDS: Final = 5.0


def refuse_image_being_written(fd: int, path: str) -> None:
    """Raise ImgcoreError if QEMU is writing to the image."""
    if _is_locked_by_other(fd, _QEMU_WRITES) or _is_locked_by_other(fd, _QEMU_DENIES_READING):
        raise ImgcoreError(
            "in use by another process that writes to it (QEMU's image lock); -U reads it anyway",
            path=path,
        )


def refuse_image_in_use(fd: int, path: str) -> None:
    """Raise TargetError if QEMU uses the image, which a job would replace or change."""
    if _is_locked_by_other(fd, _QEMU_WRITES) or _is_locked_by_other(fd, _QEMU_DENIES_WRITING):
        raise TargetError("in use by another process (QEMU's image lock)", path=path)


def lock_image(fd: int, path: str) -> None:
    """Lock an image as QEMU does for a writer that suffers no other user.

    The locks belong to the open file, and end with it.  TargetError if QEMU, or another
    job, uses the image.
    """
    for start, nbytes in _QEMU_BYTES:
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, nbytes, 0)
        try:
            fcntl.fcntl(fd, _F_OFD_SETLK, request)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise TargetError(
                    "in use by another process (QEMU's image lock)", path=path
                ) from None
            return  # a file system without locks: nobody else has one either


def lease(fd: int, path: str) -> bool:
    """Keep other programs from opening a file until `end_lease`; they wait.

    Returns
    -------
    bool
        False if the system gives no leases on this file.

    Raises
    ------
    TargetError
        Another open file, or a mapping, refers to the file: a program that reads it, a
        loop device.
    """
    with contextlib.suppress(OSError):
        # Whoever waits makes the kernel send a signal, whose default would end the
        # process.  This one is ignored by default, and nobody owns the file.
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno != errno.EAGAIN or file_system_magic(fd) in _NETWORK_MAGICS:
            return False
        raise TargetError("another program has it open", path=path) from None
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETOWN, 0)
    return True


def end_lease(fd: int) -> None:
    """Let other programs open the file again."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def _is_locked_by_other(fd: int, byte: int) -> bool:
    """Tell whether another open file holds a lock of any kind on a byte of the file."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, request)
    except OSError:
        return False  # a file system without locks: QEMU cannot lock it either
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


class Lock(Enum):
    """The result of an attempt to lock a file."""

    TAKEN = "taken"
    HELD_BY_OTHER = "held by another open file"
    NOT_SUPPORTED = "not supported by the file system"


def lock(fd: int) -> Lock:
    """Lock a file or folder without waiting.

    The lock belongs to the open file (flock), not to the process.  So it also excludes
    other threads, closing another descriptor of the file does not end it, and it ends
    with the process, whatever process ID that had.  `imgcore.files.descriptors` keeps
    forked children from holding it longer.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return Lock.HELD_BY_OTHER
    except OSError:
        return Lock.NOT_SUPPORTED
    return Lock.TAKEN


@contextlib.contextmanager
def folder_lock(folder_fd: int, path: str) -> Iterator[None]:
    """Keep two jobs from mixing their files while each renames several.

    It waits up to 5 s for another process's lock on the folder.
    """
    deadline = time.monotonic() + _FOLDER_LOCK_SECONDS
    while lock(folder_fd) is Lock.HELD_BY_OTHER:
        if time.monotonic() > deadline:
            raise OSError(errno.EAGAIN, "The folder stays locked by another process", path)
        time.sleep(0.02)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(folder_fd, fcntl.LOCK_UN)
