"""Reads VMDK disks that come in order.

A streamOptimized disk is read by its markers: its tables follow the grains.

Source: Virtual Disk Format 5.0, "Stream-Optimized Compressed Sparse Extents".
"""

from __future__ import annotations

import zlib
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from imgcore._core import walk_grains
from imgcore.engine.extents import EXTENT_DTYPE, FLAG_GRAIN_MARKER, Kind
from imgcore.errors import CorruptImageError, LimitExceededError, UnsupportedFeatureError
from imgcore.files.byte_source import LooksAhead
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.vmdk.header import (
    directory_of_footer,
    open_by_markers,
    reads_by_markers,
    refuse_foreign_extent,
    short_last_grain,
)
from imgcore.formats.vmdk.layout import (
    ENTRY_ABSENT,
    ENTRY_NBYTES,
    ENTRY_ZEROED,
    GRAIN_MARKER,
    HEADER_NBYTES,
    MARKER,
    MAX_COMPRESSED_GRAINS,
    SPARSE_MAGIC,
    Marker,
)
from imgcore.formats.vmdk.reader import VmdkReader
from imgcore.limits import (
    MIB,
    SECTOR_NBYTES,
    STREAM_BEHIND_NBYTES,
    VMDK_MAX_AWAITED_TABLES,
    VMDK_MAX_SORTED_NBYTES,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.formats.vmdk.extent import DiskExtent
    from imgcore.formats.vmdk.header import SparseExtent

    Entries = NDArray[np.uint32]
    # Of `GRAIN_DTYPE`.
    Grains = NDArray[Any]

# A marker as far as it tells what it is.
_HEAD_NBYTES: Final = MARKER.size
_PIECE_ENTRIES: Final = 1 << 16
# How far the markers are followed at once.
_LOOK_NBYTES: Final = 4 * MIB
# A compressed grain: its number, where its marker starts and its data ends.
GRAIN_DTYPE: Final = np.dtype([("number", "<u8"), ("offset", "<u8"), ("end", "<u8")])
_NO_GRAINS: Final = np.empty(0, GRAIN_DTYPE)
_MAX_SECTOR: Final = 0xFFFFFFFF
# Grains that come late: bytes of the stream that are sorted at once, and of the disk
# that are given at once.
_LATE_NBYTES: Final = 8 * MIB
_LATE_DISK_NBYTES: Final = 16 * MIB


class _Phase(Enum):
    """What of a stream was read last."""

    GRAINS = 0
    DIRECTORY = 1
    FOOTER = 2
    END = 3


# The phases that a marker ends.  The header may state the directory; there is no footer
# then.
_BEFORE: Final = {
    Marker.GD: (_Phase.GRAINS,),
    Marker.FOOTER: (_Phase.DIRECTORY,),
    Marker.EOS: (_Phase.DIRECTORY, _Phase.FOOTER),
}


def streamed_reader_for(file: ByteSource, gate: ReferenceGate, _options: object) -> VmdkReader:
    """Return the reader of an extent that comes in order; see `Driver`."""
    magic = file.pread(0, len(SPARSE_MAGIC))
    refuse_foreign_extent(file, magic)
    if magic != SPARSE_MAGIC:
        raise UnsupportedFeatureError(
            "a VMDK descriptor, whose disk is in other files: give its name, not a stream",
            path=file.path,
        )
    return MarkerReader(file, gate) if reads_by_markers(file) else TableReader(file, gate)


class StreamedReader(VmdkReader):
    """Reads a disk whose last grain is not there yet when it is opened."""

    def _short_last_grain(self, sparse: SparseExtent, nbytes: int) -> int:
        """Return the disk's part of its last grain.

        Whether this grain was compressed whole is known once it comes.
        """
        return nbytes % sparse.grain_nbytes if sparse.is_compressed else 0


class TableReader(StreamedReader):
    """Reads a disk whose tables come before its grains."""

    def _extents_of(self, item: DiskExtent, start: int, length: int) -> Iterator[Extents]:
        stop, last = start + length, item.nbytes - item.short_nbytes
        whole = item._replace(short_nbytes=0)
        if start < min(stop, last):
            yield from super()._extents_of(whole, start, min(stop, last) - start)
        if stop <= last:
            return
        assert item.sparse is not None
        found = short_last_grain(item.sparse, item.nbytes)
        if found not in (0, item.short_nbytes):
            raise _strange_last_grain(item.sparse, last, found, item.short_nbytes)
        self._tables.pop(item.guest_base, None)
        low = max(start, last)
        yield from super()._extents_of(item if found else whole, low, stop - low)


class MarkerReader(StreamedReader):
    """Reads a streamOptimized disk whose tables follow its grains.

    Its `extents` are asked for once, and in order.
    """

    _grains: SortedGrains | None = None
    _takes_late = False

    def _open_only_extent(self, file: ByteSource) -> SparseExtent:
        return open_by_markers(file)

    def _extents_of(self, item: DiskExtent, start: int, length: int) -> Iterator[Extents]:
        if self._grains is None:
            self._grains = SortedGrains(item, takes_late=self._takes_late)
        return self._grains.extents(start, start + length)

    def take_late(self) -> None:
        """Let grains come late; see `imgcore.formats.api.ComesLate`."""
        self._takes_late = True

    @property
    def has_late(self) -> bool:
        """Whether grains are left that come late."""
        return self._grains is not None and self._grains.has_late

    def late_extents(self) -> Iterator[Extents]:
        """Yield the grains that come late; see `imgcore.formats.api.ComesLate`."""
        assert self._grains is not None, "see has_late"
        return self._grains.late_extents()


def _strange_last_grain(
    sparse: SparseExtent, place: int, found: int, tail_nbytes: int
) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"the last grain has {found} bytes, expected {tail_nbytes} or {sparse.grain_nbytes}: save "
        "the stream to a file first",
        path=sparse.file.path,
        offset=place,
    )


