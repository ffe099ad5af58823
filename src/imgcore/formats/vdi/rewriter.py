"""VDI: the rewriter.

The block map lies before the first block.  Its entries number *slots*: places for a
block, which follow each other from the first block that stays.  VirtualBox and QEMU put
a new block into the slot whose number is the count of allocated blocks.  So every slot
below that count must be in use: those that no data is in get a block of zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from imgcore.engine.extents import Kind
from imgcore.errors import LimitExceededError, UnsupportedFeatureError
from imgcore.formats.api import BlockRule
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.vdi import layout
from imgcore.formats.vdi.options import Options, WriteOptions
from imgcore.formats.vdi.tables import table_format
from imgcore.limits import (
    MAX_DROPPED_NBYTES,
    MIB,
    SECTOR_NBYTES,
    VDI_MAX_DATA_OFFSET,
    VDI_MAX_REWRITTEN_BLOCKS,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.engine.extents import Placements
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Survey, WriteRequest

# Slots that may get a block of zeros.  If the disk has too few free blocks for them,
# the map has more entries than the disk needs.
_MAX_GAPS: Final = 64


def rewriter_for(request: WriteRequest[Options], survey: Survey) -> VdiRewriter:
    """Return the rewriter for a request; see `imgcore.formats.api.Driver.rewriter`."""
    options = WriteOptions.of(request)
    if options.is_fixed:
        raise UnsupportedFeatureError(
            "a VDI with subformat=fixed has all its blocks in order: imgcore convert writes one; "
            "subformat=dynamic needs no copy"
        )
    return VdiRewriter(options, survey)


class VdiRewriter:
    """Writes header and block map of a dynamic image around blocks that stay.

    Memory: the block map, with 4 bytes for each block, at most 64 MiB.
    """

    format_name: ClassVar[str] = "vdi"

    def __init__(self, options: WriteOptions, survey: Survey) -> None:
        if options.n_blocks > VDI_MAX_REWRITTEN_BLOCKS:
            raise LimitExceededError(
                f"a block map of {options.n_blocks} entries, at most {VDI_MAX_REWRITTEN_BLOCKS} "
                "are written without copying: a larger block_size helps"
            )
        self._options = options
        self._is_flat = survey.is_flat
        self._old_nbytes = survey.file_nbytes
        self.rule: BlockRule = _rule(options, survey)
        self._data_offset: int = self.rule.first_offset
        self._has_slots = False
        self._is_cut = False
        self.overwrites: list[tuple[int, int]] = []
        self._overwrite(0, self._data_offset)

    def know_places(
        self, starts: NDArray[np.int64], ends: NDArray[np.int64], *, is_moving: bool
    ) -> None:
        """Find the first slot and the unused ones; see `NeedsPlaces`."""
        if self._is_flat:
            first, end = self._data_offset, self._kept_blocks * self._options.block_nbytes
            places = np.array([(first, end)] if first < end else [], dtype=np.int64)
            starts, ends = places.reshape(-1, 2).T
        starts, ends = np.sort(starts), np.sort(ends)
        self._has_slots = bool(len(starts))
        if self._has_slots:
            self._data_offset = int(starts[0])
        after = self._slot_after(self._old_nbytes)
        _refuse_far(self._data_offset if self._has_slots or not is_moving else after)
        slots_end = int(ends[-1]) if self._has_slots else self._data_offset
        n_after = max(self._old_nbytes - slots_end, 0)
        # What follows the last block is cut off, or becomes slots before those of the
        # blocks that move; even then it is cut off if all of these are zeros.
        self._is_cut = is_moving or n_after <= MAX_DROPPED_NBYTES
        if is_moving:
            starts = np.append(starts, after)
        elif self._is_cut:
            self._overwrite(slots_end, n_after)
        ends = ends[: len(starts) - 1]
        gaps = starts[1:] - ends
        _refuse_gaps(int(gaps.sum()), self._options.block_nbytes)
        for at in np.flatnonzero(gaps).tolist():
            self._overwrite(int(ends[at]), int(gaps[at]))

    @property
    def _kept_blocks(self) -> int:
        """Blocks of a flat disk that can be where they are, also as holes.

        What follows the disk in its file must not become the end of its last block: the
        guest would see it if the disk grew.
        """
        size, nbytes = self._options.virtual_size, self._options.block_nbytes
        return size // nbytes if self._old_nbytes > size else self._options.n_blocks

    def _overwrite(self, start: int, length: int) -> None:
        """Declare a part of the old file as overwritten or cut off."""
        length = min(length, self._old_nbytes - start)
        if length > 0:
            self.overwrites.append((start, length))

    def begin(self, file: TargetFile, append_offset: int) -> int:
        """Find the first slot after the old file; the map lies before all slots."""
        self._file = file
        if not self._has_slots:
            self._data_offset = self._slot_after(append_offset)
            _refuse_far(self._data_offset)
        options = self._options
        self._map = np.full(options.n_blocks + _MAX_GAPS, layout.BLOCK_FREE, dtype="<u4")
        self._format = table_format(options.block_nbytes, self._data_offset)
        return self._slot_after(append_offset)

    def _slot_after(self, offset: int) -> int:
        """Return the first host offset of a slot at or after ``offset``."""
        start = self._data_offset
        return max(start, start + align_up(offset - start, self._options.block_nbytes))

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Record the slots of blocks; see `imgcore.formats.api.Rewriter`."""
        entries = self._map[first_block : first_block + len(placements)]
        self._format.encode(placements, entries.view(np.uint8))
        return next_offset

    def finish(self, next_offset: int) -> None:
        """Write zeros into unused slots, the map and the header."""
        options, entries = self._options, self._map
        if self._is_flat and self._has_slots:
            self._keep_holes()
        n_slots, gaps = _unused_slots(entries)
        free = np.flatnonzero(entries == layout.BLOCK_FREE)[: len(gaps)]
        entries[free] = gaps
        for slot in gaps.tolist():
            self._write_zeros(self._data_offset + slot * options.block_nbytes)
        n_entries = max(options.n_blocks, int(free.max(initial=-1)) + 1)
        self._file.pwrite(layout.MAP_OFFSET, entries[:n_entries])
        final = options._replace(data_offset=self._data_offset, n_blocks=n_entries)
        size = final.file_nbytes(n_slots)
        self._file.truncate(size if self._is_cut else max(size, self._old_nbytes))
        self._file.pwrite(0, final.header(n_slots))

    def _keep_holes(self) -> None:
        """Give blocks of a flat disk that are holes of its file their places there."""
        first = self._data_offset // self._options.block_nbytes
        own = self._map[first : self._kept_blocks]
        is_hole = own == layout.BLOCK_FREE
        own[is_hole] = np.flatnonzero(is_hole)

    def _write_zeros(self, start: int) -> None:
        """Overwrite what a slot has of the old file; after it, there are zeros."""
        end = min(start + self._options.block_nbytes, self._old_nbytes)
        for offset in range(start, end, MIB):
            self._file.pwrite(offset, bytes(min(MIB, end - offset)))


