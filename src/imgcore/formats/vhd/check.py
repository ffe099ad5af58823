"""Checks a VHD: footers, header, BAT, batmap, and overlaps in the file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.errors import LimitExceededError
from imgcore.formats.api import Repair
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.shared.check_report import CheckReport
from imgcore.formats.vhd import layout
from imgcore.formats.vhd.header import are_of_one_change, parent_texts
from imgcore.formats.vhd.tables import read_bat
from imgcore.limits import SECTOR_NBYTES, VHD_MAX_CHECKED_BLOCKS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.vhd.header import FooterPlace, VhdHeader

    Sectors = NDArray[np.int64]

# BAT entries that are read at once.
_PIECE_ENTRIES: Final = 1 << 20


def check_image(file: ByteSource, header: VhdHeader) -> CheckReport:
    """Check an image whose headers have been read.

    Parameters
    ----------
    file : ByteSource
        The caller closes it.
    header : VhdHeader
        As `read_header` returned it.

    Returns
    -------
    CheckReport
        Its unit is the block; a fixed disk has none.

    Raises
    ------
    LimitExceededError
        The disk has more than ``VHD_MAX_CHECKED_BLOCKS`` blocks.
    """
    report = CheckReport()
    _check_footers(report, file, header)
    if header.dynamic is None:
        report.image_end_offset = file.nbytes
        return report
    _check_header(report, file, header)
    _BlockCheck(report, file, header).run()
    return report


def find_repairs(file: ByteSource, header: VhdHeader) -> list[Repair]:
    """Return the repairs: replace a damaged footer, and free leaked space at the end.

    There are none if blocks overlap each other or tables, because a repair could then
    overwrite guest data.
    """
    if header.dynamic is None:
        return []
    report = verify_blocks(file, header)
    if report.corruptions:
        return []
    end, copy = header.end, header.copy
    blocks_end = report.image_end_offset
    repairs: list[Repair] = []
    if end is None or end.problem is not None:
        assert copy is not None  # read_header() has used it
        repairs.append(_footer_repair(end, copy.raw, blocks_end))
    elif copy is None or copy.problem is not None or copy.raw != end.raw:
        problem = "the footer's copy at the start is missing or wrong"
        action = "replace it with the footer at the end"
        repairs.append(Repair(problem, action, writes=((0, end.raw),)))
    stride = header.bitmap_nbytes + header.dynamic.block_nbytes
    if end is not None and end.offset - blocks_end >= stride:
        raw = copy.raw if end.problem is not None and copy is not None else end.raw
        repairs.append(
            Repair(
                f"{(end.offset - blocks_end) // stride} blocks after the last one are leaked",
                "end the file after the last one",
                file_nbytes=blocks_end + layout.FOOTER_NBYTES,
                writes=((blocks_end, raw),),
                is_leak=True,
            )
        )
    return repairs


def find_obstacles(file: ByteSource, header: VhdHeader, *, leaks_only: bool) -> list[str]:
    """Return why problems are not among the repairs, a line for each kind."""
    if header.dynamic is None:
        return ["a fixed disk has one footer only, and no copy to restore it from"]
    headers, blocks = CheckReport(), verify_blocks(file, header)
    if blocks.corruptions:
        return [
            (
                "blocks overlap or end outside the file, or the batmap is wrong: a repair could "
                "overwrite guest data"
            )
        ]
    obstacles = []
    _check_header(headers, file, header)
    if headers.corruptions:
        obstacles.append("the dynamic disk header and names of parents have no copy")
    if not header.footer.features & layout.FEATURE_RESERVED:
        obstacles.append("the footer's reserved feature bit: the copy does not have it either")
    repairs = find_repairs(file, header)
    if leaks_only and any(not item.is_leak for item in repairs):
        obstacles.append("the footer or its copy: -r all repairs this, -r leaks does not")
    if blocks.leaks and not any(item.is_leak for item in repairs):
        obstacles.append(
            "leaked blocks between others cannot be cut off; imgcore convert writes an image "
            "without them"
        )
    return obstacles


def _footer_repair(end: FooterPlace | None, raw: bytes, blocks_end: int) -> Repair:
    """Return the repair of a footer: where it is, or directly after the last block."""
    action = "replace it with its copy at the start"
    if end is not None:
        writes = ((end.offset, raw[: end.nbytes]),)
        return Repair(f"the footer at {end.offset:#x} is damaged", action, writes=writes)
    return Repair(
        "there is no footer at the end",
        f"write its copy at the start to {blocks_end:#x} and end the file after it",
        file_nbytes=blocks_end + layout.FOOTER_NBYTES,
        writes=((blocks_end, raw),),
    )


def _check_footers(report: CheckReport, file: ByteSource, header: VhdHeader) -> None:
    for place, where in ((header.end, "end"), (header.copy, "start")):
        if place is not None and place.problem is not None:
            report.corruption(place.problem.reason)
        elif place is None and not (where == "start" and header.dynamic is None):
            report.corruption(f"there is no footer at the {where} of the file")
    sound = [
        place.raw
        for place in (header.end, header.copy)
        if place is not None and place.problem is None
    ]
    if len(set(sound)) > 1 and not are_of_one_change(*sound):
        report.corruption("the footer and its copy at the start differ")
    if header.dynamic is None and header.footer.data_offset != layout.NO_OFFSET:
        report.corruption(
            f"a fixed disk's footer states the data offset {header.footer.data_offset:#x}, "
            f"expected {layout.NO_OFFSET:#x}"
        )
    if not header.footer.features & layout.FEATURE_RESERVED:
        report.corruption("the footer's reserved feature bit is not set")


def _check_header(report: CheckReport, file: ByteSource, header: VhdHeader) -> None:
    dynamic = header.dynamic
    assert dynamic is not None
    if dynamic.data_offset != layout.NO_OFFSET:
        report.corruption(
            f"the dynamic disk header states the data offset {dynamic.data_offset:#x}, expected "
            f"{layout.NO_OFFSET:#x}"
        )
    if dynamic.table_offset % SECTOR_NBYTES:
        report.corruption(
            f"the BAT at {dynamic.table_offset:#x} is not aligned to {SECTOR_NBYTES} bytes"
        )
    for problem in parent_texts(file, header)[1]:
        report.corruption(problem.reason)


def verify_blocks(file: ByteSource, header: VhdHeader) -> CheckReport:
    """Check the BAT and the batmap of an image, but not its headers."""
    report = CheckReport()
    _BlockCheck(report, file, header).run()
    return report


def metadata(file: ByteSource, header: VhdHeader) -> list[tuple[int, int, str]]:
    """Return (start, end, name) of everything except blocks; bytes."""
    parts = header.structures
    parts += [
        (entry.data_offset, entry.data_offset + entry.data_nbytes, "a parent locator")
        for entry in header.locators
        if entry.data_nbytes
    ]
    batmap = find_batmap(file, header)
    if batmap is not None:
        offset, nbytes, _ = batmap
        place = batmap_header_offset(header)
        parts.append((place, place + SECTOR_NBYTES, "the batmap's header"))
        parts.append((offset, offset + nbytes, "the batmap"))
    return parts


def find_batmap(file: ByteSource, header: VhdHeader) -> tuple[int, int, int] | None:
    """Return (offset, bytes, checksum) of XenServer's batmap, or None."""
    offset = batmap_header_offset(header)
    if not header.footer.creator.startswith(b"tap"):
        return None
    if offset + layout.BATMAP.size > file.nbytes:
        return None
    cookie, place, n_sectors, _, checksum = layout.BATMAP.unpack(
        file.pread(offset, layout.BATMAP.size)
    )
    if cookie != layout.BATMAP_COOKIE:
        return None
    return place, n_sectors * SECTOR_NBYTES, checksum


