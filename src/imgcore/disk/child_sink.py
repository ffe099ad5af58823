"""The sink for children that hold single sectors of their blocks.

The engine stores whole blocks, of which a small change needs little.  So the writer
makes an empty child, in which the differences from the parent are then written as they
are in an existing image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from imgcore.areas.normal import joined
from imgcore.disk.block_copy import Copied, copy_areas
from imgcore.disk.differences import Differences
from imgcore.disk.digests import DigestedDisk
from imgcore.disk.image_source import ImageSource
from imgcore.disk.unnamed_image import open_unnamed
from imgcore.formats.api import HoldsSectors, SectorSized
from imgcore.formats.registry import get_driver
from imgcore.limits import KIB

if TYPE_CHECKING:
    from imgcore.checksums.digest import Digest
    from imgcore.disk.image import Image
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.disk.source import Source
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.progress import Tally
    from imgcore.files.target import Target
    from imgcore.formats.api import Writer, WriteRequest

# Differences are found by blocks of so many bytes, as guests write.
_GRANULE_NBYTES: Final = 4 * KIB


def child_sink(
    target: Target,
    source: Source,
    base: Image,
    request: WriteRequest[Any],
    options: SinkOptions,
) -> ChildSink | None:
    """Return the sink if the format and the options allow it; else None."""
    writer = get_driver(options.format).writer(request)
    if (
        isinstance(source, ImageSource)
        and isinstance(writer, HoldsSectors)
        and source.virtual_size == request.virtual_size == base.virtual_size
        and options.sparse_nbytes
        and not (target.in_place or options.salvage or options.reflink.is_required)
    ):
        return ChildSink(target, source.image, base, writer, options)
    return None


class ChildSink:
    """Writes what differs from a parent to a child; a `Sink`."""

    overwrites: bool = False

    def __init__(
        self, target: Target, source: Image, base: Image, writer: Writer, options: SinkOptions
    ) -> None:
        self.digest: Digest | None = None
        self.disk_nbytes: int = source.virtual_size
        self._target, self._writer, self._options = target, writer, options
        self._source, self._base = source, base

    @property
    def logical_sector_nbytes(self) -> int | None:
        """Bytes of the target's logical sectors; None if nothing states them."""
        writer = self._writer
        return writer.logical_sector_nbytes if isinstance(writer, SectorSized) else None

    def write(self, tally: Tally) -> tuple[BadRange, ...]:
        """Write an empty child, and then what differs."""
        self._writer.begin(self._target)
        self._writer.finish(self._writer.first_offset)
        if not self.disk_nbytes:
            return ()
        journal = None
        if self._options.checkpoints is not None:
            from imgcore.disk.area_journal import AreaJournal

            # Its name becomes durable: what is in it is written again.
            self._target.datasync()
            journal = AreaJournal(self._options.checkpoints, self.disk_nbytes)
            tally.skip(journal.position)
        read_before = 0 if journal is None else journal.read_nbytes
        with (
            open_unnamed(self._target, self._options.format) as child,
            self._source.kept_open() as new,
        ):
            with self._base.kept_open() as old:
                found = Differences(
                    new,
                    old,
                    nbytes=self.disk_nbytes,
                    granularity=_GRANULE_NBYTES,
                    threads=self._options.threads,
                    report=lambda done: count(done),
                    limit=self._options.limit,
                    **({} if journal is None else journal.limits),
                )
                copied = Copied()

                def count(done: int) -> None:
                    if journal is not None:
                        journal.save_if_due(found)
                    tally.count(
                        done,
                        data=copied.written,
                        read=read_before + found.read_nbytes + copied.read,
                        written=copied.written,
                    )

                def note(so_far: Copied) -> None:
                    nonlocal copied
                    copied = so_far
                    count(tally.done_nbytes)

                copy_areas(
                    self._source,
                    child,
                    joined(found.areas() if journal is None else journal.areas(found)),
                    threads=self._options.threads,
                    report=note,
                    grain=_GRANULE_NBYTES,
                )
                count(self.disk_nbytes)
                if journal is not None:
                    journal.finish()
            if self._options.checksum is not None:
                self.digest = DigestedDisk.of_state(new).digest(
                    self._options.checksum,
                    threads=self._options.threads,
                    variants=self._options.variants,
                    limit=self._options.pauses,
                    report=lambda *_: count(self.disk_nbytes),
                )
        return ()
