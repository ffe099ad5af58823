"""Count the references to the host clusters of a QCOW2 image, and verify its tables.

Host clusters are counted in windows, with one walk over all tables for each window.
Memory is therefore bounded, however large the file is.

Source: QEMU docs/interop/qcow2.rst, "Host cluster management", "Cluster mapping".
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from imgcore import limits
from imgcore.errors import FormatError, LimitExceededError
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.header import read_bitmaps, read_snapshots
from imgcore.formats.qcow2.refcounts import decode_refcounts
from imgcore.formats.qcow2.tables import iter_l1, packed_ranges, read_entries

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.qcow2.header import Qcow2Header
    from imgcore.formats.shared.check_report import CheckReport

# 13 bytes for each cluster: at most 104 MiB.
WINDOW_CLUSTERS: Final = 1 << 23
MAX_BATCH_ENTRIES: Final = 1 << 18

# How a cluster is used, in `Window.uses`.
FIXED: Final = 1  # the header, or a table of which no cluster may be used twice
L2_TABLE: Final = 2
DATA: Final = 4
COPIED: Final = 8  # an entry of the active tables refers to it with the copied flag
NOT_COPIED: Final = 16  # one refers to it without


class RefcountStructure(NamedTuple):
    """The refcount table and the blocks that it names.

    ``blocks`` are host offsets in bytes, 0 for a block that is absent.
    """

    table_offset: int
    table_nbytes: int
    blocks: NDArray[np.int64]


class L1Table(NamedTuple):
    """An L1 table: the active one, or a snapshot's."""

    offset: int
    n_entries: int
    is_active: bool


