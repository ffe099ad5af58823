"""Reads compressed raw disks: ``disk.raw.zst`` and ``disk.raw.gz``.

A stream has no random access: a helper thread reads its content once, in order.  Memory stays
bounded whatever a stream claims or holds.
"""

from __future__ import annotations

import os
import queue
import threading
from typing import TYPE_CHECKING, Final

from imgcore.errors import CorruptImageError, WrongFormatError
from imgcore.files.host_file import HostFile
from imgcore.limits import MIB, SECTOR_NBYTES
from imgcore.streams.codecs import CODECS

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Self

    from imgcore.streams.decoder import Decoder


_COUNT_NBYTES: Final = 1 * MIB
# One chunk with the consumer, two ahead of it.
_N_BUFFERS: Final = 3


class StreamReader:
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

    def close(self) -> None:
        """Close the file; more than once is allowed."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Feeder(threading.Thread):
    """Decompresses into a few buffers that go round between this thread and the consumer."""

    def __init__(self, decoder: Decoder, chunk_nbytes: int) -> None:
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
