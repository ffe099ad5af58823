"""One file that is being written."""

from __future__ import annotations

import errno
import os
import stat
from functools import partial
from typing import Any, Final

from imgcore.files.descriptors import (
    close,
    duplicate,
    forks_held_back,
    give_up_in_children,
    named_errors,
)
from imgcore.files.host_file import HostFile, OpenFile
from imgcore.files.retry import WRITE_ERRORS, retrying

_FILL_NBYTES: Final = 1 << 20


class TargetFile(OpenFile):
    """One file that is being written.

    Attributes
    ----------
    path : str
        The final name, which appears in messages.
    fd : int
        Open for reading and writing; this object owns it, and only `imgcore.files`
        uses it.
    """

    def __init__(self, fd: int, path: str) -> None:
        super().__init__(fd, path)
        give_up_in_children(fd)

    @property
    def nbytes(self) -> int:
        """The size now; for a block device, its capacity."""
        with named_errors(self.path):
            return os.lseek(self.fd, 0, os.SEEK_END)

    @property
    def file_size(self) -> int:
        """The size that the file system states; 0 for a block device."""
        return self.status().st_size

    def reopened(self, path: str) -> HostFile:
        """Return the file open for reading, with another name in messages.

        The caller closes it.
        """
        with forks_held_back(), named_errors(path):
            fd = duplicate(self.fd)
            give_up_in_children(fd)
        return HostFile(fd, path, device=False)

    def pwrite(self, offset: int, data: Any) -> None:
        """Write a whole buffer at ``offset``; raises OSError with the file's name."""
        with memoryview(data) as view, view.cast("B") as octets, named_errors(self.path):
            done = 0
            while done < len(octets):
                rest, at = octets[done:], offset + done
                done += retrying(partial(os.pwrite, self.fd, rest, at), WRITE_ERRORS)

    def truncate(self, nbytes: int) -> None:
        """Set the file's size; a block device keeps its own, which must suffice."""
        with named_errors(self.path):
            if not stat.S_ISBLK(self.status().st_mode):
                os.ftruncate(self.fd, nbytes)
            elif self.nbytes < nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def preallocate(self, mode: str, nbytes: int) -> None:
        """Reserve the file's first ``nbytes`` bytes, which then read as zeros.

        Parameters
        ----------
        mode : {"off", "falloc", "full"}
            Do nothing, ask the file system, or write zeros.
        nbytes : int
            Bytes.

        Raises
        ------
        OSError
            The file system is full, or cannot preallocate.
        """
        if mode == "falloc" and nbytes:
            with named_errors(self.path):
                os.posix_fallocate(self.fd, 0, nbytes)
        elif mode == "full":
            zeros = bytes(_FILL_NBYTES)
            for offset in range(0, nbytes, _FILL_NBYTES):
                self.pwrite(offset, memoryview(zeros)[: min(_FILL_NBYTES, nbytes - offset)])
        elif mode not in ("off", "falloc"):
            raise ValueError(f"unknown preallocation mode {mode!r}")

    def sync(self) -> None:
        """Make the content durable.

        A failure is final: the kernel may have dropped the data.
        """
        with named_errors(self.path):
            os.fsync(self.fd)

    def check_written(self) -> None:
        """Raise the error that closing the file would hide.

        Network file systems report late errors on close.
        """
        with named_errors(self.path):
            close(duplicate(self.fd))
