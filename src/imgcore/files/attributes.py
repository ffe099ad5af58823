"""Attributes that a file keeps when a new one takes its place.

Keeping them is a courtesy: file systems such as FAT, NTFS and CIFS refuse some of them,
and that is a warning, never an error.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final

from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Callable

    from imgcore.files.host_file import HostFile, OpenFile

_PERMISSIONS: Final = 0o777
_ACL: Final = "system.posix_acl_access"
# These are about a file's content: signatures, and what a program may do.
_OF_CONTENT: Final = frozenset({"security.ima", "security.evm", "security.capability"})

# Linux include/uapi/linux/fs.h: struct fsxattr, FS_IOC_FSGETXATTR and FSSETXATTR.
_FSXATTR: Final = struct.Struct("@IIIII8x")
_FSXATTR_PROJECT: Final = 3
_FS_IOC_FSGETXATTR: Final = 0x801C581F
_FS_IOC_FSSETXATTR: Final = 0x401C5820


def keep_attributes(old_fd: int, old: os.stat_result, new: OpenFile) -> None:
    """Give a new file the owner, mode, extended attributes and project of an old one.

    Parameters
    ----------
    old_fd : int
        The old file; -1 if it cannot be opened.
    old : os.stat_result
        Its status.
    new : OpenFile
        The file that will take its place; warnings have its name.
    """
    _keep_owner(old, new)
    if old_fd >= 0:
        _keep_extended(old_fd, new)
        _keep_project(old_fd, new)
    # Last, since an ACL has its own permissions for the group.
    _keep_mode(old, new)


def copy_attributes(file: HostFile, new: OpenFile) -> None:
    """Give a copy what only copies keep: the times, which children may have recorded.

    Targets keep everything else anyway.
    """
    old = file.status()
    times = old.st_atime_ns, old.st_mtime_ns
    _attempt(new, "times", lambda: os.utime(new.fd, ns=times))


def _attempt(new: OpenFile, what: str, change: Callable[[], object]) -> bool:
    """Change an attribute; a failure is a warning."""
    try:
        change()
    except OSError as error:
        if error.errno is None:
            raise  # not the system's: what a signal handler raises
        log.warning("%s: its %s could not be kept: %s", new.path, what, os.strerror(error.errno))
        return False
    return True


def _keep_owner(old: os.stat_result, new: OpenFile) -> None:
    own = os.fstat(new.fd)
    if (own.st_uid, own.st_gid) == (old.st_uid, old.st_gid):
        return
    with contextlib.suppress(OSError):
        os.fchown(new.fd, old.st_uid, old.st_gid)
        return
    # Only root may give files away, but a member of the group may keep the group.
    if own.st_gid != old.st_gid:
        _attempt(new, f"group {old.st_gid}", lambda: os.fchown(new.fd, -1, old.st_gid))
    if own.st_uid != old.st_uid:
        _attempt(new, f"owner {old.st_uid}", lambda: os.fchown(new.fd, old.st_uid, -1))


def _keep_mode(old: os.stat_result, new: OpenFile) -> None:
    own = os.fstat(new.fd)
    wanted = old.st_mode & _PERMISSIONS
    if own.st_gid != old.st_gid:
        # What one group was allowed, another one must not inherit.
        wanted = wanted & ~0o070 | (wanted & 0o007) << 3
    if own.st_mode & _PERMISSIONS != wanted:
        _attempt(new, f"mode {wanted:04o}", lambda: os.fchmod(new.fd, wanted))


def _keep_extended(old_fd: int, new: OpenFile) -> None:
    """Copy ACL, security labels and the user's own attributes."""
    wanted, present = _extended(old_fd), _extended(new.fd)
    if _ACL in present and _ACL not in wanted:
        # The folder's default ACL would allow more than the old file did.
        _attempt(new, "mode", lambda: os.removexattr(new.fd, _ACL))
    for name, value in wanted.items():
        if present.get(name) != value:
            _keep_one(new, name, value)


def _keep_one(new: OpenFile, name: str, value: bytes) -> None:
    _attempt(new, f"extended attribute {name}", lambda: os.setxattr(new.fd, name, value))


def _extended(fd: int) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with contextlib.suppress(OSError):  # a file system without them
        for name in os.listxattr(fd):
            if name not in _OF_CONTENT:
                with contextlib.suppress(OSError):
                    found[name] = os.getxattr(fd, name)
    return found


def _keep_project(old_fd: int, new: OpenFile) -> None:
    """Keep the number of the project, to which quotas apply."""
    try:
        wanted = _FSXATTR.unpack(_project_record(old_fd))[_FSXATTR_PROJECT]
        record = list(_FSXATTR.unpack(_project_record(new.fd)))
    except OSError:
        return  # a file system without projects
    if record[_FSXATTR_PROJECT] == wanted:
        return
    record[_FSXATTR_PROJECT] = wanted
    packed = _FSXATTR.pack(*record)
    _attempt(new, f"project {wanted}", lambda: fcntl.ioctl(new.fd, _FS_IOC_FSSETXATTR, packed))


def _project_record(fd: int) -> bytes:
    return fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size))
