"""The reference gate: opens files named in images, below permitted folders only."""

from __future__ import annotations

import errno
import os
import re
import stat
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore.border import FilePath, file_name
from imgcore.errors import (
    ImgcoreError,
    OptionError,
    UnsafeReferenceError,
)
from imgcore.files.descriptors import (
    above_standard,
    close,
    duplicate,
    forks_held_back,
    named_errors,
    open_file,
)
from imgcore.files.given import OPEN_FLAGS
from imgcore.files.given_files import NO_FILES, GivenFiles
from imgcore.files.host_file import HostFile
from imgcore.files.update_file import UPDATE_FLAGS, UpdateFile

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def folder_names(allow: Iterable[FilePath]) -> list[str]:
    """Return the names of allowed folders.

    OptionError for a lone str, since iterating over it would allow ``/``, and for an
    empty name, which would allow the working folder.
    """
    if isinstance(allow, str | bytes | os.PathLike):
        raise OptionError(f"allow is a sequence of folders, not {allow!r} alone")
    names = [file_name(folder) for folder in allow]
    if "" in names:
        raise OptionError("the name of an allowed folder is empty; . is the working folder")
    return names


class ReferenceGate:
    """Opens files that are named inside an image, below permitted folders only.

    Parameters
    ----------
    folder : str or None
        The image's own folder; relative names start here.  The image has none if it was
        given by its descriptor; they start at the allowed folders then.
    allowed : sequence of str
        Further folders that the caller allows.  Block devices are opened only below
        these.
    share : bool
        The default of `open`; as in `HostFile.open`.
    image : str, optional
        The image, for messages.
    unstated : str
        If not empty, nothing is opened, because the user has not stated the image's
        format; the option that states it, for messages.
    files : GivenFiles
        Files that are used in the place of those with their names.
    writable : bool
        Whether the image's own files, but not its parent, are written in place.

    Notes
    -----
    Paths are resolved with ``openat2(RESOLVE_BENEATH)``, so nothing can change between
    check and open.  Without ``openat2``, components are opened one by one and symbolic
    links are rejected.
    """

    def __init__(
        self,
        folder: str | None,
        allowed: Sequence[str] = (),
        *,
        share: bool = False,
        image: str | None = None,
        unstated: str = "",
        files: GivenFiles = NO_FILES,
        writable: bool = False,
    ) -> None:
        self.share = share
        self.writable = writable
        self.folder: str | None = None if folder is None else os.path.abspath(folder or ".")
        self.image: str = image or self.folder or ""
        self.unstated: str = unstated
        self.files = files
        self.allowed: tuple[str, ...] = tuple(os.path.abspath(name) for name in allowed)
        for name in self.allowed:
            if not os.path.isdir(name):
                raise OptionError(f"{name}: the allowed folder does not exist or is not a folder")
        self._inherited: tuple[str, ...] = ()

    def beside(self, file: HostFile) -> ReferenceGate:
        """Return the gate for references inside a file that this gate opened.

        It permits the file's folder and all folders of this gate.
        """
        gate = ReferenceGate(
            file.folder, self.allowed, share=self.share, image=file.path, files=self.files
        )
        own = () if self.folder is None else (self.folder,)
        gate._inherited = (*own, *self._inherited)
        return gate

    def open(
        self, name: str, *, share: bool | None = None, role: str = "file", remedy: str = ""
    ) -> HostFile:
        """Open a file by the name that an image gives for it.

        Parameters
        ----------
        name : str
            A file name, absolute or relative to the image's folder; bytes that are not
            UTF-8 as ``os.fsdecode`` returns them.
        share : bool, optional
            As in `HostFile.open`; by default as the gate was created.
        role : str
            What the file is to the image, such as ``parent``; for messages.
        remedy : str
            What to do if there is no such file; for messages.

        Raises
        ------
        UnsafeReferenceError
            The name is not a file name, or leads out of the permitted folders.
        OSError
            The file does not exist, or the system cannot open it.
        """
        sharing = self.share if share is None else share
        writable = self.writable and role != "parent"
        given = self.files.find(name, image=self.image, role=role, share=sharing, writable=writable)
        if given is not None:
            return given
        if self.unstated:
            raise UnsafeReferenceError(
                f"names {name[:200]!r} as its {role}, which is not opened, because only the "
                f"content says what the image is: state its format ({self.unstated})",
                path=self.image,
            )
        reference = _Reference(self.image, name, role, remedy)
        reference.refuse_syntax()
        path = self._path_of(reference)
        held = self.files.again(path)
        if held is not None:
            return held
        flags = UPDATE_FLAGS if writable else OPEN_FLAGS
        try:
            with forks_held_back():
                try:
                    fd, device = self._open_beneath(path, flags)
                except _OutsideError:
                    fd, device = self._open_elsewhere(reference, path, flags)
                if not writable:
                    return HostFile(fd, path, share=sharing, device=device)
                file = UpdateFile(fd, path, device=device)
            return file.locked()
        except OSError as error:
            text = f"{error.strerror} ({reference.told(None if writable else error.errno)})"
            raise OSError(error.errno, text, path) from error
        except UnsafeReferenceError:
            raise
        except ImgcoreError as error:
            text = f"{error.reason} ({reference.told()})"
            raise type(error)(text, path=error.path, offset=error.offset) from error

    def is_foreign(self, name: str) -> bool:
        """Tell whether a name is a path of another host: it leads to no file here."""
        if _DRIVE.match(name):
            return True
        if "\0" in name or PROTOCOL.match(name):
            return False
        return not any(os.path.lexists(path) for path in self._paths(name))

    def _paths(self, name: str) -> list[str]:
        """Return the paths of a name, one for each folder where it may start."""
        folders = self.allowed if self.folder is None else (self.folder,)
        if os.path.isabs(name):
            folders = ("/",)
        return [os.path.normpath(os.path.join(folder, name)) for folder in folders]

    def _path_of(self, reference: _Reference) -> str:
        paths = self._paths(reference.name)
        if not paths:
            raise reference.without_folder()
        return next((path for path in paths if os.path.lexists(path)), paths[0])

    def _open_elsewhere(self, reference: _Reference, path: str, flags: int) -> tuple[int, bool]:
        """Open the file that a link leads to, if its folder is permitted."""
        # realpath fails if the link was replaced meanwhile.
        actual = os.path.realpath(path)
        try:
            return self._open_beneath(actual, flags)
        except _OutsideError:
            raise reference.outside(actual) from None

    def _open_beneath(self, path: str, flags: int) -> tuple[int, bool]:
        """Open an absolute, normal path below the first permitted folder."""
        for folder, device in self._folders():
            rest = _below(path, folder)
            if rest is None:
                continue
            fd = open_file(folder, os.O_PATH | os.O_DIRECTORY)
            try:
                with named_errors(path):
                    return open_beneath(fd, rest, path, flags), device
            finally:
                close(fd)
        raise _OutsideError

    def _folders(self) -> list[tuple[str, bool]]:
        """Return (folder, whether devices are permitted), also with links resolved."""
        # Allowed folders come first: they permit devices.
        pairs = [(folder, True) for folder in self.allowed]
        own = () if self.folder is None else (self.folder,)
        pairs += [(folder, False) for folder in (*own, *self._inherited)]
        return pairs + [(os.path.realpath(folder), device) for folder, device in pairs]


