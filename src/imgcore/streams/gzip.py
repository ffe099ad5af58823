"""Reads gzip, and writes it on several threads.

The encoder writes one member.  It cuts the input into pieces and deflates each of them
separately, with the 32 KiB before it as dictionary.  An empty stored block ends each
piece on a byte boundary, so the joined pieces are one deflate stream.  The number of
threads does not change the bytes.
Source: RFC 1951 section 3.2.4, RFC 1952.
"""

from __future__ import annotations

import zlib
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from imgcore.errors import CorruptImageError
from imgcore.limits import KIB, MIB
from imgcore.streams.decoder import READ_NBYTES, MembersDecoder
from imgcore.streams.encoder import Boundary, OrderedOutput
from imgcore.streams.helpers import Helpers

if TYPE_CHECKING:
    from concurrent.futures import Future
    from typing import Self

    from imgcore.files.target_file import TargetFile

_PIECE_NBYTES: Final = 1 * MIB
_WINDOW_NBYTES: Final = 32 * KIB  # RFC 1951 section 2
_LEVEL: Final = 6  # the default of gzip
# RFC 1952 section 2.3: magic, deflate, no flags, time or extra flags, unknown system.
_HEADER: Final = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"


def _deflate(piece: bytes, dictionary: bytes, is_last: bool) -> bytes:
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=dictionary)
    data = compressor.compress(piece)
    return data + compressor.flush(zlib.Z_FINISH if is_last else zlib.Z_SYNC_FLUSH)


class GzipEncoder:
    """Compresses bytes, given in order, into a gzip file; an `Encoder`.

    A context manager: leaving it ends the threads, even before `finish`.

    Parameters
    ----------
    target_file : TargetFile
        Written from offset 0; the caller closes it.
    threads : int
        At least 1; fewer are used if the system makes fewer.  The number does not
        change the result.

    Notes
    -----
    Memory: about 3 MiB a thread.
    """

    unit_nbytes: int = _PIECE_NBYTES
    lead_nbytes: int = _PIECE_NBYTES + _WINDOW_NBYTES

    def __init__(self, target_file: TargetFile, threads: int = 1) -> None:
        self._output = OrderedOutput(target_file)
        # One alone would only take the place of the calling thread.
        self._helpers = Helpers(threads if threads > 1 else 0, "imgcore-gzip")
        self._max_waiting = 2 * threads
        # Of each piece: what it becomes, and the input with it, and its CRC.
        self._waiting: deque[tuple[Future[bytes], tuple[int, int]]] = deque()
        self._piece = bytearray()
        self._dictionary = b""
        self._crc = 0
        self._nbytes = 0
        # The input up to the last piece that is written, and its CRC.
        self._done = (0, 0)
        self._output.write(_HEADER)

    @property
    def written_nbytes(self) -> int:
        """Bytes written to the file so far."""
        return self._output.nbytes

    def write(self, buffer: Any) -> None:
        """Compress the next bytes; raises OSError with the file's name."""
        with memoryview(buffer) as view, view.cast("B") as octets:
            position = 0
            while position < len(octets):
                room = _PIECE_NBYTES - len(self._piece)
                self._piece += octets[position : position + room]
                position += room
                if len(self._piece) == _PIECE_NBYTES:
                    self._submit(is_last=False)

    def finish(self) -> None:
        """End the stream; the file is then complete but not synced."""
        self._submit(is_last=True)
        while self._waiting:
            self._write_next()
        self._output.write(self._crc.to_bytes(4, "little"))
        self._output.write((self._nbytes & 0xFFFFFFFF).to_bytes(4, "little"))

    def _submit(self, *, is_last: bool) -> None:
        piece = bytes(self._piece)
        self._piece.clear()
        if len(self._waiting) >= self._max_waiting:
            self._write_next()
        future = self._helpers.submit(_deflate, piece, self._dictionary, is_last)
        self._dictionary = piece[-_WINDOW_NBYTES:]
        self._crc = zlib.crc32(piece, self._crc)
        self._nbytes += len(piece)
        self._waiting.append((future, (self._nbytes, self._crc)))

    def _write_next(self) -> None:
        future, done = self._waiting.popleft()
        self._output.write(future.result())
        self._done = done

    def mark(self) -> None:
        """Do nothing: each piece ends with a boundary."""

    def boundary(self) -> Boundary:
        """Return the end of the last piece that is written."""
        nbytes, crc = self._done
        return Boundary(nbytes, self._output.nbytes, self._output.crc, (crc,))

    def go_on(self, boundary: Boundary, before: memoryview) -> bytes:
        """Begin where another encoder was; return what the last piece becomes."""
        piece = bytes(before[-_PIECE_NBYTES:])
        dictionary = bytes(before[: -len(piece)][-_WINDOW_NBYTES:])
        self._nbytes, (self._crc,) = boundary.nbytes, boundary.state
        self._done = self._nbytes, self._crc
        self._dictionary = piece[-_WINDOW_NBYTES:]
        self._output.go_on(boundary)
        return _deflate(piece, dictionary, is_last=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._helpers.close()


_MAGIC: Final = b"\x1f\x8b"  # RFC 1952 section 2.3.1


def is_gzip(head: bytes) -> bool:
    """Tell whether a file with these first bytes is a gzip stream."""
    return head.startswith(_MAGIC)


class GzipDecoder(MembersDecoder):
    def _decompress(self, room: int) -> bytes:
        member = self._member
        self._pending = self._pending or self._input.read(READ_NBYTES)
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

    def _next_member(self) -> Any:
        # Zeros at the end of the file are padding.
        self._pending = self._pending or self._input.read(READ_NBYTES)
        padded = False
        while self._n_members and self._pending.startswith(b"\0"):
            padded = True
            self._pending = self._pending.lstrip(b"\0") or self._input.read(READ_NBYTES)
        if not self._pending and self._n_members:
            return None
        if padded or self._pending[:1] != _MAGIC[:1]:
            raise CorruptImageError("there is garbage after the gzip stream", path=self._path)
        return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
