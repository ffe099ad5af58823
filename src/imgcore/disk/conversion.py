"""A conversion: opens what it reads and writes, writes it and verifies it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from imgcore.disk.profile_fitting import fitting_size, warn_about_size
from imgcore.disk.sink import Sink, open_sink
from imgcore.disk.source import Source, open_sources
from imgcore.disk.target_format import refuse_other_name
from imgcore.disk.target_parent import open_parent, parent_options
from imgcore.engine.control import Run
from imgcore.engine.progress import Tally
from imgcore.files.host_file import stored_nbytes, use_page_cache
from imgcore.files.page_cache import CacheMode
from imgcore.files.stream_target import StreamTarget
from imgcore.files.target import Target
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import ExitStack

    from imgcore.disk.image import Image
    from imgcore.disk.open_options import OpenOptions
    from imgcore.disk.read_back import ReadBack
    from imgcore.disk.receipt import NewReceipt
    from imgcore.disk.resuming import Resuming
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.files.byte_source import ByteSource


class ConversionRequest(NamedTuple):
    """The keywords of `imgcore.convert`, verified.

    Attributes
    ----------
    sources : sequence
        The names of the images, or one stream.
    place : str or object
        The target: a name, or what a stream is written to.
    target : str
        Its name in messages.
    opening, writing
        How to open the sources, and how to write the target.
    force, sync, verify : bool
    resuming : Resuming, optional
        How to go on after a break.
    receipt : str, optional
        The name of the receipt.
    source_cache, target_cache : CacheMode
    """

    sources: Sequence[Any]
    place: Any
    target: str
    opening: OpenOptions
    writing: SinkOptions
    force: bool
    sync: bool
    verify: bool
    resuming: Resuming | None
    receipt: str | None
    source_cache: CacheMode
    target_cache: CacheMode


class Conversion(NamedTuple):
    """A conversion whose files are open.

    Attributes
    ----------
    run : Run
    source : Source
        The disk that is read.
    files : sequence of ByteSource
        Every file that is read.
    output : Target
    writing : SinkOptions
    sink : Sink
        What writes the disk to ``output``.
    tally : Tally
    read_back : ReadBack or None
        How to read the target back.
    receipt : NewReceipt or None
    """

    run: Run
    source: Source
    files: Sequence[ByteSource]
    output: Target
    writing: SinkOptions
    sink: Sink
    tally: Tally
    read_back: ReadBack | None
    receipt: NewReceipt | None

    def write(self) -> tuple[BadRange, ...]:
        """Write the target's content durably, and verify it.

        Returns
        -------
        tuple of BadRange
            What could not be read.

        Raises
        ------
        TargetError, OSError, ImgcoreError
            Also if a source file has changed meanwhile.
        """
        sink, tally, output, read_back = self.sink, self.tally, self.output, self.read_back
        try:
            bad_ranges = sink.write(tally)
            self.run.phase = "syncing"
            output.prepare()
            if read_back is not None and sink.digest is not None:
                self.run.phase = "verifying"
                read_back.verify(sink.digest, sink.disk_nbytes, tally.finish)
            for file in self.files:
                file.check_unchanged()
            # The last call for progress: it may still cancel the job.
            tally.finish()
        except BaseException:
            if sink.overwrites:
                log.warning("%s: it was written in place and is now incomplete", output.path)
            raise
        return bad_ranges

    def write_receipt(self, result: Mapping[str, Any]) -> Target | None:
        """Write the receipt, if there is one, and return its file.

        ``result`` are the fields of the conversion's result.
        """
        if self.receipt is None:
            return None
        self.receipt.write(self.source, self.output, self.writing, self.sink.disk_nbytes, result)
        return self.receipt.target


def open_conversion(request: ConversionRequest, run: Run, stack: ExitStack) -> Conversion:
    """Open the files of a conversion; ``stack`` closes them.

    Nothing is written yet, but for the journal of a conversion that can go on.
    """
    writing = request.writing
    receipt = _new_receipt(request, stack)
    opening = request.opening._replace(on_wait=run.wait, page_cache=request.source_cache)
    source = stack.enter_context(open_sources(request.sources, opening))
    source.refuse_conversion(with_base=writing.backing is not None)
    base_opening = parent_options(writing, request.opening)
    base: Image | None = None
    if writing.backing is not None:
        base = stack.enter_context(open_parent(request.target, writing.backing, base_opening))
    files = [*source.files, *(base.every_file() if base is not None else ())]
    disk_nbytes = fitting_size(writing.profile, source)
    tally = Tally(disk_nbytes, run.report, run)
    output, writing = _open_target(request, source, files, tally, stack)
    output.protect(files)
    use_page_cache(files, request.source_cache, _job_nbytes(files, disk_nbytes))
    if receipt is not None:
        receipt.protect(files)
    refuse_other_name(output.path, writing.format, flag="-O", profile=writing.profile)
    warn_about_size(writing.profile, source, disk_nbytes)
    sink = open_sink(output, writing, source, base, disk_nbytes)
    read_back = None
    if request.verify:
        from imgcore.disk.read_back import ReadBack

        read_back = ReadBack(output, writing, base, base_opening)
    return Conversion(run, source, files, output, writing, sink, tally, read_back, receipt)


def _job_nbytes(files: Sequence[ByteSource], disk_nbytes: int) -> int:
    """Return what the job reads, about; of a stream, at most the whole disk."""
    nbytes = stored_nbytes(files)
    return disk_nbytes if nbytes is None else nbytes


def _new_receipt(request: ConversionRequest, stack: ExitStack) -> NewReceipt | None:
    """Create the file of the receipt; ``stack`` removes it unless it is committed."""
    if request.receipt is None:
        return None
    from imgcore.disk.receipt import NewReceipt

    return stack.enter_context(
        NewReceipt.open(request.receipt, force=request.force, job_target=request.target)
    )


def _open_target(
    request: ConversionRequest,
    source: Source,
    files: Sequence[ByteSource],
    tally: Tally,
    stack: ExitStack,
) -> tuple[Target, SinkOptions]:
    """Open the target; also return the options for writing with its checkpoints."""
    writing = request.writing
    if writing.in_order:
        return stack.enter_context(StreamTarget(request.place, waiting=tally.repeat)), writing
    journal = None
    if request.resuming is not None:
        journal = stack.enter_context(
            request.resuming.open_journal(
                request.target, writing, request.opening, files, tally.total_nbytes
            )
        )
    elif writing.in_place:
        from imgcore.disk.resuming import give_up_in_place

        give_up_in_place(request.target)
    output = Target(
        request.target,
        force=request.force,
        sync=request.sync,
        in_place=writing.in_place,
        in_place_nbytes=source.virtual_size if writing.could_be_in_place else None,
        journal=journal,
        cache=request.target_cache,
        job_nbytes=_job_nbytes(files, tally.total_nbytes),
    )
    stack.enter_context(output)
    if request.resuming is not None and journal is not None:
        checkpoints = stack.enter_context(request.resuming.checkpoints(journal))
        writing = writing._replace(checkpoints=checkpoints)
    return output, writing
