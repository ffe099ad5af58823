"""Salvages a disk whose tables are damaged: what is lost becomes zeros and is listed.

Readers mark what their tables do not tell as LOST.  Here, plain data to which two parts
of the disk refer is lost as well: one of the tables is wrong, and nothing tells which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from imgcore._core import MAX_BAD_RANGES
from imgcore.engine.bad_ranges import BadRange
from imgcore.engine.extents import FLAG_NO_FILE, Kind, lose_ranges
from imgcore.errors import CorruptImageError, ImgcoreError, LimitExceededError
from imgcore.limits import MAX_BATCH_ROWS, SALVAGE_MAX_ROWS
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from imgcore.disk.layer import Layer
    from imgcore.disk.overlay import Depths
    from imgcore.engine.extents import Extents
    from imgcore.formats.api import Reader

    Offsets = NDArray[np.uint64]

_DAMAGED_TABLE: Final = "its place is unknown: a table is damaged or points past the file's end"
_NO_FILE: Final = "its file is missing or too short"
_CONTESTED: Final = "two parts of the disk refer to its place"


class Salvage:
    """Takes LOST extents out of a disk's extents, and lists them.

    Parameters
    ----------
    chain : sequence of Layer
        An image and its parents, opened for salvage.  All their tables are read once.
    first_files : sequence of int
        The index of each layer's first file; see `Image.first_files`.

    Attributes
    ----------
    ranges : list of BadRange
        What was lost in the batches so far, ascending.

    Notes
    -----
    Memory: 16 bytes for each extent of plain data, up to ``SALVAGE_MAX_ROWS``.
    """

    def __init__(self, chain: Sequence[Layer], first_files: Sequence[int]) -> None:
        self.ranges: list[BadRange] = []
        self._paths = [layer.file.path for layer in chain]
        self._contested: list[_Ranges] = []
        for layer, first in zip(chain, first_files, strict=True):
            self._contested += _contested(layer.reader, layer.file.path, first)
            _warn_of_leaks(layer.reader, layer.file.path)

    def restart(self) -> None:
        """Forget what was lost: the extents will be passed from the start."""
        self.ranges.clear()

    def take(self, rows: Extents, depths: Depths) -> Iterator[Extents]:
        """Yield a batch with its LOST rows as ZERO; see `Image.layer_extents`.

        Yields
        ------
        ndarray, shape (n,), dtype EXTENT_DTYPE, 1 <= n <= MAX_BATCH_ROWS
        """
        found = rows
        for file, starts, ends in self._contested:
            found = lose_ranges(found, starts, ends, file=file)
        lost = np.flatnonzero(found["kind"] == Kind.LOST)
        if not lost.size:
            yield rows
            return
        found = found.copy()
        above = np.searchsorted(rows["guest_offset"], found["guest_offset"][lost], "right") - 1
        was_data = rows["kind"][above] == Kind.DATA
        for row, depth, is_contested in zip(
            found[lost].tolist(), depths[above].tolist(), was_data.tolist(), strict=True
        ):
            reason = _NO_FILE if row[6] & FLAG_NO_FILE else _DAMAGED_TABLE
            self._add(row[0], row[1], self._paths[depth], _CONTESTED if is_contested else reason)
        for name in ("file", "flags"):
            found[name][lost] = 0
        found["kind"][lost] = Kind.ZERO
        for at in range(0, len(found), MAX_BATCH_ROWS):
            yield found[at : at + MAX_BATCH_ROWS]

    def _add(self, guest_offset: int, length: int, path: str, reason: str) -> None:
        if self.ranges:
            last = self.ranges[-1]
            goes_on = last.guest_offset + last.length == guest_offset
            if goes_on and (last.path, last.reason) == (path, reason):
                self.ranges[-1] = last._replace(length=last.length + length)
                return
        if len(self.ranges) == MAX_BAD_RANGES:
            raise LimitExceededError(
                f"more than {MAX_BAD_RANGES} separate ranges are lost, the last at "
                f"0x{guest_offset:x} of the disk",
                path=path,
            )
        self.ranges.append(BadRange(guest_offset, length, path, reason))


def _warn_of_leaks(reader: Reader, path: str) -> None:
    """Warn of data in the file that no table refers to.

    A table that was overwritten with zeros looks like one of holes.
    """
    try:
        n_leaks = reader.check().leaks
    except (ImgcoreError, OSError):
        # The damage is such that nothing can be counted.
        return
    if n_leaks:
        log.warning(
            "%s: no table refers to %d allocation units of the file: if they hold data, its "
            "place on the disk is lost",
            path,
            n_leaks,
        )


class _Ranges(NamedTuple):
    """Host ranges of one file, ascending and disjoint; ``file`` counts all layers'."""

    file: int
    starts: Offsets
    ends: Offsets


def _contested(reader: Reader, path: str, first_file: int) -> Iterator[_Ranges]:
    """Yield the ranges of an image's files to which more than one extent refers.

    Raises CorruptImageError if nothing of the first image of a chain is known.
    """
    claims: dict[int, list[Offsets]] = {}
    n_rows, nothing_known = 0, reader.virtual_size > 0
    for rows in reader.extents(0, reader.virtual_size) if reader.virtual_size else ():
        nothing_known &= bool((rows["kind"] == Kind.LOST).all())
        data = rows[rows["kind"] == Kind.DATA]
        n_rows += len(data)
        if n_rows > SALVAGE_MAX_ROWS:
            log.warning(
                "%s: more than %d extents: those that overlap are not searched for",
                path,
                SALVAGE_MAX_ROWS,
            )
            return
        for file in np.unique(data["file"]).tolist():
            of_file = data[data["file"] == file]
            pairs = np.stack(
                (of_file["host_offset"], of_file["host_offset"] + of_file["host_length"])
            )
            claims.setdefault(file, []).append(pairs)
    if nothing_known and first_file == 0:
        # Of a lost parent, a child may still hide much.
        raise CorruptImageError(
            "nothing can be salvaged: no part of the disk has a known place", path=path
        )
    for file, parts in claims.items():
        starts, ends = _overlaps(parts)
        if len(starts):
            yield _Ranges(first_file + file, starts, ends)


def _overlaps(parts: Sequence[Offsets]) -> tuple[Offsets, Offsets]:
    """Return what at least two of the ranges (starts, ends) cover, joined."""
    starts, ends = np.concatenate(parts, axis=1)
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], ends[order]
    reached = np.maximum.accumulate(ends)
    # A range overlaps its predecessors up to where the longest of them ends.
    low, high = starts[1:], np.minimum(ends[1:], reached[:-1])
    low, high = low[low < high], high[low < high]
    if not len(low):
        return low, high
    joined = np.maximum.accumulate(high)
    is_first = np.concatenate(([True], low[1:] > joined[:-1]))
    is_last = np.concatenate((is_first[1:], [True]))
    return low[is_first], joined[is_last]
