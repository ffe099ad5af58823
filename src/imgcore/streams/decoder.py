"""The interface of stream decoders, and the input that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource

READ_NBYTES: Final = 256 * 1024


class Input(Protocol):
    """Compressed bytes in order."""

    @property
    def path(self) -> str:
        """The name of their file in messages."""
        ...

    def read(self, nbytes: int, /) -> bytes:
        """Return the next bytes, at most so many; none at the end."""
        ...


class Decoder(Protocol):
    """Decompresses a stream from its start, in order."""

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
        self.path: str = file.path
        self._offset = 0

    def read(self, nbytes: int, /) -> bytes:
        """Return the next bytes of the file."""
        left = self._file.nbytes - self._offset
        data = self._file.pread(self._offset, min(left, nbytes))
        self._offset += len(data)
        return data


class MembersDecoder:
    """Decompresses a stream of members that follow each other; a `Decoder`."""

    def __init__(self, source: Input) -> None:
        self._path = source.path
        self._input = source
        # Bytes that were read and belong to no member yet.
        self._pending = b""
        self._member: Any = None
        self._n_members = 0

    def fill(self, view: memoryview) -> int:
        """Decompress until the view is full or the stream ends."""
        done = 0
        while done < len(view):
            if self._member is None:
                self._member = self._next_member()
                if self._member is None:
                    break
                self._n_members += 1
            data = self._decompress(len(view) - done)
            view[done : done + len(data)] = data
            done += len(data)
        return done

    def _next_member(self) -> Any:
        """Return a decompressor for the next member; None at the end of the stream."""
        raise NotImplementedError

    def _decompress(self, room: int) -> bytes:
        """Return the member's next bytes, at most ``room``; end it at its end."""
        raise NotImplementedError
