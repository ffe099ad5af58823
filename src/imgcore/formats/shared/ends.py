"""The first and the last bytes of an image that came in order, as a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore.errors import UnsupportedFeatureError, WrongFormatError
from imgcore.files.streamed_bytes import StreamedBytes

if TYPE_CHECKING:
    from imgcore._core import File
    from imgcore.files.identity import Identity


class Ends(StreamedBytes):
    """A `ByteSource` of which only both ends can be read; nothing needs closing.

    Parameters
    ----------
    path : str
    head, tail : bytes
        Its first and last bytes.
    nbytes : int
        Its size.
    """

    def __init__(self, path: str, head: bytes, tail: bytes, nbytes: int) -> None:
        self.path: str = path
        self._nbytes = nbytes
        self._parts = ((0, head), (nbytes - len(tail), tail))

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self._nbytes

    @property
    def identity(self) -> Identity:
        """Equal to that of no file."""
        return (-3, id(self))

    @property
    def core(self) -> File:
        """Not there."""
        raise UnsupportedFeatureError("the middle of a stream is not kept", path=self.path)

    def pread(self, offset: int, length: int) -> bytes:
        """Return bytes of one of the ends; see `ByteSource`.

        Raises
        ------
        WrongFormatError
            They are in the middle: what is looked for is not at the ends.
        """
        for start, content in self._parts:
            if start <= offset and offset + length <= start + len(content):
                return content[offset - start : offset - start + length]
        raise WrongFormatError(
            f"{length} bytes at 0x{offset:x} are not at the ends of the stream",
            path=self.path,
            offset=offset,
        )

    def close(self) -> None:
        """Do nothing."""
