"""Disks that lie in a host file as they are, read: raw, flat extents, fixed images.

NumPy is imported only when extents are asked for, so that ``info`` starts fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.engine.extents import Extents, Kind
    from imgcore.files.byte_source import ByteSource

# Each row costs two system calls to find; small batches keep the first one quick to come.
_BATCH_ROWS: Final = 1 << 14
_NO_DATA: Final = 1 << 63


class HostData:
    """Finds the data of a file.

    The data found last is remembered: to find its end may take the kernel long.
    """

    def __init__(self, file: ByteSource) -> None:
        self._file = file
        self._found = (0, 0)

    def next(self, position: int) -> tuple[int, int]:
        """Return [start, end) of the next data at or after a place; 2^63 if there is none.

        Data is widened to whole sectors: a file system's blocks may be smaller, and holes read
        as zeros.
        """
        start, end = self._found
        if not start <= position < end:
            start, end = self._file.next_data(position)
            if start >= end:
                return _NO_DATA, _NO_DATA
            start -= start % SECTOR_NBYTES
            end += -end % SECTOR_NBYTES
            self._found = start, end
        return max(start, position), end


def flat_rows(
    data: HostData,
    start: int,
    stop: int,
    *,
    shift: int = 0,
    file_index: int = 0,
    hole: Kind,
    max_rows: int,
) -> Iterator[Extents]:
    """Yield batches for guest range [start, stop), which lies in a file as it is.

    Parameters
    ----------
    data : HostData
        Of the file.
    start, stop : int
        Bytes of the disk, ``start < stop``.
    shift : int
        What is added to a place on the disk to find it in the file.
    file_index : int
        Of the file in the reader's sources.
    hole : Kind
        What a hole of the file is: HOLE, or ZERO where it hides what a parent has there.
    max_rows : int
        Of a batch; at least 2.
    """
    import numpy as np

    from imgcore.engine.extents import EXTENT_DTYPE, Kind

    rows: list[tuple[int, int, int, int, int, int, int]] = []
    position = start
    while position < stop:
        data_start, data_end = (min(place - shift, stop) for place in data.next(position + shift))
        if position < data_start:
            rows.append((position, data_start - position, 0, 0, 0, hole, 0))
        if data_start < data_end:
            nbytes = data_end - data_start
            host_offset = data_start + shift
            rows.append((data_start, nbytes, host_offset, nbytes, file_index, Kind.DATA, 0))
        position = data_end
        if len(rows) >= max_rows - 1 or position >= stop:
            yield np.array(rows, dtype=EXTENT_DTYPE)
            rows.clear()


class FlatExtents:
    """Finds the extents of a range of the disk that lies in a file as it is.

    Parameters
    ----------
    file : ByteSource
    shift, file_index : int
        As `flat_rows` takes them.
    hides_parent : bool
        Whether holes of the file are explicit zeros.

    Notes
    -----
    The file system is asked range by range, so that a batch comes at once however large the
    disk.  One that cannot tell holes says that all is data.
    """

    def __init__(
        self, file: ByteSource, *, shift: int = 0, file_index: int = 0, hides_parent: bool = True
    ) -> None:
        self._file = file
        self._shift = shift
        self._file_index = file_index
        self._hides_parent = hides_parent

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches; see :meth:`imgcore.formats.api.Reader.extents`."""
        from imgcore.engine.extents import Kind

        return flat_rows(
            HostData(self._file),
            start,
            start + length,
            shift=self._shift,
            file_index=self._file_index,
            hole=Kind.ZERO if self._hides_parent else Kind.HOLE,
            max_rows=_BATCH_ROWS,
        )
