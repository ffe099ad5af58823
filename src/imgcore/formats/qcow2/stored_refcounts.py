"""The refcounts of a QCOW2 image that is written in place.

Source: QEMU docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from imgcore.errors import CorruptImageError
from imgcore.files.update_file import Step
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.refcounts import decode_wide_refcounts, encode_refcounts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.qcow2.header import Qcow2Header


class StoredRefcounts:
    """Reads and changes refcounts.

    Changes belong to the step NEW: counts grow before something refers to the cluster,
    and shrink after a flush.

    Attributes
    ----------
    per_block : int
        Clusters that a refcount block counts.
    max_count : int
        The largest refcount.
    blocks : list of int
        Host offsets of the refcount blocks, 0 for one that is absent.  Only
        `imgcore.formats.qcow2.allocation` adds some.

    Raises
    ------
    CorruptImageError
        An entry of the refcount table is impossible.
    """

    def __init__(self, file: UpdateFile, header: Qcow2Header) -> None:
        self._file = file
        self._order = header.refcount_order
        self.per_block: int = header.cluster_size * 8 >> self._order
        self.max_count: int = (1 << header.refcount_bits) - 1
        self.blocks: list[int] = _read_table(file, header)

    def has_block(self, cluster: int) -> bool:
        """Tell whether there is a refcount block for a cluster."""
        index = cluster // self.per_block
        return index < len(self.blocks) and self.blocks[index] != 0

    def count(self, cluster: int) -> int:
        """Return the refcount of a cluster."""
        if not self.has_block(cluster):
            return 0
        offset, bit = self._place(cluster)
        if self._order >= 3:
            return int.from_bytes(self._file.pread(offset, 1 << (self._order - 3)), "big")
        return self._file.pread(offset, 1)[0] >> bit & self.max_count

    def counts(self, first: int, n: int) -> NDArray[np.uint64]:
        """Return the refcounts of clusters ``[first, first + n)``."""
        parts = []
        for start, length in self._pieces(first, n):
            if self.has_block(start):
                parts.append(self._read(start, length))
            else:
                parts.append(np.zeros(length, np.uint64))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def counts_of(self, clusters: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the refcounts of clusters in any order."""
        numbers, where = np.unique(clusters, return_inverse=True)
        found = np.zeros(len(numbers), dtype=np.uint64)
        edges = np.flatnonzero(np.diff(numbers // self.per_block, prepend=-1, append=-1))
        for start, end in pairwise(edges.tolist()):
            part = numbers[start:end]
            first = int(part[0])
            found[start:end] = self.counts(first, int(part[-1]) - first + 1)[part - first]
        return found[where]

    def put(self, first: int, counts: NDArray[np.uint64]) -> None:
        """Change the refcounts of clusters from ``first`` on; their blocks exist."""
        done = 0
        for start, n in self._pieces(first, len(counts)):
            self._put(start, counts[done : done + n])
            done += n

    def fill(self, first: int, n: int, count: int) -> None:
        """Give the clusters ``[first, first + n)``, of one block, the same refcount."""
        if self._order < 3:
            self._put(first, np.full(n, count, np.uint64))
            return
        data = count.to_bytes(1 << (self._order - 3), "big") * n
        self._file.put(self._place(first)[0], data, Step.NEW)

    def _put(self, first: int, counts: NDArray[np.uint64]) -> None:
        offset, bit = self._place(first)
        if self._order < 3:
            # Counts that are narrower than a byte are changed with their neighbours.
            lead = bit >> self._order
            per_byte = 8 >> self._order
            n = -(-(lead + len(counts)) // per_byte) * per_byte
            whole = decode_wide_refcounts(self._file.pread(offset, n // per_byte), self._order)
            whole[lead : lead + len(counts)] = counts
            counts = whole
        self._file.put(offset, encode_refcounts(counts, self._order).tobytes(), Step.NEW)

    def _read(self, first: int, n: int) -> NDArray[np.uint64]:
        offset, bit = self._place(first)
        nbytes = ((n << self._order) + bit + 7) // 8
        lead = bit >> self._order
        counts = decode_wide_refcounts(self._file.pread(offset, nbytes), self._order)
        return counts[lead : lead + n]

    def _place(self, cluster: int) -> tuple[int, int]:
        """Return the host offset of the byte that has a refcount, and its first bit."""
        block, index = divmod(cluster, self.per_block)
        bit = index << self._order
        return self.blocks[block] + bit // 8, bit & 7

    def _pieces(self, first: int, n: int) -> Iterator[tuple[int, int]]:
        """Yield (first, number) of the clusters that each block counts."""
        end = first + n
        while first < end:
            stop = min(end, (first // self.per_block + 1) * self.per_block)
            yield first, stop - first
            first = stop


def _read_table(file: UpdateFile, header: Qcow2Header) -> list[int]:
    nbytes = header.refcount_table_clusters * header.cluster_size
    raw = file.pread(header.refcount_table_offset, nbytes)
    blocks = np.frombuffer(raw, ">u8").astype(np.uint64)
    bad = (blocks & np.uint64(header.cluster_size - 1)) != 0
    bad |= blocks > np.uint64(max(file.nbytes - header.cluster_size, 0))
    if bad.any():
        index = int(np.flatnonzero(bad)[0])
        raise CorruptImageError(
            f"entry {index} of the refcount table ({int(blocks[index]):#x}) is not of a block in "
            "the file",
            path=file.path,
            offset=header.refcount_table_offset + index * layout.ENTRY_NBYTES,
        )
    return [int(block) for block in blocks.tolist()]
