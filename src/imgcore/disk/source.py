"""Sources, from which a disk is read: an image with its chain, a compressed raw stream."""

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
    from imgcore.disk.options import OpenOptions
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
        """Bytes of a logical sector, None if the format does not state it."""
        ...

    @property
    def files(self) -> Sequence[ByteSource]:
        """Every file that is read, each once."""
        ...

    def describe(self) -> list[dict[str, Any]]:
        """Return for each image of the chain what ``info`` says about it."""
        ...

    def refuse_conversion(self, *, salvage: bool, with_base: bool) -> None:
        """Raise if the disk cannot be converted, or not in this way.

        Parameters
        ----------
        salvage : bool
            What cannot be read is to become zeros.
        with_base : bool
            The disk is to be compared with the target's parent.
        """
        ...

    def data_extents(self) -> Iterator[Extents]:
        """Yield ascending extents of the disk; outside of DATA and compressed ones it is zeros."""
        ...

    def chunks(self, start: int, length: int) -> Iterator[memoryview]:
        """Yield the bytes of a range in order, each piece valid until the next is asked for.

        The range is the whole disk, or lies in what `data_extents` says is data.  Streams can
        be read as a whole only, so all of a stream is one extent.
        """
        ...

    def supply(self, geometry: Geometry, base: Image | None) -> AbstractContextManager[Supply]:
        """Return what the engine reads, in batches that suit a target.

        Parameters
        ----------
        geometry : Geometry
            The target's.  Its disk may be larger; the rest reads as zeros.
        base : Image, optional
            The target's parent, which each batch is compared with.
        """
        ...


@contextmanager
def open_source(
    path: str | os.PathLike[str], options: OpenOptions, *, parents: bool = True
) -> Iterator[Source]:
    """Open an image, or a compressed raw disk if the name and the stated format say so.

    Parameters
    ----------
    path : path-like
    options : OpenOptions
    parents : bool
        If False, the parents of an image stay closed, and only `Source.describe` is of use.

    Raises
    ------
    OptionError
        ``options`` has what does not apply: read options or a parent for a stream, or a parent
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
