"""Reads and writes zstd streams."""

from __future__ import annotations

from functools import partial
from typing import IO, TYPE_CHECKING, Any, Final, cast

from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    OptionError,
)
from imgcore.limits import MIB
from imgcore.log import log
from imgcore.streams.decoder import READ_NBYTES, OrderedInput
from imgcore.streams.encoder import OrderedOutput

if TYPE_CHECKING:
    from typing import Self

    from imgcore.files.byte_source import ByteSource
    from imgcore.files.target_file import TargetFile

# The window of `zstd --long` (windowLog 27); zstd decompresses it without an option.
MAX_WINDOW_NBYTES: Final = 128 * MIB

# RFC 8878: sections 3.1.1, 3.1.2 (its last four bits are free), 3.1.1.2.4, 3.1.1.2.2.
_FRAME_MAGIC: Final = 0xFD2FB528
_SKIPPABLE_MAGIC: Final = 0x184D2A50
_MAX_BLOCK_NBYTES: Final = 128 * 1024
_RAW_BLOCK, _RLE_BLOCK, _RESERVED_BLOCK = 0, 1, 3


def is_zstd(head: bytes) -> bool:
    """Tell whether a file with these first bytes is a zstd stream."""
    magic = int.from_bytes(head[:4], "little")
    return magic == _FRAME_MAGIC or _is_skippable(magic)


def _is_skippable(magic: int) -> bool:
    return magic & ~0xF == _SKIPPABLE_MAGIC


