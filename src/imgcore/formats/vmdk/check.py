"""Check the tables of VMDK sparse extents against each other and the file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from imgcore.errors import CorruptImageError
from imgcore.formats.shared.check_report import CheckReport
from imgcore.formats.shared.leaked_space import LeakedSpace
from imgcore.formats.vmdk.layout import (
    ENTRY_ABSENT,
    ENTRY_NBYTES,
    ENTRY_ZEROED,
    GRAIN_MARKER,
    HEADER_NBYTES,
)
from imgcore.formats.vmdk.tables import (
    DIRECTORY_PIECE_ENTRIES,
    absent_or_zeroed,
    drop_unwritten_tables,
    read_directory,
    read_tables,
)
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.formats.vmdk.extent import DiskExtent
    from imgcore.formats.vmdk.header import SparseExtent

    Sectors = NDArray[np.int64]

# Tables that are read at once: 128 Ki entries.
_CHUNK_TABLES: Final = 256
# Regions that are sorted at once: 32 MiB.  The file is checked in windows that hold no
# more regions than this, so that memory does not grow with the file.
_MAX_REGIONS: Final = 1 << 22
# Gaps that a survey keeps; others are not used again.
_MAX_GAPS: Final = 1 << 16
# A region is one number: the first sector in the upper bits, the length in the lower.
_LENGTH_BITS: Final = 32


def check_extents(path: str, extents: Sequence[DiskExtent]) -> CheckReport:
    """Check every sparse extent of a disk.

    Parameters
    ----------
    path : str
        The disk, for messages.
    extents : sequence of DiskExtent
        In guest order.

    Returns
    -------
    CheckReport
        Counts are in grains.  Flat extents have no tables and are not counted.

    Notes
    -----
    Every table is read once for each window of the file that is not empty.  A window is
    128 GiB with grains of 64 KiB, 1 GiB if they are compressed.  Compressed grains take
    one read of 12 bytes each.  Memory: at most 200 MiB.
    """
    report = CheckReport()
    for item in extents:
        if item.sparse is not None:
            _ExtentCheck(report, item.sparse, item.nbytes).run()
    return report


class SpaceSurvey(NamedTuple):
    """The space of a sparse extent's file, in sectors.

    Attributes
    ----------
    first : int
        Where the first structure after the header starts.
    end : int
        From here on nothing is used.
    gaps : list of (int, int)
        The parts [start, stop) before the end that nothing uses, ascending.  They come
        after the metadata at the file's start, and have room for a grain.
    """

    first: int
    end: int
    gaps: list[tuple[int, int]]


def survey_space(extent: SparseExtent, guest_nbytes: int) -> SpaceSurvey:
    """Find the unused space of an extent whose grains are not compressed.

    CorruptImageError if a table or grain is outside the file, or overlaps another.
    """
    survey = _Survey(extent, guest_nbytes)
    survey.run()
    return survey.found()


class _ExtentCheck:
    def __init__(self, report: CheckReport, extent: SparseExtent, guest_nbytes: int) -> None:
        self._report = report
        self._extent = extent
        self._name = extent.file.path
        self._file_nsectors = extent.file.nbytes // SECTOR_NBYTES
        self._grain_nsectors = extent.grain_nbytes // SECTOR_NBYTES
        self._gt_nsectors = -(-extent.gt_nbytes // SECTOR_NBYTES)
        self._guest_nbytes = guest_nbytes
        # The last grain may be stored only up to the end of the disk.
        self._least_nsectors = (
            guest_nbytes % extent.grain_nbytes // SECTOR_NBYTES or self._grain_nsectors
        )
        self._end_nsectors = 0
        self._leaked = LeakedSpace(extent.file, extent.grain_nbytes)

    def run(self) -> None:
        extent = self._extent
        self._report.total_clusters += -(-self._guest_nbytes // extent.grain_nbytes)
        if extent.n_directory_entries == 0 or not self._check_directory(extent.gd_offset):
            return
        if extent.rgd_offset and self._check_directory(extent.rgd_offset):
            self._compare_redundant()
        # A compressed grain takes at least one sector, a plain one a whole grain.
        unit = 1 if extent.is_compressed else self._grain_nsectors
        window_nsectors = _MAX_REGIONS // 2 * unit
        for start in self._window_starts(window_nsectors):
            regions = self._regions(start, start + window_nsectors, count=start == 0)
            self._check_regions(regions)
        if not extent.is_compressed and not extent.file.is_block_device:
            self._count_leak(self._end_nsectors, self._file_nsectors)
        self._report.image_end_offset = max(
            self._report.image_end_offset, self._end_nsectors * SECTOR_NBYTES
        )

    def _window_starts(self, window_nsectors: int) -> list[int]:
        """Return the starts of used windows; a sparse file may have millions unused."""
        used = {0}
        if self._file_nsectors > window_nsectors:
            for sectors in self._places():
                inside = sectors[sectors < self._file_nsectors]
                used.update(np.unique(inside // window_nsectors).tolist())
        return [number * window_nsectors for number in sorted(used)]

    def _places(self) -> Iterator[Sectors]:
        """Yield the first sectors of all structures and grains."""
        yield self._fixed_claims()[0]
        yield from self._table_places()
        for _, sectors in self._entries():
            yield sectors

    def _corruptions(self, count: int, lines: Iterable[str]) -> None:
        self._report.corruptions_among(count, (f"{self._name}: {line}" for line in lines))

    def _directory_pieces(self, gd_offset: int) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        n_entries = self._extent.n_directory_entries
        for first in range(0, n_entries, DIRECTORY_PIECE_ENTRIES):
            count = min(DIRECTORY_PIECE_ENTRIES, n_entries - first)
            yield first, read_directory(self._extent, gd_offset, first, count)

    def _is_outside(self, directory: NDArray[np.uint32]) -> NDArray[np.bool_]:
        absent, _ = absent_or_zeroed(self._extent, directory)
        places = directory.astype(np.int64) * SECTOR_NBYTES
        return ~absent & (places > self._extent.file.nbytes - self._extent.gt_nbytes)

    def _check_directory(self, gd_offset: int) -> bool:
        """Report tables that are outside the file or overlap; False if any overlap."""
        tables = np.empty(self._extent.n_directory_entries, dtype=np.uint32)
        n_tables = 0
        for first, directory in self._directory_pieces(gd_offset):
            outside = self._is_outside(directory)
            bad = np.flatnonzero(outside)
            self._corruptions(
                len(bad),
                (
                    f"grain table {first + i} is at sector {directory[i]}, "
                    f"past the end of the file ({self._file_nsectors})"
                    for i in bad.tolist()
                ),
            )
            absent, _ = absent_or_zeroed(self._extent, directory)
            good = directory[~absent & ~outside]
            tables[n_tables : n_tables + len(good)] = good
            n_tables += len(good)
        tables = tables[:n_tables]
        tables.sort()
        n_overlaps = 0
        for start in range(0, n_tables, DIRECTORY_PIECE_ENTRIES):
            piece = tables[start : start + DIRECTORY_PIECE_ENTRIES + 1]
            overlaps = np.flatnonzero(np.diff(piece) < self._gt_nsectors)
            self._corruptions(
                len(overlaps), (f"two grain tables overlap at sector {piece[i]}" for i in overlaps)
            )
            n_overlaps += len(overlaps)
        return n_overlaps == 0

    def _compare_redundant(self) -> None:
        """Report tables that differ between the two directories.

        Nobody reads the redundant ones while the others are sound.  A writer that was
        interrupted may have left them behind.
        """
        extent = self._extent
        pairs = zip(
            self._directory_pieces(extent.gd_offset),
            self._directory_pieces(extent.rgd_offset),
            strict=True,
        )
        for (first, primary), (_, redundant) in pairs:
            primary = drop_unwritten_tables(extent, primary)
            redundant = drop_unwritten_tables(extent, redundant)
            outside = self._is_outside(primary) | self._is_outside(redundant)
            used = np.flatnonzero(((primary != 0) | (redundant != 0)) & ~outside)
            for start in range(0, len(used), _CHUNK_TABLES):
                chunk = used[start : start + _CHUNK_TABLES]
                shape = (len(chunk), extent.n_gtes_per_gt)
                ours = read_tables(extent, primary[chunk], first).reshape(shape)
                theirs = read_tables(extent, redundant[chunk], first).reshape(shape)
                stale = chunk[(ours != theirs).any(axis=1)]
                self._report.leaks_among(
                    len(stale),
                    (
                        f"{self._name}: redundant grain table {first + i} differs, and is not read"
                        for i in stale.tolist()
                    ),
                )

    def _entries(self) -> Iterator[tuple[Sectors, Sectors]]:
        """Yield (grain numbers, sectors) of all entries that are sectors."""
        extent = self._extent
        n_grains = -(-self._guest_nbytes // extent.grain_nbytes)
        for first, directory in self._directory_pieces(extent.gd_offset):
            directory = drop_unwritten_tables(extent, directory)
            absent, _ = absent_or_zeroed(extent, directory)
            used = np.flatnonzero(~absent & ~self._is_outside(directory))
            for start in range(0, len(used), _CHUNK_TABLES):
                chunk = used[start : start + _CHUNK_TABLES]
                entries = read_tables(extent, directory[chunk], first).astype(np.int64)
                numbers = (chunk[:, None] + first) * extent.n_gtes_per_gt
                grains = (numbers + np.arange(extent.n_gtes_per_gt)).reshape(-1)
                named = (entries != ENTRY_ABSENT) & (grains < n_grains)
                if extent.has_zeroed_grains:
                    named &= entries != ENTRY_ZEROED
                yield grains[named], entries[named]

    def _regions(self, low: int, high: int, *, count: bool) -> NDArray[np.uint64]:
        """Return the regions that start in sectors [low, high), packed and sorted."""
        regions = np.empty(_MAX_REGIONS, dtype=np.uint64) if self._is_large() else None
        parts: list[NDArray[np.uint64]] = []
        n_regions = 0
        for sectors, lengths in self._claims(low, high, count=count):
            packed = (sectors.astype(np.uint64) << np.uint64(_LENGTH_BITS)) | lengths.astype(
                np.uint64
            )
            room = _MAX_REGIONS - n_regions
            if len(packed) > room:
                # More regions than fit in the window must overlap, as sorting shows.
                packed = packed[:room]
            if regions is None:
                parts.append(packed)
            else:
                regions[n_regions : n_regions + len(packed)] = packed
            n_regions += len(packed)
        result = np.concatenate(parts) if regions is None else regions[:n_regions]
        result.sort()
        return result

    def _is_large(self) -> bool:
        """Tell whether one preallocated array needs less memory than parts."""
        return self._file_nsectors > _MAX_REGIONS

    def _claims(self, low: int, high: int, *, count: bool) -> Iterator[tuple[Sectors, Sectors]]:
        sectors, lengths = self._fixed_claims()
        inside = (sectors >= low) & (sectors < high)
        yield sectors[inside], lengths[inside]
        for tables in self._table_places():
            inside = (tables >= low) & (tables < high)
            yield tables[inside], np.full(np.count_nonzero(inside), self._gt_nsectors)
        for grains, sectors in self._entries():
            if count:
                self._count(grains, sectors)
            inside = (sectors >= low) & (sectors < high)
            yield self._grain_claims(grains[inside], sectors[inside])

    def _table_places(self) -> Iterator[Sectors]:
        for gd_offset in (self._extent.gd_offset, self._extent.rgd_offset):
            for _, directory in self._directory_pieces(gd_offset) if gd_offset else ():
                absent, _ = absent_or_zeroed(self._extent, directory)
                yield directory[~absent & ~self._is_outside(directory)].astype(np.int64)

    def _fixed_claims(self) -> tuple[Sectors, Sectors]:
        extent = self._extent
        gd_nbytes = extent.n_directory_entries * ENTRY_NBYTES
        parts = [(0, HEADER_NBYTES), (extent.gd_offset, gd_nbytes)]
        if extent.descriptor_offset and extent.descriptor_nbytes:
            parts.append((extent.descriptor_offset, extent.descriptor_nbytes))
        if extent.rgd_offset:
            parts.append((extent.rgd_offset, gd_nbytes))
        sectors = np.array([offset // SECTOR_NBYTES for offset, _ in parts], dtype=np.int64)
        lengths = np.array([-(-nbytes // SECTOR_NBYTES) for _, nbytes in parts], dtype=np.int64)
        return sectors, lengths

    def _count(self, grains: Sectors, sectors: Sectors) -> None:
        """Count allocated grains and report those outside the file."""
        self._report.allocated_clusters += len(grains)
        if self._extent.is_compressed:
            self._report.compressed_clusters += len(grains)
            # A grain that starts inside the file is reported by its marker.
            least_nbytes = GRAIN_MARKER.size if self._extent.has_markers else 1
            is_outside = sectors * SECTOR_NBYTES + least_nbytes > self._extent.file.nbytes
        else:
            is_outside = sectors > self._file_nsectors - self._plain_lengths(grains)
            apart = (np.diff(sectors) != self._grain_nsectors) | (np.diff(grains) != 1)
            self._report.fragmented_clusters += int(np.count_nonzero(apart))
        bad = np.flatnonzero(is_outside)
        self._corruptions(
            len(bad),
            (
                f"grain {grains[i]} is at sector {sectors[i]}, "
                f"past the end of the file ({self._file_nsectors})"
                for i in bad.tolist()
            ),
        )

    def _plain_lengths(self, grains: Sectors) -> Sectors:
        lengths = np.full(len(grains), self._grain_nsectors, dtype=np.int64)
        last = self._guest_nbytes // self._extent.grain_nbytes
        lengths[grains == last] = self._least_nsectors
        return lengths

    def _grain_claims(self, grains: Sectors, sectors: Sectors) -> tuple[Sectors, Sectors]:
        if not self._extent.is_compressed:
            lengths = self._plain_lengths(grains)
        elif self._extent.has_markers:
            lengths = self._marked_lengths(grains, sectors)
        else:
            lengths = np.ones(len(grains), dtype=np.int64)
        good = (lengths > 0) & (sectors <= self._file_nsectors - lengths)
        return sectors[good], lengths[good]

    def _marked_lengths(self, grains: Sectors, sectors: Sectors) -> Sectors:
        """Return the lengths in the markers; report wrong ones, with length 0."""
        extent = self._extent
        lengths = np.zeros(len(grains), dtype=np.int64)
        rows = zip(grains.tolist(), sectors.tolist(), strict=True)
        for index, (grain, sector) in enumerate(rows):
            offset = sector * SECTOR_NBYTES
            if offset + GRAIN_MARKER.size > extent.file.nbytes:
                continue
            lba, nbytes = GRAIN_MARKER.unpack(extent.file.pread(offset, GRAIN_MARKER.size))
            stored_nbytes = GRAIN_MARKER.size + nbytes
            if lba != grain * self._grain_nsectors:
                self._corruptions(
                    1, [f"the marker at sector {sector} is for LBA {lba}, not for grain {grain}"]
                )
            elif nbytes == 0 or stored_nbytes > extent.compressed_bound:
                self._corruptions(
                    1, [f"the marker at sector {sector} says {nbytes} bytes of compressed data"]
                )
            elif offset + stored_nbytes > extent.file.nbytes:
                self._corruptions(1, [f"grain {grain} ends past the end of the file"])
            else:
                # A file may end after the last grain's bytes, within a sector.
                whole = -(-stored_nbytes // SECTOR_NBYTES)
                lengths[index] = min(whole, max(self._file_nsectors - sector, 0))
        return lengths

    def _check_regions(self, regions: NDArray[np.uint64]) -> None:
        """Report overlaps in sorted regions, and count unclaimed space as leaks."""
        if not len(regions):
            return
        starts = (regions >> np.uint64(_LENGTH_BITS)).astype(np.int64)
        ends = starts + (regions & np.uint64((1 << _LENGTH_BITS) - 1)).astype(np.int64)
        np.maximum.accumulate(ends, out=ends)
        before = np.empty_like(ends)
        before[0] = self._end_nsectors
        np.maximum(ends[:-1], self._end_nsectors, out=before[1:])
        overlaps = np.flatnonzero(starts < before)
        self._corruptions(
            len(overlaps),
            (
                f"the data at sector {starts[i]} overlaps the data before it"
                for i in overlaps.tolist()
            ),
        )
        if not self._extent.is_compressed:
            for i in np.flatnonzero(starts - before >= self._grain_nsectors).tolist():
                self._count_leak(int(before[i]), int(starts[i]))
        self._end_nsectors = max(self._end_nsectors, int(ends[-1]))

    def _count_leak(self, start: int, stop: int) -> None:
        """Count the grains that are leaked between two sectors, after the tables."""
        start = max(start, self._extent.overhead // SECTOR_NBYTES)
        n_grains = self._leaked.n_units(start * SECTOR_NBYTES, stop * SECTOR_NBYTES)
        if n_grains:
            self._report.leak(f"{self._name}: {n_grains} grains from sector {start} on", n_grains)


class _Survey(_ExtentCheck):
    """Finds the gaps between what the check finds to be used."""

    def __init__(self, extent: SparseExtent, guest_nbytes: int) -> None:
        super().__init__(CheckReport(), extent, guest_nbytes)
        self._gaps: list[tuple[int, int]] = []
        self._first = self._file_nsectors

    def found(self) -> SpaceSurvey:
        if self._report.corruptions:
            problem = self._report.first_corruption.removeprefix(f"{self._name}: ")
            raise CorruptImageError(
                f"is not written to, because its tables are damaged: {problem}", path=self._name
            )
        # QEMU refuses a file that ends before the grains that its header announces.
        overhead = min(self._extent.overhead // SECTOR_NBYTES, self._file_nsectors)
        end = max(self._end_nsectors, overhead)
        # The last one may be what follows the end.
        return SpaceSurvey(self._first, end, [gap for gap in self._gaps if gap[1] <= end])

    def _compare_redundant(self) -> None:
        pass

    def _check_regions(self, regions: NDArray[np.uint64]) -> None:
        if not self._end_nsectors and len(regions) > 1:
            self._first = int(regions[1]) >> _LENGTH_BITS
        super()._check_regions(regions)

    def _count_leak(self, start: int, stop: int) -> None:
        start = max(start, self._extent.overhead // SECTOR_NBYTES)
        if start < stop and len(self._gaps) < _MAX_GAPS:
            self._gaps.append((start, stop))
