"""QCOW2: writing in place.

Source: QEMU docs/interop/qcow2.rst.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, cast

import numpy as np

from imgcore import limits
from imgcore.errors import CorruptImageError, OptionError, UnsupportedFeatureError
from imgcore.files.update_file import Step
from imgcore.formats.api import Place
from imgcore.formats.qcow2 import header_update, layout
from imgcore.formats.qcow2.active_tables import ActiveTables, clusters_of
from imgcore.formats.qcow2.allocation import HostClusters
from imgcore.formats.qcow2.header import read_bitmaps

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.api import BackingReference
    from imgcore.formats.qcow2.header import Qcow2Header
    from imgcore.formats.qcow2.reader import Qcow2Reader
    from imgcore.formats.qcow2.snapshots import SnapshotChanges

# How clusters of the disk are written: where they are; where they are, but as a whole;
# in new ones of which the rest is zeros, or in new ones that need all.
_HERE: Final = 0
_HERE_NEEDING_ALL: Final = 1
_NEW_ZEROS: Final = 2
_NEW_NEEDING_ALL: Final = 3

# Changes of tables are written in between when they take more memory.
_MAX_WAITING_NBYTES: Final = 16 * limits.MIB

_NO_ENTRY: Final = np.uint64(0)
_ZERO: Final = np.uint64(layout.ZERO_FLAG)


def prepare(_file: UpdateFile) -> None:
    """Do nothing: an interrupted writer leaves leaks at most, or the dirty bit."""


def updater_for(reader: Qcow2Reader, parent_nbytes: int | None) -> Qcow2Updater:
    """Return what changes an image; see `imgcore.formats.api.Driver`."""
    header, path = reader.header, reader.file.path
    for state, is_so in (
        ("is marked as dirty", header.is_dirty),
        ("is marked as corrupt", header.is_corrupt),
        ("has no refcount table", not header.has_refcount_table),
    ):
        if is_so:
            raise UnsupportedFeatureError(
                f"the image {state} and is not written to: imgcore check -r all repairs it",
                path=path,
            )
    return Qcow2Updater(cast("UpdateFile", reader.file), header, parent_nbytes)


class Qcow2Updater:
    """Changes an image; see `imgcore.formats.api.Updater`.

    Memory: 16 bytes for each table, and 8 bytes for each entry of the refcount table.
    """

    def __init__(self, file: UpdateFile, header: Qcow2Header, parent_nbytes: int | None) -> None:
        self._file = file
        self._header = header
        self._bits = header.cluster_bits
        self._size = header.cluster_size
        self.granule_nbytes: int = header.cluster_size
        self._has_parent = parent_nbytes is not None
        # Without its parent, an image is seen as if it had none, but still has one.
        self._names_parent = self._has_parent or header.backing_offset != 0
        # It has something for a disk that grows, as far as is known.
        self._parent_goes_on = self._names_parent and (
            parent_nbytes is None or parent_nbytes > header.virtual_size
        )
        self._clusters = HostClusters(file, header)
        self._tables = ActiveTables(file, header, self._clusters)

    def begin(self, *, again: bool) -> None:
        """Mark bitmaps that do not see the changes, and clear unknown features."""
        header_update.clear_autoclear(self._file, self._header)
        for bitmap in read_bitmaps(self._file, self._header):
            if bitmap.flags & layout.BITMAP_AUTO:
                flags = bitmap.flags | layout.BITMAP_IN_USE
                place = bitmap.row_offset + layout.BITMAP_FLAGS_OFFSET
                self._file.put(place, flags.to_bytes(4, "big"), Step.NEW)

    # -- data --------------------------------------------------------------------------

    def place(self, start: int, length: int) -> list[Place]:
        """Return where a range goes; see `imgcore.formats.api.Updater`."""
        end = start + length
        places: list[Place] = []
        try:
            for first, last in self._tables.pieces(start >> self._bits, -(-end >> self._bits)):
                for place in self._placed(first, last):
                    nbytes = min(place.length, end - place.guest_offset)
                    places.append(place._replace(length=nbytes))
        except BaseException:
            self.give_up([place for place in places if place.is_new])
            raise
        return places

    def overwritable(self, start: int, length: int) -> list[Place]:
        """Return the clusters that are the disk's alone; see `Overwritable`."""
        bits, end = self._bits, start + length
        places: list[Place] = []
        for first, last in self._tables.existing_pieces(start >> bits, -(-end >> bits)):
            entries = self._tables.entries(first, last)
            for use, low, high in self._uses(entries):
                if use == _HERE:
                    offset = entries[low] & layout.OFFSET_MASK
                    places.append(Place((first + low) << bits, (high - low) << bits, offset))
        return places

    def _placed(self, first: int, last: int) -> Iterator[Place]:
        """Yield the places of clusters that one L2 table describes."""
        bits = self._bits
        entries = self._tables.entries(first, last)
        after, is_writable = None, False
        for use, low, high in self._uses(entries):
            is_new = use != _HERE
            if is_new and not is_writable:
                self._tables.make_writable(first)
                after, is_writable = self._end_of_neighbour(first, low, entries), True
            while low < high:
                if use in (_HERE, _HERE_NEEDING_ALL):
                    cluster, n = (entries[low] & layout.OFFSET_MASK) >> bits, high - low
                else:
                    cluster, n = self._clusters.take(high - low, after)
                is_zeros = use == _NEW_ZEROS and self._clusters.are_zeros(cluster)
                needs_all = is_new and not is_zeros
                guest_offset, host_offset = (first + low) << bits, cluster << bits
                yield Place(guest_offset, n << bits, host_offset, 0, is_new, needs_all)
                low, after = low + n, cluster + n

    def _end_of_neighbour(self, first: int, low: int, entries: Sequence[int]) -> int | None:
        """Return the host cluster after that of the cluster before on the disk."""
        if low:
            entry = entries[low - 1]
        elif first % self._header.l2_entries:
            (entry,) = self._tables.entries(first - 1, first)
        else:
            return None
        offset = entry & layout.OFFSET_MASK
        return None if entry & layout.COMPRESSED or not offset else (offset >> self._bits) + 1

    def _uses(self, entries: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Yield how entries ``[low, high)`` are written: (use, low, high).

        Clusters that stay where they are follow each other in the file.
        """
        pending = 0
        use = _HERE
        for low, high in self._runs(entries):
            for next_use, start in self._uses_of_run(entries, low, high):
                if next_use in (_NEW_ZEROS, _NEW_NEEDING_ALL) and next_use == use:
                    continue
                if pending < start:
                    yield use, pending, start
                pending, use = start, next_use
        if pending < len(entries):
            yield use, pending, len(entries)

    def _runs(self, entries: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield runs of entries without clusters, or with clusters that follow."""
        low, n = 0, len(entries)
        while low < n:
            entry = entries[low]
            high = low + 1
            if entry & (layout.OFFSET_MASK | layout.COMPRESSED) == 0:
                while high < n and entries[high] == entry:
                    high += 1
            elif entry & layout.COPIED:
                while high < n and entries[high] == entry + (high - low) * self._size:
                    high += 1
            yield low, high
            low = high

    def _uses_of_run(
        self, entries: Sequence[int], low: int, high: int
    ) -> Iterator[tuple[int, int]]:
        """Yield how the entries of a run are written, and from which one on."""
        entry = entries[low]
        offset = entry & layout.OFFSET_MASK
        is_zero = entry & layout.ZERO_FLAG and not entry & layout.COMPRESSED
        if not entry & layout.COMPRESSED:
            self._require_possible(entry, entries[high - 1] & layout.OFFSET_MASK)
            if not offset:
                is_zeros = is_zero or not self._has_parent
                yield _NEW_ZEROS if is_zeros else _NEW_NEEDING_ALL, low
                return
            if entry & layout.COPIED and self._clusters.are_own(offset >> self._bits, high - low):
                yield _HERE_NEEDING_ALL if is_zero else _HERE, low
                return
        if high - low > 1:
            for index in range(low, high):
                yield from self._uses_of_run(entries, index, index + 1)
            return
        self._clusters.require_used(clusters_of(np.array([entry], np.uint64), self._bits))
        yield _NEW_ZEROS if is_zero else _NEW_NEEDING_ALL, low

    def _require_possible(self, entry: int, last_offset: int) -> None:
        """Raise unless a plain entry is possible, and its clusters are in the file."""
        is_v3 = self._header.version >= 3
        reserved = layout.L2_RESERVED_V3 if is_v3 else layout.L2_RESERVED_V2
        offset = entry & layout.OFFSET_MASK
        if (
            entry & reserved
            or offset & (self._size - 1)
            or last_offset >= self._file.nbytes
            or (not offset and entry & layout.COPIED)
        ):
            raise CorruptImageError(
                f"L2 entry {entry:#x} is impossible: imgcore check tells more",
                path=self._file.path,
                offset=offset,
            )

    def refer(self, places: Sequence[Place]) -> None:
        """Change the entries of places; see `imgcore.formats.api.Updater`."""
        size = self._size
        for place in places:
            for first, last, offset in self._pieces_of(place):
                old = self._tables.entries(first, last)
                entry = offset | layout.COPIED
                new = range(entry, entry + (last - first) * size, size)
                self._tables.put(first, struct.pack(f">{last - first}Q", *new))
                if any(old):
                    self._release_other(np.array(old, np.uint64), np.array(new, np.uint64))

    def give_up(self, places: Sequence[Place]) -> None:
        """Free the clusters of places; see `imgcore.formats.api.Updater`."""
        for place in places:
            for first, last, offset in self._pieces_of(place):
                (old,) = self._tables.entries(first, first + 1)
                if old & layout.COMPRESSED or old & layout.OFFSET_MASK != offset:
                    self._clusters.give_back(offset >> self._bits, last - first)

    def _pieces_of(self, place: Place) -> Iterator[tuple[int, int, int]]:
        """Yield (first, last, host offset of the first) of a place, by L2 tables."""
        begin = place.guest_offset >> self._bits
        end = -(-(place.guest_offset + place.length) >> self._bits)
        for first, last in self._tables.pieces(begin, end):
            yield first, last, place.host_offset + ((first - begin) << self._bits)

    def _release_other(self, old: NDArray[np.uint64], new: NDArray[np.uint64]) -> None:
        """Release the clusters of old entries that the new ones do not have."""
        self._clusters.release(clusters_of(old[~_is_kept(old, new)], self._bits))

    # -- zeros -------------------------------------------------------------------------

    def zero(self, start: int, length: int, *, unmap: bool) -> list[tuple[int, int]]:
        """Make whole clusters read as zeros; see `imgcore.formats.api.Updater`."""
        end = start + length
        first, last = self._whole_clusters(start, end)
        if first >= last:
            return [(start, length)]
        head, tail = (first << self._bits) - start, end - min(last << self._bits, end)
        rest = [(start, head)] if head else []
        if self._header.version >= 3:
            change = self._unmapped if unmap else self._zeroed
            self._replace(first, last, change, makes_tables=self._names_parent)
        elif self._names_parent or not unmap:
            rest.extend(self._stored(first, last, end))
        else:
            self._replace(first, last, _absent)
        if tail:
            rest.append((end - tail, tail))
        return rest

    def _whole_clusters(self, start: int, end: int) -> tuple[int, int]:
        """Return the clusters that are whole in a range, or end with the disk."""
        is_last = end >= self._header.virtual_size
        return -(-start >> self._bits), -(-end >> self._bits) if is_last else end >> self._bits

    def _unmapped(self, old: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return entries that read as zeros and have no clusters."""
        if self._names_parent:
            return np.full_like(old, _ZERO)
        return np.where(old == _NO_ENTRY, _NO_ENTRY, _ZERO)

    def _zeroed(self, old: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return entries that read as zeros and keep their clusters, if they can."""
        is_plain = (old & np.uint64(layout.COMPRESSED)) == 0
        return np.where(is_plain & (old != _NO_ENTRY), old | _ZERO, self._unmapped(old))

    def _stored(self, first: int, last: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield the parts of clusters that must be written to read as zeros."""
        if self._names_parent:
            yield first << self._bits, min(last << self._bits, end) - (first << self._bits)
            return
        for low, high in self._tables.existing_pieces(first, last):
            edges = np.flatnonzero(
                np.diff(self._tables.array(low, high) != _NO_ENTRY, prepend=False, append=False)
            )
            for a, b in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                offset = (low + a) << self._bits
                yield offset, min((low + b) << self._bits, end) - offset

    def discard(self, start: int, length: int) -> None:
        """Free whole clusters; see `imgcore.formats.api.Updater`."""
        first, last = self._whole_clusters(start, start + length)
        if not self._names_parent:
            self._replace(first, last, _absent)
        elif self._header.version >= 3:
            self._replace(first, last, self._unmapped, makes_tables=True)

    def drop(self, start: int, length: int) -> None:
        """Free whole clusters, and leave them to the parent; see `Rebasable`."""
        self._replace(*self._whole_clusters(start, start + length), _absent)

    def _replace(
        self,
        first: int,
        last: int,
        change: Callable[[NDArray[np.uint64]], NDArray[np.uint64]],
        *,
        makes_tables: bool = False,
    ) -> None:
        """Change the entries of clusters ``[first, last)`` of the disk.

        Without ``makes_tables``, entries of L2 tables that do not exist stay 0.
        """
        tables = self._tables
        pieces = tables.pieces if makes_tables else tables.existing_pieces
        for low, high in pieces(first, last):
            old = tables.array(low, high)
            new = change(old)
            changed = np.flatnonzero(old != new)
            if not changed.size:
                continue
            begin, end = int(changed[0]), int(changed[-1]) + 1
            lost = clusters_of(old[~_is_kept(old, new)], self._bits)
            self._clusters.require_used(lost)
            tables.put(low + begin, new[begin:end].astype(">u8").tobytes())
            self._clusters.release(lost)
            if self._file.waiting_nbytes > _MAX_WAITING_NBYTES:
                self._file.write_steps()

    # -- the image ---------------------------------------------------------------------

    def flush(self, *, is_unread: bool) -> None:
        """Write the changes, and free clusters; see `imgcore.formats.api.Updater`."""
        self._file.write_steps()
        self._clusters.settle(is_unread=is_unread)

    def withhold(self) -> None:
        """Append what is new while somebody reads; see `Updater`."""
        self._clusters.withhold()

    def finish(self) -> None:
        """Cut the file behind its last cluster."""
        self._clusters.trim()

    def resize(self, virtual_size: int) -> None:
        """Change the size of the disk; see `imgcore.formats.api.Updater`."""
        n_tables = -(-virtual_size // (self._header.l2_entries << self._bits))
        self._require_resizable(virtual_size, n_tables)
        if virtual_size < self._header.virtual_size:
            self._shrink(virtual_size, n_tables)
            self._file.write_steps()
            # Reads in progress of what is cut off may find zeros.
            self._clusters.settle(is_unread=True)
        else:
            self._grow(virtual_size, n_tables)

    def _require_resizable(self, virtual_size: int, n_tables: int) -> None:
        header = self._header
        reason = None
        if n_tables * layout.ENTRY_NBYTES > limits.QCOW2_MAX_L1_NBYTES:
            reason = f"clusters of {self._size} bytes are too small for {virtual_size} bytes"
        elif header.version < 3 and header.n_snapshots:
            reason = "of version 2 with internal snapshots are not resized"
        elif header.version < 3 and self._parent_goes_on and virtual_size > header.virtual_size:
            reason = "of version 2 do not grow over a backing file that is longer"
        else:
            for bitmap in read_bitmaps(self._file, header):
                if not bitmap.flags & (layout.BITMAP_IN_USE | layout.BITMAP_AUTO):
                    reason = f"with a bitmap ({bitmap.name!r}) are not resized, which it would lose"
        if reason is not None:
            raise OptionError(f"QCOW2 images {reason}", path=self._file.path)

    def _grow(self, virtual_size: int, n_tables: int) -> None:
        old_size = self._header.virtual_size
        if n_tables > self._header.l1_entries:
            self._move_l1(n_tables)
        first, last = -(-old_size >> self._bits), -(-virtual_size >> self._bits)
        # A crash may have left there what was cut off, and the parent may be longer.
        change = self._unmapped if self._parent_goes_on else _absent
        self._replace(first, last, change, makes_tables=self._parent_goes_on)
        self._clear_end(old_size)
        self._file.write_steps()
        header_update.put_virtual_size(self._file, self._header, virtual_size)

    def _move_l1(self, n_tables: int) -> None:
        """Make a larger L1 table."""
        header, nbytes = self._header, n_tables * layout.ENTRY_NBYTES
        old_nbytes = header.l1_entries * layout.ENTRY_NBYTES
        old_first, old_n = header.l1_offset >> self._bits, -(-old_nbytes >> self._bits)
        first = self._clusters.take_table(nbytes)
        old = self._file.pread(header.l1_offset, old_nbytes) if old_n else b""
        self._file.pwrite(
            first << self._bits, old.ljust(-(-nbytes >> self._bits) * self._size, b"\0")
        )
        header_update.put_l1(self._file, header, first << self._bits, n_tables)
        self._tables.grow_l1(n_tables)
        if old_n:
            self._clusters.tables.remove(old_first)
            self._clusters.release(np.arange(old_first, old_first + old_n))

    def _clear_end(self, size: int) -> None:
        """Make what is behind the disk, in its last cluster, read as zeros."""
        used = size & (self._size - 1)
        if not used:
            return
        cluster = size >> self._bits
        (entry,) = self._tables.entries(cluster, cluster + 1)
        if entry & (layout.COMPRESSED | layout.ZERO_FLAG) or not entry & layout.OFFSET_MASK:
            return
        ((use, _, _),) = self._uses((entry,))
        if use == _HERE:
            self._file.zero((entry & layout.OFFSET_MASK) + used, self._size - used)

    def _shrink(self, virtual_size: int, n_tables: int) -> None:
        old_size = self._header.virtual_size
        header_update.put_virtual_size(self._file, self._header, virtual_size)
        self._file.write_steps()
        per_table = self._header.l2_entries
        first, last = -(-virtual_size >> self._bits), -(-old_size >> self._bits)
        self._replace(first, min(last, n_tables * per_table), _absent)
        for low, _ in list(self._tables.existing_pieces(n_tables * per_table, last)):
            index = low // per_table
            lost = clusters_of(self._tables.array(low, low + per_table), self._bits)
            self._clusters.require_used(lost)
            offset = self._tables.table_offset(index)
            self._tables.put_l1(index, 0)
            self._tables.release_table(offset)
            self._clusters.release(lost)

    def create_snapshot(self, name: str, created_ns: int) -> None:
        """Add a snapshot; see `imgcore.formats.api.ChangesSnapshots`."""
        self._snapshots().create(name, created_ns)

    def apply_snapshot(self, index: int) -> None:
        """Make the disk what it was; see `imgcore.formats.api.ChangesSnapshots`."""
        self._snapshots().apply(index)

    def delete_snapshot(self, index: int) -> None:
        """Remove a snapshot; see `imgcore.formats.api.ChangesSnapshots`."""
        self._snapshots().delete(index)

    def _snapshots(self) -> SnapshotChanges:
        from imgcore.formats.qcow2.snapshots import SnapshotChanges

        return SnapshotChanges(self._file, self._header, self._clusters)

    def set_backing(self, reference: BackingReference | None) -> None:
        """Change the backing file's name; see `imgcore.formats.api.Rebasable`."""
        header_update.put_backing(self._file, self._header, reference)


def _absent(old: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return entries that state nothing."""
    return np.zeros_like(old)


def _is_kept(old: NDArray[np.uint64], new: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tell which entries refer to the same plain cluster, or to none, as before."""
    mask = np.uint64(layout.OFFSET_MASK)
    is_plain = ((old | new) & np.uint64(layout.COMPRESSED)) == 0
    kept: NDArray[np.bool_] = is_plain & ((old & mask) == (new & mask))
    return kept
