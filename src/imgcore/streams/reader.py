"""Reads compressed raw disks: ``disk.raw.zst`` and ``disk.raw.gz``.

A stream has no random access, so a helper thread reads its content once, in order.
Memory stays bounded, whatever a stream claims or contains.
"""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING, Final

from imgcore.errors import CorruptImageError, WrongFormatError
from imgcore.files.host_file import HostFile
from imgcore.limits import MIB, SECTOR_NBYTES
from imgcore.streams.codecs import CODECS
from imgcore.streams.decoder import OrderedInput
from imgcore.streams.feeder import MIN_BUFFERS, filled

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from typing import Self

    from imgcore.streams.decoder import Decoder


_COUNT_NBYTES: Final = 1 * MIB


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
        return CODECS[self.codec].decoder(OrderedInput(self.file))

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
        A thread decompresses ahead.  It ends with the iterator, or when the iterator is
        closed.
        """
        if chunk_nbytes <= 0:
            raise ValueError(f"chunk_nbytes is {chunk_nbytes}: it must be positive")
        nbytes = min(chunk_nbytes, max(self.virtual_size, SECTOR_NBYTES))
        buffers = [memoryview(bytearray(nbytes)) for _ in range(MIN_BUFFERS)]
        for number, n in self.fill(buffers):
            yield buffers[number][:n]

    @property
    def nbytes(self) -> int:
        """The same as `virtual_size`."""
        return self.virtual_size

    def fill(self, buffers: Sequence[memoryview]) -> Generator[tuple[int, int], None, None]:
        """Fill buffers with the disk's content in order; see `feeder.filled`.

        Raises
        ------
        CorruptImageError
            The stream is broken, or holds more or less than `virtual_size`.
        """
        total = 0
        with closing(filled(self._decoder().fill, buffers)) as chunks:
            for number, n in chunks:
                total += n
                if total > self.virtual_size:
                    break
                yield number, n
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
