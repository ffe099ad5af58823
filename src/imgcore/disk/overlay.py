"""Combines the extents of an image with those of its backing files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from imgcore.engine.extents import EXTENT_DTYPE, Kind, clip, split

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.formats.api import Reader

    Depths = NDArray[np.uint16]


def merge(
    upper: Extents, upper_depths: Depths, lower: Extents, lower_depths: Depths
) -> tuple[Extents, Depths]:
    """Return the upper layer's extents, its holes filled from the lower layer.

    Parameters
    ----------
    upper, lower : ndarray, shapes (n,) and (m,), dtype EXTENT_DTYPE
        Gap-free over the same range.
    upper_depths, lower_depths : ndarray, shapes (n,) and (m,), dtype uint16
        The layer that each row comes from.

    Returns
    -------
    tuple of ndarray
        At most n + m rows and their depths, over the same range.
    """
    # Only holes are cut where a row of the lower layer starts: data starts at sectors,
    # even if the lower disk ends inside one.
    above = np.searchsorted(upper["guest_offset"], lower["guest_offset"], side="right") - 1
    is_seen = upper["kind"][above] == Kind.HOLE
    starts = np.union1d(upper["guest_offset"], lower["guest_offset"][is_seen])
    rows, below = split(upper, starts), split(lower, starts)
    is_hole = rows["kind"] == Kind.HOLE
    i = np.searchsorted(upper["guest_offset"], starts, side="right") - 1
    j = np.searchsorted(lower["guest_offset"], starts, side="right") - 1
    rows[is_hole] = below[is_hole]
    depths = np.where(is_hole, lower_depths[j], upper_depths[i])
    return rows, depths


def chain_extents(
    layers: Sequence[Reader], first_files: Sequence[int], start: int, length: int, depth: int = 0
) -> Iterator[tuple[Extents, Depths]]:
    """Yield the extents of a chain of layers, from layer ``depth`` down.

    Parameters
    ----------
    layers : sequence of Reader
        The image first, then its backing file, and so on.
    first_files : sequence of int
        For each layer, the number to add to its file indices.
    start, length : int
        Bytes; the range lies inside ``layers[depth].virtual_size``.

    Yields
    ------
    tuple of ndarray
        A gap-free batch of extents, and for each row the layer it comes from.  A range
        that no layer holds is a HOLE of the deepest layer there.
    """
    shift, last = first_files[depth], depth + 1 == len(layers)
    for batch in layers[depth].extents(start, length):
        rows = batch
        if shift:
            rows = batch.copy()
            rows["file"][rows["kind"] >= Kind.DATA] += np.uint32(shift)
        depths = np.full(len(rows), depth, np.uint16)
        if last or not (rows["kind"] == Kind.HOLE).any():
            yield rows, depths
            continue
        yield from _over_lower(layers, first_files, rows, depths, depth)


def _over_lower(
    layers: Sequence[Reader], first_files: Sequence[int], rows: Extents, depths: Depths, depth: int
) -> Iterator[tuple[Extents, Depths]]:
    start = int(rows["guest_offset"][0])
    end = int(rows["guest_offset"][-1]) + int(rows["length"][-1])
    lower_end = min(end, layers[depth + 1].virtual_size)
    at = start
    if start < lower_end:
        for lower, lower_depths in chain_extents(
            layers, first_files, start, lower_end - start, depth + 1
        ):
            until = at + int(lower["length"].sum())
            part = clip(rows, at, until)
            yield merge(part, np.full(len(part), depth, np.uint16), lower, lower_depths)
            at = until
    if at < end:
        # The backing file is shorter: holes after its end stay holes.
        part = clip(rows, at, end)
        yield part, np.full(len(part), depth, np.uint16)


def padded(
    batches: Iterator[Extents], nbytes: int, end: int, kind: Kind = Kind.ZERO
) -> Iterator[Extents]:
    """Yield the batches of a disk of ``nbytes`` bytes, then ``kind`` up to ``end``."""
    yield from batches
    if nbytes < end:
        yield np.array([(nbytes, end - nbytes, 0, 0, 0, kind, 0)], dtype=EXTENT_DTYPE)


def resized(batches: Iterator[Extents], nbytes: int, end: int) -> Iterator[Extents]:
    """Yield the batches of a disk of ``nbytes`` bytes, cut off or padded at ``end``."""
    for rows in padded(batches, nbytes, end):
        start = int(rows["guest_offset"][0])
        if start < end:
            yield clip(rows, start, min(start + int(rows["length"].sum()), end))
