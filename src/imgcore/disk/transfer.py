"""Moves a disk batch by batch: the engine stores blocks, the writer hears where."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from imgcore._core import extent_table
from imgcore.engine.geometry import Placing
from imgcore.engine.kinds import Kind
from imgcore.engine.supply import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imgcore._core import Job
    from imgcore.disk.batch_journal import BatchJournal
    from imgcore.engine.extents import Placements
    from imgcore.engine.hashing import LeafStream
    from imgcore.engine.progress import Tally
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Writer


class _Started(NamedTuple):
    """A batch that the engine works on; ``skipped_nbytes`` of the disk need no work."""

    batch: Batch
    skipped_nbytes: int
    placements: Placements | None
    leaves: memoryview | None


class Transfer:
    """A job that moves the disk, and what hears of its progress.

    ``end_disk`` is called when a source of unknown size has ended.  ``journal`` needs a
    ``stream``.  ``meanwhile`` is that of the `Supply`.
    """

    def __init__(
        self,
        job: Job,
        writer: Writer,
        file: TargetFile,
        tally: Tally,
        stream: LeafStream | None,
        end_disk: Callable[[], None] | None = None,
        journal: BatchJournal | None = None,
        meanwhile: Callable[[], int] | None = None,
    ) -> None:
        self.job: Job = job
        self.writer: Writer = writer
        self.file: TargetFile = file
        self.tally: Tally = tally
        self.stream: LeafStream | None = stream
        self.journal: BatchJournal | None = journal
        self._meanwhile = meanwhile
        # None once the end of the disk is known.
        self._end_disk = end_disk
        self._given_nbytes = 0

    def run(self, batches: Iterator[Batch]) -> None:
        """Prepare each batch while the engine works on the one before it."""
        pending: _Started | None = None
        ends_late = self._end_disk is not None
        if self.journal is not None and self.journal.position:
            self.tally.skip(self.journal.position)
            self._count(self.journal.position)
        for batch in batches:
            if pending is not None:
                self._finish(pending)
                pending = None
                if ends_late and self._end_disk is None:
                    break
            pending = self._start(self._last(batch) if batch.ends_disk else batch)
        if pending is not None:
            self._finish(pending)
        if self._end_disk is not None:
            self._tell_end()
        if ends_late:
            self._fill_up()
        geometry = self.writer.geometry
        if geometry.placing is Placing.IDENTITY:
            self.file.note_end(geometry.host_base + geometry.guest_nbytes)
        if self.journal is not None:
            self.journal.finish(geometry, geometry.guest_nbytes, self.job, self._sums())

    def _start(self, batch: Batch) -> _Started:
        skipped_nbytes = batch.start - self._given_nbytes
        self._given_nbytes += batch.end - batch.start
        placements = leaves = None
        if self.writer.geometry.placing is Placing.APPEND:
            placements = _new_placements(batch, self.writer.geometry.block_nbytes)
        if self.stream is not None:
            leaves = self.stream.leaves(batch.start, batch.end)
        self.job.start(batch.start, batch.end, batch.rows, batch.base, placements, leaves=leaves)
        return _Started(batch, skipped_nbytes, placements, leaves)

    def _tell_end(self) -> None:
        assert self._end_disk is not None
        self._end_disk()
        self._end_disk = None

    def _last(self, batch: Batch) -> Batch:
        """End the disk with a batch, and return it with the zeros that fill it up."""
        import numpy as np

        from imgcore.disk.overlay import padded

        self._tell_end()
        end = self.writer.geometry.guest_nbytes
        self.job.end_disk(end)
        rows = np.concatenate(list(padded(iter([batch.rows]), batch.end, end)))
        return batch._replace(end=end, rows=rows)

    def _fill_up(self) -> None:
        """Add the zeros between the last batch and the end of the disk."""
        start, end = self._given_nbytes, self.writer.geometry.guest_nbytes
        if 0 < start < end:
            rows = extent_table([(start, end - start, 0, 0, 0, Kind.ZERO, 0)])
            self._finish(self._start(Batch(start, end, rows)))

    def _finish(self, started: _Started) -> None:
        """Wait for a batch, and tell the writer where its blocks are."""
        job, batch, placements = self.job, started.batch, started.placements
        job.wait(lambda: self._tick(started), self._meanwhile)
        end, leaves = batch.end, started.leaves
        if self._end_disk is None and self.writer.geometry.guest_nbytes < end:
            # The stream has ended in it.
            end = self.writer.geometry.guest_nbytes
            self._given_nbytes = end
        if end == batch.start:
            return
        if self.stream is not None and leaves is not None:
            self.stream.add(batch.start, end, leaves[: self.stream.leaf_nbytes(end - batch.start)])
        next_offset = job.next_offset
        if placements is not None:
            block_nbytes = self.writer.geometry.block_nbytes
            placements = placements[: -(-(end - batch.start) // block_nbytes)]
            self.file.note_end(next_offset)
            job.next_offset = self.writer.place(
                batch.start // block_nbytes, placements, next_offset
            )
        if self.journal is not None and leaves is not None:
            self.journal.add(batch, next_offset, placements, leaves)
            self.journal.save_if_due(self.writer.geometry, batch.end, job, self._sums())

    def _tick(self, started: _Started) -> None:
        """Count what is done; if a stream has ended, tell the writer and the engine."""
        if self._end_disk is not None and self.job.found_end is not None:
            self._tell_end()
            self.job.end_disk(self.writer.geometry.guest_nbytes)
        self._count(started.skipped_nbytes)

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
