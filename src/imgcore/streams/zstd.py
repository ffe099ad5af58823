"""Reads and writes zstd streams."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any, Final, cast

from imgcore.errors import CorruptImageError, ImgcoreError, LimitExceededError
from imgcore.limits import KIB, MIB
from imgcore.log import log
from imgcore.streams.decoder import READ_NBYTES
from imgcore.streams.encoder import Boundary, OrderedOutput
from imgcore.streams.helpers import Helpers

if TYPE_CHECKING:
    from collections.abc import Generator
    from concurrent.futures import Future
    from typing import Self

    from imgcore.files.byte_source import ByteSource
    from imgcore.files.stream_input import StreamInput
    from imgcore.files.target_file import TargetFile
    from imgcore.streams.decoder import Input

# The window of `zstd --long` (windowLog 27); zstd decompresses it without an option.
MAX_WINDOW_NBYTES: Final = 128 * MIB

# RFC 8878: sections 3.1.1, 3.1.2 (its last four bits are free), 3.1.1.2.4, 3.1.1.2.2.
_FRAME_MAGIC: Final = 0xFD2FB528
_SKIPPABLE_MAGIC: Final = 0x184D2A50
_MAX_BLOCK_NBYTES: Final = 128 * 1024
_RAW_BLOCK, _RLE_BLOCK, _RESERVED_BLOCK = 0, 1, 3
_TOO_EARLY: Final = "the zstd stream ends too early"


def is_zstd(head: bytes) -> bool:
    """Tell whether a file with these first bytes is a zstd stream."""
    magic = int.from_bytes(head[:4], "little")
    return magic == _FRAME_MAGIC or _is_skippable(magic)


def _is_skippable(magic: int) -> bool:
    return magic & ~0xF == _SKIPPABLE_MAGIC


class ZstdDecoder:
    def __init__(self, source: Input) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._path = source.path
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_NBYTES)
        # The decompressor only calls read().
        self._reader = decompressor.stream_reader(
            cast("IO[bytes]", source), read_size=READ_NBYTES, read_across_frames=True
        )

    def fill(self, view: memoryview) -> int:
        done = 0
        while done < len(view):
            try:
                n = self._reader.readinto(view[done:])
            except self._error as error:
                raise _zstd_failure(error, self._path) from error
            if not n:
                break
            done += n
        return done


def _zstd_failure(error: Exception, path: str) -> ImgcoreError:
    text = str(error)
    if "memory" in text:
        return LimitExceededError(
            f"the zstd stream needs a window of more than {MAX_WINDOW_NBYTES // MIB} MiB", path=path
        )
    return CorruptImageError(f"the zstd stream is broken: {text}", path=path)


def content_nbytes(file: ByteSource) -> int | None:
    """Return the content's size in bytes, or None if a frame does not state its own.

    Only the headers of frames and blocks are read.
    """
    walk, headers = FrameWalk(file.path), _Headers(file)
    while walk.offset < file.nbytes or not walk.is_between:
        left = file.nbytes - walk.offset
        if walk.is_between and not is_zstd(headers.read(walk.offset, min(4, left))):
            raise walk.corrupt(
                f"the zstd stream is followed by {left} other bytes "
                f"(truncate -s {walk.offset} of a copy removes them)"
            )
        if abs(walk.wanted) > left:
            raise walk.corrupt(_TOO_EARLY)
        if walk.wanted < 0:
            walk.skip(-walk.wanted)
        else:
            walk.give(headers.read(walk.offset, walk.wanted))
    walk.require_frames()
    return walk.content_nbytes


class _Headers:
    """Reads a few bytes at a time of a file, at ascending offsets."""

    def __init__(self, file: ByteSource) -> None:
        self._file = file
        self._window = b""
        self._offset = 0

    def read(self, offset: int, nbytes: int) -> bytes:
        place = offset - self._offset
        if place < 0 or place + nbytes > len(self._window):
            left = self._file.nbytes - offset
            self._window, self._offset, place = self._file.pread(offset, min(4096, left)), offset, 0
        return self._window[place : place + nbytes]


class FrameWalk:
    """Walks the frames of a zstd stream by their block headers, without decompressing.

    It finds truncation and garbage, which a streaming decompressor does not report, and
    the size of the content if every frame states its own.
    Source: RFC 8878 section 3.1.

    Attributes
    ----------
    offset : int
        Bytes of the stream that were walked over.
    wanted : int
        So many bytes must be given next; if it is negative, so many are skipped.
    is_between : bool
        A frame may begin here, or the stream end.
    content_nbytes : int or None
        The sum of the sizes that the frames so far state; None if one is missing.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.offset: int = 0
        self.is_between: bool = True
        self.content_nbytes: int | None = 0
        self._n_frames = 0
        self._steps = self._walk()
        self.wanted: int = next(self._steps)

    def give(self, data: bytes) -> None:
        """Go over ``wanted`` bytes, which matter."""
        self.offset += len(data)
        self.wanted = self._steps.send(data)

    def skip(self, nbytes: int) -> None:
        """Go over some of ``-wanted`` bytes, whose values do not matter."""
        self.offset += nbytes
        self.wanted += nbytes
        if not self.wanted:
            self.wanted = next(self._steps)

    def require_frames(self) -> None:
        """Raise if there was no frame but skippable ones."""
        if not self._n_frames:
            raise CorruptImageError("the zstd stream has no frame", path=self._path)

    def _walk(self) -> Generator[int, bytes, None]:
        while True:
            self.is_between = True
            start = self.offset
            magic = int.from_bytes((yield 4), "little")
            self.is_between = False
            if _is_skippable(magic):
                yield from self._pass(int.from_bytes((yield 4), "little"))
            else:
                yield from self._walk_frame(start)

    def _pass(self, nbytes: int) -> Generator[int, bytes, None]:
        if nbytes:
            yield -nbytes

    def _walk_frame(self, start: int) -> Generator[int, bytes, None]:
        """Walk the frame whose magic was read, and count the size that it claims."""
        descriptor = (yield 1)[0]
        single_segment = descriptor >> 5 & 1
        if descriptor & 8:
            raise self.corrupt(f"the zstd frame at 0x{start:x} sets a reserved bit")
        yield from self._pass((1 - single_segment) + (0, 1, 2, 4)[descriptor & 3])
        size_nbytes = (single_segment, 2, 4, 8)[descriptor >> 6]
        claimed = int.from_bytes((yield size_nbytes) if size_nbytes else b"", "little")
        claimed += 256 if size_nbytes == 2 else 0
        bound = yield from self._walk_blocks()
        yield from self._pass(4 if descriptor >> 2 & 1 else 0)
        if size_nbytes and claimed > bound:
            raise self.corrupt(
                f"the zstd frame at 0x{start:x} claims {claimed} bytes, but can hold {bound}"
            )
        self._n_frames += 1
        total = self.content_nbytes
        self.content_nbytes = None if total is None or not size_nbytes else total + claimed

    def _walk_blocks(self) -> Generator[int, bytes, int]:
        """Walk a frame's blocks and return the most bytes that they can hold."""
        bound = 0
        last = False
        while not last:
            header = int.from_bytes((yield 3), "little")
            last = bool(header & 1)
            kind, nbytes = header >> 1 & 3, header >> 3
            if kind == _RESERVED_BLOCK:
                raise self.corrupt(f"the zstd block at 0x{self.offset - 3:x} has no known type")
            bound += nbytes if kind in (_RAW_BLOCK, _RLE_BLOCK) else _MAX_BLOCK_NBYTES
            yield from self._pass(1 if kind == _RLE_BLOCK else nbytes)
        return bound

    def corrupt(self, text: str) -> CorruptImageError:
        """Return an error at the offset that was reached."""
        return CorruptImageError(text, path=self._path, offset=self.offset)


