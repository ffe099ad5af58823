"""Raw images: files and block devices whose bytes are the guest's, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Final

from imgcore.engine.sources import SourceFile
from imgcore.errors import CorruptImageError
from imgcore.formats.api import CheckReport
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.api import BackingReference


# Each row costs two system calls to find; small batches keep the first one quick to come.
_BATCH_ROWS: Final = 1 << 14


class RawReader:
    """Reads a raw file or block device; closes it when it is closed itself."""

    format_name: ClassVar[str] = "raw"
    is_flat: ClassVar[bool] = True

    def __init__(self, file: ByteSource) -> None:
        if file.nbytes % SECTOR_NBYTES:
            wanted = -(-file.nbytes // SECTOR_NBYTES) * SECTOR_NBYTES
            raise CorruptImageError(
                f"a raw disk has a multiple of {SECTOR_NBYTES} bytes, this file has {file.nbytes}: "
                f"pad a copy of it (truncate -s {wanted})",
                path=file.path,
            )
        self.file = file
        self.subformat: str | None = None
        self.virtual_size = file.nbytes
        self.block_nbytes = SECTOR_NBYTES
        self.sources = (SourceFile(file),)
        self.backing: BackingReference | None = None
        self.identities: Mapping[str, str] = {}

    def plan(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches of DATA and HOLE; see `imgcore.formats.api.Reader.plan`.

        Notes
        -----
        Asks the file system range by range while it goes on, so that a batch comes at once
        however large the disk.  A file system that cannot tell holes says that all is data.
        """
        import numpy as np

        from imgcore.engine.extents import EXTENT_DTYPE, Kind

        end = start + length
        position = start
        rows: list[tuple[int, int, int, int, int, int, int]] = []
        while position < end:
            data_start, data_end = self._next_data(position, end)
            if data_start > position:
                rows.append((position, data_start - position, 0, 0, 0, Kind.HOLE, 0))
            if data_end > data_start:
                nbytes = data_end - data_start
                rows.append((data_start, nbytes, data_start, nbytes, 0, Kind.DATA, 0))
            position = data_end
            if len(rows) >= _BATCH_ROWS:
                yield np.array(rows, dtype=EXTENT_DTYPE)
                rows.clear()
        if rows:
            yield np.array(rows, dtype=EXTENT_DTYPE)

    def _next_data(self, position: int, end: int) -> tuple[int, int]:
        """Return the next range of data in [position, end), empty at the end if there is none."""
        data_start, data_end = self.file.next_data(position)
        if data_start >= data_end or data_start >= end:
            return end, end
        # Whole sectors: a file system's blocks may be smaller, and holes read as zeros.
        data_start = max(data_start // SECTOR_NBYTES * SECTOR_NBYTES, position)
        data_end = -(-data_end // SECTOR_NBYTES) * SECTOR_NBYTES
        return data_start, min(max(data_end, data_start + SECTOR_NBYTES), end)

    def info(self) -> dict[str, Any]:
        """Return what is specific to the format: nothing."""
        return {}

    def check(self) -> CheckReport:
        """Return an empty report: a raw disk has no tables."""
        return CheckReport()

    def close(self) -> None:
        """Close the file."""
        self.file.close()
