"""The batches of a job in its journal: recorded, verified, and given to a writer again.

A checkpoint has the batches that ended since the one before, each with the placements
of its blocks and the leaves of its data.  After a break the job begins anew, but gives
the engine only what is not recorded.  The writer hears of all blocks in order, as the
first time, so that it makes the same tables.
"""

from __future__ import annotations

import zlib
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore._core import (
    CHECKSUM_BLOCK_NBYTES,
    CHECKSUM_NBYTES,
    CoreError,
    Job,
    Status,
    extent_table,
)
from imgcore.disk.batch_pieces import Pace, pieces, without_front
from imgcore.engine.geometry import CodecId, Placing
from imgcore.engine.inflating import inflated
from imgcore.engine.job import translated_errors
from imgcore.engine.kinds import Kind
from imgcore.engine.source_file import native_sources
from imgcore.errors import TargetError
from imgcore.sizes import MAX_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from imgcore.disk.checkpoints import Checkpoints
    from imgcore.disk.image import Image
    from imgcore.engine.extents import Extents, Placements
    from imgcore.engine.geometry import Geometry
    from imgcore.engine.hashing import LeafStream
    from imgcore.engine.supply import Batch
    from imgcore.files.record_file import Record
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Writer

# The leaves of a job whose user has not asked for a checksum.
LEAF_ALGORITHM: Final = "crc32c"
_CRC_NBYTES: Final = 4

# Zlib finds repeated leaves, such as those of zeros.
_LEVEL: Final = 1
_N_COUNTS: Final = 6


class DoneBatch(NamedTuple):
    """A batch that has ended.

    Attributes
    ----------
    start, end : int
        Its range of the disk.
    next_offset : int
        The target's first free byte after it, before the writer adds tables.
    n_blocks : int
        How many placements it has.
    placements, leaves : bytes
        Packed.
    """

    start: int
    end: int
    next_offset: int
    n_blocks: int
    placements: bytes
    leaves: bytes


