"""Copies whole files: content, by reflink if the file system can, and attributes."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

from imgcore.files.reflinks import NO_REFLINK_ERRORS, reflink_whole
from imgcore.limits import MIB

if TYPE_CHECKING:
    from imgcore.files.host_file import HostFile
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile

# Bytes of one system call: few enough that an interruption takes effect soon.
_COPY_NBYTES: Final = 64 * MIB


def copy_content(file: HostFile, target: Target) -> None:
    """Make the target's main file equal to a file: by reflink, or else with its holes.

    Raises
    ------
    OSError
        The file cannot be read, or the copy cannot be written; ENOSPC is raised before
        anything is copied.
    """
    with contextlib.suppress(OSError):
        # Some file systems report holes for data that is not written back yet.
        os.fdatasync(file.fd)
    try:
        reflink_whole(file, target.main)
        return
    except OSError as error:
        if error.errno not in NO_REFLINK_ERRORS:
            raise
    target.require_space(file.allocated_nbytes)
    target.main.truncate(file.nbytes)
    start, end = file.next_data(0)
    while start < end:
        _copy_range(file, target.main, start, end)
        start, end = file.next_data(end)


def _copy_range(file: HostFile, copy: TargetFile, start: int, end: int) -> None:
    while start < end:
        nbytes = min(end - start, _COPY_NBYTES)
        try:
            done = os.copy_file_range(file.fd, copy.fd, nbytes, start, start)
            file.tell_read(done)
        except OSError as error:
            if error.errno not in NO_REFLINK_ERRORS:
                raise OSError(error.errno, error.strerror, file.path) from error
            done = 0
        if done == 0:
            data = file.pread(start, min(nbytes, MIB))
            copy.pwrite(start, data)
            done = len(data)
        start += done
