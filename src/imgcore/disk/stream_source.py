"""The source for compressed raw disks, which are read once, in order."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from imgcore.disk.describe import allocated_nbytes
from imgcore.disk.ordered_source import OrderedSource
from imgcore.errors import OptionError, UnsupportedFeatureError, WrongFormatError
from imgcore.files.host_file import use_page_cache
from imgcore.formats.magic import HEAD_NBYTES, matching_formats
from imgcore.formats.registry import PLAIN_FORMAT, is_named_stream
from imgcore.formats.shared.last_sector import whole_sectors
from imgcore.limits import CHUNK_NBYTES
from imgcore.streams.names import CODEC_OF_SUFFIX, stream_suffix

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Any, Self

    from imgcore.disk.image import Image
    from imgcore.disk.layer import Layer
    from imgcore.disk.open_options import OpenOptions
    from imgcore.engine.geometry import Geometry
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.engine.source_file import SourceFile
    from imgcore.engine.supply import Supply
    from imgcore.files.byte_source import ByteSource
    from imgcore.streams.reader import StreamReader


def is_stream(path: str | os.PathLike[str], options: OpenOptions) -> bool:
    """Tell whether name and stated format are those of a compressed raw disk."""
    return is_named_stream(os.fspath(path), options.format)


class StreamSource(OrderedSource):
    """Reads an open stream; a `Source` and a context manager, which closes it."""

    size_is_known: bool = True

    format = PLAIN_FORMAT
    logical_sector_nbytes = None

    def __init__(self, reader: StreamReader, *, is_stated: bool) -> None:
        self._reader = reader
        # Whether the caller has stated that the content is raw.
        self._is_stated = is_stated
        self.path: str = reader.path
        self.exact_nbytes: int = reader.virtual_size
        self.virtual_size: int = whole_sectors(reader.virtual_size, reader.path)
        self.files: Sequence[ByteSource] = (reader.file,)
        self.layers: Sequence[Layer] = ()
        self.sources: Sequence[SourceFile] = ()

    @classmethod
    def open(cls, path: str | os.PathLike[str], options: OpenOptions) -> Self:
        """Open a stream; decompress all of it if it does not state its size."""
        from imgcore.streams.reader import StreamReader

        if options.salvage:
            suffix = stream_suffix(os.fspath(path))
            assert suffix is not None, "see is_stream"
            codec = CODEC_OF_SUFFIX[suffix]
            raise OptionError(
                "data of a compressed stream cannot be salvaged "
                f"({codec} -dc FILE > disk.raw writes what comes before the damage)",
                path=os.fspath(path),
            )
        if options.read_options:
            raise OptionError(f"{cls.format} has no options for reading", path=os.fspath(path))
        if options.parents:
            raise OptionError(
                f"a parent is given, but {cls.format} disks have none", path=os.fspath(path)
            )
        file = options.files.open(os.fspath(path), share=options.share)
        try:
            # Before the size is searched for, which may read all of it.
            use_page_cache((file,), options.page_cache)
        except BaseException:
            file.close()
            raise
        reader = StreamReader(file)
        return cls(reader, is_stated=options.format is not None)

    def describe(self) -> list[dict[str, Any]]:
        """Describe the disk and its compression."""
        return [
            {
                "filename": self.path,
                "format": self.format,
                "virtual-size": self.virtual_size,
                "actual-size": allocated_nbytes(self.files),
                "dirty-flag": False,
                "format-specific": {
                    "type": self.format,
                    "data": {"compression": self._reader.codec},
                },
            }
        ]

    def refuse_conversion(self, *, with_base: bool) -> None:
        """Raise for options that need random access, or if the stream holds an image.

        Only the first bytes of the disk are read.
        """
        found = [] if self._is_stated else matching_formats(self._reader.head(HEAD_NBYTES), b"")
        if found:
            raise WrongFormatError(
                f"its content carries the magic of {' and '.join(found)}: decompress it first, "
                f"or use -f {self.format}",
                path=self.path,
            )
        if with_base:
            raise UnsupportedFeatureError(
                "a compressed raw source cannot be combined with -B", path=self.path
            )

    def chunks(
        self, start: int, length: int, piece_nbytes: int = CHUNK_NBYTES
    ) -> Iterator[memoryview]:
        """Yield the bytes of the whole disk in order."""
        assert start == 0, "a stream is read whole"
        assert length in (self.virtual_size, self.exact_nbytes), "a stream is read whole"
        yield from self._reader.read_chunks(piece_nbytes)
        if length > self.exact_nbytes:
            yield memoryview(bytes(length - self.exact_nbytes))

    def supply(
        self, geometry: Geometry, base: Image | None, rule: ReflinkRule | None = None
    ) -> AbstractContextManager[Supply]:
        """Return two buffers, which the stream fills in turn, and batches in them."""
        from imgcore.disk.stream_batches import stream_supply

        assert base is None, "see refuse_conversion"
        return stream_supply(self._reader, geometry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
