"""The interface of files that are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from imgcore._core import File
    from imgcore.files.identity import Identity


class ByteSource(Protocol):
    """A file that is open for reading at any offset; opening it fixes its size.

    Formats, the engine and the streams use files through this interface only.
    `HostFile` implements it.

    Notes
    -----
    Errors: if the system fails, an operation raises OSError with ``path`` as the file's
    name.  Errors that may pass are retried first (`imgcore.files.retry`).

    Threads: `pread`, `pread_into` and `next_data` may run in several threads at once;
    they do not use a file position.  `close` must not run while one of them, or a job
    of the native engine, still uses the file.
    """

    @property
    def path(self) -> str:
        """The name, as given; it appears in messages and need not exist."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes when the file was opened; for a block device, its capacity."""
        ...

    @property
    def identity(self) -> Identity:
        """Identifies the file: equal only for the same file."""
        ...

    @property
    def is_block_device(self) -> bool:
        """Whether this is a block device, which has no holes and cannot be replaced."""
        ...

    @property
    def logical_sector_nbytes(self) -> int | None:
        """Bytes of a block device's logical sector; None for other files."""
        ...

    @property
    def modified(self) -> int:
        """Unix seconds of the last change before the file was opened."""
        ...

    @property
    def share(self) -> bool:
        """Whether another process may be writing to the file."""
        ...

    @property
    def allocated_nbytes(self) -> int:
        """Bytes that the host has allocated for the file; 0 for a block device.

        A file with holes has fewer than `nbytes`.
        """
        ...

    @property
    def core(self) -> File:
        """The file for the native engine; created on first use, closed by `close`."""
        ...

    def pread(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes, starting at ``offset``.

        A length from an image's header may be passed unchecked: memory is allocated
        only if the range is inside the file.

        Raises
        ------
        CorruptImageError
            The range is not inside the file, or the file has become shorter.
        OSError
            The system cannot read the range.
        ValueError
            The offset or the length is negative, which is the caller's mistake.
        """
        ...

    def pread_into(self, offset: int, buffer: Any) -> None:
        """Fill a writable buffer with bytes from ``offset``; raises as `pread` does."""
        ...

    def next_data(self, position: int) -> tuple[int, int]:
        """Return (start, end) of the next data at or after ``position``.

        ``start >= end`` means that no data follows.  The bytes before ``start`` are a
        hole: they read as zeros and need not be read.  A file whose holes are not known
        is all data.  A part that the file has lost since it was opened counts as data,
        because reading it must fail; a hole would read as zeros.

        Raises
        ------
        OSError
            The system cannot find holes.
        """
        ...

    def check_unchanged(self) -> None:
        """Raise ImgcoreError if the file has changed since it was opened.

        The size and the time of modification are compared, and whether the name still
        refers to this file; for a block device only the size.  A file opened with
        `share` may change.
        """
        ...

    def close(self) -> None:
        """Close the file, and `core` with it; more than once is allowed."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """A `ByteSource` whose bytes come in order and stay for a while."""

    def look(self, offset: int, nbytes: int) -> memoryview:
        """Return bytes from ``offset`` on, which come next, without a copy.

        They are valid until the next call.  There may be fewer, and none, also if there
        are more to come: `pread` says what is wrong then.
        """
        ...
