"""The sink for image files: the engine moves blocks, the writer makes the tables."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Final

from imgcore._core import Job
from imgcore.checksums.digest import BLOCK_NBYTES, Digest
from imgcore.disk.late_batches import MayBeLate
from imgcore.disk.late_end import end_disk, leave_end_open
from imgcore.disk.reflinks import Reflink, reflinkable_units, refuse_own_blocks
from imgcore.disk.transfer import Transfer
from imgcore.engine.bad_ranges import named_bad_ranges
from imgcore.engine.geometry import CodecId, Placing, ZeroPolicy
from imgcore.engine.job import translated_errors
from imgcore.engine.thread_budget import Lease
from imgcore.errors import OptionError, TargetError
from imgcore.formats.api import SectorSized
from imgcore.formats.registry import PLAIN_FORMAT, get_driver
from imgcore.limits import MAX_BASE_BLOCK_NBYTES, MIB, SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imgcore.disk.batch_journal import BatchJournal
    from imgcore.disk.checkpoints import Checkpoints
    from imgcore.disk.image import Image
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.disk.source import Source
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.geometry import Geometry
    from imgcore.engine.hashing import LeafStream
    from imgcore.engine.progress import Tally
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Driver, Writer, WriteRequest


# So many bytes at the end of a stream are copied; those before may be pages of the
# sources.  A reader may pass pages on, so that they are in use after the job, and show
# changes of the sources.  But then these bytes have gone the same way after them.
COPIED_NBYTES: Final = 16 * MIB


class ImageSink:
    """Writes an image of any format; a `Sink`."""

    # Whether blocks are stored that the source states as data, instead of those that
    # are no zeros.
    _stores_data = False

    def __init__(
        self,
        target: Target,
        source: Source,
        base: Image | None,
        request: WriteRequest[Any],
        options: SinkOptions,
    ) -> None:
        """Make the writer, which rejects disks that the format cannot represent."""
        self.overwrites: bool = False
        self.digest: Digest | None = None
        # Whether the image takes the place of the old content, which a raw disk keeps
        # where it does not reach.
        self._replaces = target.in_place and options.format != PLAIN_FORMAT
        self.target: Target = target
        self.source: Source = source
        self.request: WriteRequest[Any] = request
        self.options: SinkOptions = options
        self._base = base
        self.driver: Driver = get_driver(options.format)
        self._writer = self.driver.writer(request)
        if not source.size_is_known:
            leave_end_open(self._writer, target)
        if base is not None:
            _refuse_large_blocks(target, self._writer)
        if options.reflink.is_required:
            refuse_own_blocks(options.reflink, source, self._writer)

    @property
    def logical_sector_nbytes(self) -> int | None:
        """What the format states, or the block device that a raw disk is written to."""
        if isinstance(self._writer, SectorSized):
            return self._writer.logical_sector_nbytes
        return None if self._replaces else self.target.main.logical_sector_nbytes

    def write(self, tally: Tally) -> tuple[BadRange, ...]:
        """Write the blocks of the disk, then the remaining tables."""
        writer, target = self._writer, self.target
        geometry = writer.geometry
        checkpoints = self.options.checkpoints
        if self._replaces and target.is_block_device and not _resumes(checkpoints):
            self._require_capacity(tally)
        is_stored = geometry.zero_policy is ZeroPolicy.STORE
        if is_stored and geometry.codec.codec is CodecId.NONE and self.source.size_is_known:
            # Every byte of the disk will be written.
            target.require_space(self.request.virtual_size)
        if self.options.reflink.is_required:
            _ = self.reflink_rule  # before anything is written
        data_file = writer.begin(target)
        self.overwrites = target.in_place
        if self.options.target_is_zero:
            data_file.reads_as_zeros = True
        if self._replaces:
            data_file.clear(writer.first_offset)
        stream = self._leaf_stream()
        journal = self._journal(target, stream)
        if isinstance(self.source, MayBeLate) and self._takes_late(data_file):
            self.source.take_late()
        bad_ranges = self._write_parts(writer, data_file, tally, stream, journal)
        if isinstance(self.source, MayBeLate) and self.source.has_late:
            from imgcore.disk.late_blocks import write_late

            self.digest = write_late(self.source, target, self.options, self.disk_nbytes, tally)
        else:
            self._take_digest(stream)
        return bad_ranges

    def _takes_late(self, data_file: TargetFile) -> bool:
        """Tell whether the complete image can be written to in place."""
        is_plain = self._writer.geometry.codec.codec is CodecId.NONE
        return self.driver.updating is not None and is_plain and not data_file.in_order

    @property
    def disk_nbytes(self) -> int:
        """Bytes of the target's disk, which for a raw file may end within a sector."""
        return self._writer.geometry.guest_nbytes

    def _leaf_stream(self) -> LeafStream | None:
        algorithm = self.options.checksum
        if algorithm is None and self.options.checkpoints is not None:
            from imgcore.disk.batch_journal import LEAF_ALGORITHM

            algorithm = LEAF_ALGORITHM
        if algorithm is None:
            return None
        from imgcore.engine.hashing import LeafStream

        return LeafStream(algorithm)

    def _journal(
        self, target: Target | None, stream: LeafStream | None, part: int = 0
    ) -> BatchJournal | None:
        """Return the journal of a part of the job; None if it does not go on."""
        checkpoints = self.options.checkpoints
        if checkpoints is None or stream is None:
            return None
        from imgcore.disk.batch_journal import BatchJournal

        return BatchJournal(checkpoints, target, stream.algorithm, part)

    def _take_digest(self, stream: LeafStream | None) -> None:
        if stream is not None and self.options.checksum is not None:
            digest = stream.finish(self.disk_nbytes)
            self.digest = Digest(digest, self.options.checksum)

    @cached_property
    def reflink_rule(self) -> ReflinkRule:
        """Which data is reflinked unread; the first use asks the file system.

        Raises
        ------
        UnsupportedFeatureError
            It cannot reflink the source's blocks.
        """
        from imgcore.engine.reflinks import ReflinkRule

        files = self.source.sources
        units = reflinkable_units(self.options.reflink, files, self.target.main)
        return ReflinkRule.of(self._writer.geometry, units)

    def _write_parts(
        self,
        writer: Writer,
        data_file: TargetFile,
        tally: Tally,
        stream: LeafStream | None = None,
        journal: BatchJournal | None = None,
    ) -> tuple[BadRange, ...]:
        """Write the disk and then the remaining tables; return the bad ranges.

        ``stream`` gets the leaves of the disk's checksum, ``journal`` each batch.
        """
        next_offset = writer.first_offset
        bad_ranges: tuple[BadRange, ...] = ()
        if self.request.virtual_size:
            next_offset, bad_ranges = self._move(writer, data_file, tally, stream, journal)
        writer.finish(next_offset)
        return bad_ranges

    def _require_capacity(self, tally: Tally) -> None:
        """Raise TargetError if the block device is too small for the image."""
        capacity, needed_nbytes = self.target.main.nbytes, 0
        for needed_nbytes in self._needed_nbytes(tally):
            if needed_nbytes <= capacity:
                return
        raise TargetError(
            f"holds {capacity} bytes, fewer than the {needed_nbytes} of the "
            f"{self.options.format} image",
            path=self.target.path,
        )

    def _needed_nbytes(self, tally: Tally) -> Iterator[int]:
        """Yield bounds of the image's size, each closer and slower; the last is exact.

        They come from the size of the disk, from the source's tables, and from all of
        its data.  A stream tells nothing before it is read, which is done once: then
        the last one is what an empty disk takes, and the device may turn out too small.
        """
        geometry = self._writer.geometry
        yield self.driver.measure(self.request, 0).fully_allocated
        if geometry.placing is Placing.IDENTITY:
            return
        if not self.source.sources:
            yield self.driver.measure(self.request, 0).required
            return
        if geometry.zero_policy is not ZeroPolicy.STORE:
            from imgcore.disk.data_ranges import count_blocks

            n_blocks = count_blocks(self.source.data_extents(), geometry.block_nbytes)
            yield self.driver.measure(self.request, n_blocks * geometry.block_nbytes).required
        from imgcore.files.rehearsal import Rehearsal

        rehearsal, writer = Rehearsal(self.target), self.driver.writer(self.request)
        with closing(rehearsal.main) as counted:
            self._write_parts(writer, writer.begin(rehearsal), tally.before_start())
            nbytes = counted.nbytes
        yield nbytes

    def _move(
        self,
        writer: Writer,
        data_file: TargetFile,
        tally: Tally,
        stream: LeafStream | None,
        journal: BatchJournal | None = None,
    ) -> tuple[int, tuple[BadRange, ...]]:
        """Move the whole disk; return the target's first free offset and bad ranges."""
        options, geometry = self.options, writer.geometry
        if not data_file.reads_as_zeros:
            geometry = geometry.over_old_bytes
        if stream is not None:
            geometry = geometry._replace(leaf_nbytes=BLOCK_NBYTES)
        next_offset = writer.first_offset
        if journal is not None and stream is not None and journal.position:
            journal.verify(data_file, geometry, self._base, options.threads)
            next_offset = journal.replay(writer, data_file, stream)
        if data_file.in_order:
            # What follows the last block of a group is written before the next group.
            geometry = geometry._replace(is_ordered=True)
            if stream is None and geometry.codec.codec is CodecId.NONE:
                geometry = geometry._replace(moved_end=self._moved_end(geometry))
        with ExitStack() as stack:
            rule = self.reflink_rule if options.reflink.is_required else None
            supply = stack.enter_context(self.source.supply(geometry, self._base, rule))
            stack.enter_context(translated_errors(supply.paths, self.target.path))
            job = Job(
                sources=supply.native_sources,
                geometry=geometry,
                target=data_file.core,
                next_offset=next_offset,
                has_base=self._base is not None,
                threads=options.threads,
                batch_threads=Lease(options.threads).renew,
                variants=dict(options.variants),
                salvage=options.salvage,
                reflink=self._may_reflink() and not data_file.in_order and not self._stores_data,
                stores_data=self._stores_data,
                # A comparison with the base needs the content.
                trust_blocks=options.trust_blocks and self._base is None,
                rate_limit=options.limit,
                checksum=None if stream is None else stream.algorithm,
            )
            stack.callback(job.close)
            batches = supply.batches
            if geometry.step_nbytes and self.source.sources:
                from imgcore.disk.batch_pieces import at_steps

                batches = at_steps(batches, geometry)
            if journal is not None:
                job.packing = journal.packing
                batches = journal.remaining(batches, geometry)
            end_disk = None
            if not self.source.size_is_known:
                end_disk = partial(self._end_disk, tally, supply.find_end)
            transfer = Transfer(
                job, writer, data_file, tally, stream, end_disk, journal, supply.meanwhile
            )
            transfer.run(batches)
            unread = named_bad_ranges(job.bad_ranges, supply.paths)
            return int(job.next_offset), tuple(sorted((*self.source.lost(), *unread)))

    def _moved_end(self, geometry: Geometry) -> int:
        """Return where the data that is copied begins, at the end of a stream."""
        if geometry.placing is not Placing.IDENTITY:
            return 0
        return max(geometry.guest_nbytes - COPIED_NBYTES, 0) // SECTOR_NBYTES * SECTOR_NBYTES

    def _end_disk(self, tally: Tally, find_end: Callable[[], None] | None) -> None:
        """Tell the writer the size of the disk, which the source knows by now."""
        if find_end is not None:
            find_end()
        self.request = end_disk(self._writer, self.request, self.options, self.source)
        tally.total_nbytes = self.request.virtual_size

    def _may_reflink(self) -> bool:
        """Tell whether blocks may be reflinked instead of copied."""
        own_blocks = (
            self.target.in_place
            or self._writer.needs_own_blocks
            or self._writer.geometry.zero_policy is ZeroPolicy.STORE
        )
        wanted = self.options.reflink is not Reflink.NEVER
        return wanted and not own_blocks and not self.options.salvage


def _resumes(checkpoints: Checkpoints | None) -> bool:
    return checkpoints is not None and checkpoints.resumes


def _refuse_large_blocks(target: Target, writer: Writer) -> None:
    block_nbytes = writer.geometry.block_nbytes
    if block_nbytes > MAX_BASE_BLOCK_NBYTES:
        raise OptionError(
            f"blocks of {block_nbytes} bytes are too large to be compared with a parent (-B): "
            f"at most {MAX_BASE_BLOCK_NBYTES} are allowed",
            path=target.path,
        )