class ZstdDecoder:
    def __init__(self, file: ByteSource) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._path = file.path
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_NBYTES)
        # The decompressor only calls read().
        source = cast("IO[bytes]", OrderedInput(file))
        self._reader = decompressor.stream_reader(
            source, read_size=READ_NBYTES, read_across_frames=True
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
    """Return the content's size in bytes, or None if a frame does not state its own."""
    walk = FrameWalk(file)
    nbytes = walk.content_nbytes()
    if walk.n_frames == 0:
        raise CorruptImageError("the zstd stream has no frame", path=file.path)
    return nbytes


class FrameWalk:
    """Walks the frames of a zstd file by their block headers, without decompressing.

    It finds truncation and garbage, which a streaming decompressor does not report, and
    the size of the content if every frame states its own.
    Source: RFC 8878 section 3.1.
    """

    def __init__(self, file: ByteSource) -> None:
        self._file = file
        self._offset = 0
        self._window = b""
        self._window_offset = 0
        self.n_frames: int = 0

    def content_nbytes(self) -> int | None:
        """Walk all frames and return the sum of their sizes, None if one is missing."""
        total: int | None = 0
        while self._offset < self._file.nbytes:
            start = self._offset
            rest_nbytes = self._file.nbytes - start
            magic = int.from_bytes(self._take(min(4, rest_nbytes)), "little")
            if _is_skippable(magic):
                self._skip(int.from_bytes(self._take(4), "little"))
                continue
            if magic != _FRAME_MAGIC:
                raise self._corrupt(
                    f"the zstd stream is followed by {rest_nbytes} other bytes "
                    f"(truncate -s {start} of a copy removes them)"
                )
            claimed = self._walk_frame(start)
            total = None if total is None or claimed is None else total + claimed
            self.n_frames += 1
        return total

    def _walk_frame(self, start: int) -> int | None:
        """Walk the frame whose magic was read, and return the size that it claims."""
        descriptor = self._take(1)[0]
        single_segment = descriptor >> 5 & 1
        if descriptor & 8:
            raise self._corrupt(f"the zstd frame at 0x{start:x} sets a reserved bit")
        self._skip((1 - single_segment) + (0, 1, 2, 4)[descriptor & 3])
        size_nbytes = (single_segment, 2, 4, 8)[descriptor >> 6]
        claimed = int.from_bytes(self._take(size_nbytes), "little")
        claimed += 256 if size_nbytes == 2 else 0
        bound = self._walk_blocks()
        if descriptor >> 2 & 1:
            self._skip(4)
        if size_nbytes and claimed > bound:
            raise self._corrupt(
                f"the zstd frame at 0x{start:x} claims {claimed} bytes, but can hold {bound}"
            )
        return claimed if size_nbytes else None

    def _walk_blocks(self) -> int:
        """Walk a frame's blocks and return the most bytes that they can hold."""
        bound = 0
        last = False
        while not last:
            header = int.from_bytes(self._take(3), "little")
            last = bool(header & 1)
            kind, nbytes = header >> 1 & 3, header >> 3
            if kind == _RESERVED_BLOCK:
                raise self._corrupt(f"the zstd block at 0x{self._offset - 3:x} has no known type")
            bound += nbytes if kind in (_RAW_BLOCK, _RLE_BLOCK) else _MAX_BLOCK_NBYTES
            self._skip(1 if kind == _RLE_BLOCK else nbytes)
        return bound

    def _take(self, nbytes: int) -> bytes:
        start = self._offset
        self._skip(nbytes)
        place = start - self._window_offset
        if place < 0 or place + nbytes > len(self._window):
            self._window = self._file.pread(start, min(4096, self._file.nbytes - start))
            self._window_offset, place = start, 0
        return self._window[place : place + nbytes]

    def _skip(self, nbytes: int) -> None:
        if nbytes > self._file.nbytes - self._offset:
            raise self._corrupt("the zstd stream ends too early")
        self._offset += nbytes

    def _corrupt(self, text: str) -> CorruptImageError:
        return CorruptImageError(text, path=self._file.path, offset=self._offset)


class ZstdEncoder:
    """Compresses bytes, given in order, into one zstd frame with size and checksum.

    Parameters
    ----------
    target_file : TargetFile
        Written from offset 0; the caller closes it.
    nbytes : int
        Bytes to expect in all.
    threads : int
        Compression threads, at least 1; fewer are used if the system makes fewer.  The
        number does not change the result, but without any thread the library writes
        other blocks.
    level : int
        zstd level, 1 to 19.
    """

    def __init__(
        self, target_file: TargetFile, nbytes: int, threads: int = 1, level: int = 3
    ) -> None:
        import zstandard

        if not 1 <= level <= 19:
            raise OptionError(f"the zstd level is {level}: allowed are 1 to 19")
        self._open = partial(
            zstandard.ZstdCompressor, level=level, write_content_size=True, write_checksum=True
        )
        self._error = zstandard.ZstdError
        self._output = OrderedOutput(target_file)
        self._nbytes = nbytes
        self._taken_nbytes = 0
        self._threads = max(threads, 1)
        self._stream = self._open(threads=self._threads).compressobj(size=nbytes)
        self._has_begun = False

    @property
    def written_nbytes(self) -> int:
        """Bytes written to the file so far."""
        return self._output.nbytes

    def write(self, buffer: Any) -> None:
        """Compress the next bytes; raises OSError with the file's name."""
        with memoryview(buffer) as view:
            if view.nbytes > self._nbytes - self._taken_nbytes:
                raise ValueError(f"{self._output.path}: more than {self._nbytes} bytes given")
            self._taken_nbytes += view.nbytes
            self._output.write(self._call("compress", view))

    def finish(self) -> None:
        """End the frame; the file is then complete but not synced."""
        if self._taken_nbytes != self._nbytes:
            raise ValueError(
                f"{self._output.path}: {self._taken_nbytes} of {self._nbytes} bytes given"
            )
        self._output.write(self._call("flush"))

    def _call(self, name: str, *arguments: Any) -> bytes:
        while True:
            try:
                data: bytes = getattr(self._stream, name)(*arguments)
            except self._error as error:
                if self._has_begun or not self._threads:
                    path = self._output.path
                    raise ImgcoreError(f"cannot compress: {error}", path=path) from error
                self._take_fewer_threads()
            else:
                self._has_begun = True
                return data

    def _take_fewer_threads(self) -> None:
        """Begin again: the library makes its threads at the first call, all or none."""
        self._threads //= 2
        self._stream = self._open(threads=self._threads).compressobj(size=self._nbytes)
        if not self._threads:
            log.warning(
                "%s: no thread can be made: the stream differs from one made with threads, "
                "its content does not",
                self._output.path,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: the library ends its threads when the compressor is freed."""
