"""Turn VMDK grain directories and grain tables into extents.

Source: Virtual Disk Format 5.0, "Grain Directory", "Grain Table".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore._core import TableFormat
from imgcore.engine.extents import FLAG_GRAIN_MARKER, Kind, clip, lose, lose_ranges, single
from imgcore.errors import CorruptImageError
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.shared.tables import (
    decode_entries,
    in_damaged_sectors,
    last_plausible_sector,
)
from imgcore.formats.vmdk.layout import (
    ENTRY_ABSENT,
    ENTRY_NBYTES,
    ENTRY_ZEROED,
    GRAIN_MARKER,
    MAX_COMPRESSED_GRAINS,
)
from imgcore.formats.vmdk.stream_grains import StreamGrains
from imgcore.limits import MAX_BATCH_ROWS, SECTOR_NBYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.formats.vmdk.header import SparseExtent

    Entries = NDArray[np.uint32]
    Mask = NDArray[np.bool_]
    Offsets = NDArray[np.uint64]

_ENTRY_DTYPE: Final = np.dtype("<u4")
# One read of the directory: 256 KiB, or 2 TiB of disk with grains of 64 KiB.
DIRECTORY_PIECE_ENTRIES: Final = 1 << 16
_ENTRY_MASK: Final = 0xFFFFFFFF
# The last sector of 2 TiB, after which no grain has room.
_IMPOSSIBLE: Final = 0xFFFFFFFF
_IMPOSSIBLE_ENTRY: Final = _IMPOSSIBLE.to_bytes(ENTRY_NBYTES, "little")
# Reading a shorter run of tables is faster than searching it for holes.
_PROBED_NTABLES: Final = 1024


def table_format(extent: SparseExtent) -> TableFormat:
    """Return the description of the extent's grain tables for the table kernels."""
    rules = [(_ENTRY_MASK, ENTRY_ABSENT, int(Kind.HOLE))]
    if extent.has_zeroed_grains:
        rules.append((_ENTRY_MASK, ENTRY_ZEROED, int(Kind.ZERO)))
    return TableFormat(
        entry_nbytes=ENTRY_NBYTES,
        big_endian=False,
        block_nbytes=extent.grain_nbytes,
        offset_mask=_ENTRY_MASK,
        offset_lshift=SECTOR_NBYTES.bit_length() - 1,
        default_kind=int(Kind.ZLIB if extent.is_compressed else Kind.DATA),
        flags=FLAG_GRAIN_MARKER if extent.is_compressed and extent.has_markers else 0,
        compressed_bound=extent.compressed_bound if extent.is_compressed else 0,
        rules=rules,
    )


def read_directory(
    extent: SparseExtent, gd_offset: int, first: int, n_entries: int, damage: Damage = STRICT
) -> NDArray[np.uint32]:
    """Return entries of a grain directory as sector numbers, shape (n_entries,)."""
    offset, nbytes = gd_offset + first * ENTRY_NBYTES, n_entries * ENTRY_NBYTES
    raw = damage.read_table(extent.file, offset, nbytes, _IMPOSSIBLE_ENTRY)
    return np.frombuffer(raw, dtype=_ENTRY_DTYPE)


def absent_or_zeroed(extent: SparseExtent, directory: Entries) -> tuple[Mask, Mask]:
    """Return two masks: entries without a table, and those of them that mean zeros."""
    zeroed = (directory == ENTRY_ZEROED) & np.bool_(extent.has_zeroed_grains)
    return (directory == ENTRY_ABSENT) | zeroed, zeroed


