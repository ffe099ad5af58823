"""VHD: turns the BAT and sector bitmaps into extents.

Source: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0, "Block Allocation
Table and Data Blocks".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore._core import TableFormat
from imgcore.engine.extents import Kind, clip, lose, single
from imgcore.errors import CorruptImageError
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.shared.sector_bitmap import expand, look_overwritten
from imgcore.formats.shared.tables import (
    decode_entries,
    in_damaged_sectors,
    last_plausible_sector,
)
from imgcore.formats.vhd import layout
from imgcore.limits import MAX_BATCH_ROWS, MIB, SECTOR_NBYTES, VHD_MAX_CHECKED_BLOCKS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.vhd.header import VhdHeader

    Bitmaps = NDArray[np.uint8]

# The largest sector number: no VHD is so long.
_IMPOSSIBLE: Final = layout.ENTRY_ABSENT - 1
_IMPOSSIBLE_ENTRY: Final = layout.ENTRY.pack(_IMPOSSIBLE)

_ENTRIES_PER_SECTOR: Final = SECTOR_NBYTES // layout.ENTRY_NBYTES

# BAT entries that are decoded at once: 64 KiB, for 32 GiB of disk in blocks of 2 MiB.
_PIECE_ENTRIES: Final = 1 << 14
# Bytes of sector bitmaps that are read at once.
_MAX_BITMAPS_NBYTES: Final = 1 * MIB


def table_format(block_nbytes: int, bitmap_nbytes: int) -> TableFormat:
    """Describe a BAT to the table kernels; host offsets are those of the data."""
    return TableFormat(
        entry_nbytes=layout.ENTRY_NBYTES,
        big_endian=True,
        block_nbytes=block_nbytes,
        offset_mask=layout.ENTRY_MASK,
        offset_lshift=SECTOR_NBYTES.bit_length() - 1,
        host_base=bitmap_nbytes,
        rules=[(layout.ENTRY_MASK, layout.ENTRY_ABSENT, int(Kind.HOLE))],
        absent_entry=layout.ENTRY_ABSENT,
        zero_entry=layout.ENTRY_ABSENT,
    )


def read_bat(
    file: ByteSource, table_offset: int, first: int, last: int, damage: Damage = STRICT
) -> NDArray[np.uint8]:
    """Return the bytes of BAT entries [first, last), shape ((last - first) * 4,)."""
    nbytes = (last - first) * layout.ENTRY_NBYTES
    offset = table_offset + first * layout.ENTRY_NBYTES
    return np.frombuffer(damage.read_table(file, offset, nbytes, _IMPOSSIBLE_ENTRY), dtype=np.uint8)


class ExtentTables:
    """Turns the tables of a dynamic or differencing disk into extents.

    An absent block is a HOLE.  An absent sector of a present block is a HOLE in a
    differencing disk, where the parent has its content, and ZERO in a dynamic disk.

    With ``footer_moves``, blocks may be where the footer was when the image was opened.
    """

    def __init__(
        self,
        file: ByteSource,
        header: VhdHeader,
        damage: Damage = STRICT,
        *,
        footer_moves: bool = False,
    ) -> None:
        assert header.dynamic is not None
        self._file = file
        self._damage = damage
        self._n_entries = min(header.dynamic.max_table_entries, header.n_blocks)
        self._contested: NDArray[np.uint32] | None = None
        self._table_offset = header.dynamic.table_offset
        self._block_nbytes = header.dynamic.block_nbytes
        self._bitmap_nbytes = header.bitmap_nbytes
        self._structures = header.structures
        if header.end is not None and header.end.problem is None and not footer_moves:
            self._structures.append((header.end.offset, file.nbytes, "the footer"))
        self._format = table_format(self._block_nbytes, self._bitmap_nbytes)
        blocks_nbytes = header.n_blocks * (self._block_nbytes + self._bitmap_nbytes)
        self._last_sector = last_plausible_sector(file, blocks_nbytes)
        is_differencing = header.disk_type == layout.DiskType.DIFFERENCING
        self._absent = Kind.HOLE if is_differencing else Kind.ZERO

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches; see `imgcore.formats.api.Reader.extents`."""
        is_small = self._n_entries <= VHD_MAX_CHECKED_BLOCKS
        if self._damage.salvages and self._contested is None and is_small:
            self._contested = self._find_contested()
        stop = held_to = start + length
        if self._damage.salvages:
            # The BAT may be cut off, and claim any size.
            n_held = max(self._file.nbytes - self._table_offset, 0) // layout.ENTRY_NBYTES
            n_held = min(n_held, self._n_entries)
            held_to = max(start, min(stop, n_held * self._block_nbytes))
        if start < held_to:
            yield from self._extents(start, held_to)
        if held_to < stop:
            yield single(held_to, stop - held_to, Kind.LOST)

    def _extents(self, start: int, stop: int) -> Iterator[Extents]:
        first_block = start // self._block_nbytes
        last_block = -(-stop // self._block_nbytes)
        for first in range(first_block, last_block, _PIECE_ENTRIES):
            last = min(first + _PIECE_ENTRIES, last_block)
            for rows in self._expanded(self._decode(first, last, stop)):
                end = int(rows["guest_offset"][-1] + rows["length"][-1])
                low = max(start, int(rows["guest_offset"][0]))
                if low < end:
                    part = clip(rows, low, end)
                    for at in range(0, len(part), MAX_BATCH_ROWS):
                        yield part[at : at + MAX_BATCH_ROWS]

    def _decode(self, first: int, last: int, stop: int) -> Extents:
        """Return BAT entries [first, last) as extents, one DATA row for each block."""
        entries = self._read_bat(first, last)
        rows = decode_entries(
            self._format,
            entries.view(">u4"),
            lambda index: self._entry_error(entries, first, index),
            guest_offset=first * self._block_nbytes,
            guest_end=stop,
            file_nbytes=self._file.nbytes,
            damage=self._damage,
        )
        self._refuse_joined(rows)
        self._refuse_structures(rows)
        return rows

    def _read_bat(self, first: int, last: int) -> NDArray[np.uint8]:
        if not self._damage.salvages:
            return read_bat(self._file, self._table_offset, first, last)
        # Whole sectors of the table, so that every call trusts the same entries.
        low = first - first % _ENTRIES_PER_SECTOR
        high = max(last, min(last + -last % _ENTRIES_PER_SECTOR, self._n_entries))
        entries = read_bat(self._file, self._table_offset, low, high, self._damage).copy()
        sectors = entries.view(">u4")
        is_used = sectors != layout.ENTRY_ABSENT
        nonsense = is_used & (sectors > self._last_sector)
        sectors[is_used & in_damaged_sectors(nonsense, is_used)] = _IMPOSSIBLE
        if self._contested is not None:
            sectors[np.isin(sectors, self._contested)] = _IMPOSSIBLE
        return entries[(first - low) * layout.ENTRY_NBYTES : (last - low) * layout.ENTRY_NBYTES]

    def _find_contested(self) -> NDArray[np.uint32]:
        """Return the sectors of blocks that overlap others, of which none is trusted.

        The bitmap before a block must not be another block's data either.
        """
        parts = []
        for first in range(0, self._n_entries, _PIECE_ENTRIES):
            last = min(first + _PIECE_ENTRIES, self._n_entries)
            sectors = self._read_bat(first, last).view(">u4").astype(np.uint32)
            parts.append(sectors[sectors < self._file.nbytes // SECTOR_NBYTES])
        places = np.sort(np.concatenate(parts))
        block = (self._block_nbytes + self._bitmap_nbytes) // SECTOR_NBYTES
        overlaps = np.flatnonzero(np.diff(places) < block)
        return np.unique(np.concatenate((places[overlaps], places[overlaps + 1])))

    def _refuse_joined(self, rows: Extents) -> None:
        """Raise if a row is longer than a block: two blocks then overlap."""
        joined = (rows["kind"] == Kind.DATA) & (rows["length"] > np.uint64(self._block_nbytes))
        if self._damage.salvages:
            lose(rows, joined)
        elif joined.any():
            row = rows[int(np.argmax(joined))]
            block = int(row["guest_offset"]) // self._block_nbytes
            raise CorruptImageError(
                f"block {block + 1} overlaps block {block} in the file",
                path=self._file.path,
                offset=int(row["host_offset"]),
            )

    def _refuse_structures(self, rows: Extents) -> None:
        """Raise if a block overlaps a header, the BAT or the footer."""
        place = rows["host_offset"].astype(np.int64)
        start, end = place - self._bitmap_nbytes, place + rows["length"].astype(np.int64)
        is_block = rows["kind"] == Kind.DATA
        for low, high, what in self._structures:
            bad = is_block & (start < high) & (end > low)
            if self._damage.salvages:
                lose(rows, bad)
            elif bad.any():
                row = int(np.argmax(bad))
                raise CorruptImageError(
                    f"block {int(rows['guest_offset'][row]) // self._block_nbytes} at "
                    f"{int(start[row]):#x} overlaps {what}",
                    path=self._file.path,
                    offset=int(start[row]),
                )

    def _entry_error(self, entries: NDArray[np.uint8], first: int, index: int) -> CorruptImageError:
        sector = int(entries.view(">u4")[index])
        place = sector * SECTOR_NBYTES
        return CorruptImageError(
            f"block {first + index} is at {place:#x} (sector {sector}) and ends past the end of "
            f"the file ({self._file.nbytes:#x})",
            path=self._file.path,
            offset=place,
        )

    def _expanded(self, rows: Extents) -> Iterator[Extents]:
        """Yield the rows with sector bitmaps applied, in pieces of bounded size."""
        step = max(1, _MAX_BITMAPS_NBYTES // self._bitmap_nbytes)
        is_block = rows["kind"] == Kind.DATA
        n_before = np.cumsum(is_block) - is_block
        for part in np.split(rows, np.flatnonzero(np.diff(n_before // step)) + 1):
            bitmaps = self._read_bitmaps(part)
            is_block = part["kind"] == Kind.DATA
            if (bitmaps == 0xFF).all():
                yield part
            else:
                yield from self._apply_bitmaps(part, is_block, bitmaps)

    def _apply_bitmaps(
        self, rows: Extents, is_block: NDArray[np.bool_], bitmaps: Bitmaps
    ) -> Iterator[Extents]:
        # Bound the number of rows: one change between two bytes, eight in a mixed byte.
        mixed = (bitmaps != 0xFF) & (bitmaps != 0)
        bound = np.ones(len(rows), dtype=np.int64)
        bound[is_block] += (bitmaps[:, 1:] != bitmaps[:, :-1]).sum(axis=1) + 8 * mixed.sum(axis=1)
        cuts = np.flatnonzero(np.diff(np.cumsum(bound) // MAX_BATCH_ROWS)) + 1
        at = 0
        for part, is_part_block in zip(np.split(rows, cuts), np.split(is_block, cuts), strict=True):
            n_blocks = int(is_part_block.sum())
            blocks = expand(
                bitmaps[at : at + n_blocks],
                lsb_first=False,
                blocks=part[is_part_block],
                absent=self._absent,
            )
            at += n_blocks
            together = np.concatenate((part[~is_part_block], blocks))
            yield together[np.argsort(together["guest_offset"], kind="stable")]

    def _read_bitmaps(self, rows: Extents) -> Bitmaps:
        """Read the sector bitmap before each block, shape (n, bitmap_nbytes).

        When salvaging, a block of a differencing disk whose bitmap is damaged is LOST,
        in place.
        """
        blocks = np.flatnonzero(rows["kind"] == Kind.DATA)
        bitmaps = np.empty((len(blocks), self._bitmap_nbytes), dtype=np.uint8)
        places = rows["host_offset"][blocks].astype(np.int64) - self._bitmap_nbytes
        unread = []
        for index, (place, bitmap) in enumerate(zip(places.tolist(), bitmaps, strict=True)):
            try:
                self._file.pread_into(place, bitmap)
            except OSError:
                if not self._damage.salvages:
                    raise
                unread.append(index)
        if not self._damage.salvages or not len(blocks):
            return bitmaps
        is_bad = look_overwritten(bitmaps)
        is_bad[unread] = True
        if self._absent is Kind.ZERO:
            # Without a parent, the sectors that are absent are zeros in the block, too.
            bitmaps[is_bad] = 0xFF
            return bitmaps
        is_lost = np.zeros(len(rows), dtype=np.bool_)
        is_lost[blocks[is_bad]] = True
        lose(rows, is_lost)
        return bitmaps[~is_bad]
