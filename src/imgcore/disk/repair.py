"""``check --repair``: a complete, verified copy with the repairs takes the image's place.

The image itself is never written to.  Its copy shares its blocks where the file system can.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.disk.describe import STAT_BLOCK_NBYTES
from imgcore.engine.batches import pair_up
from imgcore.engine.extents import Kind
from imgcore.errors import (
    ImgcoreError,
    LimitExceededError,
    TargetError,
    UnsupportedFeatureError,
)
from imgcore.files.gate import ReferenceGate
from imgcore.files.host_file import HostFile
from imgcore.files.identity import same_file
from imgcore.files.target import Target
from imgcore.formats.api import Repairable
from imgcore.formats.registry import get_driver
from imgcore.limits import MAX_REPAIR_NBYTES, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import CheckReport, Reader, Repair

# Linux include/uapi/linux/fs.h: _IOW(0x94, 9, int).
_FICLONE: Final = 0x40049409
_NO_CLONE_ERRORS: Final = (
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
    errno.EPERM,
)
# One system call's worth, so that an interruption is noticed soon.
_COPY_NBYTES: Final = 64 * MIB


def repair(
    file: HostFile, reader: Reader, before: CheckReport, gate: ReferenceGate
) -> tuple[CheckReport, list[Repair]]:
    """Put right what can be put right safely, and check the result.

    Parameters
    ----------
    file, reader : HostFile, Reader
        The image, open; they show its former state afterwards.
    before : CheckReport
        What is wrong with it.
    gate : ReferenceGate
        What the image names is opened through it.

    Returns
    -------
    tuple
        What is still wrong, and what was repaired; nothing was written if that is empty.

    Raises
    ------
    UnsupportedFeatureError
        The format has no repairs, or the image lies where it cannot be replaced.
    TargetError, OSError
        The copy could not be made or take the image's place.
    """
    if not isinstance(reader, Repairable):
        raise UnsupportedFeatureError(
            f"nothing in {reader.format_name} images can be repaired", path=file.path
        )
    repairs = reader.repairs()
    if not repairs:
        return before, []
    _refuse_place(file)
    _refuse_damage(file, reader, repairs)
    # The link to an image stays a link to it.
    with Target(os.path.realpath(file.path), force=True) as target:
        if not same_file(target.identity, file.identity):
            raise TargetError("was replaced while it was checked", path=file.path)
        _copy(file, target)
        for item in repairs:
            _apply(target.main, item)
        after = _verify(file, reader, target.main, gate)
        if after.corruptions > before.corruptions or after.leaks > before.leaks:
            raise ImgcoreError("internal: the repairs do not help; nothing changed", path=file.path)
        _copy_attributes(file, target.main)
        file.check_unchanged()
        target.commit()
    return after, repairs


def _refuse_place(file: HostFile) -> None:
    if file.is_block_device:
        raise UnsupportedFeatureError("an image on a block device is not repaired", path=file.path)
    n_links = os.fstat(file.fd).st_nlink
    if n_links > 1:
        raise UnsupportedFeatureError(
            f"the file has {n_links} names (hard links), and only one would be repaired",
            path=file.path,
        )


def _refuse_damage(file: HostFile, reader: Reader, repairs: Sequence[Repair]) -> None:
    """Raise if the repairs would touch a byte of guest data; their author is not trusted."""
    writes = [write for item in repairs for write in item.writes]
    nbytes = sum(len(data) for _, data in writes)
    if nbytes > MAX_REPAIR_NBYTES:
        raise LimitExceededError(
            f"the repairs write {nbytes} bytes, allowed are {MAX_REPAIR_NBYTES}", path=file.path
        )
    # Ranges of the file that change: written to, or cut off.
    ranges = [(offset, offset + len(data)) for offset, data in writes if data]
    ends = [item.file_nbytes for item in repairs if item.file_nbytes is not None]
    ranges.append((min([file.nbytes, *ends]), file.nbytes))
    for start, end in _guest_data(file, reader):
        for low, high in ranges:
            if ((start < high) & (end > low)).any():
                raise ImgcoreError(
                    f"internal: a repair at 0x{low:x} would touch guest data; nothing changed",
                    path=file.path,
                )


def _guest_data(file: HostFile, reader: Reader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield where guest data starts and ends in the file, batch by batch."""
    own = [same_file(source.file.identity, file.identity) for source in reader.sources]
    own_indices = np.flatnonzero(own)
    for rows in reader.extents(0, reader.virtual_size) if reader.virtual_size else ():
        stored = rows[(rows["kind"] >= Kind.DATA) & np.isin(rows["file"], own_indices)]
        yield stored["host_offset"], stored["host_offset"] + stored["host_length"]


