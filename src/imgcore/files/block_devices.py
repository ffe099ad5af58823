"""Facts about block devices that the kernel states."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sys
from typing import TYPE_CHECKING, Final

from imgcore.files.descriptors import open_file
from imgcore.files.identity import BLOCK_DEVICE, Identity, file_identity

if TYPE_CHECKING:
    from collections.abc import Iterator

# Linux include/uapi/linux/fs.h.
_BLKROGET: Final = 0x125E
_BLKSSZGET: Final = 0x1268
_BLKGETSIZE64: Final = 0x80081272

_SYSFS: Final = "/sys/dev/block"


def logical_sector_nbytes(fd: int) -> int:
    """Return the bytes of an open device's logical sector."""
    return _number(fd, _BLKSSZGET)


def device_nbytes(fd: int) -> int:
    """Return the bytes of an open device; its position does not move."""
    return _number(fd, _BLKGETSIZE64, 8)


def refuse_read_only(fd: int, path: str) -> None:
    """Raise OSError if an open device cannot be written to.

    The kernel opens it for writing all the same, and fails the first write.
    """
    if _number(fd, _BLKROGET):
        raise OSError(errno.EROFS, "The block device is read-only", path)


def _number(fd: int, request: int, n_octets: int = 4) -> int:
    return int.from_bytes(fcntl.ioctl(fd, request, bytes(n_octets)), sys.byteorder)


def below(identity: Identity) -> set[Identity]:
    """Return what a block device consists of; empty for other files.

    That is the file of a loop device, the disk of a partition, and the devices that a
    logical volume or an array is made of, each with what is below it.
    """
    found: set[Identity] = set()
    waiting = [identity]
    while waiting:
        kind, number = waiting.pop()
        if kind != BLOCK_DEVICE:
            continue
        folder = f"{_SYSFS}/{os.major(number)}:{os.minor(number)}"
        new = {part for part in _parts(folder) if part not in found}
        found |= new
        waiting += new
    return found


def _parts(folder: str) -> Iterator[Identity]:
    with contextlib.suppress(OSError):
        with open(f"{folder}/loop/backing_file", "rb", opener=open_file) as file:
            name = file.read().removesuffix(b"\n")
        yield file_identity(os.stat(name))
    if os.path.exists(f"{folder}/partition"):
        yield from _device(f"{os.path.realpath(folder)}/../dev")
    with contextlib.suppress(OSError):
        for slave in os.listdir(f"{folder}/slaves"):
            yield from _device(f"{folder}/slaves/{slave}/dev")


def _device(path: str) -> Iterator[Identity]:
    with contextlib.suppress(OSError, ValueError), open(path, opener=open_file) as file:
        major, minor = file.read().split(":")
        yield BLOCK_DEVICE, os.makedev(int(major), int(minor))
