"""Disks whose last sector is not complete: zeros fill it up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore.formats.shared.alignment import align_up
from imgcore.limits import SECTOR_NBYTES
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from imgcore.engine.extents import Extents


def whole_sectors(nbytes: int, path: str) -> int:
    """Return a size in whole sectors; warn if the last one had to be filled up."""
    padded_nbytes = align_up(nbytes, SECTOR_NBYTES)
    if padded_nbytes != nbytes:
        log.warning(
            "%s: its size, %d bytes, is not a multiple of %d: zeros fill up the last sector",
            path,
            nbytes,
            SECTOR_NBYTES,
        )
    return padded_nbytes


def filled_up(batches: Iterable[Extents], end: int) -> Iterator[Extents]:
    """Yield batches of extents, the last of them with zeros up to ``end``.

    They stay in one batch, because a batch starts at a sector.
    """
    import numpy as np

    from imgcore.engine.extents import Kind, single

    waiting: Extents | None = None
    for rows in batches:
        if waiting is not None:
            yield waiting
        if len(rows) > 1:
            yield rows[:-1]
        waiting = rows[-1:]
    if waiting is None:
        return
    done = int(waiting["guest_offset"][0]) + int(waiting["length"][0])
    if done < end:
        waiting = np.concatenate((waiting, single(done, end - done, Kind.ZERO)))
    yield waiting
