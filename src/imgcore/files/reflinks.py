"""Reflinks: blocks that two files of one file system have in common.

Linux: ioctl_ficlonerange(2), include/uapi/linux/fs.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final

from imgcore.files.descriptors import named_errors
from imgcore.files.host_file import HostFile

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.host_file import OpenFile
    from imgcore.files.target_file import TargetFile

_FICLONE: Final = 0x40049409  # _IOW(0x94, 9, int)
_FICLONERANGE: Final = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range)
_CLONE_RANGE: Final = struct.Struct("@qQQQ")  # descriptor, its offset, length, our offset
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IOC_SETFLAGS: Final = 0x40086602
_FS_NOCOW_FL: Final = 0x00800000

# The file system has no reflinks, or none between these two files.
NO_REFLINK_ERRORS: Final = (
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EPERM,
)


def reflink_block_nbytes(file: ByteSource) -> int:
    """Return the block size of the file's file system; 0 if it cannot be reflinked."""
    if not isinstance(file, HostFile) or file.is_block_device:
        return 0
    nbytes = file.status().st_blksize
    return nbytes if nbytes > 0 and nbytes & (nbytes - 1) == 0 else 0


def takes_reflinks(source: OpenFile, target: OpenFile) -> bool:
    """Tell whether the file system makes reflinks between two files; nothing changes.

    A range that lies between blocks is refused by every file system: by those with
    reflinks only because of that.
    """
    try:
        fcntl.ioctl(target.fd, _FICLONERANGE, _CLONE_RANGE.pack(source.fd, 1, 1, 1))
    except OSError as error:
        return error.errno == errno.EINVAL
    return True


def prepare_reflinks(
    source: ByteSource, target: TargetFile, *, may_change_flag: bool
) -> OSError | None:
    """Find out whether an empty target takes reflinks of a source; return why not.

    The source's data is written back: only then are its holes certain on XFS.  With
    ``may_change_flag``, the target's "no copy on write" becomes the source's if
    reflinks need that, so that other sources may not fit any more.

    Raises
    ------
    OSError
        The source's data cannot be written back.
    """
    if not isinstance(source, HostFile) or source.is_block_device:
        return OSError(errno.EINVAL, os.strerror(errno.EINVAL), source.path)
    with named_errors(source.path):
        os.fdatasync(source.fd)
    error = _try_first_block(source, target)
    is_unlike = may_change_flag and error is not None and error.errno == errno.EINVAL
    if is_unlike and _take_nocow(source, target):
        error = _try_first_block(source, target)
    return error


def reflink_whole(source: HostFile, target: TargetFile) -> None:
    """Make a target equal to a source, by one call that takes no space.

    Raises
    ------
    OSError
        The file system cannot do that (`NO_REFLINK_ERRORS`), or has failed.
    """
    with named_errors(source.path):
        fcntl.ioctl(target.fd, _FICLONE, source.fd)


def _try_first_block(source: HostFile, target: TargetFile) -> OSError | None:
    block_nbytes = reflink_block_nbytes(source)
    # 0 is all of the file: the last block need not be whole.
    length = block_nbytes if source.nbytes >= block_nbytes else 0
    try:
        fcntl.ioctl(target.fd, _FICLONERANGE, _CLONE_RANGE.pack(source.fd, 0, length, 0))
        target.truncate(0)
    except OSError as error:
        return error
    return None


def _take_nocow(source: OpenFile, target: OpenFile) -> bool:
    """Give an empty target the source's flag "no copy on write"; tell if it lacked it.

    Btrfs makes no reflinks between files of which only one has it (chattr +C).
    """
    try:
        wanted = _flags(source) & _FS_NOCOW_FL
        flags = _flags(target)
        if flags & _FS_NOCOW_FL == wanted:
            return False
        packed = struct.pack("@q", flags ^ _FS_NOCOW_FL)
        fcntl.ioctl(target.fd, _FS_IOC_SETFLAGS, packed)
    except OSError:
        return False
    return True


def _flags(file: OpenFile) -> int:
    answer = fcntl.ioctl(file.fd, _FS_IOC_GETFLAGS, bytes(8))
    return int(struct.unpack_from("@I", answer)[0])
