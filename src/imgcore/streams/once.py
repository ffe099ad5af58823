"""Disks whose bytes come once and in order: raw disks, plain and compressed.

Memory stays bounded, whatever a stream contains.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Final

from imgcore.errors import CorruptImageError, LimitExceededError
from imgcore.files.stream_input import StreamInput
from imgcore.streams.feeder import MIN_BUFFERS, filled
from imgcore.streams.gzip import GzipDecoder
from imgcore.streams.xz import XzDecoder
from imgcore.streams.zstd import FramesInput, ZstdDecoder

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from imgcore._core import File
    from imgcore.files.identity import Identity
    from imgcore.streams.decoder import Decoder

_DECODERS: Final[dict[str, Callable[[StreamInput], Decoder]]] = {
    "zstd": lambda source: ZstdDecoder(FramesInput(source)),
    "gzip": GzipDecoder,
    "xz": XzDecoder,
}


def too_long(nbytes: int, path: str) -> LimitExceededError:
    """Return the error for a disk of unknown size that the target has no room for."""
    return LimitExceededError(
        f"holds more than {nbytes} bytes, the most that the target has room for if the size is "
        "not known from the start: give it (--size)",
        path=path,
    )


def decoded(source: StreamInput, codec: str) -> StreamInput:
    """Return the content of a compressed stream, which is closed with that."""
    return StreamInput(_Decoded(source, _DECODERS[codec](source)), source.path, source)


class _Decoded:
    """The content of a compressed stream; an `Origin`."""

    read_now = None

    def __init__(self, source: StreamInput, decoder: Decoder) -> None:
        self._source = source
        self._decoder = decoder
        self.identity: Identity = source.identity

    def readinto(self, view: memoryview, _tick: Callable[[], None] | None, /) -> int:
        return self._decoder.fill(view)

    def open_core(self, head: bytes, *, open_ended: bool, tail_nbytes: int) -> None:
        return None

    def cancel(self) -> bool:
        return self._source.cancel()

    def close(self) -> None:
        """Do nothing: the stream below is closed first."""


class _WithoutTail:
    """The bytes of a stream but for the last ones; an `Origin`."""

    read_now = None

    def __init__(self, source: StreamInput, tail_nbytes: int) -> None:
        self._source = source
        self._tail_nbytes = tail_nbytes
        self.identity: Identity = source.identity
        self.tail = b""
        self._has_ended = False

    def readinto(self, view: memoryview, _tick: Callable[[], None] | None, /) -> int:
        # Before and after each call, as many bytes are ahead as the tail has.
        if self._has_ended or not self._has_tail(b""):
            return 0
        n = self._source.readinto(view)
        if self._has_tail(view[:n]):
            return n
        return n + len(self._source.peek(self._tail_nbytes)) - self._tail_nbytes

    def open_core(self, head: bytes, *, open_ended: bool, tail_nbytes: int) -> None:
        return None

    def _has_tail(self, taken: memoryview | bytes) -> bool:
        ahead = self._source.peek(self._tail_nbytes)
        if len(ahead) == self._tail_nbytes:
            return True
        self.tail = (bytes(taken[-self._tail_nbytes :]) + ahead)[-self._tail_nbytes :]
        self._has_ended = True
        return False

    def cancel(self) -> bool:
        return self._source.cancel()

    def close(self) -> None:
        """Do nothing: the stream below is closed first."""


class OnceReader:
    """A disk that is read once, in order, from a stream.

    Parameters
    ----------
    source : StreamInput
        `close` closes it.
    codec : str or None
        ``"zstd"``, ``"gzip"`` or ``"xz"`` if it is compressed.
    nbytes : int, optional
        Size of the disk, if it is known.
    tail_nbytes : int
        Bytes that follow the disk in the stream and belong to its format.

    Attributes
    ----------
    file : StreamInput
        The stream as it comes.
    nbytes : int or None
        Size of the disk in bytes; None before its end was met, if it was not given.
    tail : bytes
        What follows the disk, once the end was met.
    """

    def __init__(
        self,
        source: StreamInput,
        codec: str | None = None,
        *,
        nbytes: int | None = None,
        tail_nbytes: int = 0,
    ) -> None:
        self.file: StreamInput = source
        self.codec: str | None = codec
        self.nbytes: int | None = nbytes
        self.tail: bytes = b""
        self._stated = nbytes
        self._tail_nbytes = tail_nbytes
        self._disk = source if codec is None else decoded(source, codec)
        self._has_ended = False

    @property
    def path(self) -> str:
        """The stream's name."""
        return self.file.path

    def head(self, nbytes: int) -> bytes:
        """Return the first bytes, fewer if there are no more; they are not lost."""
        return self._disk.peek(nbytes)

    # -- bytes for the engine ----------------------------------------------------------

    def open_core(self) -> File | None:
        """Return what the engine reads the disk by, from its first byte on.

        It is None if only Python can read it.  Otherwise the caller calls `find_end` if
        the size is not known, and `finish` after the last byte, and closes it.
        """
        if self.codec is not None:
            return None
        is_open = self._stated is None
        tail_nbytes = self._tail_nbytes if is_open else 0
        return self.file.open_core(open_ended=is_open, tail_nbytes=tail_nbytes)

    def find_end(self, core: File) -> None:
        """Set the size of the disk, of which the engine has read all that it can.

        Raises
        ------
        CorruptImageError
            The stream is empty.
        LimitExceededError
            It goes on.
        """
        end = core.stream_end
        if end is None:
            end = core.stream_position
            self.file.resume(core)
            if len(self.file.peek(self._tail_nbytes + 1)) > self._tail_nbytes:
                raise too_long(end, self.path)
        self._require_bytes(end)
        self.nbytes = end

    def finish(self, core: File) -> None:
        """Verify what follows the disk, of which the engine has read all."""
        if core.stream_end is None:
            self.file.resume(core)
        if self._stated is None:
            self.tail = core.stream_rest()
        else:
            self._end()

    def refuse_short(self, core: File) -> None:
        """Raise CorruptImageError if the stream is shorter than was stated."""
        if self._stated is not None and core.stream_end is not None:
            raise self._short(core.stream_end)

    def _short(self, end: int) -> CorruptImageError:
        return CorruptImageError(
            f"the stream ends after {end} bytes of the disk, whose size is stated as "
            f"{self._stated}",
            path=self.path,
            offset=end,
        )

    def _require_bytes(self, end: int) -> None:
        if not end and self.codec is None and self._stated is None:
            state = "ends before its disk begins" if self._tail_nbytes else "is empty"
            raise CorruptImageError(f"the stream {state}", path=self.path)

    # -- bytes in buffers --------------------------------------------------------------

    def chunks(self, chunk_nbytes: int) -> Generator[memoryview, None, None]:
        """Yield the disk's content in order.

        Each chunk but the last has ``chunk_nbytes``, and is valid until the next one.
        """
        buffers = [memoryview(bytearray(chunk_nbytes)) for _ in range(MIN_BUFFERS)]
        with closing(self.fill(buffers)) as chunks:
            for number, n in chunks:
                yield buffers[number][:n]

    def fill(self, buffers: Sequence[memoryview]) -> Generator[tuple[int, int], None, None]:
        """Fill buffers with the disk's content in order; see `feeder.filled`.

        Once a buffer is not full, ``nbytes`` is known.

        Raises
        ------
        CorruptImageError
            The stream is broken, shorter than the size that was given, or goes on after
            it with other bytes than zeros.
        """
        total, before = 0, None
        if self._stated is None and self._tail_nbytes:
            before = _WithoutTail(self._disk, self._tail_nbytes)
            self._disk = StreamInput(before, self.path, self.file)
        feed = filled(self._fill, buffers, tick=self.file.on_wait, cancel=self._disk.cancel)
        with closing(feed) as chunks:
            for number, n in chunks:
                total += n
                if n < len(buffers[number]):
                    self.nbytes = total
                yield number, n
        self.nbytes = total
        self._require_bytes(total)
        if before is not None:
            self.tail = before.tail

    def _fill(self, view: memoryview) -> int:
        if self._stated is None:
            return self._disk.readinto(view)
        left = self._stated - self._disk.position
        if self._has_ended or (not left and self._end()):
            return 0
        wanted = view[:left]
        n = self._disk.readinto(wanted)
        if n < len(wanted):
            raise self._short(self._disk.position)
        if n == left:
            self._end()
        return n

    def _end(self) -> bool:
        """Verify what follows a disk whose size was given; return True."""
        self._has_ended = True
        self.tail = self._disk.read(self._tail_nbytes)
        self._disk.require_end()
        return True

    def close(self) -> None:
        """Close the stream; more than once is allowed."""
        self.file.close()