def batmap_header_offset(header: VhdHeader) -> int:
    """Return where XenServer expects the header of the batmap: after the BAT."""
    assert header.dynamic is not None
    table_nbytes = header.dynamic.max_table_entries * layout.ENTRY_NBYTES
    return header.dynamic.table_offset + align_up(table_nbytes, SECTOR_NBYTES)


class _BlockCheck:
    def __init__(self, report: CheckReport, file: ByteSource, header: VhdHeader) -> None:
        assert header.dynamic is not None
        self._report = report
        self._file = file
        self._header = header
        self._dynamic = header.dynamic
        self._n_blocks = header.n_blocks
        self._block_nsectors = (header.bitmap_nbytes + header.dynamic.block_nbytes) // SECTOR_NBYTES
        end = header.blocks_end if header.blocks_end is not None else file.nbytes
        self._end_nsectors = end // SECTOR_NBYTES
        if self._n_blocks > VHD_MAX_CHECKED_BLOCKS:
            raise LimitExceededError(
                f"a disk of {self._n_blocks} blocks, at most {VHD_MAX_CHECKED_BLOCKS} "
                "can be checked",
                path=file.path,
            )

    def run(self) -> None:
        sectors = self._read_entries()
        present = np.flatnonzero(sectors != layout.ENTRY_ABSENT)
        self._report.total_clusters = self._n_blocks
        self._report.allocated_clusters = len(present)
        where = sectors[present]
        self._report.fragmented_clusters = self._n_fragmented(where, present)
        past = where + self._block_nsectors > self._end_nsectors
        self._report.corruptions_among(
            int(np.count_nonzero(past)),
            (
                f"block {block} at sector {sector} ends past the end of the blocks "
                f"({self._end_nsectors})"
                for block, sector in zip(_first(present[past]), _first(where[past]), strict=True)
            ),
        )
        self._check_batmap(sectors)
        # There may be millions of blocks, so free what is no longer needed.
        del sectors
        where, present = where[~past], present[~past]
        order = np.argsort(where, kind="stable")
        where, present = where[order], present[order]
        del order
        self._check_claims(where, present)

    def _n_fragmented(self, where: Sectors, present: Sectors) -> int:
        gaps = np.diff(where)
        apart = (gaps < self._block_nsectors) | (gaps >= 2 * self._block_nsectors)
        apart |= np.diff(present) != 1
        return int(np.count_nonzero(apart))

    def _read_entries(self) -> Sectors:
        """Return the sector of every block, int64."""
        sectors = np.empty(self._n_blocks, dtype=np.int64)
        for first in range(0, self._n_blocks, _PIECE_ENTRIES):
            last = min(first + _PIECE_ENTRIES, self._n_blocks)
            raw = read_bat(self._file, self._dynamic.table_offset, first, last)
            sectors[first:last] = raw.view(">u4")
        return sectors

    def _check_batmap(self, sectors: Sectors) -> None:
        batmap = find_batmap(self._file, self._header)
        if batmap is None:
            return
        offset, nbytes, checksum = batmap
        if offset + nbytes > self._file.nbytes or nbytes * 8 < self._n_blocks:
            self._report.corruption(f"the batmap of {nbytes} bytes at {offset:#x} is incomplete")
            return
        used_nbytes = -(-self._n_blocks // 8)
        raw = self._file.pread(offset, used_nbytes)
        padding = max(0, min(nbytes - used_nbytes, SECTOR_NBYTES))
        found = ~(sum(raw) + sum(self._file.pread(offset + used_nbytes, padding))) & 0xFFFFFFFF
        if found != checksum:
            self._report.corruption(
                f"the batmap states the checksum {checksum:#010x}, its bytes have {found:#010x}"
            )
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), count=self._n_blocks)
        wrong = np.flatnonzero((bits != 0) & (sectors == layout.ENTRY_ABSENT))
        self._report.corruptions_among(
            len(wrong),
            (
                f"the batmap marks block {block} as full, but it is absent"
                for block in _first(wrong)
            ),
        )

    def _check_claims(self, starts: Sectors, numbers: Sectors) -> None:
        """Report overlaps, and count leaked blocks.

        ``starts`` are the sectors where blocks start, in ascending order; ``numbers``
        are the numbers of these blocks.
        """
        ends = starts + self._block_nsectors

        def block(index: int) -> str:
            return f"block {numbers[index]} at sector {starts[index]}"

        overlaps = np.flatnonzero(starts[1:] < ends[:-1])
        self._report.corruptions_among(
            len(overlaps),
            (f"{block(i + 1)} overlaps block {numbers[i]}" for i in _first(overlaps)),
        )
        data_start = 0
        for first, end, what in metadata(self._file, self._header):
            low = int(np.searchsorted(ends, first // SECTOR_NBYTES, side="right"))
            high = int(np.searchsorted(starts, -(-end // SECTOR_NBYTES), side="left"))
            self._report.corruptions_among(
                max(0, high - low),
                (f"{block(i)} overlaps {what}" for i in range(low, high)),
            )
            data_start = max(data_start, -(-end // SECTOR_NBYTES))
        end_nsectors = int(ends[-1]) if len(ends) else data_start
        if self._file.is_block_device:
            # The rest of the device is free, not leaked.
            self._end_nsectors = end_nsectors
        np.maximum(ends, data_start, out=ends)
        free_from = np.concatenate(([data_start], ends))
        counts = np.concatenate((starts, [self._end_nsectors]))
        counts -= free_from
        np.maximum(counts, 0, out=counts)
        counts //= self._block_nsectors
        leaks = np.flatnonzero(counts)
        shown = _first(leaks)
        for i in shown:
            self._report.leak(f"{counts[i]} blocks from sector {free_from[i]} on", int(counts[i]))
        self._report.leaks += int(counts[leaks[len(shown) :]].sum())
        self._report.image_end_offset = max(end_nsectors, data_start) * SECTOR_NBYTES


def _first(numbers: Sectors) -> list[int]:
    """Return the numbers that can have a line in the report."""
    first: list[int] = numbers[: CheckReport.MAX_PROBLEM_LINES].tolist()
    return first
