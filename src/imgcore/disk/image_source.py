"""The source for images with their chains."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from imgcore.disk.describe import describe_layer
from imgcore.formats.api import LeavesOut
from imgcore.limits import CHUNK_NBYTES
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    from imgcore.disk.image import Image
    from imgcore.engine.batches import Supply
    from imgcore.engine.extents import Extents
    from imgcore.engine.geometry import Geometry
    from imgcore.engine.source_file import SourceFile
    from imgcore.files.byte_source import ByteSource


class ImageSource:
    """Reads an open image, which the caller closes; a `Source`."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self.path: str = image.path
        self.format: str = image.format
        self.virtual_size: int = image.virtual_size
        is_flat = image.reader.is_flat
        self.exact_nbytes: int = image.files[0].nbytes if is_flat else image.virtual_size
        self.logical_sector_nbytes: int | None = image.logical_sector_nbytes
        self.files: list[ByteSource] = image.every_file()
        self.sources: Sequence[SourceFile] = image.sources

    def describe(self) -> list[dict[str, Any]]:
        """Describe the image, then its parent, and so on."""
        return [describe_layer(layer) for layer in self._image.chain]

    def refuse_conversion(self, *, salvage: bool, with_base: bool) -> None:
        """Warn about what of the image the target will not have."""
        reader = self._image.reader
        for text in reader.left_out() if isinstance(reader, LeavesOut) else ():
            log.warning("%s: %s", self.path, text)

    def data_extents(self) -> Iterator[Extents]:
        """Yield the extents of the disk, with long holes of host files as ZERO."""
        return self._image.data_extents()

    def chunks(
        self, start: int, length: int, piece_nbytes: int = CHUNK_NBYTES
    ) -> Iterator[memoryview]:
        """Yield the bytes of a range in order."""
        buffer = memoryview(bytearray(min(piece_nbytes, length)))
        end = start + length
        for offset in range(start, end, piece_nbytes):
            piece = buffer[: min(len(buffer), end - offset)]
            self._image.readinto(offset, piece)
            yield piece

    def supply(self, geometry: Geometry, base: Image | None) -> AbstractContextManager[Supply]:
        """Return the files of image and base, and batches that refer to them."""
        from imgcore.disk.image_batches import image_batches
        from imgcore.engine.batches import Supply
        from imgcore.engine.source_file import native_sources

        sources = [*self._image.sources, *(base.sources if base is not None else ())]
        return nullcontext(
            Supply(
                paths=[source.file.path for source in sources],
                native_sources=native_sources(sources),
                batches=image_batches(self._image, base, geometry),
            )
        )
