"""The source for images that come in order from a pipe or another stream."""

from __future__ import annotations

from contextlib import closing, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final

from imgcore.disk.ordered_source import OrderedSource
from imgcore.disk.overlay import resized
from imgcore.disk.streamed_window import BUFFER_NBYTES, StreamedWindow, TooFarAheadError
from imgcore.engine.batches import cut_batches
from imgcore.engine.extents import Kind
from imgcore.engine.geometry import ZeroPolicy
from imgcore.errors import OptionError, UnsupportedFeatureError
from imgcore.files.reference_gate import ReferenceGate
from imgcore.formats.api import ComesLate, EndsItself, LeavesOut, SectorSized
from imgcore.formats.registry import get_driver
from imgcore.formats.shared.stream_end import goes_on
from imgcore.limits import (
    CHUNK_NBYTES,
    GIB,
    MAX_STREAM_UNIT_NBYTES,
    MIB,
    MIN_STREAM_SEGMENTS,
    STREAM_SEGMENT_NBYTES,
)
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    from imgcore.disk.image import Image
    from imgcore.disk.late_batches import LateBatch
    from imgcore.disk.layer import Layer
    from imgcore.disk.open_options import OpenOptions
    from imgcore.engine.extents import Extents
    from imgcore.engine.geometry import Geometry
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.engine.source_file import SourceFile
    from imgcore.engine.supply import Batch, Supply
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.stream_input import StreamInput
    from imgcore.formats.api import Reader

# Guest bytes of a batch, if the target's blocks allow it.
_BATCH_NBYTES: Final = 32 * MIB
# The first one has fewer, so that the engine starts early.
_FIRST_NBYTES: Final = 4 * MIB
# Guest bytes whose tables are read at once; more where nothing is stored.
_STEP_NBYTES: Final = 4 * MIB
_MAX_STEP_NBYTES: Final = 64 * GIB


@contextmanager
def open_streamed_image(
    stream: StreamInput, name: str, options: OpenOptions
) -> Iterator[StreamedSource]:
    """Open an image of which no byte was taken yet; the caller closes the stream.

    Raises
    ------
    UnsupportedFeatureError
        It has a parent, or its tables come after its data.
    ImgcoreError, OSError
        As `imgcore.open`.
    """
    if options.stream_nbytes is not None:
        raise OptionError(f"a {name} image states its size: --size is not for it", path=stream.path)
    driver = get_driver(name)
    record = None
    if options.read_options:
        if driver.read_options is None:
            raise OptionError(f"{name} has no options for reading", path=stream.path)
        from imgcore.formats.option_texts import parse_record

        record = parse_record(name, driver.read_options, options.read_options)
    window = StreamedWindow(stream, driver.tail_copy_nbytes)
    try:
        reader = driver.open_streamed(window, ReferenceGate(None), record)
        with closing(reader):
            _refuse_other_files(window, reader)
            yield StreamedSource(window, reader)
    finally:
        window.release()


def _refuse_other_files(window: StreamedWindow, reader: Reader) -> None:
    if reader.backing is not None:
        raise UnsupportedFeatureError(
            "it has a parent, which a stream cannot name: save it to a file first",
            path=window.path,
        )
    if any(source.file is not window for source in reader.sources):
        raise UnsupportedFeatureError(
            "some of its data is in another file or in a log: save it to a file first",
            path=window.path,
        )