class BatchJournal:
    """Records the batches of a job in checkpoints, and knows those of earlier runs.

    Parameters
    ----------
    checkpoints : Checkpoints
    target : Target, optional
        None: the job only learns what it will write, and nothing is verified.
    algorithm : str
        Of the leaves.
    part : int
        Of the job.

    Attributes
    ----------
    position : int
        Where the earlier runs have come to on the disk.
    counts : tuple of int
        Bytes of data, read, written, reflinked, reused and trusted in the earlier runs.
    packing : tuple of int
        ``Job.packing`` at their end.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        target: Target | None,
        algorithm: str,
        part: int = 0,
    ) -> None:
        self._checkpoints = checkpoints
        self._part = part
        self._target = target
        self._leaf_nbytes = _CRC_NBYTES if algorithm == LEAF_ALGORITHM else CHECKSUM_NBYTES
        self._algorithm = algorithm
        self._pending: list[DoneBatch] = []
        self._pace = Pace()
        self.position: int = 0
        self.counts: tuple[int, ...] = (0,) * _N_COUNTS
        self.packing: tuple[int, int] = (0, 0)
        last = checkpoints.last(part)
        if last is not None:
            with checkpoints.reading():
                self.position = self._batches(last)[-1].end
                self.counts = _numbers(last.head["counts"], _N_COUNTS)
                place, end = _numbers(last.head["packing"], 2)
                self.packing = place, end
        self._saved_nbytes = self.counts[0]

    # -- recording ---------------------------------------------------------------------

    def add(
        self,
        batch: Batch,
        next_offset: int,
        placements: Placements | None,
        leaves: memoryview,
    ) -> None:
        """Take a batch that has ended; the caller may use its arrays again."""
        n_blocks, packed = 0, b""
        if placements is not None:
            from imgcore.engine.placement_log import pack_placements

            n_blocks, packed = len(placements), pack_placements(placements)
        stored = zlib.compress(_shortened(leaves, self._leaf_nbytes), _LEVEL)
        self._pending.append(
            DoneBatch(batch.start, batch.end, next_offset, n_blocks, packed, stored)
        )

    def save_if_due(self, geometry: Geometry, end: int, job: Job, counts: tuple[int, ...]) -> None:
        """Save a checkpoint of the batches added so far, if it is time.

        Parameters
        ----------
        geometry : Geometry
        end : int
            Where the disk is done up to.
        job : Job
            It is between two batches.
        counts : tuple of int
            The attribute ``counts`` by now.
        """
        # Data and written bytes: zeros may be stored, and data compressed.
        self._pace.note(max(counts[0], counts[2]))
        if self._checkpoints.is_due(counts[0] - self._saved_nbytes):
            self._save(geometry, end, job, counts)

    def _save(self, geometry: Geometry, end: int, job: Job, counts: tuple[int, ...]) -> None:
        head = {
            "batches": [
                (*done[:4], len(done.placements), len(done.leaves)) for done in self._pending
            ],
            "counts": counts,
            "packing": job.packing,
        }
        blobs = [blob for done in self._pending for blob in (done.placements, done.leaves)]
        self._pending, self._saved_nbytes = [], counts[0]
        kept_nbytes = job.next_offset
        if geometry.placing is Placing.IDENTITY:
            kept_nbytes = geometry.host_base + end - geometry.guest_base
        if self._target is None:
            kept_nbytes = 0
        self._checkpoints.save(self._target, kept_nbytes, head, blobs, self._part)

    def finish(self, geometry: Geometry, end: int, job: Job, counts: tuple[int, ...]) -> None:
        """Wait for the last checkpoint; the parameters are those of `save_if_due`.

        What a job has learned is saved, since another one needs all of it.
        """
        if self._target is None and self._pending:
            self._save(geometry, end, job, counts)
        self._checkpoints.finish()

    # -- going on ----------------------------------------------------------------------

    def _batches(self, record: Record, done: int = 0) -> list[DoneBatch]:
        """Return the batches of a checkpoint; ImgcoreError if it is not sound.

        ``done`` is where those before it end.
        """
        batches: list[DoneBatch] = []
        at = 0
        with self._checkpoints.reading():
            for row in record.head["batches"]:
                start, end, next_offset, n_blocks, *lengths = _numbers(row, 6)
                middle = at + lengths[0]
                last = middle + lengths[1]
                blobs = record.blob[at:middle], record.blob[middle:last]
                batches.append(DoneBatch(start, end, next_offset, n_blocks, *blobs))
                if not done <= start < end or (done | start) % CHECKSUM_BLOCK_NBYTES:
                    raise ValueError("batches that do not ascend, or between blocks")
                at, done = last, end
            if not batches or at != len(record.blob):
                raise ValueError("other bytes than those of the batches")
        return batches

    def _placements(self, done: DoneBatch, geometry: Geometry) -> Placements:
        """Return the placements of a batch."""
        with self._checkpoints.reading():
            if done.n_blocks != -(-(done.end - done.start) // geometry.block_nbytes):
                raise ValueError("other blocks than those of the batch")
            from imgcore.engine.placement_log import unpack_placements

            return unpack_placements(done.placements, done.n_blocks)

    def _leaves(self, done: DoneBatch) -> memoryview:
        """Return the leaves of a batch, 32 bytes each."""
        n_leaves = -(-(done.end - done.start) // CHECKSUM_BLOCK_NBYTES)
        with self._checkpoints.reading():
            stored = inflated(done.leaves, n_leaves * self._leaf_nbytes)
        return _expanded(stored, self._leaf_nbytes, n_leaves)

    def replay(self, writer: Writer, file: TargetFile, stream: LeafStream) -> int:
        """Give the batches of earlier runs to a writer and to a digest.

        Returns
        -------
        int
            The target's first free byte.
        """
        next_offset, block_nbytes = writer.first_offset, writer.geometry.block_nbytes
        end = 0
        for record in self._checkpoints.saved(self._part):
            for done in self._batches(record, end):
                end = done.end
                stream.add(done.start, done.end, self._leaves(done))
                if done.n_blocks:
                    placements = self._placements(done, writer.geometry)
                    file.note_end(done.next_offset)
                    first_block = done.start // block_nbytes
                    next_offset = writer.place(first_block, placements, done.next_offset)
        return next_offset

    def verify(
        self, file: TargetFile, geometry: Geometry, base: Image | None, threads: int
    ) -> None:
        """Read what the earlier runs have written, if anything, and compare digests.

        Raises
        ------
        TargetError
            The target does not hold it any more.
        """
        if self._target is None:
            return
        has_codec = geometry.codec.codec is not CodecId.NONE
        blocks = geometry.block_nbytes if has_codec else 0
        sources = [(file.core, file.nbytes, 0, blocks)]
        sources += native_sources(base.sources) if base is not None else []
        with ExitStack() as stack:
            paths = [file.path, *(source.file.path for source in (base.sources if base else ()))]
            stack.enter_context(translated_errors(paths))
            job = Job(sources=sources, threads=threads, checksum=self._algorithm)
            stack.callback(job.close)
            for record in self._checkpoints.to_verify(self._part):
                for done in self._batches(record):
                    rows = self._written_rows(done, geometry, base)
                    self._verify_batch(job, done, rows, file.path)

    def _written_rows(self, done: DoneBatch, geometry: Geometry, base: Image | None) -> Extents:
        """Return where the target has the data of a batch."""
        start, nbytes = done.start, done.end - done.start
        if geometry.placing is Placing.IDENTITY:
            place = geometry.host_base + start - geometry.guest_base
            table: Extents = extent_table([(start, nbytes, place, nbytes, 0, Kind.DATA, 0)])
            return table
        from imgcore.disk.placed_rows import placed_rows

        return placed_rows(self._placements(done, geometry), start, done.end, geometry, base)

    def _verify_batch(self, job: Job, done: DoneBatch, rows: Extents, path: str) -> None:
        expected = self._leaves(done)
        found = memoryview(bytearray(len(expected)))
        try:
            job.run(done.start, done.end, rows, leaves=found)
        except CoreError as error:
            if error.status is Status.IO:
                raise
            raise self._other_content(done, path) from error
        if found != expected:
            raise self._other_content(done, path)

    def _other_content(self, done: DoneBatch, path: str) -> TargetError:
        return TargetError(
            f"what was written of it before the break has changed, between {done.start:#x} and "
            f"{done.end:#x} of the disk: start again (imgcore jobs --remove)",
            path=path,
        )

    def remaining(self, batches: Iterator[Batch], geometry: Geometry) -> Iterator[Batch]:
        """Yield what the earlier runs have not done, in short pieces."""
        for batch in batches:
            if batch.end > self.position:
                yield from pieces(without_front(batch, self.position), geometry, self._pace)


def _numbers(row: Sequence[Any], n: int) -> tuple[int, ...]:
    """Return ``n`` numbers of a record; ValueError for others."""
    numbers = tuple(map(int, row))
    if len(numbers) != n or not all(0 <= number <= MAX_SIZE for number in numbers):
        raise ValueError(f"no {n} numbers")
    return numbers


def _expanded(stored: bytes, leaf_nbytes: int, n_leaves: int) -> memoryview:
    """Return leaves of the engine's size from the bytes of each that are stored."""
    if leaf_nbytes == CHECKSUM_NBYTES:
        return memoryview(stored)
    leaves = memoryview(bytearray(n_leaves * CHECKSUM_NBYTES))
    leaves.cast("I")[:: CHECKSUM_NBYTES // _CRC_NBYTES] = memoryview(stored).cast("I")
    return leaves


def _shortened(leaves: memoryview, leaf_nbytes: int) -> bytes:
    """Return what of the engine's leaves is stored."""
    if leaf_nbytes == CHECKSUM_NBYTES:
        return leaves.tobytes()
    return leaves.cast("I")[:: CHECKSUM_NBYTES // _CRC_NBYTES].tobytes()
