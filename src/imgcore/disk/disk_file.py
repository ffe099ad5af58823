"""A range of an open image as a file of Python."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, NoReturn, Protocol, SupportsIndex

from imgcore.border import integer

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


class Disk(Protocol):
    """An open disk; see `Image`, which is one."""

    @property
    def path(self) -> str: ...
    @property
    def virtual_size(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    def read(self, offset: int, length: int, /) -> bytes: ...
    def readinto(self, offset: int, buffer: memoryview, /) -> int: ...


class DiskFile(io.RawIOBase):
    """A range of a disk, to be read at a position that moves.

    Parameters
    ----------
    image : Disk
        It stays open when this file is closed.
    start : int
        Bytes.
    length : int, optional
        Bytes; up to the end of the disk, also after it has grown, if None.
    """

    def __init__(self, image: Disk, start: int, length: int | None) -> None:
        self._image = image
        self._start = start
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: SupportsIndex, whence: SupportsIndex = os.SEEK_SET, /) -> int:
        offset, whence = integer(offset, "offset"), integer(whence, "whence")
        nbytes = self._nbytes()
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: nbytes}
        if whence not in bases:
            raise ValueError(f"whence is {whence}: 0, 1 or 2 is allowed")
        position = bases[whence] + offset
        if position < 0:
            raise ValueError(f"the position {position} is before the start of the file")
        self._position = position
        return position

    def tell(self) -> int:
        self._nbytes()
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        left = max(self._nbytes() - self._position, 0)
        with memoryview(buffer) as view:
            if not left or not view.nbytes:
                return 0
            with view.cast("B") as octets, octets[:left] as part:
                n_read = self._image.readinto(self._start + self._position, part)
        self._position += n_read
        return n_read

    def readall(self) -> bytes:
        left = max(self._nbytes() - self._position, 0)
        data = self._image.read(self._start + self._position, left) if left else b""
        self._position += len(data)
        return data

    def write(self, _: ReadableBuffer, /) -> NoReturn:
        raise io.UnsupportedOperation("a disk is only read")

    def _nbytes(self) -> int:
        """Return the bytes of the file now; ValueError if it or the image is closed."""
        if self.closed:
            raise ValueError("the file is closed")
        if self._image.closed:
            raise ValueError(f"{self._image.path}: the image is closed")
        left = max(self._image.virtual_size - self._start, 0)
        return left if self._length is None else min(left, self._length)

    def __reduce__(self) -> NoReturn:
        """Reject copies: a file has one position."""
        raise TypeError(f"{self!r} cannot be copied or pickled")

    def __repr__(self) -> str:
        return f"<DiskFile of {self._image!r} from {self._start}>"
