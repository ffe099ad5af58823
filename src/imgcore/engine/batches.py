"""Cuts extents into batches for the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from imgcore.engine.extents import Kind, clip
from imgcore.engine.supply import Batch
from imgcore.limits import MAX_BATCH_ROWS

if TYPE_CHECKING:
    from imgcore.engine.extents import Extents


def cut_batches(
    extents: Iterator[Extents],
    *,
    unit: int,
    max_nbytes: int,
    disk_end: int,
    skip_empty: bool,
    gap_nbytes: int = 0,
    first_nbytes: int | None = None,
) -> Iterator[Batch]:
    """Yield batches that start and end at multiples of ``unit``, or at the disk's end.

    Parameters
    ----------
    extents : iterator of ndarray
        Gap-free extents of ``[0, disk_end)``.
    unit : int
        Bytes of a target block, or of a group of blocks with its own table.
    max_nbytes : int
        The most guest bytes of one batch, a multiple of ``unit``.  This bounds the
        placements of a batch.
    disk_end : int
        Bytes.
    skip_empty : bool
        Leave out units without data: the target already reads as zeros there.
    gap_nbytes : int
        The least bytes that are left out; more if that takes too many batches.
    first_nbytes : int, optional
        The most of the first batch, a multiple of ``unit``; each may have twice as many
        as the one before.

    Yields
    ------
    Batch
        Ascending; with ``skip_empty`` there may be gaps between them.

    Notes
    -----
    Memory: the rows of one unit, and of one batch of extents.
    """
    pending: list[Extents] = []
    start = end = n_rows = 0
    most = max_nbytes if first_nbytes is None else min(first_nbytes, max_nbytes)
    for rows in extents:
        pending.append(rows)
        n_rows += len(rows)
        end = _end(rows)
        if end < disk_end and end - start < most and n_rows < MAX_BATCH_ROWS // 2:
            continue
        until = end if end == disk_end else end - end % unit
        if until < disk_end and until - start > most:
            until -= (until - start) % most
        if until > start:
            joined = np.concatenate(pending) if len(pending) > 1 else pending[0]
            kept = clip(joined, start, until)
            # The engine itself steps over shorter rows, which costs less than further
            # batches.
            least = max(max_nbytes // 16, 2 * unit, gap_nbytes) if skip_empty else None
            yield from _split(kept, unit, most, least)
            pending = [clip(joined, until, end)] if until < end else []
            n_rows = len(pending[0]) if pending else 0
            start = until
            most = min(2 * most, max_nbytes)


def _split(rows: Extents, unit: int, max_nbytes: int, least_nbytes: int | None) -> Iterator[Batch]:
    """Yield a gap-free array in pieces of at most ``max_nbytes``.

    Empty ranges of ``least_nbytes`` are left out; None: none are.
    """
    start = int(rows["guest_offset"][0])
    end = _end(rows)
    for first, last in _filled_ranges(rows, start, end, unit, least_nbytes):
        for at in range(first, last, max_nbytes):
            until = min(at + max_nbytes, last)
            yield Batch(at, until, np.ascontiguousarray(clip(rows, at, until)))


def _filled_ranges(
    rows: Extents, start: int, end: int, unit: int, least_nbytes: int | None
) -> Iterator[tuple[int, int]]:
    """Yield the ranges between long empty rows."""
    if least_nbytes is None:
        yield start, end
        return
    long = (rows["kind"] <= Kind.ZERO) & (rows["length"] >= np.uint64(least_nbytes))
    for row in rows[long]:
        empty_from = int(row["guest_offset"])
        empty_to = empty_from + int(row["length"])
        empty_from += -empty_from % unit
        empty_to = empty_to if empty_to == end else empty_to - empty_to % unit
        if start < empty_from:
            yield start, empty_from
        start = empty_to
    if start < end:
        yield start, end


def pair_up(
    a: Iterator[Extents], b: Iterator[Extents]
) -> Iterator[tuple[int, int, Extents, Extents]]:
    """Yield the rows of two layouts of one range, cut where a batch of either ends.

    Parameters
    ----------
    a, b : iterator of ndarray
        Gap-free extents of the same range.

    Yields
    ------
    tuple
        Start and end in bytes, and both sides' rows of that range.
    """
    rows_a, rows_b = next(a, None), next(b, None)
    while rows_a is not None and rows_b is not None:
        start = int(rows_a["guest_offset"][0])
        end_a, end_b = _end(rows_a), _end(rows_b)
        end = min(end_a, end_b)
        yield start, end, clip(rows_a, start, end), clip(rows_b, start, end)
        rows_a = clip(rows_a, end, end_a) if end < end_a else next(a, None)
        rows_b = clip(rows_b, end, end_b) if end < end_b else next(b, None)


def _end(rows: Extents) -> int:
    return int(rows["guest_offset"][-1]) + int(rows["length"][-1])
