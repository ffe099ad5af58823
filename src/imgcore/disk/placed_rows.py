"""The extents of what a job has written, from the placements of its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from imgcore.disk.overlay import merge, padded
from imgcore.engine.extents import (
    EXTENT_DTYPE,
    FLAG_GRAIN_MARKER,
    BlockState,
    Kind,
    join_neighbours,
)
from imgcore.engine.geometry import Prefix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imgcore.disk.image import Image
    from imgcore.engine.extents import Extents, Placements
    from imgcore.engine.geometry import Geometry


def placed_rows(
    placements: Placements, start: int, end: int, geometry: Geometry, base: Image | None
) -> Extents:
    """Return where a target has the data of a range of the disk.

    Parameters
    ----------
    placements : ndarray, dtype PLACEMENT_DTYPE
        Those of its blocks.
    start, end : int
        The range.
    geometry : Geometry
        The target's.
    base : Image, optional
        Its parent, whose files follow that of the target.
    """
    n_blocks = len(placements)
    block = np.uint64(geometry.block_nbytes)
    rows = np.zeros(n_blocks, EXTENT_DTYPE)
    rows["guest_offset"] = np.uint64(start) + np.arange(n_blocks, dtype=np.uint64) * block
    rows["length"] = np.minimum(block, np.uint64(end) - rows["guest_offset"])
    rows["host_offset"] = placements["host_offset"]
    state = placements["state"]
    rows["kind"] = Kind.ZERO
    if base is not None:
        rows["kind"][state == BlockState.ABSENT] = Kind.HOLE
    stored, compressed = state == BlockState.STORED, state == BlockState.COMPRESSED
    rows["kind"][stored] = Kind.DATA
    rows["host_length"][stored] = rows["length"][stored]
    if compressed.any():
        rows["kind"][compressed] = Kind[geometry.codec.codec.name]
    rows["host_length"][compressed] = placements["length"][compressed]
    if geometry.prefix is Prefix.GRAIN_MARKER:
        rows["flags"][compressed] = FLAG_GRAIN_MARKER
    joined = join_neighbours(rows)
    return joined if base is None else _over_base(joined, base, start, end)


def _over_base(rows: Extents, base: Image, start: int, end: int) -> Extents:
    """Return rows whose holes are filled from the parent, the files of which follow."""
    until = max(start, min(base.virtual_size, end))
    batches: Sequence[Extents] = []
    if start < until:
        batches = list(base.data_extents(start, until - start))
    lower = np.concatenate(list(padded(iter(batches), until, end))).copy()
    lower["file"][lower["kind"] >= Kind.DATA] += np.uint32(1)
    upper_depths, lower_depths = (np.zeros(len(part), np.uint16) for part in (rows, lower))
    merged, _ = merge(rows, upper_depths, lower, lower_depths)
    return merged
