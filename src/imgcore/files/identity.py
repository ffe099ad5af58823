"""The identity of a file, and its type in words."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import Any, Final

from imgcore.errors import ImgcoreError

# (st_dev, st_ino) of a file, (BLOCK_DEVICE, st_rdev) of a block device.
Identity = tuple[int, int]


BLOCK_DEVICE: Final = -1
_OBJECT: Final = -2
# Linux include/uapi/asm-generic/socket.h and include/linux/net.h.
_SOL_SOCKET: Final = 1
_SO_TYPE: Final = 3
_SO_ACCEPTCONN: Final = 30
_SOCK_STREAM: Final = 1


def file_identity(status: os.stat_result) -> Identity:
    """Return what identifies a file while it is open."""
    if stat.S_ISBLK(status.st_mode):
        return (BLOCK_DEVICE, status.st_rdev)
    return (status.st_dev, status.st_ino)


def named_identity(path: str | int) -> Identity:
    """Return the identity of a file by its name, without opening it, or descriptor."""
    return file_identity(os.stat(path))


def object_identity(found: Any) -> Identity:
    """Return what identifies the file that an object of Python reads or writes.

    Of one that has none, or does not tell it, that is the object itself.
    """
    # They say in several ways that they have no descriptor.
    with suppress(Exception):
        return file_identity(os.fstat(found.fileno()))
    return (_OBJECT, id(found))


def file_system_magic(fd: int) -> int | None:
    """Return the type of an open file's file system, as in Linux' linux/magic.h."""
    import ctypes

    # struct statfs is 120 bytes on 64-bit Linux and starts with f_type, a long.
    buffer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None).fstatfs(fd, buffer) != 0:
        return None
    return ctypes.c_long.from_buffer(buffer).value


def same_file(a: Identity | None, b: Identity | None) -> bool:
    """Tell whether two identities are of one file; a missing file has None."""
    return a is not None and a == b


def describe_file_type(mode: int) -> str:
    """Return the file type of a ``st_mode`` in words, for messages."""
    for test, name in (
        (stat.S_ISREG, "a regular file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return name
    # Such as an eventfd.
    return "no file with content"


def refuse_messages(fd: int, path: str) -> None:
    """Raise ImgcoreError for a socket that has no stream of bytes.

    A read that is shorter than a message drops its rest.
    """
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return
    if _socket_option(fd, _SO_TYPE) != _SOCK_STREAM:
        raise ImgcoreError("is a socket for messages, not for a stream", path=path)
    if _socket_option(fd, _SO_ACCEPTCONN):
        raise ImgcoreError("is a socket that waits for connections, not a stream", path=path)


def _socket_option(fd: int, name: int) -> int:
    """Return an option; a Python socket of the descriptor could change its flags."""
    import ctypes

    value, nbytes = ctypes.c_int(), ctypes.c_uint32(4)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.getsockopt(fd, _SOL_SOCKET, name, ctypes.byref(value), ctypes.byref(nbytes)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return value.value


def refuse_type(mode: int, path: str, *, device: bool = True) -> None:
    """Raise ImgcoreError if a ``st_mode`` is not that of a file to read images from."""
    if stat.S_ISREG(mode) or (device and stat.S_ISBLK(mode)):
        return
    allowed = "a regular file or a block device" if device else "a regular file"
    raise ImgcoreError(f"is {describe_file_type(mode)}, not {allowed}", path=path)
