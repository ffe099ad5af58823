"""Sources that a disk is read from: images, compressed raw disks, and streams."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Protocol

from imgcore.disk.image import open_image
from imgcore.disk.image_names import local_image
from imgcore.disk.image_source import ImageSource
from imgcore.disk.stream_source import StreamSource, is_stream
from imgcore.disk.streamed import is_streamed, open_streamed, refuse_size, seekable
from imgcore.errors import OptionError
from imgcore.limits import CHUNK_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from typing import Any

    from imgcore.disk.image import Image
    from imgcore.disk.layer import Layer
    from imgcore.disk.open_options import OpenOptions
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.extents import Extents
    from imgcore.engine.geometry import Geometry
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.engine.source_file import SourceFile
    from imgcore.engine.supply import Supply
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
        """Bytes of the disk, in whole sectors."""
        ...

    @property
    def exact_nbytes(self) -> int:
        """Bytes of the disk without the zeros that fill up its last sector.

        It differs from ``virtual_size`` for raw disks only.
        """
        ...

    @property
    def logical_sector_nbytes(self) -> int | None:
        """Bytes of a logical sector, or None if the format does not state it."""
        ...

    @property
    def size_is_known(self) -> bool:
        """Whether the sizes are known before all of the disk was read.

        If not, they are 0 until then.
        """
        ...

    @property
    def files(self) -> Sequence[ByteSource]:
        """Every file that is read, each once."""
        ...

    @property
    def layers(self) -> Sequence[Layer]:
        """Every open image, parents included; none of a stream."""
        ...

    @property
    def sources(self) -> Sequence[SourceFile]:
        """The files that extents refer to by index; none of a stream."""
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

    def data_extents(self, rule: ReflinkRule | None = None) -> Iterator[Extents]:
        """Yield ascending extents; the disk is zeros outside of stored ones.

        With ``rule``, what is reflinked without being read is marked.
        """
        ...

    def lost(self) -> Sequence[BadRange]:
        """Return what was lost in the last pass over the extents, when salvaging."""
        ...

    def chunks(
        self, start: int, length: int, piece_nbytes: int = CHUNK_NBYTES
    ) -> Iterator[memoryview]:
        """Yield the bytes of a range in order; each piece is valid until the next.

        A piece has at most ``piece_nbytes``.
        The range is the whole disk, or part of a data extent of `data_extents`.  A
        stream can only be read as a whole, and so is one extent.
        """
        ...

    def supply(
        self, geometry: Geometry, base: Image | None, rule: ReflinkRule | None = None
    ) -> AbstractContextManager[Supply]:
        """Return the files that the engine reads, and batches that suit a target.

        Parameters
        ----------
        geometry : Geometry
            The target's.  Its disk may be larger and then ends in zeros.
        base : Image, optional
            The target's parent, which each batch is compared with.
        rule : ReflinkRule, optional
            As for `data_extents`.
        """
        ...


@contextmanager
def open_source(
    source: str | os.PathLike[str] | int, options: OpenOptions, *, parents: bool = True
) -> Iterator[Source]:
    """Open an image or, depending on name and stated format, a compressed raw disk.

    Parameters
    ----------
    source : str, os.PathLike or int
        Its path, or a descriptor, which has no name.
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
    refuse_size(options, source)
    source, options = local_image(source, options)
    if isinstance(source, str) and is_stream(source, options):
        with StreamSource.open(source, options) as stream:
            yield stream
        return
    if options.parents and not parents:
        raise OptionError("a parent is given, but only the image itself is described")
    with open_image(source, options, parents=parents) as image:
        yield ImageSource(image)


@contextmanager
def open_disk(source: Any, options: OpenOptions) -> Iterator[Source]:
    """Open a disk that is read once: what `open_source` opens, or what `is_streamed`.

    Raises
    ------
    ImgcoreError, OSError
        As `open_source` and `open_streamed`.
    """
    if is_streamed(source):
        number = seekable(source, options)
        if number is None:
            with open_streamed(source, options) as streamed:
                yield streamed
            return
        source = number
    with open_source(source, options) as found:
        yield found


@contextmanager
def open_sources(paths: Sequence[Any], options: OpenOptions) -> Iterator[Source]:
    """Open one source, or several images whose disks follow each other.

    Raises
    ------
    OptionError
        There is none.  Or there are several, and one is a stream or a parent is given.
    ImgcoreError, OSError
        As `open_disk`.
    """
    if not paths:
        raise OptionError("a conversion needs a source")
    with ExitStack() as stack:
        if len(paths) == 1:
            yield stack.enter_context(open_disk(paths[0], options))
            return
        from imgcore.disk.concatenated_source import ConcatenatedSource

        if options.parents:
            raise OptionError("a parent is given, but there are several sources")
        for path in paths:
            if is_streamed(path):
                raise OptionError("a stream cannot be one of several sources", path=str(path))
            refuse_size(options, path)
            if is_stream(path, options):
                name = os.fspath(path)
                raise OptionError(
                    "a compressed raw disk cannot be one of several sources: decompress it first "
                    f"(imgcore convert {name} {os.path.splitext(name)[0]})",
                    path=name,
                )
        named = [local_image(path, options) for path in paths]
        parts = [stack.enter_context(open_image(*each)) for each in named]
        yield ConcatenatedSource([ImageSource(image) for image in parts])
