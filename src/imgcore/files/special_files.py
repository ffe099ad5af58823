"""Names that a new file must never replace, not even with ``force``.

`/dev/stdout` is a link through /proc to whatever stdout is; to replace it would break
the machine for all programs, and root could.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Final

from imgcore.errors import TargetError
from imgcore.files.descriptors import close, open_file
from imgcore.files.identity import describe_file_type, file_system_magic

if TYPE_CHECKING:
    from collections.abc import Iterator

# Linux include/uapi/linux/magic.h: proc, sysfs, debugfs, tracefs, cgroup, cgroup2,
# securityfs, configfs.
_KERNEL_MAGICS: Final = frozenset(
    {
        0x9FA0,
        0x62656572,
        0x64626720,
        0x74726163,
        0x27E0EB,
        0x63677270,
        0x73636673,
        0x62656570,
    }
)
_DEVICE_FOLDERS: Final = ("/dev/", "/proc/", "/sys/")
_ORDINARY_FOLDERS: Final = ("/dev/shm/",)

# As many links as Linux follows (Linux fs/namei.c, MAXSYMLINKS).
_MAX_LINKS: Final = 40


def refuse_special(path: str, link: os.stat_result, end: os.stat_result | None) -> None:
    """Raise TargetError for anything but regular files and links to such.

    Parameters
    ----------
    path : str
        The target's name.
    link, end : os.stat_result
        Status of the name, and of what it leads to; None if that does not exist.
    """
    if not stat.S_ISLNK(link.st_mode):
        if not stat.S_ISREG(link.st_mode):
            kind = describe_file_type(link.st_mode)
            raise TargetError(f"is {kind}, not a regular file or a block device", path=path)
    elif end is not None and not stat.S_ISREG(end.st_mode):
        kind = describe_file_type(end.st_mode)
        raise TargetError(
            f"is a symbolic link to {kind}, not to a regular file or a block device", path=path
        )
    hops = list(_hops(path))
    if len(hops) > _MAX_LINKS:
        raise TargetError("is a symbolic link that leads to itself", path=path)
    for hop in hops:
        if _is_of_kernel(hop) or (end is None and _is_below_devices(hop)):
            what = "is" if hop == path else f"is a symbolic link to {hop},"
            raise TargetError(f"{what} no ordinary file, and is never a target", path=path)


def refuse_absent_device(path: str) -> None:
    """Raise TargetError if a new file would take the place of a device node.

    A misspelt name of a device would otherwise fill the memory behind /dev.
    """
    if _is_below_devices(path):
        raise TargetError("there is no such device, and no file is created here", path=path)


def _hops(path: str) -> Iterator[str]:
    """Yield a name, and each name that a link leads to, more than 40 for a loop."""
    for _ in range(_MAX_LINKS + 1):
        yield path
        try:
            path = os.path.join(os.path.dirname(path), os.readlink(path))
        except OSError:
            return


def _is_of_kernel(path: str) -> bool:
    """Tell whether a name is in a file system that shows the kernel's state."""
    with contextlib.suppress(OSError):
        fd = open_file(path, os.O_PATH | os.O_NOFOLLOW)
        try:
            return file_system_magic(fd) in _KERNEL_MAGICS
        finally:
            close(fd)
    return False


def _is_below_devices(path: str) -> bool:
    """Tell whether a name is where device nodes are: one may be absent just now."""
    folder, name = os.path.split(path)
    place = os.path.join(os.path.realpath(folder), name)
    return place.startswith(_DEVICE_FOLDERS) and not place.startswith(_ORDINARY_FOLDERS)
