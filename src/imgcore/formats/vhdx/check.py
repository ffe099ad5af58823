"""Checks a VHDX: every copy of every structure, and the places of all blocks.

The file is examined in windows of 8 TiB, each with one pass over the BAT, so that
memory does not grow with the file.  Space is counted in units of 1 MiB, as in the BAT.

Source: [MS-VHDX] 2.2 to 2.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from imgcore import limits
from imgcore.errors import LimitExceededError
from imgcore.formats.api import Repair
from imgcore.formats.shared.check_report import CheckReport
from imgcore.formats.vhdx import layout
from imgcore.formats.vhdx.parent import NIL
from imgcore.formats.vhdx.tables import (
    RESERVED_STATE,
    bitmap_index,
    entry_problem,
    read_payload,
    read_raw,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.formats.vhdx.header import VhdxImage
    from imgcore.formats.vhdx.tables import Entries

# Two arrays of 4 bytes for each unit of a window: 64 MiB.
WINDOW_UNITS: Final = 1 << 23
_UNIT_BITS: Final = layout.ALIGNMENT.bit_length() - 1
_PIECE_ENTRIES: Final = 1 << 17
_STATE: Final = np.uint64(layout.BAT_STATE_MASK)
# Units that QEMU leaves free between the tables of a new image and its first block.
_SPARE_UNITS: Final = 4
# States in which the place in the entry, if any, belongs to the block (2.5.1, 2.5.1.1).
_PLACED_STATES: Final = (
    layout.BLOCK_UNDEFINED,
    layout.BLOCK_UNMAPPED,
    RESERVED_STATE,
    layout.BLOCK_UNMAPPED_V095,
    layout.BLOCK_FULLY_PRESENT,
    layout.BLOCK_PARTIALLY_PRESENT,
)
# States in which the place has no meaning; QEMU wrote one until 2.3, so it stays
# reserved.
_KEEPING_STATES: Final = (layout.BLOCK_ZERO,)


class _Blocks(NamedTuple):
    """Payload blocks of one piece of the BAT; starts and ends in units of 1 MiB."""

    numbers: NDArray[np.int64]
    first_units: NDArray[np.int64]
    end_units: NDArray[np.int64]


def find_repairs(image: VhdxImage) -> list[Repair]:
    """Return the repairs: replace a damaged copy, and free leaked space at the end.

    There are none while a log must be replayed, or if blocks overlap each other or
    tables, because a repair could then overwrite guest data.
    """
    checker = VhdxChecker(image)
    report = checker.run()
    if image.replayed is not None or report.corruptions > len(image.problems):
        return []
    repairs = [
        Repair(
            problem.line,
            "replace it with the other copy",
            writes=((problem.offset, problem.sound),),
        )
        for problem in image.problems
        if problem.sound is not None
    ]
    if report.leaks:
        repairs.append(
            Repair(
                f"{report.leaks} MiB after the last block are leaked",
                "end the file after the last block",
                file_nbytes=checker.needed_nbytes,
                is_leak=True,
            )
        )
    return repairs


def find_obstacles(image: VhdxImage, *, leaks_only: bool) -> list[str]:
    """Return why problems are not among the repairs, a line for each kind."""
    report = VhdxChecker(image).run()
    obstacles = []
    if image.replayed is not None:
        obstacles.append(
            "the log must be replayed first, by the program that wrote it; imgcore convert writes "
            "an image with an empty log"
        )
    if report.corruptions > len(image.problems):
        obstacles.append(
            "blocks overlap, lie outside the file or have invalid entries: a repair could "
            "overwrite guest data"
        )
    if obstacles:
        return obstacles
    if any(problem.sound is None for problem in image.problems):
        obstacles.append("copies that differ, though each is valid: which is right is not known")
    elif leaks_only and image.problems:
        obstacles.append("damaged copies of headers: -r all repairs this, -r leaks does not")
    return obstacles


class VhdxChecker:
    """A check of one image.

    Attributes
    ----------
    report : CheckReport
    needed_nbytes : int
        Smallest size of the file, in bytes; set by `run`.
    free_runs : list of (int, int)
        Host offsets of the first runs that nothing uses, start and end; set by `run`.
    """

    def __init__(self, image: VhdxImage) -> None:
        self._image = image
        self._metadata = image.metadata
        self._n_units = -(-image.view.nbytes >> _UNIT_BITS)
        self._block_units = image.metadata.block_nbytes >> _UNIT_BITS
        self.report: CheckReport = CheckReport(total_clusters=image.metadata.n_blocks)
        self.needed_nbytes: int = 0
        self.free_runs: list[tuple[int, int]] = []

    def run(self) -> CheckReport:
        """Check everything."""
        image, report = self._image, self.report
        if image.view.nbytes > limits.VHDX_MAX_FILE_NBYTES:
            raise LimitExceededError(
                f"the file has {image.view.nbytes} bytes, at most {limits.VHDX_MAX_FILE_NBYTES} "
                "can be checked",
                path=image.file.path,
            )
        for problem in image.problems:
            report.corruption(problem.line)
        if image.replayed is not None:
            report.problems.append(
                f"the log has {image.replayed.n_entries} entries to replay: the other problems "
                "are those of the file after that"
            )
        for entries, first in self._payload():
            self._check_entries(entries, first)
        bitmaps = self._bitmap_blocks()
        last_used = 0
        for base in range(0, self._n_units, WINDOW_UNITS):
            last_used = max(last_used, self._check_window(base, bitmaps))
        report.image_end_offset = last_used << _UNIT_BITS
        self._check_end(last_used)
        return report

    def _payload(self) -> Iterator[tuple[Entries, int]]:
        n_blocks = self._metadata.n_blocks
        for first in range(0, n_blocks, _PIECE_ENTRIES):
            entries = read_payload(self._image, first, min(first + _PIECE_ENTRIES, n_blocks))
            if entries.any():
                yield entries, first

    # --------------------------------------------------------------------- entries

    def _check_entries(self, entries: Entries, first: int) -> None:
        """Report each entry that is invalid, and count blocks."""
        state = entries & _STATE
        present = state >= np.uint64(layout.BLOCK_FULLY_PRESENT)
        ends = self._ends(entries, first)
        bad = present & (
            (entries < np.uint64(layout.HEADER_SECTION_NBYTES))
            | ((entries & np.uint64(layout.BAT_RESERVED_MASK)) != 0)
            | (ends > np.uint64(self._image.view.nbytes))
        )
        bad |= state == np.uint64(RESERVED_STATE)
        if not self._metadata.has_parent:
            bad |= state == layout.BLOCK_PARTIALLY_PRESENT
        self.report.corruptions_among(
            int(bad.sum()),
            (
                f"block {first + index} (BAT entry {entry:#x}) "
                f"{entry_problem(self._image, entry, first + index)}"
                for index, entry in zip(
                    np.flatnonzero(bad).tolist(), entries[bad].tolist(), strict=True
                )
            ),
        )
        self.report.allocated_clusters += int(present.sum())

    def _ends(self, entries: Entries, first: int) -> NDArray[np.uint64]:
        """Return the host offsets where the disk's part of each block ends."""
        metadata = self._metadata
        places = entries & np.uint64(layout.BAT_OFFSET_MASK)
        # Places are up to 2^64 - 2^20: without a limit, the sum could exceed 64 bits.
        room = np.uint64((1 << 64) - 1 - metadata.block_nbytes)
        ends: NDArray[np.uint64] = np.minimum(places, room) + np.uint64(metadata.block_nbytes)
        last = metadata.n_blocks - 1
        if first <= last < first + len(entries):
            unused = np.uint64(metadata.n_blocks * metadata.block_nbytes - metadata.virtual_size)
            ends[last - first] -= unused
        return ends

    def _bitmap_blocks(self) -> dict[int, int]:
        """Return the units of sector bitmap blocks by chunk; report invalid entries."""
        metadata, ratio = self._metadata, self._metadata.chunk_ratio
        n_chunks = -(-metadata.n_blocks // ratio)
        if not metadata.has_parent:
            n_chunks = max(metadata.n_blocks - 1, 0) // ratio
        units = {}
        for chunk in range(n_chunks):
            index = bitmap_index(chunk * ratio, ratio)
            entry = int(read_raw(self._image, index, index + 1)[0])
            state, offset = entry & layout.BAT_STATE_MASK, entry & layout.BAT_OFFSET_MASK
            if state == layout.BITMAP_NOT_PRESENT:
                continue
            what = f"sector bitmap block {chunk} (BAT entry {entry:#x})"
            if state != layout.BITMAP_PRESENT or entry & layout.BAT_RESERVED_MASK:
                self.report.corruption(f"{what} has a state or bits that are reserved")
            elif not metadata.has_parent:
                self.report.corruption(f"{what} is present, but the disk has no parent")
            elif not layout.HEADER_SECTION_NBYTES <= offset < self._image.view.nbytes:
                self.report.corruption(
                    f"{what} lies at {offset:#x}, outside the file ({self._image.view.nbytes:#x})"
                )
            else:
                units[chunk] = offset >> _UNIT_BITS
        self._check_bitmaps_exist(units)
        return units

    def _check_bitmaps_exist(self, units: dict[int, int]) -> None:
        ratio = self._metadata.chunk_ratio
        missing: set[int] = set()
        if not self._metadata.has_parent:
            return
        for entries, first in self._payload():
            partial = np.flatnonzero((entries & _STATE) == layout.BLOCK_PARTIALLY_PRESENT)
            missing.update(np.unique((partial + first) // ratio).tolist())
        for chunk in sorted(missing - units.keys()):
            self.report.corruption(
                f"chunk {chunk} has partially present blocks, but no sector bitmap block"
            )

    # ----------------------------------------------------------------------- space

    def _check_window(self, base: int, bitmaps: dict[int, int]) -> int:
        """Report overlaps in the window at ``base``; return where used units end."""
        n = min(WINDOW_UNITS, self._n_units - base)
        changes = np.zeros(n + 1, dtype=np.int32)
        kept = np.zeros(n + 1, dtype=np.int32)
        for first, end in self._structures():
            _count(changes, np.array([first - base]), np.array([end - base]))
        for unit in bitmaps.values():
            _count(changes, np.array([unit - base]), np.array([unit + 1 - base]))
        for entries, first_block in self._payload():
            for counters, states in ((changes, _PLACED_STATES), (kept, _KEEPING_STATES)):
                _, first_units, end_units = self._placed(entries, first_block, states)
                _count(counters, first_units - base, end_units - base)
        counts = np.cumsum(changes[:-1], dtype=np.int32)
        self._report_overlaps(counts, base, bitmaps)
        used = counts > 0
        used |= np.cumsum(kept[:-1], dtype=np.int32) > 0
        self._note_free(used, base)
        in_use = np.flatnonzero(used)
        return base + int(in_use[-1]) + 1 if in_use.size else 0

    def _note_free(self, used: NDArray[np.bool_], base: int) -> None:
        room = limits.VHDX_MAX_FREE_RUNS - len(self.free_runs)
        edges = np.flatnonzero(np.diff(np.concatenate(([True], used, [True]))))
        places = ((edges[: 2 * room].astype(np.int64) + base) << _UNIT_BITS).tolist()
        self.free_runs += zip(places[::2], places[1::2], strict=True)

    def _check_end(self, last_used: int) -> None:
        """Report unused space at the end of the file.

        Free space between structures is allowed (2.1): it is used for the next blocks.
        A fixed disk's file must have room for the blocks that have no place yet
        (2.6.2.1).
        """
        needed, n_placed = last_used, self.report.allocated_clusters
        if self._metadata.leave_block_allocated and not self._metadata.has_parent:
            needed += (self._metadata.n_blocks - n_placed) * self._block_units
        self.needed_nbytes = needed << _UNIT_BITS
        unused = self._n_units - needed
        if self._image.file.is_block_device:
            return
        # Alignment may leave less than a block unused.
        if unused >= self._block_units and (n_placed or unused > _SPARE_UNITS):
            self.report.leak(
                f"space: nothing refers to {self.needed_nbytes:#x} up to "
                f"{self._n_units << _UNIT_BITS:#x}",
                unused,
            )

    def _structures(self) -> Iterator[tuple[int, int]]:
        yield 0, layout.HEADER_SECTION_NBYTES >> _UNIT_BITS
        header = self._image.header
        if header.log_guid != NIL or header.log_offset >= layout.HEADER_SECTION_NBYTES:
            end = header.log_offset + header.log_nbytes
            yield header.log_offset >> _UNIT_BITS, end >> _UNIT_BITS
        for region in self._image.regions:
            yield region.offset >> _UNIT_BITS, region.end >> _UNIT_BITS

    def _placed(self, entries: Entries, first: int, states: tuple[int, ...]) -> _Blocks:
        """Return the blocks in these states that have a place after the headers."""
        has_place = np.isin(entries & _STATE, np.array(states, dtype=np.uint64))
        has_place &= entries >= np.uint64(layout.HEADER_SECTION_NBYTES)
        numbers = np.flatnonzero(has_place)
        units = (entries[numbers] >> np.uint64(_UNIT_BITS)).astype(np.int64)
        return _Blocks(numbers + first, units, units + self._block_units)

    def _report_overlaps(
        self, counts: NDArray[np.int32], base: int, bitmaps: dict[int, int]
    ) -> None:
        """Report each block that overlaps another block or structure."""
        if not (counts > 1).any():
            return
        for chunk, unit in bitmaps.items():
            if base <= unit < base + len(counts) and counts[unit - base] > 1:
                self.report.corruption(
                    f"sector bitmap block {chunk} at {unit << _UNIT_BITS:#x} overlaps another "
                    "block or structure"
                )
        n_doubled = np.concatenate(([0], np.cumsum(counts > 1)))
        for entries, first_block in self._payload():
            numbers, first, end = self._placed(entries, first_block, _PLACED_STATES)
            low = np.clip(first - base, 0, len(counts))
            high = np.clip(end - base, 0, len(counts))
            overlaps = n_doubled[high] > n_doubled[low]
            self.report.corruptions_among(
                int(overlaps.sum()),
                (
                    f"block {number} at {unit << _UNIT_BITS:#x} overlaps another block or structure"
                    for number, unit in zip(
                        numbers[overlaps].tolist(), first[overlaps].tolist(), strict=True
                    )
                ),
            )


def _count(changes: NDArray[np.int32], first: NDArray[np.int64], end: NDArray[np.int64]) -> None:
    """Count, at their starts and ends, the parts of ranges that are in the window."""
    n = len(changes) - 1
    low, high = np.clip(first, 0, n), np.clip(end, 0, n)
    np.add.at(changes, low, 1)
    np.add.at(changes, high, -1)
