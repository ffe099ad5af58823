"""The verb ``convert``: from one image to another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from imgcore._core import Job
from imgcore.disk.chain import opened_reference
from imgcore.disk.image import Image
from imgcore.disk.image import open as open_image
from imgcore.disk.supply import ImageSupply, StreamSupply
from imgcore.engine.bad_ranges import BadRange, named_bad_ranges
from imgcore.engine.extents import PLACEMENT_DTYPE
from imgcore.engine.geometry import CodecId, Placing, ZeroPolicy
from imgcore.engine.job import chosen_variants, thread_count, translated_errors
from imgcore.engine.progress import Progress
from imgcore.errors import LimitExceededError, OptionError, UnsupportedFeatureError
from imgcore.files.gate import folder_names
from imgcore.files.target import Target
from imgcore.formats.api import BackingReference, SectorSized, WriteRequest
from imgcore.formats.option_texts import given_options, parse_options
from imgcore.formats.registry import (
    canonical_name,
    format_from_suffix,
    get_driver,
    refuse_image_in_stream,
    refuse_stream_options,
    stream_suffix,
)
from imgcore.limits import MAX_BASE_BLOCK_NBYTES, MIB, SECTOR_NBYTES
from imgcore.log import log
from imgcore.platforms.profiles import (
    GCE_SUFFIXES,
    Container,
    Profile,
    apply_options,
    get_profile,
    rounded_size,
)
from imgcore.sizes import parse_size

if TYPE_CHECKING:
    from imgcore.disk.supply import Supply
    from imgcore.engine.batches import Batch
    from imgcore.engine.extents import Placements
    from imgcore.engine.geometry import Geometry
    from imgcore.files.host_file import HostFile
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Writer
    from imgcore.formats.options import FormatOptions
    from imgcore.streams.source import StreamSource

_MAX_SPARSE_NBYTES = 1 * MIB


class ConvertResult(NamedTuple):
    """What a conversion did; sizes in bytes.

    ``bytes_data`` and ``bytes_zero`` split the virtual disk into what was found to be data
    and what was found to be zeros; ``bytes_shared`` were not written, they are the source's own
    blocks.  ``bad_ranges`` is empty unless ``salvage`` was asked for.
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


