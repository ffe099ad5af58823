"""``check --repair``: replaces an image by a repaired and verified copy.

The image itself is never written to.  The copy is a reflink if the file system can do
it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from imgcore.engine.batches import pair_up
from imgcore.engine.extents import Kind
from imgcore.errors import (
    ImgcoreError,
    LimitExceededError,
    TargetError,
    UnsupportedFeatureError,
)
from imgcore.files.copying import copy_attributes, copy_content
from imgcore.files.identity import same_file
from imgcore.files.target import Target
from imgcore.formats.api import Repairable
from imgcore.formats.registry import get_driver
from imgcore.limits import MAX_REPAIR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from imgcore.disk.layer import Layer
    from imgcore.files.host_file import HostFile
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Reader, Repair
    from imgcore.formats.shared.check_report import CheckReport


def repair(layer: Layer, before: CheckReport) -> tuple[CheckReport, list[Repair]]:
    """Repair everything that can be repaired safely, and check the result.

    Parameters
    ----------
    layer : Layer
        The open image; it still shows the state before the repair afterwards.
    before : CheckReport
        The problems of the image.

    Returns
    -------
    tuple of CheckReport and list of Repair
        The remaining problems, and the repairs; if there are no repairs, nothing was
        written.

    Raises
    ------
    UnsupportedFeatureError
        The format has no repairs, or the image is on a device or has several names.
    TargetError, OSError
        The copy could not be made, or could not replace the image.
    """
    file, reader = layer.file, layer.reader
    if not isinstance(reader, Repairable):
        raise UnsupportedFeatureError(
            f"{reader.format_name} images cannot be repaired", path=file.path
        )
    repairs = reader.repairs()
    if not repairs:
        return before, []
    _refuse_place(file)
    _refuse_damage(file, reader, repairs)
    # A symbolic link to the image stays one.
    with Target(os.path.realpath(file.path), force=True) as target:
        if not same_file(target.identity, file.identity):
            raise TargetError("was replaced while it was checked", path=file.path)
        copy_content(file, target)
        for item in repairs:
            _apply(target.main, item)
        after = _verify(layer, target.main)
        if after.corruptions > before.corruptions or after.leaks > before.leaks:
            raise ImgcoreError("the repairs do not help, so nothing was changed", path=file.path)
        copy_attributes(file, target.main)
        file.check_unchanged()
        target.commit()
    return after, repairs


def _refuse_place(file: HostFile) -> None:
    if file.is_block_device:
        raise UnsupportedFeatureError(
            "an image on a block device cannot be repaired", path=file.path
        )
    if file.n_links > 1:
        raise UnsupportedFeatureError(
            f"the file has {file.n_links} names (hard links), and only one would be repaired",
            path=file.path,
        )


def _refuse_damage(file: HostFile, reader: Reader, repairs: Sequence[Repair]) -> None:
    """Raise if repairs would touch guest data, even if the reader proposes them."""
    writes = [write for item in repairs for write in item.writes]
    nbytes = sum(len(data) for _, data in writes)
    if nbytes > MAX_REPAIR_NBYTES:
        raise LimitExceededError(
            f"the repairs write {nbytes} bytes: at most {MAX_REPAIR_NBYTES} are allowed",
            path=file.path,
        )
    # The ranges of the file that are written to or cut off.
    ranges = [(offset, offset + len(data)) for offset, data in writes if data]
    ends = [item.file_nbytes for item in repairs if item.file_nbytes is not None]
    ranges.append((min([file.nbytes, *ends]), file.nbytes))
    for start, end in _guest_data(file, reader):
        for low, high in ranges:
            if ((start < high) & (end > low)).any():
                raise ImgcoreError(
                    f"a repair at 0x{low:x} would change guest data, so nothing was changed",
                    path=file.path,
                )


def _guest_data(file: HostFile, reader: Reader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the starts and ends of guest data in the file, batch by batch."""
    own = [same_file(source.file.identity, file.identity) for source in reader.sources]
    own_indices = np.flatnonzero(own)
    for rows in reader.extents(0, reader.virtual_size) if reader.virtual_size else ():
        stored = rows[(rows["kind"] >= Kind.DATA) & np.isin(rows["file"], own_indices)]
        yield stored["host_offset"], stored["host_offset"] + stored["host_length"]


def _apply(copy: TargetFile, item: Repair) -> None:
    if item.file_nbytes is not None:
        copy.truncate(item.file_nbytes)
    for offset, data in item.writes:
        if offset < 0 or offset + len(data) > copy.nbytes:
            raise ValueError(f"{copy.path}: a repair at {offset} lies outside the file")
        copy.pwrite(offset, data)


# -- verification ----------------------------------------------------------------------


def _verify(layer: Layer, copy: TargetFile) -> CheckReport:
    """Check the copy; its guest data must be in the same places as in the image."""
    file, reader = layer.file, layer.reader
    # Messages name the image, not the copy.
    with copy.reopened(file.path) as opened:
        repaired = get_driver(reader.format_name).open(opened, layer.gate)
        try:
            if not _reads_the_same(reader, repaired):
                raise ImgcoreError(
                    "the repaired copy would read differently, so nothing was changed",
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
