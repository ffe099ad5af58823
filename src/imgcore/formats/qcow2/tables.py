"""Turn QCOW2 L1 and L2 tables into extents.

Source: QEMU docs/interop/qcow2.rst, "Cluster mapping".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore import limits
from imgcore._core import TableFormat
from imgcore.engine.extents import Kind, clip, lose_ranges, single
from imgcore.errors import CorruptImageError
from imgcore.files.byte_source import LooksAhead
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.whole_tables import WholeTables
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.shared.tables import decode_entries

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.qcow2.header import Qcow2Header

# The L1 table is read in pieces of 1 MiB.
L1_PIECE_ENTRIES: Final = 1 << 17

# With all bits set, L1 entries have reserved bits, and L2 entries point far outside.
IMPOSSIBLE_ENTRY: Final = b"\xff" * layout.ENTRY_NBYTES

# A short run of absent L2 tables costs less as zero entries than as a separate batch.
_FOLDED_GAP_ENTRIES: Final = 8192


def table_format(cluster_bits: int, *, version: int = 3, kind: Kind = Kind.DEFLATE) -> TableFormat:
    """Return the description of L2 tables for the table kernels.

    Parameters
    ----------
    cluster_bits : int
        log2 of the cluster size.
    version : int
        2 or 3.  Version 2 does not have the zero flag.
    kind : Kind
        The kind of compressed clusters: DEFLATE or ZSTD.
    """
    cluster_size = 1 << cluster_bits
    reserved = layout.L2_RESERVED_V3 if version >= 3 else layout.L2_RESERVED_V2
    shift = layout.COMPRESSED_SHIFT_AT_BITS_0 - cluster_bits
    rules = [(layout.COMPRESSED, layout.COMPRESSED, int(kind))]
    if version >= 3:
        rules.append((layout.ZERO_FLAG, layout.ZERO_FLAG, int(Kind.ZERO)))
    # An entry with only reserved bits is not a hole: as DATA it is rejected.
    rules.append((layout.OFFSET_MASK | reserved, 0, int(Kind.HOLE)))
    return TableFormat(
        entry_nbytes=layout.ENTRY_NBYTES,
        big_endian=True,
        block_nbytes=cluster_size,
        offset_mask=layout.OFFSET_MASK,
        reserved_mask=reserved | (cluster_size - 1) & layout.OFFSET_MASK,
        default_kind=int(Kind.DATA),
        compressed_mask=(1 << shift) - 1,
        length_shift=shift,
        length_mask=(1 << (cluster_bits - layout.COMPRESSED_LENGTH_BITS_LESS)) - 1,
        compressed_bound=cluster_size,
        rules=rules,
        zero_entry=layout.ZERO_FLAG,
        stored_bits=layout.COPIED,
        compressed_bits=layout.COMPRESSED,
    )


def iter_l1(
    file: ByteSource, l1_offset: int, first: int, last: int, damage: Damage = STRICT
) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    """Yield entries ``[first, last)`` of an L1 table in pieces.

    Each piece is ``(index of its first entry, entries)``.  Entries are raw, in native
    byte order.  Memory: one piece.
    """
    for start in range(first, last, L1_PIECE_ENTRIES):
        count = min(L1_PIECE_ENTRIES, last - start)
        raw = damage.read_table(
            file,
            l1_offset + start * layout.ENTRY_NBYTES,
            count * layout.ENTRY_NBYTES,
            IMPOSSIBLE_ENTRY,
        )
        yield start, np.frombuffer(raw, dtype=">u8").astype(np.uint64)


def read_entries(
    file: ByteSource | WholeTables,
    header: Qcow2Header,
    offsets: NDArray[np.uint64],
    first: int,
    last: int,
    damage: Damage = STRICT,
) -> NDArray[np.uint8]:
    """Read the raw entries ``[first, last)`` of consecutive L2 tables.

    Parameters
    ----------
    offsets : ndarray, shape (n,), dtype uint64
        Offsets of the tables, inside the file.  A table at 0 does not exist and reads
        as zero entries.
    first, last : int
        Counted from the first entry of the first table.

    Returns
    -------
    ndarray, shape ((last - first) * 8,), dtype uint8
        Owned by the caller.
    """
    per_table = header.l2_entries
    entry_nbytes = layout.ENTRY_NBYTES
    first_table, last_table = first // per_table, -(-last // per_table)
    buffer = np.zeros((last - first) * entry_nbytes, dtype=np.uint8)
    tables = np.arange(first_table, last_table, dtype=np.int64)
    low = np.maximum(tables * per_table, first)
    high = np.minimum((tables + 1) * per_table, last)
    # Offsets have at most 56 bits, so signed integers can hold them.
    where = offsets[first_table:last_table].astype(np.int64)
    present = where != 0
    begin = where + (low - tables * per_table) * entry_nbytes
    nbytes = (high - low) * entry_nbytes
    # Tables that are also adjacent in the file are read at once.
    joins = present[1:] & present[:-1] & (begin[1:] == begin[:-1] + nbytes[:-1])
    starts = np.flatnonzero(present & np.concatenate(([True], ~joins)))
    ends = np.flatnonzero(present & np.concatenate((~joins, [True])))
    view = buffer.data
    to = (low[starts] - first) * entry_nbytes
    until = (high[ends] - first) * entry_nbytes
    for offset, a, b in zip(begin[starts].tolist(), to.tolist(), until.tolist(), strict=True):
        if damage.salvages and not isinstance(file, WholeTables):
            view[a:b] = damage.read_table(file, offset, b - a, IMPOSSIBLE_ENTRY)
        else:
            file.pread_into(offset, view[a:b])
    return buffer


def packed_ranges(
    entries: NDArray[np.uint64], cluster_bits: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the compressed clusters of L2 entries begin and end in the file.

    Ends are those of whole sectors, and may lie past the end of the file.
    """
    shift = layout.COMPRESSED_SHIFT_AT_BITS_0 - cluster_bits
    begin = (entries & np.uint64((1 << shift) - 1)).astype(np.int64)
    mask = (1 << (cluster_bits - layout.COMPRESSED_LENGTH_BITS_LESS)) - 1
    sectors = ((entries >> np.uint64(shift)) & np.uint64(mask)).astype(np.int64) + 1
    unit = layout.COMPRESSED_UNIT_NBYTES
    return begin, (begin // unit + sectors) * unit


class ExtentTables:
    """Turns tables into extents; keeps no tables in memory between calls."""

    def __init__(self, file: ByteSource, header: Qcow2Header, damage: Damage = STRICT) -> None:
        self._file = file
        self._l2_file: ByteSource | WholeTables = file
        if isinstance(file, LooksAhead):
            self._l2_file = WholeTables(file, header.cluster_size)
        self._damage = damage
        self._header = header
        self._lost: tuple[NDArray[np.uint64], NDArray[np.uint64]] | None = None
        zstd = header.compression_type == layout.COMPRESSION_ZSTD
        self._format = table_format(
            header.cluster_bits,
            version=header.version,
            kind=Kind.ZSTD if zstd else Kind.DEFLATE,
        )

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches; see `imgcore.formats.api.Reader.extents`."""
        if not self._damage.salvages:
            return self._extents(start, length)
        if self._lost is None:
            self._lost = self._lost_tables()
        starts, ends = self._lost
        return (lose_ranges(rows, starts, ends) for rows in self._extents(start, length))

    def _lost_tables(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Return the guest ranges whose L1 entries are impossible, as starts and ends.

        `_extents` takes them for holes.
        """
        header = self._header
        reach = header.l2_entries << header.cluster_bits
        n_entries = -(-header.virtual_size // reach)
        is_lost = np.ones(n_entries, dtype=np.bool_)
        last = min(n_entries, header.l1_entries)
        for base, l1 in iter_l1(self._file, header.l1_offset, 0, last, self._damage):
            is_lost[base : base + len(l1)] = self._is_impossible(l1)
        edges = np.flatnonzero(np.diff(np.concatenate(([False], is_lost, [False]))))
        places = np.minimum(edges.astype(np.uint64) * np.uint64(reach), header.virtual_size)
        places = places.astype(np.uint64)
        return places[::2], places[1::2]

    def _extents(self, start: int, length: int) -> Iterator[Extents]:
        stop = start + length
        done = start
        for first, last, offsets, first_table in self._groups(start, stop):
            base = first_table * self._header.l2_entries
            for piece in range(first, last, limits.MAX_BATCH_ROWS):
                piece_end = min(piece + limits.MAX_BATCH_ROWS, last)
                piece_start = max(start, piece << self._header.cluster_bits)
                if piece_start > done:
                    yield single(done, piece_start - done, Kind.HOLE)
                entries = read_entries(
                    self._l2_file,
                    self._header,
                    offsets,
                    piece - base,
                    piece_end - base,
                    self._damage,
                )
                done = min(stop, piece_end << self._header.cluster_bits)
                yield self._decode(entries, piece, piece_start, done)
        if stop > done:
            yield single(done, stop - done, Kind.HOLE)

    def _groups(self, start: int, stop: int) -> Iterator[tuple[int, int, NDArray[np.uint64], int]]:
        """Yield (first entry, end, L2 offsets, first table) of runs with small gaps."""
        per_table = self._header.l2_entries
        first_entry = start >> self._header.cluster_bits
        last_entry = -(-stop >> self._header.cluster_bits)
        if last_entry <= first_entry:
            return
        max_tables = max(1, limits.MAX_BATCH_ROWS // per_table)
        max_step = max(1, _FOLDED_GAP_ENTRIES // per_table)
        pieces = iter_l1(
            self._file,
            self._header.l1_offset,
            first_entry // per_table,
            min(-(-last_entry // per_table), self._header.l1_entries),
            self._damage,
        )
        for base, l1 in pieces:
            offsets = self._l2_offsets(l1, base)
            present = np.flatnonzero(offsets)
            if not present.size:
                continue
            cuts = np.flatnonzero(np.diff(present) > max_step)
            run_first = present[np.concatenate(([0], cuts + 1))].tolist()
            run_last = present[np.concatenate((cuts, [present.size - 1]))].tolist()
            for low, high in zip(run_first, run_last, strict=True):
                for table in range(low, high + 1, max_tables):
                    end = min(table + max_tables, high + 1)
                    yield (
                        max(first_entry, (base + table) * per_table),
                        min(last_entry, (base + end) * per_table),
                        offsets[table:end],
                        base + table,
                    )

    def _l2_offsets(self, l1: NDArray[np.uint64], base: int) -> NDArray[np.uint64]:
        offsets = l1 & np.uint64(layout.OFFSET_MASK)
        bad = self._is_impossible(l1)
        if bad.any() and not self._damage.salvages:
            index = int(np.flatnonzero(bad)[0])
            self._refuse_l1_entry(base + index, int(l1[index]))
        offsets[bad] = 0
        return offsets

    def _is_impossible(self, l1: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Tell which L1 entries cannot be right; a table may be cut when salvaging."""
        offsets = l1 & np.uint64(layout.OFFSET_MASK)
        in_cluster = np.uint64((self._header.cluster_size - 1) | layout.L1_RESERVED)
        needed = 1 if self._damage.salvages else self._header.cluster_size
        room = max(self._file.nbytes - needed, 0)
        bad: NDArray[np.bool_] = (l1 & in_cluster) != 0
        bad |= (offsets != 0) & (offsets > np.uint64(room))
        return bad

    def _refuse_l1_entry(self, index: int, entry: int) -> None:
        offset = entry & layout.OFFSET_MASK
        if entry & layout.L1_RESERVED:
            reason = "has reserved bits set"
        elif offset % self._header.cluster_size:
            reason = f"is not a multiple of the cluster size {self._header.cluster_size:#x}"
        else:
            reason = f"puts an L2 table past the end of the file ({self._file.nbytes:#x})"
        raise CorruptImageError(
            f"L1 entry {index} ({entry:#x}) {reason}", path=self._file.path, offset=offset
        )

    def _decode(
        self, entries: NDArray[np.uint8], first_entry: int, start: int, stop: int
    ) -> Extents:
        rows = decode_entries(
            self._format,
            entries.view(">u8"),
            lambda index: self._entry_error(entries, first_entry, index),
            guest_offset=first_entry << self._header.cluster_bits,
            guest_end=stop,
            file_nbytes=self._file.nbytes,
            damage=self._damage,
        )
        return clip(rows, start, stop)

    def _entry_error(
        self, entries: NDArray[np.uint8], first_entry: int, index: int
    ) -> CorruptImageError:
        position = index * layout.ENTRY_NBYTES
        entry = int.from_bytes(entries[position : position + layout.ENTRY_NBYTES].tobytes(), "big")
        guest_offset = (first_entry + index) << self._header.cluster_bits
        where = f"cluster at guest offset {guest_offset:#x} (L2 entry {entry:#x})"
        cluster_size = self._header.cluster_size
        if entry & layout.COMPRESSED:
            shift = layout.COMPRESSED_SHIFT_AT_BITS_0 - self._header.cluster_bits
            offset = entry & ((1 << shift) - 1)
        else:
            offset = entry & layout.OFFSET_MASK
        if offset >= self._file.nbytes:
            reason = f"starts at {offset:#x}, past the end of the file ({self._file.nbytes:#x})"
        elif self._header.version < 3 and entry & layout.ZERO_FLAG:
            reason = "has the zero flag, which version 2 does not have"
        elif entry & layout.L2_RESERVED_V3:
            reason = "has reserved bits set"
        elif offset % cluster_size:
            reason = f"is not a multiple of the cluster size {cluster_size:#x}"
        else:
            reason = (
                f"ends at {offset + cluster_size:#x}, past the end of the file "
                f"({self._file.nbytes:#x})"
            )
        return CorruptImageError(f"{where} {reason}", path=self._file.path, offset=offset)
