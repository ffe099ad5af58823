"""A file of the host that is open for reading: a regular file or a block device."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from typing import TYPE_CHECKING, Any, Final

from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
)
from imgcore.files.closable import Closable
from imgcore.files.descriptors import (
    above_standard,
    close,
    duplicate,
    forks_held_back,
    named_errors,
    open_file,
    share_fate,
)
from imgcore.files.given import OPEN_FLAGS, given_name, open_given
from imgcore.files.identity import (
    Identity,
    file_identity,
    file_system_magic,
    refuse_type,
)
from imgcore.files.locks import ImageLock, refuse_image_being_written
from imgcore.files.page_cache import CacheMode
from imgcore.files.retry import READ_ERRORS, retrying
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Self

    from imgcore._core import File
    from imgcore.files.retry import Result

# The kernel reads at most this in one call.
_MAX_READ_NBYTES: Final = 0x7FFFF000


# The unit of st_blocks, which does not depend on st_blksize (Linux stat(2)).
_STAT_BLOCK_NBYTES: Final = 512
_XFS_SUPER_MAGIC: Final = 0x58465342  # Linux include/uapi/linux/magic.h


def is_on_xfs(fd: int) -> bool:
    """Tell whether an open file is on XFS."""
    return file_system_magic(fd) == _XFS_SUPER_MAGIC


@contextlib.contextmanager
def system_errors() -> Iterator[None]:
    """Turn the native core's errors about system calls into OSError."""
    from imgcore._core import CoreError, Status

    try:
        yield
    except CoreError as error:
        if error.status is not Status.IO:
            raise
        text = f"{os.strerror(error.os_errno)} ({error.op} at 0x{error.offset:x})"
        raise OSError(error.os_errno, text) from error


class OpenFile(Closable):
    """A descriptor, which this object owns, and the same file for the native engine."""

    def __init__(self, fd: int, path: str) -> None:
        self.fd: int = fd
        self.path = path
        self._core: File | None = None
        self._cache: CacheMode = CacheMode.KEEP
        self._direct_fd = -1  # the same file, open with O_DIRECT
        super().__init__()

    @property
    def core(self) -> File:
        """The file for the native engine."""
        with self._in_use():
            if self._core is None:
                from imgcore._core import File

                with named_errors(self.path), system_errors():
                    self._core = File.from_fd(self.fd)
            return self._core

    def use_cache(self, mode: CacheMode, job_nbytes: int = 0, *, quiet: bool = False) -> bool:
        """Set how the page cache is used; called before the file is used by a job.

        Pages that are there already stay.

        Parameters
        ----------
        mode : CacheMode
        job_nbytes : int
            What the job reads, about, which ``AUTO`` depends on.
        quiet : bool
            Do not warn if direct requests are not possible.

        Returns
        -------
        bool
            False if direct requests were asked for and are not possible.
        """
        used, refusal = mode, None
        with self._in_use(), named_errors(self.path), system_errors():
            if mode is not CacheMode.KEEP:
                used = mode.for_file(file_system_magic(self.fd), job_nbytes)
            if used is not CacheMode.KEEP:
                self.core.drop_behind()
            if used is CacheMode.DIRECT and mode is CacheMode.AUTO and self._is_mostly_cached():
                used = CacheMode.DROP
            if used is CacheMode.DIRECT:
                refusal = self._go_direct()
        self._cache = used if refusal is None else CacheMode.DROP
        is_refused = refusal is not None and mode is CacheMode.DIRECT
        if is_refused and not quiet:
            log.warning(
                "%s: no direct requests are possible (%s): it goes through the page cache, "
                "and is dropped from there",
                self.path,
                refusal,
            )
        return not is_refused

    def _is_mostly_cached(self) -> bool:
        return 2 * self.core.kept_nbytes() > self.allocated_nbytes > 0

    def _go_direct(self) -> str | None:
        """Open it once more, for direct requests; return why that is not possible."""
        if self._direct_fd >= 0:
            return None
        mode = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE
        try:
            with forks_held_back():
                fd = open_file(f"/proc/self/fd/{self.fd}", mode | os.O_DIRECT)
                share_fate(fd, self.fd)
        except OSError as error:
            return error.strerror
        try:
            is_same = file_identity(os.fstat(fd)) == file_identity(os.fstat(self.fd))
            if is_same and self.core.go_direct(fd):
                self._direct_fd, fd = fd, -1
                return None
        finally:
            if fd >= 0:
                close(fd)
        return "the file system has none"

    @property
    def keeps_cache(self) -> bool:
        """Whether the page cache keeps what is read."""
        return self._cache is CacheMode.KEEP

    def status(self) -> os.stat_result:
        """Return the status of the file now."""
        with self._in_use(), named_errors(self.path):
            return os.fstat(self.fd)

    @property
    def allocated_nbytes(self) -> int:
        """Bytes that the host has allocated for the file; 0 for a block device."""
        return self.status().st_blocks * _STAT_BLOCK_NBYTES

    @property
    def logical_sector_nbytes(self) -> int | None:
        """Bytes of a block device's logical sector; None for other files."""
        with self._in_use(), named_errors(self.path):
            if not stat.S_ISBLK(os.fstat(self.fd).st_mode):
                return None
            from imgcore.files.block_devices import logical_sector_nbytes

            return logical_sector_nbytes(self.fd)

    def _free(self) -> None:
        core, self._core = self._core, None
        if core is not None:
            if self._cache is not CacheMode.KEEP:
                core.drop_rest()
            core.close()
        opened = (self._direct_fd, self.fd)
        self._direct_fd = self.fd = -1
        with named_errors(self.path), contextlib.ExitStack() as stack:
            for fd in opened:
                if fd >= 0:
                    stack.callback(close, fd)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path!r}>"


