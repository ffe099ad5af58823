"""Write in place to a sparse extent: grains are added at its file's end.

Source: Virtual Disk Format 5.0, "Hosted Sparse Extents".

A table entry is durable only after its grain.  Both copies of a table change in the
same step: readers use the primary one, and what the other one has after a crash is
sound, too, because a grain that it refers to is used again only later.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, cast

from imgcore.errors import CorruptImageError
from imgcore.files.update_file import Step
from imgcore.formats.api import Place
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.shared.free_space import FreeSpace
from imgcore.formats.shared.ranges import add_range
from imgcore.formats.vmdk.check import survey_space
from imgcore.formats.vmdk.layout import (
    ENTRY_ABSENT,
    ENTRY_NBYTES,
    ENTRY_ZEROED,
    UNCLEAN_OFFSET,
)
from imgcore.formats.vmdk.sparse_structures import too_large
from imgcore.formats.vmdk.table_size import refuse_contradicting_tables
from imgcore.limits import SECTOR_NBYTES, VMDK_MAX_SPARSE_FILE_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.vmdk.check import SpaceSurvey
    from imgcore.formats.vmdk.header import SparseExtent

# Free grains that are known when an image is opened; others are not used again.
_MAX_FREE: Final = 1 << 16
# Tables that are read at once.
_TABLES_AT_ONCE: Final = 64


class SparseUpdater:
    """Changes a sparse extent; guest offsets count from its start.

    Parameters
    ----------
    extent : SparseExtent
        Its grains are not compressed.
    nbytes : int
        How much of it the disk uses.
    has_parent : bool
        Whether what is absent may come from a parent.

    Raises
    ------
    CorruptImageError
        A table or grain is outside the file, or overlaps another one.
    """

    def __init__(self, extent: SparseExtent, nbytes: int, *, has_parent: bool) -> None:
        if extent.gd_offset != extent.header.gd_offset * SECTOR_NBYTES or not extent.gd_offset:
            raise CorruptImageError(
                "is not written to, because its grain directory is not where the header says",
                path=extent.file.path,
                offset=56,
            )
        refuse_contradicting_tables(extent)
        survey = survey_space(extent, nbytes)
        self.extent = extent
        self.nbytes = nbytes
        self.file: UpdateFile = cast("UpdateFile", extent.file)
        self.granule_nbytes: int = extent.grain_nbytes
        self.first_used: int = survey.first * SECTOR_NBYTES
        free = _free_grains(survey, extent.grain_nbytes)
        end = align_up(survey.end * SECTOR_NBYTES, extent.grain_nbytes)
        self.space: FreeSpace = FreeSpace(end, extent.grain_nbytes, free)
        self._gaps = list(_runs(free, extent.grain_nbytes))
        self._has_parent = has_parent
        # Whether a grain can be freed: what it leaves must not be the parent's.
        self._free_entry = (
            (ENTRY_ZEROED if extent.has_zeroed_grains else None) if has_parent else ENTRY_ABSENT
        )
        self.table_nbytes: int = align_up(extent.gt_nbytes, SECTOR_NBYTES)
        # Entries up to this one are no places.
        self._last_mark = ENTRY_ZEROED if extent.has_zeroed_grains else ENTRY_ABSENT
        self.directories: list[int] = [at for at in (extent.gd_offset, extent.rgd_offset) if at]
        # Tables that nothing durable refers to, and room for others.
        self._new_tables: set[int] = set()
        self._room = (0, 0)

    def begin(self, *, again: bool) -> None:
        """Give back leaked space, and mark the extent as not closed cleanly."""
        gaps = [] if again else self._gaps
        leaked = [gap for gap in gaps if self.file.next_data(gap[0])[0] < sum(gap)]
        if leaked:
            # What a process that was killed has written may not be durable yet.
            self.file.note_written()
            self.file.sync()
        for start, length in leaked:
            self.file.punch(start, length)
        self.file.put(UNCLEAN_OFFSET, b"\1", Step.REFERENCE)
        if self.extent.unclean_shutdown:
            self._renew_redundant()

    def _renew_redundant(self) -> None:
        """Make redundant tables equal to the others, as a crash may have left them."""
        per_table, nbytes = self.extent.n_gtes_per_gt, self.extent.gt_nbytes
        n_tables = -(-self.nbytes // self.extent.gt_reach_nbytes)
        for directory in self.directories[1:]:
            for first in range(0, n_tables, _TABLES_AT_ONCE):
                n = min(_TABLES_AT_ONCE, n_tables - first)
                places = self._directory_entries(directory, first, n)
                ours, theirs = (
                    self._raw_entries(first * per_table, n * per_table, at)
                    for at in (self.directories[0], directory)
                )
                for i, place in enumerate(places):
                    part = slice(i * nbytes, (i + 1) * nbytes)
                    if place > self._last_mark and ours[part] != theirs[part]:
                        self.file.put(_place_of(place), ours[part], Step.REFERENCE)

    # -- places ------------------------------------------------------------------------

    def place(self, start: int, length: int) -> list[Place]:
        """Return the grains of a range, or new ones beside their neighbours."""
        nbytes = self.granule_nbytes
        first, last = start // nbytes, -(-(start + length) // nbytes)
        before = max(first - 1, 0)
        entries = self.entries(before, last - before)
        neighbour = entries.pop(0) if before < first else ENTRY_ABSENT
        after = _place_of(neighbour) + nbytes if neighbour > self._last_mark else None
        places: list[Place] = []
        try:
            for grain, entry in enumerate(entries, first):
                place = self._place(grain, entry, after)
                after = place.host_offset + nbytes
                places.append(place)
            self.file.grow(max((p.host_offset + nbytes for p in places if p.is_new), default=0))
        except BaseException:
            self.give_up(places)
            raise
        return _joined(places)

    def _place(self, grain: int, entry: int, after: int | None) -> Place:
        start = grain * self.granule_nbytes
        length = min(self.granule_nbytes, self.nbytes - start)
        if entry > self._last_mark:
            return Place(start, length, _place_of(entry))
        offset = self.take(after)
        is_hidden = entry == ENTRY_ABSENT and self._has_parent
        # After the file's end, all bytes are zeros.
        needs_all = is_hidden or offset < self.file.nbytes
        return Place(start, length, offset, is_new=True, needs_all=needs_all)

    def overwritable(self, start: int, length: int) -> list[Place]:
        """Return the grains that exist; see `imgcore.formats.api.Overwritable`."""
        nbytes = self.granule_nbytes
        first, last = start // nbytes, -(-(start + length) // nbytes)
        return _joined(
            [
                Place(grain * nbytes, min(nbytes, self.nbytes - grain * nbytes), _place_of(entry))
                for grain, entry in enumerate(self.entries(first, last - first), first)
                if entry > self._last_mark
            ]
        )

    def take(self, after: int | None = None) -> int:
        """Return the host offset of space for a grain."""
        offset = self.space.take(after)
        if offset + self.granule_nbytes > VMDK_MAX_SPARSE_FILE_NBYTES:
            self.space.give_back(offset)
            raise too_large(offset, self.file.path)
        return offset

    def refer(self, places: Sequence[Place]) -> None:
        """Make both copies of the tables refer to new grains."""
        for place in places:
            first = place.guest_offset // self.granule_nbytes
            self.put_entries(first, [_entry_of(at) for at in self._grains(place)])

    def give_up(self, places: Iterable[Place]) -> None:
        """Take back the space of new grains."""
        for place in places:
            for offset in self._grains(place) if place.is_new else ():
                self.space.give_back(offset)

    def _grains(self, place: Place) -> range:
        """Return the host offsets of a place's grains."""
        return range(place.host_offset, place.host_offset + place.length, self.granule_nbytes)

    # -- zeros -------------------------------------------------------------------------

    def zero(self, start: int, length: int, *, unmap: bool) -> list[tuple[int, int]]:
        """Free whole grains, or mark them as zeros; see `Updater.zero`."""
        rest: list[tuple[int, int]] = []
        for first, entries in self._tables_of(start, length):
            changed = list(entries)
            for i, entry in enumerate(entries):
                grain = (first + i) * self.granule_nbytes
                low, high = max(grain, start), min(grain + self.granule_nbytes, start + length)
                if entry <= self._last_mark and (entry or not self._has_parent):
                    continue
                is_whole = high - low == min(self.granule_nbytes, self.nbytes - grain)
                can_free = unmap or entry == ENTRY_ABSENT
                if is_whole and can_free and self._free_entry is not None:
                    changed[i] = self._free_entry
                else:
                    add_range(rest, low, high - low)
            self._exchange(first, entries, changed)
        return rest

    def discard(self, start: int, length: int) -> None:
        """Free whole grains that then read as zeros."""
        if self._free_entry is not None:
            self._free(start, length, self._free_entry, self._last_mark + 1)

    def drop(self, start: int, length: int) -> None:
        """Free whole grains that then read as the parent's."""
        self._free(start, length, ENTRY_ABSENT, ENTRY_ABSENT + 1)

    def _free(self, start: int, length: int, freed: int, lowest: int) -> None:
        """Change entries of whole grains from ``lowest`` on into ``freed``."""
        nbytes, end = self.granule_nbytes, start + length
        first = align_up(start, nbytes)
        last = end if end == self.nbytes else end - end % nbytes
        if first >= last:
            return
        for grain, entries in self._tables_of(first, last - first):
            changed = [freed if entry >= lowest else entry for entry in entries]
            self._exchange(grain, entries, changed)

    def _exchange(self, first: int, entries: list[int], changed: list[int]) -> None:
        """Change entries, and release the grains that no entry has any more."""
        if changed == entries:
            return
        self.put_entries(first, changed)
        for old, new in zip(entries, changed, strict=True):
            if old != new and old > self._last_mark:
                self.space.release(_place_of(old))

    # -- tables ------------------------------------------------------------------------

    def entries(self, first: int, count: int) -> list[int]:
        """Return the entries of grains; those without a table have the directory's."""
        return _unpacked(self._raw_entries(first, count))

    def _tables_of(self, start: int, length: int) -> Iterator[tuple[int, list[int]]]:
        """Yield the first grain and the entries of each table in a range of the disk.

        Tables without entries are left out, unless they let the parent through.
        """
        nbytes, per_table = self.granule_nbytes, self.extent.n_gtes_per_gt
        first, last = start // nbytes, -(-(start + length) // nbytes)
        for low in range(first - first % per_table, last, _TABLES_AT_ONCE * per_table):
            start = max(low, first)
            end = min(low + _TABLES_AT_ONCE * per_table, last)
            raw = self._raw_entries(start, end - start)
            if raw == bytes(len(raw)) and not self._has_parent:
                continue
            for table, at, n in self._parts(start, end - start):
                grain = table * per_table + at
                part = raw[(grain - start) * ENTRY_NBYTES : (grain + n - start) * ENTRY_NBYTES]
                if self._has_parent or any(part):
                    yield grain, _unpacked(part)

    def _parts(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Yield (table, first entry, number of entries) of consecutive grains."""
        per_table = self.extent.n_gtes_per_gt
        while count:
            table, at = divmod(first, per_table)
            n = min(count, per_table - at)
            yield table, at, n
            first, count = first + n, count - n

    def _raw_entries(self, first: int, count: int, directory: int | None = None) -> bytes:
        """Return entries, by default of the primary tables; adjacent ones at once."""
        extent, per_table = self.extent, self.extent.n_gtes_per_gt
        directory = self.directories[0] if directory is None else directory
        table, at = divmod(first, per_table)
        n_tables = (at + count - 1) // per_table + 1
        if n_tables == 1:
            return self._entries_of(directory, table, at, count)
        tables = self._directory_entries(directory, table, n_tables)
        pieces: list[bytes] = []
        done = 0
        while done < n_tables:
            place, n = tables[done], 1
            if place <= self._last_mark:
                pieces.append(_packed([place]) * per_table)
            else:
                while done + n < n_tables and _place_of(tables[done + n]) == (
                    _place_of(place) + n * extent.gt_nbytes
                ):
                    n += 1
                pieces.append(self.file.pread(_place_of(place), n * extent.gt_nbytes))
            done += n
        return b"".join(pieces)[at * ENTRY_NBYTES : (at + count) * ENTRY_NBYTES]

    def _entries_of(self, directory: int, table: int, at: int, count: int) -> bytes:
        """Return entries of a table, which may be absent."""
        (place,) = self._directory_entries(directory, table, 1)
        if place <= self._last_mark:
            return _packed([place]) * count
        return self.file.pread(_place_of(place) + at * ENTRY_NBYTES, count * ENTRY_NBYTES)

    def _directory_entries(self, directory: int, table: int, count: int) -> list[int]:
        offset = directory + table * ENTRY_NBYTES
        return _unpacked(self.file.pread(offset, count * ENTRY_NBYTES))

    def put_entries(self, first: int, entries: Sequence[int]) -> None:
        """Change the entries of consecutive grains in both copies of the tables."""
        done = 0
        for table, at, n in self._parts(first, len(entries)):
            part = _packed(entries[done : done + n])
            for directory in self.directories:
                offset = self._table(directory, table)
                step = Step.NEW if offset in self._new_tables else Step.REFERENCE
                self.file.put(offset + at * ENTRY_NBYTES, part, step)
            done += n

    def _table(self, directory: int, table: int) -> int:
        """Return the host offset of a table, which is made if there is none."""
        (place,) = self._directory_entries(directory, table, 1)
        if place > self._last_mark:
            return _place_of(place)
        # A redundant table may be absent where the other one is not.
        entries = self._entries_of(self.directories[0], table, 0, self.extent.n_gtes_per_gt)
        offset = self._take_table()
        self.file.put(offset, entries, Step.NEW)
        self._new_tables.add(offset)
        entry = _packed([_entry_of(offset)])
        self.file.put(directory + table * ENTRY_NBYTES, entry, Step.REFERENCE)
        return offset

    def _take_table(self) -> int:
        """Return space for a table: a grain has room for two at least."""
        start, end = self._room
        if end - start < self.table_nbytes:
            start = self.take()
            end = start + self.granule_nbytes
        self._room = start + self.table_nbytes, end
        return start

    # -- size --------------------------------------------------------------------------

    def complete_last_grain(self) -> None:
        """Store the last grain as a whole, with zeros after the end of the disk."""
        first, nbytes = divmod(self.nbytes, self.granule_nbytes)
        if not nbytes:
            return
        (entry,) = self.entries(first, 1)
        if entry <= self._last_mark:
            return
        offset = self.take()
        content = self.file.pread(_place_of(entry), nbytes)
        self.file.pwrite(offset, content.ljust(self.granule_nbytes, b"\0"))
        self._exchange(first, [entry], [_entry_of(offset)])

    def clear_table_after(self, nbytes: int) -> None:
        """Clear the entries of a table that are after a new end of the disk."""
        first = -(-nbytes // self.granule_nbytes)
        count = -first % self.extent.n_gtes_per_gt
        if count:
            self.put_entries(first, [ENTRY_ABSENT] * count)

    def table_entries(self, offset: int, count: int) -> bytes:
        """Return directory entries for adjacent tables."""
        places = range(offset, offset + count * self.table_nbytes, self.table_nbytes)
        return _packed([_entry_of(place) for place in places])

    # -- steps -------------------------------------------------------------------------

    def flush(self, *, is_unread: bool) -> None:
        """Make all changes durable, and give freed grains back to the file system."""
        self.file.write_steps()
        self._new_tables.clear()
        for start, length in _runs(self.space.settle(is_unread=is_unread), self.granule_nbytes):
            self.file.punch(start, length)

    def withhold(self) -> None:
        """Append what is new while somebody reads; see `Updater`."""
        self.space.withhold(self.file.nbytes)

    def finish(self) -> None:
        """Cut off free grains at the end, and mark the extent as closed cleanly."""
        self.file.cut(self.space.trim())
        self.file.put(UNCLEAN_OFFSET, b"\0", Step.REFERENCE)


def _free_grains(survey: SpaceSurvey, grain_nbytes: int) -> list[int]:
    """Return the host offsets of aligned grains that nothing uses, ascending."""
    free: list[int] = []
    for start, stop in survey.gaps:
        first = align_up(start * SECTOR_NBYTES, grain_nbytes)
        n_grains = (stop * SECTOR_NBYTES - first) // grain_nbytes
        n_grains = min(n_grains, _MAX_FREE - len(free))
        free += range(first, first + n_grains * grain_nbytes, grain_nbytes)
    return free


def _joined(places: Sequence[Place]) -> list[Place]:
    """Join places that continue each other on the disk and in the file."""
    joined: list[Place] = []
    for place in places:
        if joined:
            last = joined[-1]
            shift = last.host_offset - last.guest_offset
            if last.guest_offset + last.length == place.guest_offset and place == last._replace(
                guest_offset=place.guest_offset,
                host_offset=place.guest_offset + shift,
                length=place.length,
            ):
                joined[-1] = last._replace(length=last.length + place.length)
                continue
        joined.append(place)
    return joined


def _runs(offsets: Sequence[int], nbytes: int) -> Iterator[tuple[int, int]]:
    """Yield (start, length) of runs of adjacent blocks, whose offsets ascend."""
    start = end = 0
    for offset in offsets:
        if offset != end:
            if start < end:
                yield start, end - start
            start = offset
        end = offset + nbytes
    if start < end:
        yield start, end - start


def _place_of(entry: int) -> int:
    return entry * SECTOR_NBYTES


def _entry_of(offset: int) -> int:
    return offset // SECTOR_NBYTES


def _packed(entries: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(entries)}I", *entries)


def _unpacked(raw: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(raw) // ENTRY_NBYTES}I", raw))
