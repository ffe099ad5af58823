"""The interface of stream decoders, and the input that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource

READ_NBYTES: Final = 256 * 1024


class Decoder(Protocol):
    """Decompresses a file from its start, in order."""

    def fill(self, view: memoryview) -> int:
        """Decompress until the view is full or the stream ends.

        Returns
        -------
        int
            Bytes filled.
        """
        ...


class OrderedInput:
    """Reads a file from its start, in order."""

    def __init__(self, file: ByteSource) -> None:
        self._file = file
        self._offset = 0

    def read(self, nbytes: int = -1) -> bytes:
        left = self._file.nbytes - self._offset
        data = self._file.pread(self._offset, min(left, READ_NBYTES if nbytes < 0 else nbytes))
        self._offset += len(data)
        return data
