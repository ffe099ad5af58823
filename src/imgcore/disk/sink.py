"""Sinks that a disk is written to: an image, a compressed raw stream, an archive."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from imgcore.disk.backing import opened_reference
from imgcore.disk.late_end import needs_size, open_ended
from imgcore.errors import OptionError
from imgcore.formats.api import WriteRequest, WritesInOrder
from imgcore.formats.option_texts import parse_options
from imgcore.formats.options import has_tables_in_front
from imgcore.formats.registry import PLAIN_FORMAT, get_driver
from imgcore.limits import SECTOR_NBYTES
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.checksums.digest import Digest
    from imgcore.disk.image import Image
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.disk.source import Source
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.progress import Tally
    from imgcore.files.target import Target


class Sink(Protocol):
    """A target that the disk of a source is written to."""

    @property
    def overwrites(self) -> bool:
        """Whether a failure would leave an existing file half overwritten."""
        ...

    @property
    def logical_sector_nbytes(self) -> int | None:
        """Bytes of the target's logical sectors; None if nothing states them."""
        ...

    @property
    def disk_nbytes(self) -> int:
        """Bytes of the target's disk, which may end within a sector if it is raw."""
        ...

    @property
    def digest(self) -> Digest | None:
        """The digest of the target's disk after `write`, if it was asked for."""
        ...

    def write(self, tally: Tally) -> tuple[BadRange, ...]:
        """Write the whole disk, and return the ranges that could not be read."""
        ...


def open_sink(
    target: Target, options: SinkOptions, source: Source, base: Image | None, virtual_size: int
) -> Sink:
    """Return the sink for a target; nothing is written yet.

    A warning says if the target's logical sectors are not the source's.

    Parameters
    ----------
    target : Target
    options : SinkOptions
    source : Source
        The disk.
    base : Image, optional
        The target's parent, open.
    virtual_size : int
        Bytes of the target's disk, at least those of the source's; zeros follow.
        Meaningless if the source's size is not known yet.

    Raises
    ------
    OptionError, UnsupportedFeatureError
        The target cannot be written, or not with these options.
    """
    sink = _make_sink(target, options, source, base, virtual_size)
    warn_about_sectors(
        target.path,
        sink.logical_sector_nbytes,
        source.path,
        source.logical_sector_nbytes,
        is_plain=options.format == PLAIN_FORMAT,
    )
    return sink


def warn_about_sectors(
    target: str, ours: int | None, source: str, theirs: int | None, *, is_plain: bool
) -> None:
    """Log a warning if the guest will see other sectors than before.

    Parameters
    ----------
    target, source : str
        Names of the images.
    ours, theirs : int or None
        Bytes of their logical sectors, as far as they are known.
    is_plain : bool
        The target states no size of sectors, nor do options.
    """
    ours = ours or SECTOR_NBYTES
    if theirs is None:
        # Then they usually have 512 bytes.  An option for the target may know better.
        theirs = SECTOR_NBYTES if is_plain else ours
    if ours != theirs:
        log.warning(
            "%s: its logical sectors have %d bytes, those of %s have %d: "
            "the guest may fail to boot",
            target,
            ours,
            source,
            theirs,
        )


def _make_sink(
    target: Target, options: SinkOptions, source: Source, base: Image | None, virtual_size: int
) -> Sink:
    if options.profile is not None and options.profile.is_archived:
        from imgcore.disk.archive_sink import ArchiveSink

        if not source.size_is_known:
            raise needs_size("an archive", target.path)
        _refuse_in_stream(target, options)
        return ArchiveSink(target, source, virtual_size, options)
    if options.codec is not None:
        from imgcore.disk.stream_sink import StreamSink

        _refuse_in_stream(target, options)
        return StreamSink(target, source, options.codec, options)
    from imgcore.disk.image_sink import ImageSink

    driver = get_driver(options.format)
    backing = options.backing
    if backing is not None and base is not None:
        backing = opened_reference(backing, base.chain[0])
    request = WriteRequest(
        virtual_size=virtual_size,
        options=options.options,
        compress=options.compress,
        backing=backing,
        sparse_nbytes=options.sparse_nbytes,
        # A stream has no name that an image could refer to.
        target_name="" if options.in_order else os.path.basename(target.path),
        logical_sector_nbytes=source.logical_sector_nbytes,
        exact_nbytes=source.exact_nbytes if virtual_size == source.virtual_size else None,
        seed=None if options.checkpoints is None else options.checkpoints.seed,
        tables_first=options.in_order or has_tables_in_front(options.options),
    )
    if not source.size_is_known:
        request = open_ended(request, options, target)
    if request.tables_first and not isinstance(driver.writer(request), WritesInOrder):
        from imgcore.disk.front_sink import FrontSink

        return FrontSink(target, source, request, options)
    if base is not None:
        from imgcore.disk.child_sink import child_sink

        child = child_sink(target, source, base, request, options)
        if child is not None:
            return child
    return ImageSink(target, source, base, request, options)


def _refuse_in_stream(target: Target, options: SinkOptions) -> None:
    """Raise OptionError for options that a stream of bytes in order cannot have."""
    if target.in_place:
        raise OptionError(
            "a compressed raw stream cannot be written in place (-n)", path=target.path
        )
    if options.salvage:
        raise OptionError("salvaged data cannot be written as a stream", path=target.path)
    if options.reflink.is_required:
        options.reflink.refuse("a stream has no blocks that could be reflinked", target.path)
    has_options = options.options != parse_options(get_driver(options.format))
    if options.compress or options.backing is not None or has_options:
        raise OptionError("a compressed raw stream does not allow -c, -B or -o", path=target.path)
