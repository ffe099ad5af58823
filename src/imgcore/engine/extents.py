"""The two tables that Python and the native core exchange, and operations on them.

An *extent* says where a piece of the virtual disk is; a *placement* says where a
target block was written.  Both are NumPy structured arrays with the layout of
``struct imgc_extent`` and ``struct imgc_placement`` in ``native/include/imgc.h``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np

from imgcore.engine.kinds import FLAG_GRAIN_MARKER as FLAG_GRAIN_MARKER
from imgcore.engine.kinds import FLAG_NO_FILE as FLAG_NO_FILE
from imgcore.engine.kinds import BlockState as BlockState
from imgcore.engine.kinds import Kind as Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Placements = NDArray[np.void]

Extents: TypeAlias = np.ndarray[Any, np.dtype[np.void]]
"""A batch of extents: an array of shape (n,) with the fields of `EXTENT_DTYPE`."""

_SECTOR: Final = np.uint64(512)

EXTENT_DTYPE: Final = np.dtype(
    [
        ("guest_offset", "<u8"),
        ("length", "<u8"),
        ("host_offset", "<u8"),
        ("host_length", "<u8"),
        ("file", "<u4"),
        ("kind", "<u2"),
        ("flags", "<u2"),
    ]
)
"""The fields of an extent, in bytes: a range of the disk (``guest_offset``, ``length``)
and its place (``host_offset``, ``host_length``) in the file of index ``file``; its
`Kind` in ``kind``; and ``flags``, which are for the engine."""

PLACEMENT_DTYPE: Final = np.dtype([("host_offset", "<u8"), ("length", "<u4"), ("state", "<u4")])


def single(
    guest_offset: int, length: int, kind: Kind, *, host_offset: int = 0, file: int = 0
) -> Extents:
    """Return a batch of one HOLE, ZERO or DATA extent.

    Parameters
    ----------
    guest_offset, length, host_offset : int
        Bytes.
    kind : Kind
        HOLE, ZERO or DATA.
    file : int
        Index of the source that contains the DATA.

    Returns
    -------
    ndarray, shape (1,), dtype EXTENT_DTYPE
    """
    host_length = length if kind is Kind.DATA else 0
    row = (guest_offset, length, host_offset, host_length, file, kind, 0)
    return np.array([row], dtype=EXTENT_DTYPE)


def all_data(nbytes: int) -> Iterator[Extents]:
    """Yield one DATA extent of a whole disk; nothing for an empty one."""
    if nbytes:
        yield single(0, nbytes, Kind.DATA)


def join_neighbours(rows: Extents) -> Extents:
    """Return rows in which neighbours that continue each other are joined.

    Parameters
    ----------
    rows : ndarray, shape (n,), dtype EXTENT_DTYPE
        Ascending, possibly with gaps between them.

    Returns
    -------
    ndarray, shape (m,), dtype EXTENT_DTYPE
        A copy.  DATA is joined only if it is contiguous in the file as well, and
        compressed rows are not joined.
    """
    if not len(rows):
        return rows.copy()
    a, b = rows[:-1], rows[1:]
    goes_on = (a["kind"] == b["kind"]) & (a["guest_offset"] + a["length"] == b["guest_offset"])
    goes_on &= a["kind"] <= Kind.DATA
    goes_on &= (b["kind"] != Kind.DATA) | (
        (a["file"] == b["file"]) & (a["host_offset"] + a["length"] == b["host_offset"])
    )
    firsts = np.flatnonzero(np.concatenate(([True], ~goes_on)))
    joined = rows[firsts]
    joined["length"] = np.add.reduceat(rows["length"], firsts)
    plain = joined["kind"] == Kind.DATA
    joined["host_length"][plain] = joined["length"][plain]
    joined["host_length"][joined["kind"] < Kind.DATA] = 0
    return joined


def clip(rows: Extents, start: int, end: int) -> Extents:
    """Return the part of a gap-free batch that lies in ``[start, end)``.

    Parameters
    ----------
    rows : ndarray, shape (n,), dtype EXTENT_DTYPE
        Ascending and gap-free; it covers ``[start, end)``.
    start, end : int
        Bytes, ``start < end``.

    Returns
    -------
    ndarray, shape (m,), dtype EXTENT_DTYPE
        A view if no row had to be cut, else a copy.
    """
    first, last = _rows_between(rows, start, end)
    part = rows[first:last]
    head, tail = part[0], part[-1]
    n_before = start - int(head["guest_offset"])
    n_after = int(tail["guest_offset"]) + int(tail["length"]) - end
    if n_before == 0 and n_after == 0:
        return part
    part = part.copy()
    _shorten(part[:1], n_before, n_before)
    _shorten(part[-1:], 0, n_after)
    return part


def lose(rows: Extents, which: NDArray[np.bool_]) -> None:
    """Make rows LOST, in place."""
    for name in ("host_offset", "host_length", "flags"):
        rows[name][which] = 0
    rows["kind"][which] = Kind.LOST


def lose_ranges(
    rows: Extents,
    starts: NDArray[np.uint64],
    ends: NDArray[np.uint64],
    *,
    file: int | None = None,
) -> Extents:
    """Return a gap-free batch in which given ranges are LOST.

    Parameters
    ----------
    rows : ndarray, shape (n,), dtype EXTENT_DTYPE
        Ascending and gap-free.
    starts, ends : ndarray, shape (m,), dtype uint64
        Ranges in bytes, ascending and disjoint: guest offsets, multiples of 512; or
        host offsets, if ``file`` is given.
    file : int, optional
        The file of host ranges: DATA in them is lost, in whole sectors of the guest.

    Returns
    -------
    ndarray, shape (k,), dtype EXTENT_DTYPE
        ``rows`` itself, if no range touches it.
    """
    low = rows["guest_offset" if file is None else "host_offset"]
    high = low + rows["length"]
    first = np.searchsorted(ends, low, side="right")
    last = np.searchsorted(starts, high, side="left")
    n_ranges = np.maximum(last - first, 0)
    if file is not None:
        n_ranges[(rows["kind"] != Kind.DATA) | (rows["file"] != file)] = 0
    if not n_ranges.any():
        return rows
    row = np.repeat(np.arange(len(rows)), n_ranges)
    before = np.cumsum(n_ranges) - n_ranges
    index = np.arange(len(row)) - np.repeat(before - first, n_ranges)
    guest, length = rows["guest_offset"][row], rows["length"][row]
    # From the start of each row, to whole sectors of the guest.
    start = np.maximum(starts[index], low[row]) - low[row]
    start -= start % _SECTOR
    end = np.minimum(ends[index], high[row]) - low[row]
    end = np.minimum(end + (_SECTOR - end % _SECTOR) % _SECTOR, length)
    edges = np.concatenate((rows["guest_offset"], guest + start, guest + end))
    disk_end = rows["guest_offset"][-1] + rows["length"][-1]
    parts = split(rows, np.unique(edges[edges < disk_end]))
    lost_from, lost_to = guest + start, guest + end
    inside = np.searchsorted(lost_from, parts["guest_offset"], side="right") - 1
    which = (inside >= 0) & (parts["guest_offset"] < lost_to[np.maximum(inside, 0)])
    lose(parts, which)
    return parts


def cut_at_ranges(
    rows: Extents, starts: NDArray[np.uint64], ends: NDArray[np.uint64]
) -> tuple[Extents, NDArray[np.bool_]]:
    """Return a gap-free batch cut where ranges start and end, and what is inside them.

    Parameters
    ----------
    rows : ndarray, shape (n,), dtype EXTENT_DTYPE
        Ascending and gap-free.
    starts, ends : ndarray, shape (m,), dtype uint64
        Ranges of the disk, ascending and disjoint; multiples of 512, or the disk's end.

    Returns
    -------
    tuple of ndarray, shapes (k,)
        A copy of the rows, and for each whether it is inside a range.
    """
    first = rows["guest_offset"][0]
    last = rows["guest_offset"][-1] + rows["length"][-1]
    edges = np.concatenate((starts, ends))
    edges = edges[(edges > first) & (edges < last)]
    parts = split(rows, np.union1d(rows["guest_offset"], edges))
    range_of = np.searchsorted(starts, parts["guest_offset"], side="right")
    # One more range, before all others.
    ends = np.concatenate((np.zeros(1, np.uint64), ends))
    return parts, parts["guest_offset"] < ends[range_of]


def zeroed_at_ranges(
    rows: Extents, starts: NDArray[np.uint64], ends: NDArray[np.uint64]
) -> Extents:
    """Return a gap-free batch with ZERO in ranges, as for `cut_at_ranges`."""
    parts, is_inside = cut_at_ranges(rows, starts, ends)
    for name in ("host_offset", "host_length", "file", "flags"):
        parts[name][is_inside] = 0
    parts["kind"][is_inside] = Kind.ZERO
    return parts


def _rows_between(rows: Extents, start: int, end: int) -> tuple[int, int]:
    offsets = rows["guest_offset"]
    first = int(np.searchsorted(offsets, np.uint64(start), side="right")) - 1
    last = int(np.searchsorted(offsets, np.uint64(end), side="left"))
    return first, last


def _shorten(row: Extents, n_before: int, n_less: int) -> None:
    """Move a one-row array's start by ``n_before``, and its length by ``-n_less``."""
    row["guest_offset"] += np.uint64(n_before)
    row["length"] -= np.uint64(n_less)
    if row["kind"][0] == Kind.DATA:
        row["host_offset"] += np.uint64(n_before)
        row["host_length"] = row["length"]


def split(rows: Extents, starts: NDArray[np.uint64]) -> Extents:
    """Return a gap-free batch with its rows cut at given offsets.

    Parameters
    ----------
    rows : ndarray, shape (n,), dtype EXTENT_DTYPE
        Ascending and gap-free.
    starts : ndarray, shape (m,), dtype uint64
        Guest offsets in bytes, ascending: the starts of the new rows.  They include the
        starts of the old ones.

    Returns
    -------
    ndarray, shape (m,), dtype EXTENT_DTYPE
        A copy that covers the same range.
    """
    end = rows["guest_offset"][-1] + rows["length"][-1]
    lengths = np.append(starts[1:], end) - starts
    out = rows[np.searchsorted(rows["guest_offset"], starts, side="right") - 1]
    plain = out["kind"] == Kind.DATA
    out["host_offset"][plain] += (starts - out["guest_offset"])[plain]
    out["host_length"][plain] = lengths[plain]
    out["guest_offset"] = starts
    out["length"] = lengths
    return out
