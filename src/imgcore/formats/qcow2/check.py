"""Check QCOW2 images: compare refcounts with references, and verify table entries.

Host clusters are checked in windows, with one walk over all tables for each window.
Memory is therefore bounded, however large the file is.  Counts and wording follow
``qemu-img check``.

Source: QEMU docs/interop/qcow2.rst, "Host cluster management", "Cluster mapping".
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore import limits
from imgcore.errors import FormatError, LimitExceededError
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.header import read_bitmaps, read_snapshots
from imgcore.formats.qcow2.tables import iter_l1, read_entries
from imgcore.formats.shared.check_report import CheckReport

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.qcow2.header import Qcow2Header

# Three arrays of 4 bytes for each cluster: at most 96 MiB.
WINDOW_CLUSTERS: Final = 1 << 23
_MAX_BATCH_ENTRIES: Final = 1 << 18
_MAX_COUNT: Final = (1 << 32) - 1


@dataclass(frozen=True)
class _L1Table:
    offset: int
    n_entries: int
    is_active: bool


class _Window:
    """References to host clusters ``[base, base + n)``, and their stored refcounts."""

    def __init__(self, base: int, n: int, cluster_bits: int, stored: NDArray[np.uint32]) -> None:
        self.base = base
        self.end = base + n
        self.is_first = base == 0
        self._bits = cluster_bits
        self.stored = stored
        self.meta = np.zeros(n, dtype=np.uint32)
        self.data = np.zeros(n, dtype=np.uint32)

    def inside(self, clusters: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which of these clusters are in the window."""
        return (clusters >= self.base) & (clusters < self.end)

    def add(self, counts: NDArray[np.uint32], clusters: NDArray[np.int64]) -> None:
        """Count a reference to each of these clusters that is in the window."""
        mine = clusters[self.inside(clusters)]
        if mine.size:
            np.add.at(counts, mine - self.base, np.uint32(1))

    def add_range(self, offset: int, nbytes: int) -> None:
        """Count a metadata reference to each cluster that the bytes touch."""
        if nbytes:
            first = max(offset >> self._bits, self.base) - self.base
            last = min((offset + nbytes - 1) >> self._bits, self.end - 1) - self.base
            if first <= last:
                self.meta[first : last + 1] += np.uint32(1)


