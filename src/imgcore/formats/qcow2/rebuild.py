"""Rebuild the refcounts of a QCOW2 image: place missing blocks, and rewrite refcounts.

Source: QEMU docs/interop/qcow2.rst, "Host cluster management".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import numpy as np

from imgcore import limits
from imgcore.errors import LimitExceededError
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.refcounts import decode_refcounts, encode_refcounts
from imgcore.formats.qcow2.references import (
    COPIED,
    MAX_BATCH_ENTRIES,
    NOT_COPIED,
    RefcountStructure,
    References,
    Window,
)
from imgcore.formats.qcow2.tables import iter_l1, read_entries
from imgcore.formats.shared.check_report import CheckReport

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.qcow2.header import Qcow2Header
    from imgcore.formats.qcow2.references import L1Table

    Write = tuple[int, bytes]
    _Fix = Callable[[NDArray[np.uint64]], NDArray[np.uint64]]

MAX_BLOCKS: Final = limits.QCOW2_MAX_REFCOUNT_TABLE_NBYTES // layout.ENTRY_NBYTES
# Offset and clusters of the refcount table, in the header.
_TABLE_PLACE: Final = struct.Struct(">QI")


class ClusterSizes(Protocol):
    """What the header of an image, or a request for one, states about its clusters."""

    @property
    def cluster_bits(self) -> int:
        """log2 of the cluster size."""
        ...

    @property
    def cluster_size(self) -> int:
        """The size of a cluster in bytes."""
        ...

    @property
    def refcount_order(self) -> int:
        """log2 of the width of a refcount in bits."""
        ...


class Placement(NamedTuple):
    """A refcount structure, of which the clusters from ``first_new`` on are new."""

    structure: RefcountStructure
    first_new: int
    n_new: int


def place_structure(
    sizes: ClusterSizes,
    kept: RefcountStructure,
    needed: NDArray[np.bool_],
    first_free: int,
    *,
    least_table_nbytes: int = 0,
) -> Placement:
    """Add the refcount blocks and the table that are missing.

    Parameters
    ----------
    sizes : Qcow2Header or WriteOptions
    kept : RefcountStructure
        What can stay; ``table_nbytes`` is 0 if the table cannot.
    needed : ndarray of bool, shape (MAX_BLOCKS,)
        Which blocks must exist.
    first_free : int
        Cluster after the last one in use; those from here on may be overwritten.
    least_table_nbytes : int
        Bytes that a new table has at least, so that it can grow.

    Raises
    ------
    LimitExceededError
        The new blocks, or the table, would be too large.
    """
    bits, size = sizes.cluster_bits, sizes.cluster_size
    per_block = size * 8 >> sizes.refcount_order
    blocks = np.zeros(MAX_BLOCKS, dtype=np.int64)
    blocks[: len(kept.blocks)] = kept.blocks
    present = blocks != 0
    own = blocks[present] >> bits
    if kept.table_nbytes:
        first, end = kept.table_offset >> bits, (kept.table_offset + kept.table_nbytes) >> bits
        own = np.concatenate((own, np.arange(first, end)))
    first_free = max(first_free, int(own.max(initial=-1)) + 1)
    needed = needed.copy()
    n_new = n_table = 0
    while True:
        own = np.concatenate((own, np.arange(first_free, first_free + n_new)))
        numbers = own // per_block
        if numbers.max(initial=0) >= MAX_BLOCKS:
            raise _too_large(int(numbers.max()) + 1)
        needed[numbers] = True
        missing = np.flatnonzero(needed & ~present)
        n_entries = int(np.flatnonzero(needed | present)[-1]) + 1
        n_table = -(-max(n_entries * layout.ENTRY_NBYTES, least_table_nbytes) // size)
        if n_table * size <= kept.table_nbytes:
            n_table = 0
        if len(missing) + n_table == n_new:
            break
        n_new = len(missing) + n_table
    if n_table * size > limits.QCOW2_MAX_REFCOUNT_TABLE_NBYTES:
        raise _too_large(n_entries)
    if n_new * size > limits.QCOW2_MAX_NEW_REFCOUNTS_NBYTES:
        raise LimitExceededError(
            f"{n_new} new clusters for refcounts take {n_new * size} bytes, allowed up to "
            f"{limits.QCOW2_MAX_NEW_REFCOUNTS_NBYTES}"
        )
    table_offset, table_nbytes = kept.table_offset, kept.table_nbytes
    if n_table:
        table_offset, table_nbytes = first_free << bits, n_table * size
    blocks[missing] = (np.arange(len(missing)) + first_free + n_table) << bits
    n_kept = table_nbytes // layout.ENTRY_NBYTES
    structure = RefcountStructure(table_offset, table_nbytes, blocks[:n_kept])
    return Placement(structure, first_free, n_new)


def _too_large(n_blocks: int) -> LimitExceededError:
    return LimitExceededError(
        f"a refcount table for {n_blocks} blocks takes {n_blocks * layout.ENTRY_NBYTES} bytes, "
        f"allowed up to {limits.QCOW2_MAX_REFCOUNT_TABLE_NBYTES}"
    )


def structure_writes(
    header: Qcow2Header, placement: Placement, file_nbytes: int
) -> Iterator[Write]:
    """Yield the new refcount table, its place in the header, and zeros for new blocks.

    Past ``file_nbytes``, the size of the image before the repair, blocks are zeros.
    """
    structure, bits = placement.structure, header.cluster_bits
    yield (
        layout.REFCOUNT_TABLE_FIELD_OFFSET,
        _TABLE_PLACE.pack(structure.table_offset, structure.table_nbytes >> bits),
    )
    yield structure.table_offset, structure.blocks.astype(">u8").tobytes()
    for offset in structure.blocks[structure.blocks >= placement.first_new << bits].tolist():
        if offset < file_nbytes:
            yield offset, bytes(header.cluster_size)


def wrong_flags(window: Window, is_single: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell which clusters have an entry whose copied flag is wrong.

    ``is_single`` tells which clusters have the refcount 1.
    """
    copied = (window.uses & np.uint8(COPIED)) != 0
    not_copied = (window.uses & np.uint8(NOT_COPIED)) != 0
    wrong: NDArray[np.bool_] = (copied & ~is_single) | (not_copied & is_single)
    return wrong


