"""The L1 table and the L2 tables of a QCOW2 image that is written in place.

Source: QEMU docs/interop/qcow2.rst, "Cluster mapping".
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np

from imgcore.errors import CorruptImageError
from imgcore.files.update_file import Step
from imgcore.formats.qcow2 import layout

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.qcow2.allocation import HostClusters
    from imgcore.formats.qcow2.header import Qcow2Header


class ActiveTables:
    """Reads and changes entries; clusters of the disk are known by their numbers.

    An L2 table that a snapshot has as well is copied before it changes.  The clusters
    of its entries have been counted for both since the snapshot was taken.
    """

    def __init__(self, file: UpdateFile, header: Qcow2Header, clusters: HostClusters) -> None:
        self._file = file
        self._header = header
        self._clusters = clusters
        self._per_table = header.l2_entries

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of clusters ``[first, last)`` that one L2 table describes."""
        while first < last:
            stop = min(last, (first // self._per_table + 1) * self._per_table)
            yield first, stop
            first = stop

    def existing_pieces(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield as `pieces` those whose L2 table exists."""
        from imgcore.formats.qcow2.tables import iter_l1

        per_table = self._per_table
        end = min(-(-last // per_table), self._header.l1_entries) if first < last else 0
        for base, l1 in iter_l1(self._file, self._header.l1_offset, first // per_table, end):
            for index in (np.flatnonzero(l1) + base).tolist():
                yield max(first, index * per_table), min(last, (index + 1) * per_table)

    def entries(self, first: int, last: int) -> tuple[int, ...]:
        """Return the entries of clusters ``[first, last)`` of one L2 table."""
        raw = self._read(first, last)
        return struct.unpack(f">{last - first}Q", raw)

    def array(self, first: int, last: int) -> NDArray[np.uint64]:
        """Return the same entries as an array."""
        return np.frombuffer(self._read(first, last), ">u8").astype(np.uint64)

    def put(self, first: int, data: bytes) -> None:
        """Change the entries of clusters from ``first`` on, of one L2 table."""
        table = self.make_writable(first)
        self._file.put(table + first % self._per_table * layout.ENTRY_NBYTES, data, Step.REFERENCE)

    def make_writable(self, cluster: int) -> int:
        """Return the host offset of a cluster's L2 table, which only the disk has."""
        index = cluster // self._per_table
        entry = self._l1_entry(index)
        old = self._offset(index, entry)
        bits, clusters = self._header.cluster_bits, self._clusters
        count = clusters.counts.count(old >> bits) if old else 0
        if old and count == 1 and entry & layout.COPIED:
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
        if old:
            self.release_table(old)
        return offset

    def put_l1(self, index: int, entry: int) -> None:
        """Change an entry of the L1 table."""
        place = self._header.l1_offset + index * layout.ENTRY_NBYTES
        self._file.put(place, entry.to_bytes(layout.ENTRY_NBYTES, "big"), Step.REFERENCE)

    def release_table(self, offset: int) -> None:
        """Free an L2 table that no entry of the L1 table refers to any more."""
        cluster = offset >> self._header.cluster_bits
        self._clusters.tables.remove(cluster)
        self._clusters.release(np.array([cluster]))

    def table_offset(self, index: int) -> int:
        """Return the host offset of an L2 table, 0 if it does not exist."""
        return self._offset(index, self._l1_entry(index))

    def _read(self, first: int, last: int) -> bytes:
        table = self.table_offset(first // self._per_table)
        nbytes = (last - first) * layout.ENTRY_NBYTES
        if not table:
            return bytes(nbytes)
        return self._file.pread(table + first % self._per_table * layout.ENTRY_NBYTES, nbytes)

    def _l1_entry(self, index: int) -> int:
        place = self._header.l1_offset + index * layout.ENTRY_NBYTES
        return int.from_bytes(self._file.pread(place, layout.ENTRY_NBYTES), "big")

    def _offset(self, index: int, entry: int) -> int:
        offset = entry & layout.OFFSET_MASK
        if entry & (layout.L1_RESERVED | (self._header.cluster_size - 1)):
            raise CorruptImageError(
                f"L1 entry {index} ({entry:#x}) is impossible",
                path=self._file.path,
                offset=self._header.l1_offset + index * layout.ENTRY_NBYTES,
            )
        return offset


def clusters_of(entries: NDArray[np.uint64], cluster_bits: int) -> NDArray[np.int64]:
    """Return the host clusters that L2 entries refer to, each as often as they do."""
    packed = (entries & np.uint64(layout.COMPRESSED)) != 0
    plain = (entries[~packed] & np.uint64(layout.OFFSET_MASK)).astype(np.int64)
    parts = [plain[plain != 0] >> cluster_bits]
    if packed.any():
        shift = layout.COMPRESSED_SHIFT_AT_BITS_0 - cluster_bits
        begin = (entries[packed] & np.uint64((1 << shift) - 1)).astype(np.int64)
        mask = (1 << (cluster_bits - layout.COMPRESSED_LENGTH_BITS_LESS)) - 1
        more = (entries[packed] >> np.uint64(shift) & np.uint64(mask)).astype(np.int64)
        unit = layout.COMPRESSED_UNIT_NBYTES
        last = ((begin // unit + more + 1) * unit - 1) >> cluster_bits
        cluster = begin >> cluster_bits
        while cluster.size:
            parts.append(cluster)
            goes_on = cluster < last
            cluster, last = cluster[goes_on] + 1, last[goes_on]
    return np.concatenate(parts)
