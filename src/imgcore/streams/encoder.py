"""The interface of stream encoders, and the output that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from typing import Self

    from imgcore.files.target_file import TargetFile


class Boundary(NamedTuple):
    """A place at which another encoder can go on.

    Attributes
    ----------
    nbytes : int
        Bytes of the input before it.
    written_nbytes : int
        Bytes of the file before it.
    crc : int
        CRC-32C of these.
    state : tuple of int
        What the end of the stream depends on.
    """

    nbytes: int
    written_nbytes: int
    crc: int
    state: tuple[int, ...]


class Encoder(Protocol):
    """Compresses bytes, given in order, into a file.

    A context manager: leaving it ends its threads, even before `finish`.

    Attributes
    ----------
    unit_nbytes : int
        Boundaries are at multiples of it.
    lead_nbytes : int
        So much of the input before a boundary is needed to go on there.
    """

    unit_nbytes: int
    lead_nbytes: int

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

    def mark(self) -> None:
        """Ask for a boundary here, if it must be made; the input is whole units."""
        ...

    def boundary(self) -> Boundary | None:
        """Return the last boundary up to which all is written, None without one."""
        ...

    def go_on(self, boundary: Boundary, before: memoryview) -> bytes:
        """Begin where another encoder was, instead of at the start.

        Parameters
        ----------
        boundary : Boundary
        before : memoryview
            The input before it: `lead_nbytes`, or all of it.

        Returns
        -------
        bytes
            What the last unit before it is encoded to.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class OrderedOutput:
    """Writes a file from its start, in order; the caller closes the file.

    Attributes
    ----------
    nbytes : int
        Bytes so far.
    crc : int
        Their CRC-32C.
    """

    def __init__(self, file: TargetFile) -> None:
        self._file = file
        self.nbytes: int = 0
        self.crc: int = 0

    @property
    def path(self) -> str:
        """The file's name."""
        return self._file.path

    def write(self, data: bytes) -> None:
        """Write the next bytes."""
        # Loaded late: info does without the core.
        from imgcore._core import crc32c

        if data:
            self._file.pwrite(self.nbytes, data)
            self.nbytes += len(data)
            self.crc = crc32c(data, self.crc)

    def go_on(self, boundary: Boundary) -> None:
        """Write from a boundary on."""
        self.nbytes, self.crc = boundary.written_nbytes, boundary.crc