class Window:
    """References to host clusters ``[base, end)``, and their stored refcounts.

    Attributes
    ----------
    counts : ndarray of uint32
        References to each cluster.
    active : ndarray of uint32
        Those from the active tables.
    uses : ndarray of uint8
        Flags: how each cluster is used.
    stored : ndarray of uint32
        Refcounts, capped at 2^32-1.
    """

    def __init__(self, base: int, n: int, cluster_bits: int, stored: NDArray[np.uint32]) -> None:
        self.base = base
        self.end: int = base + n
        self.is_first: bool = base == 0
        self._bits = cluster_bits
        self.stored = stored
        self.counts: NDArray[np.uint32] = np.zeros(n, dtype=np.uint32)
        self.active: NDArray[np.uint32] = np.zeros(n, dtype=np.uint32)
        self.uses: NDArray[np.uint8] = np.zeros(n, dtype=np.uint8)

    def inside(self, clusters: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell which of these clusters are in the window."""
        return (clusters >= self.base) & (clusters < self.end)

    def add(self, use: int, clusters: NDArray[np.int64], *, is_active: bool = False) -> None:
        """Count a reference to each of these clusters that is in the window."""
        mine = clusters[self.inside(clusters)] - self.base
        if mine.size:
            np.add.at(self.counts, mine, np.uint32(1))
            if is_active:
                np.add.at(self.active, mine, np.uint32(1))
            self.uses[mine] |= np.uint8(use)

    def add_range(self, offset: int, nbytes: int) -> None:
        """Count a fixed reference to each cluster that the bytes touch."""
        if nbytes:
            first = max(offset >> self._bits, self.base) - self.base
            last = min((offset + nbytes - 1) >> self._bits, self.end - 1) - self.base
            if first <= last:
                self.counts[first : last + 1] += np.uint32(1)
                self.uses[first : last + 1] |= np.uint8(FIXED)

    def add_structure(self, structure: RefcountStructure) -> None:
        """Count the references to the refcount table and its blocks."""
        self.add_range(structure.table_offset, structure.table_nbytes)
        self.add(FIXED, structure.blocks[structure.blocks != 0] >> self._bits)

    def mark_flags(self, entries: NDArray[np.uint64], clusters: NDArray[np.int64]) -> None:
        """Record the copied flags of active entries that refer to these clusters."""
        mine = self.inside(clusters)
        copied = (entries[mine] & np.uint64(layout.COPIED)) != 0
        self.uses[clusters[mine] - self.base] |= np.where(
            copied, np.uint8(COPIED), np.uint8(NOT_COPIED)
        )

    def conflicts(self) -> list[tuple[NDArray[np.bool_], Callable[[int], str]]]:
        """Return which clusters have uses that exclude each other.

        With each array comes a function that returns the line about an index in it.
        """
        uses = self.uses
        meta = (uses & np.uint8(FIXED | L2_TABLE)) != 0
        mixed = meta & ((uses & np.uint8(DATA)) != 0)
        fixed = ((uses & np.uint8(FIXED)) != 0) & (self.counts > 1) & ~mixed
        claimed = ((uses & np.uint8(COPIED)) != 0) & (self.active > 1) & ~mixed & ~fixed

        def line(reason: str) -> Callable[[int], str]:
            return lambda index: f"cluster {self.base + index} {reason}"

        return [
            (mixed, line("holds both metadata and guest data")),
            (fixed, line("holds two tables")),
            (claimed, line("is used twice, though a copied flag says that it is used once")),
        ]


class _Survey(Window):
    """Records which windows contain references; has no clusters itself.

    A sparse file may be far larger than the part of it that the image uses, so empty
    windows are skipped.
    """

    def __init__(self, n_clusters: int, cluster_bits: int) -> None:
        super().__init__(0, 0, cluster_bits, np.zeros(0, dtype=np.uint32))
        self.is_first = False
        self._n_clusters = n_clusters
        self.is_used = np.zeros(-(-n_clusters // WINDOW_CLUSTERS), dtype=bool)

    def add(self, use: int, clusters: NDArray[np.int64], *, is_active: bool = False) -> None:
        self.is_used[clusters[clusters < self._n_clusters] // WINDOW_CLUSTERS] = True

    def add_range(self, offset: int, nbytes: int) -> None:
        if nbytes:
            self.add_clusters(offset >> self._bits, (offset + nbytes - 1) >> self._bits)

    def add_clusters(self, first: int, last: int) -> None:
        """Record the windows of clusters ``[first, last]``."""
        self.is_used[first // WINDOW_CLUSTERS : last // WINDOW_CLUSTERS + 1] = True


def read_structure(file: ByteSource, header: Qcow2Header, report: CheckReport) -> RefcountStructure:
    """Read the refcount table; damaged entries are reported, and become 0."""
    if not header.has_refcount_table:
        report.corruption("the header names no refcount table")
        return RefcountStructure(0, 0, np.zeros(0, dtype=np.int64))
    nbytes = header.refcount_table_clusters * header.cluster_size
    raw = file.pread(header.refcount_table_offset, nbytes)
    entries = np.frombuffer(raw, dtype=">u8").astype(np.uint64)
    offsets = entries & np.uint64(layout.REFCOUNT_TABLE_OFFSET_MASK)
    reserved = (entries & np.uint64(layout.REFCOUNT_TABLE_RESERVED)) != 0
    unaligned = (offsets & np.uint64(header.cluster_size - 1)) != 0
    outside = offsets > np.uint64(max(file.nbytes - header.cluster_size, 0))
    for bad, reason in (
        (reserved, "has reserved bits set in the refcount table"),
        (unaligned, "is not cluster aligned"),
        (outside & ~unaligned, "is outside the file"),
    ):
        rows = np.flatnonzero(bad)
        report.corruptions_among(
            rows.size,
            (f"refcount block {row} ({int(entries[row]):#x}) {reason}" for row in rows.tolist()),
        )
    offsets[unaligned | outside] = 0
    return RefcountStructure(header.refcount_table_offset, nbytes, offsets.astype(np.int64))


class References:
    """The references that an image's tables contain.

    Parameters
    ----------
    file, header
        The image.
    structure : RefcountStructure
        Where the stored refcounts are.
    report : CheckReport
        Gets a corruption for each damaged table or entry, and the numbers of clusters.

    Attributes
    ----------
    n_clusters : int
        Host clusters of the file.
    reach : int
        Host offset where the last compressed cluster ends; it may lie past the end of
        the file.
    tables : list of L1Table
        Those that can be read; set by `windows`.
    """

    def __init__(
        self,
        file: ByteSource,
        header: Qcow2Header,
        structure: RefcountStructure,
        report: CheckReport,
    ) -> None:
        self.file = file
        self.header = header
        self.structure = structure
        self.report = report
        self._bits = header.cluster_bits
        self._size = header.cluster_size
        self.n_clusters: int = -(-file.nbytes >> self._bits)
        self.reach: int = 0
        self._regions: list[tuple[int, int]] = []
        self.tables: list[L1Table] = []
        self._bitmap_tables: list[tuple[int, int]] = []

    def windows(self) -> Iterator[Window]:
        """Yield the windows that contain references or refcounts, in ascending order.

        References to the refcount table and blocks are not counted yet; see
        `Window.add_structure`.
        """
        self._regions, self.tables = self._read_metadata()
        self._bitmap_tables = self._read_bitmaps()
        for base in self._bases():
            n = min(WINDOW_CLUSTERS, self.n_clusters - base)
            window = Window(base, n, self._bits, self._read_stored(base, n))
            self._count(window)
            yield window

    def on_active_entries(
        self,
        entries: NDArray[np.uint64],
        clusters: NDArray[np.int64],
        what: str,
        window: Window,
    ) -> None:
        """Handle entries of active tables and the clusters that they refer to."""

    def on_compressed_copied(
        self,
        bad: NDArray[np.bool_],
        entries: NDArray[np.uint64],
        guest: NDArray[np.int64],
    ) -> None:
        """Handle compressed entries that have the copied flag."""

    def _bases(self) -> list[int]:
        """Return the first clusters of the windows to count, always with 0."""
        if self.n_clusters <= WINDOW_CLUSTERS:
            return [0]
        survey = _Survey(self.n_clusters, self._bits)
        per_block = self._size * 8 >> self.header.refcount_order
        for block in np.flatnonzero(self.structure.blocks).tolist():
            survey.add_clusters(block * per_block, (block + 1) * per_block - 1)
        self._count(survey)
        survey.add_structure(self.structure)
        survey.is_used[0] = True
        return (np.flatnonzero(survey.is_used) * WINDOW_CLUSTERS).tolist()

    def _count(self, window: Window) -> None:
        """Count the references in a window; a survey only records where they are."""
        for offset, nbytes in self._regions:
            window.add_range(offset, nbytes)
        self._count_bitmaps(window)
        for table in self.tables:
            self._walk(table, window)

    def _read_stored(self, base: int, n: int) -> NDArray[np.uint32]:
        """Return the stored refcounts of ``n`` clusters, capped at 2^32-1."""
        stored = np.zeros(n, dtype=np.uint32)
        for offset, nbytes, low, high in self.stored_pieces(base, base + n):
            counts = decode_refcounts(self.file.pread(offset, nbytes), self.header.refcount_order)
            stored[low - base : high - base] = counts[: high - low]
        return stored

    def stored_pieces(self, base: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (offset, bytes, first, last) of refcounts of clusters ``[base, end)``.

        A piece is part of one refcount block.  Its last byte may hold further refcounts
        that are narrower than a byte.
        """
        order, blocks = self.header.refcount_order, self.structure.blocks
        per_block = self._size * 8 >> order
        for block in range(base // per_block, min(-(-end // per_block), len(blocks))):
            if not blocks[block]:
                continue
            low = max(block * per_block, base)
            high = min((block + 1) * per_block, end)
            # Windows begin at whole bytes.
            skip = low - block * per_block
            yield (
                int(blocks[block]) + (skip << order) // 8,
                ((high - low << order) + 7) // 8,
                low,
                high,
            )

    # --------------------------------------------------------------- metadata

    def _read_metadata(self) -> tuple[list[tuple[int, int]], list[L1Table]]:
        """Return (offset, bytes) of the fixed regions, and all L1 tables.

        The refcount table is not among them.
        """
        header = self.header
        l1_nbytes = header.l1_entries * layout.ENTRY_NBYTES
        regions = [
            (0, self._size),
            (header.l1_offset, l1_nbytes),
        ]
        tables = [L1Table(header.l1_offset, header.l1_entries, True)]
        if header.bitmaps is not None:
            regions.append((header.bitmaps[1], header.bitmaps[2]))
        try:
            snapshots = read_snapshots(self.file, header)
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
                    f"snapshot {snapshot.info.identifier}: L1 table of {nbytes} bytes at "
                    f"{snapshot.l1_offset:#x} is misaligned, too large or outside the file"
                )
                continue
            if not _insert(taken, snapshot.l1_offset, snapshot.l1_offset + nbytes):
                # In a sound image each snapshot has its own table.  Walking one shared
                # table for 65536 snapshots would take days.
                self.report.corruption(
                    f"snapshot {snapshot.info.identifier}: its L1 table at {snapshot.l1_offset:#x} "
                    "overlaps another one"
                )
                continue
            regions.append((snapshot.l1_offset, nbytes))
            tables.append(L1Table(snapshot.l1_offset, snapshot.l1_entries, False))
        return regions, tables

    def _is_table(self, offset: int, nbytes: int) -> bool:
        return (
            offset % self._size == 0
            and nbytes <= limits.QCOW2_MAX_L1_NBYTES
            and offset + nbytes <= self.file.nbytes
        )

    def _read_bitmaps(self) -> list[tuple[int, int]]:
        """Return (offset, number of entries) of each bitmap table."""
        try:
            bitmaps = read_bitmaps(self.file, self.header)
        except FormatError as error:
            self.report.corruption(f"bitmap directory: {error}")
            return []
        tables: list[tuple[int, int]] = []
        taken: list[tuple[int, int]] = []
        for bitmap in bitmaps:
            end = bitmap.table_offset + bitmap.table_entries * layout.ENTRY_NBYTES
            if bitmap.table_offset % self._size or end > self.file.nbytes:
                self.report.corruption(f"bitmap {bitmap.name!r}: table is outside the file")
            elif not _insert(taken, bitmap.table_offset, end):
                # As with snapshots, each has its own table.
                self.report.corruption(f"bitmap {bitmap.name!r}: its table overlaps another one")
            else:
                tables.append((bitmap.table_offset, bitmap.table_entries))
        return tables

    def _count_bitmaps(self, window: Window) -> None:
        for table_offset, n_entries in self._bitmap_tables:
            window.add_range(table_offset, n_entries * layout.ENTRY_NBYTES)
            for _, entries in iter_l1(self.file, table_offset, 0, n_entries):
                offsets = (entries & np.uint64(layout.BITMAP_OFFSET_MASK)).astype(np.int64)
                bad = (offsets & (self._size - 1) != 0) | (offsets >= self.file.nbytes)
                if window.is_first:
                    self.corruptions(
                        bad, lambda _: "bitmap cluster is misaligned or outside the file"
                    )
                window.add(FIXED, offsets[~bad & (offsets != 0)] >> self._bits)

    # ----------------------------------------------------------- L1, L2, data

    def _walk(self, table: L1Table, window: Window) -> None:
        per_table = self.header.l2_entries
        step = max(1, MAX_BATCH_ENTRIES // per_table)
        for indices, offsets in self._l2_tables(table, window):
            window.add(L2_TABLE, offsets >> self._bits, is_active=table.is_active)
            for start in range(0, len(offsets), step):
                part = offsets[start : start + step].astype(np.uint64)
                raw = read_entries(self.file, self.header, part, 0, len(part) * per_table)
                entries = raw.view(">u8").astype(np.uint64)
                first_guest = np.repeat(indices[start : start + step], per_table) * per_table
                first_guest += np.tile(np.arange(per_table, dtype=np.int64), len(part))
                self._check_entries(entries, first_guest, table.is_active, window)

    def _l2_tables(
        self, table: L1Table, window: Window
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (L1 indices, host offsets) of the L2 tables that can be read."""
        for base, l1 in iter_l1(self.file, table.offset, 0, table.n_entries):
            offsets = (l1 & np.uint64(layout.OFFSET_MASK)).astype(np.int64)
            unaligned = offsets & (self._size - 1) != 0
            outside = (offsets > self.file.nbytes - self._size) & (offsets != 0)
            if window.is_first:
                self._check_l1(l1, base, unaligned, outside)
            usable = np.flatnonzero((offsets != 0) & ~unaligned & ~outside)
            if table.is_active:
                clusters = offsets[usable] >> self._bits
                window.mark_flags(l1[usable], clusters)
                self.on_active_entries(l1[usable], clusters, "L2 table", window)
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
        self.corruptions(reserved, line("has reserved bits set"))
        self.corruptions(nowhere & ~reserved, line("has flags but no L2 table"))
        self.corruptions(unaligned, line("is not cluster aligned"))
        self.corruptions(outside & ~unaligned, line("is outside the file"))

    def _check_entries(
        self,
        entries: NDArray[np.uint64],
        guest: NDArray[np.int64],
        is_active: bool,
        window: Window,
    ) -> None:
        used = np.flatnonzero(entries)
        entries, guest = entries[used], guest[used]
        packed = (entries & np.uint64(layout.COMPRESSED)) != 0
        offsets = (entries & np.uint64(layout.OFFSET_MASK)).astype(np.int64)
        placed = ~packed & (offsets != 0)
        unaligned = placed & (offsets & (self._size - 1) != 0)
        outside = placed & ~unaligned & self._is_outside(entries, offsets, guest)
        begin, end = packed_ranges(entries[packed], self._bits)
        # The file may end inside the last cluster.
        absent = (begin >= self.file.nbytes) | (end >= self.file.nbytes + self._size)
        if window.is_first:
            self._check_flags(entries, guest, packed)
            self.bad_entries(unaligned, "is not cluster aligned", entries, guest)
            self.bad_entries(outside, "points past the end of the file", entries, guest)
            missing = np.zeros(len(entries), dtype=bool)
            missing[packed] = absent
            self.bad_entries(missing, "points past the end of the file", entries, guest)
            if is_active:
                self._count_guest(offsets[placed], guest[placed], int(packed.sum()))
        clusters = offsets[placed] >> self._bits
        is_zero = (entries & np.uint64(layout.ZERO_FLAG)) != 0
        # As QEMU counts: a misaligned data cluster counts as two clusters, a misaligned
        # zero cluster as none.
        aligned = ~(unaligned & is_zero)[placed]
        window.add(DATA, clusters[aligned], is_active=is_active)
        window.add(DATA, clusters[(unaligned & ~is_zero)[placed]] + 1)
        first = begin[~absent] >> self._bits
        last = (np.minimum(end[~absent], self.n_clusters << self._bits) - 1) >> self._bits
        # In a sound image a compressed cluster touches at most two host clusters.
        for step in range(int((last - first).max(initial=-1)) + 1):
            window.add(DATA, (first + step)[first + step <= last], is_active=is_active)
        self.reach = max(self.reach, int(end[~absent].max(initial=0)))
        if is_active:
            window.mark_flags(entries[placed], clusters)
            self.on_active_entries(entries[placed], clusters, "data cluster", window)

    def _is_outside(
        self,
        entries: NDArray[np.uint64],
        offsets: NDArray[np.int64],
        guest: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Tell which plain entries need bytes past the end of the file.

        A data cluster needs the bytes that the guest can see; a zero cluster one byte.
        """
        left = self.header.virtual_size - (guest << self._bits)
        needed = np.clip(left, 1, self._size)
        needed[(entries & np.uint64(layout.ZERO_FLAG)) != 0] = 1
        outside: NDArray[np.bool_] = offsets > self.file.nbytes - needed
        return outside

    def _check_flags(
        self,
        entries: NDArray[np.uint64],
        guest: NDArray[np.int64],
        packed: NDArray[np.bool_],
    ) -> None:
        v3 = self.header.version >= 3
        reserved = np.uint64(layout.L2_RESERVED_V3 if v3 else layout.L2_RESERVED_V2)
        bad = ~packed & ((entries & reserved) != 0)
        self.bad_entries(bad, "has reserved bits set", entries, guest)
        copied = packed & ((entries & np.uint64(layout.COPIED)) != 0)
        self.on_compressed_copied(copied, entries, guest)

    def _count_guest(
        self, offsets: NDArray[np.int64], guest: NDArray[np.int64], n_packed: int
    ) -> None:
        report = self.report
        table = guest // self.header.l2_entries
        jumps = (offsets[1:] != offsets[:-1] + self._size) & (table[1:] == table[:-1])
        report.allocated_clusters += len(offsets) + n_packed
        report.compressed_clusters += n_packed
        # As QEMU counts: every compressed cluster is fragmented.
        report.fragmented_clusters += int(jumps.sum()) + n_packed

    # --------------------------------------------------------------- reporting

    def bad_entries(
        self,
        bad: NDArray[np.bool_],
        reason: str,
        entries: NDArray[np.uint64],
        guest: NDArray[np.int64],
    ) -> None:
        """Report L2 entries as corruptions; ``guest`` are the numbers of clusters."""
        self.corruptions(
            bad,
            lambda index: (
                f"L2 entry {int(entries[index]):#x} of guest offset "
                f"{int(guest[index]) << self._bits:#x} {reason}"
            ),
        )

    def corruptions(self, bad: NDArray[np.bool_], line: Callable[[int], str]) -> None:
        """Report a corruption for each index where ``bad`` is true."""
        rows = np.flatnonzero(bad)
        self.report.corruptions_among(rows.size, (line(int(index)) for index in rows))


def _insert(taken: list[tuple[int, int]], start: int, end: int) -> bool:
    """Insert a range into sorted, disjoint ones; return False if it overlaps one."""
    at = bisect(taken, (start, end))
    if (at and taken[at - 1][1] > start) or (at < len(taken) and taken[at][0] < end):
        return False
    taken.insert(at, (start, end))
    return True