class _Survey(_Window):
    """Records which windows contain references; has no clusters itself.

    A sparse file may be far larger than the part of it that the image uses, so empty
    windows are skipped.
    """

    def __init__(self, n_clusters: int, cluster_bits: int) -> None:
        super().__init__(0, 0, cluster_bits, np.zeros(0, dtype=np.uint32))
        self.is_first = False
        self._n_clusters = n_clusters
        self.is_used = np.zeros(-(-n_clusters // WINDOW_CLUSTERS), dtype=bool)

    def add(self, counts: NDArray[np.uint32], clusters: NDArray[np.int64]) -> None:
        self.is_used[clusters[clusters < self._n_clusters] // WINDOW_CLUSTERS] = True

    def add_range(self, offset: int, nbytes: int) -> None:
        if nbytes:
            self.add_clusters(offset >> self._bits, (offset + nbytes - 1) >> self._bits)

    def add_clusters(self, first: int, last: int) -> None:
        """Record the windows of clusters ``[first, last]``."""
        self.is_used[first // WINDOW_CLUSTERS : last // WINDOW_CLUSTERS + 1] = True


class Qcow2Checker:
    """Checks one image once.

    Parameters
    ----------
    file, header
        The image.
    on_unreferenced : callable, optional
        Called for each window that has clusters with a refcount but no reference, with
        these clusters (int64, ascending).
    """

    def __init__(
        self,
        file: ByteSource,
        header: Qcow2Header,
        on_unreferenced: Callable[[NDArray[np.int64]], None] | None = None,
    ) -> None:
        self._file = file
        self._header = header
        self._on_unreferenced = on_unreferenced
        self._bits = header.cluster_bits
        self._size = header.cluster_size
        self._n_clusters = -(-file.nbytes >> self._bits)
        self._bitmap_tables: list[tuple[int, int]] = []
        self.report: CheckReport = CheckReport(total_clusters=-(-header.virtual_size >> self._bits))

    def run(self) -> CheckReport:
        """Check everything and return the report."""
        report, header = self.report, self._header
        if header.is_dirty:
            report.problems.append("dirty flag is set: refcounts may be stale")
        if header.is_corrupt:
            report.problems.append("corrupt flag is set: the image must not be written to")
        blocks = self.refcount_blocks()
        regions, tables = self._metadata()
        self._bitmap_tables = self._read_bitmaps()
        highest = -1
        for base in self._bases(blocks, regions, tables):
            n = min(WINDOW_CLUSTERS, self._n_clusters - base)
            window = _Window(base, n, self._bits, self._stored(blocks, base, n))
            self._count(window, blocks, regions, tables)
            highest = max(highest, self._compare(window))
        report.image_end_offset = (highest + 1) << self._bits
        return report

    def _bases(
        self,
        blocks: NDArray[np.int64],
        regions: list[tuple[int, int]],
        tables: list[_L1Table],
    ) -> list[int]:
        """Return the first clusters of the windows to check, always with 0."""
        if self._n_clusters <= WINDOW_CLUSTERS:
            return [0]
        survey = _Survey(self._n_clusters, self._bits)
        per_block = self._size * 8 >> self._header.refcount_order
        for block in np.flatnonzero(blocks).tolist():
            survey.add_clusters(block * per_block, (block + 1) * per_block - 1)
        self._count(survey, blocks, regions, tables)
        survey.is_used[0] = True
        return (np.flatnonzero(survey.is_used) * WINDOW_CLUSTERS).tolist()

    def _count(
        self,
        window: _Window,
        blocks: NDArray[np.int64],
        regions: list[tuple[int, int]],
        tables: list[_L1Table],
    ) -> None:
        """Count all references in a window; a survey only records where they are."""
        for offset, nbytes in regions:
            window.add_range(offset, nbytes)
        window.add(window.meta, blocks[blocks != 0] >> self._bits)
        self._count_bitmaps(window)
        for table in tables:
            self._walk(table, window)

    # -------------------------------------------------------------- refcounts

    def refcount_blocks(self) -> NDArray[np.int64]:
        """Return the offsets of the refcount blocks; 0 if absent or not readable."""
        header = self._header
        raw = self._file.pread(
            header.refcount_table_offset, header.refcount_table_entries * layout.ENTRY_NBYTES
        )
        entries = np.frombuffer(raw, dtype=">u8").astype(np.uint64)
        offsets = entries & np.uint64(layout.REFCOUNT_TABLE_OFFSET_MASK)
        reserved = (entries & np.uint64(layout.REFCOUNT_TABLE_RESERVED)) != 0
        unaligned = (offsets & np.uint64(self._size - 1)) != 0
        outside = offsets > np.uint64(max(self._file.nbytes - self._size, 0))

        def line(reason: str) -> Callable[[int], str]:
            return lambda index: f"refcount block {index} ({int(entries[index]):#x}) {reason}"

        self._corruptions(reserved, line("has reserved bits set in the refcount table"))
        self._corruptions(unaligned, line("is not cluster aligned"))
        self._corruptions(outside & ~unaligned, line("is outside the file"))
        offsets[unaligned | outside] = 0
        return offsets.astype(np.int64)

    def _stored(self, blocks: NDArray[np.int64], base: int, n: int) -> NDArray[np.uint32]:
        """Return the stored refcounts of ``n`` clusters, capped at 2^32-1."""
        order = self._header.refcount_order
        per_block = self._size * 8 >> order
        stored = np.zeros(n, dtype=np.uint32)
        for block in range(base // per_block, min(-(-(base + n) // per_block), len(blocks))):
            if not blocks[block]:
                continue
            low = max(block * per_block, base)
            high = min((block + 1) * per_block, base + n)
            # Windows begin at whole bytes.
            skip = low - block * per_block
            nbytes = ((high - low << order) + 7) // 8
            raw = self._file.pread(int(blocks[block]) + (skip << order) // 8, nbytes)
            stored[low - base : high - base] = _decode_refcounts(raw, order)[: high - low]
        return stored

    def _compare(self, window: _Window) -> int:
        """Report differences; return the highest cluster in use, -1 if none is."""
        referenced = window.meta + window.data
        stored = window.stored

        def line(index: int) -> str:
            return (
                f"cluster {window.base + index} refcount={int(stored[index])} "
                f"reference={int(referenced[index])}"
            )

        self._corruptions(stored < referenced, line)
        self._leaks(stored > referenced, line)
        overlaps = (window.meta != 0) & (window.data != 0) & (stored == referenced)
        self._corruptions(
            overlaps,
            lambda index: f"cluster {window.base + index} holds both metadata and guest data",
        )
        if self._on_unreferenced is not None:
            leaked = np.flatnonzero((referenced == 0) & (stored != 0))
            if leaked.size:
                self._on_unreferenced(leaked.astype(np.int64) + window.base)
        used = np.flatnonzero((referenced != 0) | (stored != 0))
        return window.base + int(used[-1]) if used.size else -1

    # --------------------------------------------------------------- metadata

    def _metadata(self) -> tuple[list[tuple[int, int]], list[_L1Table]]:
        """Return (offset, length) of each metadata region, and all L1 tables."""
        header = self._header
        l1_nbytes = header.l1_entries * layout.ENTRY_NBYTES
        regions = [
            (0, self._size),
            (header.refcount_table_offset, header.refcount_table_clusters * self._size),
            (header.l1_offset, l1_nbytes),
        ]
        tables = [_L1Table(header.l1_offset, header.l1_entries, True)]
        if header.bitmaps is not None:
            regions.append((header.bitmaps[1], header.bitmaps[2]))
        try:
            snapshots = read_snapshots(self._file, header)
            if snapshots:
                regions.append((header.snapshots_offset, snapshots[-1].table_nbytes))
        except (FormatError, LimitExceededError) as error:
            self.report.corruption(f"snapshot table: {error}")
            return regions, tables
        taken = [(header.l1_offset, header.l1_offset + l1_nbytes)]
        for snapshot in snapshots:
            nbytes = snapshot.l1_entries * layout.ENTRY_NBYTES
            if not self._is_table(snapshot.l1_offset, nbytes):
                self.report.corruption(
                    f"snapshot {snapshot.identifier}: L1 table of {nbytes} bytes at "
                    f"{snapshot.l1_offset:#x} is misaligned, too large or outside the file"
                )
                continue
            if not _insert(taken, snapshot.l1_offset, snapshot.l1_offset + nbytes):
                # In a sound image each snapshot has its own table.  Walking one shared
                # table for 65536 snapshots would take days.
                self.report.corruption(
                    f"snapshot {snapshot.identifier}: its L1 table at {snapshot.l1_offset:#x} "
                    "overlaps another one"
                )
                continue
            regions.append((snapshot.l1_offset, nbytes))
            tables.append(_L1Table(snapshot.l1_offset, snapshot.l1_entries, False))
        return regions, tables

    def _is_table(self, offset: int, nbytes: int) -> bool:
        return (
            offset % self._size == 0
            and nbytes <= limits.QCOW2_MAX_L1_NBYTES
            and offset + nbytes <= self._file.nbytes
        )

    def _read_bitmaps(self) -> list[tuple[int, int]]:
        """Return (offset, number of entries) of each bitmap table."""
        try:
            bitmaps = read_bitmaps(self._file, self._header)
        except FormatError as error:
            self.report.corruption(f"bitmap directory: {error}")
            return []
        tables: list[tuple[int, int]] = []
        taken: list[tuple[int, int]] = []
        for bitmap in bitmaps:
            end = bitmap.table_offset + bitmap.table_entries * layout.ENTRY_NBYTES
            if bitmap.table_offset % self._size or end > self._file.nbytes:
                self.report.corruption(f"bitmap {bitmap.name!r}: table is outside the file")
            elif not _insert(taken, bitmap.table_offset, end):
                # As with snapshots, each has its own table.
                self.report.corruption(f"bitmap {bitmap.name!r}: its table overlaps another one")
            else:
                tables.append((bitmap.table_offset, bitmap.table_entries))
        return tables

    def _count_bitmaps(self, window: _Window) -> None:
        for table_offset, n_entries in self._bitmap_tables:
            window.add_range(table_offset, n_entries * layout.ENTRY_NBYTES)
            for _, entries in iter_l1(self._file, table_offset, 0, n_entries):
                offsets = (entries & np.uint64(layout.BITMAP_OFFSET_MASK)).astype(np.int64)
                bad = (offsets & (self._size - 1) != 0) | (offsets >= self._file.nbytes)
                if window.is_first:
                    self._corruptions(
                        bad, lambda _: "bitmap cluster is misaligned or outside the file"
                    )
                window.add(window.meta, offsets[~bad & (offsets != 0)] >> self._bits)

    # ----------------------------------------------------------- L1, L2, data

    def _walk(self, table: _L1Table, window: _Window) -> None:
        per_table = self._header.l2_entries
        step = max(1, _MAX_BATCH_ENTRIES // per_table)
        for indices, offsets in self._l2_tables(table, window):
            window.add(window.meta, offsets >> self._bits)
            for start in range(0, len(offsets), step):
                part = offsets[start : start + step].astype(np.uint64)
                raw = read_entries(self._file, self._header, part, 0, len(part) * per_table)
                entries = raw.view(">u8").astype(np.uint64)
                first_guest = np.repeat(indices[start : start + step], per_table) * per_table
                first_guest += np.tile(np.arange(per_table, dtype=np.int64), len(part))
                self._check_entries(entries, first_guest, table.is_active, window)

    def _l2_tables(
        self, table: _L1Table, window: _Window
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (L1 indices, host offsets) of the L2 tables that can be read."""
        for base, l1 in iter_l1(self._file, table.offset, 0, table.n_entries):
            offsets = (l1 & np.uint64(layout.OFFSET_MASK)).astype(np.int64)
            unaligned = offsets & (self._size - 1) != 0
            outside = (offsets > self._file.nbytes - self._size) & (offsets != 0)
            if window.is_first:
                self._check_l1(l1, base, unaligned, outside)
            usable = np.flatnonzero((offsets != 0) & ~unaligned & ~outside)
            if table.is_active:
                self._check_copied(l1[usable], offsets[usable] >> self._bits, "L2 table", window)
            if usable.size:
                yield usable.astype(np.int64) + base, offsets[usable]

    def _check_l1(
        self,
        l1: NDArray[np.uint64],
        base: int,
        unaligned: NDArray[np.bool_],
        outside: NDArray[np.bool_],
    ) -> None:
        def line(reason: str) -> Callable[[int], str]:
            return lambda index: f"L1 entry {base + index} ({int(l1[index]):#x}) {reason}"

        reserved = (l1 & np.uint64(layout.L1_RESERVED)) != 0
        nowhere = (l1 != 0) & (l1 & np.uint64(layout.OFFSET_MASK) == 0)
        self._corruptions(reserved, line("has reserved bits set"))
        self._corruptions(nowhere & ~reserved, line("has flags but no L2 table"))
        self._corruptions(unaligned, line("is not cluster aligned"))
        self._corruptions(outside & ~unaligned, line("is outside the file"))

    def _check_entries(
        self,
        entries: NDArray[np.uint64],
        guest: NDArray[np.int64],
        is_active: bool,
        window: _Window,
    ) -> None:
        used = np.flatnonzero(entries)
        entries, guest = entries[used], guest[used]
        packed = (entries & np.uint64(layout.COMPRESSED)) != 0
        offsets = (entries & np.uint64(layout.OFFSET_MASK)).astype(np.int64)
        placed = ~packed & (offsets != 0)
        unaligned = placed & (offsets & (self._size - 1) != 0)
        outside = placed & ~unaligned & self._is_outside(entries, offsets, guest)
        begin, end = self._packed_ranges(entries[packed])
        # The file may end inside the last cluster.
        absent = (begin >= self._file.nbytes) | (end >= self._file.nbytes + self._size)
        if window.is_first:
            self._check_flags(entries, guest, packed)
            self._bad_entries(unaligned, "is not cluster aligned", entries, guest)
            self._bad_entries(outside, "points past the end of the file", entries, guest)
            missing = np.zeros(len(entries), dtype=bool)
            missing[packed] = absent
            self._bad_entries(missing, "points past the end of the file", entries, guest)
            if is_active:
                self._count_guest(offsets[placed], guest[placed], int(packed.sum()))
        clusters = offsets[placed] >> self._bits
        is_zero = (entries & np.uint64(layout.ZERO_FLAG)) != 0
        # As QEMU counts: a misaligned data cluster counts as two clusters, a misaligned
        # zero cluster as none.
        window.add(window.data, clusters[~(unaligned & is_zero)[placed]])
        window.add(window.data, clusters[(unaligned & ~is_zero)[placed]] + 1)
        first = begin[~absent] >> self._bits
        last = (np.minimum(end[~absent], self._n_clusters << self._bits) - 1) >> self._bits
        # In a sound image a compressed cluster touches at most two host clusters.
        for step in range(int((last - first).max(initial=-1)) + 1):
            window.add(window.data, (first + step)[first + step <= last])
        if is_active:
            self._check_copied(entries[placed], clusters, "data cluster", window)

    def _is_outside(
        self,
        entries: NDArray[np.uint64],
        offsets: NDArray[np.int64],
        guest: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Tell which plain entries need bytes past the end of the file.

        A data cluster needs the bytes that the guest can see; a zero cluster one byte.
        """
        left = self._header.virtual_size - (guest << self._bits)
        needed = np.clip(left, 1, self._size)
        needed[(entries & np.uint64(layout.ZERO_FLAG)) != 0] = 1
        outside: NDArray[np.bool_] = offsets > self._file.nbytes - needed
        return outside

    def _packed_ranges(
        self, entries: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        shift = layout.COMPRESSED_SHIFT_AT_BITS_0 - self._bits
        begin = (entries & np.uint64((1 << shift) - 1)).astype(np.int64)
        mask = (1 << (self._bits - layout.COMPRESSED_LENGTH_BITS_LESS)) - 1
        sectors = ((entries >> np.uint64(shift)) & np.uint64(mask)).astype(np.int64) + 1
        unit = layout.COMPRESSED_UNIT_NBYTES
        return begin, (begin // unit + sectors) * unit

    def _check_flags(
        self,
        entries: NDArray[np.uint64],
        guest: NDArray[np.int64],
        packed: NDArray[np.bool_],
    ) -> None:
        v3 = self._header.version >= 3
        reserved = np.uint64(layout.L2_RESERVED_V3 if v3 else layout.L2_RESERVED_V2)
        bad = ~packed & ((entries & reserved) != 0)
        self._bad_entries(bad, "has reserved bits set", entries, guest)
        copied = packed & ((entries & np.uint64(layout.COPIED)) != 0)
        self._bad_entries(copied, "is compressed and has the copied flag", entries, guest)

    def _count_guest(
        self, offsets: NDArray[np.int64], guest: NDArray[np.int64], n_packed: int
    ) -> None:
        report = self.report
        table = guest // self._header.l2_entries
        jumps = (offsets[1:] != offsets[:-1] + self._size) & (table[1:] == table[:-1])
        report.allocated_clusters += len(offsets) + n_packed
        report.compressed_clusters += n_packed
        # As QEMU counts: every compressed cluster is fragmented.
        report.fragmented_clusters += int(jumps.sum()) + n_packed

    def _check_copied(
        self,
        entries: NDArray[np.uint64],
        clusters: NDArray[np.int64],
        what: str,
        window: _Window,
    ) -> None:
        mine = window.inside(clusters)
        entries, clusters = entries[mine], clusters[mine]
        counts = window.stored[clusters - window.base]
        wrong = (counts == 1) != ((entries & np.uint64(layout.COPIED)) != 0)
        self._corruptions(
            wrong,
            lambda index: (
                f"copied flag of {what}: entry={int(entries[index]):#x} "
                f"refcount={int(counts[index])}"
            ),
        )

    # --------------------------------------------------------------- reporting

    def _bad_entries(
        self,
        bad: NDArray[np.bool_],
        reason: str,
        entries: NDArray[np.uint64],
        guest: NDArray[np.int64],
    ) -> None:
        self._corruptions(
            bad,
            lambda index: (
                f"L2 entry {int(entries[index]):#x} of guest offset "
                f"{int(guest[index]) << self._bits:#x} {reason}"
            ),
        )

    def _corruptions(self, bad: NDArray[np.bool_], line: Callable[[int], str]) -> None:
        rows = np.flatnonzero(bad)
        self.report.corruptions_among(rows.size, (line(int(index)) for index in rows))

    def _leaks(self, bad: NDArray[np.bool_], line: Callable[[int], str]) -> None:
        rows = np.flatnonzero(bad)
        self.report.leaks_among(rows.size, (line(int(index)) for index in rows))


def _insert(taken: list[tuple[int, int]], start: int, end: int) -> bool:
    """Insert a range into sorted, disjoint ones; return False if it overlaps one."""
    at = bisect(taken, (start, end))
    if (at and taken[at - 1][1] > start) or (at < len(taken) and taken[at][0] < end):
        return False
    taken.insert(at, (start, end))
    return True


def _decode_refcounts(raw: bytes, order: int) -> NDArray[np.uint32]:
    if order >= 3:
        wide = np.frombuffer(raw, dtype=f">u{1 << (order - 3)}")
        return np.minimum(wide, _MAX_COUNT).astype(np.uint32) if order == 6 else wide.astype("u4")
    width = 1 << order
    cells = np.frombuffer(raw, dtype=np.uint8)
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    # The first entry is in the lowest bits.
    split = (cells[:, np.newaxis] >> shifts) & np.uint8((1 << width) - 1)
    return split.reshape(-1).astype(np.uint32)
