"""VHDX: turns the BAT and sector bitmaps into extents.

Source: [MS-VHDX] 2.4, "Blocks", and 2.5, "BAT".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore import limits
from imgcore._core import TableFormat
from imgcore.engine.extents import Kind, clip, lose, single, split
from imgcore.errors import CorruptImageError
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.shared.sector_bitmap import expand, look_overwritten
from imgcore.formats.shared.tables import decode_entries
from imgcore.formats.vhdx import layout
from imgcore.formats.vhdx.log import ZEROS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.formats.vhdx.header import VhdxImage
    from imgcore.formats.vhdx.log import ReplayedFile

    Entries = NDArray[np.uint64]

# Bytes of bitmaps that become rows at once: at most a row for each of their 2^19 bits.
_MAX_BITMAPS_NBYTES: Final = 64 * limits.KIB
# States in which a block has data in the file.
_PLACED: Final = 6
RESERVED_STATE: Final = 4
# Places of blocks that are searched for overlaps at once: 32 MiB and a copy.
_WINDOW_UNITS: Final = 1 << 22

_STATE: Final = layout.BAT_STATE_MASK
_RULES: Final = (
    (_STATE, layout.BLOCK_NOT_PRESENT, int(Kind.HOLE)),
    # In these states, a block does not show the parent's data.
    (_STATE, layout.BLOCK_UNDEFINED, int(Kind.ZERO)),
    (_STATE, layout.BLOCK_ZERO, int(Kind.ZERO)),
    (_STATE, layout.BLOCK_UNMAPPED, int(Kind.ZERO)),
    (_STATE, layout.BLOCK_UNMAPPED_V095, int(Kind.ZERO)),
)
# Fully present, with all reserved bits set.
_IMPOSSIBLE: Final = (1 << 64) - 2
_IMPOSSIBLE_ENTRY: Final = _IMPOSSIBLE.to_bytes(layout.BAT_ENTRY_NBYTES, "little")


def table_format(block_nbytes: int) -> TableFormat:
    """Describe a BAT without its sector bitmap entries to the table kernels."""
    return TableFormat(
        entry_nbytes=layout.BAT_ENTRY_NBYTES,
        big_endian=False,
        block_nbytes=block_nbytes,
        offset_mask=layout.BAT_OFFSET_MASK,
        reserved_mask=layout.BAT_RESERVED_MASK,
        default_kind=int(Kind.DATA),
        rules=_RULES,
        absent_entry=layout.BLOCK_NOT_PRESENT,
        zero_entry=layout.BLOCK_ZERO,
        stored_bits=layout.BLOCK_FULLY_PRESENT,
    )


def payload_indices(first: int, last: int, chunk_ratio: int) -> NDArray[np.int64]:
    """Return the indices in the BAT of payload blocks [first, last)."""
    blocks = np.arange(first, last, dtype=np.int64)
    return blocks + blocks // chunk_ratio


def bitmap_index(block: int, chunk_ratio: int) -> int:
    """Return the index in the BAT of the sector bitmap block of a payload block."""
    return (block // chunk_ratio + 1) * (chunk_ratio + 1) - 1


def read_raw(image: VhdxImage, first: int, last: int, damage: Damage = STRICT) -> Entries:
    """Read entries [first, last) of the BAT, those of sector bitmaps included."""
    nbytes = layout.BAT_ENTRY_NBYTES
    # Only when salvaging, the BAT may have fewer entries than the disk needs.
    held = max(first, min(last, image.bat.nbytes // nbytes))
    offset = image.bat.offset + first * nbytes
    raw = damage.read_table(image.view, offset, (held - first) * nbytes, _IMPOSSIBLE_ENTRY)
    if held < last:
        raw += _IMPOSSIBLE_ENTRY * (last - held)
    return np.frombuffer(raw, dtype="<u8").astype(np.uint64, copy=False)


def read_payload(image: VhdxImage, first: int, last: int, damage: Damage = STRICT) -> Entries:
    """Read the entries of payload blocks [first, last).

    Returns
    -------
    ndarray, shape (last - first,), dtype uint64
    """
    ratio = image.metadata.chunk_ratio
    base, end = first + first // ratio, last - 1 + (last - 1) // ratio + 1
    raw = read_raw(image, base, end, damage)
    if len(raw) == last - first or not raw.any():
        return raw[: last - first]
    return raw[payload_indices(first, last, ratio) - base]


class ExtentTables:
    """Turns tables into extents; keeps none of them in memory between calls."""

    def __init__(self, image: VhdxImage, damage: Damage = STRICT) -> None:
        self._image = image
        self._damage = damage
        self._are_places_checked = damage.salvages
        self._block_nbytes = image.metadata.block_nbytes
        self._format = table_format(self._block_nbytes)
        self._patches = None if image.replayed is None else _Patches(image.replayed)

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches; see `imgcore.formats.api.Reader.extents`."""
        if not self._are_places_checked:
            refuse_overlaps(self._image)
            self._are_places_checked = True
        stop = start + length
        first_block, last_block = start // self._block_nbytes, -(-stop // self._block_nbytes)
        for first in range(first_block, last_block, limits.MAX_BATCH_ROWS):
            last = min(first + limits.MAX_BATCH_ROWS, last_block)
            entries = read_payload(self._image, first, last, self._damage)
            low = max(start, first * self._block_nbytes)
            high = min(stop, last * self._block_nbytes)
            if not entries.any():
                yield single(low, high - low, Kind.HOLE)
                continue
            for rows in self._rows(entries, first):
                yield from self._clipped(rows, low, high)

    def _clipped(self, rows: Extents, low: int, high: int) -> Iterator[Extents]:
        """Yield the part of a batch that lies in [low, high), with the log applied."""
        start = max(low, int(rows["guest_offset"][0]))
        stop = min(high, int(rows["guest_offset"][-1] + rows["length"][-1]))
        rows = clip(rows, start, stop)
        for part in [rows] if self._patches is None else self._patches.apply(rows):
            for at in range(0, len(part), limits.MAX_BATCH_ROWS):
                yield part[at : at + limits.MAX_BATCH_ROWS]

    def _rows(self, entries: Entries, first: int) -> Iterator[Extents]:
        """Yield rows of whole blocks; only the disk's last block may be shorter."""
        entries = self._checked(entries, first)
        rows = self._decode(entries, first)
        partial = np.flatnonzero((entries & np.uint64(_STATE)) == layout.BLOCK_PARTIALLY_PRESENT)
        if not partial.size:
            yield rows
            return
        yield from self._with_bitmaps(rows, partial + first)

    # --------------------------------------------------------------------- entries

    def _checked(self, entries: Entries, first: int) -> Entries:
        """Find what the kernel does not: bad states, places in other structures.

        Such an entry is an error, or becomes an impossible one when salvaging.
        """
        state = entries & np.uint64(_STATE)
        bad = state == RESERVED_STATE
        if not self._image.metadata.has_parent:
            bad |= state == layout.BLOCK_PARTIALLY_PRESENT
        has_place = state >= np.uint64(_PLACED)
        places = entries & np.uint64(layout.BAT_OFFSET_MASK)
        for low, high, _ in structures(self._image):
            # A place that is less than a block before the structure, or inside it.
            reach = np.uint64(max(low - self._block_nbytes, -1) + 1)
            bad |= has_place & (places >= reach) & (places < np.uint64(high))
        if not bad.any():
            return entries
        if not self._damage.salvages:
            index = int(np.flatnonzero(bad)[0])
            raise self._entry_error(int(entries[index]), first + index)
        return np.where(bad, np.uint64(_IMPOSSIBLE), entries)

    def _decode(self, entries: Entries, first: int) -> Extents:
        return decode_entries(
            self._format,
            entries,
            lambda index: self._entry_error(int(entries[index]), first + index),
            guest_offset=first * self._block_nbytes,
            guest_end=self._image.metadata.virtual_size,
            file_nbytes=self._image.view.nbytes,
            damage=self._damage,
        )

    def _entry_error(self, entry: int, block: int) -> CorruptImageError:
        reason = entry_problem(self._image, entry, block)
        return CorruptImageError(
            f"block {block} (BAT entry {entry:#x}) {reason}",
            path=self._image.file.path,
            offset=entry & layout.BAT_OFFSET_MASK,
        )

    # --------------------------------------------------------------------- bitmaps

    def _with_bitmaps(self, rows: Extents, partial: NDArray[np.int64]) -> Iterator[Extents]:
        """Yield rows with the sector bitmaps of partially present blocks applied."""
        nbytes = self._block_nbytes
        end = int(rows["guest_offset"][-1] + rows["length"][-1])
        edges = np.concatenate((partial, partial + 1)) * nbytes
        cuts = edges[edges < end].astype(np.uint64)
        rows = split(rows, np.union1d(rows["guest_offset"], cuts))
        is_partial = np.isin(rows["guest_offset"] // np.uint64(nbytes), partial.astype(np.uint64))
        is_partial &= rows["kind"] == Kind.DATA
        # A group has up to this many partially present blocks, and the rows up to the
        # next one.
        group = max(1, _MAX_BITMAPS_NBYTES // self._bitmap_nbytes)
        starts = np.flatnonzero(is_partial)[group::group]
        for part, mask in zip(np.split(rows, starts), np.split(is_partial, starts), strict=True):
            expanded = self._expanded(part[mask])
            joined = np.concatenate((part[~mask], expanded))
            yield joined[np.argsort(joined["guest_offset"], kind="stable")]

    @property
    def _bitmap_nbytes(self) -> int:
        return self._block_nbytes // self._image.metadata.logical_sector_nbytes // 8

    def _expanded(self, blocks: Extents) -> Extents:
        bitmaps = np.empty((len(blocks), self._bitmap_nbytes), dtype=np.uint8)
        is_lost = np.zeros(len(blocks), dtype=np.bool_)
        numbers = (blocks["guest_offset"] // np.uint64(self._block_nbytes)).tolist()
        for index, (bitmap, block) in enumerate(zip(bitmaps, numbers, strict=True)):
            try:
                self._image.view.pread_into(self._bitmap_offset(block), bitmap)
            except (CorruptImageError, OSError):
                if not self._damage.salvages:
                    raise
                is_lost[index] = True
                bitmap[:] = 0
        if self._damage.salvages:
            is_lost |= look_overwritten(bitmaps)
        rows = expand(
            bitmaps[~is_lost],
            lsb_first=True,
            blocks=blocks[~is_lost],
            absent=Kind.HOLE,
            sector_nbytes=self._image.metadata.logical_sector_nbytes,
        )
        if not is_lost.any():
            return rows
        lose(blocks, is_lost)
        rows = np.concatenate((rows, blocks[is_lost]))
        return rows[np.argsort(rows["guest_offset"], kind="stable")]

    def _bitmap_offset(self, block: int) -> int:
        """Return the host offset of the sector bitmap of a payload block."""
        ratio = self._image.metadata.chunk_ratio
        index = bitmap_index(block, ratio)
        entry = int(read_raw(self._image, index, index + 1, self._damage)[0])
        offset = entry & layout.BAT_OFFSET_MASK
        if entry & _STATE != layout.BITMAP_PRESENT or offset < layout.HEADER_SECTION_NBYTES:
            raise CorruptImageError(
                f"block {block} is partially present, but its chunk has no sector bitmap block "
                f"(BAT entry {index} is {entry:#x})",
                path=self._image.file.path,
                offset=self._image.bat.offset + index * layout.BAT_ENTRY_NBYTES,
            )
        return offset + block % ratio * self._bitmap_nbytes


def structures(image: VhdxImage) -> list[tuple[int, int, str]]:
    """Return (start, end, name) of what payload blocks must not overlap (2.1)."""
    header = image.header
    names = {layout.BAT_REGION: "the BAT region", layout.METADATA_REGION: "the metadata region"}
    found = [(0, layout.HEADER_SECTION_NBYTES, "the headers")]
    if header.log_nbytes and header.log_offset >= layout.HEADER_SECTION_NBYTES:
        found.append((header.log_offset, header.log_offset + header.log_nbytes, "the log"))
    for region in image.regions:
        name = names.get(region.guid, f"the region {region.guid}")
        found.append((region.offset, region.end, name))
    return found


def refuse_overlaps(image: VhdxImage) -> None:
    """Raise CorruptImageError if two blocks, of data or bitmaps, overlap.

    Impossible entries do not count: they are an error when they are read.

    Notes
    -----
    Complexity: a pass over the BAT, and O(n log n) for n present blocks.  Memory: at
    most 150 MiB; a large file takes several passes.
    """
    per_window = _WINDOW_UNITS * layout.ALIGNMENT
    bitmaps = _bitmap_places(image)
    for base in range(0, image.view.nbytes, per_window):
        places, nbytes = _places_in(image, base, base + per_window, bitmaps)
        order = np.argsort(places, kind="stable")
        places, ends = places[order], (places + nbytes)[order]
        overlaps = np.flatnonzero(places[1:] < ends[:-1])
        if overlaps.size:
            place = int(places[overlaps[0] + 1])
            raise CorruptImageError(
                f"two blocks overlap at {place:#x} of the file", path=image.file.path, offset=place
            )


def _places_in(image: VhdxImage, base: int, end: int, bitmaps: Entries) -> tuple[Entries, Entries]:
    """Return places and sizes of the blocks that are partly in a window."""
    n_blocks, block_nbytes = image.metadata.n_blocks, image.metadata.block_nbytes
    wrong = np.uint64(layout.BAT_RESERVED_MASK)
    low, high = np.uint64(max(base - block_nbytes, 0)), np.uint64(end)
    found = [bitmaps[(bitmaps >= low) & (bitmaps < high)]]
    n_found = 0
    for first in range(0, n_blocks, limits.MAX_BATCH_ROWS):
        entries = read_payload(image, first, min(first + limits.MAX_BATCH_ROWS, n_blocks))
        state = entries & np.uint64(_STATE)
        has_place = (state >= np.uint64(_PLACED)) & ((entries & wrong) == 0)
        if not image.metadata.has_parent:
            has_place &= state == np.uint64(layout.BLOCK_FULLY_PRESENT)
        places = entries[has_place] & np.uint64(layout.BAT_OFFSET_MASK)
        found.append(places[(places >= low) & (places < high)])
        n_found += len(found[-1])
        if n_found * block_nbytes > end - base + 2 * block_nbytes:
            # More than the window has room for: some of them overlap.
            break
    places = np.concatenate(found)
    sizes = np.full(len(places), block_nbytes, dtype=np.uint64)
    sizes[: len(found[0])] = layout.BITMAP_BLOCK_NBYTES
    return places, sizes


def _bitmap_places(image: VhdxImage) -> Entries:
    """Return the places of all sector bitmap blocks."""
    if not image.metadata.has_parent:
        return np.empty(0, dtype=np.uint64)
    ratio = image.metadata.chunk_ratio
    chunks = range(0, image.metadata.n_blocks, ratio)
    entries = [
        int(read_raw(image, at, at + 1)[0]) for at in (bitmap_index(b, ratio) for b in chunks)
    ]
    places = [
        entry & layout.BAT_OFFSET_MASK
        for entry in entries
        if entry & _STATE == layout.BITMAP_PRESENT
    ]
    return np.array(places, dtype=np.uint64)


def entry_problem(image: VhdxImage, entry: int, block: int) -> str:
    """Return what is wrong with the invalid entry of a payload block."""
    state, offset = entry & _STATE, entry & layout.BAT_OFFSET_MASK
    if state == RESERVED_STATE:
        return f"has the reserved state {state}"
    if state == layout.BLOCK_PARTIALLY_PRESENT and not image.metadata.has_parent:
        return "is partially present, but the disk has no parent"
    if entry & layout.BAT_RESERVED_MASK:
        return "has reserved bits set"
    block_nbytes = image.metadata.block_nbytes
    for low, high, name in structures(image):
        if offset < high and offset + block_nbytes > low:
            inside = "lies inside" if low <= offset else "overlaps"
            return f"at {offset:#x} {inside} {name}"
    nbytes = min(block_nbytes, image.metadata.virtual_size - block * block_nbytes)
    return f"ends at {offset + nbytes:#x}, past the end of the file ({image.view.nbytes:#x})"


class _Patches:
    """Applies the writes of a log to the extents of payload blocks."""

    def __init__(self, replayed: ReplayedFile) -> None:
        patches = np.array(replayed.patches, dtype=np.int64).reshape(-1, 3)
        self._starts, self._ends, self._places = patches.T.copy()

    def apply(self, rows: Extents) -> Iterator[Extents]:
        """Yield the rows, with replayed ranges from the log (file 1) or as zeros.

        Notes
        -----
        The specification does not allow payload blocks in the log, but a replayed log
        would change them all the same.  Places after the end of the file become zeros
        in the same way.
        """
        # Files are smaller than 2^63, so signed arithmetic cannot overflow.
        host = rows["host_offset"].astype(np.int64)
        length = rows["length"].astype(np.int64)
        first = np.searchsorted(self._ends, host, side="right")
        last = np.searchsorted(self._starts, host + length, side="left")
        n_patches = np.where(rows["kind"] == Kind.DATA, np.maximum(last - first, 0), 0)
        cuts = np.flatnonzero(np.diff(np.cumsum(n_patches) // limits.MAX_BATCH_ROWS)) + 1
        for columns in zip(
            *(np.split(column, cuts) for column in (rows, first, n_patches)), strict=True
        ):
            yield self._patched(*columns)

    def _patched(
        self, rows: Extents, first: NDArray[np.int64], n_patches: NDArray[np.int64]
    ) -> Extents:
        """Apply to each row its ``n_patches`` patches from ``first`` on."""
        if not n_patches.any():
            return rows
        host = rows["host_offset"].astype(np.int64)
        length = rows["length"].astype(np.int64)
        row = np.repeat(np.arange(len(rows)), n_patches)
        before = np.cumsum(n_patches) - n_patches
        patch = np.arange(len(row)) - np.repeat(before - first, n_patches)
        guest = rows["guest_offset"].astype(np.int64)[row] - host[row]
        low = np.maximum(self._starts[patch], host[row]) + guest
        high = np.minimum(self._ends[patch], host[row] + length[row]) + guest
        end = int(rows["guest_offset"][-1] + rows["length"][-1])
        cuts = np.concatenate((low, high))
        rows = split(rows, np.union1d(rows["guest_offset"], cuts[cuts < end].astype(np.uint64)))
        self._replace(rows)
        return rows

    def _replace(self, rows: Extents) -> None:
        """Change, in place, the rows that lie inside a patch."""
        host = rows["host_offset"].astype(np.int64)
        patch = np.maximum(np.searchsorted(self._starts, host, side="right") - 1, 0)
        inside = (host >= self._starts[patch]) & (host < self._ends[patch])
        inside &= rows["kind"] == Kind.DATA
        zeros = inside & (self._places[patch] == ZEROS)
        moved = inside & ~zeros
        rows["host_offset"][moved] = (self._places[patch] + host - self._starts[patch])[moved]
        rows["file"][moved] = 1
        rows["kind"][zeros] = Kind.ZERO
        for name in ("host_offset", "host_length", "file"):
            rows[name][zeros] = 0