class HostFile(OpenFile):
    """A file of the host, open for reading: a regular file or a block device.

    See `ByteSource` for the contract of its members.

    Attributes
    ----------
    fd : int
        The descriptor, which this object owns; only `imgcore.files` uses it.
    on_read : callable or None
        Called with the number of bytes before each read by Python, and with 0 before
        each search for data.  It may wait, or raise, which ends the read.
    """

    def __init__(
        self,
        fd: int,
        path: str,
        *,
        share: bool = False,
        device: bool = True,
        is_named: bool = True,
        is_ours: bool = True,
    ) -> None:
        """Take over an open descriptor; an error closes it.

        Without ``is_named``, the path is no name in the file system.  Without
        ``is_ours``, others use the same open file description: its position and flags
        are left alone.
        """
        super().__init__(fd, path)
        self.share = share
        self._absolute_path: str | None = None
        self._is_ours = is_ours
        self._knows_holes = False
        self.on_read: Callable[[int], None] | None = None
        self._image_lock: ImageLock | None = None
        try:
            with named_errors(path):
                if is_named:
                    self._absolute_path = os.path.abspath(path)
                self._examine(device=device)
        except BaseException:
            self.close()
            raise

    def _examine(self, *, device: bool) -> None:
        fd, path = self.fd, self.path
        self._status = os.fstat(fd)
        refuse_type(self._status.st_mode, path, device=device)
        self.is_block_device: bool = stat.S_ISBLK(self._status.st_mode)
        self.identity: Identity = file_identity(self._status)
        self.nbytes: int = self._find_nbytes()
        if self.is_block_device and self.nbytes == 0:
            raise ImgcoreError("the block device has no medium (its size is 0)", path=path)
        if self._is_ours:
            # On a non-blocking file, io_uring reads what is not cached one by one.
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        if not self.share:
            self._lock_as_reader()

    def _lock_as_reader(self) -> None:
        if self._is_ours:
            self._image_lock = ImageLock.for_reading(self.fd, self.path)
        else:
            # A lock would be that of all who use the open file.
            refuse_image_being_written(self.fd, self.path)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, share: bool = False) -> Self:
        """Open a file that the caller names.

        Parameters
        ----------
        path : str or os.PathLike
            A regular file or a block device, or a symbolic link to one.
        share : bool
            Open the file although another process may be writing to it.

        Raises
        ------
        OSError
            The system cannot open the file.
        ImgcoreError
            It is neither a regular file nor a block device, or another open file is for
            writing to it.

        Notes
        -----
        It never blocks, whatever kind of file the path names.
        """
        name = os.fspath(path)
        # Checked before opening, which could wake a pipe's writer or rewind a tape.
        refuse_type(os.stat(name).st_mode, name)
        return cls(open_file(name, OPEN_FLAGS), name, share=share)

    @classmethod
    def given(cls, number: int, *, share: bool = False) -> Self:
        """Open the file of a descriptor that the caller has, and keeps as it is.

        Parameters
        ----------
        number : int
            The descriptor.  It is called ``descriptor N`` in messages.
        share : bool
            As for `open`.

        Raises
        ------
        OSError, ImgcoreError
            As `open`; or the number is not of an open file that can be read.
        """
        fd, is_ours = open_given(number)
        return cls(fd, given_name(number), share=share, is_named=False, is_ours=is_ours)

    def again(self) -> Self:
        """Return the same file, opened once more, as it is now."""
        with self._in_use(), named_errors(self.path):
            fd = duplicate(self.fd)
        file = type(self)(fd, self.path, share=True, is_named=False, is_ours=self._is_ours)
        # The working folder may be another by now.
        file._absolute_path = self._absolute_path
        self._lend_lock(file)
        return file

    def _lend_lock(self, file: HostFile) -> None:
        """Share the lock with a file that has the same open file description."""
        file.share = self.share
        if self._image_lock is not None:
            file._image_lock = self._image_lock.used_by(file.fd)

    @classmethod
    def in_memory(cls, content: bytes | bytearray, name: str) -> Self:
        """Return an anonymous file with ``content``; ``name`` appears in messages."""
        with named_errors(name):
            fd = above_standard(lambda: os.memfd_create("imgcore", os.MFD_CLOEXEC))
            try:
                with open(fd, "wb", closefd=False) as writer:
                    writer.write(content)
            except BaseException:
                close(fd)
                raise
        return cls(fd, name, share=True, is_named=False)

    def _find_nbytes(self) -> int:
        if self.is_block_device:
            from imgcore.files.block_devices import device_nbytes

            with named_errors(self.path):
                return device_nbytes(self.fd)
        return self._status.st_size

    @property
    def folder(self) -> str | None:
        """The folder that names in the file start at, absolute.

        None if the file has no name here: it was given by its descriptor, or is in
        memory.
        """
        return None if self._absolute_path is None else os.path.dirname(self._absolute_path)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    @property
    def modified(self) -> int:
        """Unix seconds of the last change before the file was opened."""
        return int(self._status.st_mtime)

    @property
    def n_links(self) -> int:
        """Names (hard links) that the file has now."""
        return self.status().st_nlink

    def attribute(self, name: str) -> bytes:
        """Return an extended attribute; OSError if the file does not have it."""
        with self._in_use(), named_errors(self.path):
            return os.getxattr(self.fd, name)

    def tell_read(self, nbytes: int) -> None:
        """Call ``on_read``."""
        if self.on_read is not None:
            self.on_read(nbytes)

    def pread(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes; see `ByteSource.pread`."""
        self._check_range(offset, length)
        self.tell_read(length)
        nbytes = min(length, _MAX_READ_NBYTES)
        first = self._reading(lambda: os.pread(self.fd, nbytes, offset), offset, length)
        if len(first) == length:
            return first
        buffer = bytearray(length)
        buffer[: len(first)] = first
        self._fill(offset, memoryview(buffer), len(first))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: Any) -> None:
        """Fill a writable buffer with bytes from ``offset``; raises as `pread` does."""
        with memoryview(buffer) as view, view.cast("B") as octets:
            self._check_range(offset, len(octets))
            self.tell_read(len(octets))
            self._fill(offset, octets, 0)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0:
            raise ValueError(f"{self.path}: negative offset or length: {offset}, {length}")
        if length > self.nbytes or offset > self.nbytes - length:
            raise CorruptImageError(
                f"{length} bytes at 0x{offset:x} end at 0x{offset + length:x}, "
                f"past the end of the file (0x{self.nbytes:x})",
                path=self.path,
                offset=offset,
            )

    def _fill(self, offset: int, view: memoryview, done: int) -> None:
        while done < len(view):
            at = offset + done
            nbytes = self._read_some(at, view[done : done + _MAX_READ_NBYTES])
            if not nbytes:
                raise CorruptImageError(
                    f"the file became shorter while it was read: it ends at or before 0x{at:x}",
                    path=self.path,
                    offset=at,
                )
            done += nbytes

    def _read_some(self, offset: int, view: memoryview) -> int:
        return self._reading(lambda: os.preadv(self.fd, (view,), offset), offset, len(view))

    def _reading(self, read: Callable[[], Result], offset: int, length: int) -> Result:
        """Return what a read returns, with errors that name the file and the range."""
        try:
            with self._in_use():
                found = retrying(read, READ_ERRORS)
                if self._cache is not CacheMode.KEEP:
                    self.core.note_read(offset, length)
                return found
        except OSError as error:
            if error.errno is None:
                raise  # as `is_of_system`
            text = f"{os.strerror(error.errno)} (reading {length} bytes at 0x{offset:x})"
            raise OSError(error.errno, text, self.path) from error

    def next_data(self, position: int) -> tuple[int, int]:
        """Return (start, end) of the next data; see `ByteSource.next_data`."""
        self.tell_read(0)
        with self._in_use():
            if not self._is_ours:
                # The system finds holes by moving the position, which others use.
                return position, self.nbytes
            if not self._knows_holes:
                self._sync_holes()
                self._knows_holes = True
            with named_errors(self.path), system_errors():
                start, end = self.core.next_data(position)
            if start < end or self.is_block_device or self.status().st_size >= self.nbytes:
                return start, end
            return position, self.nbytes

    def _sync_holes(self) -> None:
        """Write back the file's data if its holes cannot be trusted before that.

        XFS can report a hole where a reflinked file has data that is not written back.
        """
        with contextlib.suppress(OSError):
            has_holes = self.allocated_nbytes < self.status().st_size
            if not self.is_block_device and has_holes and is_on_xfs(self.fd):
                os.fdatasync(self.fd)

    def check_unchanged(self) -> None:
        """Raise ImgcoreError after a change; see `ByteSource.check_unchanged`."""
        if self.share:
            return
        now = self.status()
        if self.is_block_device:
            with self._in_use():
                changed = None if self._find_nbytes() == self.nbytes else "size"
        elif now.st_size != self.nbytes:
            changed = "size"
        elif now.st_mtime_ns != self._status.st_mtime_ns:
            changed = "time of modification"
        else:
            changed = "inode" if self._is_replaced() else None
        if changed is not None:
            raise ImgcoreError(
                f"changed while it was read (its {changed}): the result cannot be trusted",
                path=self.path,
            )

    def _is_replaced(self) -> bool:
        if self._absolute_path is None:
            return False
        try:
            return file_identity(os.stat(self._absolute_path)) != self.identity
        except OSError:
            return False  # deleted or unreachable now, but the data read is complete

    def _free(self) -> None:
        # An interrupt may have come after the descriptor was closed.
        if self._image_lock is not None and self.fd >= 0:
            self._image_lock.end(self.fd)
        super()._free()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def may_lend_pages(file: object) -> bool:
    """Tell whether a pipe may hold a file's pages of the page cache instead of copies.

    Nobody else changes them then, and they may stay there meanwhile.
    """
    return isinstance(file, HostFile) and not file.share and file.keeps_cache


def stored_nbytes(files: Iterable[object]) -> int | None:
    """Return what files have stored; None if a stream is among them."""
    total = 0
    for file in files:
        if not isinstance(file, HostFile):
            return None
        # A block device has no blocks of its own.
        total += file.allocated_nbytes or file.nbytes
    return total


def use_page_cache(files: Iterable[object], mode: CacheMode, job_nbytes: int | None = None) -> None:
    """Set the mode of files that are read; streams have no page cache.

    The files are those of one job: it gets one warning.
    """
    if mode is CacheMode.KEEP:
        return
    files = list(files)
    nbytes = stored_nbytes(files) if job_nbytes is None else job_nbytes
    done = True
    for file in files:
        if isinstance(file, OpenFile):
            done = file.use_cache(mode, nbytes or 0, quiet=not done) and done
