"""``check --repair``: replaces an image by a repaired and verified copy.

The image itself is never written to.  The copy is a reflink if the file system can do
it.
"""

from __future__ import annotations

import os
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from imgcore.engine.batches import pair_up
from imgcore.engine.extents import Kind
from imgcore.errors import (
    ImgcoreError,
    TargetError,
    UnsupportedFeatureError,
)
from imgcore.files.attributes import copy_attributes
from imgcore.files.copying import copy_content
from imgcore.files.identity import same_file
from imgcore.files.target import Target
from imgcore.formats.api import Repairable
from imgcore.formats.registry import get_driver
from imgcore.limits import MAX_REPAIR_RANGES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from imgcore.disk.layer import Layer
    from imgcore.disk.table_reads import TableReads
    from imgcore.engine.extents import Extents
    from imgcore.files.host_file import HostFile
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Reader, Repair
    from imgcore.formats.shared.check_report import CheckReport


class Outcome(NamedTuple):
    """What a repair has done.

    Attributes
    ----------
    report : CheckReport
        The remaining problems.
    repairs : list of Repair
        What was repaired; if nothing was, nothing was written.
    obstacles : list of str
        Why the remaining problems were not repaired, a line each.
    """

    report: CheckReport
    repairs: list[Repair]
    obstacles: list[str]


def repair(
    layer: Layer,
    before: CheckReport,
    commit: Callable[[Target, Outcome], None],
    reads: TableReads,
    *,
    leaks_only: bool = False,
) -> Outcome:
    """Repair everything that can be repaired safely, and check the result.

    Parameters
    ----------
    layer : Layer
        The open image; it still shows the state before the repair afterwards.
    before : CheckReport
        The problems of the image.
    commit : callable
        Commits the repaired copy; it is not called if there are no repairs.
    reads : TableReads
        Steers the reads of the image already, and will steer those of its copy.
    leaks_only : bool
        Only free space that nothing uses.

    Raises
    ------
    UnsupportedFeatureError
        The image is sound, but its format has no repairs; or it is on a device or has
        several names.
    TargetError, OSError
        The copy could not be made, or could not replace the image.
    """
    file, reader = layer.file, layer.reader
    if not isinstance(reader, Repairable):
        reason = f"{reader.format_name} images cannot be repaired"
        if not before.problems:
            raise UnsupportedFeatureError(reason, path=file.path)
        return Outcome(before, [], [reason])
    repairs = reader.repairs(leaks_only=leaks_only)
    if not repairs:
        return Outcome(before, [], _obstacles(reader, before, leaks_only))
    _refuse_place(file)
    # A symbolic link to the image stays one.
    with Target(os.path.realpath(file.path), force=True) as target:
        if not same_file(target.identity, file.identity):
            raise TargetError("was replaced while it was checked", path=file.path)
        copy_content(file, target)
        written = _Ranges()
        for item in repairs:
            _apply(target.main, item, file, written, reads)
        _refuse_damage(file, reader, written)
        after, obstacles = _verify(layer, target.main, reads, leaks_only)
        if after.corruptions > before.corruptions or after.leaks > before.leaks:
            raise ImgcoreError("the repairs do not help, so nothing was changed", path=file.path)
        copy_attributes(file, target.main)
        reads.run.phase = "syncing"
        target.prepare()
        file.check_unchanged()
        outcome = Outcome(after, repairs, obstacles)
        commit(target, outcome)
    return outcome


def _obstacles(reader: Repairable, report: CheckReport, leaks_only: bool) -> list[str]:
    return reader.obstacles(leaks_only=leaks_only) if report.problems else []


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


