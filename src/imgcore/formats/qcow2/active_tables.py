"""The L1 table and the L2 tables of a QCOW2 image that is written in place.

Source: QEMU docs/interop/qcow2.rst, "Cluster mapping".
"""

from __future__ import annotations

import struct
from array import array
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore import limits
from imgcore.errors import CorruptImageError
from imgcore.files.update_file import Step
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.tables import iter_l1, packed_ranges
from imgcore.formats.shared.alignment import align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.qcow2.allocation import HostClusters
    from imgcore.formats.qcow2.header import Qcow2Header

# L2 tables that are kept in memory.
_KEPT_NBYTES: Final = 16 * limits.MIB


class ActiveTables:
    """Reads and changes entries; clusters of the disk are known by their numbers.

    An L2 table that a snapshot has as well is copied before it changes.  The clusters
    of its entries have been counted for both since the snapshot was taken.

    Only this object changes the tables while it is used.
    """

    def __init__(self, file: UpdateFile, header: Qcow2Header, clusters: HostClusters) -> None:
        self._file = file
        self._header = header
        self._clusters = clusters
        self._per_table = header.l2_entries
        self._l1 = array("Q")
        for _, entries in iter_l1(file, header.l1_offset, 0, header.l1_entries):
            self._l1.frombytes(entries.tobytes())
        # Contents by host offset, the oldest first; and tables that only the disk has.
        self._kept: dict[int, bytearray] = {}
        self._own: set[int] = set()

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of clusters ``[first, last)`` that one L2 table describes."""
        while first < last:
            stop = min(last, (first // self._per_table + 1) * self._per_table)
            yield first, stop
            first = stop

    def existing_pieces(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield as `pieces` those whose L2 table exists."""
        per_table = self._per_table
        for index in range(first // per_table, min(-(-last // per_table), len(self._l1))):
            if self._l1[index] and first < last:
                yield max(first, index * per_table), min(last, (index + 1) * per_table)

    def entries(self, first: int, last: int) -> tuple[int, ...]:
        """Return the entries of clusters ``[first, last)`` of one L2 table."""
        index, at = divmod(first, self._per_table)
        if not self._l1[index]:
            return (0,) * (last - first)
        return struct.unpack_from(
            f">{last - first}Q", self._content(self.table_offset(index)), at * layout.ENTRY_NBYTES
        )

    def array(self, first: int, last: int) -> NDArray[np.uint64]:
        """Return the same entries as an array."""
        index, at = divmod(first, self._per_table)
        if not self._l1[index]:
            return np.zeros(last - first, np.uint64)
        content = self._content(self.table_offset(index))
        return np.frombuffer(content, ">u8", last - first, at * layout.ENTRY_NBYTES).astype(
            np.uint64
        )

    def put(self, first: int, data: bytes) -> None:
        """Change the entries of clusters from ``first`` on, of one L2 table."""
        table = self.make_writable(first)
        start = first % self._per_table * layout.ENTRY_NBYTES
        end = start + len(data)
        content = self._content(table)
        content[start:end] = data
        # Whole sectors, so that the file need not be read.
        start, end = start - start % limits.SECTOR_NBYTES, align_up(end, limits.SECTOR_NBYTES)
        try:
            self._file.put(table + start, content[start:end], Step.REFERENCE)
        except BaseException:
            del self._kept[table]
            raise

    def make_writable(self, cluster: int) -> int:
        """Return the host offset of a cluster's L2 table, which only the disk has."""
        index = cluster // self._per_table
        old = self.table_offset(index)
        if old in self._own:
            return old
        bits, clusters = self._header.cluster_bits, self._clusters
        count = clusters.counts.count(old >> bits) if old else 0
        if old and count == 1 and self._l1[index] & layout.COPIED:
            self._own.add(old)
            return old
        if old and not count:
            raise CorruptImageError(
                f"the L2 table at {old:#x} has a refcount of 0: imgcore check -r all corrects it",
                path=self._file.path,
                offset=old,
            )
        new, _ = clusters.take(1)
        offset = new << bits
        if old:
            self._file.pwrite(offset, self._file.pread(old, self._header.cluster_size))
        else:
            clusters.clear(new)
        clusters.tables.add(new, 1)
        self.put_l1(index, offset | layout.COPIED)
        self._own.add(offset)
        if old:
            self.release_table(old)
        return offset

    def put_l1(self, index: int, entry: int) -> None:
        """Change an entry of the L1 table."""
        place = self._header.l1_offset + index * layout.ENTRY_NBYTES
        self._file.put(place, entry.to_bytes(layout.ENTRY_NBYTES, "big"), Step.REFERENCE)
        self._l1[index] = entry

    def grow_l1(self, n_entries: int) -> None:
        """Note that the L1 table is longer."""
        self._l1.extend([0] * (n_entries - len(self._l1)))

    def release_table(self, offset: int) -> None:
        """Free an L2 table that no entry of the L1 table refers to any more."""
        cluster = offset >> self._header.cluster_bits
        self._clusters.tables.remove(cluster)
        self._clusters.release(np.array([cluster]))
        self._kept.pop(offset, None)
        self._own.discard(offset)

    def table_offset(self, index: int) -> int:
        """Return the host offset of an L2 table, 0 if it does not exist."""
        return self._l1[index] & layout.OFFSET_MASK

    def _content(self, offset: int) -> bytearray:
        """Return an L2 table, which is kept for later uses."""
        kept = self._kept.pop(offset, None)
        if kept is None:
            while self._kept and len(self._kept) * self._header.cluster_size >= _KEPT_NBYTES:
                del self._kept[next(iter(self._kept))]
            kept = bytearray(self._file.pread(offset, self._header.cluster_size))
        self._kept[offset] = kept
        return kept


def clusters_of(entries: NDArray[np.uint64], cluster_bits: int) -> NDArray[np.int64]:
    """Return the host clusters that L2 entries refer to, each as often as they do."""
    packed = (entries & np.uint64(layout.COMPRESSED)) != 0
    plain = (entries[~packed] & np.uint64(layout.OFFSET_MASK)).astype(np.int64)
    parts = [plain[plain != 0] >> cluster_bits]
    if packed.any():
        begin, end = packed_ranges(entries[packed], cluster_bits)
        cluster, last = begin >> cluster_bits, (end - 1) >> cluster_bits
        while cluster.size:
            parts.append(cluster)
            goes_on = cluster < last
            cluster, last = cluster[goes_on] + 1, last[goes_on]
    return np.concatenate(parts)
