"""Which data can be reflinked unread: by its places in source and target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from imgcore.engine.geometry import Placing
from imgcore.engine.kinds import FLAG_UNREAD, Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.engine.geometry import Geometry


class ReflinkCount(NamedTuple):
    """What a conversion would reflink and copy, in bytes.

    Attributes
    ----------
    reflinked, copied : int
        Stored data; holes and zeros are neither.
    unaligned_end : int
        How much of ``copied`` is only an incomplete block of the file system at the
        disk's end.
    n_calls : int
        Calls of the system for the reflinks.
    """

    reflinked: int = 0
    copied: int = 0
    unaligned_end: int = 0
    n_calls: int = 0


class ReflinkRule(NamedTuple):
    """Where data must be to be reflinked to a target.

    Attributes
    ----------
    geometry : Geometry
        The target's.
    units : ndarray, shape (n,), dtype uint64
        For each source file the block size of its file system, a power of two; 0 for a
        file that cannot be reflinked.
    has_reflinks : bool
        Whether the first file can be reflinked, wherever its data is.
    """

    geometry: Geometry
    units: NDArray[np.uint64]
    has_reflinks: bool

    @classmethod
    def of(cls, geometry: Geometry, units: Sequence[int]) -> ReflinkRule:
        """Return the rule; files are left out whose blocks the target's do not hold."""
        has_reflinks = any(units[:1])
        if geometry.placing is Placing.APPEND:
            step = min(geometry.block_nbytes, geometry.stored_alignment)
            units = [unit if step % (unit or 1) == 0 else 0 for unit in units]
        return cls(geometry, np.array(units, dtype=np.uint64), has_reflinks)

    def mark(self, rows: Extents) -> Extents:
        """Return a batch in which what can be reflinked has FLAG_UNREAD."""
        whole = self._whole_nbytes(rows)[0] > 0
        if not whole.any():
            return rows
        marked = rows.copy()
        marked["flags"][whole] |= FLAG_UNREAD
        return marked

    def measure(self, batches: Iterable[Extents]) -> ReflinkCount:
        """Count over the extents of the whole disk."""
        reflinked = stored = unaligned_end = n_calls = 0
        for rows in batches:
            whole, after = self._whole_nbytes(rows)
            nbytes = int(whole.sum())
            reflinked += nbytes
            stored += int(rows["length"][rows["kind"] >= Kind.DATA].sum())
            n_calls += int(np.count_nonzero(whole))
            if self.geometry.stored_prefix_nbytes:
                n_calls += nbytes // self.geometry.block_nbytes
            unaligned_end = int(after[-1])
        return ReflinkCount(reflinked, stored - reflinked, unaligned_end, n_calls)

    def _whole_nbytes(self, rows: Extents) -> tuple[Any, Any]:
        """Return the bytes in whole blocks of each row, and the bytes after them.

        A row that is shorter than a block, and starts with one, has only the latter.
        """
        is_data = rows["kind"] == Kind.DATA
        unit = np.where(is_data, self.units[np.where(is_data, rows["file"], 0)], 0)
        unit = unit.astype(np.uint64)
        is_possible = unit > 0
        last = np.maximum(unit, 1) - np.uint64(1)  # a mask: units are powers of two
        geometry = self.geometry
        shift = 0
        if geometry.placing is Placing.IDENTITY:
            shift = (geometry.host_base - geometry.guest_base) % (1 << 64)
        # Of an appended block only the offset within a unit is known.
        place = rows["guest_offset"] + np.uint64(shift)
        is_possible &= (rows["host_offset"] - place) & last == 0
        start = (place + last) & ~last
        after = (place + rows["length"]) & last
        end = place + rows["length"] - after
        is_possible &= end >= start
        return np.where(is_possible, end - start, 0), np.where(is_possible, after, 0)
