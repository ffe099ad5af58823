"""VDI: writing in place.

The block map numbers *slots*, places for a block that follow each other.  VirtualBox
and QEMU put a new block into the slot whose number is the count of allocated blocks in
the header.  So the count is durable before an entry that needs it, and no slot is left
unused in the end.

Source: VirtualBox src/VBox/Storage/VDICore.h, VDI.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast
from uuid import UUID, uuid4

import numpy as np

from imgcore.errors import CorruptImageError, LimitExceededError, OptionError
from imgcore.files.update_file import Step
from imgcore.formats.api import Place
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.shared.free_space import FreeSpace
from imgcore.formats.shared.moving import copy_block, moves_into_gaps
from imgcore.formats.shared.ranges import block_parts
from imgcore.formats.vdi import layout
from imgcore.formats.vdi.check import check
from imgcore.formats.vdi.header import read_header
from imgcore.formats.vdi.layout import HeaderFields, ImageType
from imgcore.formats.vdi.tables import read_map
from imgcore.limits import SECTOR_NBYTES, VDI_MAX_DATA_OFFSET, VDI_MAX_REWRITTEN_BLOCKS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.api import BackingReference
    from imgcore.formats.vdi.reader import VdiReader

# Unused slots of an image that are filled; an interrupted writer leaves few.
_MAX_GAPS: Final = 1024


def prepare(_file: UpdateFile) -> None:
    """Do nothing: an interrupted writer leaves no more than unused slots."""


def updater_for(reader: VdiReader, _parent_nbytes: int | None) -> VdiUpdater:
    """Return what changes an image; see `imgcore.formats.api.Driver`."""
    return VdiUpdater(reader)


class VdiUpdater:
    """Changes a dynamic, fixed or differencing image.

    Blocks that read as zeros keep their slots, and give back the space of these.
    """

    def __init__(self, reader: VdiReader) -> None:
        self._file = cast("UpdateFile", reader.sources[0].file)
        self._header = reader.header
        self._is_child = reader.header.parent_uuid is not None
        self._block_nbytes = reader.block_nbytes
        self.granule_nbytes: int = reader.block_nbytes
        self._verify()

    def _verify(self) -> None:
        """Raise unless no block is in the way of another, or of the map."""
        if self._header.n_blocks > VDI_MAX_REWRITTEN_BLOCKS:
            raise LimitExceededError(
                f"a block map of {self._header.n_blocks} entries, at most "
                f"{VDI_MAX_REWRITTEN_BLOCKS} are written in place",
                path=self._file.path,
            )
        if self._header.map_offset % SECTOR_NBYTES:
            raise CorruptImageError(
                f"the block map is at {self._header.map_offset:#x}, which is not a multiple of "
                f"{SECTOR_NBYTES}: it is not written to",
                path=self._file.path,
            )
        report = check(self._file, self._header)
        if report.corruptions:
            raise CorruptImageError(
                f"{report.first_corruption}: it is not written to", path=self._file.path
            )

    # -- slots -------------------------------------------------------------------------

    def begin(self, *, again: bool) -> None:
        """Find the free slots, and change the modification UUID; see `Updater`.

        An interrupted writer may have counted slots that it did not refer to.
        """
        entries = self._entries()
        used = np.sort(entries[entries < layout.BLOCK_ZERO].astype(np.int64))
        end = int(used[-1]) + 1 if len(used) else 0
        self._is_unread = False
        self._space = FreeSpace(self._offset_of(end), self._block_nbytes)
        for gap in _unused(used, _MAX_GAPS):
            self._space.give_back(self._offset_of(gap))
        fields = self._fields()._replace(n_allocated=end)
        if not again:
            fields = fields._replace(modification_uuid=uuid4().bytes_le)
        self._put_header(fields)
        self._count = end
        if not again:
            # Later, somebody may read what is behind the last block.
            self._file.cut(self._offset_of(end))

    def _entries(self) -> NDArray[np.uint32]:
        pieces = read_map(self._file, self._header, 0, self._header.n_blocks)
        return np.concatenate([entries for _, entries in pieces] or [np.empty(0, "<u4")])

    def _offset_of(self, slot: int) -> int:
        return self._header.data_offset + slot * self._block_nbytes

    def _host_offset(self, slot: int, guest_offset: int) -> int:
        return self._offset_of(slot) + guest_offset % self._block_nbytes

    def _slot_at(self, host_offset: int) -> int:
        return (host_offset - self._header.data_offset) // self._block_nbytes

    def _take(self, block: int) -> int:
        """Return the host offset of a slot of zeros for a block of the disk."""
        before = self._entry(block - 1) if block else layout.BLOCK_FREE
        after = self._offset_of(before + 1) if before < layout.BLOCK_ZERO else None
        offset = self._space.take(after)
        try:
            if offset < self._file.nbytes:
                self._file.zero(offset, self._block_nbytes)
            self._file.grow(offset + self._block_nbytes)
        except BaseException:
            self._space.give_back(offset)
            raise
        return offset

    # -- the header and the map --------------------------------------------------------

    def _fields(self) -> HeaderFields:
        raw = self._file.pread(layout.PRE_HEADER.size, layout.HEADER.size)
        return HeaderFields._make(layout.HEADER.unpack(raw))

    def _put_header(self, fields: HeaderFields, step: Step = Step.ALLOCATION) -> None:
        """Change the header, which is in one sector."""
        self._file.put(layout.PRE_HEADER.size, layout.HEADER.pack(*fields), step)
        self._header = read_header(self._file)

    def _count_at_least(self, n_slots: int) -> None:
        """Let the header count so many blocks before entries refer to them."""
        if n_slots > self._count:
            self._count = n_slots
            self._file.put(layout.N_ALLOCATED_OFFSET, layout.COUNT.pack(n_slots), Step.ALLOCATION)

    def _entry_offset(self, block: int) -> int:
        return self._header.map_offset + block * layout.ENTRY_NBYTES

    def _entry(self, block: int) -> int:
        raw = self._file.pread(self._entry_offset(block), layout.ENTRY_NBYTES)
        return int.from_bytes(raw, "little")

    def _put_entry(self, block: int, entry: int) -> None:
        raw = entry.to_bytes(layout.ENTRY_NBYTES, "little")
        self._file.put(self._entry_offset(block), raw, Step.REFERENCE)

    def _blocks(self, start: int, length: int) -> Iterator[tuple[int, int, int]]:
        return block_parts(start, length, self._block_nbytes)

    # -- changes of content ------------------------------------------------------------

    def place(self, start: int, length: int) -> list[Place]:
        """Return where blocks go; see `imgcore.formats.api.Updater`."""
        places: list[Place] = []
        try:
            for block, first, end in self._blocks(start, length):
                places.append(self._place(block, first, end))
        except BaseException:
            self.give_up([place for place in places if place.is_new])
            raise
        return places

    def _place(self, block: int, start: int, end: int) -> Place:
        entry = self._entry(block)
        is_new = entry >= layout.BLOCK_ZERO
        offset = self._take(block) if is_new else self._offset_of(entry)
        return Place(
            start,
            end - start,
            offset + start % self._block_nbytes,
            is_new=is_new,
            needs_all=self._is_child and entry == layout.BLOCK_FREE,
        )

    def overwritable(self, start: int, length: int) -> list[Place]:
        """Return the blocks that have slots; see `imgcore.formats.api.Overwritable`."""
        return [
            Place(first, end - first, self._host_offset(entry, first))
            for block, first, end in self._blocks(start, length)
            if (entry := self._entry(block)) < layout.BLOCK_ZERO
        ]

    def refer(self, places: Sequence[Place]) -> None:
        """Count the slots, and enter them in the map; see `Updater`."""
        self._count_at_least(max(self._slot_at(place.host_offset) for place in places) + 1)
        for place in places:
            self._put_entry(
                place.guest_offset // self._block_nbytes, self._slot_at(place.host_offset)
            )

    def give_up(self, places: Sequence[Place]) -> None:
        """Take back slots that were not written; see `imgcore.formats.api.Updater`."""
        for place in places:
            self._space.give_back(self._offset_of(self._slot_at(place.host_offset)))

    def zero(self, start: int, length: int, *, unmap: bool) -> list[tuple[int, int]]:
        """Punch holes in slots; what has none becomes a zero block; see `Updater`."""
        rest: list[tuple[int, int]] = []
        for block, first, end in self._blocks(start, length):
            entry = self._entry(block)
            if entry < layout.BLOCK_ZERO:
                place = self._host_offset(entry, first)
                is_done = unmap and self._file.punch(place, end - first)
            elif self._is_child and entry == layout.BLOCK_FREE:
                stop = min((block + 1) * self._block_nbytes, self._header.virtual_size)
                is_done = (first, end) == (block * self._block_nbytes, stop)
                if is_done:
                    self._put_entry(block, layout.BLOCK_ZERO)
            else:
                is_done = True
            if not is_done:
                rest.append((first, end - first))
        return rest

    def discard(self, start: int, length: int) -> None:
        """Punch holes in slots; see `imgcore.formats.api.Updater`."""
        for block, first, end in self._blocks(start, length):
            entry = self._entry(block)
            if entry < layout.BLOCK_ZERO:
                place = self._host_offset(entry, first)
                self._file.punch(place, end - first)

    def flush(self, *, is_unread: bool) -> None:
        """Make the changes durable; see `imgcore.formats.api.Updater`."""
        self._file.write_steps()
        self._is_unread = is_unread
        for offset in self._space.settle(is_unread=is_unread):
            self._file.punch(offset, self._block_nbytes)

    def withhold(self) -> None:
        """Append what is new while somebody reads; see `Updater`."""
        self._space.withhold(self._file.nbytes)

    def finish(self) -> None:
        """Move the last blocks into unused slots; see `imgcore.formats.api.Updater`.

        While somebody reads, all stays where it is.
        """
        if self._is_unread:
            self._compact()
            self._file.cut(self._offset_of(self._count))

    def _compact(self) -> None:
        """Move the last blocks into unused slots; then lower the count."""
        entries = self._entries()
        blocks = np.flatnonzero(entries < layout.BLOCK_ZERO)
        owners = dict(zip(entries[blocks].tolist(), blocks.tolist(), strict=True))
        moves = moves_into_gaps(owners, map(self._slot_at, self._space.free))
        for source, target in moves:
            self._copy(source, target)
        for source, target in moves:
            self._put_entry(owners[source], target)
        self._file.write_steps()
        for source, target in moves:
            owners[target] = owners.pop(source)
        self._count = max(owners, default=-1) + 1
        if self._count != self._fields().n_allocated:
            self._put_header(self._fields()._replace(n_allocated=self._count))
            self._file.write_steps()

    def _copy(self, source: int, target: int) -> None:
        copy_block(self._file, self._offset_of(source), self._offset_of(target), self._block_nbytes)

    # -- changes of structure ----------------------------------------------------------

    def resize(self, virtual_size: int) -> None:
        """Change the header, and the map before; see `imgcore.formats.api.Updater`."""
        header = self._header
        if self._is_child:
            raise OptionError(
                "a differencing VDI has the size of its parent, so it is not resized",
                path=self._file.path,
            )
        n_blocks = -(-virtual_size // self._block_nbytes)
        if virtual_size > header.virtual_size:
            self._zero_after_disk()
            self._extend_map(n_blocks, virtual_size)
        else:
            self._put_header(self._fields()._replace(disk_nbytes=virtual_size), Step.REFERENCE)
            self._file.write_steps()
            freed = self._free(n_blocks, header.n_blocks)
            self._file.write_steps()
            # Nobody reads these: the disk does not have them any more.
            for offset in freed:
                self._space.give_back(offset)
            self._compact()
            self._put_header(self._fields()._replace(n_blocks=n_blocks))

    def make_way(self, virtual_size: int) -> bool:
        """Empty the slots that a longer map needs; see `MakesWay`."""
        n_slots = self._n_slots_for_map(-(-virtual_size // self._block_nbytes))
        return n_slots > 0 and self._empty_slots(n_slots)

    def _n_slots_for_map(self, n_blocks: int) -> int:
        """Return how many of the first slots a map of so many entries takes."""
        if self._is_child or self._entry_offset(n_blocks) <= self._header.data_offset:
            return 0
        map_nbytes = align_up(n_blocks * layout.ENTRY_NBYTES, SECTOR_NBYTES)
        n_slots = -(-map_nbytes // self._block_nbytes)
        if self._offset_of(n_slots) > VDI_MAX_DATA_OFFSET:
            raise OptionError(
                f"the map of {n_blocks} blocks would end after {VDI_MAX_DATA_OFFSET:#x}, before "
                "which the data of a VDI begins",
                path=self._file.path,
            )
        return n_slots

    def _zero_after_disk(self) -> None:
        """Clear what blocks have after the end of the disk."""
        size, n_blocks = self._header.virtual_size, self._header.n_blocks
        for block, first, end in self._blocks(size, n_blocks * self._block_nbytes - size):
            entry = self._entry(block)
            if entry < layout.BLOCK_ZERO:
                place = self._host_offset(entry, first)
                self._file.zero(place, end - first)

    def _extend_map(self, n_blocks: int, virtual_size: int) -> None:
        """Let the map have at least so many entries, and the disk its new size."""
        n_slots = self._n_slots_for_map(n_blocks)
        if n_slots:
            self._move_map(n_slots)
        n_old = self._header.n_blocks
        entries = np.full(max(n_blocks - n_old, 0), layout.BLOCK_FREE, dtype="<u4")
        n_allocated = self._count
        if self._header.image_type is ImageType.FIXED:
            start = self._space.end
            first = self._slot_at(start)
            n_allocated = first + len(entries)
            entries[:] = np.arange(first, n_allocated)
            self._space.end = self._offset_of(n_allocated)
            old_end = min(self._file.nbytes, self._space.end)
            if start < old_end:
                self._file.zero(start, old_end - start)
            self._file.grow(self._space.end)
            self._count = n_allocated
        self._file.put(self._entry_offset(n_old), entries.tobytes(), Step.NEW)
        self._file.write_steps()
        fields = self._fields()._replace(
            disk_nbytes=virtual_size, n_blocks=max(n_blocks, n_old), n_allocated=n_allocated
        )
        self._put_header(fields, Step.REFERENCE)

    def _move_map(self, n_slots: int) -> None:
        """Put the map where the first slots are, which nothing uses any more.

        The header then states at once where the map and the first slot are.
        """
        start, data_offset = self._header.data_offset, self._offset_of(n_slots)
        entries = self._entries().copy()
        entries[entries < layout.BLOCK_ZERO] -= n_slots
        self._file.grow(data_offset)
        self._file.pwrite(start, entries.tobytes())
        self._file.sync()
        self._count = max(self._count - n_slots, 0)
        fields = self._fields()._replace(
            map_offset=start, data_offset=data_offset, n_allocated=self._count
        )
        self._put_header(fields, Step.REFERENCE)
        self._file.write_steps()

    def _empty_slots(self, n_slots: int) -> bool:
        """Move blocks in the first slots after the last one; tell if there are any."""
        entries = self._entries()
        target = max(self._slot_at(self._space.end), n_slots)
        blocks = np.flatnonzero(entries < n_slots).tolist()
        for block in blocks:
            self._file.grow(self._offset_of(target + 1))
            self._copy(int(entries[block]), target)
            self._count_at_least(target + 1)
            self._put_entry(block, target)
            target += 1
        self._file.write_steps()
        free = [offset for offset in self._space.free if self._slot_at(offset) >= n_slots]
        self._space = FreeSpace(self._offset_of(target), self._block_nbytes)
        for offset in free:
            self._space.give_back(offset)
        return bool(blocks)

    def _free(self, first: int, last: int) -> list[int]:
        """Let the blocks [first, last) have no slots; return the offsets of these."""
        offsets = []
        for block in range(first, last):
            entry = self._entry(block)
            if entry != layout.BLOCK_FREE:
                self._put_entry(block, layout.BLOCK_FREE)
            if entry < layout.BLOCK_ZERO:
                offsets.append(self._offset_of(entry))
        return offsets

    def drop(self, start: int, length: int) -> None:
        """Free blocks; see `imgcore.formats.api.Rebasable`."""
        first, last = start // self._block_nbytes, -(-(start + length) // self._block_nbytes)
        for offset in self._free(first, last):
            self._space.release(offset)

    def set_backing(self, reference: BackingReference | None) -> None:
        """Change the parent's UUIDs; see `imgcore.formats.api.Rebasable`."""
        fields = self._fields()
        if reference is None:
            null = layout.NULL_UUID
            kind, parent, modification = ImageType.NORMAL, null, null
        elif reference.format != "vdi":
            raise OptionError(
                f"the parent of a VDI must be a VDI, not {reference.format}", path=self._file.path
            )
        elif fields.image_type == ImageType.FIXED:
            raise OptionError("a fixed VDI cannot have a parent", path=self._file.path)
        else:
            known = reference.identities
            kind = ImageType.DIFF
            parent = UUID(known[layout.IDENTITY_UUID]).bytes_le
            modification = UUID(known[layout.IDENTITY_MODIFICATION]).bytes_le
        self._put_header(
            fields._replace(
                image_type=kind, parent_uuid=parent, parent_modification_uuid=modification
            ),
            Step.REFERENCE,
        )


def _unused(used: NDArray[np.int64], at_most: int) -> list[int]:
    """Return numbers that are not among ascending ones, below the last of them."""
    before = np.concatenate(([-1], used[:-1])) if len(used) else used
    found: list[int] = []
    for at in np.flatnonzero(used - before > 1).tolist():
        found += range(int(before[at]) + 1, int(used[at]))[: at_most - len(found)]
    return found