class StreamedSource(OrderedSource):
    """Reads an image that comes in order, once; a `Source`.

    Parameters
    ----------
    window : StreamedWindow
        The image's bytes.
    reader : Reader
        An image of one file, without a parent.
    """

    size_is_known: bool = True

    def __init__(self, window: StreamedWindow, reader: Reader) -> None:
        self._window = window
        self._reader = reader
        self.path: str = window.path
        self.format: str = reader.format_name
        self.virtual_size: int = reader.virtual_size
        self.exact_nbytes: int = reader.virtual_size
        self.logical_sector_nbytes: int | None = (
            reader.logical_sector_nbytes if isinstance(reader, SectorSized) else None
        )
        self.files: Sequence[ByteSource] = (window,)
        self.layers: Sequence[Layer] = ()
        self.sources: Sequence[SourceFile] = ()

    def describe(self) -> list[dict[str, Any]]:
        """Describe the image by its headers."""
        return [
            {
                "filename": self.path,
                "format": self.format,
                "virtual-size": self.virtual_size,
                "dirty-flag": False,
            }
        ]

    def refuse_conversion(self, *, with_base: bool) -> None:
        """Raise for options that need random access; warn about what is left out."""
        if with_base:
            raise UnsupportedFeatureError(
                "a stream cannot be compared with a parent (-B): save it to a file first",
                path=self.path,
            )
        for text in self._reader.left_out() if isinstance(self._reader, LeavesOut) else ():
            log.warning("%s: %s", self.path, text)

    def chunks(
        self, start: int, length: int, piece_nbytes: int = CHUNK_NBYTES
    ) -> Iterator[memoryview]:
        """Yield the bytes of the whole disk in order."""
        from imgcore.disk.streamed_chunks import decoded, plain_geometry

        assert start == 0, "a stream is read whole"
        geometry = plain_geometry(length)
        with self.supply(geometry, None) as supply:
            yield from decoded(supply, geometry, piece_nbytes)

    def supply(
        self, geometry: Geometry, base: Image | None, rule: ReflinkRule | None = None
    ) -> AbstractContextManager[Supply]:
        """Return the segments of the stream, and batches that refer to them.

        Raises
        ------
        OptionError
            The target's blocks are too large.
        """
        from imgcore.engine.supply import Supply

        assert base is None, "see refuse_conversion"
        unit = geometry.unit_nbytes
        if unit > MAX_STREAM_UNIT_NBYTES:
            raise OptionError(
                f"a stream is read in pieces of at most {MAX_STREAM_UNIT_NBYTES} bytes, but the "
                f"target needs {unit}: choose smaller blocks",
                path=self.path,
            )
        self._window.enlarge(MIN_STREAM_SEGMENTS // 2 + -(-3 * unit // STREAM_SEGMENT_NBYTES))
        sources = [
            (file, BUFFER_NBYTES, source.guest_base, source.block_nbytes)
            for file in self._window.files
            for source in self._reader.sources
        ]
        return nullcontext(
            Supply(
                paths=[self.path] * len(sources),
                native_sources=sources,
                batches=self._batches(geometry),
                meanwhile=self._window.read_ahead if self._window.can_read_ahead else None,
            )
        )

    def _batches(self, geometry: Geometry) -> Iterator[Batch]:
        unit, end = geometry.unit_nbytes, geometry.guest_nbytes
        batches = cut_batches(
            resized(self._extents(), self.virtual_size, end),
            unit=unit,
            max_nbytes=min(geometry.max_batch_nbytes, max(unit, _BATCH_NBYTES // unit * unit)),
            disk_end=end,
            skip_empty=geometry.zero_policy is ZeroPolicy.SKIP,
            gap_nbytes=_BATCH_NBYTES,
            first_nbytes=-(-_FIRST_NBYTES // unit) * unit,
        )
        n_sources = len(self._reader.sources)
        for batch in batches:
            yield batch._replace(rows=self._window.place(batch.rows, n_sources))
        if not self.has_late:
            self._verify_end()

    # -- blocks that come late ---------------------------------------------------------

    def take_late(self) -> None:
        """Let blocks come late; see `MayBeLate`."""
        if isinstance(self._reader, ComesLate):
            self._reader.take_late()

    @property
    def has_late(self) -> bool:
        """Whether blocks are left after the last batch."""
        return isinstance(self._reader, ComesLate) and self._reader.has_late

    def late_batches(self) -> Iterator[LateBatch]:
        """Yield the blocks that are left, up to the end of the stream."""
        from imgcore.disk.late_batches import LateBatch

        assert isinstance(self._reader, ComesLate), "see has_late"
        sources = self._reader.sources
        for found in self._reader.late_extents():
            rows = self._window.place(found, len(sources))
            numbers = rows["file"] % len(sources)
            rows["file"] //= len(sources)
            for number in sorted(set(numbers.tolist())):
                nbytes = sources[number].block_nbytes
                files = [(file, BUFFER_NBYTES, 0, nbytes) for file in self._window.files]
                yield LateBatch(rows[numbers == number], nbytes, files)
        self._verify_end()

    def _extents(self) -> Iterator[Extents]:
        """Yield the disk's extents; tables are read when their data comes next."""
        at, step, end = 0, _STEP_NBYTES, self.virtual_size
        while at < end:
            is_empty = True
            try:
                for rows in self._reader.extents(at, min(step, end - at)):
                    yield rows
                    is_empty = is_empty and not (rows["kind"] >= Kind.DATA).any()
                    at = int(rows["guest_offset"][-1]) + int(rows["length"][-1])
            except TooFarAheadError:
                if step == _STEP_NBYTES:
                    raise
                is_empty = False
            step = min(2 * step, _MAX_STEP_NBYTES) if is_empty else _STEP_NBYTES

    def _verify_end(self) -> None:
        """Read the rest of the stream, and raise unless it is the image's."""
        if isinstance(self._reader, EndsItself):
            self._reader.verify_end(self._window.drain)
            return
        end, _ = self._window.drain()
        if end:
            raise goes_on(self.path, end)
