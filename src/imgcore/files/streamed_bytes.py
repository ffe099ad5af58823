"""What every stream answers where a reader of headers and tables asks a file."""

from __future__ import annotations

from typing import Any, Final


class StreamedBytes:
    """The members of a `ByteSource` that are the same for all streams."""

    is_block_device: Final = False
    logical_sector_nbytes: Final = None
    modified: Final = 0
    share: Final = True
    allocated_nbytes: Final = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the stream; see `ByteSource.nbytes`."""
        raise NotImplementedError

    def pread(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes; see `ByteSource.pread`."""
        raise NotImplementedError

    def pread_into(self, offset: int, buffer: Any) -> None:
        """Fill a writable buffer; raises as `pread` does."""
        with memoryview(buffer) as view, view.cast("B") as octets:
            octets[:] = self.pread(offset, len(octets))

    def next_data(self, position: int) -> tuple[int, int]:
        """Return that all is data; see `ByteSource.next_data`."""
        return position, self.nbytes

    def check_unchanged(self) -> None:
        """Do nothing: what was taken cannot change."""
