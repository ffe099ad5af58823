"""Refcount blocks of QCOW2: their encoding, and the refcounts of a new image.

An image that the engine writes cluster by cluster has a `RefcountBuilder`, which writes
final blocks early.  One around clusters that stay in their file has a `RefcountMap`.

Source: QEMU docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore import limits
from imgcore.errors import LimitExceededError
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.options import refcount_clusters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.formats.qcow2.options import WriteOptions

_MIN_WINDOW: Final = 1 << 12
# The range of a cell in the window; WriteOptions keeps refcounts below it.
_MAX_COUNT: Final = (1 << 16) - 1
_MAX_DECODED: Final = (1 << 32) - 1


def encode_refcounts(counts: NDArray[np.unsignedinteger], refcount_order: int) -> NDArray[np.uint8]:
    """Encode refcounts as in a refcount block.

    Parameters
    ----------
    counts : ndarray of unsigned integers, shape (n,)
        They fill whole bytes, and each fits the width.
    refcount_order : int
        log2 of the width in bits.

    Returns
    -------
    ndarray, shape (n * width / 8,), dtype uint8
    """
    if refcount_order >= 3:
        return counts.astype(f">u{1 << (refcount_order - 3)}").view(np.uint8)
    # If entries are narrower than a byte, the first one takes the lowest bits.
    width = 1 << refcount_order
    cells = counts.astype(np.uint8).reshape(-1, 8 // width)
    packed = np.zeros(len(cells), dtype=np.uint8)
    for position in range(8 // width):
        packed |= cells[:, position] << np.uint8(position * width)
    return packed


def decode_wide_refcounts(raw: bytes, refcount_order: int) -> NDArray[np.uint64]:
    """Decode refcounts; the inverse of `encode_refcounts`."""
    if refcount_order == 6:
        return np.frombuffer(raw, ">u8").astype(np.uint64)
    return decode_refcounts(raw, refcount_order).astype(np.uint64)


def decode_refcounts(raw: bytes, refcount_order: int) -> NDArray[np.uint32]:
    """Decode refcounts, capped at 2^32-1."""
    if refcount_order == 6:
        wide = decode_wide_refcounts(raw, refcount_order)
        return np.minimum(wide, np.uint64(_MAX_DECODED)).astype(np.uint32)
    if refcount_order >= 3:
        return np.frombuffer(raw, f">u{1 << (refcount_order - 3)}").astype(np.uint32)
    width = 1 << refcount_order
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    split = np.frombuffer(raw, np.uint8)[:, np.newaxis] >> shifts & np.uint8((1 << width) - 1)
    return split.astype(np.uint32).reshape(-1)


def check_table_size(options: WriteOptions, nbytes: int) -> None:
    """Reject a refcount table that is larger than readers accept."""
    if nbytes > limits.QCOW2_MAX_REFCOUNT_TABLE_NBYTES:
        raise LimitExceededError(
            f"the refcount table needs {nbytes} bytes, allowed up to "
            f"{limits.QCOW2_MAX_REFCOUNT_TABLE_NBYTES}: use larger clusters or fewer "
            "refcount_bits",
            path=options.target_name or None,
        )


class RefcountBuilder:
    """Counts references to host clusters; final blocks can be taken out and written.

    ``block_offsets`` lists where the taken blocks are written, for the refcount table.
    """

    def __init__(self, options: WriteOptions) -> None:
        self._options = options
        self._limit = min(options.max_refcount, _MAX_COUNT)
        self._base = 0
        self._counts = np.zeros(_MIN_WINDOW, dtype=np.uint16)
        self.block_offsets: list[int] = []

    def add_range(self, first: int, n_clusters: int) -> None:
        """Count a reference to each of ``n_clusters`` clusters from ``first``."""
        if n_clusters:
            low = self._room_for(first, first + n_clusters)
            self._counts[low : low + n_clusters] += np.uint16(1)

    def add(self, clusters: NDArray[np.int64]) -> None:
        """Count a reference to each of these clusters.

        They may repeat.  Memory grows with the distance between the lowest and highest.
        """
        if not clusters.size:
            return
        first, last = int(clusters.min()), int(clusters.max()) + 1
        low = self._room_for(first, last)
        cells = self._counts[low : low + last - first]
        counts = np.bincount(clusters - first, minlength=last - first) + cells
        if int(counts.max()) > self._limit:
            cluster = first + int(counts.argmax())
            raise LimitExceededError(
                f"host cluster {cluster} holds {int(counts.max())} compressed clusters, "
                f"refcounts of {1 << self._options.refcount_order} bits allow {self._limit}",
                path=self._options.target_name or None,
            )
        cells[:] = counts

    def _room_for(self, first: int, last: int) -> int:
        """Extend the window to ``last``; return the index of ``first`` in it."""
        assert first >= self._base, "the cluster's refcount block has already been written"
        needed = last - self._base
        if needed > self._counts.size:
            grown = np.zeros(max(needed, 2 * self._counts.size), dtype=np.uint16)
            grown[: self._counts.size] = self._counts
            self._counts = grown
        return first - self._base

    def n_complete(self, frontier: int) -> int:
        """Return how many blocks end at or before cluster ``frontier``."""
        return max(0, (frontier - self._base) // self._options.refcounts_per_block)

    def pending_nbytes(self, frontier: int) -> int:
        """Return the memory that taking the complete blocks would free."""
        return self.n_complete(frontier) * self._options.refcounts_per_block * 2

    def n_missing(self, n_clusters: int) -> tuple[int, int]:
        """Return how many blocks and table clusters to write after ``n_clusters``."""
        return refcount_clusters(self._options, n_clusters, len(self.block_offsets))

    def take(self, n_blocks: int, offset: int) -> NDArray[np.uint8]:
        """Take out the next blocks; the caller writes them together at ``offset``.

        Returns
        -------
        ndarray, shape (n_blocks * cluster_size,), dtype uint8
        """
        per_block = self._options.refcounts_per_block
        n_cells = n_blocks * per_block
        self._room_for(self._base, self._base + n_cells)
        encoded = encode_refcounts(self._counts[:n_cells], self._options.refcount_order)
        size = self._options.cluster_size
        self.block_offsets.extend(range(offset, offset + n_blocks * size, size))
        self._counts = self._counts[n_cells:].copy()
        if not self._counts.size:
            self._counts = np.zeros(_MIN_WINDOW, dtype=np.uint16)
        self._base += n_cells
        check_table_size(self._options, len(self.block_offsets) * layout.ENTRY_NBYTES)
        return encoded

    def table(self, n_clusters: int) -> NDArray[np.uint8]:
        """Return the refcount table, padded to ``n_clusters`` clusters."""
        entries = np.zeros(n_clusters * self._options.l2_entries, dtype=">u8")
        entries[: len(self.block_offsets)] = self.block_offsets
        return entries.view(np.uint8)


class RefcountMap:
    """Counts references to host clusters, which come in any order.

    Bit i of each refcount is in plane i.  A plane is made when it is needed, so that
    refcounts of 0 and 1 take one bit; of that, the system reserves only what is set.

    Parameters
    ----------
    options : WriteOptions
    n_clusters : int
        Clusters of the file so far; the map grows with it.
    """

    def __init__(self, options: WriteOptions, n_clusters: int) -> None:
        self._options = options
        self._block_nbytes = options.refcounts_per_block // 8
        self._n_blocks = 0
        self._planes: list[NDArray[np.uint8]] = []
        self._make_room(n_clusters)

    def _make_room(self, n_clusters: int) -> None:
        n_blocks = -(-n_clusters // self._options.refcounts_per_block)
        if n_blocks <= self._n_blocks and self._planes:
            return
        # Growing copies the planes, so they grow by an eighth at least.
        n_blocks = max(n_blocks, self._n_blocks + self._n_blocks // 8, 1)
        kept, self._n_blocks = self._planes or [np.zeros(0, np.uint8)], n_blocks
        self._planes = [self._new_plane() for _ in kept]
        for plane, old in zip(self._planes, kept, strict=True):
            plane[: old.size] = old

    def _new_plane(self) -> NDArray[np.uint8]:
        nbytes = self._n_blocks * self._block_nbytes
        if nbytes > limits.QCOW2_MAX_REFCOUNT_PLANE_NBYTES:
            raise LimitExceededError(
                f"{8 * nbytes} clusters of {self._options.cluster_size} bytes are too many to "
                f"count, allowed up to {8 * limits.QCOW2_MAX_REFCOUNT_PLANE_NBYTES}: use a larger "
                "cluster_size",
                path=self._options.target_name or None,
            )
        return np.zeros(nbytes, dtype=np.uint8)

    def add_range(self, first: int, n_clusters: int) -> None:
        """Count a reference to each of ``n_clusters`` clusters from ``first``."""
        self.add(np.arange(first, first + n_clusters, dtype=np.int64))

    def add(self, clusters: NDArray[np.int64]) -> None:
        """Count a reference to each of these clusters, which may repeat."""
        if not clusters.size:
            return
        numbers, times = np.unique(clusters, return_counts=True)
        self._make_room(int(numbers[-1]) + 1)
        for power in range(int(times.max()).bit_length()):
            self._add_power(numbers[(times >> power & 1) != 0], power)

    def _add_power(self, numbers: NDArray[np.int64], power: int) -> None:
        """Add 2^power to the refcounts of different, ascending clusters."""
        while numbers.size:
            if power >= min(1 << self._options.refcount_order, _MAX_COUNT.bit_length()):
                raise LimitExceededError(
                    f"host cluster {int(numbers[0])} has more references than {power} bits can "
                    "count",
                    path=self._options.target_name or None,
                )
            while power >= len(self._planes):
                self._planes.append(self._new_plane())
            plane = self._planes[power]
            at, bits = numbers >> 3, np.left_shift(1, numbers & 7).astype(np.uint8)
            was_set = plane[at] & bits != 0
            firsts = np.flatnonzero(np.concatenate(([True], at[1:] != at[:-1])))
            plane[at[firsts]] ^= np.bitwise_xor.reduceat(bits, firsts)
            # What was set carries to the next plane.
            numbers, power = numbers[was_set], power + 1

    def used_blocks(self) -> NDArray[np.bool_]:
        """Tell which refcount blocks hold a refcount other than 0."""
        used = np.zeros(self._n_blocks, dtype=np.bool_)
        for plane in self._planes:
            used |= plane.reshape(-1, self._block_nbytes).any(axis=1)
        return used

    def encoded(self, blocks: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the refcount blocks of these numbers, one after the other."""
        counts = np.zeros(len(blocks) * self._options.refcounts_per_block, dtype=np.uint16)
        for power, plane in enumerate(self._planes):
            rows = plane.reshape(-1, self._block_nbytes)[blocks]
            counts |= np.unpackbits(rows, bitorder="little").astype(np.uint16) << np.uint16(power)
        return encode_refcounts(counts, self._options.refcount_order)
