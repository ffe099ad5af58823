"""Opens the files of descriptors that the caller has, and leaves those as they are."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from typing import Final

from imgcore.errors import ImgcoreError
from imgcore.files.descriptors import close, duplicate, named_errors, open_file
from imgcore.files.identity import file_identity, refuse_type

OPEN_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

# The largest number of a descriptor, a C int.
_MAX_NUMBER: Final = (1 << 31) - 1


def given_name(number: int) -> str:
    """Return the name of a descriptor in messages and results."""
    return f"descriptor {number}"


def require_open(number: int) -> None:
    """Raise OSError if a number is not that of an open descriptor."""
    if not 0 <= number <= _MAX_NUMBER:
        text = "A descriptor has a number from 0 to 2^31 - 1"
        raise OSError(errno.EBADF, text, given_name(number))
    try:
        fcntl.fcntl(number, fcntl.F_GETFD)
    except OSError:
        text = "No file is open under this number"
        raise OSError(errno.EBADF, text, given_name(number)) from None


def open_given(number: int, flags: int = OPEN_FLAGS) -> tuple[int, bool]:
    """Return a descriptor for the file of one that the caller has.

    Parameters
    ----------
    number : int
    flags : int
        Those to open the file again with.

    Returns
    -------
    fd : int
        The caller closes it.
    is_ours : bool
        Nobody else has its open file description, so its position and flags may change.
        The system refuses that to a process without rights to the file; such a process
        reads through the description that it was given.

    Raises
    ------
    OSError
        The number is not that of a descriptor.
    ImgcoreError
        The file cannot be read by it, or is neither a regular file nor a block device.
    """
    name = given_name(number)
    require_open(number)
    with named_errors(name):
        fd = duplicate(number)
    try:
        had = fcntl.fcntl(fd, fcntl.F_GETFL)
        if had & os.O_PATH:
            raise ImgcoreError("was opened with O_PATH, which allows no reading", path=name)
        if had & os.O_ACCMODE not in (os.O_RDONLY, os.O_RDWR):
            raise ImgcoreError("is open for writing only", path=name)
        if flags & os.O_ACCMODE == os.O_RDWR and had & os.O_ACCMODE != os.O_RDWR:
            raise ImgcoreError("is open for reading only", path=name)
        status = os.fstat(fd)
        refuse_type(status.st_mode, name)
        ours = _reopened(fd, status, flags)
        if ours is None and had & os.O_DIRECT:
            raise ImgcoreError(
                "is open with O_DIRECT, and this process has no right to open the file again",
                path=name,
            )
    except BaseException:
        close(fd)
        raise
    if ours is None:
        return fd, False
    close(fd)
    return ours, True


def _reopened(fd: int, status: os.stat_result, flags: int) -> int | None:
    """Open the file of a descriptor again; None if the system refuses that."""
    with contextlib.suppress(OSError):
        ours = open_file(f"/proc/self/fd/{fd}", flags)
        # Something else may be mounted on /proc.
        if file_identity(os.fstat(ours)) == file_identity(status):
            return ours
        close(ours)
    return None
