"""The clusters of a QCOW2 image that hold tables: guest data never goes there.

QEMU has the same rule (block/qcow2-refcount.c, "overlap checks").
Source: QEMU docs/interop/qcow2.rst.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING

import numpy as np

from imgcore import limits
from imgcore.errors import CorruptImageError
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.header import check_range, read_bitmaps, read_snapshots
from imgcore.formats.qcow2.tables import iter_l1

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.qcow2.header import Qcow2Header


class TableClusters:
    """Ranges of clusters that hold tables; they do not overlap.

    Snapshots' L2 tables and the data of bitmaps are not among them.

    Parameters
    ----------
    file, header
        The image.
    blocks : list of int
        Host offsets of the refcount blocks, or 0.

    Raises
    ------
    CorruptImageError
        Tables overlap, or are not where they can be.
    LimitExceededError
        As for the tables of the header.
    """

    def __init__(self, file: ByteSource, header: Qcow2Header, blocks: list[int]) -> None:
        bits = header.cluster_bits
        ranges = np.array(list(_fixed_ranges(file, header)), dtype=np.int64)
        single = np.concatenate((_l2_offsets(file, header), _offsets_of(blocks)))
        starts = np.concatenate((ranges[:, 0], single)) >> bits
        ends = -(-np.concatenate((ranges[:, 1], single + header.cluster_size)) >> bits)
        order = np.argsort(starts, kind="stable")
        starts, ends = starts[order], ends[order]
        twice = np.flatnonzero(starts[1:] < ends[:-1])
        if twice.size:
            raise CorruptImageError(
                f"cluster {starts[twice[0] + 1]} holds two tables",
                path=file.path,
                offset=int(starts[twice[0] + 1]) << bits,
            )
        self._starts = array("q", starts.tobytes())
        self._ends = array("q", ends.tobytes())

    @property
    def end(self) -> int:
        """The cluster after the last one that holds a table."""
        return self._ends[-1]

    def any_in(self, first: int, n: int) -> bool:
        """Tell whether one of the clusters ``[first, first + n)`` holds a table."""
        index = bisect_left(self._starts, first + n) - 1
        return index >= 0 and self._ends[index] > first

    def add(self, first: int, n: int) -> None:
        """Note that clusters hold a table from now on."""
        index = bisect_left(self._starts, first)
        self._starts.insert(index, first)
        self._ends.insert(index, first + n)

    def remove(self, first: int) -> None:
        """Note that the table which starts at a cluster is not used any more."""
        index = bisect_right(self._starts, first) - 1
        del self._starts[index], self._ends[index]


def _fixed_ranges(file: ByteSource, header: Qcow2Header) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of the header and all tables it leads to, in bytes.

    Refcount blocks and L2 tables are not among them.
    """
    entry_nbytes = layout.ENTRY_NBYTES
    yield 0, header.cluster_size
    if header.l1_entries:
        yield header.l1_offset, header.l1_offset + header.l1_entries * entry_nbytes
    start = header.refcount_table_offset
    yield start, start + header.refcount_table_clusters * header.cluster_size
    snapshots = read_snapshots(file, header)
    if snapshots:
        yield header.snapshots_offset, header.snapshots_offset + snapshots[-1].table_nbytes
    for snapshot in snapshots:
        nbytes = snapshot.l1_entries * entry_nbytes
        what = f"L1 table of snapshot {snapshot.info.identifier}"
        if nbytes > limits.QCOW2_MAX_L1_NBYTES:
            raise CorruptImageError(
                f"{what} takes {nbytes} bytes, allowed up to {limits.QCOW2_MAX_L1_NBYTES}",
                path=file.path,
            )
        if nbytes:
            check_range(file, header, what, snapshot.l1_offset, nbytes)
            yield snapshot.l1_offset, snapshot.l1_offset + nbytes
    if header.bitmaps is not None:
        _, start, nbytes = header.bitmaps
        yield start, start + nbytes
    for bitmap in read_bitmaps(file, header):
        nbytes = bitmap.table_entries * entry_nbytes
        if nbytes:
            what = f"table of bitmap {bitmap.name!r}"
            check_range(file, header, what, bitmap.table_offset, nbytes)
            yield bitmap.table_offset, bitmap.table_offset + nbytes


def _offsets_of(blocks: list[int]) -> NDArray[np.int64]:
    return np.array([offset for offset in blocks if offset], dtype=np.int64)


def _l2_offsets(file: ByteSource, header: Qcow2Header) -> NDArray[np.int64]:
    """Return the host offsets of all L2 tables of the disk."""
    parts = [np.zeros(0, np.int64)]
    impossible = np.uint64((header.cluster_size - 1) | layout.L1_RESERVED)
    for base, l1 in iter_l1(file, header.l1_offset, 0, header.l1_entries):
        offsets = (l1 & np.uint64(layout.OFFSET_MASK)).astype(np.int64)
        bad = (l1 & impossible) != 0
        bad |= (offsets != 0) & (offsets > file.nbytes - header.cluster_size)
        if bad.any():
            index = int(np.flatnonzero(bad)[0])
            raise CorruptImageError(
                f"L1 entry {base + index} ({int(l1[index]):#x}) is not of a table in the file",
                path=file.path,
                offset=header.l1_offset + (base + index) * layout.ENTRY_NBYTES,
            )
        parts.append(offsets[offsets != 0])
    return np.concatenate(parts)
