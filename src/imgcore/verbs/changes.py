"""The verb ``changes``: which areas of a disk have changed since an earlier state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, SupportsIndex, TypeAlias

from imgcore.areas.area import Area
from imgcore.areas.normal import check_granularity
from imgcore.border import FilePath, byte_count, file_name, source_name
from imgcore.disk.area_search import AreaSearch, SearchSettings
from imgcore.disk.image import Image, open_image
from imgcore.disk.open_options import Flags, OpenOptions
from imgcore.disk.opened import require_no_options
from imgcore.engine.control import Control, Run
from imgcore.engine.job import thread_count
from imgcore.engine.progress import Progress
from imgcore.errors import OptionError
from imgcore.sizes import parse_size

_SECOND_FLAGS: Final = Flags(format="-F", parent="--parent-b")


def changes(
    image: FilePath | int | Image,
    *,
    since: FilePath | int | None = None,
    bitmap: str | None = None,
    areas: FilePath | Sequence[Area | tuple[SupportsIndex, SupportsIndex]] | None = None,
    tree: FilePath | None = None,
    granularity: SupportsIndex | str = "64k",
    threads: SupportsIndex | None = None,
    progress: Callable[[Progress], None] | None = None,
    control: Control | None = None,
    format: str | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
    share: bool = False,
    chain: bool = True,
    files: Mapping[str, int] | None = None,
    format_since: str | None = None,
    parent_since: FilePath | Sequence[FilePath] | None = None,
    read_options_since: Mapping[str, Any] | Sequence[str] | None = None,
) -> Iterator[Area]:
    """Yield the areas of a disk that have changed since an earlier state of it.

    Exactly one of ``since``, ``bitmap``, ``areas`` and ``tree`` states the earlier
    state.  For the other keywords see `imgcore.open`.  If the image ``since`` has to be
    opened, those that end in ``_since`` apply to it, and ``backing_format``, ``allow``
    and ``share`` do, too.

    Parameters
    ----------
    image : str, bytes, os.PathLike, int or Image
        The disk as it is now: a file, an open descriptor of one, or an open image,
        which stays open, and takes no keywords for
        opening.
    since : str, bytes, os.PathLike or int, optional
        An older image of the disk.  If it is the file of a backing file of ``image``,
        at any depth, the areas are those that the layers above it state, and no content
        is read.  Otherwise both images are compared.
    bitmap : str, optional
        The name of a persistent bitmap in ``image`` (QCOW2).
    areas : str, bytes, os.PathLike, or sequence of Area or (offset, length), optional
        A file of another program that lists areas, or the areas.
    tree : str, bytes or os.PathLike, optional
        A checksum tree of the older state; ``image`` is read once.
    granularity : int or str
        Areas start and end at multiples of so many bytes, a power of two from 512 to
        2 GiB, or with the disk.
    threads : int, optional
        Number of worker threads that read; one per CPU by default.
    progress : callable, optional
        Called with a `Progress` on the calling thread, at most every 50 ms while
        content is read, and once at the end.
    control : Control, optional
        Steers the job from other threads.  Its rate is about each disk's data that is
        read.

    Yields
    ------
    Area
        Ascending, not adjacent unless they differ in ``is_zero``.  ``is_zero`` is set
        if the area is known to be zeros; if it is not, the area may still be zeros.

    Raises
    ------
    OptionError
        None of the four is given, or more than one.  Or the image has no such bitmap,
        ``areas`` does not suit the disk, or ``tree`` is of another disk.
    ImgcoreError, OSError
        As `imgcore.open`, but when the first area is requested: the images are open
        from then until the last one.  An image has changed while it was read; this is
        raised after the last area.

    Notes
    -----
    If the older disk is smaller, it goes on with zeros.  Areas are never outside the
    disk as it is now.
    """
    _require_one(since=since, bitmap=bitmap, areas=areas, tree=tree)
    run = Run(control, progress)
    how = _settings(granularity, threads, run)
    options = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
        chain=chain,
        files=files,
    )
    old_options = OpenOptions.from_keywords(
        format=format_since,
        backing_format=backing_format,
        parent=parent_since,
        read_options=read_options_since,
        allow=allow,
        share=share,
        flags=_SECOND_FLAGS,
    )
    old = None if since is None else source_name(since)

    def find(search: AreaSearch) -> Iterator[Area]:
        if old is not None:
            return search.since(old, old_options)
        if bitmap is not None:
            return search.marked(bitmap)
        if areas is not None:
            return search.listed(areas)
        assert tree is not None
        return search.since_tree(file_name(tree))

    if not isinstance(image, Image):
        return _opened(source_name(image), options, find, how, run)
    require_no_options(image, options._replace(backing_format=None, allow=(), share=False))
    return _changed(image, find, how, run)


def differences(
    image: Image,
    other: FilePath,
    options: OpenOptions,
    *,
    granularity: SupportsIndex | str = "64k",
    threads: SupportsIndex | None = None,
    progress: Callable[[Progress], None] | None = None,
    control: Control | None = None,
) -> Iterator[Area]:
    """Yield the areas in which an open image differs from another, as `changes` does.

    The content is compared even if the other one is a backing file of the image, and up
    to the end of the larger disk: the smaller one goes on with zeros.
    """
    run = Run(control, progress)
    how = _settings(granularity, threads, run)
    name = file_name(other)
    return _changed(image, lambda search: search.in_all(name, options), how, run)


Finder: TypeAlias = "Callable[[AreaSearch], Iterator[Area]]"


def _require_one(**states: object) -> None:
    """Raise OptionError unless exactly one argument is given."""
    n_given = sum(state is not None for state in states.values())
    if n_given != 1:
        names = ", ".join(states)
        raise OptionError(f"{n_given} of {names} are given: exactly one states what changed")


def _settings(
    granularity: SupportsIndex | str, threads: SupportsIndex | None, run: Run
) -> SearchSettings:
    return SearchSettings(
        _granularity(granularity), thread_count(threads), run.report_done, run.limit
    )


def _granularity(value: SupportsIndex | str) -> int:
    nbytes = parse_size(value) if isinstance(value, str) else byte_count(value, "granularity")
    check_granularity(nbytes)
    return nbytes


def _opened(
    source: str | int, options: OpenOptions, find: Finder, how: SearchSettings, run: Run
) -> Iterator[Area]:
    with run, open_image(source, options) as image:
        yield from _areas(image, find, how, run)


def _changed(image: Image, find: Finder, how: SearchSettings, run: Run) -> Iterator[Area]:
    with run:
        yield from _areas(image, find, how, run)


def _areas(image: Image, find: Finder, how: SearchSettings, run: Run) -> Iterator[Area]:
    """Yield the areas of an image, of which only each step keeps it open."""
    with image.kept_open() as disk:
        areas = find(AreaSearch(disk, how))
    while True:
        run.wait()
        with image.kept_open():
            area = next(areas, None)
            if area is None:
                for file in disk.every_file():
                    file.check_unchanged()
        if area is None:
            break
        yield area
    how.tally(disk.virtual_size).finish()