class _OutsideError(Exception):
    """The path leads out of the folder."""


class _Reference(NamedTuple):
    """A file that an image names, for messages."""

    image: str
    name: str
    role: str
    remedy: str

    def told(self, code: int | None = None) -> str:
        """Return which image names the file, and what to do."""
        remedy = _REMEDIES.get(code or 0, self.remedy)
        return f"the {self.role} of {self.image}" + (f"; {remedy}" if remedy else "")

    def refuse_syntax(self) -> None:
        """Raise UnsafeReferenceError if the name is not that of a file."""
        name, problem = self.name, None
        if not name:
            problem = "is empty"
        elif "\0" in name:
            problem = "holds a NUL"
        elif name[:5].lower() == "json:":
            problem = "is a json: description"
        elif _DRIVE.match(name):
            problem = "starts with a drive letter"
        elif PROTOCOL.match(name):
            problem = "is a URL or names a protocol"
        else:
            try:
                os.fsencode(name)
            except UnicodeEncodeError:
                problem = "is not encodable"
        if problem is not None:
            text = self._refused(problem, "only file names are followed")
            raise UnsafeReferenceError(text, path=self.image)

    def without_folder(self) -> UnsafeReferenceError:
        """Return the error for a relative name in an image that has no folder."""
        return UnsafeReferenceError(
            f"names {self.name[:200]!r} as its {self.role}, and has no folder, because it was "
            "given by its descriptor: give that file by files={...}, or its folder by allow=[...]",
            path=self.image,
        )

    def outside(self, path: str) -> UnsafeReferenceError:
        """Return the error for a path that leads out of the permitted folders."""
        if not os.path.lexists(path):
            text = self._refused("leads out of its folder", "there is no such file here")
            return UnsafeReferenceError(text, path=self.image)
        return UnsafeReferenceError(
            f"names {self.name[:200]!r} as its {self.role}, which leads out of its folder; "
            f"--allow {os.path.dirname(path)} permits it (allow=[...] in Python)",
            path=self.image,
        )

    def _refused(self, problem: str, why: str) -> str:
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"names {self.name[:200]!r} as its {self.role}, which {problem}: {why}{remedy}"


