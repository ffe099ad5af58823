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
    from collections.abc import Iterator, Sequence
    from typing import Self

# QEMU locks byte 100 + p of an image while it uses permission p, and 200 + p while it
# denies p to others.  All its locks are shared: they conflict by what they mean (QEMU
# block/file-posix.c, include/block/block-common.h).
_USES: Final = 100
_DENIES: Final = 200
_READING: Final = 0
_WRITING: Final = 1
_RESIZING: Final = 3

# A reader of imgcore, which goes on when a job gives its file's name to another file.
_LETS_REPLACE: Final = 300

_BY_READER: Final = (_USES + _READING, _DENIES + _WRITING, _LETS_REPLACE)
_BY_WRITER: Final = (
    _USES + _READING,
    _USES + _WRITING,
    _USES + _RESIZING,
    _DENIES + _WRITING,
    _DENIES + _RESIZING,
)
# What a reader and a writer do not stand.
_AGAINST_READER: Final = (_USES + _WRITING, _DENIES + _READING)
_AGAINST_WRITER: Final = tuple(
    byte + (_DENIES - _USES if byte < _DENIES else _USES - _DENIES) for byte in _BY_WRITER
)

# Offset and number of the bytes that a job needs for itself.
_QEMU_BYTES: Final = ((100, 4), (200, 5))
_ALL_BYTES: Final = (100, 201)

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
    """Raise ImgcoreError if another open file is for writing to the image."""
    for byte in _AGAINST_READER:
        if _is_locked_by_other(fd, byte):
            raise _being_written(fd, path, byte)


def refuse_image_in_use(fd: int, path: str) -> None:
    """Raise TargetError if an image is in use, which a job would replace or change.

    Images that imgcore reads may be replaced: their readers keep the old file.
    """
    for byte in (_USES + _WRITING, _DENIES + _RESIZING, _DENIES + _WRITING):
        if _is_locked_by_other(fd, byte):
            if byte == _DENIES + _WRITING and _is_locked_by_other(fd, _LETS_REPLACE):
                continue
            raise _in_use(fd, path, byte)


def lock_image(fd: int, path: str) -> None:
    """Lock an image as QEMU does for a writer that suffers no other user.

    The locks belong to the open file, and end with it.  TargetError if QEMU, or another
    job, uses the image.
    """
    for start, nbytes in _QEMU_BYTES:
        try:
            _set(fd, fcntl.F_WRLCK, start, nbytes)
        except OSError as error:
            if error.errno in _HELD_BY_OTHER:
                raise _in_use(fd, path, start, nbytes) from None
            return  # a file system without locks: nobody else has one either


class ImageLock:
    """QEMU's lock on an image, for a reader or a writer.

    It belongs to the open file: to all of its descriptors, also those in children.  So
    it is ended when the last object that uses it here is closed.
    """

    def __init__(self, fd: int) -> None:
        self._process = os.getpid()
        self._users = [fd]

    @classmethod
    def for_reading(cls, fd: int, path: str) -> Self:
        """Lock an image that is read, and that nobody may write to meanwhile.

        ImgcoreError if another open file is for writing to it.
        """
        lock = cls(fd)
        blocked = lock._take(fd, _BY_READER, _AGAINST_READER)
        if blocked is not None:
            raise _being_written(fd, path, blocked)
        return lock

    @classmethod
    def for_writing(cls, fd: int, path: str) -> Self:
        """Lock an image that is written in place.

        Others may read it if they do not mind (QEMU's ``-U``).  TargetError if another
        open file is for writing to it, or for reading it as it is.
        """
        lock = cls(fd)
        blocked = lock._take(fd, _BY_WRITER, _AGAINST_WRITER)
        if blocked is not None:
            raise _in_use(fd, path, blocked)
        return lock

    def _take(self, fd: int, wanted: Sequence[int], against: Sequence[int]) -> int | None:
        """Lock bytes; return the byte that another's lock is on, if that is in the way.

        Nothing is locked on a file system without locks.
        """
        for byte in wanted:
            try:
                _set(fd, fcntl.F_RDLCK, byte, 1)
            except OSError as error:
                self.end(fd)
                return byte if error.errno in _HELD_BY_OTHER else None
        # Whoever locks at the same time sees these locks, or they see its.
        for byte in against:
            if _is_locked_by_other(fd, byte):
                self.end(fd)
                return byte
        return None

    def used_by(self, fd: int) -> ImageLock:
        """Return the lock for one more descriptor of the open file."""
        self._users.append(fd)
        return self

    def end(self, fd: int) -> None:
        """End the lock if this descriptor is the last one.

        A child leaves the locks of its parent alone.
        """
        if fd in self._users:
            self._users.remove(fd)
        if not self._users and self._process == os.getpid():
            with contextlib.suppress(OSError):
                _set(fd, fcntl.F_UNLCK, *_ALL_BYTES)


_HELD_BY_OTHER: Final = (errno.EAGAIN, errno.EACCES)


def _set(fd: int, kind: int, start: int, nbytes: int) -> None:
    fcntl.fcntl(fd, _F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, nbytes, 0))


def _being_written(fd: int, path: str, byte: int) -> ImgcoreError:
    return ImgcoreError(
        f"in use by {_user(fd, byte)}, which writes to it (QEMU's image lock); -U reads it anyway",
        path=path,
    )


def _in_use(fd: int, path: str, byte: int, nbytes: int = 1) -> TargetError:
    return TargetError(f"in use by {_user(fd, byte, nbytes)} (QEMU's image lock)", path=path)


def _user(fd: int, byte: int, nbytes: int = 1) -> str:
    from imgcore.files.lock_holders import holder

    return holder(fd, byte, nbytes)


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
