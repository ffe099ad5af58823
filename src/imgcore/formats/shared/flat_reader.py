"""Reads disks that a host file stores unchanged: raw, flat extents, fixed images.

NumPy is imported only when extents are needed, so that ``info`` starts fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.engine.extents import Extents
    from imgcore.engine.kinds import ExtentRow, Kind
    from imgcore.files.byte_source import ByteSource

# Each row takes two system calls to find, so a small batch makes the first one come
# soon.
_BATCH_ROWS: Final = 1 << 14
_NO_DATA: Final = 1 << 63


class HostData:
    """Finds the data of a file.

    The last range is remembered, because the kernel may need long to find its end.
    """

    def __init__(self, file: ByteSource) -> None:
        self._file = file
        self._found = (0, 0)

    def next(self, position: int) -> tuple[int, int]:
        """Return [start, end) of the next data at or after a host offset.

        Both are 2^63 if no data follows.
        """
        start, end = self._found
        if not start <= position < end:
            start, end = self._file.next_data(position)
            if start >= end:
                return _NO_DATA, _NO_DATA
            self._found = start, end
        return max(start, position), end

    def next_sectors(self, position: int, stop: int, shift: int) -> tuple[int, int]:
        """Return the next data of a guest range as [start, end) of the guest.

        Parameters
        ----------
        position, stop : int
            Guest offsets in bytes.  Both results are ``stop`` if no data follows.
        shift : int
            Host offset minus guest offset, in bytes.

        Notes
        -----
        Data is widened to whole sectors of the guest, which need not be sectors of the
        file; a file system's blocks may be smaller.  Holes read as zeros, so this is
        safe.  The file's last sector may be incomplete.
        """
        start, end = self.next(position + shift)
        if start >= end or start - shift >= stop:
            return stop, stop
        start, end = start - shift, end - shift
        start -= start % SECTOR_NBYTES
        end = min(end + -end % SECTOR_NBYTES, self._file.nbytes - shift, stop)
        return max(start, position), end


def flat_ranges(
    data: HostData, start: int, stop: int, shift: int
) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, end, whether it has data) of the parts of a guest range.

    The parameters are those of `flat_rows`.
    """
    position = start
    while position < stop:
        data_start, data_end = data.next_sectors(position, stop, shift)
        if position < data_start:
            yield position, data_start, False
        if data_start < data_end:
            yield data_start, data_end, True
        position = data_end


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
    """Yield batches for guest range [start, stop), which a file stores unchanged.

    Parameters
    ----------
    data : HostData
        Finds the file's data.
    start, stop : int
        Guest offsets in bytes, ``start < stop``.  What the file's last sector lacks is
        a hole.
    shift : int
        Host offset minus guest offset, in bytes.
    file_index : int
        Index of the file in ``Reader.sources``.
    hole : Kind
        Kind of the file's holes: HOLE, or ZERO if they hide the parent's data.
    max_rows : int
        Most rows in a batch; at least 2.
    """
    import numpy as np

    from imgcore.engine.extents import EXTENT_DTYPE, Kind

    rows: list[ExtentRow] = []
    for first, last, has_data in flat_ranges(data, start, stop, shift):
        if has_data:
            nbytes = last - first
            rows.append((first, nbytes, first + shift, nbytes, file_index, Kind.DATA, 0))
        else:
            rows.append((first, last - first, 0, 0, 0, hole, 0))
        # The rest of an incomplete last sector belongs to its batch.
        is_full = len(rows) >= max_rows - 1 and last % SECTOR_NBYTES == 0
        if is_full or last >= stop:
            yield np.array(rows, dtype=EXTENT_DTYPE)
            rows.clear()


class FlatExtents:
    """Finds the extents of a disk, or part of one, that a file stores unchanged.

    Parameters
    ----------
    file : ByteSource
    shift, file_index : int
        As for `flat_rows`.
    hides_parent : bool
        Whether holes of the file read as zeros even if there is a parent.
    lost_from : int, optional
        Guest offset from which on the file is too short, as `first_lost` returns it:
        the rest is LOST.

    Notes
    -----
    The file system is asked range by range, so that the first batch comes at once even
    for a large disk.  If it does not know holes, everything is DATA.
    """

    def __init__(
        self,
        file: ByteSource,
        *,
        shift: int = 0,
        file_index: int = 0,
        hides_parent: bool = True,
        lost_from: int | None = None,
    ) -> None:
        self._file = file
        self._shift = shift
        self._file_index = file_index
        self._hides_parent = hides_parent
        self._lost_from = lost_from

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches; see `imgcore.formats.api.Reader.extents`."""
        from imgcore.engine.extents import Kind

        stop = held_to = start + length
        if self._lost_from is not None:
            held_to = min(stop, max(start, self._lost_from))
        if start < held_to:
            yield from flat_rows(
                HostData(self._file),
                start,
                held_to,
                shift=self._shift,
                file_index=self._file_index,
                hole=Kind.ZERO if self._hides_parent else Kind.HOLE,
                max_rows=_BATCH_ROWS,
            )
        if held_to < stop:
            yield lost_file(held_to, stop - held_to)


def first_lost(guest_base: int, nbytes: int, held_nbytes: int) -> int | None:
    """Return where a flat extent is lost that is longer than its file, or None.

    Parameters
    ----------
    guest_base, nbytes : int
        Where the extent is on the disk, in bytes.
    held_nbytes : int
        How much of it is in the file.  A sector that is not whole is lost.
    """
    if nbytes <= held_nbytes:
        return None
    return guest_base + held_nbytes - held_nbytes % SECTOR_NBYTES


def lost_file(start: int, length: int) -> Extents:
    """Return one LOST row for a guest range whose file is missing or too short."""
    from imgcore.engine.extents import FLAG_NO_FILE, Kind, single

    row = single(start, length, Kind.LOST)
    row["flags"] = FLAG_NO_FILE
    return row
