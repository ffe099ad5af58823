"""Checks a VDI: its block map against itself, the header and the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.errors import LimitExceededError
from imgcore.formats.api import Repair
from imgcore.formats.shared.check_report import CheckReport
from imgcore.formats.shared.leaked_space import LeakedSpace
from imgcore.formats.vdi import layout
from imgcore.formats.vdi.tables import read_map
from imgcore.limits import VDI_MAX_CHECKED_BLOCKS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.vdi.header import VdiHeader

# Blocks of the file that one pass over the map examines, with a byte for each.
_WINDOW_BLOCKS: Final = 1 << 26


def check(file: ByteSource, header: VdiHeader) -> CheckReport:
    """Verify the block map; see `imgcore.formats.api.Reader.check`.

    It finds entries past the end of the file, blocks that are used twice, a wrong count
    of allocated blocks in the header, and leaked blocks.  A count that is too high is
    harmless: it leaks blocks.

    Raises
    ------
    LimitExceededError
        The disk has more than ``VDI_MAX_CHECKED_BLOCKS`` blocks.
    """
    if header.n_blocks > VDI_MAX_CHECKED_BLOCKS:
        raise LimitExceededError(
            f"a block map of {header.n_blocks} entries, at most {VDI_MAX_CHECKED_BLOCKS} "
            "can be checked",
            path=file.path,
        )
    report = CheckReport(total_clusters=header.n_blocks)
    n_file_blocks = max(file.nbytes - header.data_offset, 0) // header.block_nbytes
    end = _verify_entries(file, header, report, n_file_blocks)
    for first in range(0, end, _WINDOW_BLOCKS):
        _verify_window(file, header, report, first, min(first + _WINDOW_BLOCKS, end))
    report.image_end_offset = _offset(header, end)
    if n_after := _n_leaked_after(file, header, report.image_end_offset):
        _leak(header, report, end, n_after)
    _verify_count(header, report, end, end + n_after)
    return report


def _verify_count(header: VdiHeader, report: CheckReport, end: int, file_end: int) -> None:
    """Report a wrong count of allocated blocks; ``file_end`` is that of all leaks."""
    n_used = report.allocated_clusters
    line = f"the header counts {header.n_allocated} allocated blocks, the block map has {n_used}"
    n_leaked = header.n_allocated - max(file_end, n_used)
    if _is_count_harmful(header, n_used, end) or (
        header.n_allocated != n_used and report.corruptions
    ):
        report.corruption(line)
    elif n_leaked > 0:
        report.leak(f"blocks, {n_leaked}: {line}", n_leaked)


def _is_count_harmful(header: VdiHeader, n_used: int, end: int) -> bool:
    """Tell whether VirtualBox would put a new block where another one may be.

    Others count all blocks up to the last one in use, or more: so a program does that
    was interrupted while it wrote to the image.
    """
    return header.n_allocated < n_used or n_used < header.n_allocated < end


def find_repairs(file: ByteSource, header: VdiHeader) -> list[Repair]:
    """Return the repairs: free leaked space at the end, correct the block count.

    VirtualBox derives the place of the next block from the count in the header.  So the
    count is corrected only if there are no gaps between the blocks in use.  There are
    no repairs if blocks overlap each other or lie outside the file.
    """
    report = check(file, header)
    n_in_use = (report.image_end_offset - header.data_offset) // header.block_nbytes
    has_wrong_count = report.allocated_clusters != header.n_allocated
    is_harmful = _is_count_harmful(header, report.allocated_clusters, n_in_use)
    if report.corruptions > is_harmful:
        return []
    repairs = []
    unused = _n_leaked_after(file, header, report.image_end_offset)
    if unused:
        repairs.append(
            Repair(
                f"{unused} blocks after the last one are leaked",
                "end the file after the last one",
                file_nbytes=report.image_end_offset,
                is_leak=True,
            )
        )
    if has_wrong_count and report.allocated_clusters == n_in_use:
        repairs.append(
            Repair(
                f"the header counts {header.n_allocated} allocated blocks",
                f"change the count to {n_in_use}",
                writes=((layout.N_ALLOCATED_OFFSET, layout.COUNT.pack(n_in_use)),),
                is_leak=not is_harmful,
            )
        )
    return repairs


def find_obstacles(file: ByteSource, header: VdiHeader, *, leaks_only: bool) -> list[str]:
    """Return why problems are not among the repairs, a line for each kind."""
    report = check(file, header)
    n_in_use = (report.image_end_offset - header.data_offset) // header.block_nbytes
    is_harmful = _is_count_harmful(header, report.allocated_clusters, n_in_use)
    if report.corruptions > is_harmful:
        return [
            (
                "blocks overlap or end past the end of the file: their data is lost already, and a "
                "repair could overwrite more"
            )
        ]
    obstacles = []
    if is_harmful and report.allocated_clusters != n_in_use:
        obstacles.append(
            "the count of blocks: VirtualBox derives from it where the next block goes, and would "
            "overwrite one in use, because there are leaked blocks between them; imgcore convert "
            "writes an image without these"
        )
    elif is_harmful and leaks_only:
        obstacles.append("the count of blocks: -r all repairs this, -r leaks does not")
    if report.leaks:
        obstacles.append(
            "leaked blocks between others cannot be cut off; imgcore convert writes an image "
            "without them"
        )
    return obstacles


def _verify_entries(
    file: ByteSource, header: VdiHeader, report: CheckReport, n_file_blocks: int
) -> int:
    """Count entries and report those outside the file; return the end of the others."""
    previous, end = -1, 0
    for first, entries in read_map(file, header, 0, header.n_blocks):
        used = np.flatnonzero(entries < layout.BLOCK_ZERO)
        if not used.size:
            continue
        places = entries[used].astype(np.int64)
        report.allocated_clusters += used.size
        report.fragmented_clusters += int((np.diff(places, prepend=previous) != 1).sum())
        previous = int(places[-1])
        inside = places < n_file_blocks
        if inside.any():
            end = max(end, int(places[inside].max()) + 1)
        outside = zip(used[~inside].tolist(), places[~inside].tolist(), strict=True)
        report.corruptions_among(
            int((~inside).sum()),
            (
                f"block {first + index} is at {_offset(header, place):#x} and ends past the end of "
                f"the file ({file.nbytes:#x})"
                for index, place in outside
            ),
        )
    return end


def _verify_window(
    file: ByteSource, header: VdiHeader, report: CheckReport, low: int, high: int
) -> None:
    """Report blocks [low, high) of the file that are used twice or not at all."""
    is_used = np.zeros(high - low, dtype=bool)
    for first, entries in read_map(file, header, 0, header.n_blocks):
        here = np.flatnonzero((entries >= low) & (entries < high))
        places = entries[here].astype(np.int64) - low
        repeated = here[_repeated(places, is_used)]
        report.corruptions_among(
            len(repeated),
            (
                f"block {first + index} is at {_offset(header, int(entries[index])):#x}, "
                "where another block is"
                for index in repeated.tolist()
            ),
        )
        is_used[places] = True
    edges = np.flatnonzero(np.diff(is_used, prepend=True, append=True))
    for start, stop in edges.reshape(-1, 2).tolist():
        _leak(header, report, low + start, stop - start)


def _repeated(places: NDArray[np.int64], is_used: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the indices of places that are in use, or occur earlier in the array."""
    is_new = np.zeros(len(places), dtype=bool)
    is_new[np.unique(places, return_index=True)[1]] = True
    return np.flatnonzero(~is_new | is_used[places])


def _offset(header: VdiHeader, block: int) -> int:
    """Return the host offset of a block."""
    return header.data_offset + block * header.block_nbytes


def _leak(header: VdiHeader, report: CheckReport, first: int, count: int) -> None:
    """Report blocks of the file as leaked, in one line."""
    offset = _offset(header, first)
    report.leak(f"blocks at {offset:#x}, {count}: nothing refers to them", count)


def _n_leaked_after(file: ByteSource, header: VdiHeader, end: int) -> int:
    """Return the number of blocks that data after the last used one takes.

    Between blocks, holes count as well: the next new block could overwrite one in use.
    """
    if file.is_block_device:
        return 0
    return LeakedSpace(file, header.block_nbytes).n_units(end, file.nbytes)
