"""Checks a stated size of grain tables against where the tables are.

Every known producer writes tables of 512 entries.  A header may state another number,
but if it is damaged, the tables would be read at the wrong places of the disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.errors import CorruptImageError
from imgcore.formats.vmdk.layout import ENTRY_ABSENT, GT_NBYTES, GTES_PER_GT, MARKER, Marker
from imgcore.formats.vmdk.tables import absent_or_zeroed, read_directory
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.formats.vmdk.header import SparseExtent

# The first tables are evidence enough.
_MAX_TABLES: Final = 1024


def refuse_contradicting_tables(extent: SparseExtent) -> None:
    """Raise CorruptImageError if tables do not have the size that the header states.

    They do not if they overlap, if there are more entries after a table's end, or if
    tables of 512 entries fit where all of them are.
    """
    if extent.n_gtes_per_gt == GTES_PER_GT or not extent.gd_offset:
        return
    reason = _contradiction_in_stream(extent) if extent.has_markers else _contradiction(extent)
    if reason is not None:
        raise CorruptImageError(
            f"the header states grain tables of {extent.n_gtes_per_gt} entries, but {reason}",
            path=extent.file.path,
            offset=44,
        )


def _tables(extent: SparseExtent, gd_offset: int) -> NDArray[np.int64]:
    """Return the offsets of the first tables, 0 for those that are absent."""
    n_entries = min(extent.n_directory_entries, _MAX_TABLES)
    directory = read_directory(extent, gd_offset, 0, n_entries)
    absent, _ = absent_or_zeroed(extent, directory)
    offsets = directory.astype(np.int64) * SECTOR_NBYTES
    offsets[absent | (offsets + extent.gt_nbytes > extent.file.nbytes)] = 0
    return offsets


def _contradiction(extent: SparseExtent) -> str | None:
    directories = [offset for offset in (extent.gd_offset, extent.rgd_offset) if offset]
    found = [_tables(extent, offset) for offset in directories]
    tables = np.unique(np.concatenate(found))
    tables = tables[tables > 0]
    if not len(tables):
        return None
    places = np.unique(np.concatenate((tables, directories, _grains(extent, tables))))
    following = np.searchsorted(places, tables, side="right")
    room = np.append(places, extent.file.nbytes)[following] - tables
    if (room < extent.gt_nbytes).any():
        return "tables of this size overlap"
    for table, nbytes in zip(tables.tolist(), room.tolist(), strict=True):
        rest = min(nbytes, GT_NBYTES) - extent.gt_nbytes
        if rest > 0 and any(extent.file.pread(table + extent.gt_nbytes, rest)):
            return f"the table at {table:#x} has more"
    reach = GTES_PER_GT * extent.grain_nbytes
    n_needed = -(-extent.capacity // reach)
    stated_nsectors = -(-extent.gt_nbytes // SECTOR_NBYTES)
    is_wide = len(tables) > 1 and (np.diff(tables) >= GT_NBYTES).all()
    is_enough = all(not offsets[n_needed:].any() for offsets in found)
    if stated_nsectors < GT_NBYTES // SECTOR_NBYTES and is_wide and is_enough:
        return f"there are as many tables, and as far apart, as {GTES_PER_GT} entries need"
    return None


def _grains(extent: SparseExtent, tables: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the grains of some tables are."""
    parts = [np.frombuffer(extent.file.pread(at, extent.gt_nbytes), "<u4") for at in tables]
    entries = np.concatenate(parts)
    return entries[entries > ENTRY_ABSENT + 1].astype(np.int64) * SECTOR_NBYTES


def _contradiction_in_stream(extent: SparseExtent) -> str | None:
    """Compare with the numbers of sectors in the tables' markers, if they have any."""
    wanted = -(-extent.gt_nbytes // SECTOR_NBYTES)
    for table in _tables(extent, extent.gd_offset).tolist():
        if table < SECTOR_NBYTES:
            continue
        n_sectors, size, kind = MARKER.unpack(extent.file.pread(table - SECTOR_NBYTES, MARKER.size))
        if size == 0 and kind == Marker.GT and n_sectors != wanted:
            return f"the marker at {table - SECTOR_NBYTES:#x} says {n_sectors} sectors of entries"
    return None
