"""The first and the last bytes of an image that came in order, as a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from imgcore.errors import UnsupportedFeatureError, WrongFormatError

if TYPE_CHECKING:
    from imgcore._core import File
    from imgcore.files.identity import Identity


class Ends:
    """A `ByteSource` of which only both ends can be read; nothing needs closing.

    Parameters
    ----------
    path : str
    head, tail : bytes
        Its first and last bytes.
    nbytes : int
        Its size.
    """

    is_block_device: Final = False
    logical_sector_nbytes: Final = None
    modified: Final = 0
    share: Final = True
    allocated_nbytes: Final = 0

    def __init__(self, path: str, head: bytes, tail: bytes, nbytes: int) -> None:
        self.path: str = path
        self.nbytes: int = nbytes
        self._parts = ((0, head), (nbytes - len(tail), tail))

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

    def pread_into(self, offset: int, buffer: Any) -> None:
        """Fill a writable buffer."""
        with memoryview(buffer) as view, view.cast("B") as octets:
            octets[:] = self.pread(offset, len(octets))

    def next_data(self, position: int) -> tuple[int, int]:
        """Return that all is data."""
        return position, self.nbytes

    def check_unchanged(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