_DRIVE: Final = re.compile(r"[A-Za-z]:")
# A URL (nbd://host) or a protocol of QEMU (rbd:pool/disk).
PROTOCOL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")

# What to do about errors that neither another name nor a copy avoids.
_REMEDIES: Final = {
    errno.EACCES: "make it and its folders readable",
    errno.EPERM: "make it and its folders readable",
    errno.EMFILE: "",
}


def _below(path: str, folder: str) -> str | None:
    """Return ``path`` relative to ``folder``, None if its name is not below it."""
    prefix = folder if folder.endswith("/") else folder + "/"
    return path[len(prefix) :] if path.startswith(prefix) and len(path) > len(prefix) else None


def open_beneath(folder_fd: int, rest: str, path: str, flags: int = OPEN_FLAGS) -> int:
    """Open a relative name, by default for reading, only below a folder.

    ``path`` is the name in messages.
    """
    fd = _openat2_beneath(folder_fd, rest, path, flags)
    return _walk_beneath(folder_fd, rest, path, flags) if fd is None else fd


# Linux include/uapi/linux/openat2.h.
_RESOLVE_NO_MAGICLINKS: Final = 0x02
_RESOLVE_BENEATH: Final = 0x08

# The call's number on the machines that are tested.
_SYS_OPENAT2: Final = {"x86_64": 437, "aarch64": 437}


def _openat2_beneath(folder_fd: int, rest: str, path: str, flags: int) -> int | None:
    """Open with openat2; None if the kernel or a seccomp filter lacks the call."""
    number = _SYS_OPENAT2.get(os.uname().machine)
    if number is None:
        return None
    import ctypes

    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long
    how = struct.pack("@QQQ", flags, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)

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


def _walk_beneath(folder_fd: int, rest: str, path: str, flags: int) -> int:
    """Open component by component, without following links."""
    *folders, last = rest.split("/")
    fd = duplicate(folder_fd)
    try:
        for component in folders:
            next_fd = _step(fd, component, os.O_PATH | os.O_DIRECTORY, path)
            close(fd)
            fd = next_fd
        return _step(fd, last, flags, path)
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