class _Ranges:
    """Ranges of a file; those that touch are joined, so that memory stays bounded."""

    def __init__(self) -> None:
        self._new: list[tuple[int, int]] = []
        self._joined: NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)

    def add(self, start: int, end: int) -> None:
        if start < end:
            self._new.append((start, end))
        if len(self._new) >= MAX_REPAIR_RANGES:
            self._join()

    def _join(self) -> None:
        ranges = np.concatenate((self._joined, np.array(self._new, np.int64).reshape(-1, 2)))
        self._new = []
        ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
        reach = np.maximum.accumulate(ranges[:, 1])
        is_first = np.ones(len(ranges), dtype=bool)
        is_first[1:] = ranges[1:, 0] > reach[:-1]
        ends = reach[np.append(np.flatnonzero(is_first)[1:], len(ranges)) - 1]
        self._joined = np.column_stack((ranges[is_first, 0], ends))

    def overlap(self, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> int | None:
        """Return the start of a range that overlaps one of these; None if none does."""
        if self._new:
            self._join()
        if not len(self._joined):
            return None
        at = np.searchsorted(self._joined[:, 1], starts, side="right")
        last = len(self._joined) - 1
        hits = (at <= last) & (self._joined[np.minimum(at, last), 0] < ends)
        return int(self._joined[at[np.argmax(hits)], 0]) if hits.any() else None


def _refuse_damage(file: HostFile, reader: Reader, written: _Ranges) -> None:
    """Raise if repairs have touched guest data, even if the reader proposed them."""
    for starts, ends in _guest_data(file, reader):
        offset = written.overlap(starts, ends)
        if offset is not None:
            raise ImgcoreError(
                f"a repair at 0x{offset:x} would change guest data, so nothing was changed",
                path=file.path,
            )


def _guest_data(file: HostFile, reader: Reader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the starts and ends of guest data in the file, batch by batch."""
    own = [same_file(source.file.identity, file.identity) for source in reader.sources]
    own_indices = np.flatnonzero(own)
    for rows in reader.extents(0, reader.virtual_size) if reader.virtual_size else ():
        stored = rows[(rows["kind"] >= Kind.DATA) & np.isin(rows["file"], own_indices)]
        yield stored["host_offset"], stored["host_offset"] + stored["host_length"]


def _apply(
    copy: TargetFile, item: Repair, file: HostFile, written: _Ranges, reads: TableReads
) -> None:
    """Change the copy, and record which ranges of the image are changed or cut off."""
    if item.file_nbytes is not None:
        written.add(min(item.file_nbytes, copy.nbytes), file.nbytes)
        copy.truncate(item.file_nbytes)
    with copy.reopened(file.path) as opened:
        reads.watch([opened])
        stream = item.stream(opened) if item.stream is not None else ()
        for offset, data in chain(item.writes, stream):
            if offset < 0 or offset + len(data) > copy.nbytes:
                raise ValueError(f"{copy.path}: a repair at {offset} lies outside the file")
            copy.pwrite(offset, data)
            written.add(offset, offset + len(data))


# -- verification ----------------------------------------------------------------------


def _verify(
    layer: Layer, copy: TargetFile, reads: TableReads, leaks_only: bool
) -> tuple[CheckReport, list[str]]:
    """Check the copy; its guest data must be in the same places as in the image.

    Returns the report, and why remaining problems were not repaired.
    """
    file, reader = layer.file, layer.reader
    # Messages name the image, not the copy.
    with copy.reopened(file.path) as opened:
        reads.watch([opened])
        repaired = get_driver(reader.format_name).open(opened, layer.gate)
        try:
            if not _reads_the_same(reader, repaired, file.nbytes):
                raise ImgcoreError(
                    "the repaired copy would read differently, so nothing was changed",
                    path=file.path,
                )
            report = repaired.check()
            assert isinstance(repaired, Repairable)  # it is of the image's format
            return report, _obstacles(repaired, report, leaks_only)
        finally:
            repaired.close()


def _reads_the_same(a: Reader, b: Reader, nbytes: int) -> bool:
    """Compare the extents of an image of ``nbytes`` bytes and of its repaired copy."""
    if (a.virtual_size, a.backing) != (b.virtual_size, b.backing):
        return False
    if not a.virtual_size:
        return True
    extents = (reader.extents(0, reader.virtual_size) for reader in (a, b))
    return all(
        np.array_equal(_clipped(rows_a, nbytes), _clipped(rows_b, nbytes))
        for _, _, rows_a, rows_b in pair_up(*extents)
    )


def _clipped(rows: Extents, nbytes: int) -> Extents:
    """Return rows without what compressed blocks claim past the image's old end.

    The last sector of a compressed block may reach past the end of the file, and is
    longer if the file grows.
    """
    clipped = rows.copy()
    packed = np.flatnonzero(rows["kind"] > Kind.DATA)
    room = np.maximum(nbytes - rows["host_offset"][packed], 0)
    clipped["host_length"][packed] = np.minimum(rows["host_length"][packed], room)
    return clipped
