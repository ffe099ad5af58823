"""The verb ``convert``: from one image to another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from imgcore.disk.backing import backing_path
from imgcore.disk.fitting import fitting_size
from imgcore.disk.image import open_image
from imgcore.disk.options import OpenOptions
from imgcore.disk.sink import open_sink
from imgcore.disk.sink_options import SinkOptions
from imgcore.disk.source import open_source
from imgcore.disk.tally import Tally
from imgcore.files.target import Target
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.disk.image import Image
    from imgcore.disk.sink import Sink
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.progress import Progress
    from imgcore.files.byte_source import ByteSource


class ConvertResult(NamedTuple):
    """The outcome of a conversion; sizes in bytes.

    ``bytes_data`` and ``bytes_zero`` split the virtual disk into data and zeros.
    ``bytes_shared`` were not written: they are reflinks to the source's own blocks.
    ``bad_ranges`` is empty unless ``salvage`` was asked for.
    """

    source: str
    target: str
    source_format: str
    target_format: str
    virtual_size: int
    bytes_data: int
    bytes_zero: int
    bytes_read: int
    bytes_written: int
    bytes_shared: int
    file_size: int
    seconds: float
    bad_ranges: tuple[BadRange, ...] = ()


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    format: str | None = None,
    target_format: str | None = None,
    options: Mapping[str, Any] | Sequence[str] | None = None,
    compress: bool = False,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    source_backing_format: str | None = None,
    parent: str | os.PathLike[str] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    sparse: int | str = 4096,
    threads: int | None = None,
    force: bool = False,
    sync: bool = True,
    in_place: bool = False,
    share: bool = False,
    salvage: bool = False,
    reflink: bool = True,
    allow: Sequence[str | os.PathLike[str]] = (),
    progress: Callable[[Progress], None] | None = None,
    kernels: Mapping[str, str] | None = None,
    profile: str | None = None,
) -> ConvertResult:
    """Convert a virtual disk image, backing files included, into one of another format.

    Parameters
    ----------
    source, target : path-like
        ``disk.raw.zst`` and ``disk.raw.gz`` are read and written as compressed raw disks.
    format, source_backing_format, parent, read_options, allow, share
        How to open the source: see :func:`imgcore.open`, where ``source_backing_format`` is
        called ``backing_format``.  ``allow`` and ``share`` are for the target's backing file too.
    target_format : str, optional
        The target's format; follows from its suffix if None.
    options : mapping or sequence of str, optional
        The target format's options, such as ``{"cluster_size": "2M"}`` or ``["cluster_size=2M"]``.
    compress : bool
        Write compressed blocks.
    backing, backing_format : optional
        A backing file for the target (QCOW2) or its parent (VHD, VHDX, VDI), and its format.
        Blocks that read the same in it are left out; the virtual disk reads the same as the source.
    sparse : int or str
        Bytes: runs of zeros of this size are not written.  0 writes every zero.
    threads : int, optional
        Workers, 1 to 256; one per CPU by default.  The bytes written do not depend on it.
    force : bool
        Replace an existing target, when the conversion is complete.
    sync : bool
        Let the target reach the disk before it gets its name.
    in_place : bool
        Write into an existing raw file or block device.
    salvage : bool
        Write zeros for guest data that the system cannot read, or that does not decompress,
        and list it in ``bad_ranges`` of the result, instead of failing.  Headers and tables
        have to be sound all the same.
    reflink : bool
        Let the target share the source's blocks instead of copying them, where the file system
        can do that (XFS, Btrfs) and both formats put them on its block boundaries.  The target
        reads the same either way, and neither file sees what is written to the other later.
        Not done for targets that are to have blocks of their own: preallocated ones
        (falloc, full), those with every zero written (``sparse=0``) or written in place.
    progress : callable, optional
        Called with `Progress` on the calling thread, at most every 50 ms and once at the end.
        If it raises, the conversion is cancelled and the exception passes through.
    kernels : mapping, optional
        Variant by operation, such as ``{"zero": "avx2"}``; a demand that cannot be met is an
        OptionError.
    profile : str, optional
        A platform that the target is for, such as ``"azure"``: sets format and options, and
        rounds the virtual size up to what the platform takes.  Whatever else is asked for
        must agree with it.

    Returns
    -------
    ConvertResult

    Raises
    ------
    OSError
        A file cannot be read or written, or the target's file system is full.
    ImgcoreError
        The source is not a sound image, or the request makes no sense.

    Notes
    -----
    At any moment the target's name holds its former file, nothing, or the complete new
    image, also after a failure; not so with ``in_place``.  Memory is bounded, however large
    the disk is.
    """
    started = time.monotonic()
    opening = OpenOptions.from_keywords(
        format=format,
        backing_format=source_backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
    )
    writing = SinkOptions.from_keywords(
        os.fspath(target),
        format=target_format,
        options=options,
        compress=compress,
        backing=backing,
        backing_format=backing_format,
        sparse=sparse,
        threads=threads,
        in_place=in_place,
        salvage=salvage,
        reflink=reflink,
        kernels=kernels,
        profile=profile,
    )
    with ExitStack() as stack:
        disk = stack.enter_context(open_source(source, opening))
        disk.refuse_conversion(salvage=salvage, with_base=backing is not None)
        base = _open_base(os.fspath(target), writing, opening, stack)
        tally = Tally(fitting_size(writing.profile, disk), progress)
        output = stack.enter_context(Target(target, force=force, sync=sync, in_place=in_place))
        files = [*disk.files, *(base.every_file() if base is not None else ())]
        output.protect(files)
        sink = open_sink(output, writing, disk, base, tally.total_nbytes)
        bad_ranges = _write(sink, tally, files, output.path)
        file_size = output.main.file_size
        output.commit()
        tally.finish()
        return ConvertResult(
            source=os.fspath(source),
            target=output.path,
            source_format=disk.format,
            target_format=writing.format,
            virtual_size=tally.total_nbytes,
            bytes_data=tally.data_nbytes,
            bytes_zero=tally.total_nbytes - tally.data_nbytes,
            bytes_read=tally.read_nbytes,
            bytes_written=tally.written_nbytes,
            bytes_shared=tally.reflinked_nbytes,
            file_size=file_size,
            seconds=time.monotonic() - started,
            bad_ranges=bad_ranges,
        )


def _open_base(
    target: str, writing: SinkOptions, opening: OpenOptions, stack: ExitStack
) -> Image | None:
    """Open the target's parent; ``stack`` closes it."""
    if writing.backing is None:
        return None
    options = OpenOptions(format=writing.backing.format, allow=opening.allow, share=opening.share)
    return stack.enter_context(open_image(backing_path(target, writing.backing), options))


def _write(
    sink: Sink, tally: Tally, files: Sequence[ByteSource], target: str
) -> tuple[BadRange, ...]:
    """Write the target's content; the files that it is read from must not change meanwhile."""
    try:
        bad_ranges = sink.write(tally)
        for file in files:
            file.check_unchanged()
    except BaseException:
        if sink.overwrites:
            log.warning("%s: written in place, and now incomplete", target)
        raise
    return bad_ranges
