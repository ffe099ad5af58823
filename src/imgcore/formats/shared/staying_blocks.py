"""Finds the blocks of a new format that can stay where the old one has their data."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from imgcore.engine.extents import Kind
from imgcore.limits import MIB

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.formats.api import BlockRule, Survey

    Integers = NDArray[np.int64]

# The first bytes of a flat disk would still be recognised as a file system or a
# partition table where they are, whatever the new format's header says.
FLAT_FRONT_NBYTES = MIB


class Runs(NamedTuple):
    """Blocks that follow each other on the disk and in the file; a row for each run.

    Attributes
    ----------
    first_block, n_blocks : ndarray of int64
        Numbers of target blocks: ascending, without overlaps.
    host_offset : ndarray of int64
        Where the run starts in the file, in bytes.
    """

    first_block: Integers
    n_blocks: Integers
    host_offset: Integers

    def ends(self, block_nbytes: int) -> Integers:
        """Return where the runs end in the file."""
        ends: Integers = self.host_offset + self.n_blocks * block_nbytes
        return ends

    def where(self, which: NDArray[np.bool_] | Integers) -> Runs:
        """Return some of the runs."""
        return Runs(*(column[which] for column in self))


def front_nbytes(survey: Survey, rule: BlockRule) -> int:
    """Return the host offset before which no block stays."""
    return max(rule.first_offset, FLAT_FRONT_NBYTES if survey.is_flat else 0)


def staying_blocks(survey: Survey, rule: BlockRule, virtual_size: int) -> Runs:
    """Return the blocks that satisfy a format's rule where they are.

    Parameters
    ----------
    survey : Survey
    rule : BlockRule
    virtual_size : int
        Size of the disk in bytes, which may end inside its last block.

    Returns
    -------
    Runs
        Each block's bytes are plain data of one row of file 0, or of a flat file, whose
        holes read as zeros.  No two blocks overlap: of those that would, the first one
        in the file stays.  The disk's last block may end after the end of the file.

    Notes
    -----
    Memory: some arrays of the size of the survey, and of overlapping runs.
    """
    nbytes = rule.block_nbytes
    runs = _flat_runs(survey.rows, nbytes) if survey.is_flat else None
    if runs is None:
        runs = whole_blocks(survey.rows, nbytes, virtual_size)
        runs = runs.where((runs.host_offset - rule.phase) % rule.alignment == 0)
    elif rule.phase or nbytes % rule.alignment:
        runs = runs.where(np.zeros(len(runs.n_blocks), dtype=bool))
    runs = _between(runs, front_nbytes(survey, rule), rule.end_offset, nbytes)
    return runs if survey.is_flat else _without_overlaps(runs, nbytes)


def _columns(rows: Extents) -> tuple[Integers, Integers, Integers]:
    # Files and disks are smaller than 2^63 bytes.
    names = ("guest_offset", "length", "host_offset")
    guest, length, host = (rows[name].astype(np.int64) for name in names)
    return guest, length, host


def _flat_runs(rows: Extents, nbytes: int) -> Runs:
    """Return the blocks of a flat file that have any data."""
    guest, length, _ = _columns(rows)
    first, end = guest // nbytes, -(-(guest + length) // nbytes)
    # Two rows may have data in the same block.
    starts = np.flatnonzero(np.concatenate(([True], first[1:] > end[:-1]))[: len(first)])
    first = first[starts]
    end = end[np.append(starts[1:] - 1, len(end) - 1)] if len(starts) else end
    return Runs(first, end - first, first * nbytes)


def whole_blocks(rows: Extents, nbytes: int, virtual_size: int) -> Runs:
    """Return the blocks that are inside one row of plain data, wherever that is."""
    # Other files than the image's own have what a log puts over it, for example.
    is_here = (rows["kind"] == Kind.DATA) & (rows["file"] == 0)
    guest, length, host = _columns(rows[is_here])
    first, end = -(-guest // nbytes), (guest + length) // nbytes
    end[guest + length == virtual_size] = -(-virtual_size // nbytes)
    runs = Runs(first, end - first, host + first * nbytes - guest)
    return runs.where(runs.n_blocks > 0)


def _between(runs: Runs, start: int, end: int, nbytes: int) -> Runs:
    """Return the blocks that lie in [start, end) of the file."""
    n_before = np.clip(-((runs.host_offset - start) // nbytes), 0, runs.n_blocks)
    n_after = np.clip(-((end - runs.ends(nbytes)) // nbytes), 0, runs.n_blocks - n_before)
    runs = Runs(
        runs.first_block + n_before,
        runs.n_blocks - n_before - n_after,
        runs.host_offset + n_before * nbytes,
    )
    return runs.where(runs.n_blocks > 0)


def _without_overlaps(runs: Runs, nbytes: int) -> Runs:
    """Return the runs without blocks that overlap one before them in the file."""
    order = np.argsort(runs.host_offset, kind="stable")
    starts, reach = runs.host_offset[order], np.maximum.accumulate(runs.ends(nbytes)[order])
    group = np.cumsum(np.concatenate(([True], starts[1:] >= reach[:-1]))[: len(starts)])
    is_alone = np.empty(len(order), dtype=bool)
    is_alone[order] = np.bincount(group)[group] == 1
    if is_alone.all():
        return runs
    blocks = _single_blocks(runs.where(~is_alone), nbytes)
    blocks = blocks.where(np.argsort(blocks.host_offset, kind="stable"))
    gaps = np.diff(blocks.host_offset, prepend=-nbytes)
    joined = [runs.where(is_alone), blocks.where(gaps >= nbytes)]
    both = Runs(*(np.concatenate(columns) for columns in zip(*joined, strict=True)))
    return both.where(np.argsort(both.first_block, kind="stable"))


def _single_blocks(runs: Runs, nbytes: int) -> Runs:
    count = runs.n_blocks
    index = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    return Runs(
        np.repeat(runs.first_block, count) + index,
        np.ones(len(index), dtype=np.int64),
        np.repeat(runs.host_offset, count) + index * nbytes,
    )
