"""Reads compressed raw disks: ``disk.raw.zst`` and ``disk.raw.gz``.

A stream has no random access, so a helper thread reads its content once, in order.
Memory stays bounded, whatever a stream claims or contains.
"""

from __future__ import annotations

import os
import queue
import threading
from typing import TYPE_CHECKING, Final

from imgcore.engine.thread_budget import Lease
from imgcore.errors import CorruptImageError, WrongFormatError
from imgcore.files.host_file import HostFile
from imgcore.limits import MIB, SECTOR_NBYTES
from imgcore.streams.codecs import CODECS
from imgcore.streams.helpers import started

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Self

    from imgcore.streams.decoder import Decoder


_COUNT_NBYTES: Final = 1 * MIB
# One chunk is with the consumer, two are being filled or waiting.
_N_BUFFERS: Final = 3


class StreamReader:
    """A compressed raw disk that is read once, in order.

    Attributes
    ----------
    file : HostFile
        The compressed file; `close` closes it.
    virtual_size : int
        Bytes of the disk; its last sector may be incomplete.
    codec : str
        ``"zstd"`` or ``"gzip"``.
    """

    def __init__(self, file: HostFile) -> None:
        """Take over an open file; an error closes it."""
        self.file = file
        try:
            self.codec: str = self._find_codec()
            self.virtual_size: int = self._find_virtual_size()
        except BaseException:
            file.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, share: bool = False) -> Self:
        """Open a compressed raw disk and find its size.

        The size is the sum of those that the zstd frames state.  If a frame does not
        state its size, and for gzip, the content is decompressed once and counted.

        Raises
        ------
        WrongFormatError
            It is neither a zstd nor a gzip stream.
        CorruptImageError
            The stream ends too early, or contains something else.
        LimitExceededError
            Its window exceeds `MAX_WINDOW_NBYTES`.
        OSError
            The system cannot open or read the file.
        """
        return cls(HostFile.open(path, share=share))

    @property
    def path(self) -> str:
        """The file's name, as given."""
        return self.file.path

    def _find_codec(self) -> str:
        head = self.file.pread(0, min(4, self.file.nbytes))
        for name, codec in CODECS.items():
            if codec.matches(head):
                return name
        raise WrongFormatError(f"neither a {' nor a '.join(CODECS)} stream", path=self.file.path)

    def _find_virtual_size(self) -> int:
        stated = CODECS[self.codec].content_nbytes(self.file)
        if stated is not None:
            return stated
        decoder = self._decoder()
        buffer = memoryview(bytearray(_COUNT_NBYTES))
        total = 0
        while n := decoder.fill(buffer):
            total += n
        return total

    def _decoder(self) -> Decoder:
        return CODECS[self.codec].decoder(self.file)

    def head(self, nbytes: int) -> bytes:
        """Return the disk's first bytes, fewer if it is smaller."""
        view = memoryview(bytearray(min(nbytes, self.virtual_size)))
        return bytes(view[: self._decoder().fill(view)])

    def read_chunks(self, chunk_nbytes: int) -> Generator[memoryview, None, None]:
        """Yield the disk's content in order, from its first byte.

        Parameters
        ----------
        chunk_nbytes : int
            Size of every chunk but the last, in bytes.

        Yields
        ------
        memoryview
            Writable bytes, valid until the next chunk is requested.

        Raises
        ------
        CorruptImageError
            The stream is broken, or holds more or less than `virtual_size`.

        Notes
        -----
        A thread decompresses up to two chunks ahead.  It ends with the iterator, or
        when the iterator is closed.
        """
        if chunk_nbytes <= 0:
            raise ValueError(f"chunk_nbytes is {chunk_nbytes}: it must be positive")
        feeder = _Feeder(self._decoder(), min(chunk_nbytes, max(self.virtual_size, SECTOR_NBYTES)))
        total = 0
        feeder.begin()
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
                f"the stream holds {what} than the {self.virtual_size} bytes expected",
                path=self.path,
            )

    def close(self) -> None:
        """Close the file; more than once is allowed."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Feeder(threading.Thread):
    """Decompresses into buffers that this thread and the consumer exchange."""

    def __init__(self, decoder: Decoder, chunk_nbytes: int) -> None:
        super().__init__(name="imgcore-stream", daemon=True)
        self._decoder = decoder
        self._free: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[tuple[memoryview, int] | BaseException | None]
        self._filled = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._taken: memoryview | None = None
        self._is_alone = False
        self._lease = Lease(2)
        for _ in range(_N_BUFFERS):
            self._free.put(memoryview(bytearray(chunk_nbytes)))

    def begin(self) -> None:
        """Start the thread, or work in `take` if there is none for it."""
        self._is_alone = self._lease.n_threads == 1 or not started(self)

    def run(self) -> None:
        """Fill buffers until the stream ends or fails, or `stop` is called."""
        while self._fill_next():
            pass

    def _fill_next(self) -> bool:
        """Fill one buffer; False at the end."""
        view = self._free.get()
        if view is None or self._stopped.is_set():
            return False
        try:
            n = self._decoder.fill(view)
        except BaseException as error:
            self._filled.put(error)
            return False
        if n:
            self._filled.put((view, n))
        if n < len(view):
            self._filled.put(None)
            return False
        return True

    def take(self) -> memoryview | None:
        """Return the next chunk, None at the end; raises the thread's exception."""
        if self._is_alone and self._filled.empty():
            self._fill_next()
        item = self._filled.get()
        if isinstance(item, BaseException):
            raise item
        if item is None:
            return None
        self._taken = item[0]
        return item[0][: item[1]]

    def give_back(self) -> None:
        """Return the buffer of the last chunk, to be filled again."""
        self._free.put(self._taken)

    def stop(self) -> None:
        """End the thread and wait until it has finished its current chunk."""
        self._stopped.set()
        self._free.put(None)
        if not self._is_alone:
            self.join()
        self._lease.close()
