"""The sink for image files: the engine moves blocks, the writer makes the tables."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from imgcore._core import Job
from imgcore.engine.bad_ranges import named_bad_ranges
from imgcore.engine.extents import PLACEMENT_DTYPE
from imgcore.engine.geometry import CodecId, Placing, ZeroPolicy
from imgcore.engine.job import translated_errors
from imgcore.errors import OptionError, UnsupportedFeatureError
from imgcore.formats.api import SectorSized
from imgcore.formats.registry import format_names, get_driver
from imgcore.limits import MAX_BASE_BLOCK_NBYTES, SECTOR_NBYTES
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.disk.image import Image
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.disk.source import Source
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.batches import Batch
    from imgcore.engine.extents import Placements
    from imgcore.engine.progress import Tally
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
        self.overwrites = False
        self._target, self._source, self._base = target, source, base
        self._request, self._options = request, options
        driver = get_driver(options.format)
        if target.in_place and not driver.writes_in_place:
            raise _not_in_place(target, options.format)
        self._writer = driver.writer(request)
        if base is not None:
            _refuse_large_blocks(target, self._writer)
        self._warn_of_sectors()

    def write(self, tally: Tally) -> tuple[BadRange, ...]:
        """Write the blocks of the disk, then the remaining tables."""
        writer, nbytes = self._writer, self._request.virtual_size
        geometry = writer.geometry
        if geometry.zero_policy is ZeroPolicy.STORE and geometry.codec.codec is CodecId.NONE:
            # Every byte of the disk will be written.
            self._target.require_space(nbytes)
        data_file = writer.begin(self._target)
        next_offset = writer.first_offset
        bad_ranges: tuple[BadRange, ...] = ()
        if nbytes:
            self.overwrites = self._target.in_place
            next_offset, bad_ranges = self._move(data_file, tally)
        writer.finish(next_offset)
        return bad_ranges

    def _warn_of_sectors(self) -> None:
        """Warn if the target's logical sector size differs from the source's."""
        writer, stated = self._writer, self._source.logical_sector_nbytes
        kept = writer.logical_sector_nbytes if isinstance(writer, SectorSized) else SECTOR_NBYTES
        if stated is not None and stated != kept:
            log.warning(
                "%s: its logical sectors have %d bytes, those of %s have %d: "
                "the guest may fail to boot",
                self._target.path,
                kept,
                self._source.path,
                stated,
            )

    def _move(self, data_file: TargetFile, tally: Tally) -> tuple[int, tuple[BadRange, ...]]:
        """Move the whole disk; return the target's first free offset and bad ranges."""
        options, geometry = self._options, self._writer.geometry
        with ExitStack() as stack:
            supply = stack.enter_context(self._source.supply(geometry, self._base))
            stack.enter_context(translated_errors(supply.paths, self._target.path))
            job = Job(
                sources=supply.native_sources,
                geometry=geometry,
                target=data_file.core,
                next_offset=self._writer.first_offset,
                has_base=self._base is not None,
                threads=options.threads,
                variants=dict(options.variants),
                salvage=options.salvage,
                reflink=self._may_reflink(),
            )
            stack.callback(job.close)
            _run(job, self._writer, supply.batches, tally)
            unread = named_bad_ranges(job.bad_ranges, supply.paths)
            return int(job.next_offset), tuple(sorted((*supply.lost, *unread)))

    def _may_reflink(self) -> bool:
        """Tell whether blocks may be reflinked instead of copied."""
        own_blocks = (
            self._target.in_place
            or self._writer.needs_own_blocks
            or self._writer.geometry.zero_policy is ZeroPolicy.STORE
        )
        return self._options.reflink and not own_blocks and not self._options.salvage


def _not_in_place(target: Target, format: str) -> UnsupportedFeatureError:
    names = [name for name in format_names() if get_driver(name).writes_in_place]
    what = "a block device" if target.is_block_device else "an existing file (-n)"
    return UnsupportedFeatureError(
        f"only {' and '.join(names)} can be written into {what}, not {format}", path=target.path
    )


def _refuse_large_blocks(target: Target, writer: Writer) -> None:
    block_nbytes = writer.geometry.block_nbytes
    if block_nbytes > MAX_BASE_BLOCK_NBYTES:
        raise OptionError(
            f"blocks of {block_nbytes} bytes are too large to be compared with a parent (-B): "
            f"at most {MAX_BASE_BLOCK_NBYTES} are allowed",
            path=target.path,
        )


def _run(job: Job, writer: Writer, batches: Iterator[Batch], tally: Tally) -> None:
    """Prepare each batch while the engine works on the one before it."""
    pending: tuple[Batch, int, Placements | None] | None = None
    given_nbytes = 0
    for batch in batches:
        if pending is not None:
            _finish_batch(job, writer, tally, *pending)
        skipped_nbytes = batch.start - given_nbytes
        given_nbytes += batch.end - batch.start
        placements = None
        if writer.geometry.placing is Placing.APPEND:
            n_blocks = -(-(batch.end - batch.start) // writer.geometry.block_nbytes)
            placements = np.zeros(n_blocks, PLACEMENT_DTYPE)
        job.start(batch.start, batch.end, batch.rows, batch.base, placements)
        pending = (batch, skipped_nbytes, placements)
    if pending is not None:
        _finish_batch(job, writer, tally, *pending)


def _finish_batch(
    job: Job,
    writer: Writer,
    tally: Tally,
    batch: Batch,
    skipped_nbytes: int,
    placements: Placements | None,
) -> None:
    """Wait for a batch, and tell the writer where its blocks are.

    ``skipped_nbytes`` is the sum of the gaps between the batches so far.
    """

    def tick() -> None:
        done, data, _, read, written, reflinked = job.progress()
        tally.count(
            skipped_nbytes + done, data=data, read=read, written=written, reflinked=reflinked
        )

    job.wait(tick)
    tick()
    if placements is not None:
        first_block = batch.start // writer.geometry.block_nbytes
        job.next_offset = writer.place(first_block, placements, job.next_offset)