class Rewrite(References):
    """Yields the refcounts and copied flags that disagree with the references.

    It runs over the copy that is repaired, and what it yields is written to that copy
    at once: one L2 table may be changed for several windows.

    Parameters
    ----------
    copy, header, structure
        The copy, with the refcount structure that it will have.
    only_lower : bool
        Leave refcounts that are too low, and copied flags that depend on them.
    """

    def __init__(
        self,
        copy: ByteSource,
        header: Qcow2Header,
        structure: RefcountStructure,
        *,
        only_lower: bool,
    ) -> None:
        super().__init__(copy, header, structure, CheckReport())
        self._only_lower = only_lower
        self._has_compressed_copied = False

    def on_compressed_copied(
        self, bad: NDArray[np.bool_], entries: NDArray[np.uint64], guest: NDArray[np.int64]
    ) -> None:
        """Remember that there are such entries."""
        self._has_compressed_copied |= bool(bad.any()) and not self._only_lower

    def writes(self) -> Iterator[Write]:
        """Yield (offset, bytes)."""
        for window in self.windows():
            window.add_structure(self.structure)
            final = window.counts
            if self._only_lower:
                final = np.minimum(window.stored, window.counts)
            yield from self._refcounts(window, final)
            yield from self._flags(window, final)

    def _refcounts(self, window: Window, final: NDArray[np.uint32]) -> Iterator[Write]:
        order = self.header.refcount_order
        for offset, nbytes, low, high in self.stored_pieces(window.base, window.end):
            raw = self.file.pread(offset, nbytes)
            counts = decode_refcounts(raw, order)
            counts[: high - low] = final[low - window.base : high - window.base]
            encoded = encode_refcounts(counts, order)
            different = np.flatnonzero(encoded != np.frombuffer(raw, np.uint8))
            if different.size:
                first, last = int(different[0]), int(different[-1])
                yield offset + first, encoded[first : last + 1].tobytes()

    def _flags(self, window: Window, final: NDArray[np.uint32]) -> Iterator[Write]:
        """Yield the table entries whose copied flags are wrong."""
        is_single = final == 1
        wrong = wrong_flags(window, is_single) & (final == window.counts)
        flags = np.where(is_single, np.uint64(layout.COPIED), np.uint64(0))

        def fixed(entries: NDArray[np.uint64]) -> NDArray[np.uint64]:
            offsets = entries & np.uint64(layout.OFFSET_MASK)
            clusters = (offsets >> np.uint64(self.header.cluster_bits)).astype(np.int64)
            plain = (entries & np.uint64(layout.COMPRESSED)) == 0
            rows = np.flatnonzero(plain & (offsets != 0) & window.inside(clusters))
            rows = rows[wrong[clusters[rows] - window.base]]
            result = entries.copy()
            result[rows] &= ~np.uint64(layout.COPIED)
            result[rows] |= flags[clusters[rows] - window.base]
            return result

        if wrong.any():
            yield from self._table_writes([t for t in self.tables if t.is_active], fixed)
        if window.is_first and self._has_compressed_copied:
            yield from self._table_writes(self.tables, _without_compressed_copied)

    def _table_writes(self, tables: list[L1Table], fixed: _Fix) -> Iterator[Write]:
        """Yield what changes if L1 and L2 entries become what ``fixed`` returns."""
        per_table = self.header.l2_entries
        step = max(1, MAX_BATCH_ENTRIES // per_table)
        for table in tables:
            for base, l1 in iter_l1(self.file, table.offset, 0, table.n_entries):
                yield from _changes(table.offset + base * layout.ENTRY_NBYTES, l1, fixed(l1))
                offsets = l1 & np.uint64(layout.OFFSET_MASK)
                offsets = offsets[offsets != 0]
                for start in range(0, len(offsets), step):
                    part = offsets[start : start + step]
                    raw = read_entries(self.file, self.header, part, 0, len(part) * per_table)
                    old = raw.view(">u8").astype(np.uint64)
                    new = fixed(old)
                    rows = np.flatnonzero((old != new).reshape(-1, per_table).any(axis=1))
                    for row in rows.tolist():
                        cells = slice(row * per_table, (row + 1) * per_table)
                        yield from _changes(int(part[row]), old[cells], new[cells])


def _without_compressed_copied(entries: NDArray[np.uint64]) -> NDArray[np.uint64]:
    both = np.uint64(layout.COMPRESSED | layout.COPIED)
    return np.where((entries & both) == both, entries & ~np.uint64(layout.COPIED), entries)


def _changes(offset: int, old: NDArray[np.uint64], new: NDArray[np.uint64]) -> Iterator[Write]:
    """Yield the entries of a table from the first to the last that differ."""
    different = np.flatnonzero(old != new)
    if different.size:
        first, last = int(different[0]), int(different[-1])
        yield offset + first * layout.ENTRY_NBYTES, new[first : last + 1].astype(">u8").tobytes()
