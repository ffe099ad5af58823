"""Changed areas of an open image, by its extents alone: no content is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.areas.area import Area
from imgcore.disk.host_holes import is_sparse
from imgcore.disk.overlay import chain_extents
from imgcore.engine.extents import Kind, cut_at_ranges, split
from imgcore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from imgcore.disk.disk_state import DiskState
    from imgcore.disk.overlay import Depths
    from imgcore.engine.extents import Extents

# Areas with less between them are looked up together: a table of QCOW2 covers 512 MiB.
_MAX_GAP_NBYTES: Final = 256 * MIB
_MAX_AREAS: Final = 1 << 16

# What happened to a range.
_UNCHANGED: Final = 0
_ZEROED: Final = 1
_CHANGED: Final = 2


def areas_above(disk: DiskState, depth: int) -> Iterator[Area]:
    """Yield what the layers above a layer of the image's chain state.

    Parameters
    ----------
    disk : DiskState
        Open.
    depth : int
        The layer: 1 for the image's backing file, and so on; 0 for the image itself,
        which has no layers above it.

    Yields
    ------
    Area
        Ascending; neighbours may be adjacent.  Zeros after the end of a layer that is
        smaller than the disk are not among them.
    """
    for rows in extents_above(disk, depth):
        yield from _areas(rows, np.minimum(rows["kind"], _CHANGED))


def extents_above(disk: DiskState, depth: int) -> Iterator[Extents]:
    """Yield the extents of `areas_above`, in gap-free batches; the rest is HOLE."""
    if depth == 0 or disk.virtual_size == 0:
        return
    old_end = disk.layers[depth].virtual_size
    holes = disk.host_holes()
    layers = disk.layers[:depth]
    for rows, depths in chain_extents(layers, disk.first_files, 0, disk.virtual_size):
        for part in holes.cut(_without_ends(rows, depths, depth - 1)):
            yield _without_zeros_after(old_end, part)


def _without_ends(rows: Extents, depths: Depths, last: int) -> Extents:
    """Return rows of several layers in which only what none of them states is a HOLE.

    Where a layer other than the last one has ended, the disk is zeros.
    """
    ended = (rows["kind"] == Kind.HOLE) & (depths < last)
    if ended.any():
        rows = rows.copy()
        rows["kind"][ended] = Kind.ZERO
    return rows


def _without_zeros_after(end: int, rows: Extents) -> Extents:
    """Return rows in which zeros after the end of the old disk are a HOLE."""
    is_after = (rows["kind"] == Kind.ZERO) & (rows["guest_offset"] + rows["length"] > end)
    if not is_after.any():
        return rows
    starts = np.union1d(rows["guest_offset"], np.array([end], np.uint64))
    rows = split(rows, starts[starts >= rows["guest_offset"][0]])
    rows["kind"][(rows["kind"] == Kind.ZERO) & (rows["guest_offset"] >= end)] = Kind.HOLE
    return rows


def with_zeros(disk: DiskState, areas: Iterable[Area]) -> Iterator[Area]:
    """Yield areas again, with `Area.is_zero` as the image's extents tell it.

    Parameters
    ----------
    disk : DiskState
        Open.
    areas : iterable of Area
        In normal form; they start and end at sectors, or with the disk.

    Yields
    ------
    Area
        Ascending; neighbours may be adjacent.
    """
    if disk.layers[0].is_flat and not is_sparse(disk.files[0]):
        # It is all data.  A search for holes goes through all pages of a file in tmpfs.
        yield from areas
        return
    for group in _groups(areas):
        starts = np.array([area.offset for area in group], np.uint64)
        ends = starts + np.array([area.length for area in group], np.uint64)
        first, last = int(starts[0]), int(ends[-1])
        for rows in disk.data_extents(first, last - first, None):
            parts, is_inside = cut_at_ranges(rows, starts, ends)
            states = np.where(parts["kind"] < Kind.DATA, _ZEROED, _CHANGED)
            yield from _areas(parts, np.where(is_inside, states, _UNCHANGED))


def _groups(areas: Iterable[Area]) -> Iterator[list[Area]]:
    """Yield ascending areas in groups of which each has its areas close together."""
    group: list[Area] = []
    end = 0
    for area in areas:
        if group and (area.offset - end > _MAX_GAP_NBYTES or len(group) == _MAX_AREAS):
            yield group
            group = []
        group.append(area)
        end = area.offset + area.length
    if group:
        yield group


def _areas(rows: Extents, states: NDArray[np.integer]) -> Iterator[Area]:
    """Yield the areas of a gap-free batch, joined."""
    firsts = np.concatenate(([0], np.flatnonzero(states[1:] != states[:-1]) + 1))
    offsets = rows["guest_offset"][firsts].tolist()
    lengths = np.add.reduceat(rows["length"], firsts).tolist()
    for offset, length, state in zip(offsets, lengths, states[firsts].tolist(), strict=True):
        if state != _UNCHANGED:
            yield Area(offset, length, state == _ZEROED)
