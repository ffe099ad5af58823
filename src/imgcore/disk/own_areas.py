"""What an image has itself, and what it leaves to its parents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from imgcore.areas.area import Area
from imgcore.engine.extents import Kind, zeroed_at_ranges

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from imgcore.disk.disk_state import DiskState
    from imgcore.engine.extents import Extents
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.engine.source_file import SourceFile

# Who has the content of a range.
_NOBODY: Final = 0
_PARENTS: Final = 1
_OWN: Final = 2


class _Part(NamedTuple):
    start: int
    end: int
    owner: int


def missing_areas(disk: DiskState, block_nbytes: int) -> Iterator[Area]:
    """Yield what an image must get so that it reads the same without its parents.

    Parameters
    ----------
    disk : DiskState
        The image with its parents.
    block_nbytes : int
        A block of which the image has a part is completed, also with zeros.  A block of
        which it has nothing is needed as a whole if a parent has data in it.

    Yields
    ------
    Area
        Ascending.
    """
    mixed: list[_Part] = []
    for part in _cut_at_blocks(_parts(disk), block_nbytes, disk.virtual_size):
        if mixed and part.start // block_nbytes != mixed[0].start // block_nbytes:
            yield from _needed(mixed)
            mixed = []
        is_whole = part.start % block_nbytes == 0 and (
            part.end % block_nbytes == 0 or part.end == disk.virtual_size
        )
        if is_whole:
            yield from _needed([part])
        else:
            mixed.append(part)
    yield from _needed(mixed)


def _needed(parts: Sequence[_Part]) -> Iterator[Area]:
    """Yield what is needed of the parts of a block, or of a part of whole blocks."""
    if any(part.owner != _NOBODY for part in parts):
        for start, end, owner in parts:
            if owner != _OWN:
                yield Area(start, end - start, is_zero=False)


def _parts(disk: DiskState) -> Iterator[_Part]:
    """Yield the parts of a disk by who has them, joined, in order."""
    last: _Part | None = None
    for rows, depths in disk.layer_extents(0, disk.virtual_size):
        owners = np.where(rows["kind"] >= Kind.DATA, _PARENTS, _NOBODY)
        owners[(depths == 0) & (rows["kind"] != Kind.HOLE)] = _OWN
        firsts = np.concatenate(([0], np.flatnonzero(owners[1:] != owners[:-1]) + 1))
        starts = rows["guest_offset"][firsts].tolist()
        end = int(rows["guest_offset"][-1] + rows["length"][-1])
        for start, stop, owner in zip(
            starts, [*starts[1:], end], owners[firsts].tolist(), strict=True
        ):
            if last is not None and last.owner == owner:
                last = last._replace(end=stop)
                continue
            if last is not None:
                yield last
            last = _Part(start, stop, owner)
    if last is not None:
        yield last


def _cut_at_blocks(parts: Iterator[_Part], block_nbytes: int, end: int) -> Iterator[_Part]:
    """Yield parts again, cut where their whole blocks begin and end."""
    for start, stop, owner in parts:
        first = min(start + -start % block_nbytes, stop)
        last = stop if stop == end else max(stop - stop % block_nbytes, first)
        for a, b in ((start, first), (first, last), (last, stop)):
            if a < b:
                yield _Part(a, b, owner)


class WithoutOwn:
    """A disk as `Differences` reads it, in which what an image has itself is zeros.

    Parameters
    ----------
    disk : DiskState
        Any disk; it is not read past the end of the image.
    image : DiskState
        The image that has the ranges that are left out.
    """

    def __init__(self, disk: DiskState, image: DiskState) -> None:
        self._disk, self._image = disk, image
        self.virtual_size: int = disk.virtual_size
        self.sources: list[SourceFile] = disk.sources

    def data_extents(self, start: int, length: int, rule: ReflinkRule | None) -> Iterator[Extents]:
        """Yield the extents of a range; see `DiskState.data_extents`."""
        for rows in self._disk.data_extents(start, length, rule):
            first = int(rows["guest_offset"][0])
            end = int(rows["guest_offset"][-1] + rows["length"][-1])
            yield zeroed_at_ranges(rows, *self._own_ranges(first, end))

    def _own_ranges(self, start: int, end: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        batches = self._image.extents_of_layer(0, start, end - start)
        own = np.concatenate([rows[rows["kind"] != Kind.HOLE] for rows in batches])
        starts = own["guest_offset"]
        return starts, starts + own["length"]
