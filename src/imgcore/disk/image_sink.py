"""The sink for image files: the engine moves blocks, the writer makes the tables."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from imgcore._core import Job
from imgcore.disk.data_ranges import count_blocks
from imgcore.disk.reflinks import Reflink, reflinkable_units
from imgcore.engine.bad_ranges import named_bad_ranges
from imgcore.engine.extents import PLACEMENT_DTYPE
from imgcore.engine.geometry import CodecId, Placing, ZeroPolicy
from imgcore.engine.job import translated_errors
from imgcore.errors import OptionError, TargetError
from imgcore.formats.api import SectorSized
from imgcore.formats.registry import PLAIN_FORMAT, get_driver
from imgcore.limits import MAX_BASE_BLOCK_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.disk.image import Image
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.disk.source import Source
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.batches import Batch
    from imgcore.engine.extents import Placements
    from imgcore.engine.progress import Tally
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Writer, WriteRequest


class ImageSink:
    """Writes an image of any format; a `Sink`."""

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
        # Whether the image takes the place of the old content, which a raw disk keeps
        # where it does not reach.
        self._replaces = target.in_place and options.format != PLAIN_FORMAT
        self._target, self._source, self._base = target, source, base
        self._request, self._options = request, options
        self._rule: ReflinkRule | None = None
        self._driver = get_driver(options.format)
        self._writer = self._driver.writer(request)
        if base is not None:
            _refuse_large_blocks(target, self._writer)
        if options.reflink.is_required:
            self._refuse_own_blocks()

    @property
    def logical_sector_nbytes(self) -> int | None:
        """What the format states, or the block device that a raw disk is written to."""
        if isinstance(self._writer, SectorSized):
            return self._writer.logical_sector_nbytes
        return None if self._replaces else self._target.main.logical_sector_nbytes

    def write(self, tally: Tally) -> tuple[BadRange, ...]:
        """Write the blocks of the disk, then the remaining tables."""
        writer, target = self._writer, self._target
        geometry = writer.geometry
        if self._replaces and target.is_block_device:
            self._require_capacity(tally)
        if geometry.zero_policy is ZeroPolicy.STORE and geometry.codec.codec is CodecId.NONE:
            # Every byte of the disk will be written.
            target.require_space(self._request.virtual_size)
        self._rule = self._reflink_rule()
        data_file = writer.begin(target)
        self.overwrites = target.in_place
        if self._options.target_is_zero:
            data_file.reads_as_zeros = True
        if self._replaces:
            data_file.clear(writer.first_offset)
        return self._write_parts(writer, data_file, tally)

    def _refuse_own_blocks(self) -> None:
        """Raise OptionError if the target's blocks cannot be those of the source."""
        refuse, path = self._options.reflink.refuse, self._target.path
        if not self._source.sources:
            refuse("a stream has no blocks that could be reflinked", self._source.path)
        if self._writer.geometry.codec.codec is not CodecId.NONE:
            refuse("compressed blocks cannot be reflinked", path)
        if self._writer.needs_own_blocks:
            refuse("preallocated space cannot be reflinked", path)

    def _reflink_rule(self) -> ReflinkRule | None:
        """Return which data is reflinked unread; None if all of it is read."""
        reflink = self._options.reflink
        if not reflink.is_required:
            return None
        from imgcore.engine.reflinks import ReflinkRule

        source = self._source
        units = reflinkable_units(reflink, source.sources, self._target.main)
        rule = ReflinkRule.of(self._writer.geometry, units)
        if reflink is Reflink.STRICT:
            reflink.refuse_copies(rule.measure(source.data_extents()), source.path)
        return rule

    def _write_parts(
        self, writer: Writer, data_file: TargetFile, tally: Tally
    ) -> tuple[BadRange, ...]:
        """Write the disk and then the remaining tables; return the bad ranges."""
        next_offset = writer.first_offset
        bad_ranges: tuple[BadRange, ...] = ()
        if self._request.virtual_size:
            next_offset, bad_ranges = self._move(writer, data_file, tally)
        writer.finish(next_offset)
        return bad_ranges

    def _require_capacity(self, tally: Tally) -> None:
        """Raise TargetError if the block device is too small for the image."""
        capacity, needed_nbytes = self._target.main.nbytes, 0
        for needed_nbytes in self._needed_nbytes(tally):
            if needed_nbytes <= capacity:
                return
        raise TargetError(
            f"holds {capacity} bytes, fewer than the {needed_nbytes} of the "
            f"{self._options.format} image",
            path=self._target.path,
        )

    def _needed_nbytes(self, tally: Tally) -> Iterator[int]:
        """Yield bounds of the image's size, each closer and slower; the last is exact.

        They come from the size of the disk, from the source's tables, and from all of
        its data.
        """
        geometry = self._writer.geometry
        yield self._driver.measure(self._request, 0).fully_allocated
        if geometry.placing is Placing.IDENTITY:
            return
        if geometry.zero_policy is not ZeroPolicy.STORE:
            n_blocks = count_blocks(self._source.data_extents(), geometry.block_nbytes)
            yield self._driver.measure(self._request, n_blocks * geometry.block_nbytes).required
        from imgcore.files.rehearsal import Rehearsal

        rehearsal, writer = Rehearsal(self._target), self._driver.writer(self._request)
        with closing(rehearsal.main) as counted:
            self._write_parts(writer, writer.begin(rehearsal), tally.before_start())
            nbytes = counted.nbytes
        yield nbytes

    def _move(
        self, writer: Writer, data_file: TargetFile, tally: Tally
    ) -> tuple[int, tuple[BadRange, ...]]:
        """Move the whole disk; return the target's first free offset and bad ranges."""
        options, geometry = self._options, writer.geometry
        if not data_file.reads_as_zeros:
            geometry = geometry.over_old_bytes
        with ExitStack() as stack:
            supply = stack.enter_context(self._source.supply(geometry, self._base))
            stack.enter_context(translated_errors(supply.paths, self._target.path))
            job = Job(
                sources=supply.native_sources,
                geometry=geometry,
                target=data_file.core,
                next_offset=writer.first_offset,
                has_base=self._base is not None,
                threads=options.threads,
                variants=dict(options.variants),
                salvage=options.salvage,
                reflink=self._may_reflink(),
                rate_limit=options.limit,
            )
            stack.callback(job.close)
            batches = supply.batches
            if self._rule is not None:
                mark = self._rule.mark
                batches = (batch._replace(rows=mark(batch.rows)) for batch in batches)
            _Transfer(job, writer, data_file, tally).run(batches)
            unread = named_bad_ranges(job.bad_ranges, supply.paths)
            return int(job.next_offset), tuple(sorted((*self._source.lost(), *unread)))

    def _may_reflink(self) -> bool:
        """Tell whether blocks may be reflinked instead of copied."""
        own_blocks = (
            self._target.in_place
            or self._writer.needs_own_blocks
            or self._writer.geometry.zero_policy is ZeroPolicy.STORE
        )
        wanted = self._options.reflink is not Reflink.NEVER
        return wanted and not own_blocks and not self._options.salvage


