"""The interface of stream encoders, and the output that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from typing import Self

    from imgcore.files.target_file import TargetFile


class Encoder(Protocol):
    """Compresses bytes, given in order, into a file.

    A context manager: leaving it ends its threads, even before `finish`.
    """

    @property
    def written_nbytes(self) -> int:
        """Bytes written to the file so far."""
        ...

    def write(self, buffer: Any) -> None:
        """Compress the next bytes; raises OSError with the file's name."""
        ...

    def finish(self) -> None:
        """End the stream; the file is then complete but not synced."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class OrderedOutput:
    """Writes a file from its start, in order; the caller closes the file."""

    def __init__(self, file: TargetFile) -> None:
        self._file = file
        self.nbytes: int = 0

    @property
    def path(self) -> str:
        """The file's name."""
        return self._file.path

    def write(self, data: bytes) -> None:
        """Write the next bytes."""
        if data:
            self._file.pwrite(self.nbytes, data)
            self.nbytes += len(data)