def read_tables(
    extent: SparseExtent, directory: Entries, first: int, damage: Damage = STRICT
) -> NDArray[np.uint32]:
    """Read consecutive grain tables; tables adjacent in the file are read at once.

    Parameters
    ----------
    extent : SparseExtent
        The extent.
    directory : ndarray, shape (n,), dtype uint32
        Directory entries; an entry without a table gives grain entries of its value.
    first : int
        Index of ``directory[0]``, for messages.
    damage : Damage
        When salvaging, entries that are not in the file are impossible ones.

    Returns
    -------
    ndarray, shape (n * n_gtes_per_gt,), dtype uint32
        Owned by the caller.

    Raises
    ------
    CorruptImageError
        A table lies outside the file.
    """
    tables = np.zeros((len(directory), extent.n_gtes_per_gt), dtype=_ENTRY_DTYPE)
    absent, zeroed = absent_or_zeroed(extent, directory)
    tables[zeroed] = ENTRY_ZEROED
    offsets = directory.astype(np.int64) * SECTOR_NBYTES
    outside = ~absent & (offsets > extent.file.nbytes - extent.gt_nbytes)
    if damage.salvages:
        for index in np.flatnonzero(~absent).tolist():
            raw = damage.read_table(
                extent.file, int(offsets[index]), extent.gt_nbytes, _IMPOSSIBLE_ENTRY
            )
            tables[index] = np.frombuffer(raw, dtype=_ENTRY_DTYPE)
        return tables.reshape(-1)
    if outside.any():
        index = int(np.argmax(outside))
        raise CorruptImageError(
            f"grain table {first + index} ends at {int(offsets[index]) + extent.gt_nbytes:#x}, "
            f"past the end of the file ({extent.file.nbytes:#x})",
            path=extent.file.path,
            offset=int(offsets[index]),
        )
    for start, stop in _joined_runs(offsets, absent, extent.gt_nbytes):
        extent.file.pread_into(int(offsets[start]), tables[start:stop])
    return tables.reshape(-1)


def _joined_runs(
    offsets: NDArray[np.int64], absent: NDArray[np.bool_], gt_nbytes: int
) -> Iterator[tuple[int, int]]:
    """Yield [start, stop) of present tables that are also adjacent in the file."""
    present = ~absent
    if not present.any():
        return
    joins = np.zeros(len(offsets), dtype=bool)
    joins[1:] = present[1:] & present[:-1] & (np.diff(offsets) == gt_nbytes)
    starts = np.flatnonzero(present & ~joins)
    # A run ends where the next entry does not join.
    ends = np.flatnonzero(present & ~np.append(joins[1:], False)) + 1
    yield from zip(starts.tolist(), ends.tolist(), strict=True)


