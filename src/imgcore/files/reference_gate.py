"""The reference gate: opens files named in images, below permitted folders only."""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from typing import TYPE_CHECKING, Final

from imgcore.errors import (
    OptionError,
    UnsafeReferenceError,
)
from imgcore.files.descriptors import (
    above_standard,
    close,
    duplicate,
    named_errors,
    open_file,
)
from imgcore.files.host_file import OPEN_FLAGS, HostFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from imgcore.files.byte_source import ByteSource


def folder_names(allow: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return the names of allowed folders.

    A lone str is rejected with OptionError: iterating over it would allow ``/``.
    """
    if isinstance(allow, str | bytes | os.PathLike):
        raise OptionError(f"allow is a sequence of folders, not {allow!r} alone")
    return [os.fspath(folder) for folder in allow]


class ReferenceGate:
    """Opens files that are named inside an image, below permitted folders only.

    Parameters
    ----------
    folder : str
        The image's own folder; relative names start here.
    allowed : sequence of str
        Further folders that the caller allows.  Block devices are opened only below
        these.
    share : bool
        The default of `open`; as in `HostFile.open`.

    Notes
    -----
    Paths are resolved with ``openat2(RESOLVE_BENEATH)``, so nothing can change between
    check and open.  Without ``openat2``, components are opened one by one and symbolic
    links are rejected.
    """

    def __init__(self, folder: str, allowed: Sequence[str] = (), *, share: bool = False) -> None:
        self.share = share
        self.folder = os.path.abspath(folder or ".")
        self.allowed = tuple(os.path.abspath(name) for name in allowed)
        for name in self.allowed:
            if not os.path.isdir(name):
                raise OptionError(f"{name}: the allowed folder does not exist or is not a folder")
        self._inherited: tuple[str, ...] = ()

    def beside(self, file: ByteSource) -> ReferenceGate:
        """Return the gate for references inside a file that this gate opened.

        It permits the file's folder and all folders of this gate.
        """
        gate = ReferenceGate(os.path.dirname(file.path), self.allowed, share=self.share)
        gate._inherited = (self.folder, *self._inherited)
        return gate

    def open(self, name: str, *, share: bool | None = None) -> HostFile:
        """Open a file by the name that an image gives for it.

        Parameters
        ----------
        name : str
            A file name, absolute or relative to the image's folder; bytes that are not
            UTF-8 as ``os.fsdecode`` returns them.
        share : bool, optional
            As in `HostFile.open`; by default as the gate was created.

        Raises
        ------
        UnsafeReferenceError
            The name is not a file name, or leads out of the permitted folders.
        OSError
            The file does not exist, or the system cannot open it.
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
        """Open the file that a link leads to, if its folder is permitted."""
        try:
            return self._open_beneath(os.path.realpath(path))
        except _OutsideError:
            raise self._outside(name, path) from None
        except OSError as error:
            # realpath fails if the link was replaced meanwhile.
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
        """Open an absolute, normal path below the first permitted folder."""
        for folder, device in self._folders():
            rest = _below(path, folder)
            if rest is None:
                continue
            fd = open_file(folder, os.O_PATH | os.O_DIRECTORY)
            try:
                with named_errors(path):
                    return open_beneath(fd, rest, path), device
            finally:
                close(fd)
        raise _OutsideError

    def _folders(self) -> list[tuple[str, bool]]:
        """Return (folder, whether devices are permitted), also with links resolved."""
        # Allowed folders come first: they permit devices.
        pairs = [(folder, True) for folder in self.allowed]
        pairs += [(folder, False) for folder in (self.folder, *self._inherited)]
        return pairs + [(os.path.realpath(folder), device) for folder, device in pairs]


class _OutsideError(Exception):
    """The path leads out of the folder."""


def _below(path: str, folder: str) -> str | None:
    """Return ``path`` relative to ``folder``, None if its name is not below it."""
    prefix = folder if folder.endswith("/") else folder + "/"
    return path[len(prefix) :] if path.startswith(prefix) and len(path) > len(prefix) else None


def open_beneath(folder_fd: int, rest: str, path: str) -> int:
    """Open a relative name for reading, only below a folder.

    ``path`` is the name in messages.
    """
    fd = _openat2_beneath(folder_fd, rest, path)
    return _walk_beneath(folder_fd, rest, path) if fd is None else fd


# Linux include/uapi/linux/openat2.h.
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_BENEATH: Final = 0x08

# The call's number on the machines that are tested.
_SYS_OPENAT2: Final = {"x86_64": 437, "aarch64": 437}


def _openat2_beneath(folder_fd: int, rest: str, path: str) -> int | None:
    """Open with openat2; None if the kernel or a seccomp filter lacks the call."""
    number = _SYS_OPENAT2.get(os.uname().machine)
    if number is None:
        return None
    import ctypes

    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    how = struct.pack("@QQQ", OPEN_FLAGS, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)

    def call() -> int:
        fd = syscall(
            ctypes.c_long(number),
            ctypes.c_long(folder_fd),
            ctypes.c_char_p(os.fsencode(rest)),
            ctypes.c_char_p(how),
            ctypes.c_long(len(how)),
        )
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)
        return int(fd)

    for _ in range(32):
        try:
            return above_standard(call)
        except OSError as error:
            code = error.errno or 0
        # EAGAIN: a component was renamed meanwhile, so the kernel cannot be sure.
        if code not in (errno.EAGAIN, errno.EINTR):
            break
    if code in (errno.ENOSYS, errno.EPERM):
        return None
    if code == errno.EXDEV:
        raise _OutsideError
    raise OSError(code, os.strerror(code), path)


def _walk_beneath(folder_fd: int, rest: str, path: str) -> int:
    """Open component by component, without following links."""
    *folders, last = rest.split("/")
    fd = duplicate(folder_fd)
    try:
        for component in folders:
            next_fd = _step(fd, component, os.O_PATH | os.O_DIRECTORY, path)
            close(fd)
            fd = next_fd
        return _step(fd, last, OPEN_FLAGS, path)
    finally:
        close(fd)


def _step(folder_fd: int, component: str, flags: int, path: str) -> int:
    if component in ("", ".", ".."):
        raise _OutsideError
    try:
        return open_file(component, flags | os.O_NOFOLLOW, folder_fd=folder_fd, name=path)
    except OSError as error:
        # ELOOP: the last component is a link.  ENOTDIR: a folder may be a link.
        if error.errno == errno.ELOOP or _is_link(component, folder_fd):
            raise _OutsideError from None
        raise


def _is_link(component: str, folder_fd: int) -> bool:
    try:
        status = os.stat(component, dir_fd=folder_fd, follow_symlinks=False)
    except OSError:
        return False
    return stat.S_ISLNK(status.st_mode)