class FramesInput:
    """Passes on a zstd stream that comes in order, and verifies that it is whole.

    Parameters
    ----------
    source : StreamInput
        Zeros after the last frame are accepted, and not passed on.
    """

    def __init__(self, source: StreamInput) -> None:
        self._source = source
        self.path: str = source.path
        self._walk = FrameWalk(source.path)
        self._pending = b""

    def read(self, nbytes: int, /) -> bytes:
        """Return the next bytes of the frames."""
        data = self._source.read(nbytes)
        if not data:
            if self._pending or not self._walk.is_between:
                raise self._walk.corrupt(_TOO_EARLY)
            self._walk.require_frames()
        end = self._walk_over(data)
        if end < len(data):
            self._source.require_zeros(data[end:])
            self._source.require_end()
        return data[:end]

    def _walk_over(self, data: bytes) -> int:
        """Return where padding begins, or the end."""
        walk, at = self._walk, 0
        while at < len(data):
            if walk.wanted < 0:
                n = min(-walk.wanted, len(data) - at)
                walk.skip(n)
                at += n
                continue
            if walk.is_between and not self._pending and not data[at]:
                break
            part = data[at : at + walk.wanted - len(self._pending)]
            self._pending += part
            at += len(part)
            if len(self._pending) < walk.wanted:
                break
            if walk.is_between and not is_zstd(self._pending):
                raise walk.corrupt("the zstd stream is followed by other bytes")
            pending, self._pending = self._pending, b""
            walk.give(pending)
        return at


