"""QCOW2: create, apply and delete internal snapshots in place.

A snapshot counts one more reference to every L2 table and cluster of the disk, so the
refcounts and copied flags of the whole image change.  No order of single writes keeps
both in step.  So the image is marked as dirty meanwhile: its tables can be read at each
moment, and ``check -r all`` restores refcounts and flags after a crash.  Version 2 has
no such mark; there a check tells which flags are wrong, and repairs them.

Source: QEMU docs/interop/qcow2.rst, "Snapshots", "Host cluster management".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from imgcore import limits
from imgcore.errors import CorruptImageError, LimitExceededError, OptionError
from imgcore.files.update_file import Step
from imgcore.formats.qcow2 import header_update, layout
from imgcore.formats.qcow2.active_tables import clusters_of
from imgcore.formats.qcow2.header import read_snapshots
from imgcore.formats.qcow2.tables import iter_l1, read_entries

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.qcow2.allocation import HostClusters
    from imgcore.formats.qcow2.header import Qcow2Header, Snapshot

_ENTRY: Final = ">u8"
_BATCH_ENTRIES: Final = 1 << 18
# As QEMU's field for a name, without its end.
_MAX_NAME_NBYTES: Final = 255
_NANOSECONDS: Final = 1_000_000_000
_MAX_SECONDS: Final = (1 << 32) - 1
# Changes that wait are written when they take more memory.
_MAX_WAITING_NBYTES: Final = 16 * limits.MIB


class _Table(NamedTuple):
    """An L1 table: the active one, or a snapshot's."""

    offset: int
    n_entries: int


class _Rows(NamedTuple):
    """A snapshot table."""

    offset: int
    n_rows: int


