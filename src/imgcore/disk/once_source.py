"""The source for disks whose bytes come in order from a pipe or another stream."""

from __future__ import annotations

from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

from imgcore.disk.ordered_source import OrderedSource
from imgcore.errors import UnsupportedFeatureError
from imgcore.formats.shared.last_sector import whole_sectors
from imgcore.limits import CHUNK_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    from imgcore.disk.image import Image
    from imgcore.disk.layer import Layer
    from imgcore.engine.geometry import Geometry
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.engine.source_file import SourceFile
    from imgcore.engine.supply import Batch, Supply
    from imgcore.files.byte_source import ByteSource
    from imgcore.streams.once import OnceReader


class OnceSource(OrderedSource):
    """Reads an open stream, which the caller closes, once; a `Source`.

    Unless the size was stated, it is 0 until the last byte was read.

    Parameters
    ----------
    reader : OnceReader
    format : str
        The format's name.
    verify_end : callable, optional
        Called once the last byte was read; raises if what follows the disk is wrong.
    """

    logical_sector_nbytes = None

    def __init__(
        self, reader: OnceReader, format: str, verify_end: Callable[[], None] | None = None
    ) -> None:
        self._reader = reader
        self._verify_end = verify_end
        self._virtual_size: int | None = None
        self.format: str = format
        self.path: str = reader.path
        self.size_is_known: bool = reader.nbytes is not None
        self.files: Sequence[ByteSource] = (reader.file,)
        self.layers: Sequence[Layer] = ()
        self.sources: Sequence[SourceFile] = ()

    @property
    def exact_nbytes(self) -> int:
        """Bytes of the disk; see `Source`."""
        return self._reader.nbytes or 0

    @property
    def virtual_size(self) -> int:
        """Bytes of the disk in whole sectors."""
        nbytes = self._reader.nbytes
        if nbytes is None:
            return 0
        if self._virtual_size is None:
            self._virtual_size = whole_sectors(nbytes, self.path)
        return self._virtual_size

    def describe(self) -> list[dict[str, Any]]:
        """Describe the stream as far as it is known before its end."""
        data = {"compression": self._reader.codec} if self._reader.codec is not None else {}
        return [
            {
                "filename": self.path,
                "format": self.format,
                "virtual-size": self.virtual_size,
                "dirty-flag": False,
                "format-specific": {"type": self.format, "data": data},
            }
        ]

    def refuse_conversion(self, *, with_base: bool) -> None:
        """Raise for options that need random access."""
        if with_base:
            raise UnsupportedFeatureError(
                "a stream cannot be compared with a parent (-B): save it to a file first",
                path=self.path,
            )

    def chunks(
        self, start: int, length: int, piece_nbytes: int = CHUNK_NBYTES
    ) -> Iterator[memoryview]:
        """Yield the bytes of the whole disk in order."""
        assert start == 0, "a stream is read whole"
        with closing(self._reader.chunks(piece_nbytes)) as chunks:
            yield from chunks
        self._finish()
        if length > self.exact_nbytes and self.size_is_known:
            yield memoryview(bytes(length - self.exact_nbytes))

    def supply(
        self, geometry: Geometry, base: Image | None, rule: ReflinkRule | None = None
    ) -> AbstractContextManager[Supply]:
        """Return the stream, or buffers that it fills in turn, and batches in them."""
        assert base is None, "see refuse_conversion"
        return self._supply(geometry)

    @contextmanager
    def _supply(self, geometry: Geometry) -> Iterator[Supply]:
        core = self._reader.open_core()
        if core is not None:
            from imgcore.disk.direct_batches import direct_supply

            with direct_supply(self._reader, core, geometry) as supply:
                yield supply
            self._finish()
            return
        from imgcore.disk.stream_batches import stream_supply

        with stream_supply(self._reader, geometry) as supply:
            yield supply._replace(batches=self._verified(supply.batches))

    def _verified(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        yield from batches
        self._finish()

    def _finish(self) -> None:
        if self._verify_end is not None:
            self._verify_end()
