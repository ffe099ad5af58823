"""Sources that a disk is read from: an image, or a compressed raw stream."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from imgcore.disk.image import open_image
from imgcore.disk.image_source import ImageSource
from imgcore.disk.stream_source import StreamSource, is_stream
from imgcore.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from typing import Any

    from imgcore.disk.image import Image
    from imgcore.disk.open_options import OpenOptions
    from imgcore.engine.batches import Supply
    from imgcore.engine.extents import Extents
    from imgcore.engine.geometry import Geometry
    from imgcore.files.byte_source import ByteSource


class Source(Protocol):
    """A disk that is open for reading."""

    @property
    def path(self) -> str:
        """The file that was opened."""
        ...

    @property
    def format(self) -> str:
        """The format's name."""
        ...

    @property
    def virtual_size(self) -> int:
        """Bytes of the disk."""
        ...

    @property
    def logical_sector_nbytes(self) -> int | None:
        """Bytes of a logical sector, or None if the format does not state it."""
        ...

    @property
    def files(self) -> Sequence[ByteSource]:
        """Every file that is read, each once."""
        ...

    def describe(self) -> list[dict[str, Any]]:
        """Return the description of each image of the chain, as ``info`` does."""
        ...

    def refuse_conversion(self, *, with_base: bool) -> None:
        """Raise if the disk cannot be converted, or not in this way.

        Parameters
        ----------
        with_base : bool
            The disk will be compared with the target's parent.
        """
        ...

    def data_extents(self) -> Iterator[Extents]:
        """Yield ascending extents; the disk is zeros outside of stored ones."""
        ...

    def chunks(self, start: int, length: int) -> Iterator[memoryview]:
        """Yield the bytes of a range in order; each piece is valid until the next.

        The range is the whole disk, or part of a data extent of `data_extents`.  A
        stream can only be read as a whole, and so is one extent.
        """
        ...

    def supply(self, geometry: Geometry, base: Image | None) -> AbstractContextManager[Supply]:
        """Return the files that the engine reads, and batches that suit a target.

        Parameters
        ----------
        geometry : Geometry
            The target's.  Its disk may be larger and then ends in zeros.
        base : Image, optional
            The target's parent, which each batch is compared with.
        """
        ...


@contextmanager
def open_source(
    path: str | os.PathLike[str], options: OpenOptions, *, parents: bool = True
) -> Iterator[Source]:
    """Open an image or, depending on name and stated format, a compressed raw disk.

    Parameters
    ----------
    path : str or os.PathLike
    options : OpenOptions
    parents : bool
        If False, the parents of an image stay closed, and only `Source.describe` works.

    Raises
    ------
    OptionError
        ``options`` do not apply: read options or a parent for a stream, or a parent
        although ``parents`` is False.
    ImgcoreError, OSError
        As `imgcore.open`.
    """
    if is_stream(path, options):
        with StreamSource.open(path, options) as stream:
            yield stream
        return
    if options.parent is not None and not parents:
        raise OptionError("a parent is given, but only the image itself is described")
    with open_image(path, options, parents=parents) as image:
        yield ImageSource(image)
