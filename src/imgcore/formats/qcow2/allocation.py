"""The host clusters of a QCOW2 image that is written in place: taken and freed.

The rules, which keep a crash from doing more than leaking clusters:

- A refcount grows before something refers to the cluster (step NEW).  The refcount
  table names a new block before that, too (step ALLOCATION).
- A refcount shrinks after a flush has removed the reference.  Only then can the cluster
  be taken again.

Source: QEMU docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

import numpy as np

from imgcore import limits
from imgcore.errors import CorruptImageError, LimitExceededError
from imgcore.files.update_file import Step
from imgcore.formats.qcow2 import header_update, layout
from imgcore.formats.qcow2.free_runs import FreeRuns
from imgcore.formats.qcow2.refcounts import encode_refcounts
from imgcore.formats.qcow2.stored_refcounts import StoredRefcounts
from imgcore.formats.qcow2.table_clusters import TableClusters
from imgcore.formats.shared.alignment import align_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.qcow2.header import Qcow2Header

# Offsets in L1 and L2 entries have bits 9..55.
_MAX_OFFSET: Final = 1 << 56
_MAX_BLOCKS: Final = limits.QCOW2_MAX_REFCOUNT_TABLE_NBYTES // layout.ENTRY_NBYTES
# The file grows in steps, and is cut when it is closed.
_GROWTH_NBYTES: Final = 4 * limits.MIB
# Ranges of free clusters that are remembered; more are found again when needed.
_MAX_FREE_RUNS: Final = 1 << 16
# Refcounts that shrink at once.
_WINDOW_CLUSTERS: Final = 1 << 20


class HostClusters:
    """Takes and frees the clusters of a file; a cluster is known by its number.

    Parameters
    ----------
    file : UpdateFile
    header : Qcow2Header
        Its fields change with the refcount table.

    Attributes
    ----------
    counts : StoredRefcounts
    tables : TableClusters
        Clusters that are neither taken nor freed.  Whoever takes clusters for a table
        adds them, and removes them before they are freed.
    """

    def __init__(self, file: UpdateFile, header: Qcow2Header) -> None:
        self._file = file
        self._header = header
        self._bits = header.cluster_bits
        self.counts: StoredRefcounts = StoredRefcounts(file, header)
        self.tables: TableClusters = TableClusters(file, header, self.counts.blocks)
        # Free clusters below `_known`.
        self._free = FreeRuns()
        self._known = 0
        self._first_end = -(-file.nbytes >> self._bits)
        # From here on, what is not taken reads as zeros.
        self._fresh = (_MAX_OFFSET >> self._bits) if file.is_block_device else self._first_end
        # Ranges that lose a reference after the next flush.
        self._released: list[tuple[int, int]] = []
        self._has_freed = False
        self._is_withheld = False

    # -- taking ------------------------------------------------------------------------

    def take(self, most: int, after: int | None = None) -> tuple[int, int]:
        """Reserve clusters that follow each other, and set their refcounts to 1.

        Parameters
        ----------
        most : int
            How many are wanted.
        after : int, optional
            Where they should start, if that is free; else where the first is.

        Returns
        -------
        tuple of int
            The first one and their number, at least 1.

        Raises
        ------
        LimitExceededError
            The image has reached the largest size that its refcounts allow.
        CorruptImageError
            A table is in a cluster whose refcount is 0.
        """
        while True:
            start, n = after, 0
            # A damaged entry may have led far behind the end of the file.
            if start is not None and start << self._bits <= self._file.nbytes:
                n = self._n_free(start, most)
            if start is None or not n:
                start = self._lowest(1)
                n = self._n_free(start, most)
            if self.counts.has_block(start):
                self._reserve(start, n)
                return start, n
            self._add_block(start)
            after = start + 1

    def take_table(self, nbytes: int) -> int:
        """Reserve clusters that follow each other for a table; return the first.

        The content is not defined.
        """
        n = -(-nbytes >> self._bits)
        while True:
            start = self._lowest(n)
            per_block = self.counts.per_block
            firsts = [start, *range(align_up(start + 1, per_block), start + n, per_block)]
            missing = next((at for at in firsts if not self.counts.has_block(at)), None)
            if missing is None:
                break
            self._add_block(missing)
        self._reserve(start, n)
        self.tables.add(start, n)
        return start

    def are_zeros(self, first: int) -> bool:
        """Tell whether clusters that were taken from ``first`` on read as zeros."""
        return first >= self._fresh

    def clear(self, first: int, n: int = 1) -> None:
        """Make clusters that nothing refers to yet read as zeros."""
        if not self.are_zeros(first):
            self._file.zero(first << self._bits, n << self._bits)

    def give_back(self, first: int, n: int) -> None:
        """Free clusters that were taken, and that nothing has ever referred to."""
        self.counts.put(first, np.zeros(n, np.uint64))
        self._make_free(first, n)

    def _lowest(self, n: int) -> int:
        """Return the first of the lowest ``n`` free clusters that follow each other."""
        while (start := self._free.first_of(n)) is None:
            self._look_further()
        return start

    def _n_free(self, cluster: int, most: int) -> int:
        """Return how many clusters are free from this one on, in one refcount block."""
        per_block = self.counts.per_block
        most = min(most, per_block - cluster % per_block, self._limit - cluster)
        if cluster < self._known:
            return min(most, self._free.n_from(cluster))
        if most <= 0 or not self.counts.has_block(cluster):
            return max(most, 0)
        used = np.flatnonzero(self.counts.counts(cluster, most))
        return int(used[0]) if used.size else most

    @property
    def _limit(self) -> int:
        return min(_MAX_OFFSET >> self._bits, _MAX_BLOCKS * self.counts.per_block)

    def _look_further(self) -> None:
        """Look for free clusters in the rest of a refcount block."""
        start, per_block = self._known, self.counts.per_block
        end = min((start // per_block + 1) * per_block, self._limit)
        if start >= end:
            raise LimitExceededError(
                f"the image has reached {start} clusters, the most that its refcounts allow",
                path=self._file.path,
            )
        if self.counts.has_block(start):
            is_free = self.counts.counts(start, end - start) == 0
            for first, n in _runs(is_free):
                self._free.add(start + first, start + first + n)
        else:
            self._free.add(start, end)
        self._known = end
        self._forget_some()

    def _reserve(self, start: int, n: int) -> None:
        self._refuse_tables(start, n, "its refcount is 0")
        self._reach(start + n)
        if n <= self.counts.per_block - start % self.counts.per_block:
            self.counts.fill(start, n, 1)
        else:
            self.counts.put(start, np.ones(n, np.uint64))
        self._free.remove(start, start + n)

    def _reach(self, end: int) -> None:
        """Make the file so long that it has all clusters before ``end``."""
        nbytes = end << self._bits
        if nbytes > self._file.nbytes:
            self._file.grow(nbytes if self._file.is_block_device else nbytes + _GROWTH_NBYTES)

    def _refuse_tables(self, first: int, n: int, reason: str) -> None:
        if self.tables.any_in(first, n):
            raise CorruptImageError(
                f"a table is in clusters {first} to {first + n - 1}, but {reason}: "
                "imgcore check tells more",
                path=self._file.path,
                offset=first << self._bits,
            )

    # -- refcount blocks ---------------------------------------------------------------

    def _add_block(self, cluster: int) -> None:
        """Make a free cluster the refcount block that counts it."""
        counts = self.counts
        index = cluster // counts.per_block
        if index >= len(counts.blocks):
            self._move_table(cluster)
            return
        self._refuse_tables(cluster, 1, "its refcount is 0")
        self._reach(cluster + 1)
        offset = cluster << self._bits
        self._write_block(index, offset, cluster, 1)
        entry = self._header.refcount_table_offset + index * layout.ENTRY_NBYTES
        self._file.put(entry, offset.to_bytes(8, "big"), Step.ALLOCATION)
        counts.blocks[index] = offset
        self.tables.add(cluster, 1)
        self._free.remove(cluster, cluster + 1)

    def _move_table(self, cluster: int) -> None:
        """Make a larger refcount table, which has a block for a cluster.

        The table and new blocks follow each other from that cluster on: it and all
        others behind it are free.
        """
        from imgcore.formats.qcow2.rebuild import place_structure
        from imgcore.formats.qcow2.references import RefcountStructure

        header, counts = self._header, self.counts
        old_first, old_nbytes = header.refcount_table_offset >> self._bits, 8 * len(counts.blocks)
        needed = np.zeros(_MAX_BLOCKS, dtype=np.bool_)
        needed[cluster // counts.per_block] = True
        kept = RefcountStructure(0, 0, np.array(counts.blocks, dtype=np.int64))
        least = min(old_nbytes + old_nbytes // 2, limits.QCOW2_MAX_REFCOUNT_TABLE_NBYTES)
        structure, first, n = place_structure(
            header, kept, needed, cluster, least_table_nbytes=least
        )
        self._refuse_tables(first, n, "its refcount is 0")
        self._reach(first + n)
        blocks = structure.blocks.tolist()
        for index, offset in enumerate(blocks):
            if offset >> self._bits >= first:
                self._write_block(index, offset, first, n)
        self._file.pwrite(structure.table_offset, structure.blocks.astype(">u8").tobytes())
        n_table = structure.table_nbytes >> self._bits
        header_update.put_refcount_table(self._file, header, structure.table_offset, n_table)
        counts.blocks = blocks
        self.tables.remove(old_first)
        self.tables.add(first, n)
        self._free.remove(first, first + n)
        self._file.write_steps()
        self.release(np.arange(old_first, old_first + (old_nbytes >> self._bits)))

    def _write_block(self, index: int, offset: int, first: int, n: int) -> None:
        """Write a new refcount block, in which clusters have the refcount 1.

        They are ``[first, first + n)``, as far as it counts them.
        """
        counts = np.zeros(self.counts.per_block, np.uint8)
        base = index * self.counts.per_block
        counts[max(first - base, 0) : max(first + n - base, 0)] = 1
        self._file.pwrite(offset, encode_refcounts(counts, self._header.refcount_order))

    # -- freeing -----------------------------------------------------------------------

    def require_used(self, clusters: NDArray[np.int64]) -> None:
        """Raise CorruptImageError unless these clusters have data, and are counted."""
        for first, n in _ranges(clusters):
            if self.tables.any_in(first, n):
                self._refuse_tables(first, n, "guest data is said to be there")
            if not self.counts.counts(first, n).all():
                raise CorruptImageError(
                    f"clusters {first} to {first + n - 1} are used, but have refcounts of 0: "
                    "imgcore check -r all corrects them",
                    path=self._file.path,
                    offset=first << self._bits,
                )

    def are_own(self, first: int, n: int) -> bool:
        """Tell whether clusters have guest data that nothing else refers to."""
        if self.tables.any_in(first, n):
            return False
        if n == 1:
            return self.counts.count(first) == 1
        return bool((self.counts.counts(first, n) == 1).all())

    def raise_counts(self, clusters: NDArray[np.int64]) -> None:
        """Count one more reference to each of these clusters, which may repeat.

        LimitExceededError if refcounts are too narrow; some may have grown then.
        """
        for first, times in _windows(_ranges(clusters)):
            added = np.flatnonzero(times)
            low, high = int(added[0]), int(added[-1]) + 1
            counts = self.counts.counts(first + low, high - low)
            more = times[low:high].astype(np.uint64)
            if (counts > np.uint64(self.counts.max_count) - more).any():
                self._refuse_more()
            self.counts.put(first + low, counts + more)

    def require_counts(self, clusters: NDArray[np.int64], by: int) -> None:
        """Raise unless the refcounts of clusters, which may repeat, can change.

        Parameters
        ----------
        clusters : ndarray of int64
            Those that gain or lose a reference.
        by : int
            1 or -1.

        Raises
        ------
        CorruptImageError
            A refcount is lower than the references.
        LimitExceededError
            A refcount would exceed its width.
        """
        numbers, times = np.unique(clusters, return_counts=True)
        counts = self.counts.counts_of(numbers)
        least = times.astype(np.uint64) if by < 0 else np.uint64(1)
        bad = np.flatnonzero(counts < least)
        if bad.size:
            number = int(numbers[bad[0]])
            raise CorruptImageError(
                f"cluster {number} has the refcount {int(counts[bad[0]])}, fewer than its "
                "references: imgcore check -r all corrects it",
                path=self._file.path,
                offset=number << self._bits,
            )
        if by > 0 and (counts > np.uint64(self.counts.max_count) - times.astype(np.uint64)).any():
            self._refuse_more()

    def _refuse_more(self) -> NoReturn:
        raise LimitExceededError(
            f"refcounts of {self._header.refcount_bits} bits count up to "
            f"{self.counts.max_count} references",
            path=self._file.path,
        )

    def lower_counts(self, clusters: NDArray[np.int64]) -> None:
        """Count one reference less to each of these clusters, which may repeat.

        Nothing that a crash may leave refers to them.
        """
        self.release(clusters)
        for _ in self._lower():
            self._has_freed = True

    def release(self, clusters: NDArray[np.int64]) -> None:
        """Count one reference less to each of these clusters, after the next flush.

        They may repeat.  No entry that is put refers to them.
        """
        self._released.extend(_ranges(clusters))

    def withhold(self) -> None:
        """Take clusters after the file's end until a flush that nobody reads after."""
        self._free, self._known = FreeRuns(), self._first_end
        self._is_withheld = True

    def settle(self, *, is_unread: bool) -> None:
        """Free what was released, after a flush; not while reads may use it."""
        if not is_unread:
            return
        if self._is_withheld:
            self._free, self._known = FreeRuns(), 0
            self._is_withheld = False
        for first, n in self._lower():
            self._make_free(first, n)

    def _lower(self) -> Iterator[tuple[int, int]]:
        """Lower the refcounts of what was released; yield what is free by that."""
        released, self._released = self._released, []
        for first, times in _windows(released):
            counts = self.counts.counts(first, len(times))
            less = times.astype(np.uint64)
            # A refcount that is too low is wrong, and frees nothing.
            lowered = (times != 0) & (counts >= less)
            counts[lowered] -= less[lowered]
            for low, n in _runs(lowered):
                self.counts.put(first + low, counts[low : low + n])
            for low, n in _runs(lowered & (counts == 0)):
                yield first + low, n

    def _make_free(self, first: int, n: int) -> None:
        """Remember free clusters, and give back their space."""
        self._has_freed = True
        if not self._file.punch(first << self._bits, n << self._bits):
            self._fresh = max(self._fresh, first + n)
        end = min(first + n, self._known)
        if first < end:
            self._free.add(first, end)
            self._forget_some()

    def _forget_some(self) -> None:
        while len(self._free) > _MAX_FREE_RUNS:
            self._known = self._free.drop_last()

    def trim(self) -> None:
        """Lower all refcounts of what was released, and cut the file's unused end.

        What somebody may read still is not cut off.
        """
        end = 0
        for first, n in self._lower():
            end = max(end, first + n)
        self._file.write_steps()
        end = max(end, self._last_used() + 1, self.tables.end)
        if self._is_withheld or not self._has_freed:
            end = max(end, self._first_end)
        self._file.cut(end << self._bits)

    def _last_used(self) -> int:
        """Return the last cluster of the file that has a refcount, -1 without one."""
        counts = self.counts
        end = min(-(-self._file.nbytes >> self._bits), len(counts.blocks) * counts.per_block)
        while end > 0:
            first = (end - 1) // counts.per_block * counts.per_block
            if counts.has_block(first):
                used = np.flatnonzero(counts.counts(first, end - first))
                if used.size:
                    return first + int(used[-1])
            end = first
        return -1


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (first index, length) of the runs of true elements."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), np.diff(edges)[::2].tolist(), strict=True))


def _ranges(clusters: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return (first, number) of ranges that have these clusters, each as often."""
    if len(clusters) == 1:
        return [(int(clusters[0]), 1)]
    cuts = np.flatnonzero(np.diff(clusters) != 1) + 1
    starts = np.concatenate(([0], cuts)) if len(clusters) else cuts
    lengths = np.diff(np.concatenate((starts, [len(clusters)])))
    return list(zip(clusters[starts].tolist(), lengths.tolist(), strict=True))


def _windows(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield (first cluster, how often each cluster from there on is in ranges)."""
    pieces: dict[int, list[tuple[int, int]]] = {}
    for first, n in ranges:
        end = first + n
        while first < end:
            number = first // _WINDOW_CLUSTERS
            stop = min(end, (number + 1) * _WINDOW_CLUSTERS)
            pieces.setdefault(number, []).append((first, stop))
            first = stop
    for _, window in sorted(pieces.items()):
        low, high = min(window)[0], max(stop for _, stop in window)
        changes = np.zeros(high - low + 1, np.int64)
        bounds = np.array(window, dtype=np.int64) - low
        np.add.at(changes, bounds[:, 0], 1)
        np.add.at(changes, bounds[:, 1], -1)
        yield low, np.cumsum(changes)[:-1]
