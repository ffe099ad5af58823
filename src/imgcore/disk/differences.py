"""Where two disks differ: by what they have allocated, then by content."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from imgcore._core import GRANULE_DIFFERS, GRANULE_HAS_DATA, Job
from imgcore.areas.area import Area
from imgcore.disk.overlay import padded
from imgcore.disk.same_ranges import Places
from imgcore.engine.batches import cut_batches, pair_up
from imgcore.engine.extents import Kind, clip
from imgcore.engine.job import chosen_variants, translated_errors
from imgcore.engine.source_file import native_sources
from imgcore.engine.thread_budget import Lease
from imgcore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from imgcore._core import RateLimit
    from imgcore.disk.same_ranges import SameRanges
    from imgcore.engine.extents import Extents
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.engine.source_file import SourceFile

MAX_BLOCK_NBYTES: Final = 64 * MIB

# The engine's answer for a batch has a byte for each block.
_MAX_BATCH_BLOCKS: Final = 1 << 20
# It steps over what is empty, but not at no cost.
_MAX_BATCH_NBYTES: Final = 1 << 38


class Disk(Protocol):
    """What is read of an open disk: of a `DiskState`, for example."""

    @property
    def virtual_size(self) -> int: ...

    @property
    def sources(self) -> list[SourceFile]: ...

    def data_extents(
        self, start: int, length: int, rule: ReflinkRule | None
    ) -> Iterator[Extents]: ...


class Differences:
    """Finds every difference between two disks.

    What both store in the same place of the same file, or not at all, is not read.

    Parameters
    ----------
    new, old : Disk
        Open; a disk that ends before ``nbytes`` goes on with zeros.
    nbytes : int
        Bytes to compare, at most those of the larger disk.
    granularity : int
        Differences are found by blocks of so many bytes, a power of two up to
        `MAX_BLOCK_NBYTES`.
    threads : int
    report : callable
        Gets the number of bytes that are done.
    limit : RateLimit, optional
        Limits the rate of reading.
    position : int
        What comes before it is left out, as if it did not differ.
    batch_nbytes : int
        The most that is compared before the attribute ``position`` grows.

    Attributes
    ----------
    position : int
        Where the search is: all areas before it were yielded.
    """

    def __init__(
        self,
        new: Disk,
        old: Disk,
        *,
        nbytes: int,
        granularity: int,
        threads: int,
        report: Callable[[int], None],
        limit: RateLimit | None = None,
        position: int = 0,
        batch_nbytes: int = _MAX_BATCH_NBYTES,
    ) -> None:
        self._new, self._old = new, old
        # Files of the old image have their numbers after those of the new one.
        self._sources = [*new.sources, *old.sources]
        self._places = Places(self._sources)
        self._nbytes = nbytes
        self._granularity = granularity
        self._max_nbytes = min(_MAX_BATCH_BLOCKS * granularity, batch_nbytes)
        self._threads = threads
        self._report = report
        self._limit = limit
        self.position: int = position
        self._job: Job | None = None
        self._read_nbytes = 0

    def areas(self) -> Iterator[Area]:
        """Yield the blocks that differ, ascending; neighbours may be adjacent.

        Raises
        ------
        ImgcoreError, OSError
            An image cannot be read.
        """
        try:
            for start, end, new, old in pair_up(*self._sides()):
                if end <= self.position:
                    continue
                if start < self.position:
                    start = self.position
                    new, old = clip(new, start, end), clip(old, start, end)
                same = self._places.compare(new, old)
                yield from self._areas_between(same, start, new, old)
                self.position = end
                self._report(end)
        finally:
            if self._job is not None:
                self._read_nbytes = self.read_nbytes
                self._job.close()
                self._job = None

    @property
    def read_nbytes(self) -> int:
        """Bytes of files that were read so far."""
        return self._read_nbytes if self._job is None else int(self._job.progress()[3])

    def _sides(self) -> tuple[Iterator[Extents], Iterator[Extents]]:
        """Return the extents of both disks, in batches that end with a block."""
        old = _renumbered(self._extents(self._old), len(self._new.sources))
        return self._whole_blocks(self._extents(self._new)), self._whole_blocks(old)

    def _extents(self, disk: Disk) -> Iterator[Extents]:
        nbytes = min(disk.virtual_size, self._nbytes)
        return padded(disk.data_extents(0, nbytes, None), nbytes, self._nbytes)

    def _whole_blocks(self, extents: Iterator[Extents]) -> Iterator[Extents]:
        end, unit = self._nbytes, self._granularity
        batches = cut_batches(
            extents, unit=unit, max_nbytes=end + -end % unit, disk_end=end, skip_empty=False
        )
        return (batch.rows for batch in batches)

    def _areas_between(
        self, same: SameRanges, start: int, new: Extents, old: Extents
    ) -> Iterator[Area]:
        ranges = list(same.other_ranges(start, self._granularity, self._max_nbytes))
        if not ranges:
            return
        new, old = same.without(new), same.without(old)
        for first, last in ranges:
            blocks = self._compare(first, last, clip(new, first, last), clip(old, first, last))
            self._keep_stored(blocks, first, last, same)
            yield from self._areas_of(blocks, first, last)
            self.position = last

    def _compare(self, first: int, last: int, new: Extents, old: Extents) -> NDArray[np.uint8]:
        """Return the engine's answer for each block of a range."""
        blocks = np.zeros(-(-(last - first) // self._granularity), np.uint8)
        with translated_errors([source.file.path for source in self._sources]):
            if self._job is None:
                self._job = Job(
                    sources=native_sources(self._sources),
                    threads=self._threads,
                    batch_threads=Lease(self._threads).renew,
                    variants=chosen_variants(None),
                    granule_nbytes=self._granularity,
                    rate_limit=self._limit,
                )
            job = self._job
            before = job.progress()[0]
            job.start(
                first,
                last,
                np.ascontiguousarray(new),
                np.ascontiguousarray(old),
                granules=blocks,
            )
            job.wait(lambda: self._report(first + job.progress()[0] - before))
        return blocks

    def _keep_stored(
        self, blocks: NDArray[np.uint8], first: int, last: int, same: SameRanges
    ) -> None:
        """Mark blocks that seem to be zeros, but have data that was not read."""
        index = np.flatnonzero(blocks == GRANULE_DIFFERS)
        starts = np.uint64(first) + index.astype(np.uint64) * np.uint64(self._granularity)
        ends = np.minimum(starts + np.uint64(self._granularity), np.uint64(last))
        blocks[index[same.store_something(starts, ends)]] |= GRANULE_HAS_DATA

    def _areas_of(self, blocks: NDArray[np.uint8], first: int, last: int) -> Iterator[Area]:
        """Yield the runs of blocks that differ and are all data, or all zeros."""
        states = np.where(blocks & GRANULE_DIFFERS, blocks, 0)
        edges = np.flatnonzero(np.diff(states)) + 1
        starts = np.concatenate(([0], edges))
        ends = np.append(edges, len(states))
        is_run = states[starts] != 0
        for start, end, state in zip(
            (first + starts[is_run] * self._granularity).tolist(),
            (first + ends[is_run] * self._granularity).tolist(),
            states[starts[is_run]].tolist(),
            strict=True,
        ):
            yield Area(start, min(end, last) - start, state == GRANULE_DIFFERS)


def _renumbered(batches: Iterator[Extents], first_file: int) -> Iterator[Extents]:
    for rows in batches:
        shifted = rows.copy()
        shifted["file"][shifted["kind"] >= Kind.DATA] += np.uint32(first_file)
        yield shifted