class _Request(NamedTuple):
    """The arguments of `convert`, checked and resolved."""

    source: str
    source_format: str | None
    target: str
    target_format: str
    options: FormatOptions
    compress: bool
    backing: BackingReference | None
    source_backing_format: str | None
    parent: str | None
    read_options: Mapping[str, Any] | Sequence[str] | None
    sparse_nbytes: int
    threads: int
    force: bool
    sync: bool
    in_place: bool
    share: bool
    salvage: bool
    reflink: bool
    allow: tuple[str, ...]
    progress: Callable[[Progress], None] | None
    variants: dict[str, str]
    profile: Profile | None


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
    format : str, optional
        The source's format; found by its magic, or for raw by its suffix, if None.
    target_format : str, optional
        The target's format; follows from its suffix if None.
    options : mapping or sequence of str, optional
        The target format's options, such as ``{"cluster_size": "2M"}`` or ``["cluster_size=2M"]``.
    compress : bool
        Write compressed blocks.
    backing, backing_format : optional
        A backing file for the target (QCOW2) or its parent (VHD, VHDX, VDI), and its format.
        Blocks that read the same in it are left out; the virtual disk reads the same as the source.
    source_backing_format : str, optional
        Format of the source's backing files whose format the source does not state.
    parent : path-like, optional
        The source's parent, in place of what the source calls it; see :func:`imgcore.open`.
    read_options : mapping or sequence of str, optional
        How to read the source; see :func:`imgcore.open`.
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
    share : bool
        Open the source even if another process writes to it.
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
    allow : sequence of path-like
        Folders, besides an image's own, in which files named inside images may lie.
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
    Whatever goes wrong, at any moment the target's name holds its former file, nothing, or
    the complete new image; with ``in_place`` that cannot be promised.  Memory is bounded,
    whatever the size of the disk.
    """
    source_name, target_name = os.fspath(source), os.fspath(target)
    platform = None if profile is None else get_profile(profile)
    resolved = _resolve_target_format(target_name, target_format, platform)
    request = _Request(
        source=source_name,
        source_format=format,
        target=target_name,
        target_format=resolved,
        options=_resolve_options(resolved, options, platform),
        compress=compress,
        backing=_backing_reference(backing, backing_format),
        source_backing_format=source_backing_format,
        parent=None if parent is None else os.fspath(parent),
        read_options=read_options,
        sparse_nbytes=_sparse_nbytes(sparse),
        threads=thread_count(threads),
        force=force,
        sync=sync,
        in_place=in_place,
        share=share,
        salvage=salvage,
        reflink=reflink,
        allow=tuple(folder_names(allow)),
        progress=progress,
        variants=chosen_variants(kernels),
        profile=platform,
    )
    if platform is not None:
        _refuse_against_profile(platform, request)
    with _Conversion(request) as conversion:
        return conversion.run()


def _resolve_target_format(target: str, stated: str | None, profile: Profile | None) -> str:
    if profile is not None:
        if stated is not None and canonical_name(stated) != profile.format:
            raise OptionError(
                f"the profile {profile.name} writes {profile.format}, not {canonical_name(stated)}"
            )
        stated = profile.format
    name = stated or format_from_suffix(target)
    if name is None:
        raise OptionError(f"{target}: the name has no suffix of a known format: state it with -O")
    name = canonical_name(name)
    if stream_suffix(target) is not None and name != "raw":
        raise OptionError(f"{target}: only raw is written as a compressed stream, not {name}")
    return name


def _resolve_options(
    target_format: str,
    options: Mapping[str, Any] | Sequence[str] | None,
    profile: Profile | None,
) -> FormatOptions:
    driver = get_driver(target_format)
    if profile is None:
        return parse_options(driver, options)
    return parse_options(driver, apply_options(profile, given_options(driver, options)))


def _refuse_against_profile(profile: Profile, request: _Request) -> None:
    """Raise OptionError for what no option of the format says, but the profile rules out."""
    is_archive = profile.container is Container.GCE_TAR
    if request.backing is not None and not profile.allows_backing:
        raise OptionError(f"the profile {profile.name} takes no parent (-B)")
    if is_archive and not request.target.lower().endswith(GCE_SUFFIXES):
        raise OptionError(
            f"{request.target}: the profile {profile.name} writes an archive, "
            f"name it {' or '.join(GCE_SUFFIXES)}"
        )
    if is_archive and (request.in_place or request.compress):
        raise OptionError(f"the profile {profile.name} takes no -n and no -c")


def _backing_reference(
    backing: str | os.PathLike[str] | None, backing_format: str | None
) -> BackingReference | None:
    if backing is None:
        if backing_format is not None:
            raise OptionError("a format of the backing file (-F) without a backing file (-B)")
        return None
    if backing_format is None:
        raise OptionError("the backing file's format is never guessed: state it with -F")
    return BackingReference(os.fspath(backing), canonical_name(backing_format))


def _sparse_nbytes(sparse: int | str) -> int:
    nbytes = parse_size(sparse) if isinstance(sparse, str) else sparse
    if nbytes < 0 or nbytes % SECTOR_NBYTES or nbytes > _MAX_SPARSE_NBYTES:
        raise OptionError(
            f"-S {nbytes}: a multiple of {SECTOR_NBYTES} up to {_MAX_SPARSE_NBYTES} is needed"
        )
    return nbytes


class _Conversion:
    """One run of `convert`: what is open, and how far it is."""

    def __init__(self, request: _Request) -> None:
        self._request = request
        self._stack = ExitStack()
        self._image: Image | None = None
        self._stream: StreamSource | None = None
        self._base: Image | None = None
        self._backing: BackingReference | None = None
        self._skipped_nbytes = 0
        self._has_begun = False
        self._data_nbytes = self._read_nbytes = self._written_nbytes = self._shared_nbytes = 0
        self._bad_ranges: tuple[BadRange, ...] = ()
        self._started = time.monotonic()

    def __enter__(self) -> _Conversion:
        try:
            self._open_source()
            self._open_base()
            if self._request.profile is not None:
                self._fit_to(self._request.profile)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- what is read -------------------------------------------------------------------

    def _open_source(self) -> None:
        r = self._request
        if stream_suffix(r.source) is not None and r.source_format in (None, "raw"):
            from imgcore.streams.source import StreamSource

            if r.salvage:
                raise OptionError(f"{r.source}: nothing of a compressed stream can be salvaged")
            refuse_stream_options(r.source, r.read_options, r.parent)
            self._stream = StreamSource.open(r.source, share=r.share)
            self._stack.callback(self._stream.close)
            if r.source_format is None:
                refuse_image_in_stream(self._stream)
            self._virtual_size = self._stream.virtual_size
            return
        self._image = open_image(
            r.source,
            format=r.source_format,
            backing_format=r.source_backing_format,
            parent=r.parent,
            read_options=r.read_options,
            allow=r.allow,
            share=r.share,
        )
        self._stack.callback(self._image.close)
        self._virtual_size = self._image.virtual_size
        if self._virtual_size % SECTOR_NBYTES:
            raise UnsupportedFeatureError(
                f"its disk has {self._virtual_size} bytes, no multiple of {SECTOR_NBYTES}: no "
                "other format can say that (qemu-img resize changes the size)",
                path=r.source,
            )

    def _open_base(self) -> None:
        backing = self._request.backing
        if backing is None:
            return
        if self._request.salvage:
            raise OptionError("what is salvaged cannot be compared with a parent (-B)")
        if self._stream is not None:
            raise UnsupportedFeatureError("a compressed raw source does not go with -B")
        folder = os.path.dirname(os.path.abspath(self._request.target))
        self._base = open_image(
            os.path.join(folder, backing.name),
            format=backing.format,
            allow=self._request.allow,
            share=self._request.share,
        )
        self._stack.callback(self._base.close)
        self._backing = opened_reference(backing, self._base.files[0], self._base.reader)

    def _fit_to(self, profile: Profile) -> None:
        """Round the disk up to what the platform takes; the engine pads it with zeros."""
        nbytes = rounded_size(profile, self._virtual_size)
        if nbytes > profile.max_virtual_nbytes:
            raise LimitExceededError(
                f"{profile.platform} takes no disk of {nbytes} bytes, "
                f"{profile.max_virtual_nbytes} at most",
                path=self._request.source,
            )
        if nbytes < profile.min_virtual_nbytes:
            log.warning(
                "%s: %s takes no disk of %d bytes, %d at least",
                self._request.source,
                profile.platform,
                nbytes,
                profile.min_virtual_nbytes,
            )
        self._virtual_size = nbytes

    def _sources(self) -> Iterator[HostFile]:
        if self._stream is not None:
            yield self._stream.file
        for image in filter(None, (self._image, self._base)):
            yield from image.every_file()

    # -- what is written ----------------------------------------------------------------

    def run(self) -> ConvertResult:
        """Write the target and give it its name."""
        r = self._request
        with Target(r.target, force=r.force, sync=r.sync, in_place=r.in_place) as target:
            target.protect(self._sources())
            try:
                self._write(target)
                self._check_unchanged()
            except BaseException:
                if target.in_place and self._has_begun:
                    log.warning("%s: written in place, and now incomplete", r.target)
                raise
            file_size = os.fstat(target.main.fd).st_size
            target.commit()
        self._report(self._virtual_size)
        return ConvertResult(
            source=r.source,
            target=r.target,
            source_format="raw" if self._image is None else self._image.format,
            target_format=r.target_format,
            virtual_size=self._virtual_size,
            bytes_data=self._data_nbytes,
            bytes_zero=self._virtual_size - self._data_nbytes,
            bytes_read=self._read_nbytes,
            bytes_written=self._written_nbytes,
            bytes_shared=self._shared_nbytes,
            file_size=file_size,
            seconds=time.monotonic() - self._started,
            bad_ranges=self._bad_ranges,
        )

    def _check_unchanged(self) -> None:
        for file in self._sources():
            file.check_unchanged()

    def _make_writer(self, target: Target) -> Writer:
        r = self._request
        if target.in_place and r.target_format != "raw":
            what = "a block device" if target.is_block_device else "an existing file (-n)"
            raise UnsupportedFeatureError(
                f"only raw is written into {what}, not {r.target_format}", path=r.target
            )
        stated = None if self._image is None else self._image.logical_sector_nbytes
        writer = get_driver(r.target_format).writer(
            WriteRequest(
                virtual_size=self._virtual_size,
                options=r.options,
                compress=r.compress,
                backing=self._backing,
                sparse_nbytes=r.sparse_nbytes,
                target_name=os.path.basename(r.target),
                logical_sector_nbytes=stated,
            )
        )
        block_nbytes = writer.geometry.block_nbytes
        if r.backing is not None and block_nbytes > MAX_BASE_BLOCK_NBYTES:
            raise OptionError(
                f"blocks of {block_nbytes} bytes are too large to be compared with a parent (-B): "
                f"at most {MAX_BASE_BLOCK_NBYTES} are allowed",
                path=r.target,
            )
        self._warn_of_sectors(stated, writer)
        return writer

    def _warn_of_sectors(self, stated: int | None, writer: Writer) -> None:
        """Say so if the target's logical sectors are not those that the source states."""
        kept = writer.logical_sector_nbytes if isinstance(writer, SectorSized) else SECTOR_NBYTES
        if stated is not None and stated != kept:
            log.warning(
                "%s: logical sectors have %d bytes, in %s they had %d: a guest may not start",
                self._request.target,
                kept,
                self._request.source,
                stated,
            )

    def _write(self, target: Target) -> None:
        r = self._request
        is_archive = r.profile is not None and r.profile.container is Container.GCE_TAR
        if is_archive or stream_suffix(r.target) is not None:
            self._write_stream(target, is_archive)
        else:
            self._write_image(target)

    def _write_image(self, target: Target) -> None:
        writer = self._make_writer(target)
        geometry = writer.geometry
        if geometry.zero_policy is ZeroPolicy.STORE and geometry.codec.codec is CodecId.NONE:
            target.require_space(self._virtual_size)  # every byte of the disk is written
        data_file = writer.begin(target)
        offset = writer.first_offset
        if self._virtual_size:
            offset = self._move(writer, target, data_file)
        writer.finish(offset)

    def _supply(self, geometry: Geometry) -> Supply:
        if self._stream is not None:
            return StreamSupply(self._stream, geometry)
        assert self._image is not None
        return ImageSupply(self._image, self._base, geometry)

    def _move(self, writer: Writer, target: Target, data_file: TargetFile) -> int:
        """Run the engine over the whole disk; return the target's first free offset."""
        r = self._request
        self._has_begun = True
        with ExitStack() as stack:
            supply = self._supply(writer.geometry)
            stack.callback(supply.close)
            stack.enter_context(translated_errors(supply.paths, r.target))
            job = Job(
                sources=supply.native_sources(),
                geometry=writer.geometry,
                target=data_file.core,
                next_offset=writer.first_offset,
                has_base=self._base is not None,
                threads=r.threads,
                variants=r.variants,
                salvage=r.salvage,
                reflink=self._may_reflink(target, writer),
            )
            stack.callback(job.close)
            self._run_batches(job, writer, supply)
            self._bad_ranges = named_bad_ranges(job.bad_ranges, supply.paths)
            return int(job.next_offset)

    def _may_reflink(self, target: Target, writer: Writer) -> bool:
        """Tell whether the target may consist of the source's blocks."""
        r = self._request
        own_blocks = writer.geometry.zero_policy is ZeroPolicy.STORE or target.in_place
        own_blocks |= writer.needs_own_blocks
        return r.reflink and not own_blocks and not r.salvage

    def _run_batches(self, job: Job, writer: Writer, supply: Supply) -> None:
        """Find the extents of each batch while the engine works on the one before it."""
        geometry = writer.geometry
        pending: tuple[Batch, Placements | None] | None = None
        given_nbytes = 0
        for batch in supply.batches():
            if pending is not None:
                self._finish_batch(job, writer, *pending)
            self._skipped_nbytes = batch.start - given_nbytes
            given_nbytes += batch.end - batch.start
            placements = None
            if geometry.placing is Placing.APPEND:
                n_blocks = -(-(batch.end - batch.start) // geometry.block_nbytes)
                placements = np.zeros(n_blocks, PLACEMENT_DTYPE)
            job.start(batch.start, batch.end, batch.rows, batch.base, placements)
            pending = (batch, placements)
        if pending is not None:
            self._finish_batch(job, writer, *pending)

    def _finish_batch(
        self, job: Job, writer: Writer, batch: Batch, placements: Placements | None
    ) -> None:
        def tick() -> None:
            done, data, _, read, written, self._shared_nbytes = job.progress()
            self._count(self._skipped_nbytes + done, data, read, written)

        job.wait(tick)
        tick()
        if placements is not None:
            first_block = batch.start // writer.geometry.block_nbytes
            job.next_offset = writer.place(first_block, placements, job.next_offset)

    def _write_stream(self, target: Target, is_archive: bool) -> None:
        """Write guest bytes in order, through a multi-threaded compressor."""
        from imgcore.disk import ordered as streams

        r = self._request
        if target.in_place:
            raise OptionError(f"{r.target}: a compressed raw stream is not written in place (-n)")
        if r.salvage:
            raise OptionError(f"{r.target}: what is salvaged is not written as a stream")
        defaults = parse_options(get_driver(r.target_format))
        if r.compress or r.backing is not None or r.options != defaults:
            raise OptionError(f"{r.target}: a compressed raw stream takes no -c, -B or -o")
        disk = streams.DiskInOrder(self._image, self._stream)

        def count(done: int, n_read: int, n_written: int) -> None:
            self._count(done, n_read, n_read, n_written)

        report = streams.rate_limited(count, self._virtual_size)
        if is_archive:
            streams.write_gce_tar(disk, target.main, self._virtual_size, r.threads, report)
        elif stream_suffix(r.target) == ".gz":
            streams.write_gzip(disk, target.main, r.threads, report)
        else:
            streams.write_zstd(disk, target.main, self._virtual_size, r.threads, report)

    # -- progress -------------------------------------------------------------------------

    def _count(self, done: int, data: int, read: int, written: int) -> None:
        self._data_nbytes, self._read_nbytes, self._written_nbytes = data, read, written
        self._report(done)

    def _report(self, done: int) -> None:
        if self._request.progress is not None:
            data = self._data_nbytes
            self._request.progress(
                Progress(done, self._virtual_size, data, done - data, self._written_nbytes)
            )