def _refuse_large_blocks(target: Target, writer: Writer) -> None:
    block_nbytes = writer.geometry.block_nbytes
    if block_nbytes > MAX_BASE_BLOCK_NBYTES:
        raise OptionError(
            f"blocks of {block_nbytes} bytes are too large to be compared with a parent (-B): "
            f"at most {MAX_BASE_BLOCK_NBYTES} are allowed",
            path=target.path,
        )


class _Transfer(NamedTuple):
    """A job that moves the disk, and what hears of its progress."""

    job: Job
    writer: Writer
    file: TargetFile
    tally: Tally

    def run(self, batches: Iterator[Batch]) -> None:
        """Prepare each batch while the engine works on the one before it."""
        pending: tuple[Batch, int, Placements | None] | None = None
        given_nbytes = 0
        geometry = self.writer.geometry
        for batch in batches:
            if pending is not None:
                self._finish(*pending)
            skipped_nbytes = batch.start - given_nbytes
            given_nbytes += batch.end - batch.start
            placements = None
            if geometry.placing is Placing.APPEND:
                n_blocks = -(-(batch.end - batch.start) // geometry.block_nbytes)
                placements = np.zeros(n_blocks, PLACEMENT_DTYPE)
            self.job.start(batch.start, batch.end, batch.rows, batch.base, placements)
            pending = (batch, skipped_nbytes, placements)
        if pending is not None:
            self._finish(*pending)
        if geometry.placing is Placing.IDENTITY:
            self.file.note_end(geometry.host_base + geometry.guest_nbytes)

    def _finish(self, batch: Batch, skipped_nbytes: int, placements: Placements | None) -> None:
        """Wait for a batch, and tell the writer where its blocks are.

        ``skipped_nbytes`` is the sum of the gaps between the batches so far.
        """
        job = self.job

        def tick() -> None:
            done, data, _, read, written, reflinked = job.progress()
            self.tally.count(
                skipped_nbytes + done, data=data, read=read, written=written, reflinked=reflinked
            )

        job.wait(tick)
        tick()
        if placements is not None:
            first_block = batch.start // self.writer.geometry.block_nbytes
            self.file.note_end(job.next_offset)
            job.next_offset = self.writer.place(first_block, placements, job.next_offset)
