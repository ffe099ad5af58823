"""Compressed raw disks as streams: ``disk.raw.zst`` and ``disk.raw.gz`` in, ``disk.raw.zst`` out.

A stream has no random access: its content is read once, in order, by a helper thread.  Memory
stays bounded whatever a stream claims or holds.
"""

from __future__ import annotations

import os
import queue
import struct
import threading
import zlib
from typing import IO, TYPE_CHECKING, Any, Final, Protocol, cast

from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    OptionError,
    WrongFormatError,
)
from imgcore.files.host_file import HostFile
from imgcore.limits import MIB, SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Self

    from imgcore.files.identity import Identity
    from imgcore.files.target_file import TargetFile

# What `zstd --long` asks for without a further word on the reading side (windowLog 27).
MAX_WINDOW_NBYTES: Final = 128 * MIB

_READ_NBYTES: Final = 256 * 1024
_COUNT_NBYTES: Final = 1 * MIB
# One chunk with the consumer, two ahead of it.
_N_BUFFERS: Final = 3

_ZSTD_MAGIC: Final = 0xFD2FB528  # RFC 8878 section 3.1.1
_SKIPPABLE_MAGIC: Final = 0x184D2A50  # RFC 8878 section 3.1.2; the last four bits are free
_GZIP_MAGIC: Final = b"\x1f\x8b"  # RFC 1952 section 2.3.1
_MAX_BLOCK_NBYTES: Final = 128 * 1024  # RFC 8878 section 3.1.1.2.4
_RAW_BLOCK, _RLE_BLOCK, _RESERVED_BLOCK = 0, 1, 3  # RFC 8878 section 3.1.1.2.2


class _Decoder(Protocol):
    def fill(self, view: memoryview) -> int:
        """Decompress until the view is full or the stream ends; returns the bytes filled."""
        ...


class _Input:
    """Reads a file from its start, in order."""

    def __init__(self, file: HostFile) -> None:
        self._file = file
        self._offset = 0

    def read(self, nbytes: int = -1) -> bytes:
        left = self._file.nbytes - self._offset
        data = self._file.pread(self._offset, min(left, _READ_NBYTES if nbytes < 0 else nbytes))
        self._offset += len(data)
        return data


class _ZstdDecoder:
    def __init__(self, file: HostFile) -> None:
        import zstandard

        self._error = zstandard.ZstdError
        self._path = file.path
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_NBYTES)
        # All that is needed of a file is its read().
        source = cast("IO[bytes]", _Input(file))
        self._reader = decompressor.stream_reader(
            source, read_size=_READ_NBYTES, read_across_frames=True
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


class _GzipDecoder:
    def __init__(self, file: HostFile) -> None:
        self._path = file.path
        self._input = _Input(file)
        self._pending = b""
        self._member: Any = None
        self._n_members = 0

    def fill(self, view: memoryview) -> int:
        done = 0
        while done < len(view):
            self._pending = self._pending or self._input.read()
            if self._member is None and not self._next_member():
                break
            data = self._decompress(len(view) - done)
            view[done : done + len(data)] = data
            done += len(data)
        return done

    def _decompress(self, room: int) -> bytes:
        member = self._member
        try:
            data: bytes = member.decompress(self._pending, room)
        except zlib.error as error:
            raise CorruptImageError(
                f"the gzip stream is broken: {error}", path=self._path
            ) from error
        if member.eof:
            self._pending = member.unused_data
            self._member = None
        elif not self._pending and not data:
            raise CorruptImageError("the gzip stream ends too early", path=self._path)
        else:
            self._pending = member.unconsumed_tail
        return data

    def _next_member(self) -> bool:
        """Start the next member; False at the end of the file, zeros before it are padding."""
        padded = False
        while self._n_members and self._pending.startswith(b"\0"):
            padded = True
            self._pending = self._pending.lstrip(b"\0") or self._input.read()
        if not self._pending and self._n_members:
            return False
        if padded or self._pending[:1] != _GZIP_MAGIC[:1]:
            raise CorruptImageError("there is garbage behind the gzip stream", path=self._path)
        self._member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self._n_members += 1
        return True


class _FrameWalk:
    """Goes through the frames of a zstd file by their block headers, decompressing nothing.

    Finds truncation and garbage, which a streaming decompressor does not report, and the size of
    the content if every frame states its own.  Source: RFC 8878 section 3.1.
    """

    def __init__(self, file: HostFile) -> None:
        self._file = file
        self._offset = 0
        self._window = b""
        self._window_offset = 0
        self.n_frames = 0

    def content_nbytes(self) -> int | None:
        """Return the content's size in bytes, or None if a frame does not state it."""
        total: int | None = 0
        while self._offset < self._file.nbytes:
            start = self._offset
            magic = int.from_bytes(self._take(4), "little")
            if magic & ~0xF == _SKIPPABLE_MAGIC:
                self._skip(int.from_bytes(self._take(4), "little"))
                continue
            if magic != _ZSTD_MAGIC:
                raise self._corrupt(f"there is garbage at 0x{start:x}, behind the zstd stream")
            claimed = self._walk_frame(start)
            total = None if total is None or claimed is None else total + claimed
            self.n_frames += 1
        return total

    def _walk_frame(self, start: int) -> int | None:
        """Walk one frame behind its magic and return the size that it claims."""
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
                f"the zstd frame at 0x{start:x} claims {claimed} bytes, it can hold {bound}"
            )
        return claimed if size_nbytes else None

    def _walk_blocks(self) -> int:
        """Walk a frame's blocks and return how much they can hold at most."""
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