def _rule(options: WriteOptions, survey: Survey) -> BlockRule:
    nbytes = options.block_nbytes
    map_end = layout.MAP_OFFSET + (options.n_blocks + _MAX_GAPS) * layout.ENTRY_NBYTES
    if survey.is_flat:
        phase, first = 0, align_up(map_end, max(nbytes, layout.DATA_ALIGNMENT))
    else:
        phase = _phase(options, survey)
        first = map_end + (phase - map_end) % nbytes
    return BlockRule(nbytes, alignment=nbytes, phase=phase, first_offset=first)


def _phase(options: WriteOptions, survey: Survey) -> int:
    """Return where most blocks start in the file, modulo the block size.

    QEMU rejects blocks that are not at multiples of 512 bytes.
    """
    rows = survey.rows[(survey.rows["kind"] == Kind.DATA) & (survey.rows["file"] == 0)]
    phase = (rows["host_offset"] - rows["guest_offset"]) % np.uint64(options.block_nbytes)
    is_aligned = phase % SECTOR_NBYTES == 0
    phases, which = np.unique(phase[is_aligned], return_inverse=True)
    if not len(phases):
        return 0
    return int(phases[np.bincount(which, weights=rows["length"][is_aligned]).argmax()])


def _refuse_gaps(gaps_nbytes: int, block_nbytes: int) -> None:
    """Raise UnsupportedFeatureError if too many slots have no data in them."""
    n_gaps = gaps_nbytes // block_nbytes
    allowed = min(_MAX_GAPS, MAX_DROPPED_NBYTES // block_nbytes)
    if n_gaps > allowed:
        raise UnsupportedFeatureError(
            f"{n_gaps} blocks of the file are unused and lie between those of the disk, at most "
            f"{allowed} can be filled in a VDI: imgcore convert writes one without them"
        )


def _refuse_far(data_offset: int) -> None:
    """Raise LimitExceededError if the header cannot state where the first block is."""
    if data_offset > VDI_MAX_DATA_OFFSET:
        raise LimitExceededError(
            f"the first block would be at {data_offset:#x} of the file, in a VDI it is at most at "
            f"{VDI_MAX_DATA_OFFSET:#x}: imgcore convert writes one"
        )


def _unused_slots(entries: NDArray[np.uint32]) -> tuple[int, NDArray[np.int64]]:
    """Return the count of slots, and the numbers of those that no entry names."""
    used = entries[entries < layout.BLOCK_ZERO]
    n_slots = int(used.max(initial=0)) + 1 if len(used) else 0
    assert n_slots - len(used) <= _MAX_GAPS, f"{n_slots} slots for {len(used)} blocks"
    is_used = np.zeros(n_slots, dtype=bool)
    is_used[used] = True
    assert is_used.sum() == len(used), "two blocks in one slot"
    return n_slots, np.flatnonzero(~is_used)