class SnapshotChanges:
    """Changes the snapshots of an image.

    The image is read anew after each change.

    Parameters
    ----------
    file : UpdateFile
    header : Qcow2Header
    clusters : HostClusters
    """

    def __init__(self, file: UpdateFile, header: Qcow2Header, clusters: HostClusters) -> None:
        self._file = file
        self._header = header
        self._host = clusters
        self._rows = read_snapshots(file, header)

    @property
    def _active(self) -> _Table:
        return _Table(self._header.l1_offset, self._header.l1_entries)

    # -- the three changes -------------------------------------------------------------

    def create(self, name: str, created_ns: int) -> None:
        """Add a snapshot of the disk as it is; see `ChangesSnapshots`."""
        row = self._new_row(name, created_ns)
        if len(self._rows) >= limits.QCOW2_MAX_SNAPSHOTS:
            raise LimitExceededError(
                f"the image has {len(self._rows)} snapshots, allowed up to "
                f"{limits.QCOW2_MAX_SNAPSHOTS}",
                path=self._file.path,
            )
        self._require_counts(self._active, 1)
        l1_offset = self._copy_of(self._active)
        rows = self._new_rows([*self._raw_rows(), struct.pack(">Q", l1_offset) + row[8:]])
        with self._marked_as_dirty():
            self._count(self._active, 1)
            self._set_flags()
            self._refer_to(rows)

    def apply(self, index: int) -> None:
        """Make the disk what it was; see `ChangesSnapshots`."""
        snapshot = self._rows[index]
        virtual_size = self._size_of(snapshot)
        table, old = self._table_of(snapshot), self._active
        self._require_counts(table, 1)
        self._require_counts(old, -1)
        offset = self._copy_of(table)
        with self._marked_as_dirty():
            self._count(table, 1)
            self._file.write_steps()
            # Both are in one sector, which is written whole.
            header_update.put_l1(self._file, self._header, offset, table.n_entries)
            header_update.put_virtual_size(self._file, self._header, virtual_size)
            self._file.write_steps()
            self._count(old, -1)
            self._free(old)
            self._set_flags()

    def delete(self, index: int) -> None:
        """Remove a snapshot; see `ChangesSnapshots`."""
        table = self._table_of(self._rows[index])
        raw = self._raw_rows()
        del raw[index]
        self._require_counts(table, -1)
        rows = self._new_rows(raw)
        with self._marked_as_dirty():
            self._refer_to(rows)
            self._count(table, -1)
            self._free(table)
            self._set_flags()

    # -- the snapshot table ------------------------------------------------------------

    def _new_row(self, name: str, created_ns: int) -> bytes:
        """Return a row without the place of its L1 table."""
        encoded = name.encode("utf-8", "surrogateescape")
        if not encoded or len(encoded) > _MAX_NAME_NBYTES or b"\0" in encoded:
            raise OptionError(
                f"the name of a snapshot has 1 to {_MAX_NAME_NBYTES} bytes, and no NUL, "
                f"not {name[:80]!r}",
                path=self._file.path,
            )
        numbers = [
            int(row.info.identifier) for row in self._rows if row.info.identifier.isdecimal()
        ]
        identifier = str(max(numbers, default=0) + 1).encode()
        extra = layout.SNAPSHOT_EXTRA.pack(0, self._header.virtual_size, layout.SNAPSHOT_NO_ICOUNT)
        seconds, nanoseconds = divmod(created_ns, _NANOSECONDS)
        if not 0 <= seconds <= _MAX_SECONDS:
            raise OptionError(
                f"the time of the snapshot is {created_ns} ns, allowed from 0 to "
                f"{_MAX_SECONDS * _NANOSECONDS}",
                path=self._file.path,
            )
        fixed = layout.SNAPSHOT.pack(
            0,
            self._header.l1_entries,
            len(identifier),
            len(encoded),
            seconds,
            nanoseconds,
            0,
            0,
            len(extra),
        )
        row = fixed + extra + identifier + encoded
        return row + bytes(-len(row) % 8)

    def _raw_rows(self) -> list[bytes]:
        """Return the rows as they are, with what is unknown in them."""
        ends = [row.table_nbytes for row in self._rows]
        raw = self._file.pread(self._header.snapshots_offset, ends[-1]) if ends else b""
        return [raw[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _new_rows(self, rows: list[bytes]) -> _Rows:
        """Write a snapshot table to new clusters."""
        raw = b"".join(rows)
        if len(raw) > limits.QCOW2_MAX_SNAPSHOT_TABLE_NBYTES:
            raise LimitExceededError(
                f"the snapshot table needs {len(raw)} bytes, allowed up to "
                f"{limits.QCOW2_MAX_SNAPSHOT_TABLE_NBYTES}",
                path=self._file.path,
            )
        offset = self._host.take_table(len(raw)) << self._header.cluster_bits if raw else 0
        if raw:
            self._file.put(offset, raw, Step.NEW)
        return _Rows(offset, len(rows))

    def _refer_to(self, rows: _Rows) -> None:
        """Replace the snapshot table, and free the clusters of the old one."""
        header = self._header
        old = header.snapshots_offset, sum(map(len, self._raw_rows()))
        self._file.write_steps()
        header_update.put_snapshots(self._file, header, rows.offset, rows.n_rows)
        self._file.write_steps()
        if old[1]:
            self._host.lower_counts(self._clusters(*old))

    def _size_of(self, snapshot: Snapshot) -> int:
        """Return the size of a snapshot's disk, which is stated from version 3 on."""
        size = snapshot.info.virtual_size
        if size is None or size == self._header.virtual_size:
            return self._header.virtual_size
        needed = -(-size // (self._header.l2_entries << self._header.cluster_bits))
        if size > limits.MAX_VIRTUAL_NBYTES or needed > snapshot.l1_entries:
            raise CorruptImageError(
                f"snapshot {snapshot.info.identifier} has a disk of {size} bytes, but an L1 table "
                f"of {snapshot.l1_entries} entries",
                path=self._file.path,
            )
        if self._header.bitmaps is not None:
            raise OptionError(
                f"the snapshot's disk has {size} bytes, not {self._header.virtual_size}, which "
                "the image's bitmaps do not fit",
                path=self._file.path,
            )
        return size

    def _table_of(self, snapshot: Snapshot) -> _Table:
        nbytes = snapshot.l1_entries * layout.ENTRY_NBYTES
        offset = snapshot.l1_offset
        if (
            offset % self._header.cluster_size
            or nbytes > limits.QCOW2_MAX_L1_NBYTES
            or offset + nbytes > self._file.nbytes
        ):
            raise CorruptImageError(
                f"snapshot {snapshot.info.identifier}: its L1 table of {nbytes} bytes at "
                f"{offset:#x} is misaligned, too large or outside the file",
                path=self._file.path,
                offset=offset,
            )
        return _Table(offset, snapshot.l1_entries)

    # -- refcounts and flags -----------------------------------------------------------

    @contextmanager
    def _marked_as_dirty(self) -> Iterator[None]:
        """Mark the image as dirty while refcounts and flags do not fit each other.

        What needs space is written before: a full disk does not leave the mark.
        """
        header = self._header
        if header.version < 3:
            yield
            self._file.write_steps()
            return
        at, features = layout.INCOMPATIBLE_FIELD_OFFSET, header.incompatible
        dirty = features | layout.INCOMPATIBLE_DIRTY
        self._file.write_steps()
        self._file.put(at, struct.pack(">Q", dirty), Step.REFERENCE)
        self._file.write_steps()
        yield
        self._file.write_steps()
        self._file.put(at, struct.pack(">Q", features), Step.REFERENCE)
        self._file.write_steps()

    def _require_counts(self, table: _Table, by: int) -> None:
        """Raise if the refcounts of all that an L1 table refers to cannot change."""
        for clusters in self._references(table):
            self._host.require_counts(clusters, by)

    def _count(self, table: _Table, by: int) -> None:
        """Add to the refcounts of all that an L1 table refers to."""
        for clusters in self._references(table):
            if by > 0:
                self._host.raise_counts(clusters)
            else:
                self._host.lower_counts(clusters)
            self._relieve()

    def _free(self, table: _Table) -> None:
        if table.n_entries:
            nbytes = table.n_entries * layout.ENTRY_NBYTES
            self._host.lower_counts(self._clusters(table.offset, nbytes))

    def _clusters(self, offset: int, nbytes: int) -> NDArray[np.int64]:
        bits = self._header.cluster_bits
        return np.arange(offset >> bits, (offset + nbytes - 1 >> bits) + 1, dtype=np.int64)

    def _copy_of(self, table: _Table) -> int:
        """Return the place of a copy of an L1 table, in which no flag is set."""
        nbytes = table.n_entries * layout.ENTRY_NBYTES
        if not nbytes:
            return 0
        offset = self._host.take_table(nbytes) << self._header.cluster_bits
        for first, entries in iter_l1(self._file, table.offset, 0, table.n_entries):
            plain = entries & np.uint64(layout.OFFSET_MASK)
            at = offset + first * layout.ENTRY_NBYTES
            self._file.put(at, plain.astype(_ENTRY).tobytes(), Step.NEW)
            self._relieve()
        return offset

    def _set_flags(self) -> None:
        """Set the copied flags of the active tables as the refcounts demand."""
        table = self._active
        for first, l1 in iter_l1(self._file, table.offset, 0, table.n_entries):
            offsets = l1 & np.uint64(layout.OFFSET_MASK)
            present = np.flatnonzero(offsets)
            is_single = self._is_single(offsets[present])
            flags = np.where(is_single, np.uint64(layout.COPIED), np.uint64(0))
            marked = offsets.copy()
            marked[present] |= flags
            self._put_entries(table.offset + first * layout.ENTRY_NBYTES, l1, marked)
            for l2_offset in offsets[present].tolist():
                self._set_flags_of(l2_offset)
                self._relieve()

    def _set_flags_of(self, l2_offset: int) -> None:
        raw = self._file.pread(l2_offset, self._header.cluster_size)
        entries = np.frombuffer(raw, _ENTRY).astype(np.uint64)
        offsets = entries & np.uint64(layout.OFFSET_MASK)
        is_plain = (entries & np.uint64(layout.COMPRESSED) == 0) & (offsets != 0)
        marked = np.where(is_plain, entries & ~np.uint64(layout.COPIED), entries)
        plain = np.flatnonzero(is_plain)
        is_single = self._is_single(offsets[plain])
        marked[plain[is_single]] |= np.uint64(layout.COPIED)
        self._put_entries(l2_offset, entries, marked)

    def _is_single(self, offsets: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Tell which clusters have exactly one reference."""
        clusters = offsets.astype(np.int64) >> self._header.cluster_bits
        is_single: NDArray[np.bool_] = self._host.counts.counts_of(clusters) == 1
        return is_single

    def _put_entries(self, at: int, old: NDArray[np.uint64], new: NDArray[np.uint64]) -> None:
        changed = np.flatnonzero(old != new)
        if changed.size:
            first, last = int(changed[0]), int(changed[-1]) + 1
            raw = new[first:last].astype(_ENTRY).tobytes()
            self._file.put(at + first * layout.ENTRY_NBYTES, raw, Step.REFERENCE)

    def _references(self, table: _Table) -> Iterator[NDArray[np.int64]]:
        """Yield the clusters that an L1 table's tree refers to, once for each time."""
        header, bits = self._header, self._header.cluster_bits
        step = max(1, _BATCH_ENTRIES // header.l2_entries)
        for first, l1 in iter_l1(self._file, table.offset, 0, table.n_entries):
            self._verify_l1(first, l1)
            offsets = l1 & np.uint64(layout.OFFSET_MASK)
            offsets = offsets[offsets != 0]
            for start in range(0, len(offsets), step):
                part = offsets[start : start + step]
                raw = read_entries(self._file, header, part, 0, len(part) * header.l2_entries)
                entries = raw.view(_ENTRY).astype(np.uint64)
                yield np.concatenate((part.astype(np.int64) >> bits, clusters_of(entries, bits)))

    def _verify_l1(self, first: int, l1: NDArray[np.uint64]) -> None:
        offsets = l1 & np.uint64(layout.OFFSET_MASK)
        room = np.uint64(max(self._file.nbytes - self._header.cluster_size, 0))
        bad = (offsets & np.uint64(self._header.cluster_size - 1) != 0) | (offsets > room)
        rows = np.flatnonzero(bad)
        if rows.size:
            raise CorruptImageError(
                f"L1 entry {first + int(rows[0])} ({int(l1[rows[0]]):#x}) is not cluster "
                "aligned, or outside the file",
                path=self._file.path,
            )

    def _relieve(self) -> None:
        if self._file.waiting_nbytes > _MAX_WAITING_NBYTES:
            self._file.write_steps()
