"""What a reader may ask of the file that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from imgcore._core import File
    from imgcore.files.identity import Identity


class ByteSource(Protocol):
    """Bytes with an address, open for reading; their number is fixed when they are opened.

    Formats, the engine and the streams know files by this interface only.  `HostFile`
    implements it.

    Notes
    -----
    Errors: an operation that fails in the system raises OSError with ``path`` as its file
    name, after errors that may pass have been retried (`imgcore.files.retry`).

    Threads: `pread`, `pread_into` and `next_data` may run in several threads at once, as no
    operation uses a position that another moves.  `close` must not run while any of them, or
    a job of the native engine, still uses the file.
    """

    @property
    def path(self) -> str:
        """The name as it was given; it stands in messages and need not exist."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes when the file was opened; for a block device, its capacity."""
        ...

    @property
    def identity(self) -> Identity:
        """What distinguishes the file from all others: equal only for the same file."""
        ...

    @property
    def is_block_device(self) -> bool:
        """Whether this is a block device, which has no holes and cannot be replaced."""
        ...

    @property
    def modified(self) -> int:
        """Unix seconds of the last change before the file was opened."""
        ...

    @property
    def share(self) -> bool:
        """Whether another process may be writing to the file: nothing is guaranteed then."""
        ...

    @property
    def allocated_nbytes(self) -> int:
        """Bytes that the host has allocated for the file by now; 0 for a block device.

        Fewer than `nbytes` if the file has holes.
        """
        ...

    @property
    def core(self) -> File:
        """The file as the native engine knows it; made on first use, closed by `close`."""
        ...

    def pread(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``offset`` on.

        Raises
        ------
        CorruptImageError
            The range does not lie inside the file: nothing is allocated for it, so that a
            length from an image's header may be passed unchecked.  Also if the file has
            become shorter.
        OSError
            The system cannot read it.
        ValueError
            A negative offset or length: the caller's mistake, never the image's.
        """
        ...

    def pread_into(self, offset: int, buffer: Any) -> None:
        """Fill a writable buffer with the bytes from ``offset`` on; errors as of `pread`."""
        ...

    def next_data(self, position: int) -> tuple[int, int]:
        """Return [start, end) of the next data at or after a place, ``start >= end`` for none.

        What lies before ``start`` is a hole: it reads as zeros and need not be read.  A file
        whose holes are not known is all data.  What the file has lost since it was opened
        counts as data: reading it must fail, where a hole would read as zeros.

        Raises
        ------
        OSError
            The system cannot tell.
        """
        ...

    def check_unchanged(self) -> None:
        """Raise ImgcoreError if the file has changed since it was opened.

        Size and time of modification are compared, and whether the name still is this
        file's; of a block device only the size.  A shared file may change.
        """
        ...

    def close(self) -> None:
        """Close the file, and `core` with it; more than once is allowed."""
        ...