# What the library compresses as a unit, and what it sees of the unit before: four times
# the window of 2 MiB that this level has, and an eighth of it.
_LEVEL: Final = 3
_JOB_NBYTES: Final = 8 * MIB
_OVERLAP_NBYTES: Final = 256 * KIB
# The bit of the fifth byte that says that a checksum follows the frame's blocks, which
# is the low half of XXH64.  RFC 8878 section 3.1.1.1.1.
_DESCRIPTOR: Final = 4
_HAS_CHECKSUM: Final = 4


class ZstdEncoder:
    """Compresses bytes, given in order, into one zstd frame with size and checksum.

    An `Encoder`.  The checksum is made here, and not by the library, since another
    encoder may have made a part of it.

    Parameters
    ----------
    target_file : TargetFile
        Written from offset 0; the caller closes it.
    nbytes : int or None
        Bytes to expect in all, which the frame states; None if they are not known.
    threads : int
        Compression threads, at least 1; fewer are used if the system makes fewer.  The
        number does not change the result, but without any thread the library writes
        other blocks.
    """

    def __init__(self, target_file: TargetFile, nbytes: int | None, threads: int = 1) -> None:
        import zstandard

        from imgcore._core import Xxh64

        self._library = zstandard
        self._output = OrderedOutput(target_file)
        self._hash = Xxh64()
        self._nbytes = nbytes
        self._taken_nbytes = 0
        self._threads = max(threads, 1)
        self._size = -1 if nbytes is None else nbytes
        self._compressor = self._new_compressor(self._threads)
        self._stream = self._compressor.compressobj(size=self._size)
        self._has_begun = False
        self.unit_nbytes: int = _JOB_NBYTES
        self.lead_nbytes: int = _JOB_NBYTES + _OVERLAP_NBYTES
        # What the last units of a stream become, while another one has taken its place;
        # what that one has made so far; and the boundary between them.
        self._ending: Future[bytes] | None = None
        self._held: list[bytes] = []
        self._marked: tuple[int, tuple[int, ...]] = (0, ())
        self._boundary: Boundary | None = None
        # The end of the input, once a boundary was asked for.
        self._overlap: bytes | None = None
        self._helpers: Helpers | None = None
        # What made the stream before: its buffers are used again.
        self._spare: Any = None

    def _new_compressor(self, threads: int) -> Any:
        parameters = self._library.ZstdCompressionParameters(
            compression_level=_LEVEL,
            threads=threads,
            job_size=_JOB_NBYTES,
            write_content_size=self._nbytes is not None,
            write_checksum=False,
        )
        return self._library.ZstdCompressor(compression_params=parameters)

    @property
    def written_nbytes(self) -> int:
        """Bytes written to the file so far."""
        return self._output.nbytes

    def write(self, buffer: Any) -> None:
        """Compress the next bytes; raises OSError with the file's name."""
        with memoryview(buffer) as view:
            if self._nbytes is not None and view.nbytes > self._nbytes - self._taken_nbytes:
                raise ValueError(f"{self._output.path}: more than {self._nbytes} bytes given")
            self._taken_nbytes += view.nbytes
            self._hash.update(view)
            if self._overlap is not None:
                self._overlap = _end_of(self._overlap, view)
            data = self._call("compress", view)
        if self._ending is None:
            self._write(data)
        else:
            self._held.append(data)
            self._take_end(waits=False)

    def finish(self) -> None:
        """End the frame; the file is then complete but not synced."""
        if self._nbytes is not None and self._taken_nbytes != self._nbytes:
            raise ValueError(
                f"{self._output.path}: {self._taken_nbytes} of {self._nbytes} bytes given"
            )
        self._take_end(waits=True)
        self._write(self._call("flush"))
        self._output.write((self._hash.digest() & 0xFFFFFFFF).to_bytes(4, "little"))

    def _write(self, data: bytes) -> None:
        self._output.write(_stating_checksum(data, self._output.nbytes))

    # -- boundaries --------------------------------------------------------------------

    def mark(self) -> None:
        """Make a boundary here, unless one is being made.

        Another stream goes on from here, while a thread waits for the last units of
        this one.  Without threads, the library makes no units.
        """
        if self._overlap is None:
            self._overlap = b""
        elif self._ending is None and self._threads and len(self._overlap) == _OVERLAP_NBYTES:
            stream = self._stream_after(self._overlap)
            if stream is not None:
                self._helpers = self._helpers or Helpers(1, "imgcore-zstd")
                self._ending = self._helpers.submit(self._end_units, self._stream)
                self._stream = stream
                self._marked = self._taken_nbytes, self._hash.state

    def boundary(self) -> Boundary | None:
        """Return the last boundary up to which all is written, None without one."""
        self._take_end(waits=False)
        return self._boundary

    def _take_end(self, *, waits: bool) -> None:
        """Write the last units of a stream, and what follows, once these are made."""
        ending, output = self._ending, self._output
        if ending is None or not (waits or ending.done()):
            return
        self._ending = None
        try:
            self._write(ending.result())
        except self._library.ZstdError as error:
            raise self._error(error) from error
        nbytes, state = self._marked
        self._boundary = Boundary(nbytes, output.nbytes, output.crc, state)
        for data in self._held:
            output.write(data)
        self._held.clear()

    def go_on(self, boundary: Boundary, before: memoryview) -> bytes:
        """Begin where another encoder was; return what the last unit becomes."""
        from imgcore._core import Xxh64

        self._taken_nbytes = boundary.nbytes
        self._hash = Xxh64(boundary.state)
        self._output.go_on(boundary)
        self._overlap = bytes(before[-_OVERLAP_NBYTES:])
        lead, unit = before[:-_JOB_NBYTES], before[-_JOB_NBYTES:]
        if lead:
            self._stream = self._stream_after(lead)
            self._threads *= self._stream is not None
        data = self._call("compress", unit) if self._threads else b""
        if not self._threads:
            raise ImgcoreError(
                "no thread can be made, without which it cannot go on: try again later",
                path=self._output.path,
            )
        data += self._end_units(self._stream)
        return data if lead else _stating_checksum(data, 0)

    def _stream_after(self, overlap: bytes | memoryview) -> Any:
        """Return a stream that goes on after some content; None if no thread is made.

        The library begins with a frame of its own, whose start is dropped.  A unit
        depends on the end of the one before, and on nothing else.
        """
        threads, compressor = self._threads, self._spare
        while threads:
            compressor = compressor or self._new_compressor(threads)
            stream = compressor.compressobj()
            try:
                stream.compress(overlap)
                self._end_units(stream)
            except self._library.ZstdError:
                threads, compressor = threads // 2, None
            else:
                self._has_begun = True
                self._spare, self._compressor = self._compressor, compressor
                return stream
        return None

    def _end_units(self, stream: Any) -> bytes:
        """Return what the last units of a stream become; all of them are whole.

        They are compressed in the same way as if more content followed.
        """
        data: bytes = stream.flush(self._library.COMPRESSOBJ_FLUSH_BLOCK)
        return data

    # -- the library -------------------------------------------------------------------

    def _error(self, error: Exception) -> ImgcoreError:
        return ImgcoreError(f"cannot compress: {error}", path=self._output.path)

    def _call(self, name: str, *arguments: Any) -> bytes:
        while True:
            try:
                data: bytes = getattr(self._stream, name)(*arguments)
            except self._library.ZstdError as error:
                if self._has_begun or not self._threads:
                    raise self._error(error) from error
                self._take_fewer_threads()
            else:
                self._has_begun = True
                return data

    def _take_fewer_threads(self) -> None:
        """Begin again: the library makes its threads at the first call, all or none."""
        self._threads //= 2
        self._compressor = self._new_compressor(self._threads)
        self._stream = self._compressor.compressobj(size=self._size)
        if not self._threads:
            log.warning(
                "%s: no thread can be made: the stream differs from one made with threads, "
                "its content does not",
                self._output.path,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the own thread; the library ends its threads with their compressor."""
        if self._helpers is not None:
            self._helpers.close()


def _end_of(before: bytes, view: memoryview) -> bytes:
    """Return the end of some content, as much of it as the next unit depends on."""
    if len(view) >= _OVERLAP_NBYTES:
        return bytes(view[-_OVERLAP_NBYTES:])
    return (before + view)[-_OVERLAP_NBYTES:]


def _stating_checksum(data: bytes, offset: int) -> bytes:
    """Return bytes at an offset of a frame, as those of a frame with a checksum."""
    at = _DESCRIPTOR - offset
    if not 0 <= at < len(data):
        return data
    return data[:at] + bytes([data[at] | _HAS_CHECKSUM]) + data[at + 1 :]
