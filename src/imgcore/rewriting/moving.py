"""Copies the blocks that cannot stay to the end of the file."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from imgcore._core import Job
from imgcore.engine.batches import cut_batches
from imgcore.engine.extents import EXTENT_DTYPE, PLACEMENT_DTYPE, BlockState, Kind
from imgcore.engine.geometry import Geometry
from imgcore.engine.job import chosen_variants, thread_count, translated_errors
from imgcore.engine.source_file import native_sources
from imgcore.engine.thread_budget import Lease
from imgcore.limits import MAX_BATCH_ROWS, SECTOR_NBYTES
from imgcore.rewriting.layout import Runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from imgcore._core import RateLimit
    from imgcore.disk.image import Image
    from imgcore.engine.extents import Extents, Placements
    from imgcore.engine.progress import Tally
    from imgcore.files.target_file import TargetFile
    from imgcore.rewriting.layout import Layout, Offsets

_BATCH_BLOCKS: Final = 1 << 16


class Workers(NamedTuple):
    """How the engine copies blocks: threads, variants of operations, and rate."""

    threads: int
    variants: Mapping[str, str]
    limit: RateLimit | None = None

    @classmethod
    def default(cls, limit: RateLimit | None = None) -> Workers:
        """Return as many threads as are available."""
        return cls(thread_count(None), chosen_variants(None), limit)


def move_blocks(
    image: Image,
    rows: Extents,
    layout: Layout,
    file: TargetFile,
    offset: int,
    tally: Tally,
    workers: Workers,
) -> tuple[Runs, int]:
    """Copy the blocks that move, decompressed, to a file from ``offset`` on.

    Parameters
    ----------
    image : Image
    rows : ndarray, dtype EXTENT_DTYPE
        The survey's.
    layout : Layout
    file : TargetFile
        Reads as zeros from ``offset`` on.
    offset : int
        The first host offset at which a block may be.
    tally : Tally
        Counts what is read and written.
    workers : Workers

    Returns
    -------
    tuple
        Where the blocks are, without those of zeros only, and the next free offset.
    """
    size, disk_end = layout.block_nbytes, image.virtual_size
    geometry = Geometry(size, disk_end, stored_alignment=SECTOR_NBYTES)
    batches = cut_batches(
        moved_extents(rows, layout, disk_end),
        unit=size,
        max_nbytes=_BATCH_BLOCKS * size,
        disk_end=disk_end,
        skip_empty=True,
    )
    runs = [Runs.none()]
    with translated_errors(image.paths, file.path):
        job = Job(
            sources=native_sources(image.sources),
            geometry=geometry,
            target=file.core,
            next_offset=offset,
            threads=workers.threads,
            batch_threads=Lease(workers.threads).renew,
            variants=dict(workers.variants),
            rate_limit=workers.limit,
        )
        given_nbytes, most_nbytes = 0, layout.data_nbytes(disk_end)
        try:
            for batch in batches:
                tick = partial(_count, tally, job, batch.start - given_nbytes, most_nbytes)
                given_nbytes += batch.end - batch.start
                n_blocks = -(-(batch.end - batch.start) // size)
                placements = np.zeros(n_blocks, PLACEMENT_DTYPE)
                job.start(batch.start, batch.end, batch.rows, None, placements)
                job.wait(tick)
                tick()
                runs.append(_runs_of(placements, batch.start // size, size))
                # A last block that the disk's end cuts takes a whole place, too.
                end = int(runs[-1].host_end(size).max(initial=offset))
                job.next_offset = max(int(job.next_offset), end)
            end = int(job.next_offset)
        finally:
            job.close()
    file.note_end(end)
    return Runs.joined(runs), end


def _count(tally: Tally, job: Job, skipped_nbytes: int, most_nbytes: int) -> None:
    """Report how far a job is.

    ``skipped_nbytes`` is the sum of the gaps before, ``most_nbytes`` the disk's data:
    what is done counts as data up to that.
    """
    done, _, _, read, written, *_ = job.progress()
    position = skipped_nbytes + done
    tally.count(position, data=min(position, most_nbytes), read=read, written=written)


def _runs_of(placements: Placements, first_block: int, block_nbytes: int) -> Runs:
    """Return the stored blocks among placements as runs."""
    block = np.flatnonzero(placements["state"] == BlockState.STORED)
    host = placements["host_offset"][block].astype(np.int64)
    goes_on = (np.diff(block) == 1) & (np.diff(host) == block_nbytes)
    starts = np.flatnonzero(np.concatenate(([True], ~goes_on))) if len(block) else block
    count = np.diff(np.append(starts, len(block)))
    return Runs.stored(block[starts] + first_block, count, host[starts])


def moved_extents(rows: Extents, layout: Layout, disk_end: int) -> Iterator[Extents]:
    """Yield gap-free extents of the disk in which only what moves is data."""
    start = layout.moved_first * layout.block_nbytes
    end = start + layout.moved_count * layout.block_nbytes
    return gap_free((_inside(piece, start, end) for piece in in_pieces(rows)), disk_end)


def in_pieces(rows: Extents) -> Iterator[Extents]:
    """Yield rows in pieces that a batch has the room for, with gaps filled."""
    for at in range(0, len(rows), MAX_BATCH_ROWS // 4):
        yield rows[at : at + MAX_BATCH_ROWS // 4]


def gap_free(pieces: Iterable[Extents], disk_end: int) -> Iterator[Extents]:
    """Yield ascending rows with HOLEs between them, up to the disk's end."""
    position = 0
    for rows in pieces:
        if len(rows):
            yield _filled(rows, position)
            position = int(rows["guest_offset"][-1] + rows["length"][-1])
    if position < disk_end:
        yield _filled(np.zeros(0, dtype=EXTENT_DTYPE), position, disk_end)


def _inside(rows: Extents, start: Offsets, end: Offsets) -> Extents:
    """Return the parts of ascending rows that lie in ascending ranges of the disk."""
    low = rows["guest_offset"].astype(np.int64)
    high = low + rows["length"].astype(np.int64)
    first = np.searchsorted(end, low, side="right")
    count = np.maximum(np.searchsorted(start, high, side="left") - first, 0)
    parts = np.repeat(rows, count)
    index = np.arange(len(parts)) - np.repeat(np.cumsum(count) - count - first, count)
    low, high = np.repeat(low, count), np.repeat(high, count)
    from_, until = np.maximum(low, start[index]), np.minimum(high, end[index])
    parts["guest_offset"] = from_
    parts["length"] = until - from_
    plain = parts["kind"] == Kind.DATA
    parts["host_offset"][plain] += (from_ - low)[plain].astype(np.uint64)
    parts["host_length"][plain] = parts["length"][plain]
    return parts


def _filled(parts: Extents, start: int, stop: int | None = None) -> Extents:
    """Return ascending rows with a HOLE for each gap between ``start`` and ``stop``.

    Without ``stop``, up to the end of the last row.
    """
    low = parts["guest_offset"].astype(np.int64)
    high = low + parts["length"].astype(np.int64)
    from_ = np.concatenate(([start], high))
    until = np.concatenate((low, [from_[-1] if stop is None else stop]))
    holes = np.zeros(len(from_), dtype=EXTENT_DTYPE)
    holes["guest_offset"], holes["length"] = from_, until - from_
    holes["kind"] = Kind.HOLE
    filled = np.concatenate((parts, holes[from_ < until]))
    return filled[np.argsort(filled["guest_offset"], kind="stable")]