# -- the copy ---------------------------------------------------------------------------


def _copy(file: HostFile, target: Target) -> None:
    """Copy the image; blocks are shared, or else holes stay holes."""
    with contextlib.suppress(OSError):
        os.fdatasync(file.fd)  # some file systems report holes where data is not written yet
    try:
        fcntl.ioctl(target.main.fd, _FICLONE, file.fd)
        return
    except OSError as error:
        if error.errno not in _NO_CLONE_ERRORS:
            raise OSError(error.errno, error.strerror, file.path) from error
    target.require_space(os.fstat(file.fd).st_blocks * STAT_BLOCK_NBYTES)
    target.main.truncate(file.nbytes)
    start, end = file.core.next_data(0)
    while start < end:
        _copy_range(file, target.main, start, end)
        start, end = file.core.next_data(end)


def _copy_range(file: HostFile, copy: TargetFile, start: int, end: int) -> None:
    while start < end:
        nbytes = min(end - start, _COPY_NBYTES)
        try:
            done = os.copy_file_range(file.fd, copy.fd, nbytes, start, start)
        except OSError as error:
            if error.errno not in _NO_CLONE_ERRORS:
                raise OSError(error.errno, error.strerror, file.path) from error
            done = 0
        if done == 0:
            data = file.pread(start, min(nbytes, MIB))
            copy.pwrite(start, data)
            done = len(data)
        start += done


def _apply(copy: TargetFile, item: Repair) -> None:
    if item.file_nbytes is not None:
        copy.truncate(item.file_nbytes)
    for offset, data in item.writes:
        if offset < 0 or offset + len(data) > copy.nbytes:
            raise ValueError(f"{copy.path}: a repair at {offset} lies outside the file")
        copy.pwrite(offset, data)


def _copy_attributes(file: HostFile, copy: TargetFile) -> None:
    """Give the copy the image's owner, mode, times and extended attributes.

    Its time of modification as well: children may have recorded it, and the content they are
    made upon is the same.
    """
    status, own = os.fstat(file.fd), os.fstat(copy.fd)
    if (status.st_uid, status.st_gid) != (own.st_uid, own.st_gid):
        try:
            os.fchown(copy.fd, status.st_uid, status.st_gid)
        except OSError as error:
            raise OSError(
                error.errno, "The repaired copy cannot be given the image's owner", file.path
            ) from error
    with contextlib.suppress(OSError):
        shutil.copystat(f"/proc/self/fd/{file.fd}", f"/proc/self/fd/{copy.fd}")


# -- verification -------------------------------------------------------------------------


def _verify(file: HostFile, reader: Reader, copy: TargetFile, gate: ReferenceGate) -> CheckReport:
    """Check the copy, which has to read from the same places as the image."""
    # The image's own name: it stands in messages.
    with HostFile(os.dup(copy.fd), file.path, device=False) as opened:
        repaired = get_driver(reader.format_name).open(opened, gate)
        try:
            if not _reads_the_same(reader, repaired):
                raise ImgcoreError(
                    "internal: the repaired copy would read differently; nothing changed",
                    path=file.path,
                )
            return repaired.check()
        finally:
            repaired.close()


def _reads_the_same(a: Reader, b: Reader) -> bool:
    if (a.virtual_size, a.backing) != (b.virtual_size, b.backing):
        return False
    if not a.virtual_size:
        return True
    extents = (reader.extents(0, reader.virtual_size) for reader in (a, b))
    return all(np.array_equal(rows_a, rows_b) for _, _, rows_a, rows_b in pair_up(*extents))