class StreamSource:
    """A compressed raw disk that is read once, in order.

    Attributes
    ----------
    file : HostFile
        The compressed file, closed with this object.
    virtual_size : int
        Bytes of the disk.
    codec : str
        ``"zstd"`` or ``"gzip"``.
    """

    def __init__(self, file: HostFile) -> None:
        """Take over an open file; closed if it is refused."""
        self.file = file
        try:
            self.codec = self._find_codec()
            self.virtual_size = self._find_virtual_size()
            if self.virtual_size % SECTOR_NBYTES:
                raise CorruptImageError(
                    f"a raw disk has a multiple of {SECTOR_NBYTES} bytes, "
                    f"this stream holds {self.virtual_size}",
                    path=file.path,
                )
        except BaseException:
            file.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, share: bool = False) -> Self:
        """Open a compressed raw disk and find its size.

        The sizes that zstd frames state are taken; if one does not, and for gzip, the content
        is counted by decompressing it once.

        Raises
        ------
        WrongFormatError
            It is neither a zstd nor a gzip stream.
        CorruptImageError
            The stream ends too early, holds something else, or no whole number of sectors.
        LimitExceededError
            Its window exceeds `MAX_WINDOW_NBYTES`.
        OSError
            The system refuses.
        """
        return cls(HostFile.open(path, share=share))

    @property
    def path(self) -> str:
        """The file's name as given."""
        return self.file.path

    @property
    def identity(self) -> Identity:
        """What tells the file from others, see `imgcore.files.host_file.same_file`."""
        return self.file.identity

    def _find_codec(self) -> str:
        head = self.file.pread(0, min(4, self.file.nbytes))
        if head[:2] == _GZIP_MAGIC:
            return "gzip"
        if len(head) == 4:
            (magic,) = struct.unpack("<I", head)
            if magic == _ZSTD_MAGIC or magic & ~0xF == _SKIPPABLE_MAGIC:
                return "zstd"
        raise WrongFormatError("neither a zstd nor a gzip stream", path=self.file.path)

    def _find_virtual_size(self) -> int:
        if self.codec == "zstd":
            walk = _FrameWalk(self.file)
            nbytes = walk.content_nbytes()
            if walk.n_frames == 0:
                raise CorruptImageError("the zstd stream has no frame", path=self.file.path)
            if nbytes is not None:
                return nbytes
        decoder = self._decoder()
        buffer = memoryview(bytearray(_COUNT_NBYTES))
        total = 0
        while n := decoder.fill(buffer):
            total += n
        return total

    def _decoder(self) -> _Decoder:
        return _ZstdDecoder(self.file) if self.codec == "zstd" else _GzipDecoder(self.file)

    def head(self, nbytes: int) -> bytes:
        """Return the disk's first bytes, fewer if it is smaller."""
        view = memoryview(bytearray(min(nbytes, self.virtual_size)))
        return bytes(view[: self._decoder().fill(view)])

    def read_chunks(self, chunk_nbytes: int) -> Generator[memoryview, None, None]:
        """Yield the disk's content in order.

        Parameters
        ----------
        chunk_nbytes : int
            Size of every chunk but the last, in bytes.

        Yields
        ------
        memoryview
            Writable bytes, valid until the next chunk is asked for.

        Raises
        ------
        CorruptImageError
            The stream is broken, or holds more or less than `virtual_size`.

        Notes
        -----
        A thread decompresses up to two chunks ahead; it has ended when the iterator has, or
        is closed.  Each call starts from the disk's first byte.
        """
        if chunk_nbytes <= 0:
            raise ValueError(f"chunk_nbytes is {chunk_nbytes}: it has to be positive")
        feeder = _Feeder(self._decoder(), min(chunk_nbytes, max(self.virtual_size, SECTOR_NBYTES)))
        total = 0
        feeder.start()
        try:
            while (view := feeder.take()) is not None:
                total += len(view)
                if total > self.virtual_size:
                    break
                yield view
                feeder.give_back()
        finally:
            feeder.stop()
        if total != self.virtual_size:
            what = "more" if total > self.virtual_size else f"{total} bytes, fewer"
            raise CorruptImageError(
                f"the stream holds {what} than the {self.virtual_size} bytes that it should",
                path=self.path,
            )

    def check_unchanged(self) -> None:
        """Raise ImgcoreError if the file has changed since it was opened."""
        self.file.check_unchanged()

    def close(self) -> None:
        """Close the file; more than once is allowed."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Feeder(threading.Thread):
    """Decompresses into a few buffers that go round between this thread and the consumer."""

    def __init__(self, decoder: _Decoder, chunk_nbytes: int) -> None:
        super().__init__(name="imgcore-stream", daemon=True)
        self._decoder = decoder
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[tuple[memoryview, int] | BaseException | None]
        self._filled = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._taken: memoryview | None = None
        for _ in range(_N_BUFFERS):
            self._free.put(memoryview(bytearray(chunk_nbytes)))

    def run(self) -> None:
        """Fill buffers until the stream ends, fails, or nobody wants more."""
        try:
            while (view := self._free.get()) is not None and not self._stopped.is_set():
                n = self._decoder.fill(view)
                if n:
                    self._filled.put((view, n))
                if n < len(view):
                    break
            self._filled.put(None)
        except BaseException as error:
            self._filled.put(error)

    def take(self) -> memoryview | None:
        """Return the next chunk, None at the end; raises what the thread ran into."""
        item = self._filled.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            return None
        self._taken = item[0]
        return item[0][: item[1]]

    def give_back(self) -> None:
        """Let the chunk taken last be filled again."""
        self._free.put(self._taken)

    def stop(self) -> None:
        """End the thread and wait for it: at most for the chunk that it is in."""
        self._stopped.set()
        self._free.put(None)
        self.join()


class ZstdSink:
    """Compresses a disk, given in order, into one zstd frame with its size and a checksum.

    Parameters
    ----------
    target_file : TargetFile
        Written from offset 0 on; stays the caller's.
    virtual_size : int
        Bytes that will be written in all.
    level : int
        zstd level, 1 to 19.
    threads : int
        Compression threads, at least 1.  The result does not depend on their number.
    """

    def __init__(
        self, target_file: TargetFile, virtual_size: int, level: int = 3, threads: int = 1
    ) -> None:
        import zstandard

        if not 1 <= level <= 19:
            raise OptionError(f"the zstd level is {level}: allowed are 1 to 19")
        compressor = zstandard.ZstdCompressor(
            level=level, threads=max(threads, 1), write_content_size=True, write_checksum=True
        )
        self._stream = compressor.compressobj(size=virtual_size)
        self._error = zstandard.ZstdError
        self._target = target_file
        self._virtual_size = virtual_size
        self._taken_nbytes = 0
        self.written_nbytes = 0

    def write(self, buffer: Any) -> None:
        """Compress the disk's next bytes; raises OSError with the target's name."""
        with memoryview(buffer) as view:
            if view.nbytes > self._virtual_size - self._taken_nbytes:
                raise ValueError(f"{self._target.path}: more than {self._virtual_size} bytes given")
            self._taken_nbytes += view.nbytes
            self._put(self._call(self._stream.compress, view))

    def finish(self) -> None:
        """End the frame; the file is complete then, though not synced."""
        if self._taken_nbytes != self._virtual_size:
            raise ValueError(
                f"{self._target.path}: {self._taken_nbytes} of {self._virtual_size} bytes given"
            )
        self._put(self._call(self._stream.flush))

    def _call(self, function: Any, *arguments: Any) -> bytes:
        try:
            data: bytes = function(*arguments)
        except self._error as error:
            raise ImgcoreError(f"cannot compress: {error}", path=self._target.path) from error
        return data

    def _put(self, data: bytes) -> None:
        if data:
            self._target.pwrite(self.written_nbytes, data)
            self.written_nbytes += len(data)