def drop_unwritten_tables(extent: SparseExtent, directory: Entries) -> Entries:
    """Return the directory without tables that are in holes of the file.

    A monolithic file has a table for every part of the disk.  Tables that were never
    written are holes, gigabytes of them in a large, nearly empty disk.  They need not
    be read, as their entries are zero.
    """
    offsets = directory.astype(np.int64) * SECTOR_NBYTES
    absent, _ = absent_or_zeroed(extent, directory)
    absent |= offsets > extent.file.nbytes - extent.gt_nbytes
    kept = directory
    for start, stop in _joined_runs(offsets, absent, extent.gt_nbytes):
        if stop - start < _PROBED_NTABLES:
            continue
        if kept is directory:
            kept = directory.copy()
        begin, end = int(offsets[start]), int(offsets[stop - 1]) + extent.gt_nbytes
        is_written = np.zeros(stop - start, dtype=bool)
        position = begin
        while position < end:
            data_start, data_end = extent.file.next_data(position)
            if data_start >= min(data_end, end):
                break
            low = (max(data_start, position) - begin) // extent.gt_nbytes
            high = -(-(min(data_end, end) - begin) // extent.gt_nbytes)
            is_written[low:high] = True
            position = max(data_end, position + 1)
        kept[start:stop][~is_written] = ENTRY_ABSENT
    return kept


class SparseTables:
    """Turns the tables of one sparse extent into extents of the disk.

    Parameters
    ----------
    extent : SparseExtent
        The extent.
    guest_base : int
        Guest offset of its first byte in the whole disk.
    guest_nbytes : int
        How many bytes of it the disk uses.
    file_index : int
        Index of the extent's file in the reader's sources.
    short_nbytes : int
        Inflated size of a truncated last grain, else 0.  The source after
        ``file_index`` has blocks of that size.
    damage : Damage
        When salvaging, the redundant tables replace what is damaged, and the markers of
        a stream replace its tables.
    """

    def __init__(
        self,
        extent: SparseExtent,
        guest_base: int,
        guest_nbytes: int,
        file_index: int,
        short_nbytes: int = 0,
        damage: Damage = STRICT,
    ) -> None:
        self.extent = extent
        self._damage = damage
        self._stream: StreamGrains | None = None
        n_grains = -(-guest_nbytes // extent.grain_nbytes)
        self._last_sector = last_plausible_sector(extent.file, n_grains * extent.grain_nbytes)
        self.guest_base = guest_base
        self.guest_end: int = guest_base + guest_nbytes
        self._file_index = file_index
        self._short_nbytes = short_nbytes
        self._short_grain_start = (
            guest_base + guest_nbytes // extent.grain_nbytes * extent.grain_nbytes
        )
        self._format = table_format(extent)
        # The rows of a window, with a hole before it, fit in a batch.
        self._window_ntables = max(1, (MAX_BATCH_ROWS - 1) // extent.n_gtes_per_gt)

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield batches for ``length`` bytes from guest offset ``start``."""
        if not self._damage.salvages:
            yield from self._extents(start, length)
            return
        if self.extent.gd_offset or self.extent.rgd_offset:
            batches = self._extents(start, length)
        else:
            batches = iter([single(start, length, Kind.LOST)])
        for rows in batches:
            if self.extent.is_compressed and self.extent.has_markers:
                yield from self._with_stream(rows)
            else:
                yield rows

    def _with_stream(self, rows: Extents) -> Iterator[Extents]:
        """Yield rows, with what a walk of the stream finds in place of LOST ones.

        Also in place of holes: a table may have been overwritten with zeros.
        """
        if self._stream is None:
            self._stream = StreamGrains(self.extent, self.guest_base, self.guest_end)
        done = 0
        is_open = (rows["kind"] == Kind.LOST) | (rows["kind"] == Kind.HOLE)
        for index in np.flatnonzero(is_open).tolist():
            if done < index:
                yield rows[done:index]
            start = int(rows["guest_offset"][index])
            stop = start + int(rows["length"][index])
            for found in self._stream.extents(start, stop, self._file_index):
                if rows["kind"][index] == Kind.HOLE:
                    found["kind"][found["kind"] == Kind.LOST] = Kind.HOLE
                self._mark_short_grain(found)
                yield found
            done = index + 1
        if done < len(rows):
            yield rows[done:]

    def _extents(self, start: int, length: int) -> Iterator[Extents]:
        stop = start + length
        reach_nbytes = self.extent.gt_reach_nbytes
        first = (start - self.guest_base) // reach_nbytes
        end = -(-(stop - self.guest_base) // reach_nbytes)
        for piece in range(first, end, DIRECTORY_PIECE_ENTRIES):
            n_entries = min(DIRECTORY_PIECE_ENTRIES, end - piece)
            directory, redundant = self._read_directories(piece, n_entries)
            if not self._damage.salvages:
                yield from self._piece(directory, redundant, piece, start, stop)
                continue
            starts, ends = self._take_lost(directory, piece)
            for rows in self._piece(directory, redundant, piece, start, stop):
                yield lose_ranges(rows, starts, ends)

    def _read_directories(self, first: int, n_entries: int) -> tuple[Entries, Entries | None]:
        """Return part of the directory; when salvaging, of the redundant one too."""
        extent, damage = self.extent, self._damage
        if not damage.salvages or not extent.rgd_offset:
            directory = read_directory(extent, extent.gd_offset, first, n_entries, damage)
            kept = drop_unwritten_tables(extent, directory)
            return (kept.copy() if damage.salvages else kept), None
        redundant = read_directory(extent, extent.rgd_offset, first, n_entries, damage)
        if not extent.gd_offset:
            return redundant.copy(), None
        directory = read_directory(extent, extent.gd_offset, first, n_entries, damage)
        last_sector = (extent.file.nbytes - 1) // SECTOR_NBYTES
        is_bad = (directory == ENTRY_ABSENT) | (directory > last_sector)
        is_better = (redundant != ENTRY_ABSENT) & (redundant <= last_sector)
        return np.where(is_bad & is_better, redundant, directory), redundant

    def _take_lost(self, directory: Entries, first: int) -> tuple[Offsets, Offsets]:
        """Return the guest ranges of tables outside the file; make them absent."""
        is_lost = directory > (self.extent.file.nbytes - 1) // SECTOR_NBYTES
        directory[is_lost] = ENTRY_ABSENT
        edges = np.flatnonzero(np.diff(np.concatenate(([False], is_lost, [False]))))
        places = self.guest_base + (first + edges) * self.extent.gt_reach_nbytes
        bounds: Offsets = np.minimum(places, self.guest_end).astype(np.uint64)
        return bounds[::2], bounds[1::2]

    def _piece(
        self, directory: Entries, redundant: Entries | None, first: int, start: int, stop: int
    ) -> Iterator[Extents]:
        """Split a directory piece into holes and windows of tables."""
        # A zeroed entry is not a hole, so it goes through a window.
        used = np.flatnonzero(directory != ENTRY_ABSENT)
        position = 0
        while position < len(directory):
            at = int(np.searchsorted(used, position))
            window = int(used[at]) if at < len(used) else len(directory)
            window_end = min(window + self._window_ntables, len(directory))
            last = int(np.searchsorted(used, window_end))
            # A window does not end with absent tables.
            window_end = int(used[last - 1]) + 1 if last > at else window
            yield self._batch(
                directory, redundant, first, position, window, window_end, start, stop
            )
            position = window_end

    def _batch(
        self,
        directory: Entries,
        redundant: Entries | None,
        first: int,
        position: int,
        window: int,
        window_end: int,
        start: int,
        stop: int,
    ) -> Extents:
        """Return a hole for entries [position, window), then the window's rows."""
        hole_start = self._clip(first + position, start, stop)
        window_start = self._clip(first + window, start, stop)
        window_stop = self._clip(first + window_end, start, stop)
        hole = (
            [single(hole_start, window_start - hole_start, Kind.HOLE)]
            if hole_start < window_start
            else []
        )
        if window_start == window_stop:
            return hole[0]
        part = slice(window, window_end)
        entries = read_tables(self.extent, directory[part], first + window, self._damage)
        if self._damage.salvages:
            entries = self._trusted(entries, None if redundant is None else redundant[part])
        table_start = self.guest_base + (first + window) * self.extent.gt_reach_nbytes
        rows = self._decode(entries, table_start, window_start, window_stop)
        return np.concatenate([*hole, rows]) if hole else rows

    def _trusted(self, entries: Entries, redundant: Entries | None) -> Entries:
        """Return grain tables in which damage is repaired or made impossible.

        Where the redundant tables differ, those count whose sector is not overwritten.
        An entry that only one of them has is right: neither VMware nor QEMU removes
        entries.
        """
        last, used = self._last_sector, entries != ENTRY_ABSENT
        damaged = in_damaged_sectors(used & (entries > last), used)
        if redundant is None:
            return np.where(damaged & used, np.uint32(_IMPOSSIBLE), entries)
        others = read_tables(self.extent, redundant, 0, self._damage)
        others_used = others != ENTRY_ABSENT
        others_damaged = in_damaged_sectors(others_used & (others > last), others_used)
        is_better = others_used & (others <= last) & (~used | (entries > last))
        chosen = np.where((damaged | is_better) & ~others_damaged, others, entries)
        return np.where(damaged & others_damaged & used, np.uint32(_IMPOSSIBLE), chosen)

    def _clip(self, table_index: int, start: int, stop: int) -> int:
        return min(max(self.guest_base + table_index * self.extent.gt_reach_nbytes, start), stop)

    def _decode(self, entries: Entries, table_start: int, start: int, stop: int) -> Extents:
        """Decode tables that start at ``table_start`` of the guest; clip the rows."""
        grain_nbytes = self.extent.grain_nbytes
        skip = (start - table_start) // grain_nbytes
        n_entries = -(-(stop - table_start) // grain_nbytes) - skip
        first_grain = table_start + skip * grain_nbytes
        wanted = entries[skip : skip + n_entries]
        rows = decode_entries(
            self._format,
            wanted,
            lambda index: self._bad_entry(wanted, index, first_grain),
            guest_offset=first_grain,
            guest_end=stop,
            file_nbytes=self.extent.file.nbytes,
            file=self._file_index,
            damage=self._damage,
        )
        rows = clip(rows, start, stop)
        if self.extent.is_compressed:
            self._refuse_cut_marker(rows)
            self._mark_short_grain(rows)
            tighten_bounds(rows)
        return rows

    def _bad_entry(self, entries: Entries, index: int, first_grain: int) -> CorruptImageError:
        place = int(entries[index]) * SECTOR_NBYTES
        guest_offset = first_grain + index * self.extent.grain_nbytes
        return CorruptImageError(
            f"the grain for guest offset {guest_offset:#x} is at {place:#x}, "
            f"past the end of the file ({self.extent.file.nbytes:#x})",
            path=self.extent.file.path,
            offset=place,
        )

    def _refuse_cut_marker(self, rows: Extents) -> None:
        """Raise if the file ends within a grain's marker, or right after it."""
        if not self.extent.has_markers:
            return
        cut = (rows["kind"] == Kind.ZLIB) & (rows["host_length"] <= GRAIN_MARKER.size)
        if self._damage.salvages:
            lose(rows, cut)
            return
        for row in rows[cut]:
            place = int(row["host_offset"])
            raise CorruptImageError(
                f"the grain for guest offset {int(row['guest_offset']):#x} is at {place:#x}, "
                f"without data before the end of the file ({self.extent.file.nbytes:#x})",
                path=self.extent.file.path,
                offset=place,
            )

    def _mark_short_grain(self, rows: Extents) -> None:
        """Change the row of a truncated last grain to the source of its block size.

        The row skips the marker, which has been verified: its LBA counts from the start
        of the extent, not of this source.
        """
        last = rows[-1]
        if (
            self._short_nbytes == 0
            or last["kind"] != Kind.ZLIB
            or last["guest_offset"] < self._short_grain_start
        ):
            return
        prefix = GRAIN_MARKER.size if last["flags"] & FLAG_GRAIN_MARKER else 0
        last["file"] = self._file_index + 1
        last["flags"] = 0
        last["host_offset"] += prefix
        bound = MAX_COMPRESSED_GRAINS * self._short_nbytes + SECTOR_NBYTES
        last["host_length"] = min(int(last["host_length"]) - prefix, bound)


def tighten_bounds(rows: Extents) -> None:
    """Limit each compressed row to the start of the following row's grain.

    Grains do not overlap, so the engine need not read further.
    """
    places = rows["host_offset"]
    compressed = np.flatnonzero(rows["kind"] == Kind.ZLIB)
    here, following = places[compressed[:-1]], places[compressed[1:]]
    # Unsigned numbers: subtract only if the next grain lies after this one.
    ahead = following > here
    gaps = np.where(
        ahead, following - np.where(ahead, here, np.uint64(0)), np.uint64(0xFFFFFFFFFFFFFFFF)
    )
    rows["host_length"][compressed[:-1]] = np.minimum(rows["host_length"][compressed[:-1]], gaps)
