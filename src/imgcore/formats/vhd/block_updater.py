"""VHD: writing in place to dynamic and differencing disks.

A new block is put where the footer is, which moves ahead before: far enough that it
moves rarely, and back to the last block in the end.  What is between takes no space.

Sector bitmaps of a child become durable together with BAT entries, after the data.  A
new block whose bitmap is lost has no sectors of the disk, and reads as before.

Source: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0, "Block Allocation
Table and Data Blocks".
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple, cast

import numpy as np

from imgcore.errors import CorruptImageError, LimitExceededError, OptionError
from imgcore.files.update_file import Step
from imgcore.formats.api import Place
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.shared.free_space import FreeSpace
from imgcore.formats.shared.moving import copy_block, moves_into_gaps
from imgcore.formats.shared.ranges import add_range, block_parts
from imgcore.formats.vhd import layout
from imgcore.formats.vhd.changes import resized_footer, with_footer, with_header
from imgcore.formats.vhd.check import (
    batmap_header_offset,
    find_batmap,
    metadata,
    verify_blocks,
)
from imgcore.formats.vhd.header import footer_of, read_header
from imgcore.formats.vhd.layout import DiskType, DynamicHeader
from imgcore.formats.vhd.parent import ParentFields, parent_fields
from imgcore.formats.vhd.tables import read_bat
from imgcore.formats.vhd.writer import batmap_nbytes, make_batmap_header
from imgcore.limits import MIB, SECTOR_NBYTES, VHD_MAX_CHECKED_BLOCKS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.api import BackingReference
    from imgcore.formats.vhd.reader import VhdReader

# As in the writer.
_DATA_ALIGNMENT: Final = 4096
# How far the footer moves ahead: as far as blocks have been appended, within bounds.
_MIN_AHEAD_NBYTES: Final = 8 * MIB
_MAX_AHEAD_NBYTES: Final = 1024 * MIB
# Gaps of an image that are remembered, to be filled.
_MAX_GAPS: Final = 1 << 16


class _Run(NamedTuple):
    """Neighbouring sectors of a block, as guest offsets, and whether it has them."""

    start: int
    end: int
    is_present: bool


class BlockUpdater:
    """Changes a dynamic or differencing disk.

    Blocks that read as zeros are not freed: their space is given back where they are,
    so that the file has no gaps, and their sectors still hide the parent's.
    """

    granule_nbytes: int = SECTOR_NBYTES

    def __init__(self, reader: VhdReader) -> None:
        header = reader.header
        assert header.dynamic is not None
        assert header.end is not None
        self._file = cast("UpdateFile", reader.sources[0].file)
        self._header = header
        self._dynamic = header.dynamic
        self._is_child = header.disk_type is DiskType.DIFFERENCING
        self._block_nbytes = header.dynamic.block_nbytes
        self._bitmap_nbytes = header.bitmap_nbytes
        # Where a block is in its slot: the data is aligned, and the bitmap before it.
        self._data_start = align_up(self._bitmap_nbytes, _DATA_ALIGNMENT)
        self._bitmap_start = self._data_start - self._bitmap_nbytes
        self._slot_nbytes = self._data_start + self._block_nbytes
        # As the user has chosen it when the image was opened.
        self._size = header.size.field if header.size.because == "option" else None
        self._footer = header.end.raw
        self._footer_offset = header.end.offset
        if self._file.is_block_device:
            self._footer_offset = self._file.nbytes - layout.FOOTER_NBYTES
        self._verify()
        reader.let_footer_move()

    def _verify(self) -> None:
        """Raise unless no block or table is in the way of another one."""
        if self._dynamic.max_table_entries > VHD_MAX_CHECKED_BLOCKS:
            raise LimitExceededError(
                f"a BAT of {self._dynamic.max_table_entries} entries, at most "
                f"{VHD_MAX_CHECKED_BLOCKS} are written in place",
                path=self._file.path,
            )
        self._verify_structures()
        report = verify_blocks(self._file, self._header)
        if report.corruptions:
            raise CorruptImageError(
                f"{report.first_corruption}: it is not written to", path=self._file.path
            )

    def _verify_structures(self) -> None:
        """Raise if a header or table overlaps another one, or is in half a sector."""
        parts = [
            *self._header.structures,
            (self._footer_offset, self._footer_offset + layout.FOOTER_NBYTES, "the footer"),
        ]
        parts.sort()
        for (start, end, name), (following, _, other) in pairwise(parts):
            if following < end or start % SECTOR_NBYTES:
                raise CorruptImageError(
                    f"{name} at {start:#x} ends at {end:#x}, {other} is at {following:#x}: they "
                    "must not overlap, and start at multiples of 512: it is not written to",
                    path=self._file.path,
                    offset=start,
                )

    # -- space -------------------------------------------------------------------------

    def begin(self, *, again: bool) -> None:
        """Find the space that is free; see `imgcore.formats.api.Updater`."""
        self._reserved: dict[int, list[int]] = {}
        self._has_gaps = self._is_unread = False
        starts = np.sort(self._starts())
        end = self._end_of_use(starts)
        self._first_end = end
        self._space = FreeSpace(self._slot_from(end), self._slot_nbytes)
        for gap in self._gaps(starts):
            self._space.give_back(gap)
            self._has_gaps = True
        # Somebody may still read what this object's predecessor has freed.
        self._old_end = self._footer_offset if again else 0
        if end < self._footer_offset and not (again or self._file.is_block_device):
            # An interrupted writer may have left data there.
            self._file.zero(end, self._footer_offset - end)

    def _starts(self) -> NDArray[np.int64]:
        """Return where blocks start in the file, in the order of the disk.

        The BAT may have blocks after the end of the disk: programs that use another
        size read them.
        """
        entries = self._entries(self._dynamic.max_table_entries)
        is_block = entries != layout.ENTRY_ABSENT
        last = self._footer_offset - self._bitmap_nbytes - self._block_nbytes
        is_block[self._header.n_blocks :] &= (
            entries[self._header.n_blocks :] * SECTOR_NBYTES <= last
        )
        return np.compress(is_block, entries) * SECTOR_NBYTES

    def _entries(self, n_entries: int) -> NDArray[np.int64]:
        raw = read_bat(self._file, self._dynamic.table_offset, 0, n_entries)
        return np.asarray(raw.view(">u4"), dtype=np.int64)

    def _end_of_use(self, starts: NDArray[np.int64]) -> int:
        """Return the host offset after the last block or table."""
        ends = [end for _, end, _ in metadata(self._file, self._header)]
        if len(starts):
            ends.append(int(starts.max()) + self._bitmap_nbytes + self._block_nbytes)
        return align_up(max(ends), SECTOR_NBYTES)

    def _gaps(self, starts: NDArray[np.int64]) -> Iterator[int]:
        """Yield the slots before blocks that nothing uses."""
        parts = metadata(self._file, self._header)
        ends = np.append(0, starts + (self._bitmap_nbytes + self._block_nbytes))
        n_found = 0
        for at in np.flatnonzero(starts - ends[:-1] >= self._slot_nbytes).tolist():
            slot, stop = self._slot_from(int(ends[at])), int(starts[at])
            while slot + self._slot_nbytes <= stop and n_found < _MAX_GAPS:
                first, end = slot + self._bitmap_start, slot + self._slot_nbytes
                used = [high for low, high, _ in parts if low < end and first < high]
                if used:
                    slot = self._slot_from(max(used))
                    continue
                n_found += 1
                yield slot
                slot = end

    def _slot_from(self, offset: int) -> int:
        """Return the first slot whose block starts at a host offset or after it."""
        return align_up(offset + self._bitmap_nbytes, _DATA_ALIGNMENT) - self._data_start

    def _take(self, block: int) -> int:
        """Return a slot of zeros for a block of the disk."""
        entry = self._entry(block - 1) if block else layout.ENTRY_ABSENT
        after = None
        if entry != layout.ENTRY_ABSENT:
            after = entry * SECTOR_NBYTES - self._bitmap_start + self._slot_nbytes
        elif block - 1 in self._reserved:
            after = self._reserved[block - 1][0] + self._slot_nbytes
        space = self._space
        end = space.end
        slot = space.take(after)
        try:
            if (slot + self._bitmap_start) // SECTOR_NBYTES >= layout.ENTRY_ABSENT:
                raise LimitExceededError(
                    f"block {block} would be at {slot:#x}, beyond what a BAT entry can hold",
                    path=self._file.path,
                )
            self._make_room(slot + self._slot_nbytes)
            if slot != end or slot < self._old_end or self._file.is_block_device:
                self._file.zero(slot + self._bitmap_start, self._slot_nbytes - self._bitmap_start)
        except BaseException:
            space.give_back(slot)
            raise
        return slot

    def _make_room(self, end: int) -> None:
        """Move the footer so far ahead that the file is free up to a host offset."""
        old = self._footer_offset
        if end <= old:
            return
        appended = end - self._first_end
        ahead = min(max(appended, _MIN_AHEAD_NBYTES), _MAX_AHEAD_NBYTES)
        self._put_footer(align_up(end, SECTOR_NBYTES) + ahead)
        # There are blocks now, which begin as zeros.
        self._file.zero(old, layout.FOOTER_NBYTES)

    def _put_footer(self, offset: int) -> None:
        """Write the footer to a free place; it is durable when this returns."""
        if self._file.is_block_device:
            # It is in the device's last sector, and this reports that there is no room.
            self._file.grow(offset + layout.FOOTER_NBYTES)
        self._file.pwrite(offset, self._footer)
        self._file.sync()
        self._footer_offset = offset

    # -- one block ---------------------------------------------------------------------

    def _blocks(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        return block_parts(start, length, self._block_nbytes)

    def _entry_offset(self, block: int) -> int:
        return self._dynamic.table_offset + block * layout.ENTRY_NBYTES

    def _entry(self, block: int) -> int:
        """Return the sector of a block."""
        raw = self._file.pread(self._entry_offset(block), layout.ENTRY_NBYTES)
        return int.from_bytes(raw, "big")

    def _put_entry(self, block: int, sector: int) -> None:
        self._file.put(self._entry_offset(block), layout.ENTRY.pack(sector), Step.REFERENCE)

    def _runs(self, block: int, entry: int, start: int, end: int) -> Iterator[_Run]:
        """Yield the runs of sectors of a block that the range [start, end) meets.

        The first and the last are cut to the range, which need not be of whole sectors.
        """
        base = block * self._block_nbytes
        first, last = (start - base) // SECTOR_NBYTES, -((base - end) // SECTOR_NBYTES)
        low, high = first // 8, -(-last // 8)
        raw = self._file.pread(entry * SECTOR_NBYTES + low, high - low)
        bits = f"{int.from_bytes(raw, 'big'):0{8 * len(raw)}b}"[first - 8 * low : last - 8 * low]
        at = 0
        while at < len(bits):
            bit = bits[at]
            stop = bits.find("1" if bit == "0" else "0", at)
            stop = len(bits) if stop < 0 else stop
            yield _Run(
                max(start, base + (first + at) * SECTOR_NBYTES),
                min(end, base + (first + stop) * SECTOR_NBYTES),
                bit == "1",
            )
            at = stop

    def _set_bits(self, bitmap_offset: int, first: int, last: int) -> None:
        """Let a block have its sectors [first, last)."""
        low, high = first // 8, -(-last // 8)
        raw = self._file.pread(bitmap_offset + low, high - low)
        bits = ((1 << (last - first)) - 1) << (8 * high - last)
        changed = (int.from_bytes(raw, "big") | bits).to_bytes(len(raw), "big")
        if changed != raw:
            self._file.put(bitmap_offset + low, changed, Step.REFERENCE)

    def _host_offset(self, block: int, entry: int, guest_offset: int) -> int:
        data = entry * SECTOR_NBYTES + self._bitmap_nbytes
        return data + guest_offset - block * self._block_nbytes

    # -- changes of content ------------------------------------------------------------

    def place(self, start: int, length: int) -> list[Place]:
        """Return where a range goes; see `imgcore.formats.api.Updater`."""
        places: list[Place] = []
        try:
            for block, first, end in self._blocks(start, length):
                places += self._places(block, first, end)
        except BaseException:
            self.give_up([place for place in places if place.is_new])
            raise
        return places

    def _places(self, block: int, start: int, end: int) -> list[Place]:
        entry = self._entry(block)
        if entry == layout.ENTRY_ABSENT:
            entry = self._reserve(block)
            runs: Iterator[_Run] = iter([_Run(start, end, False)])
        else:
            runs = self._runs(block, entry, start, end)
        return [
            Place(
                run.start,
                run.end - run.start,
                self._host_offset(block, entry, run.start),
                is_new=not run.is_present,
                needs_all=not run.is_present,
            )
            for run in runs
        ]

    def _reserve(self, block: int) -> int:
        """Return the sector of a block that gets space; several places may be in it."""
        slot, n_places = self._reserved.get(block, (None, 0))
        if slot is None:
            slot = self._take(block)
        self._reserved[block] = [slot, n_places + 1]
        return (slot + self._bitmap_start) // SECTOR_NBYTES

    def overwritable(self, start: int, length: int) -> list[Place]:
        """Return the sectors that blocks have; see `Overwritable`."""
        return [
            Place(run.start, run.end - run.start, self._host_offset(block, entry, run.start))
            for block, first, end in self._blocks(start, length)
            if (entry := self._entry(block)) != layout.ENTRY_ABSENT
            for run in self._runs(block, entry, first, end)
            if run.is_present
        ]

    def refer(self, places: Sequence[Place]) -> None:
        """Set the sectors' bits, and the entries of new blocks; see `Updater`.

        Of a disk without parent, a new block has all its sectors.
        """
        for place in places:
            block = place.guest_offset // self._block_nbytes
            first = place.guest_offset % self._block_nbytes // SECTOR_NBYTES
            last = first + -(-place.length // SECTOR_NBYTES)
            bitmap_offset = place.host_offset - first * SECTOR_NBYTES - self._bitmap_nbytes
            is_new = self._entry(block) == layout.ENTRY_ABSENT
            if is_new and not self._is_child:
                # QEMU does not look at it, so it is durable before the entry.
                self._file.pwrite(bitmap_offset, b"\xff" * self._bitmap_nbytes)
            else:
                self._set_bits(bitmap_offset, first, last)
            if is_new:
                self._put_entry(block, bitmap_offset // SECTOR_NBYTES)
            self._settle_place(block)

    def give_up(self, places: Sequence[Place]) -> None:
        """Take back the space of blocks that were not written; see `Updater`."""
        for place in places:
            self._settle_place(place.guest_offset // self._block_nbytes)

    def _settle_place(self, block: int) -> None:
        """Note that a place in a block is written, or given up."""
        slot, n_places = self._reserved.get(block, (None, 0))
        if slot is None:
            return
        if n_places > 1:
            self._reserved[block] = [slot, n_places - 1]
            return
        del self._reserved[block]
        if self._entry(block) == layout.ENTRY_ABSENT:
            self._space.give_back(slot)
            self._has_gaps = True

    def zero(self, start: int, length: int, *, unmap: bool) -> list[tuple[int, int]]:
        """Punch holes in blocks; see `imgcore.formats.api.Updater`.

        Only what hides a parent's data has to be written.
        """
        rest: list[tuple[int, int]] = []
        for block, first, end in self._blocks(start, length):
            entry = self._entry(block)
            if entry == layout.ENTRY_ABSENT:
                runs: Iterator[_Run] = iter([_Run(first, end, False)])
            else:
                runs = self._runs(block, entry, first, end)
            for run in runs:
                nbytes = run.end - run.start
                if run.is_present:
                    place = self._host_offset(block, entry, run.start)
                    is_done = unmap and self._file.punch(place, nbytes)
                else:
                    is_done = not self._is_child
                if not is_done:
                    add_range(rest, run.start, nbytes)
        return rest

    def discard(self, start: int, length: int) -> None:
        """Punch holes in blocks; see `imgcore.formats.api.Updater`."""
        for block, first, end in self._blocks(start, length):
            entry = self._entry(block)
            if entry == layout.ENTRY_ABSENT:
                continue
            for run in self._runs(block, entry, first, end):
                if run.is_present:
                    place = self._host_offset(block, entry, run.start)
                    self._file.punch(place, run.end - run.start)

    def flush(self, *, is_unread: bool) -> None:
        """Make the changes durable; see `imgcore.formats.api.Updater`."""
        self._file.write_steps()
        self._is_unread = is_unread
        for slot in self._space.settle(is_unread=is_unread):
            self._give_back_space(slot)

    def _give_back_space(self, slot: int) -> None:
        """Give the space of a free slot back to the file system."""
        self._file.punch(slot + self._bitmap_start, self._slot_nbytes - self._bitmap_start)

    def withhold(self) -> None:
        """Append what is new while somebody reads; see `Updater`."""
        self._space.withhold(self._footer_offset)
        # What is appended then comes after a gap.
        self._has_gaps = True

    def finish(self) -> None:
        """Leave no gaps, and move the footer to the last block; see `Updater`.

        While somebody reads, all stays where it is.
        """
        if not self._is_unread:
            return
        if self._has_gaps:
            for slot in self._compact():
                self._give_back_space(slot)
        end = self._end_of_use(self._starts())
        if self._file.is_block_device:
            return
        # QEMU leaves nothing between blocks: a freed one is shorter than a slot.
        room = self._bitmap_nbytes + self._block_nbytes
        if self._first_end != end or self._footer_offset - end >= room:
            self._put_footer(end)
        elif end < self._footer_offset:
            # QEMU takes it for zeros.
            self._file.zero(end, self._footer_offset - end)
        self._file.cut(self._footer_offset + layout.FOOTER_NBYTES)

    def _compact(self) -> list[int]:
        """Move the last blocks into free slots before them; return where they were."""
        entries = self._entries(self._header.n_blocks)
        present = np.flatnonzero(entries != layout.ENTRY_ABSENT)
        places = entries[present] * SECTOR_NBYTES - self._bitmap_start
        owners = dict(zip(places.tolist(), present.tolist(), strict=True))
        moves = moves_into_gaps(owners, self._space.free)
        nbytes = self._slot_nbytes - self._bitmap_start
        for source, target in moves:
            copy_block(self._file, source + self._bitmap_start, target + self._bitmap_start, nbytes)
        for source, target in moves:
            self._put_entry(owners[source], (target + self._bitmap_start) // SECTOR_NBYTES)
        self._file.write_steps()
        return [source for source, _ in moves]

    # -- changes of structure ----------------------------------------------------------

    def resize(self, virtual_size: int) -> None:
        """Change the footers, and the BAT before; see `imgcore.formats.api.Updater`."""
        file, old_size = self._file, self._header.size.nbytes
        if self._is_child:
            raise OptionError(
                "a differencing VHD must have the size of its parent, so it is not resized",
                path=file.path,
            )
        footer = resized_footer(self._footer, self._header, virtual_size, file.path)
        n_old, n_blocks = self._header.n_blocks, -(-virtual_size // self._block_nbytes)
        if virtual_size > old_size:
            self._zero_end_of_disk()
            self._extend_table(n_blocks)
            self._file.write_steps()
        self._put_footers(footer, copy_first=virtual_size > old_size)
        freed = self._free_blocks(n_blocks, n_old)
        if freed:
            file.write_steps()
            # Nobody reads these: the disk does not have them any more.
            for slot in freed:
                self._space.give_back(slot)
            self._compact()

    def _zero_end_of_disk(self) -> None:
        """Clear what the last block has after the end of the disk."""
        size = self._header.size.nbytes
        block = size // self._block_nbytes
        if size % self._block_nbytes:
            entry = self._entry(block)
            if entry != layout.ENTRY_ABSENT:
                nbytes = (block + 1) * self._block_nbytes - size
                self._file.zero(self._host_offset(block, entry, size), nbytes)

    def _extend_table(self, n_blocks: int) -> None:
        """Let the BAT have so many entries; those after the disk are absent."""
        n_old = self._header.n_blocks
        first, end = self._entry_offset(n_old), self._entry_offset(n_blocks)
        end = align_up(end, SECTOR_NBYTES)
        if find_batmap(self._file, self._header) or end > self._table_limit():
            self._move_table(n_blocks)
        else:
            # The footer may follow the BAT.
            self._make_room(end)
            self._file.put(first, b"\xff" * (end - first), Step.NEW)
            self._put_header(self._dynamic._replace(max_table_entries=n_blocks))

    def _table_limit(self) -> int:
        """Return the host offset up to which nothing follows the BAT."""
        table = self._dynamic.table_offset
        limits = [low for low, _, _ in metadata(self._file, self._header) if low > table]
        starts = self._starts()
        limits += starts[starts > table].tolist()
        return min([*limits, self._space.end + self._bitmap_start])

    def _move_table(self, n_blocks: int) -> None:
        """Put a BAT of so many entries after the last block.

        XenServer's batmap follows it anew, and does not call any block full, which is
        always right.
        """
        n_old, offset = self._header.n_blocks, self._space.end + self._bitmap_start
        nbytes = align_up(n_blocks * layout.ENTRY_NBYTES, SECTOR_NBYTES)
        kept_nbytes = min(n_old, n_blocks) * layout.ENTRY_NBYTES
        raw = self._file.pread(self._dynamic.table_offset, kept_nbytes).ljust(nbytes, b"\xff")
        if find_batmap(self._file, self._header):
            batmap = bytes(batmap_nbytes(n_blocks))
            raw += make_batmap_header(offset + nbytes + SECTOR_NBYTES, batmap) + batmap
        self._append(raw)
        self._put_header(self._dynamic._replace(table_offset=offset, max_table_entries=n_blocks))

    def _put_header(self, header: DynamicHeader) -> None:
        """Change fields of the dynamic disk header that are in its first sector."""
        offset = self._header.footer.data_offset
        raw = self._file.pread(offset, layout.HEADER_NBYTES)
        new = with_header(raw, header)
        assert new[SECTOR_NBYTES:] == raw[SECTOR_NBYTES:]
        self._file.put(offset, new[:SECTOR_NBYTES], Step.ALLOCATION)
        self._read_header()

    def _read_header(self) -> None:
        """Read what has changed."""
        header = self._header = read_header(self._file, self._size)
        assert header.dynamic is not None
        self._dynamic = header.dynamic

    def _put_footers(self, footer: bytes, *, copy_first: bool) -> None:
        """Change the footer and its copy, one after the other, and make that durable.

        QEMU uses the copy: a disk that it states is never the smaller one.
        """
        self._footer = footer
        places = (0, self._footer_offset) if copy_first else (self._footer_offset, 0)
        for place, step in zip(places, (Step.ALLOCATION, Step.REFERENCE), strict=True):
            self._file.put(place, footer, step)
        self._file.write_steps()
        self._read_header()

    def _free_blocks(self, first: int, last: int) -> list[int]:
        """Let no entry refer to the blocks [first, last); return their slots."""
        self._clear_batmap()
        slots = []
        for block in range(first, last):
            entry = self._entry(block)
            if entry != layout.ENTRY_ABSENT:
                self._put_entry(block, layout.ENTRY_ABSENT)
                slots.append(entry * SECTOR_NBYTES - self._bitmap_start)
        return slots

    def _clear_batmap(self) -> None:
        """Let XenServer's batmap call no block full, which is always right.

        Its header then refers to another map, since it has the checksum of the map.
        """
        found = find_batmap(self._file, self._header)
        batmap = bytes(batmap_nbytes(self._header.n_blocks))
        if found is None or not any(self._file.pread(found[0], found[1])):
            return
        raw = make_batmap_header(self._space.end + self._bitmap_start, batmap)
        self._append(batmap)
        self._file.put(batmap_header_offset(self._header), raw, Step.ALLOCATION)

    def drop(self, start: int, length: int) -> None:
        """Free blocks; see `imgcore.formats.api.Rebasable`."""
        first, last = start // self._block_nbytes, -(-(start + length) // self._block_nbytes)
        for slot in self._free_blocks(first, last):
            self._space.release(slot)
            self._has_gaps = True

    def set_backing(self, reference: BackingReference | None) -> None:
        """Write a new header, which the footers then refer to; see `Rebasable`.

        The header is larger than a sector, so it is not overwritten.
        """
        parent = ParentFields(bytes(16), 0, b"", ())
        if reference is not None:
            parent = parent_fields(reference, self._header.size.nbytes)
        offset = self._space.end + self._bitmap_start
        locators, texts = b"", b""
        for platform, text in parent.locators:
            place = offset + layout.HEADER_NBYTES + len(texts)
            space = align_up(len(text), SECTOR_NBYTES)
            locators += layout.LOCATOR.pack(platform, space, len(text), 0, place)
            texts += text.ljust(space, b"\0")
        header = self._dynamic._replace(
            parent_uuid=parent.uuid, parent_timestamp=parent.timestamp, parent_name=parent.name
        )
        rest = locators.ljust(layout.HEADER_NBYTES - layout.LOCATORS_OFFSET, b"\0")
        raw = with_header(bytes(layout.LOCATORS_OFFSET) + rest, header) + texts
        self._append(raw)
        kind = DiskType.DYNAMIC if reference is None else DiskType.DIFFERENCING
        footer = footer_of(self._footer)._replace(data_offset=offset, disk_type=kind)
        self._put_footers(with_footer(self._footer, footer), copy_first=False)

    def _append(self, raw: bytes) -> None:
        """Write bytes after the last block, where the caller lets something refer."""
        offset = self._space.end + self._bitmap_start
        self._make_room(offset + len(raw))
        self._file.pwrite(offset, raw)
        self._space.end = self._slot_from(offset + len(raw))
