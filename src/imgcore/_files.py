"""Files that are read: images named by the caller, and files named inside images.

A :class:`HostFile` is an open regular file or block device.  A :class:`ReferenceGate` opens
what an image names, and only below folders that the image may refer to.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
from typing import TYPE_CHECKING, Any, Final

from imgcore._retry import READ_ERRORS, patiently
from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    OptionError,
    UnsafeReferenceError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Self

    from imgcore._core import File

# (st_dev, st_ino) of a file, (BLOCK_DEVICE, st_rdev) of a block device.
Identity = tuple[int, int]
BLOCK_DEVICE: Final = -1

_OPEN_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY

# The kernel moves no more than this in one read.
_MAX_READ_NBYTES: Final = 0x7FFFF000

# Bytes that QEMU locks in an image (QEMU block/file-posix.c): 100 + p while it uses
# permission p, 200 + p while it does not tolerate p in others.
QEMU_WRITES: Final = 101
QEMU_DENIES_READING: Final = 200
QEMU_DENIES_WRITING: Final = 201

# From Linux include/uapi/asm-generic/fcntl.h; Python's fcntl lacks it before 3.9 and on some libcs.
_F_OFD_GETLK: Final[int] = getattr(fcntl, "F_OFD_GETLK", 36)
# struct flock with 64-bit offsets: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK: Final = struct.Struct("@hhqqi4x")


def file_identity(status: os.stat_result) -> Identity:
    """Return what tells a file from all others while it is open."""
    if stat.S_ISBLK(status.st_mode):
        return (BLOCK_DEVICE, status.st_rdev)
    return (status.st_dev, status.st_ino)


def same_file(a: Identity | None, b: Identity | None) -> bool:
    """Tell whether two identities are of one file; a file that does not exist is no other's."""
    return a is not None and a == b


def describe_file_type(mode: int) -> str:
    """Return what a ``st_mode`` is in words, for messages."""
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISBLK, "a block device"),
    ):
        if test(mode):
            return name
    return "a regular file"


def is_locked_by_other(fd: int, byte: int) -> bool:
    """Tell whether another open file holds a lock of any kind on one byte of the file."""
    request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, request)
    except OSError:
        return False  # a file system without locks: QEMU cannot hold one either
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


_XFS_SUPER_MAGIC: Final = 0x58465342  # Linux include/uapi/linux/magic.h


def is_on_xfs(fd: int) -> bool:
    """Tell whether an open file lies on XFS."""
    import ctypes

    # struct statfs is 120 bytes on 64-bit Linux and starts with f_type, a long.
    buffer = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None).fstatfs(fd, buffer) != 0:
        return False
    return ctypes.c_long.from_buffer(buffer).value == _XFS_SUPER_MAGIC


