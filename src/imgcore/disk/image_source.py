"""The source for images with their chains."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from imgcore.disk.describe import describe_layer
from imgcore.errors import UnsupportedFeatureError
from imgcore.limits import CHUNK_NBYTES, SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from typing import Any

    from imgcore.disk.image import Image
    from imgcore.engine.batches import Supply
    from imgcore.engine.extents import Extents
    from imgcore.engine.geometry import Geometry


class ImageSource:
    """Reads an open image, which the caller closes; a `Source`."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.path = image.path
        self.format = image.format
        self.virtual_size = image.virtual_size
        self.logical_sector_nbytes = image.logical_sector_nbytes
        self.files = image.every_file()

    def describe(self) -> list[dict[str, Any]]:
        """Describe the image, then its parent, and so on."""
        return [describe_layer(layer) for layer in self._image.chain]

    def refuse_conversion(self, *, with_base: bool) -> None:
        """Raise UnsupportedFeatureError if the disk ends inside a sector."""
        if self.virtual_size % SECTOR_NBYTES:
            raise UnsupportedFeatureError(
                f"its disk has {self.virtual_size} bytes, not a multiple of {SECTOR_NBYTES}: "
                "no other format can represent that (qemu-img resize changes the size)",
                path=self.path,
            )

    def data_extents(self) -> Iterator[Extents]:
        """Yield the extents of the disk, with long holes of host files as ZERO."""
        return self._image.data_extents()

    def chunks(self, start: int, length: int) -> Iterator[memoryview]:
        """Yield the bytes of a range in order."""
        buffer = memoryview(bytearray(min(CHUNK_NBYTES, length)))
        end = start + length
        for offset in range(start, end, CHUNK_NBYTES):
            piece = buffer[: min(len(buffer), end - offset)]
            self._image.readinto(offset, piece)
            yield piece

    def supply(self, geometry: Geometry, base: Image | None) -> AbstractContextManager[Supply]:
        """Return the files of image and base, and batches that refer to them."""
        from imgcore.disk.image_batches import image_batches
        from imgcore.disk.salvage import Salvage
        from imgcore.engine.batches import Supply
        from imgcore.engine.source_file import native_sources

        sources = [*self._image.sources, *(base.sources if base is not None else ())]
        chain, salvage = self._image.chain, None
        if chain[0].salvages:
            salvage = Salvage(chain, self._image.first_files)
        return nullcontext(
            Supply(
                paths=[source.file.path for source in sources],
                native_sources=native_sources(sources),
                batches=image_batches(self._image, base, geometry, salvage),
                lost=[] if salvage is None else salvage.ranges,
            )
        )
