"""The source for several images, whose disks follow each other."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from imgcore.errors import OptionError
from imgcore.limits import CHUNK_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    from imgcore.disk.image import Image
    from imgcore.disk.image_source import ImageSource
    from imgcore.disk.layer import Layer
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.extents import Extents
    from imgcore.engine.geometry import Geometry
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.engine.source_file import SourceFile
    from imgcore.engine.supply import Supply
    from imgcore.files.byte_source import ByteSource


class ConcatenatedSource:
    """Reads open images, which the caller closes, as one disk; a `Source`."""

    size_is_known: bool = True

    def __init__(self, parts: Sequence[ImageSource]) -> None:
        self._parts = parts
        # Where each part starts: its first byte of the disk, its first file.
        self._starts: list[int] = []
        self._first_files: list[int] = []
        self.virtual_size: int = 0
        n_files = 0
        for part in parts:
            self._starts.append(self.virtual_size)
            self._first_files.append(n_files)
            self.virtual_size += part.virtual_size
            n_files += len(part.sources)
        self.exact_nbytes: int = self._starts[-1] + parts[-1].exact_nbytes
        self.path: str = ", ".join(part.path for part in parts)
        self.format: str = ", ".join(dict.fromkeys(part.format for part in parts))
        stated = [part.logical_sector_nbytes for part in parts]
        self.logical_sector_nbytes: int | None = max(
            (n for n in stated if n is not None), default=None
        )
        self.sources: Sequence[SourceFile] = [
            source._replace(guest_base=source.guest_base + start)
            for part, start in zip(parts, self._starts, strict=True)
            for source in part.sources
        ]
        files = (file for part in parts for file in part.files)
        self.files: list[ByteSource] = list({file.identity: file for file in files}.values())
        self.layers: list[Layer] = [layer for part in parts for layer in part.layers]

    def describe(self) -> list[dict[str, Any]]:
        """Describe the images of all chains."""
        return [image for part in self._parts for image in part.describe()]

    def refuse_conversion(self, *, with_base: bool) -> None:
        """Raise OptionError for a comparison with a parent, as qemu-img does."""
        if with_base:
            raise OptionError("several sources cannot be combined with -B", path=self.path)

    def data_extents(self, rule: ReflinkRule | None = None) -> Iterator[Extents]:
        """Yield the extents of the disk; files are numbered over all parts."""
        import numpy as np

        from imgcore.engine.extents import Kind

        for part, start, first_file in zip(
            self._parts, self._starts, self._first_files, strict=True
        ):
            for batch in part.data_extents():
                rows = batch.copy()
                rows["guest_offset"] += np.uint64(start)
                rows["file"][rows["kind"] >= Kind.DATA] += np.uint32(first_file)
                yield rows if rule is None else rule.mark(rows)

    def lost(self) -> Sequence[BadRange]:
        """Return what all parts have lost."""
        return [
            row._replace(guest_offset=start + row.guest_offset)
            for part, start in zip(self._parts, self._starts, strict=True)
            for row in part.lost()
        ]

    def chunks(
        self, start: int, length: int, piece_nbytes: int = CHUNK_NBYTES
    ) -> Iterator[memoryview]:
        """Yield the bytes of a range in order."""
        end = start + length
        for part, part_start in zip(self._parts, self._starts, strict=True):
            low = max(start - part_start, 0)
            high = min(end - part_start, part.virtual_size)
            if low < high:
                yield from part.chunks(low, high - low, piece_nbytes)

    def supply(
        self, geometry: Geometry, base: Image | None, rule: ReflinkRule | None = None
    ) -> AbstractContextManager[Supply]:
        """Return the files of all images, and batches that refer to them."""
        from imgcore.disk.image_batches import disk_batches
        from imgcore.engine.source_file import native_sources
        from imgcore.engine.supply import Supply

        assert base is None, "see refuse_conversion"
        return nullcontext(
            Supply(
                paths=[source.file.path for source in self.sources],
                native_sources=native_sources(self.sources),
                batches=disk_batches(self.data_extents(rule), self.virtual_size, geometry),
            )
        )
