"""Writing gzip on several threads: one member, one stream, the same bytes with any number of them.

The input is cut into pieces that are deflated by themselves, each with the 32 KiB before it as
dictionary, and ended at a byte by an empty stored block; their outputs behind each other are one
deflate stream.
Source: RFC 1951 section 3.2.4, RFC 1952.
"""

from __future__ import annotations

import zlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from imgcore.limits import KIB, MIB

if TYPE_CHECKING:
    from typing import Self

    from imgcore.files.target_file import TargetFile

_PIECE_NBYTES: Final = 1 * MIB
_WINDOW_NBYTES: Final = 32 * KIB  # RFC 1951 section 2
_LEVEL: Final = 6  # of gzip itself
# RFC 1952 section 2.3: magic, deflate, no flags, no time, no extra flags, unknown system.
_HEADER: Final = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"


def _deflate(piece: bytes, dictionary: bytes, is_last: bool) -> bytes:
    compressor = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=dictionary)
    data = compressor.compress(piece)
    return data + compressor.flush(zlib.Z_FINISH if is_last else zlib.Z_SYNC_FLUSH)


class GzipSink:
    """Compresses what it is given, in order, into a gzip file.

    A context manager: leaving it ends the threads, also in the middle.

    Parameters
    ----------
    target_file : TargetFile
        Written from offset 0 on; stays the caller's.
    threads : int
        At least 1.  The result does not depend on their number.

    Notes
    -----
    Memory: about 3 MiB a thread.
    """

    def __init__(self, target_file: TargetFile, threads: int = 1) -> None:
        self._target = target_file
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="imgcore-gzip")
        self._max_waiting = 2 * threads
        self._waiting: deque[Future[bytes]] = deque()
        self._piece = bytearray()
        self._dictionary = b""
        self._crc = 0
        self._nbytes = 0
        self.written_nbytes = 0
        self._put(_HEADER)

    def write(self, buffer: Any) -> None:
        """Compress the next bytes; raises OSError with the target's name."""
        with memoryview(buffer) as view, view.cast("B") as octets:
            position = 0
            while position < len(octets):
                room = _PIECE_NBYTES - len(self._piece)
                self._piece += octets[position : position + room]
                position += room
                if len(self._piece) == _PIECE_NBYTES:
                    self._submit(is_last=False)

    def finish(self) -> None:
        """End the stream; the file is complete then, though not synced."""
        self._submit(is_last=True)
        while self._waiting:
            self._put(self._waiting.popleft().result())
        self._put((self._crc).to_bytes(4, "little"))
        self._put((self._nbytes & 0xFFFFFFFF).to_bytes(4, "little"))

    def _submit(self, *, is_last: bool) -> None:
        piece = bytes(self._piece)
        self._piece.clear()
        if len(self._waiting) >= self._max_waiting:
            self._put(self._waiting.popleft().result())
        self._waiting.append(self._threads.submit(_deflate, piece, self._dictionary, is_last))
        self._dictionary = piece[-_WINDOW_NBYTES:]
        self._crc = zlib.crc32(piece, self._crc)
        self._nbytes += len(piece)

    def _put(self, data: bytes) -> None:
        self._target.pwrite(self.written_nbytes, data)
        self.written_nbytes += len(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
