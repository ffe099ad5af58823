"""Decides which blocks of a rewritten image stay in their place, and which move.

Everything here is about runs of blocks, as arrays: a disk of 1 TiB has millions of
blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from imgcore.engine.extents import PLACEMENT_DTYPE, BlockState, Kind
from imgcore.limits import MAX_BATCH_ROWS, MIB

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents, Placements
    from imgcore.formats.api import BlockRule, Survey

    Offsets = NDArray[np.int64]

# Programs recognise the content of disks by what is here: file systems and partition
# tables.  Of a disk that a file has from its first byte on, it moves, and zeros follow.
PROBED_NBYTES: Final = 1 * MIB

# Blocks for which placements are made at once.
_BATCH_BLOCKS: Final = 1 << 16


class Runs(NamedTuple):
    """Runs of blocks that follow each other on the disk and in the file.

    Attributes
    ----------
    first, n_blocks : ndarray, shape (n,), dtype int64
        Number of the first block, and of blocks; ascending and disjoint.
    host : ndarray, shape (n,), dtype int64
        Host offset of the first block.
    packed : ndarray, shape (n,), dtype uint32
        Length in the file of a compressed block, which is a run of one; 0 for others.
    """

    first: Offsets
    n_blocks: Offsets
    host: Offsets
    packed: NDArray[np.uint32]

    @classmethod
    def joined(cls, parts: Iterable[Runs]) -> Runs:
        """Return the runs of several arrays, ascending."""
        filled = [part for part in parts if len(part.first)]
        if len(filled) < 2:
            return filled[0] if filled else cls.none()
        runs = cls._make(np.concatenate(column) for column in zip(*filled, strict=True))
        if (runs.first[1:] < runs.first[:-1]).any():
            runs = runs.take(np.argsort(runs.first, kind="stable"))
        return runs

    @classmethod
    def stored(cls, first: Offsets, n_blocks: Offsets, host: Offsets) -> Runs:
        """Return runs of plain blocks."""
        return cls(first, n_blocks, host, np.zeros(len(first), dtype=np.uint32))

    @classmethod
    def none(cls) -> Runs:
        """Return no run."""
        return cls.stored(*np.zeros((3, 0), dtype=np.int64))

    def take(self, which: NDArray[np.bool_] | NDArray[np.intp]) -> Runs:
        """Return some of the runs."""
        return Runs._make(column[which] for column in self)

    def part(self, start: Offsets, end: Offsets, block_nbytes: int) -> Runs:
        """Return blocks [start, end) of each run of plain blocks, if there are any."""
        part = Runs.stored(self.first + start, end - start, self.host + start * block_nbytes)
        return part.take(part.n_blocks > 0)

    def host_end(self, block_nbytes: int) -> Offsets:
        """Return where each run ends in the file."""
        end = self.host + self.n_blocks * block_nbytes
        is_packed = self.packed > 0
        end[is_packed] = self.host[is_packed] + self.packed[is_packed]
        return end


class Layout(NamedTuple):
    """Blocks of the new image that stay, and those that move.

    Attributes
    ----------
    block_nbytes : int
    stay : Runs
    moved_first, moved_count : ndarray, shape (n,), dtype int64
        Runs of blocks that move, ascending, disjoint, and apart from those that stay.
    """

    block_nbytes: int
    stay: Runs
    moved_first: Offsets
    moved_count: Offsets

    def data_nbytes(self, disk_nbytes: int) -> int:
        """Return how much of the disk is in blocks."""
        stayed_nbytes = self.nbytes_of(self.stay.first, self.stay.n_blocks, disk_nbytes)
        return stayed_nbytes + self.nbytes_of(self.moved_first, self.moved_count, disk_nbytes)

    def nbytes_of(self, first: Offsets, count: Offsets, disk_nbytes: int) -> int:
        """Return how much of the disk is in runs."""
        if not len(first):
            return 0
        after_end = int(first[-1] + count[-1]) * self.block_nbytes - disk_nbytes
        return int(count.sum()) * self.block_nbytes - max(after_end, 0)


class _Rows(NamedTuple):
    """Rows of a survey as signed numbers, and what may stay of them."""

    guest: Offsets
    end: Offsets
    host: Offsets
    is_plain: NDArray[np.bool_]
    packed: NDArray[np.uint32]


def with_wrappers(taken: frozenset[Kind]) -> frozenset[Kind]:
    """Return the kinds of compressed blocks that are, or have in them, one of these."""
    return taken | {Kind.ZLIB} if Kind.DEFLATE in taken else taken


def lay_out(
    survey: Survey, rule: BlockRule, disk_nbytes: int, overwrites: Sequence[tuple[int, int]]
) -> Layout:
    """Return which blocks stay, and which move.

    Parameters
    ----------
    survey : Survey
    rule : BlockRule
        That of the target.
    disk_nbytes : int
        Size of the disk.
    overwrites : sequence of (offset, length)
        Parts of the file that will be overwritten: no block may stay there.

    Notes
    -----
    A block stays if all of it is at one suitable place, which no other block that stays
    has a part of.  What of a block is not in the image reads as zeros, but the file may
    have other bytes there; only of a flat disk it is known that they are zeros.
    """
    assert rule.block_nbytes % rule.alignment == 0
    size = rule.block_nbytes
    stay: list[Runs] = []
    moved: list[tuple[Offsets, Offsets]] = []
    for rows in _pieces(survey, rule, disk_nbytes):
        runs = _staying(rows, rule, disk_nbytes, survey.file_nbytes)
        moved.append(_gaps(*_touched(rows, size), runs))
        stay.append(runs)
    runs = Runs.joined(stay)
    stay.clear()
    kept, lost = _without_overlaps(runs, size)
    for start, length in overwrites:
        moved.append((lost.first, lost.first + lost.n_blocks))
        kept, lost = _outside(kept, start, start + length, size)
    moved.append((lost.first, lost.first + lost.n_blocks))
    first, end = (np.concatenate(column) for column in zip(*moved, strict=True))
    order = np.argsort(first, kind="stable")
    first, end = _merged(first[order], end[order])
    return Layout(size, kept, first, end - first)


def _pieces(survey: Survey, rule: BlockRule, disk_nbytes: int) -> Iterator[_Rows]:
    """Yield the rows of a survey; those of a flat disk widened to whole blocks."""
    if survey.is_flat:
        yield _flat_rows(survey.rows, rule.block_nbytes, disk_nbytes)
        return
    for start in range(0, max(len(survey.rows), 1), MAX_BATCH_ROWS):
        rows = survey.rows[start : start + MAX_BATCH_ROWS]
        guest, length, host = (
            rows[name].astype(np.int64) for name in ("guest_offset", "length", "host_offset")
        )
        is_own = rows["file"] == 0
        is_packed = is_own & np.isin(rows["kind"], list(rule.takes_compressed))
        # Readers of the target decompress whole blocks.
        is_packed &= (guest % rule.block_nbytes == 0) & (length == rule.block_nbytes)
        packed = np.where(is_packed, rows["host_length"], 0).astype(np.uint32)
        is_plain = is_own & (rows["kind"] == Kind.DATA)
        yield _Rows(guest, guest + length, host, is_plain, packed)


def _flat_rows(rows: Extents, block_nbytes: int, disk_nbytes: int) -> _Rows:
    guest, length = (rows[name].astype(np.int64) for name in ("guest_offset", "length"))
    first, end = _merged(guest // block_nbytes, -(-(guest + length) // block_nbytes))
    start = first * block_nbytes
    ends = np.minimum(end * block_nbytes, disk_nbytes)
    packed = np.zeros(len(start), dtype=np.uint32)
    return _Rows(start, ends, start, np.ones(len(start), dtype=np.bool_), packed)


def _staying(rows: _Rows, rule: BlockRule, disk_nbytes: int, file_nbytes: int) -> Runs:
    """Return the whole blocks of rows that are at suitable places."""
    size = rule.block_nbytes
    first, end = -(-rows.guest // size), rows.end // size
    # The file is extended for a block that the ends of both the disk and the file cut.
    cut = (rows.end == disk_nbytes) & (rows.host + (rows.end - rows.guest) >= file_nbytes)
    end = np.where(cut, -(-rows.end // size), end)
    host = rows.host + first * size - rows.guest
    n_before = np.maximum(-(-(rule.first_offset - host) // size), 0)
    first, host = first + n_before, host + n_before * size
    end = np.minimum(end, first + (rule.end_offset - host) // size)
    is_plain = rows.is_plain & (host % rule.alignment == rule.phase) & (first < end)
    is_packed = (rows.packed > 0) & (rows.host >= rule.first_offset)
    is_packed &= rows.host + rows.packed <= rule.end_offset
    which = np.flatnonzero(is_plain | is_packed)
    as_packed = is_packed[which]
    return Runs(
        np.where(as_packed, rows.guest[which] // size, first[which]),
        np.where(as_packed, 1, (end - first)[which]),
        np.where(as_packed, rows.host[which], host[which]),
        rows.packed[which],
    )


def _touched(rows: _Rows, block_nbytes: int) -> tuple[Offsets, Offsets]:
    """Return the blocks that have a part of a row, as runs."""
    return _merged(rows.guest // block_nbytes, -(-rows.end // block_nbytes))


def _merged(first: Offsets, end: Offsets) -> tuple[Offsets, Offsets]:
    """Return ascending runs of blocks, those that touch or overlap as one."""
    if not len(first):
        return first, end
    starts = np.flatnonzero(np.concatenate(([True], first[1:] > end[:-1])))
    return first[starts], end[np.append(starts[1:] - 1, len(end) - 1)]


def _without_overlaps(runs: Runs, block_nbytes: int) -> tuple[Runs, Runs]:
    """Return runs of which no two have a byte of the file in common, and the others.

    Of blocks at the same place, the first on the disk stays.
    """
    order = np.argsort(runs.host, kind="stable")
    ends = runs.host_end(block_nbytes)[order]
    np.maximum.accumulate(ends, out=ends)
    overlaps = order[1:][runs.host[order[1:]] < ends[:-1]]
    if not len(overlaps):
        return runs, Runs.none()
    keeps = np.ones(len(order), dtype=np.bool_)
    keeps[overlaps] = False
    return runs.take(keeps), runs.take(~keeps)


def _outside(runs: Runs, start: int, end: int, block_nbytes: int) -> tuple[Runs, Runs]:
    """Return runs without blocks that have a byte in a range of the file, and these."""
    hit = (runs.host < end) & (runs.host_end(block_nbytes) > start)
    if not hit.any():
        return runs, Runs.none()
    whole = runs.take(hit & (runs.packed > 0))
    cut = runs.take(hit & (runs.packed == 0))
    n_before = np.maximum((start - cut.host) // block_nbytes, 0)
    n_until = np.minimum(-(-(end - cut.host) // block_nbytes), cut.n_blocks)
    before = cut.part(np.zeros_like(n_before), n_before, block_nbytes)
    lost = cut.part(n_before, n_until, block_nbytes)
    after = cut.part(n_until, cut.n_blocks, block_nbytes)
    return Runs.joined((runs.take(~hit), before, after)), Runs.joined((whole, lost))


def _gaps(first: Offsets, end: Offsets, runs: Runs) -> tuple[Offsets, Offsets]:
    """Return the blocks of ascending runs that are not among others, as runs.

    Each of the others lies in one of the first.
    """
    # Two ascending parts each, which a stable sort merges.
    starts = np.sort(np.concatenate((first, runs.first + runs.n_blocks)), kind="stable")
    ends = np.sort(np.concatenate((end, runs.first)), kind="stable")
    which = starts < ends
    return starts[which], ends[which]


def placements(runs: Runs, block_nbytes: int) -> Iterator[tuple[int, Placements]]:
    """Yield placements in order of the disk, with the number of their first block.

    Long parts of the disk without blocks are left out.
    """
    ends = runs.first + runs.n_blocks
    position = 0
    while (at := int(np.searchsorted(ends, position, side="right"))) < len(ends):
        low = max(position, int(runs.first[at]))
        stop = int(np.searchsorted(runs.first, low + _BATCH_BLOCKS))
        position = min(int(ends[stop - 1]), low + _BATCH_BLOCKS)
        part = Runs._make(column[at:stop] for column in runs)
        yield low, _placed(part, low, position, block_nbytes)


def _placed(runs: Runs, low: int, high: int, block_nbytes: int) -> Placements:
    """Return the placements of blocks [low, high)."""
    first = np.maximum(runs.first, low)
    count = np.minimum(runs.first + runs.n_blocks, high) - first
    host = runs.host + (first - runs.first) * block_nbytes
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    block = np.repeat(first - low, count) + within
    packed = np.repeat(runs.packed, count)
    out = np.zeros(high - low, dtype=PLACEMENT_DTYPE)
    out["host_offset"][block] = np.repeat(host, count) + within * block_nbytes
    out["length"][block] = np.where(packed > 0, packed, block_nbytes)
    out["state"][block] = np.where(packed > 0, BlockState.COMPRESSED, BlockState.STORED)
    return out
