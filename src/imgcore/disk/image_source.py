"""The source for images with their chains."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from imgcore.disk.describe import describe_layer
from imgcore.engine.geometry import Placing
from imgcore.formats.api import LeavesOut
from imgcore.limits import CHUNK_NBYTES
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    from imgcore.disk.image import Image
    from imgcore.disk.layer import Layer
    from imgcore.disk.salvage import Salvage
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.extents import Extents
    from imgcore.engine.geometry import Geometry
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.engine.source_file import SourceFile
    from imgcore.engine.supply import Batch, Supply
    from imgcore.files.byte_source import ByteSource


class ImageSource:
    """Reads an open image, which the caller closes; a `Source`."""

    size_is_known: bool = True

    def __init__(self, image: Image) -> None:
        self.image: Image = image
        self._salvage: Salvage | None = None
        self.path: str = image.path
        self.format: str = image.format
        self.virtual_size: int = image.virtual_size
        is_flat = image.reader.is_flat
        self.exact_nbytes: int = image.files[0].nbytes if is_flat else image.virtual_size
        self.logical_sector_nbytes: int | None = image.logical_sector_nbytes
        self.files: list[ByteSource] = image.every_file()
        self.layers: list[Layer] = image.chain
        self.sources: Sequence[SourceFile] = image.sources

    def describe(self) -> list[dict[str, Any]]:
        """Describe the image, then its parent, and so on."""
        return [describe_layer(layer) for layer in self.image.chain]

    def refuse_conversion(self, *, with_base: bool) -> None:
        """Warn about what of the image the target will not have."""
        reader = self.image.reader
        for text in reader.left_out() if isinstance(reader, LeavesOut) else ():
            log.warning("%s: %s", self.path, text)

    def data_extents(self, rule: ReflinkRule | None = None) -> Iterator[Extents]:
        """Yield the extents of the disk, with long holes of host files as ZERO."""
        salvage = self._new_salvage()
        image = self.image
        if salvage is not None:
            return image.salvaged_extents(salvage)
        return image.data_extents(rule=rule)

    def lost(self) -> Sequence[BadRange]:
        """Return what was lost in the last pass over the extents."""
        return () if self._salvage is None else self._salvage.ranges

    def _new_salvage(self) -> Salvage | None:
        """Return what takes LOST extents in a new pass; None if nothing is salvaged."""
        chain = self.image.chain
        if not chain[0].salvages:
            return None
        if self._salvage is None:
            from imgcore.disk import salvage

            self._salvage = salvage.Salvage(chain, self.image.first_files)
        self._salvage.restart()
        return self._salvage

    def chunks(
        self, start: int, length: int, piece_nbytes: int = CHUNK_NBYTES
    ) -> Iterator[memoryview]:
        """Yield the bytes of a range in order."""
        buffer = memoryview(bytearray(min(piece_nbytes, length)))
        end = start + length
        for offset in range(start, end, piece_nbytes):
            piece = buffer[: min(len(buffer), end - offset)]
            self.image.readinto(offset, piece)
            yield piece

    def supply(
        self, geometry: Geometry, base: Image | None, rule: ReflinkRule | None = None
    ) -> AbstractContextManager[Supply]:
        """Return the files of image and base, and batches that refer to them."""
        from imgcore.engine.source_file import native_sources
        from imgcore.engine.supply import Supply

        sources = [*self.image.sources, *(base.sources if base is not None else ())]
        return nullcontext(
            Supply(
                paths=[source.file.path for source in sources],
                native_sources=native_sources(sources),
                batches=self._batches(geometry, base, rule),
            )
        )

    def _batches(
        self, geometry: Geometry, base: Image | None, rule: ReflinkRule | None
    ) -> Iterator[Batch]:
        image = self.image
        is_flat = image.reader.is_flat and not image.chain[0].salvages
        is_all_read = base is None and rule is None
        if is_flat and is_all_read and geometry.placing is Placing.IDENTITY:
            from imgcore.disk.flat_batches import flat_batches

            return flat_batches(image.sources[0].file, image.virtual_size, geometry)
        from imgcore.disk.image_batches import image_batches, moved

        batches = image_batches(image, self.data_extents(rule), base, geometry)
        if geometry.moved_end and is_all_read:
            batches = moved(batches, image.sources, geometry.moved_end)
        return batches
