"""The verb ``convert``: writes the disk of one image to another."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, cast

from imgcore.border import FilePath, file_name
from imgcore.checksums.digest import ALGORITHMS, Digest
from imgcore.disk.conversion import ConversionRequest, open_conversion
from imgcore.disk.open_options import Flags, OpenOptions
from imgcore.disk.sink_options import SinkOptions
from imgcore.disk.streamed import source_names
from imgcore.disk.target_parent import layer_of_source
from imgcore.engine.control import Run
from imgcore.errors import OptionError
from imgcore.files.commitment import until_committed
from imgcore.files.page_cache import CacheMode
from imgcore.files.stream_target import is_stream_object, is_stream_target, stream_name

if TYPE_CHECKING:
    from socket import socket

    from imgcore.border import Readable, Writable
    from imgcore.disk.conversion import Conversion
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.control import Control
    from imgcore.engine.progress import Progress
    from imgcore.files.commitment import Commitment


class ConvertResult(NamedTuple):
    """The result of `imgcore.convert`; all sizes in bytes.

    Attributes
    ----------
    source, target : str
        The names of the two files; several sources are separated by commas.
    source_format, target_format : str
        Their formats.
    virtual_size : int
        Size of the target's disk.
    bytes_data, bytes_zero : int
        How much of the disk is data and how much is zeros; the sum is ``virtual_size``.
    bytes_read, bytes_written : int
        Bytes read from the source's files and written to the target's.
    bytes_shared : int
        Bytes that were not written, since they are reflinks to the source's blocks.
    file_size : int
        Size of the target file; for a target of several files, of the main one.
    seconds : float
        Duration of the conversion.
    bad_ranges : tuple of BadRange
        Data that could not be read; always empty without ``salvage``.
    bytes_reused : int
        Bytes of the disk whose compressed blocks were taken over from the source
        instead of compressed again.
    bytes_trusted : int
        Of these, bytes whose blocks were not decompressed (``trust_blocks``).
    checksum : Digest or None
        The digest of the target's disk, if ``checksum`` or ``verify`` was given.
    verified : bool
        The target was read back, and its disk has this digest.
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
    bytes_reused: int = 0
    bytes_trusted: int = 0
    checksum: Digest | None = None
    verified: bool = False


