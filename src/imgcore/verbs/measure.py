"""The verb ``measure``: computes the file size that a conversion needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from imgcore.border import FilePath, byte_count, file_name
from imgcore.errors import OptionError
from imgcore.formats.registry import PLAIN_FORMAT

if TYPE_CHECKING:
    from imgcore.engine.control import Control
    from imgcore.engine.extents import Extents
    from imgcore.engine.progress import Progress
    from imgcore.formats.api import Measurement
    from imgcore.rewriting.director import RewriteCost


class RewriteMeasurement(NamedTuple):
    """The result of `imgcore.measure_rewrite`.

    Attributes
    ----------
    source_format, target_format : str
        The formats before and after.
    virtual_size : int
        Bytes of the disk.
    costs : tuple of RewriteCost
        With the options that were given, and then with other block sizes.
    """

    source_format: str
    target_format: str
    virtual_size: int
    costs: tuple[RewriteCost, ...]


class ReflinkMeasurement(NamedTuple):
    """The result of `imgcore.measure_reflink`, in bytes.

    Attributes
    ----------
    reflinked : int
        Data of the source's file that the target would have in common with it.
    copied : int
        Data that would be read and written.
    """

    reflinked: int
    copied: int


def measure(
    source: FilePath | None = None,
    *,
    size: SupportsIndex | None = None,
    format: str | None = None,
    target_format: str = PLAIN_FORMAT,
    options: Mapping[str, Any] | Sequence[str] | None = None,
    compress: bool = False,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
    share: bool = False,
    progress: Callable[[Progress], None] | None = None,
    control: Control | None = None,
) -> Measurement:
    """Compute how large a target file would be.

    For the keywords that are about opening ``source`` see `imgcore.open`.

    Parameters
    ----------
    source : str, bytes or os.PathLike, optional
        The image to convert.
    size : int, optional
        Bytes of an empty disk, instead of ``source``.
    target_format : str
        Format of the target; raw by default.
    options : mapping or sequence of str, optional
        Options of the target's format, as a mapping or as strings ``"key=value,..."``.
    compress : bool
        Measure a compressed target.  The result is an upper bound: the data may turn
        out not to compress at all.
    progress : callable, optional
        Called with a `Progress` on the calling thread, at most every 50 ms and once at
        the end.
    control : Control, optional
        Steers the job from other threads.  Its rate is about the tables that are read.

    Returns
    -------
    Measurement
        A tuple of ``required``, the bytes for the blocks that the source has allocated,
        and ``fully_allocated``, the bytes if the guest fills its disk.

    Raises
    ------
    OptionError
        Both or neither of ``source`` and ``size`` are given, or an option is wrong.
    ImgcoreError, OSError
        As `imgcore.open`.

    Notes
    -----
    Only the tables of the source are read, and one batch of extents is held in memory.
    """
    if (source is None) == (size is None):
        raise OptionError("measure needs either a source or a size, and not both")
    from imgcore.engine.control import Run
    from imgcore.engine.progress import Tally

    run = Run(control, progress)
    if size is not None:
        nbytes = byte_count(size, "size")
        with run:
            found = _measure_data(nbytes, (), target_format, options, compress)
            Tally(nbytes, run.report).finish()
            return found
    assert source is not None
    from imgcore.disk.open_options import OpenOptions
    from imgcore.disk.source import open_source
    from imgcore.disk.table_reads import TableReads

    opening = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
    )
    with run, open_source(file_name(source), opening) as disk:
        reads = TableReads(run, disk.virtual_size)
        reads.watch(disk.files)
        extents = reads.passed(disk.data_extents())
        found = _measure_data(disk.virtual_size, extents, target_format, options, compress)
        reads.finish()
        return found


def measure_rewrite(
    image: FilePath,
    target_format: str,
    *,
    options: Mapping[str, Any] | Sequence[str] | None = None,
    format: str | None = None,
    allow: Sequence[FilePath] = (),
    share: bool = False,
    drop: bool = False,
    inflate: bool = False,
    progress: Callable[[Progress], None] | None = None,
    control: Control | None = None,
) -> RewriteMeasurement:
    """Compute what of an image would stay, and how much `imgcore.rewrite` would write.

    ``format``, ``allow`` and ``share`` are the keywords of `imgcore.open`, the others
    those of `imgcore.rewrite`.

    Parameters
    ----------
    image : str, bytes or os.PathLike
        The image, of which only tables are read, and compressed blocks that could stay.
    target_format : str
        The new format.
    progress : callable, optional
        Called as by `imgcore.measure`, but with the bytes of tables that are read as
        ``done``; ``total`` is 0 until the end.
    control : Control, optional
        As for `imgcore.measure`.

    Returns
    -------
    RewriteMeasurement
        The first cost is that of the options; others follow if the format has blocks of
        other sizes.

    Raises
    ------
    UnsupportedFeatureError
        The image cannot be rewritten.
    ImgcoreError, OSError
        As `imgcore.open`.
    """
    from imgcore.disk.open_options import Flags, OpenOptions
    from imgcore.disk.table_reads import TableReads
    from imgcore.engine.control import Run
    from imgcore.rewriting.naming import new_name
    from imgcore.rewriting.wish import Wish, open_alone

    path = file_name(image)
    wish = Wish.from_keywords(target_format, options, drop=drop, inflate=inflate, trust_blocks=True)
    flags = Flags(backing_format="", parent="")
    opening = OpenOptions.from_keywords(format=format, allow=allow, share=share, flags=flags)
    name = new_name(path, wish.driver.name, name=None, keep_name=False)
    with Run(control, progress) as run, open_alone(path, opening) as subject:
        reads = TableReads(run)
        reads.watch(subject.every_file())
        costs = tuple(wish.costs(subject, name))
        reads.finish()
        return RewriteMeasurement(subject.format, wish.driver.name, subject.virtual_size, costs)


def _measure_data(
    virtual_size: int,
    batches: Iterable[Extents],
    target_format: str,
    options: Mapping[str, Any] | Sequence[str] | None,
    compress: bool,
) -> Measurement:
    from imgcore.disk.data_ranges import count_blocks
    from imgcore.formats.api import WriteRequest
    from imgcore.formats.option_texts import parse_options
    from imgcore.formats.registry import get_driver

    driver = get_driver(target_format)
    request = WriteRequest(
        virtual_size=virtual_size,
        options=parse_options(driver, options),
        compress=compress,
    )
    block_nbytes = driver.writer(request).geometry.block_nbytes
    data_nbytes = count_blocks(batches, block_nbytes) * block_nbytes
    return driver.measure(request, data_nbytes)


def measure_reflink(
    source: FilePath,
    target_format: str = PLAIN_FORMAT,
    *,
    format: str | None = None,
    options: Mapping[str, Any] | Sequence[str] | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
    share: bool = False,
    progress: Callable[[Progress], None] | None = None,
    control: Control | None = None,
) -> ReflinkMeasurement:
    """Compute what ``convert(reflink="always")`` would reflink and what it would copy.

    For the keywords that are about opening ``source`` see `imgcore.open`.

    Parameters
    ----------
    source : str, bytes or os.PathLike
        The image to convert.
    target_format : str
        Format of the target; raw by default.
    options : mapping or sequence of str, optional
        Options of the target's format, as a mapping or as strings ``"key=value,..."``.
    progress : callable, optional
        Called as by `imgcore.measure`, but with the bytes of tables that are read as
        ``done``; ``total`` is 0 until the end.
    control : Control, optional
        As for `imgcore.measure`.

    Returns
    -------
    ReflinkMeasurement

    Raises
    ------
    OptionError
        An option is wrong, or rules out reflinks.
    ImgcoreError, OSError
        As `imgcore.open`.

    Notes
    -----
    The target would be on the source's file system.  Whether that supports reflinks
    shows only when a target is written.  Only the source's tables are read.
    """
    from imgcore.disk.open_options import OpenOptions
    from imgcore.disk.reflinks import Reflink, refuse_own_blocks
    from imgcore.disk.source import open_source
    from imgcore.disk.table_reads import TableReads
    from imgcore.engine.control import Run
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.files.reflinks import reflink_block_nbytes
    from imgcore.formats.api import WriteRequest
    from imgcore.formats.option_texts import parse_options
    from imgcore.formats.registry import get_driver
    from imgcore.rewriting.cloning import cheapest_way

    opening = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
    )
    driver = get_driver(target_format)
    with Run(control, progress) as run, open_source(file_name(source), opening) as disk:
        reads = TableReads(run)
        reads.watch(disk.files)
        request = WriteRequest(
            virtual_size=disk.virtual_size,
            options=parse_options(driver, options),
            logical_sector_nbytes=disk.logical_sector_nbytes,
            exact_nbytes=disk.exact_nbytes,
        )
        writer = driver.writer(request)
        refuse_own_blocks(Reflink.ALWAYS, disk, writer)
        units = [reflink_block_nbytes(each.file) for each in disk.sources]
        rule = ReflinkRule.of(writer.geometry, units)
        _, count = cheapest_way(disk, driver, request, rule, trust_blocks=True)
        reads.finish()
        return ReflinkMeasurement(count.reflinked, count.copied)