class SortedGrains:
    """The grains of a disk in its order, found by their markers.

    A grain waits until all that come in the next `VMDK_MAX_SORTED_NBYTES` are known.

    Parameters
    ----------
    item : DiskExtent
    takes_late : bool
        From the first grain on that would have to wait longer, the disk is a hole, and
        `late_extents` has the rest.

    Attributes
    ----------
    has_late : bool
        Whether there is such a rest.
    """

    def __init__(self, item: DiskExtent, *, takes_late: bool = False) -> None:
        assert item.sparse is not None
        self._item = item
        self._sparse = item.sparse
        self._walk = MarkerWalk(item.sparse, -(-item.nbytes // item.sparse.grain_nbytes))
        # Those that wait, and those that are next.
        self._waiting: Grains = _NO_GRAINS
        self._next: Grains = _NO_GRAINS
        self._last = -1
        # The end in the stream of those that were next.
        self._used_end = 0
        self._takes_late = takes_late
        self.has_late: bool = False

    def extents(self, start: int, stop: int) -> Iterator[Extents]:
        """Yield batches of ZLIB and HOLE that cover a range, which follows the last."""
        grain_nbytes = self._sparse.grain_nbytes
        at, end = start, -(-stop // grain_nbytes)
        while at < stop:
            found = self._take(end)
            until = stop
            if len(found) and int(found["number"][-1]) + 1 < end:
                until = (int(found["number"][-1]) + 1) * grain_nbytes
            yield self._rows(found, at, until)
            at = until
        if stop == self._item.nbytes:
            self._require_end()

    def _take(self, end: int) -> Grains:
        """Take the next grains before number ``end``; none if no more are."""
        if not len(self._next) and not self.has_late:
            self._sort()
        n = int(np.searchsorted(self._next["number"], end))
        found, self._next = self._next[:n], self._next[n:]
        return found

    def _sort(self) -> None:
        """Read markers until some grains are known to be next."""
        parts, nbytes = [self._waiting], _stored_nbytes(self._waiting)
        while nbytes < VMDK_MAX_SORTED_NBYTES:
            grains = self._walk.next_grains(VMDK_MAX_SORTED_NBYTES - nbytes)
            if not len(grains):
                break
            parts.append(grains)
            nbytes += _stored_nbytes(grains)
        waiting = np.concatenate(parts)
        waiting = waiting[np.argsort(waiting["number"], kind="stable")]
        # All, once the stream has ended.
        kept_nbytes = 0 if self._walk.has_ended else VMDK_MAX_SORTED_NBYTES * 3 // 4
        sizes = (waiting["end"] - waiting["offset"]).astype(np.int64)
        n_taken = int(np.searchsorted(np.cumsum(sizes) - sizes, nbytes - kept_nbytes))
        taken, self._waiting = waiting[:n_taken], waiting[n_taken:]
        if self._takes_late and self._is_late(taken):
            self._waiting, self.has_late = waiting, True
            return
        ascends = np.diff(taken["number"].astype(np.int64), prepend=self._last) > 0
        for number, offset, _ in taken.tolist() if not ascends.all() else ():
            self._refuse_disorder(number, offset)
            self._last = number
        if n_taken:
            self._last = int(taken["number"][-1])
            self._used_end = max(self._used_end, int(taken["end"].max()))
        self._next = taken

    def _is_late(self, taken: Grains) -> bool:
        """Tell whether grains follow too late, or those that wait do so too long."""
        if not len(taken):
            return False
        used_end = max(self._used_end, int(taken["end"].max()))
        oldest = int(self._waiting["offset"].min()) if len(self._waiting) else used_end
        # The stream may forget what is so far behind.
        is_forgotten = oldest + STREAM_BEHIND_NBYTES < used_end
        return is_forgotten or int(taken["number"][0]) <= self._last

    def _refuse_disorder(self, number: int, offset: int) -> None:
        if number > self._last:
            return
        path, sector = self._sparse.file.path, number * self._sparse.header.grain_size
        if number == self._last:
            raise CorruptImageError(
                f"the grain for sector {sector} comes twice, the second time at {offset:#x}",
                path=path,
                offset=offset,
            )
        raise UnsupportedFeatureError(
            f"the grain for sector {sector} at {offset:#x} comes long after others that "
            "follow it on the disk: save the stream to a file first",
            path=path,
            offset=offset,
        )

    def _require_end(self) -> None:
        """Read the markers after the last grain, of which none may be left."""
        assert not len(self._next)
        if self.has_late:
            return
        more = self._walk.next_grains(1)
        if self._takes_late and len(more):
            self._waiting, self.has_late = np.concatenate([self._waiting, more]), True
            return
        for late in (more, self._waiting):
            if len(late):
                self._refuse_disorder(int(late["number"][0]), int(late["offset"][0]))

    def late_extents(self) -> Iterator[Extents]:
        """Yield the grains that are left; those of a piece of the stream ascend."""
        nbytes = self._sparse.grain_nbytes
        most = max(_LATE_DISK_NBYTES // nbytes, 1)
        grains, self._waiting = np.sort(self._waiting, order="offset"), _NO_GRAINS
        while True:
            while not len(grains) or grains["end"][-1] - grains["offset"][0] < _LATE_NBYTES:
                more = self._walk.next_grains(_LATE_NBYTES)
                if not len(more):
                    break
                grains = np.concatenate([grains, more])
            if not len(grains):
                return
            n = int(np.searchsorted(grains["offset"], grains["offset"][0] + _LATE_NBYTES))
            piece, grains = np.sort(grains[:n], order="number"), grains[n:]
            for at in range(0, n, most):
                yield self._late_rows(piece[at : at + most])

    def _late_rows(self, grains: Grains) -> Extents:
        """Return extents of these grains alone, without their markers."""
        start = int(grains["number"][0]) * self._sparse.grain_nbytes
        rows = self._rows(grains, start, start)
        rows = np.delete(rows, rows["kind"] != Kind.ZLIB)
        marked = rows["flags"] == FLAG_GRAIN_MARKER
        rows["host_offset"][marked] += np.uint64(GRAIN_MARKER.size)
        rows["host_length"][marked] -= np.uint64(GRAIN_MARKER.size)
        rows["flags"] = 0
        return rows

    def _rows(self, grains: Grains, start: int, stop: int) -> Extents:
        """Return extents that cover a range with these grains, and holes between."""
        sparse = self._sparse
        nbytes, index = np.uint64(sparse.grain_nbytes), self._item.file_index
        # Before each grain a hole, maybe an empty one, and one after the last.
        rows = np.zeros(2 * len(grains) + 1, EXTENT_DTYPE)
        holes, stored = rows[::2], rows[1::2]
        stored["guest_offset"] = low = grains["number"] * nbytes
        stored["length"] = np.minimum(nbytes, np.uint64(self._item.nbytes) - low)
        stored["host_offset"] = grains["offset"]
        stored["host_length"] = grains["end"] - grains["offset"]
        stored["file"] = index
        stored["kind"] = Kind.ZLIB
        stored["flags"] = FLAG_GRAIN_MARKER
        holes["kind"] = Kind.HOLE
        holes["guest_offset"][0] = start
        holes["guest_offset"][1:] = low + stored["length"]
        holes["length"][:-1] = low
        holes["length"][-1] = max(stop, int(holes["guest_offset"][-1]))
        holes["length"] -= holes["guest_offset"]
        if len(grains) and stored["length"][-1] < nbytes:
            offset, end = int(grains["offset"][-1]), int(grains["end"][-1])
            if self._is_short(offset, end, int(stored["length"][-1])):
                data = offset + GRAIN_MARKER.size
                last = (low[-1], stored["length"][-1], data, end - data, index + 1, Kind.ZLIB, 0)
                stored[-1] = last
        return rows[rows["length"] > 0]

    def _is_short(self, offset: int, end: int, tail_nbytes: int) -> bool:
        """Tell whether the last grain was compressed up to the end of the disk only."""
        sparse = self._sparse
        data = sparse.file.pread(offset + GRAIN_MARKER.size, end - offset - GRAIN_MARKER.size)
        try:
            found = len(zlib.decompressobj().decompress(data, sparse.grain_nbytes))
        except zlib.error:
            # The engine says what is wrong.
            return False
        if found not in (tail_nbytes, sparse.grain_nbytes):
            raise _strange_last_grain(sparse, offset, found, tail_nbytes)
        return found == tail_nbytes


class MarkerWalk:
    """Follows the markers of a stream up to its end, and compares its tables.

    Parameters
    ----------
    sparse : SparseExtent
    n_grains : int
        Of the disk.

    Notes
    -----
    Memory: four bytes for each grain table, and the entries of those that did not come
    yet (`VMDK_MAX_AWAITED_TABLES`).
    """

    def __init__(self, sparse: SparseExtent, n_grains: int) -> None:
        self._sparse = sparse
        self._n_grains = n_grains
        self._position = sparse.overhead
        self._phase = _Phase.GRAINS
        # The sector of each grain in tables that did not come yet, the latest last.
        self._awaited: dict[int, Entries] = {}
        # Their numbers by the sector of the first grain in each; made when needed.
        self._by_sector: dict[int, int] = {}
        self._directory = np.zeros(sparse.n_directory_entries, np.uint32)
        self._directory_sector = 0

    @property
    def has_ended(self) -> bool:
        """Whether the end-of-stream marker was read."""
        return self._phase is _Phase.END

    def next_grains(self, most_nbytes: int) -> Grains:
        """Return the next grains in the stream, none at the end-of-stream marker.

        They end with the one that makes them ``most_nbytes``, or before.

        Raises
        ------
        CorruptImageError
            Something else than a marker is where one must be, or a table contradicts
            the grains, or the stream ends before its end-of-stream marker.
        """
        file = self._sparse.file
        while not self.has_ended:
            grains = self._grains_ahead(most_nbytes)
            if len(grains):
                return grains
            raw = file.pread(self._position, _HEAD_NBYTES)
            lba, nbytes = GRAIN_MARKER.unpack_from(raw)
            if nbytes:
                return self._grain(lba, nbytes)
            n_sectors, _, kind = MARKER.unpack(raw)
            self._metadata(n_sectors, kind)
        return _NO_GRAINS

    def _grains_ahead(self, most_nbytes: int) -> Grains:
        """Return grains whose markers are in memory; none where something else is."""
        sparse = self._sparse
        if self._phase is not _Phase.GRAINS or not isinstance(sparse.file, LooksAhead):
            return _NO_GRAINS
        view = sparse.file.look(self._position, min(most_nbytes, _LOOK_NBYTES))
        found = np.empty(len(view) // SECTOR_NBYTES + 1, GRAIN_DTYPE)
        n = walk_grains(
            view,
            self._position,
            found,
            n_grains=self._n_grains,
            grain_nsectors=sparse.header.grain_size,
            max_nbytes=MAX_COMPRESSED_GRAINS * sparse.grain_nbytes,
            most_nbytes=most_nbytes,
        )
        grains = found[:n]
        if n:
            self._await(grains)
            self._position = align_up(int(grains["end"][-1]), SECTOR_NBYTES)
        return grains

    def _corrupt(self, text: str) -> CorruptImageError:
        return CorruptImageError(text, path=self._sparse.file.path, offset=self._position)

    def _grain(self, lba: int, nbytes: int) -> Grains:
        sparse, at = self._sparse, self._position
        size = sparse.header.grain_size
        number, rest = divmod(lba, size)
        if rest or number >= self._n_grains:
            raise self._corrupt(
                f"the marker at {at:#x} is that of a grain for sector {lba}: allowed are multiples "
                f"of {size} below {self._n_grains * size}"
            )
        if nbytes > MAX_COMPRESSED_GRAINS * sparse.grain_nbytes:
            raise self._corrupt(
                f"the grain at {at:#x} has {nbytes} compressed bytes, allowed are "
                f"{MAX_COMPRESSED_GRAINS * sparse.grain_nbytes}"
            )
        if self._phase is not _Phase.GRAINS:
            raise self._corrupt(f"a grain at {at:#x} follows the grain directory")
        end = at + GRAIN_MARKER.size + nbytes
        self._await_one(number, at)
        self._position = align_up(end, SECTOR_NBYTES)
        return np.array([(number, at, end)], GRAIN_DTYPE)

    def _await(self, grains: Grains) -> None:
        """Note what the entries of grains must be in their tables."""
        tables, indices = np.divmod(grains["number"].astype(np.int64), self._sparse.n_gtes_per_gt)
        offsets = grains["offset"].astype(np.int64)
        # Of most grains the neighbour has the same table.
        edges = np.flatnonzero(np.diff(tables, prepend=-1, append=-1))
        for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            entries = self._awaited.get(int(tables[first]))
            if entries is None:
                self._position = int(offsets[first])
                self._await_one(int(grains["number"][first]), self._position)
                entries, first = self._awaited[int(tables[first])], first + 1
            places, sectors = indices[first:last], offsets[first:last] // SECTOR_NBYTES
            is_far = last > first and sectors[-1] > _MAX_SECTOR
            if is_far or entries[places].any() or (np.diff(places) <= 0).any():
                for number, offset in grains[["number", "offset"]][first:last].tolist():
                    self._position = offset
                    self._await_one(number, offset)
                continue
            entries[places] = sectors
            self._by_sector.clear()

    def _await_one(self, number: int, offset: int) -> None:
        """Note what the entry of a grain must be in its table."""
        sector = offset // SECTOR_NBYTES
        if sector > _MAX_SECTOR:
            raise self._corrupt(f"the grain at {offset:#x} is behind the last sector of a table")
        table, index = divmod(number, self._sparse.n_gtes_per_gt)
        entries = self._awaited.get(table)
        if entries is None:
            if self._directory[table]:
                raise self._corrupt(f"the grain at {offset:#x} follows its grain table")
            if len(self._awaited) >= VMDK_MAX_AWAITED_TABLES:
                raise LimitExceededError(
                    f"grains of more than {VMDK_MAX_AWAITED_TABLES} grain tables come before "
                    "these: save the stream to a file first",
                    path=self._sparse.file.path,
                    offset=offset,
                )
            entries = self._awaited[table] = np.zeros(self._sparse.n_gtes_per_gt, np.uint32)
        if entries[index]:
            raise self._corrupt(
                f"the grain for sector {number * self._sparse.header.grain_size} comes twice, at "
                f"{int(entries[index]) * SECTOR_NBYTES:#x} and {offset:#x}"
            )
        entries[index] = sector
        self._by_sector.clear()

    # -- other markers -----------------------------------------------------------------

    def _metadata(self, n_sectors: int, kind: int) -> None:
        """Take a marker and what follows it."""
        at = self._position
        if kind not in list(Marker):
            raise self._corrupt(f"the marker at {at:#x} has the unknown type {kind}")
        sparse, marker = self._sparse, Marker(kind)
        allowed = {
            Marker.EOS: 0,
            Marker.GT: sparse.gt_nbytes,
            Marker.GD: sparse.n_directory_entries * ENTRY_NBYTES,
            Marker.FOOTER: HEADER_NBYTES,
        }[marker]
        held = n_sectors * SECTOR_NBYTES
        if not allowed <= held <= align_up(allowed, sparse.grain_nbytes):
            raise self._corrupt(
                f"the {marker.name} marker at {at:#x} has {n_sectors} sectors, expected "
                f"{-(-allowed // SECTOR_NBYTES)}"
            )
        if marker is not Marker.GT and self._phase not in _BEFORE[marker]:
            raise self._corrupt(f"the {marker.name} marker at {at:#x} is out of order")
        if marker is Marker.GT:
            self._take_table(at + SECTOR_NBYTES)
        elif marker is Marker.GD:
            self._take_directory(at + SECTOR_NBYTES)
            self._phase = _Phase.DIRECTORY
        elif marker is Marker.FOOTER:
            self._take_footer(at + SECTOR_NBYTES)
            self._phase = _Phase.FOOTER
        else:
            self._take_end(at)
            self._phase = _Phase.END
        self._position = at + SECTOR_NBYTES + held

    def _take_table(self, offset: int) -> None:
        """Compare a grain table with the grains that came."""
        if self._phase is not _Phase.GRAINS:
            raise self._corrupt(f"the GT marker at {self._position:#x} is out of order")
        sparse = self._sparse
        raw = sparse.file.pread(offset, sparse.gt_nbytes)
        found = np.frombuffer(raw, "<u4").astype(np.uint32)
        if sparse.has_zeroed_grains:
            found[found == ENTRY_ZEROED] = ENTRY_ABSENT
        used = np.flatnonzero(found)
        if not used.size:
            return
        table = self._table_of(int(found[used[0]]))
        if table is None or not np.array_equal(self._awaited[table], found):
            raise self._corrupt(
                f"the grain table at {offset:#x} contradicts the grains that came before it"
            )
        del self._awaited[table]
        self._directory[table] = offset // SECTOR_NBYTES

    def _table_of(self, sector: int) -> int | None:
        """Return the table whose first grain is in a sector, None if there is none."""
        last = next(reversed(self._awaited), None)
        if last is not None and _first(self._awaited[last]) == sector:
            return last
        if not self._by_sector:
            self._by_sector = {_first(each): table for table, each in self._awaited.items()}
        table = self._by_sector.get(sector)
        return table if table in self._awaited else None

    def _take_directory(self, offset: int) -> None:
        """Compare the grain directory with the grain tables that came."""
        if self._awaited:
            raise self._corrupt(
                f"the grain directory at {offset:#x} comes before {len(self._awaited)} of its "
                "grain tables"
            )
        sparse = self._sparse
        for first in range(0, sparse.n_directory_entries, _PIECE_ENTRIES):
            known = self._directory[first : first + _PIECE_ENTRIES]
            raw = sparse.file.pread(offset + first * ENTRY_NBYTES, len(known) * ENTRY_NBYTES)
            # A table without grains may be there or not.
            wrong = np.flatnonzero((np.frombuffer(raw, "<u4") != known) & (known != 0))
            if wrong.size:
                index = first + int(wrong[0])
                entry = int.from_bytes(raw[wrong[0] * ENTRY_NBYTES :][:ENTRY_NBYTES], "little")
                raise self._corrupt(
                    f"entry {index} of the grain directory is sector {entry}, but the grain table "
                    f"is in sector {int(self._directory[index])}"
                )
        self._directory_sector = offset // SECTOR_NBYTES

    def _take_footer(self, offset: int) -> None:
        raw = self._sparse.file.pread(offset, HEADER_NBYTES)
        stated = directory_of_footer(self._sparse, raw, offset)
        if stated != self._directory_sector:
            raise self._corrupt(
                f"the footer at {offset:#x} states a grain directory in sector {stated}, but it "
                f"is in sector {self._directory_sector}"
            )

    def _take_end(self, at: int) -> None:
        stated = self._sparse.header.gd_offset
        if self._phase is _Phase.DIRECTORY and stated != self._directory_sector:
            raise self._corrupt(f"the end-of-stream marker at {at:#x} follows no footer")
        # All of its sector.
        self._sparse.file.pread(at, SECTOR_NBYTES)


def _stored_nbytes(grains: Grains) -> int:
    """Return the bytes of grains in the stream, with their markers."""
    return int((grains["end"] - grains["offset"]).sum())


def _first(entries: Entries) -> int:
    """Return the first entry that is not 0."""
    return int(entries[np.argmax(entries != 0)])