def convert(
    source: FilePath | Readable | socket | Sequence[FilePath],
    target: FilePath | Writable | socket,
    *,
    format: str | None = None,
    target_format: str | None = None,
    options: Mapping[str, Any] | Sequence[str] | None = None,
    compress: bool = False,
    base: FilePath | None = None,
    backing: FilePath | None = None,
    backing_format: str | None = None,
    source_backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    sparse: SupportsIndex | str = 4096,
    threads: SupportsIndex | None = None,
    force: bool = False,
    sync: bool = True,
    in_place: bool = False,
    target_is_zero: bool = False,
    share: bool = False,
    salvage: bool = False,
    reflink: bool | str = True,
    trust_blocks: bool = False,
    allow: Sequence[FilePath] = (),
    progress: Callable[[Progress], None] | None = None,
    kernels: Mapping[str, str] | None = None,
    profile: str | None = None,
    rate: SupportsIndex | str | None = None,
    control: Control | None = None,
    checksum: str | None = None,
    verify: bool = False,
    resume: bool | str = False,
    journal: FilePath | None = None,
    size: SupportsIndex | str | None = None,
    receipt: FilePath | None = None,
    source_cache: str = "keep",
    target_cache: str = "keep",
) -> ConvertResult:
    """Convert a virtual disk image, including its backing files, to another format.

    ``format``, ``parent``, ``read_options``, ``allow`` and ``share`` are the keywords
    of `imgcore.open` for the source.  Its ``backing_format`` is
    ``source_backing_format`` here, since ``backing_format`` is about the target.
    ``allow`` and ``share`` apply to the target's backing file, too.

    Parameters
    ----------
    source : str, bytes or os.PathLike, or a sequence of them, or a readable object
        The image.  The disks of several images follow each other; ``format`` and the
        other options for reading apply to each.

        A stream is read once and in order: ``"-"`` is the standard input; the others
        are the name of a pipe, a socket, and an object that is open for reading bytes,
        which stays open.  ``format`` is ``"raw.zst"``, ``"raw.gz"`` or ``"raw.xz"`` for
        compressed raw disks.
    target : str, bytes or os.PathLike, or an object with ``write``, or a socket
        The new image.  ``"-"`` is the standard output.  Like the name of a pipe, a
        socket, and an object that is open for writing bytes, it gets the image as a
        stream: in order, once, and also what a failed conversion had written.  They
        stay open.

        Names such as ``disk.raw.zst`` and ``disk.raw.gz`` are compressed raw disks,
        whether or not ``format`` states raw.
    target_format : str, optional
        The target's format; by default the suffix of ``target`` decides.
        ``"raw.zst"`` and ``"raw.gz"`` are compressed raw disks, for streams.
    options : mapping or sequence of str, optional
        Options of the target's format, for example ``{"cluster_size": "2M"}`` or
        ``["cluster_size=2M"]``.
    compress : bool
        Write compressed blocks.
    base : str, bytes or os.PathLike, optional
        One of the source's backing files, at any depth.  It becomes the backing file
        (parent) of the target, by its name relative to the target's folder, and only
        what the images above it have is copied.
    backing : str, bytes or os.PathLike, optional
        The backing file (QCOW2) or parent (VHD, VHDX, VDI) of the target.  Blocks that
        read the same there are left out of the target, so that the target's disk still
        reads as the source's.
    backing_format : str, optional
        The format of ``backing``; required with it.
    sparse : int or str
        Runs of zeros of this size, in bytes, are not written.  0 writes every zero.
    threads : int, optional
        Number of worker threads, 1 to 256; one per CPU by default.  The bytes written
        do not depend on it.
    force : bool
        Replace an existing target when the conversion is complete.
    sync : bool
        Write the target to stable storage before it gets its name.
    in_place : bool
        Write into an existing file or block device.  A raw disk is written over the
        first bytes of the file.  An image of another format takes the place of all of
        its content.  A block device that is too small is rejected before anything is
        written.
    target_is_zero : bool
        The target, which is written in place, already reads as zeros: a raw disk's
        zeros are not written.  Other formats do not rely on it.
    salvage : bool
        Replace guest data that is lost with zeros and list it in ``bad_ranges`` of the
        result, instead of failing: data that the system cannot read, that does not
        decompress, or whose place is unknown since the file is truncated or a table is
        damaged.  The header must still be valid.
    reflink : bool or {"auto", "always", "strict", "never"}
        Reflink blocks of the source instead of copying them if the file system can do
        it (XFS, Btrfs) and both formats place blocks on its boundaries.  The target
        reads the same either way, and later writes to one file do not change the other.
        Targets that need their own blocks are always copied: preallocated ones (falloc,
        full), those with all zeros written (``sparse=0``), and those written in place.

        With ``"auto"``, or True, data is read first, and zeros in it are left out.
        ``"always"`` reads no data that can be reflinked: what the source has allocated
        is allocated in the target, zeros included.  The rest is copied.  It is an error
        if the file system has no reflinks, or if an option needs blocks of its own.
        ``"strict"`` is also an error if data would have to be copied, but for an
        incomplete block of the file system at the disk's end; nothing is written then.
        ``"never"``, or False, copies everything.
    trust_blocks : bool
        Do not decompress the compressed blocks that the target takes over from the
        source as they are.  This is faster, but a block that is damaged in the source
        becomes one in the target, without an error.  QCOW2 blocks that go to a
        streamOptimized VMDK are decompressed all the same, since their end and checksum
        are needed.  ``bytes_trusted`` of the result has the number of bytes.
    progress : callable, optional
        Called with a `Progress` on the calling thread, at most every 50 ms and once at
        the end, before the target gets its name.  If it raises, the conversion is
        cancelled and the exception is raised.
    kernels : mapping, optional
        The variant to use for an operation, for example ``{"zero": "avx2"}``.  A
        variant that is not available is an `OptionError`.
    profile : str, optional
        The platform that the target is for, for example ``"azure"``.  It sets format
        and options, and rounds the virtual size up to one that the platform accepts.
        Other arguments must not contradict it.
    rate : int or str, optional
        The most bytes of the disk to handle in a second, for example ``"100M"``.  Data
        counts, as it is read; holes and zeros that the source's tables state do not,
        unless they are written (``sparse=0``).  The bytes written do not depend on it.
    control : Control, optional
        Steers the conversion from other threads, and has its rate, in place of
        ``rate``.
    checksum : str, optional
        The algorithm of a digest of the target's disk, ``"sha256"`` or ``"blake3"``,
        which is made from what is written, without another pass; see
        `imgcore.checksum`.  It is the digest of what a guest reads from the target,
        zeros that a profile adds included.
    verify : bool
        Read the target back when it is synced and before it gets its name, past the
        page cache where the file system allows that, and compare its digest with that
        of what was written.  ``checksum`` is ``"sha256"`` then if it is not given.
    resume : bool or {"last", "verify"}
        Keep what is done of the target if the conversion ends early, however that
        happens, and go on from there if an earlier run has kept something.  A journal
        beside the target says what is done.  The target gets the same bytes as without
        a break.  A source that has changed, or other options, are an error.
        ``"verify"`` reads back all that was kept before it goes on; ``"last"``, or
        True, only the last checkpoint.
    journal : str, bytes or os.PathLike, optional
        The journal's name; by default it is ``target`` with ``.imgcore-resume``.  For a
        block device it is required.
    size : int or str, optional
        Bytes of the disk in a stream, for example ``"10G"``, for targets that must know
        it from the start.  A stream that is shorter is an error; one that goes on may
        do so with zeros only.
    receipt : str, bytes or os.PathLike, optional
        A file for a receipt: JSON that says what was done, by which `imgcore.verify`
        verifies the target later.  It appears after the target, and an existing file is
        replaced only with ``force``.  ``checksum`` is ``"sha256"`` then if it is not
        given.
    source_cache, target_cache : {"keep", "drop", "direct", "auto"}
        How the files that are read, and those that are written, use the page cache.
        ``"drop"`` takes out again what the conversion has brought in, so that a large
        one does not push out what the host has there; what was cached before stays.
        ``"direct"`` goes past it where the file system can (``O_DIRECT``), and is
        ``"drop"`` for the rest.  ``"auto"`` is ``"keep"`` for a job that is small for
        the memory, and one of the two for others.

    Returns
    -------
    ConvertResult

    Raises
    ------
    OSError
        A file cannot be read or written, or the target's file system is full.
    ChecksumError
        The target does not read as it was written (``verify``).
    ImgcoreError
        The source cannot be read as an image, or the arguments contradict each other.

    Notes
    -----
    Unless ``in_place`` is given, the name ``target`` always stands for its former file,
    for nothing, or for the complete new image, also after a failure.  The memory used
    does not grow with the size of the disk.
    """
    started = time.monotonic()
    place: str | Any = target if is_stream_object(target) else file_name(cast("FilePath", target))
    in_order = is_stream_target(place)
    target = stream_name(place) if in_order else place
    if base is not None and backing is not None:
        raise OptionError("--base and -B both state the target's backing file")
    if verify and not sync:
        raise OptionError("--verify reads what is on stable storage: it contradicts --no-sync")
    resuming = None
    if resume is not False or journal is not None:
        from imgcore.disk.resuming import Resuming

        resuming = Resuming.from_keywords(resume, journal)
    if checksum is None and (verify or receipt is not None):
        checksum = ALGORITHMS[0]
    source_mode = CacheMode.from_keyword(source_cache, "source_cache")
    target_mode = CacheMode.from_keyword(target_cache, "target_cache")
    opening = OpenOptions.from_keywords(
        format=format,
        backing_format=source_backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
        flags=Flags(backing_format="--source-backing-format"),
        salvage=salvage,
        size=size,
    )
    if in_order and verify:
        raise OptionError("--verify reads the target back, which is not possible for a stream")
    sources = source_names(source)
    if base is not None:
        backing, backing_format = layer_of_source(sources, file_name(base), target, opening)
    run = Run.of(rate, control, progress)
    writing = SinkOptions.from_keywords(
        target,
        format=target_format,
        options=options,
        compress=compress,
        backing=backing,
        backing_format=backing_format,
        sparse=sparse,
        threads=threads,
        in_place=in_place,
        target_is_zero=target_is_zero,
        salvage=salvage,
        reflink=reflink,
        trust_blocks=trust_blocks,
        kernels=kernels,
        profile=profile,
        limit=run.limit,
        checksum=checksum,
        in_order=in_order,
    )
    if resuming is not None:
        resuming.refuse(writing, sync=sync, target=target)
    request = ConversionRequest(
        sources=sources,
        place=place,
        target=target,
        opening=opening,
        writing=writing,
        force=force,
        sync=sync,
        verify=verify,
        resuming=resuming,
        receipt=None if receipt is None else file_name(receipt),
        source_cache=source_mode,
        target_cache=target_mode,
    )

    def job(commitment: Commitment[ConvertResult]) -> None:
        with run, ExitStack() as stack:
            conversion = open_conversion(request, run, stack)
            if writing.reflink.is_required:
                from imgcore.rewriting.cloning import reflinking_sink

                conversion = conversion._replace(sink=reflinking_sink(conversion.sink))
            bad_ranges = conversion.write()
            result = _result(conversion, bad_ranges, time.monotonic() - started)
            new_receipt = conversion.write_receipt(result._asdict())
            run.keep()
            commitment.commit(conversion.output, result, new_receipt)

    return until_committed(job)


def _result(
    conversion: Conversion, bad_ranges: tuple[BadRange, ...], seconds: float
) -> ConvertResult:
    tally, output = conversion.tally, conversion.output
    return ConvertResult(
        source=conversion.source.path,
        target=output.path,
        source_format=conversion.source.format,
        target_format=conversion.writing.format,
        virtual_size=tally.total_nbytes,
        bytes_data=tally.data_nbytes,
        bytes_zero=tally.total_nbytes - tally.data_nbytes,
        bytes_read=tally.read_nbytes,
        bytes_written=tally.written_nbytes,
        bytes_shared=tally.reflinked_nbytes,
        file_size=output.main.file_size,
        seconds=seconds,
        bad_ranges=bad_ranges,
        bytes_reused=tally.reused_nbytes,
        bytes_trusted=tally.trusted_nbytes,
        checksum=conversion.sink.digest,
        verified=conversion.read_back is not None,
    )