def folder_names(allow: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return allowed folders as the gate takes them; OptionError for a single one.

    A text is a sequence too, of characters, and ``/`` is a folder.
    """
    if isinstance(allow, str | bytes | os.PathLike):
        raise OptionError(f"allow is a sequence of folders, not {allow!r} alone")
    return [os.fspath(folder) for folder in allow]


class HostFile:
    """A file of the host, open for reading: a regular file or a block device.

    Attributes
    ----------
    path : str
        As given; stands in messages.
    fd : int
        The descriptor, owned by this object.
    nbytes : int
        The size when it was opened.
    is_block_device : bool
    identity : tuple of two ints
        Equal for two objects only if they are the same file.
    """

    def __init__(self, fd: int, path: str, *, share: bool = False, device: bool = True) -> None:
        """Take over an open descriptor; it is closed if the file is refused."""
        self.path = path
        self.fd = fd
        self._core: File | None = None
        self._share = share
        self._absolute_path = os.path.abspath(path)
        try:
            self._status = os.fstat(fd)
            _refuse_type(self._status.st_mode, path, device=device)
            self.is_block_device = stat.S_ISBLK(self._status.st_mode)
            self.identity = file_identity(self._status)
            self.nbytes = self._find_nbytes()
            if self.is_block_device and self.nbytes == 0:
                raise ImgcoreError("the block device has no medium (its size is 0)", path=path)
            # io_uring fails reads of what is not cached on a non-blocking file.
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
            if not share:
                self._refuse_lock()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, share: bool = False) -> Self:
        """Open a file that the caller names.

        Parameters
        ----------
        path : str or path-like
            A regular file or a block device, or a symbolic link to one.
        share : bool
            Do not mind that another process may be writing to the image.

        Raises
        ------
        OSError
            The system refuses.
        ImgcoreError
            It is neither a regular file nor a block device, or QEMU has it open for writing.

        Notes
        -----
        Does not hang, whatever the path names.
        """
        name = os.fspath(path)
        # Not even opened: that alone can wake a pipe's writer or rewind a tape.
        _refuse_type(os.stat(name).st_mode, name)
        return cls(os.open(name, _OPEN_FLAGS), name, share=share)

    def _find_nbytes(self) -> int:
        if self.is_block_device:
            return os.lseek(self.fd, 0, os.SEEK_END)
        return self._status.st_size

    def _refuse_lock(self) -> None:
        for byte in (QEMU_WRITES, QEMU_DENIES_READING):
            if is_locked_by_other(self.fd, byte):
                raise ImgcoreError(
                    "in use by another process that writes to it (QEMU's image lock); "
                    "-U reads it nevertheless",
                    path=self.path,
                )

    @property
    def modified(self) -> int:
        """Unix seconds of the last change before it was opened."""
        return int(self._status.st_mtime)

    @property
    def share(self) -> bool:
        """Whether another process may be writing to the file."""
        return self._share

    @property
    def core(self) -> File:
        """The file as the native core knows it."""
        if self._core is None:
            from imgcore._core import File

            self._core = File.from_fd(self.fd)
        return self._core

    def pread(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset`` on.

        Raises
        ------
        CorruptImageError
            The range does not lie inside the file; nothing was allocated for it.
        OSError
            The system cannot read it.
        """
        self._check_range(offset, length)
        first = self._read_some(offset, length)
        if len(first) == length:
            return first
        buffer = bytearray(length)
        buffer[: len(first)] = first
        self._fill(offset, memoryview(buffer), len(first))
        return bytes(buffer)

    def pread_into(self, offset: int, buffer: Any) -> None:
        """Fill a writable buffer with the bytes from ``offset`` on; errors as of `pread`."""
        with memoryview(buffer) as view, view.cast("B") as octets:
            self._check_range(offset, len(octets))
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
            piece = self._read_some(offset + done, len(view) - done)
            if not piece:
                raise CorruptImageError(
                    f"the file became shorter while it was read: it ends at or before "
                    f"0x{offset + done:x}",
                    path=self.path,
                    offset=offset + done,
                )
            view[done : done + len(piece)] = piece
            done += len(piece)

    def _read_some(self, offset: int, length: int) -> bytes:
        try:
            nbytes = min(length, _MAX_READ_NBYTES)
            return patiently(lambda: os.pread(self.fd, nbytes, offset), READ_ERRORS)
        except OSError as error:
            text = f"{os.strerror(error.errno or 0)} (reading {length} bytes at 0x{offset:x})"
            raise OSError(error.errno, text, self.path) from error

    def next_data(self, position: int) -> tuple[int, int]:
        """Return [start, end) of the next data at or after a place, ``start >= end`` for none.

        What a file has lost since it was opened counts as data: reading it has to fail, where
        a hole would read as zeros.
        """
        start, end = self.core.next_data(position)
        if start < end or self.is_block_device or os.fstat(self.fd).st_size >= self.nbytes:
            return start, end
        return position, self.nbytes

    def check_unchanged(self) -> None:
        """Raise ImgcoreError if the file has changed since it was opened.

        Size and time of modification are compared, and whether the name still is this file's;
        of a block device only the size.  A shared file may change.
        """
        if self._share:
            return
        now = os.fstat(self.fd)
        if self.is_block_device:
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
        try:
            return file_identity(os.stat(self._absolute_path)) != self.identity
        except OSError:
            return False  # deleted or out of reach now: what was read is whole

    def close(self) -> None:
        """Close the descriptor; more than once is allowed."""
        core, self._core = self._core, None
        if core is not None:
            core.close()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _refuse_type(mode: int, path: str, *, device: bool = True) -> None:
    if stat.S_ISREG(mode) or (device and stat.S_ISBLK(mode)):
        return
    allowed = "a regular file or a block device" if device else "a regular file"
    raise ImgcoreError(f"is {describe_file_type(mode)}, not {allowed}", path=path)


class ReferenceGate:
    """Opens files that are named inside an image, below permitted folders only.

    Parameters
    ----------
    folder : str
        The image's own folder; relative names start here.
    allowed : sequence of str
        More folders, by the caller's word.  Block devices are opened only below these.
    share : bool
        What `open` does if it is not told: as in `HostFile.open`.

    Notes
    -----
    The kernel itself keeps the way below the folder (``openat2`` with ``RESOLVE_BENEATH``), so
    a name swapped for a symbolic link in the meantime leads nowhere.  Where there is no
    ``openat2``, each component is opened by itself and symbolic links are refused.
    """

    def __init__(self, folder: str, allowed: Sequence[str] = (), *, share: bool = False) -> None:
        self.share = share
        self.folder = os.path.abspath(folder or ".")
        self.allowed = tuple(os.path.abspath(name) for name in allowed)
        for name in self.allowed:
            if not os.path.isdir(name):
                raise OptionError(f"{name}: the allowed folder does not exist or is no folder")
        self._inherited: tuple[str, ...] = ()

    def beside(self, file: HostFile) -> ReferenceGate:
        """Return the gate for a file that came through this one: its folder, and this gate's."""
        gate = ReferenceGate(os.path.dirname(file.path), self.allowed, share=self.share)
        gate._inherited = (self.folder, *self._inherited)
        return gate

    def open(self, name: str, *, share: bool | None = None) -> HostFile:
        """Open a file by the name that an image gives for it.

        Parameters
        ----------
        name : str
            A file name, absolute or relative to the image's folder, nothing else; bytes that
            are not UTF-8 as ``os.fsdecode`` gives them.
        share : bool, optional
            As in `HostFile.open`; the gate's own by default.

        Raises
        ------
        UnsafeReferenceError
            The name is no file name, or leads out of the permitted folders.
        OSError
            The system refuses; also if there is no such file.
        """
        self._refuse_syntax(name)
        path = os.path.normpath(os.path.join(self.folder, name))
        try:
            fd, device = self._open_beneath(path)
        except _OutsideError:
            fd, device = self._open_elsewhere(name, path)
        sharing = self.share if share is None else share
        return HostFile(fd, path, share=sharing, device=device)

    def _open_elsewhere(self, name: str, path: str) -> tuple[int, bool]:
        """Open what an absolute link leads to, if that is a permitted folder, in the same way."""
        try:
            return self._open_beneath(os.path.realpath(path))
        except _OutsideError:
            raise self._outside(name, path) from None
        except OSError as error:
            # The link may have become something else meanwhile, and realpath stumbled.
            raise OSError(error.errno, os.strerror(error.errno or 0), path) from error

    def _refuse_syntax(self, name: str) -> None:
        problem = None
        if not name:
            problem = "is empty"
        elif "\0" in name:
            problem = "holds a NUL"
        elif name[:5].lower() == "json:":
            problem = "is a json: description"
        elif re.match(r"[A-Za-z]:", name):
            problem = "starts with a drive letter"
        elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", name):
            problem = "is a URL or names a protocol"
        else:
            try:
                os.fsencode(name)
            except UnicodeEncodeError:
                problem = "is not encodable"
        if problem is not None:
            raise UnsafeReferenceError(
                f"the image in {self.folder} refers to {name[:200]!r}, which {problem}; "
                "only file names are followed"
            )

    def _outside(self, name: str, path: str) -> UnsafeReferenceError:
        return UnsafeReferenceError(
            f"the image in {self.folder} refers to {name[:200]!r}, which leads out of that folder; "
            f"--allow {os.path.dirname(path)} permits it (allow=[...] in Python)"
        )

    def _open_beneath(self, path: str) -> tuple[int, bool]:
        """Open an absolute, normal path below the first permitted folder that holds it."""
        for folder, device in self._folders():
            rest = _below(path, folder)
            if rest is None:
                continue
            fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return open_beneath(fd, rest, path), device
            finally:
                os.close(fd)
        raise _OutsideError

    def _folders(self) -> list[tuple[str, bool]]:
        """Return permitted folders, each also without the links on the way to it."""
        # Allowed ones first: they permit more.
        pairs = [(folder, True) for folder in self.allowed]
        pairs += [(folder, False) for folder in (self.folder, *self._inherited)]
        return pairs + [(os.path.realpath(folder), device) for folder, device in pairs]


class _OutsideError(Exception):
    """The way leaves the folder."""


def _below(path: str, folder: str) -> str | None:
    """Return ``path`` relative to ``folder``, or None if it does not lie below by its name."""
    prefix = folder if folder.endswith("/") else folder + "/"
    return path[len(prefix) :] if path.startswith(prefix) and len(path) > len(prefix) else None


def open_beneath(folder_fd: int, rest: str, path: str) -> int:
    """Open a relative name for reading without ever leaving a folder; ``path`` is for messages."""
    fd = _openat2_beneath(folder_fd, rest, path)
    return _walk_beneath(folder_fd, rest, path) if fd is None else fd


# Linux include/uapi/linux/openat2.h.
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_BENEATH: Final = 0x08
# Only these machines are known to number the call so (all newer ones do).
_SYS_OPENAT2: Final = {"x86_64": 437, "aarch64": 437}


def _openat2_beneath(folder_fd: int, rest: str, path: str) -> int | None:
    """Open by openat2; None if the kernel or its guards do not know the call."""
    number = _SYS_OPENAT2.get(os.uname().machine)
    if number is None:
        return None
    import ctypes

    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    how = struct.pack("@QQQ", _OPEN_FLAGS, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
    for _ in range(32):
        fd = syscall(
            ctypes.c_long(number),
            ctypes.c_long(folder_fd),
            ctypes.c_char_p(os.fsencode(rest)),
            ctypes.c_char_p(how),
            ctypes.c_long(len(how)),
        )
        if fd >= 0:
            return int(fd)
        code = ctypes.get_errno()
        # EAGAIN: something was renamed on the way, so the kernel cannot be sure.
        if code not in (errno.EAGAIN, errno.EINTR):
            break
    if code in (errno.ENOSYS, errno.EPERM):
        return None
    if code == errno.EXDEV:
        raise _OutsideError
    raise OSError(code, os.strerror(code), path)


def _walk_beneath(folder_fd: int, rest: str, path: str) -> int:
    """Open component by component, following no link."""
    *folders, last = rest.split("/")
    fd = os.dup(folder_fd)
    try:
        for component in folders:
            next_fd = _step(fd, component, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, path)
            os.close(fd)
            fd = next_fd
        return _step(fd, last, _OPEN_FLAGS, path)
    finally:
        os.close(fd)


def _step(folder_fd: int, component: str, flags: int, path: str) -> int:
    if component in ("", ".", ".."):
        raise _OutsideError
    try:
        return os.open(component, flags | os.O_NOFOLLOW, dir_fd=folder_fd)
    except OSError as error:
        # ELOOP is a link in the last place, ENOTDIR may be one in the place of a folder.
        if error.errno == errno.ELOOP or _is_link(component, folder_fd):
            raise _OutsideError from None
        raise OSError(error.errno, os.strerror(error.errno or 0), path) from error


def _is_link(component: str, folder_fd: int) -> bool:
    try:
        status = os.stat(component, dir_fd=folder_fd, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISLNK(status.st_mode)
