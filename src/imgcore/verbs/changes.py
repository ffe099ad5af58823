"""The verb ``changes``: which areas of a disk have changed since an earlier state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, SupportsIndex, TypeAlias

from imgcore.areas.area import Area
from imgcore.areas.normal import check_granularity, joined, rounded
from imgcore.areas.reading import AreaList, read_areas
from imgcore.border import FilePath, byte_count, file_name, source_name
from imgcore.checksums.tree import TreeFile
from imgcore.disk.changed_areas import areas_above, with_zeros
from imgcore.disk.differences import MAX_BLOCK_NBYTES, Differences
from imgcore.disk.digests import DigestedDisk
from imgcore.disk.image import Image, open_image
from imgcore.disk.image_names import local_image
from imgcore.disk.open_options import Flags, OpenOptions
from imgcore.engine.job import thread_count
from imgcore.engine.progress import Progress, Tally
from imgcore.errors import OptionError
from imgcore.files.identity import Identity, named_identity, same_file
from imgcore.formats.api import HasBitmaps
from imgcore.sizes import parse_size

if TYPE_CHECKING:
    from imgcore.disk.disk_state import DiskState

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
    how = _How(_granularity(granularity), thread_count(threads), progress)
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

    def find(search: _Search) -> Iterator[Area]:
        if old is not None:
            return search.since(old, old_options)
        if bitmap is not None:
            return search.marked(bitmap)
        if areas is not None:
            return search.listed(areas)
        assert tree is not None
        return search.since_tree(file_name(tree))

    if not isinstance(image, Image):
        return _opened(source_name(image), options, find, how)
    own = options._replace(backing_format=None, allow=(), share=False)
    if own != OpenOptions.from_keywords():
        raise OptionError("an open image takes no options for opening", path=image.path)
    return _changed(image, find, how)


def differences(
    image: Image,
    other: FilePath,
    options: OpenOptions,
    *,
    granularity: SupportsIndex | str = "64k",
    threads: SupportsIndex | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[Area]:
    """Yield the areas in which an open image differs from another, as `changes` does.

    The content is compared even if the other one is a backing file of the image, and up
    to the end of the larger disk: the smaller one goes on with zeros.
    """
    how = _How(_granularity(granularity), thread_count(threads), progress)
    name = file_name(other)
    return _changed(image, lambda search: search.in_all(name, options), how)


class _How(NamedTuple):
    """How to read, and the size of blocks."""

    granularity: int
    threads: int
    progress: Callable[[Progress], None] | None

    def tally(self, total: int) -> Tally:
        """Return what reports the progress over a disk, of which only `done` counts."""
        progress = self.progress
        if progress is None:
            return Tally(total, None)
        return Tally(total, lambda state: progress(state._replace(zero=0)))


class _Search(NamedTuple):
    """Finds the changed areas of an open disk: in order, joined, in whole blocks."""

    disk: DiskState
    how: _How

    def since(self, source: str | int, options: OpenOptions) -> Iterator[Area]:
        """Yield what has changed since an older image, which may be in the chain."""
        name, stated = local_image(source, options)
        depth = self._depth_of(named_identity(name))
        if depth is not None and not stated.interprets:
            yield from self._above(depth)
            return
        with open_image(source, options) as image, image.kept_open() as old:
            # It may be read in another way than as a layer of the chain.
            if depth is not None and old.is_part_of(self.disk, depth):
                yield from self._above(depth)
            else:
                yield from self._compared(old, self.disk.virtual_size)
            image.check_unchanged()

    def _depth_of(self, identity: Identity) -> int | None:
        """Return the number of the layer that has a file, None if there is none."""
        for depth, file in enumerate(self.disk.files):
            if same_file(file.identity, identity):
                return depth
        return None

    def _above(self, depth: int) -> Iterator[Area]:
        """Yield what the layers above one of the chain's layers state."""
        areas = joined(areas_above(self.disk, depth))
        return rounded(areas, self.how.granularity, self.disk.virtual_size)

    def in_all(self, source: str, options: OpenOptions) -> Iterator[Area]:
        """Yield where another image differs, up to the end of the larger one."""
        with open_image(source, options) as image, image.kept_open() as old:
            yield from self._compared(old, max(self.disk.virtual_size, old.virtual_size))
            image.check_unchanged()

    def _compared(self, old: DiskState, nbytes: int) -> Iterator[Area]:
        how, tally = self.how, self.how.tally(nbytes)
        found = Differences(
            self.disk,
            old,
            nbytes=nbytes,
            granularity=min(how.granularity, MAX_BLOCK_NBYTES),
            threads=how.threads,
            report=lambda done: tally.count(done, data=0, read=0, written=0),
        )
        areas = joined(found.areas())
        if how.granularity > MAX_BLOCK_NBYTES:
            areas = rounded(areas, how.granularity, nbytes)
        return areas

    def marked(self, name: str) -> Iterator[Area]:
        """Yield what a bitmap of the image marks."""
        reader, path = self.disk.layers[0], self.disk.files[0].path
        if not isinstance(reader, HasBitmaps):
            raise OptionError(
                f"no bitmap {name!r}: {reader.format_name} images have none", path=path
            )
        areas = (Area(*area, is_zero=False) for area in reader.bitmap_areas(name))
        return self._with_zeros(areas)

    def listed(self, areas: AreaList) -> Iterator[Area]:
        """Yield what a file or a caller lists."""
        listed = read_areas(areas, self.disk.virtual_size)
        # Whether they are zeros now, the image tells.
        return self._with_zeros(area._replace(is_zero=False) for area in listed)

    def _with_zeros(self, areas: Iterator[Area]) -> Iterator[Area]:
        granularity, size = self.how.granularity, self.disk.virtual_size
        blocks = rounded(joined(areas), granularity, size)
        return rounded(joined(with_zeros(self.disk, blocks)), granularity, size)

    def since_tree(self, path: str) -> Iterator[Area]:
        """Yield the blocks whose checksums differ from those of a tree."""
        how, disk = self.how, DigestedDisk.of_state(self.disk)
        tally = how.tally(disk.nbytes)
        with TreeFile.open(path) as tree:
            areas = disk.changed_since(
                tree,
                threads=how.threads,
                report=lambda done, _: tally.count(done, data=0, read=0, written=0),
            )
            yield from rounded(areas, how.granularity, self.disk.virtual_size)


Finder: TypeAlias = "Callable[[_Search], Iterator[Area]]"


def _require_one(**states: object) -> None:
    """Raise OptionError unless exactly one argument is given."""
    n_given = sum(state is not None for state in states.values())
    if n_given != 1:
        names = ", ".join(states)
        raise OptionError(f"{n_given} of {names} are given: exactly one states what changed")


def _granularity(value: SupportsIndex | str) -> int:
    nbytes = parse_size(value) if isinstance(value, str) else byte_count(value, "granularity")
    check_granularity(nbytes)
    return nbytes


def _opened(source: str | int, options: OpenOptions, find: Finder, how: _How) -> Iterator[Area]:
    with open_image(source, options) as image:
        yield from _changed(image, find, how)


def _changed(image: Image, find: Finder, how: _How) -> Iterator[Area]:
    """Yield the areas of an image, of which only each step keeps it open."""
    with image.kept_open() as disk:
        areas = find(_Search(disk, how))
    while True:
        with image.kept_open():
            area = next(areas, None)
            if area is None:
                for file in disk.every_file():
                    file.check_unchanged()
        if area is None:
            break
        yield area
    how.tally(disk.virtual_size).finish()
