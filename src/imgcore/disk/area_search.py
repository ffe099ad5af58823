"""Finds the areas of an open disk that have changed since an earlier state of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from imgcore.areas.area import Area
from imgcore.areas.normal import joined, rounded
from imgcore.areas.reading import AreaList, read_areas
from imgcore.checksums.tree import TreeFile
from imgcore.disk.changed_areas import areas_above, with_zeros
from imgcore.disk.differences import MAX_BLOCK_NBYTES, Differences
from imgcore.disk.digests import DigestedDisk
from imgcore.disk.image import open_image
from imgcore.disk.image_names import local_image
from imgcore.disk.open_options import OpenOptions
from imgcore.engine.progress import Progress, Tally
from imgcore.errors import OptionError
from imgcore.files.identity import named_identity
from imgcore.formats.api import HasBitmaps

if TYPE_CHECKING:
    from imgcore._core import RateLimit
    from imgcore.disk.disk_state import DiskState


class SearchSettings(NamedTuple):
    """How to read a disk, and the size of blocks.

    Attributes
    ----------
    granularity : int
        Areas consist of whole blocks of so many bytes, a power of two.
    threads : int
        Threads that read.
    report : callable
        Gets `Progress`, of which only `done` counts.
    limit : RateLimit, optional
        Limits the rate of reading.
    """

    granularity: int
    threads: int
    report: Callable[[Progress], None]
    limit: RateLimit | None

    def tally(self, total: int) -> Tally:
        """Return what reports the progress over a disk."""
        return Tally(total, self.report)


class AreaSearch(NamedTuple):
    """Finds the changed areas of an open disk: in order, joined, in whole blocks."""

    disk: DiskState
    how: SearchSettings

    def since(self, source: str | int, options: OpenOptions) -> Iterator[Area]:
        """Yield what has changed since an older image, which may be in the chain."""
        name, stated = local_image(source, options)
        depth = self.disk.depth_of(named_identity(name))
        if depth is not None and not stated.interprets:
            yield from self._above(depth)
            return
        with open_image(source, options) as image, image.kept_open() as old:
            # It may be read in another way than as a layer of the chain.
            if depth is not None and old.is_part_of(self.disk, depth):
                yield from self._above(depth)
            else:
                yield from self.compared(old, self.disk.virtual_size)
            image.check_unchanged()

    def _above(self, depth: int) -> Iterator[Area]:
        """Yield what the layers above one of the chain's layers state."""
        areas = joined(areas_above(self.disk, depth))
        return rounded(areas, self.how.granularity, self.disk.virtual_size)

    def in_all(self, source: str, options: OpenOptions) -> Iterator[Area]:
        """Yield where another image differs, up to the end of the larger one."""
        with open_image(source, options) as image, image.kept_open() as old:
            yield from self.compared(old, max(self.disk.virtual_size, old.virtual_size))
            image.check_unchanged()

    def compared(self, old: DiskState, nbytes: int) -> Iterator[Area]:
        """Yield where an open disk differs, up to a byte; both are read."""
        how, tally = self.how, self.how.tally(nbytes)
        found = Differences(
            self.disk,
            old,
            nbytes=nbytes,
            granularity=min(how.granularity, MAX_BLOCK_NBYTES),
            threads=how.threads,
            limit=how.limit,
            report=tally.position,
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
                limit=how.limit,
                report=lambda done, _: tally.position(done),
            )
            yield from rounded(areas, how.granularity, self.disk.virtual_size)
