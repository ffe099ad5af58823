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
from imgcore.files.host_file import HostFile, OpenFile, system_errors
from imgcore.files.page_cache import CacheMode
from imgcore.files.retry import WRITE_ERRORS, retrying

_FILL_NBYTES: Final = 1 << 20


class TargetFile(OpenFile):
    """One file that is being written.

    A block device has old bytes and keeps its size.  After `clear` it takes the part of
    a new file nevertheless: what lies between two writes, or before `truncate`'s size,
    reads as zeros.

    Attributes
    ----------
    path : str
        The final name, which appears in messages.
    fd : int
        Open for reading and writing; this object owns it, and only `imgcore.files`
        uses it.
    is_block_device : bool
        Whether the image's end may lie before the file's end.
    reads_as_zeros : bool
        Whether everything that is not written reads as zeros.
    kept_nbytes : int
        The first bytes, which an earlier run of the job has written and this one keeps.
    in_order : bool
        Whether offsets of writes must ascend, since each byte is written once.
    """

    in_order: bool = False

    def __init__(self, fd: int, path: str) -> None:
        super().__init__(fd, path)
        give_up_in_children(fd)
        try:
            self.is_block_device: bool = stat.S_ISBLK(self.status().st_mode)
        except BaseException:
            self.close()
            raise
        # Where the old bytes of a cleared block device begin; None if they are kept.
        self._end: int | None = None
        self.reads_as_zeros: bool = True
        self.kept_nbytes: int = 0

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
        file = HostFile(fd, path, device=self.is_block_device)
        try:
            file.use_cache(self._cache)
        except BaseException:
            file.close()
            raise
        return file

    def drop_cached(self) -> None:
        """Drop what the page cache has of the file, so that reads come from the medium.

        What is not synced stays, and so does all of a file that is only in memory
        (tmpfs).
        """
        with named_errors(self.path):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def pwrite(self, offset: int, data: Any) -> None:
        """Write a whole buffer at ``offset``; raises OSError with the file's name."""
        with memoryview(data) as view, view.cast("B") as octets, named_errors(self.path):
            self._fill(offset)
            self.note_end(offset + len(octets))
            done = 0
            while done < len(octets):
                rest, at = octets[done:], offset + done
                done += retrying(partial(os.pwrite, self.fd, rest, at), WRITE_ERRORS)
            self._note_written(offset, len(octets))

    def _note_written(self, offset: int, length: int) -> None:
        if self._cache is not CacheMode.KEEP:
            with system_errors():
                self.core.note_written(offset, length)

    def note_changed(self) -> None:
        """Note that another object may have written to any part of the file."""
        with named_errors(self.path):
            self._note_written(0, self.nbytes)

    def write_last(self, data: bytes) -> None:
        """Write the file's last bytes.

        Those of a block device may be far from the image, which readers find by them.
        """
        end, self._end = self._end, None
        self.pwrite(self.nbytes - len(data), data)
        self._end = end

    def truncate(self, nbytes: int) -> None:
        """Set the file's size; a block device keeps its own, which must suffice."""
        with named_errors(self.path):
            if not self.is_block_device:
                os.ftruncate(self.fd, nbytes)
            elif self.nbytes < nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            else:
                self._fill(nbytes)

    def clear(self, nbytes: int) -> None:
        """Forget the old content; the first ``nbytes`` bytes then read as zeros."""
        self._end = 0 if self.is_block_device else None
        self.reads_as_zeros = not self.is_block_device
        if self.kept_nbytes == 0 or self.is_block_device:
            self.truncate(0)
        self.truncate(max(nbytes, 0 if self.is_block_device else self.kept_nbytes))

    def note_end(self, end: int) -> None:
        """Note that the engine has written everything before ``end``."""
        if self._end is not None:
            self._end = max(self._end, end)

    def _fill(self, end: int) -> None:
        """Make the old bytes before ``end`` read as zeros."""
        if self._end is not None and self._end < end:
            self.zero(self._end, end - self._end)
            self._end = end

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, by the cheapest way that works."""
        from imgcore._core import CoreError

        with named_errors(self.path):
            try:
                self.core.zero(offset, length)
            except CoreError as error:
                # Past the end of the device there is no error number.
                raise OSError(error.os_errno or errno.ENOSPC, "") from error

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
            for offset in range(self.kept_nbytes, nbytes, _FILL_NBYTES):
                self.pwrite(offset, memoryview(zeros)[: min(_FILL_NBYTES, nbytes - offset)])
        elif mode not in ("off", "falloc"):
            raise ValueError(f"unknown preallocation mode {mode!r}")

    def keep(self, nbytes: int) -> None:
        """Keep the first bytes of an old file; what follows reads as zeros.

        The file may end before them, in zeros that were not written.
        """
        with named_errors(self.path):
            os.ftruncate(self.fd, nbytes)
        self.kept_nbytes = nbytes

    def datasync(self) -> None:
        """Make what was written so far durable; a failure is final, as of `sync`."""
        with named_errors(self.path):
            os.fdatasync(self.fd)
            # A failure to write back earlier is reported once, and not by this sync.
            self._note_written(0, 0)

    def sync(self) -> None:
        """Make the content durable.

        A failure is final: the kernel may have dropped the data.
        """
        with named_errors(self.path):
            # An earlier write-back may have failed, which fsync does not repeat.
            self._note_written(0, 0)
            os.fsync(self.fd)

    def check_written(self) -> None:
        """Raise the error that closing the file would hide.

        Network file systems report late errors on close.
        """
        with named_errors(self.path):
            close(duplicate(self.fd))
