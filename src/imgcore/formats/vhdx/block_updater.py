"""VHDX: writing blocks in place.

A child gets the sectors that are written, and says so in its sector bitmaps.  Tables
change by way of the log, after the data that they refer to is durable.

Source: [MS-VHDX] 2.2.2, 2.3, 2.4 and 2.5.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, cast

import numpy as np

from imgcore.errors import CorruptImageError
from imgcore.files.update_file import Step
from imgcore.formats.api import Place
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.shared.ranges import add_range, block_parts
from imgcore.formats.vhdx import layout
from imgcore.formats.vhdx.check import VhdxChecker
from imgcore.formats.vhdx.log_writer import PAGE_NBYTES, LogWriter
from imgcore.formats.vhdx.space import FreeSpace
from imgcore.formats.vhdx.tables import bitmap_index, read_payload
from imgcore.limits import MAX_BATCH_ROWS, MIB

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.vhdx.reader import VhdxReader

    States = NDArray[np.uint64]

_ENTRY: Final = struct.Struct("<Q")
_STATE: Final = np.uint64(layout.BAT_STATE_MASK)
PLACED: Final = (layout.BLOCK_FULLY_PRESENT, layout.BLOCK_PARTIALLY_PRESENT)
# States in which a block may keep its place, although it has no data (2.5.1.1).
_KEEPING: Final = (layout.BLOCK_UNDEFINED, layout.BLOCK_UNMAPPED, layout.BLOCK_UNMAPPED_V095)
# Changes of the BAT that wait while a range of any length is zeroed.
_MAX_WAITING_NBYTES: Final = 16 * MIB


class _NewBlock(NamedTuple):
    """A block that has its place, but no entry, while it is written.

    ``users`` are the guest offsets of the places in it.
    """

    offset: int
    users: set[int]


class BlockUpdater:
    """Changes a fixed, dynamic or differencing disk.

    Raises
    ------
    CorruptImageError, LimitExceededError, UnsupportedFeatureError
        The image has a problem that `VhdxChecker` finds, or its log cannot be used.
    """

    def __init__(self, reader: VhdxReader) -> None:
        image = reader.image
        self._reader = reader
        self._image = image
        self._file = cast("UpdateFile", image.file)
        self._metadata = image.metadata
        self._log = LogWriter(self._file, image.header)
        checker = VhdxChecker(image)
        report = checker.run()
        if report.corruptions:
            raise CorruptImageError(
                f"is not written in place, because it is damaged: {report.problems[0]}",
                path=self._file.path,
            )
        metadata = self._metadata
        self._has_parent = metadata.has_parent
        self._is_fixed = metadata.leave_block_allocated and not metadata.has_parent
        # Room that the file of a fixed disk has for blocks without a place.
        self._kept_nbytes = checker.needed_nbytes - report.image_end_offset
        self._block_nbytes = metadata.block_nbytes
        self._new_blocks: dict[int, _NewBlock] = {}
        self.granule_nbytes: int = metadata.logical_sector_nbytes
        # The file may end with the disk, inside its last block.
        end = max(report.image_end_offset, self._after(metadata.n_blocks) or 0)
        self._space = FreeSpace(checker.free_runs, end)
        # Chunks whose sector bitmap block no durable entry refers to.
        self._new_bitmaps: set[int] = set()

    def begin(self, *, again: bool) -> None:
        """Give the file and its data new GUIDs (2.2.2)."""
        guids = {"file_write_guid": uuid.uuid4()}
        if not again:
            guids["data_write_guid"] = uuid.uuid4()
        self._log.update_headers(**guids)
        self._reader.note_header(self._log.header)
        if not self._file.is_block_device:
            nbytes = max(self._file.nbytes, self._space.end)
            self._file.grow(align_up(nbytes, layout.ALIGNMENT))

    def flush(self, *, is_unread: bool) -> None:
        """Make changes durable by way of the log; see `imgcore.formats.api.Updater`."""
        self._file.sync()
        self._new_bitmaps.clear()
        self._log.write(self._changed_pages())
        self._file.forget_step(Step.REFERENCE)
        for offset, nbytes in self._space.settle(is_unread=is_unread):
            inside = min(offset + nbytes, self._file.nbytes) - offset
            self._file.punch(offset, inside)

    def _changed_pages(self) -> list[int]:
        """Return the offsets of changed pages, in an order that is sound at each.

        Sector bitmaps come before entries that refer to their blocks.  The entry of a
        sector bitmap block follows those of its chunk, and comes before them here.
        """
        offsets = {
            page
            for start, data in self._file.waiting(Step.REFERENCE)
            for page in range(start - start % PAGE_NBYTES, start + len(data), PAGE_NBYTES)
        }
        bat = self._image.bat
        in_bat = {offset for offset in offsets if bat.offset <= offset < bat.end}
        return sorted(offsets - in_bat) + sorted(in_bat, reverse=True)

    def withhold(self) -> None:
        """Append what is new while somebody reads; see `Updater`."""
        self._space.withhold(self._file.nbytes)

    def finish(self) -> None:
        """Empty the log, and end the file after its last block."""
        self._log.empty()
        self._file.cut(self._space.end + self._kept_nbytes)

    def _settle(self) -> None:
        """Empty the log, so that tables may change without it where nothing refers."""
        self.flush(is_unread=False)
        self._log.empty()

    # -- entries -----------------------------------------------------------------------

    def _index(self, block: int) -> int:
        return block + block // self._metadata.chunk_ratio

    def _entry(self, index: int) -> int:
        offset = self._image.bat.offset + index * layout.BAT_ENTRY_NBYTES
        (entry,) = _ENTRY.unpack(self._file.pread(offset, layout.BAT_ENTRY_NBYTES))
        return int(entry)

    def _put_entries(self, index: int, entry: int, n_entries: int = 1) -> None:
        offset = self._image.bat.offset + index * layout.BAT_ENTRY_NBYTES
        self._file.put(offset, _ENTRY.pack(entry) * n_entries, Step.REFERENCE)

    def _write_entry(self, index: int, entry: int) -> None:
        """Change an entry that has no meaning yet."""
        offset = self._image.bat.offset + index * layout.BAT_ENTRY_NBYTES
        self._file.pwrite(offset, _ENTRY.pack(entry))

    def _is_inherited(self, state: int) -> bool:
        """Tell whether a block without data shows what the parent has."""
        return self._has_parent and state == layout.BLOCK_NOT_PRESENT

    # -- space -------------------------------------------------------------------------

    def _take(self, nbytes: int, after: int | None = None) -> int:
        """Return the host offset of space that reads as zeros."""
        offset = self._space.take(nbytes, after)
        try:
            used = min(self._file.nbytes, offset + nbytes) - offset
            if used > 0 and not self._file.punch(offset, used):
                self._file.zero(offset, used)
            self._file.grow(offset + nbytes)
        except BaseException:
            self._space.give_back(offset, nbytes)
            raise
        return offset

    def _after(self, block: int) -> int | None:
        """Return the end of the block before, in the file."""
        if not block:
            return None
        before = self._new_blocks.get(block - 1)
        if before is not None:
            return before.offset + self._block_nbytes
        entry = self._entry(self._index(block - 1))
        if entry & layout.BAT_STATE_MASK not in PLACED:
            return None
        return (entry & layout.BAT_OFFSET_MASK) + self._block_nbytes

    def _release(self, entry: int) -> None:
        """Free the place of an entry that has been replaced."""
        offset = entry & layout.BAT_OFFSET_MASK
        # What a block without data has kept may be no place of the file.
        is_inside = 0 < offset <= self._space.end - self._block_nbytes
        if is_inside and entry & layout.BAT_STATE_MASK in (*PLACED, *_KEEPING):
            self._space.release(offset, self._block_nbytes)

    # -- writing -----------------------------------------------------------------------

    def place(self, start: int, length: int) -> list[Place]:
        """Return where a range goes; see `imgcore.formats.api.Updater`."""
        places: list[Place] = []
        try:
            for block, low, high in self._blocks(start, length):
                places.append(self._place(block, low, high - low))
        except BaseException:
            self.give_up([place for place in places if place.is_new])
            raise
        return places

    def overwritable(self, start: int, length: int) -> list[Place]:
        """Return the sectors that blocks have; see `Overwritable`."""
        places: list[Place] = []
        for block, low, high in self._blocks(start, length):
            inside = low - block * self._block_nbytes
            entry = self._entry(self._index(block))
            state, offset = entry & layout.BAT_STATE_MASK, entry & layout.BAT_OFFSET_MASK
            if state == layout.BLOCK_FULLY_PRESENT:
                places.append(Place(low, high - low, offset + inside))
            elif state == layout.BLOCK_PARTIALLY_PRESENT:
                bits = self._bitmap(block) & self._mask(inside, high - low)
                for first, last in _runs_of_ones(bits):
                    at, nbytes = first * self.granule_nbytes, (last - first) * self.granule_nbytes
                    places.append(Place(block * self._block_nbytes + at, nbytes, offset + at))
        return places

    def _blocks(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        return block_parts(start, length, self._block_nbytes)

    def _place(self, block: int, start: int, length: int) -> Place:
        inside = start - block * self._block_nbytes
        entry = self._entry(self._index(block))
        state, offset = entry & layout.BAT_STATE_MASK, entry & layout.BAT_OFFSET_MASK
        if state == layout.BLOCK_FULLY_PRESENT:
            return Place(start, length, offset + inside)
        if state == layout.BLOCK_PARTIALLY_PRESENT:
            mask = self._mask(inside, length)
            if self._bitmap(block) & mask == mask:
                return Place(start, length, offset + inside)
            return Place(start, length, offset + inside, is_new=True, needs_all=True)
        new = self._new_blocks.get(block)
        if new is None:
            new = _NewBlock(self._take(self._block_nbytes, self._after(block)), set())
            self._new_blocks[block] = new
            self._kept_nbytes = max(0, self._kept_nbytes - self._block_nbytes)
        new.users.add(start)
        needs_all = self._is_inherited(state)
        return Place(start, length, new.offset + inside, is_new=True, needs_all=needs_all)

    def give_up(self, places: Sequence[Place]) -> None:
        """Take back the space of new blocks, which have no entries."""
        for place in places:
            block = place.guest_offset // self._block_nbytes
            new = self._end_use(block, place)
            if new is not None and not new.users:
                entry = self._entry(self._index(block))
                if entry & layout.BAT_STATE_MASK not in PLACED:
                    self._space.give_back(new.offset, self._block_nbytes)

    def _end_use(self, block: int, place: Place) -> _NewBlock | None:
        """Note that a place in a new block is not written any more; return the block.

        None if the block had an entry before the place was asked for.
        """
        new = self._new_blocks.get(block)
        if new is None or place.guest_offset not in new.users:
            return None
        new.users.discard(place.guest_offset)
        if not new.users:
            del self._new_blocks[block]
        return new

    def refer(self, places: Sequence[Place]) -> None:
        """Let entries and sector bitmaps refer to places that have been written."""
        for place in places:
            block, inside = divmod(place.guest_offset, self._block_nbytes)
            index = self._index(block)
            entry = self._entry(index)
            state = entry & layout.BAT_STATE_MASK
            new = self._end_use(block, place)
            if state == layout.BLOCK_FULLY_PRESENT:
                continue
            if state == layout.BLOCK_PARTIALLY_PRESENT:
                offset, present = entry & layout.BAT_OFFSET_MASK, self._bitmap(block)
            else:
                assert new is not None
                offset, present = new.offset, 0
            if state == layout.BLOCK_PARTIALLY_PRESENT or self._is_inherited(state):
                present |= self._mask(inside, place.length)
                if present & self._whole(block) != self._whole(block):
                    self._change_bitmap(block, present)
                    state_after = layout.BLOCK_PARTIALLY_PRESENT
                else:
                    state_after = layout.BLOCK_FULLY_PRESENT
            else:
                state_after = layout.BLOCK_FULLY_PRESENT
            if entry != offset | state_after:
                self._put_entries(index, offset | state_after)
                if state not in PLACED:
                    self._release(entry)

    # -- sector bitmaps ----------------------------------------------------------------

    def _mask(self, inside: int, length: int) -> int:
        """Return the bits of a range of a block; the lowest is the first sector's."""
        first = inside // self.granule_nbytes
        last = -(-(inside + length) // self.granule_nbytes)
        return ((1 << last - first) - 1) << first

    def _whole(self, block: int) -> int:
        """Return the bits of all sectors of a block that the disk has."""
        left = self._metadata.virtual_size - block * self._block_nbytes
        return self._mask(0, min(left, self._block_nbytes))

    def _bitmap_place(self, block: int) -> tuple[int, int]:
        """Return the host offset and the size of a block's part of its bitmap block.

        A chunk that has no sector bitmap block gets one.
        """
        ratio = self._metadata.chunk_ratio
        index = bitmap_index(block, ratio)
        entry = self._entry(index)
        offset = entry & layout.BAT_OFFSET_MASK
        if entry & layout.BAT_STATE_MASK != layout.BITMAP_PRESENT:
            offset = self._take(layout.BITMAP_BLOCK_NBYTES)
            self._put_entries(index, offset | layout.BITMAP_PRESENT)
            self._new_bitmaps.add(block // ratio)
        nbytes = layout.BITMAP_BLOCK_NBYTES // ratio
        return offset + block % ratio * nbytes, nbytes

    def _bitmap(self, block: int) -> int:
        return int.from_bytes(self._file.pread(*self._bitmap_place(block)), "little")

    def _change_bitmap(self, block: int, bits: int) -> None:
        """Change the bits of a block, where they differ from those it has."""
        offset, nbytes = self._bitmap_place(block)
        different = bits ^ int.from_bytes(self._file.pread(offset, nbytes), "little")
        if not different:
            return
        first = ((different & -different).bit_length() - 1) // 8
        last = -(-different.bit_length() // 8)
        changed = bits.to_bytes(nbytes, "little")[first:last]
        if block // self._metadata.chunk_ratio in self._new_bitmaps:
            # Nothing durable refers to it.
            self._file.pwrite(offset + first, changed)
        else:
            self._file.put(offset + first, changed, Step.REFERENCE)

    # -- zeros -------------------------------------------------------------------------

    def zero(self, start: int, length: int, *, unmap: bool) -> list[tuple[int, int]]:
        """Let blocks read as zeros; see `imgcore.formats.api.Updater`."""
        keeps_space = self._is_fixed or not unmap
        rest: list[tuple[int, int]] = []
        first, last = self._whole_blocks(start, start + length)
        for block, low, high in self._blocks(start, length):
            if first <= block < last:
                break
            self._note_rest(rest, block, low, high)
        if first >= last:
            return rest

        def chosen(states: States) -> NDArray[np.bool_]:
            has_space = np.isin(states, PLACED)
            reads_old = has_space | (states != layout.BLOCK_ZERO)
            if not self._has_parent:
                reads_old &= states != layout.BLOCK_NOT_PRESENT
            changes: NDArray[np.bool_] = reads_old & ~has_space if keeps_space else reads_old
            return changes

        for low in range(first, last, MAX_BATCH_ROWS):
            high = min(low + MAX_BATCH_ROWS, last)
            self._change_states(low, high, chosen, layout.BLOCK_ZERO)
            if keeps_space:
                states = read_payload(self._image, low, high) & _STATE
                for run in runs(np.flatnonzero(np.isin(states, PLACED)) + low):
                    add_range(rest, *self._range(*run))
        tail = last * self._block_nbytes
        for block, low, high in self._blocks(tail, start + length - tail):
            self._note_rest(rest, block, low, high)
        return rest

    def _note_rest(self, rest: list[tuple[int, int]], block: int, low: int, high: int) -> None:
        """Note a part of a block that has to be written as zeros."""
        state = self._entry(self._index(block)) & layout.BAT_STATE_MASK
        if state in PLACED or self._is_inherited(state):
            add_range(rest, low, high - low)

    def discard(self, start: int, length: int) -> None:
        """Free whole blocks; those of a child go on hiding the parent's."""
        if self._is_fixed:
            return
        state = layout.BLOCK_ZERO if self._has_parent else layout.BLOCK_UNMAPPED
        self._change_whole(start, length, lambda states: np.isin(states, PLACED), state)

    def _change_whole(
        self, start: int, length: int, chosen: Callable[[States], NDArray[np.bool_]], state: int
    ) -> None:
        first, last = self._whole_blocks(start, start + length)
        for low in range(first, last, MAX_BATCH_ROWS):
            self._change_states(low, min(low + MAX_BATCH_ROWS, last), chosen, state)

    def _whole_blocks(self, start: int, end: int) -> tuple[int, int]:
        """Return the first and the last whole block of a range, the end excluded."""
        at_end = end == self._metadata.virtual_size
        last = self._metadata.n_blocks if at_end else end // self._block_nbytes
        return -(-start // self._block_nbytes), last

    def _range(self, first: int, last: int) -> tuple[int, int]:
        """Return start and length of blocks on the disk."""
        start = first * self._block_nbytes
        return start, min(last * self._block_nbytes, self._metadata.virtual_size) - start

    def _change_states(
        self, first: int, last: int, chosen: Callable[[States], NDArray[np.bool_]], state: int
    ) -> None:
        """Give blocks another state, without a place, and free what they have."""
        entries = read_payload(self._image, first, last)
        numbers = np.flatnonzero(chosen(entries & _STATE))
        ratio = self._metadata.chunk_ratio
        for low, high in runs(numbers + first):
            for at in range(low - low % ratio, high, ratio):
                begin, end = max(at, low), min(at + ratio, high)
                self._put_entries(self._index(begin), state, end - begin)
        for entry in entries[numbers].tolist():
            self._release(entry)
        if self._file.waiting_nbytes > _MAX_WAITING_NBYTES:
            self.flush(is_unread=False)


def runs(numbers: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield runs of ascending numbers: the first, and one more than the last."""
    if numbers.size:
        edges = np.flatnonzero(np.diff(numbers) != 1) + 1
        for run in np.split(numbers, edges):
            yield int(run[0]), int(run[-1]) + 1


def _runs_of_ones(bits: int) -> Iterator[tuple[int, int]]:
    """Yield the runs [first, last) of bits that are set; the lowest is number 0."""
    at = 0
    while bits:
        n_zeros = (bits & -bits).bit_length() - 1
        bits >>= n_zeros
        n_ones = (~bits & (bits + 1)).bit_length() - 1
        bits >>= n_ones
        at += n_zeros + n_ones
        yield at - n_ones, at
