"""Moves a disk batch by batch: the engine stores blocks, the writer hears where."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from imgcore.engine.geometry import Placing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imgcore._core import Job
    from imgcore.disk.batch_journal import BatchJournal
    from imgcore.engine.extents import Placements
    from imgcore.engine.hashing import LeafStream
    from imgcore.engine.progress import Tally
    from imgcore.engine.supply import Batch
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Writer


class _Started(NamedTuple):
    """A batch that the engine works on; ``skipped_nbytes`` of the disk need no work."""

    batch: Batch
    skipped_nbytes: int
    placements: Placements | None
    leaves: memoryview | None


class Transfer(NamedTuple):
    """A job that moves the disk, and what hears of its progress.

    ``end_disk`` is called when a source of unknown size has ended.  ``journal`` needs a
    ``stream``.
    """

    job: Job
    writer: Writer
    file: TargetFile
    tally: Tally
    stream: LeafStream | None
    end_disk: Callable[[], None] | None = None
    journal: BatchJournal | None = None

    def run(self, batches: Iterator[Batch]) -> None:
        """Prepare each batch while the engine works on the one before it."""
        pending: _Started | None = None
        given_nbytes = 0
        geometry = self.writer.geometry
        if self.journal is not None:
            self._count(self.journal.position)
        for batch in batches:
            if pending is not None:
                self._finish(pending)
            if batch.ends_disk:
                batch = self._last(batch)
            skipped_nbytes = batch.start - given_nbytes
            given_nbytes += batch.end - batch.start
            placements = None
            if geometry.placing is Placing.APPEND:
                placements = _new_placements(batch, geometry.block_nbytes)
            leaves = None
            if self.stream is not None:
                leaves = self.stream.leaves(batch.start, batch.end)
            self.job.start(
                batch.start, batch.end, batch.rows, batch.base, placements, leaves=leaves
            )
            pending = _Started(batch, skipped_nbytes, placements, leaves)
        if pending is not None:
            self._finish(pending)
        if self.end_disk is not None and not (pending and pending.batch.ends_disk):
            self.end_disk()
        if geometry.placing is Placing.IDENTITY:
            self.file.note_end(geometry.host_base + self.writer.geometry.guest_nbytes)
        if self.journal is not None:
            self.journal.finish(geometry, geometry.guest_nbytes, self.job, self._sums())

    def _last(self, batch: Batch) -> Batch:
        """End the disk with a batch, and return it with the zeros that fill it up."""
        import numpy as np

        from imgcore.disk.overlay import padded

        assert self.end_disk is not None
        self.end_disk()
        end = self.writer.geometry.guest_nbytes
        self.job.end_disk(end)
        rows = np.concatenate(list(padded(iter([batch.rows]), batch.end, end)))
        return batch._replace(end=end, rows=rows)

    def _finish(self, started: _Started) -> None:
        """Wait for a batch, and tell the writer where its blocks are."""
        job, batch, placements = self.job, started.batch, started.placements
        self.job.wait(lambda: self._count(started.skipped_nbytes))
        self._count(started.skipped_nbytes)
        if self.stream is not None and started.leaves is not None:
            self.stream.add(batch.start, batch.end, started.leaves)
        next_offset = job.next_offset
        if placements is not None:
            first_block = batch.start // self.writer.geometry.block_nbytes
            self.file.note_end(next_offset)
            job.next_offset = self.writer.place(first_block, placements, next_offset)
        if self.journal is not None and started.leaves is not None:
            self.journal.add(batch, next_offset, placements, started.leaves)
            self.journal.save_if_due(self.writer.geometry, batch.end, job, self._sums())

    def _count(self, skipped_nbytes: int) -> None:
        data, read, written, reflinked, reused, trusted = self._sums()
        self.tally.count(
            skipped_nbytes + self.job.progress()[0],
            data=data,
            read=read,
            written=written,
            reflinked=reflinked,
            reused=reused,
            trusted=trusted,
        )

    def _sums(self) -> tuple[int, ...]:
        """Return the sums of all runs, as `BatchJournal.counts`."""
        _, data, _, *rest = self.job.progress()
        sums = (data, *rest)
        if self.journal is None:
            return sums
        return tuple(map(sum, zip(self.journal.counts, sums, strict=True)))


def _new_placements(batch: Batch, block_nbytes: int) -> Placements:
    """Return placements of the blocks of a batch, all ABSENT.

    NumPy is imported here: conversions from a flat disk to another do without it.
    """
    import numpy as np

    from imgcore.engine.extents import PLACEMENT_DTYPE

    return np.zeros(-(-(batch.end - batch.start) // block_nbytes), PLACEMENT_DTYPE)
