"""QCOW2: the header, its extensions, the snapshot table and the bitmap directory.

This module does not import NumPy, so that ``info`` starts fast.
Source: QEMU docs/interop/qcow2.rst.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore import limits
from imgcore.errors import (
    CorruptImageError,
    LimitExceededError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.formats.api import BackingReference, SnapshotInfo
from imgcore.formats.qcow2 import layout
from imgcore.formats.shared.damage import STRICT, Damage

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource

_NANOSECONDS: Final = 1_000_000_000


@dataclass
class Qcow2Header:
    """A header that has passed every check; offsets and sizes in bytes."""

    version: int
    backing_offset: int
    backing_nbytes: int
    cluster_bits: int
    virtual_size: int
    l1_entries: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    n_snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = layout.V2_REFCOUNT_ORDER
    header_nbytes: int = layout.HEADER_V2_NBYTES
    compression_type: int = layout.COMPRESSION_ZLIB
    backing: BackingReference | None = None
    bitmaps: tuple[int, int, int] | None = None
    extensions: dict[int, bytes] = field(default_factory=dict)

    @property
    def cluster_size(self) -> int:
        """The size of a cluster in bytes."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """The number of entries in an L2 table."""
        return self.cluster_size // layout.ENTRY_NBYTES

    @property
    def refcount_bits(self) -> int:
        """The width of a refcount in bits."""
        return 1 << self.refcount_order

    @property
    def has_refcount_table(self) -> bool:
        """Whether the header names a refcount table; reading needs none."""
        return bool(self.refcount_table_offset and self.refcount_table_clusters)

    @property
    def is_dirty(self) -> bool:
        """Whether refcounts may be stale."""
        return bool(self.incompatible & layout.INCOMPATIBLE_DIRTY)

    @property
    def is_corrupt(self) -> bool:
        """Whether the image was marked as damaged."""
        return bool(self.incompatible & layout.INCOMPATIBLE_CORRUPT)


class Snapshot(NamedTuple):
    """One row of the snapshot table.

    ``table_nbytes`` is the length of the table up to the end of this row.
    """

    l1_offset: int
    l1_entries: int
    info: SnapshotInfo
    table_nbytes: int


class Bitmap(NamedTuple):
    """One row of the bitmap directory, which starts at host offset ``row_offset``."""

    table_offset: int
    table_entries: int
    flags: int
    kind: int
    granularity_bits: int
    name: str
    extra_nbytes: int
    row_offset: int


def read_header(file: ByteSource, damage: Damage = STRICT) -> Qcow2Header:
    """Read and check the header and its extensions.

    When salvaging, only what the L1 table and the backing file need must be sound.

    Raises
    ------
    WrongFormatError
        The magic is absent.
    CorruptImageError, LimitExceededError, UnsupportedFeatureError
        As the message says.
    """
    magic = file.pread(0, min(4, file.nbytes))
    if magic != layout.MAGIC:
        raise WrongFormatError(
            f"not a QCOW2 image: it does not start with {layout.MAGIC.hex()}",
            path=file.path,
        )
    header = _read_fixed(file)
    _check_geometry(file, header, damage)
    _read_extensions(file, header, damage)
    _check_features(file, header)
    _check_tables(file, header, damage)
    _read_backing(file, header)
    return header


def read_incompatible_features(file: ByteSource) -> int:
    """Return the incompatible feature bits without checking the rest of the header."""
    if file.nbytes < layout.HEADER_V3_MIN_NBYTES:
        return 0
    (_, version, *_) = layout.HEADER_V2.unpack(file.pread(0, layout.HEADER_V2_NBYTES))
    tail = file.pread(layout.HEADER_V2_NBYTES, layout.HEADER_V3_TAIL.size)
    return int(layout.HEADER_V3_TAIL.unpack(tail)[0]) if version >= 3 else 0


def _corrupt(file: ByteSource, message: str, offset: int | None = None) -> CorruptImageError:
    return CorruptImageError(message, path=file.path, offset=offset)


def _read_fixed(file: ByteSource) -> Qcow2Header:
    if file.nbytes < layout.HEADER_V2_NBYTES:
        raise _corrupt(file, f"header ends at {file.nbytes}, needs {layout.HEADER_V2_NBYTES} bytes")
    raw = file.pread(0, layout.HEADER_V2_NBYTES)
    (_, version, backing_offset, backing_nbytes, cluster_bits, virtual_size, crypt, *rest) = (
        layout.HEADER_V2.unpack(raw)
    )
    if version not in (2, 3):
        raise UnsupportedFeatureError(f"QCOW2 version {version}, allowed 2 and 3", path=file.path)
    header = Qcow2Header(version, backing_offset, backing_nbytes, cluster_bits, virtual_size, *rest)
    if version == 3:
        _read_v3(file, header)
    if crypt != layout.CRYPT_NONE:
        name = layout.CRYPT_NAMES.get(crypt)
        if name is None:
            raise _corrupt(file, f"encryption method {crypt}, allowed 0, 1 and 2", 32)
        raise UnsupportedFeatureError(
            f"{name} is not supported: qemu-img convert decrypts it, given the secret",
            path=file.path,
            offset=32,
        )
    return header


def _read_v3(file: ByteSource, header: Qcow2Header) -> None:
    if file.nbytes < layout.HEADER_V3_MIN_NBYTES:
        raise _corrupt(
            file, f"header ends at {file.nbytes}, needs {layout.HEADER_V3_MIN_NBYTES} bytes"
        )
    (
        header.incompatible,
        header.compatible,
        header.autoclear,
        header.refcount_order,
        header.header_nbytes,
    ) = layout.HEADER_V3_TAIL.unpack(
        file.pread(layout.HEADER_V2_NBYTES, layout.HEADER_V3_TAIL.size)
    )
    if header.header_nbytes < layout.HEADER_V3_MIN_NBYTES or header.header_nbytes % 8:
        raise _corrupt(
            file,
            f"header length is {header.header_nbytes}, allowed are multiples of 8 from "
            f"{layout.HEADER_V3_MIN_NBYTES}",
            100,
        )
    if header.header_nbytes > layout.COMPRESSION_TYPE_OFFSET:
        header.compression_type = file.pread(layout.COMPRESSION_TYPE_OFFSET, 1)[0]
    if header.refcount_order > layout.MAX_REFCOUNT_ORDER:
        raise _corrupt(
            file,
            f"refcount order is {header.refcount_order}, allowed up to {layout.MAX_REFCOUNT_ORDER}",
            96,
        )


def _check_geometry(file: ByteSource, header: Qcow2Header, damage: Damage) -> None:
    low, high = limits.QCOW2_MIN_CLUSTER_BITS, limits.QCOW2_MAX_CLUSTER_BITS
    if not low <= header.cluster_bits <= high:
        raise _corrupt(file, f"cluster bits are {header.cluster_bits}, allowed {low} to {high}", 20)
    if header.header_nbytes > header.cluster_size:
        raise _corrupt(
            file,
            f"header length is {header.header_nbytes}, allowed up to the cluster size "
            f"{header.cluster_size}",
            100,
        )
    if header.virtual_size > limits.MAX_VIRTUAL_NBYTES:
        raise LimitExceededError(
            f"virtual size is {header.virtual_size}, allowed up to {limits.MAX_VIRTUAL_NBYTES}",
            path=file.path,
            offset=24,
        )
    needed = -(-header.virtual_size // (header.cluster_size * header.l2_entries))
    l1_nbytes = max(needed, header.l1_entries) * layout.ENTRY_NBYTES
    if l1_nbytes > limits.QCOW2_MAX_L1_NBYTES:
        raise LimitExceededError(
            f"L1 table takes {l1_nbytes} bytes, allowed up to {limits.QCOW2_MAX_L1_NBYTES}",
            path=file.path,
            offset=36,
        )
    if header.l1_entries < needed:
        damage.report(
            _corrupt(
                file,
                f"L1 table has {header.l1_entries} entries, the virtual size needs {needed}",
                36,
            )
        )


def _check_features(file: ByteSource, header: Qcow2Header) -> None:
    # The bits alone decide, before any file name in the image is read.
    refused = header.incompatible & ~layout.INCOMPATIBLE_READABLE
    if refused:
        names = ", ".join(_feature_name(header, bit) for bit in range(64) if refused >> bit & 1)
        # QEMU would follow any name, so not everybody should let it read a data file.
        remedy = {
            layout.INCOMPATIBLE_EXTENDED_L2: ": qemu-img convert reads it",
            layout.INCOMPATIBLE_DATA_FILE: ": qemu-img convert reads it, if the image is trusted",
        }.get(refused, "")
        raise UnsupportedFeatureError(
            f"incompatible feature not supported: {names}{remedy}", path=file.path, offset=72
        )
    flagged = bool(header.incompatible & layout.INCOMPATIBLE_COMPRESSION)
    if flagged != (header.compression_type != layout.COMPRESSION_ZLIB):
        raise _corrupt(
            file,
            f"compression type is {header.compression_type}, but the compression feature bit is "
            f"{int(flagged)}",
            layout.COMPRESSION_TYPE_OFFSET,
        )
    if header.compression_type not in layout.COMPRESSION_NAMES:
        raise UnsupportedFeatureError(
            f"compression type {header.compression_type}, supported 0 (zlib) and 1 (zstd)",
            path=file.path,
            offset=layout.COMPRESSION_TYPE_OFFSET,
        )


def _feature_name(header: Qcow2Header, wanted_bit: int) -> str:
    known = {bit: name for kind, bit, name in layout.FEATURE_NAMES if kind == 0}
    if wanted_bit in known:
        return known[wanted_bit].decode()
    table = header.extensions.get(layout.EXTENSION_FEATURE_NAMES, b"")
    usable = len(table) - len(table) % layout.FEATURE_NAME.size
    for kind, bit, name in layout.FEATURE_NAME.iter_unpack(table[:usable]):
        text = name.rstrip(b"\0").decode("utf-8", "replace")
        if kind == layout.FEATURE_INCOMPATIBLE and bit == wanted_bit and text.isprintable():
            return f"{text} (bit {bit})"
    return f"unknown (bit {wanted_bit})"


def _read_extensions(file: ByteSource, header: Qcow2Header, damage: Damage) -> None:
    offset = header.header_nbytes
    end = min(header.backing_offset or header.cluster_size, header.cluster_size, file.nbytes)
    while offset + layout.EXTENSION.size <= end:
        kind, nbytes = layout.EXTENSION.unpack(file.pread(offset, layout.EXTENSION.size))
        offset += layout.EXTENSION.size
        if kind == layout.EXTENSION_END:
            break
        if nbytes > end - offset:
            error = _corrupt(
                file,
                f"header extension {kind:#010x} at {offset - 8:#x} has {nbytes} bytes, "
                f"allowed up to {end - offset}",
                offset - 8,
            )
            damage.report(error)
            break
        header.extensions.setdefault(kind, file.pread(offset, nbytes))
        offset += -(-nbytes // 8) * 8
    if not damage.salvages:
        _read_bitmaps_extension(file, header)


def _read_bitmaps_extension(file: ByteSource, header: Qcow2Header) -> None:
    if not header.autoclear & layout.AUTOCLEAR_BITMAPS:
        # Without the bit the bitmaps are stale.
        return
    raw = header.extensions.get(layout.EXTENSION_BITMAPS)
    if raw is None or len(raw) != layout.BITMAPS.size:
        raise _corrupt(file, "the bitmaps feature bit is set without a bitmaps extension", 88)
    n_bitmaps, _, nbytes, offset = layout.BITMAPS.unpack(raw)
    if n_bitmaps > limits.QCOW2_MAX_BITMAPS or nbytes > limits.QCOW2_MAX_BITMAP_DIRECTORY_NBYTES:
        raise LimitExceededError(
            f"{n_bitmaps} bitmaps in a directory of {nbytes} bytes, allowed up to "
            f"{limits.QCOW2_MAX_BITMAPS} in {limits.QCOW2_MAX_BITMAP_DIRECTORY_NBYTES}",
            path=file.path,
        )
    header.bitmaps = (n_bitmaps, offset, nbytes)


def _check_tables(file: ByteSource, header: Qcow2Header, damage: Damage) -> None:
    if header.l1_entries:
        _check_place(file, header, "L1 table", header.l1_offset)
        try:
            _check_end(file, "L1 table", header.l1_offset, header.l1_entries * layout.ENTRY_NBYTES)
        except CorruptImageError as error:
            damage.report(error)
    if not damage.salvages:
        _check_other_tables(file, header)


def _check_other_tables(file: ByteSource, header: Qcow2Header) -> None:
    """Check the tables that reading the active layer does not need."""
    table_nbytes = header.refcount_table_clusters * header.cluster_size
    if table_nbytes > limits.QCOW2_MAX_REFCOUNT_TABLE_NBYTES:
        raise LimitExceededError(
            f"refcount table takes {table_nbytes} bytes, allowed up to "
            f"{limits.QCOW2_MAX_REFCOUNT_TABLE_NBYTES}",
            path=file.path,
            offset=56,
        )
    if header.has_refcount_table:
        check_range(file, header, "refcount table", header.refcount_table_offset, table_nbytes)
    if header.n_snapshots > limits.QCOW2_MAX_SNAPSHOTS:
        raise LimitExceededError(
            f"{header.n_snapshots} snapshots, allowed up to {limits.QCOW2_MAX_SNAPSHOTS}",
            path=file.path,
            offset=60,
        )
    if header.n_snapshots:
        check_range(
            file,
            header,
            "snapshot table",
            header.snapshots_offset,
            header.n_snapshots * layout.SNAPSHOT.size,
        )
    if header.bitmaps is not None:
        check_range(file, header, "bitmap directory", header.bitmaps[1], header.bitmaps[2])


def check_range(file: ByteSource, header: Qcow2Header, what: str, offset: int, nbytes: int) -> None:
    """Reject a table that is misaligned, in the header's cluster, or past the end."""
    _check_place(file, header, what, offset)
    _check_end(file, what, offset, nbytes)


def _check_place(file: ByteSource, header: Qcow2Header, what: str, offset: int) -> None:
    if offset % header.cluster_size or not offset:
        raise _corrupt(
            file,
            f"{what} at {offset:#x}, allowed are nonzero multiples of the cluster size "
            f"{header.cluster_size:#x}",
            offset,
        )


def _check_end(file: ByteSource, what: str, offset: int, nbytes: int) -> None:
    if offset + nbytes > file.nbytes:
        raise _corrupt(
            file,
            f"{what} ends at {offset + nbytes:#x}, past the end of the file ({file.nbytes:#x})",
            offset,
        )


def _read_backing(file: ByteSource, header: Qcow2Header) -> None:
    offset, nbytes = header.backing_offset, header.backing_nbytes
    if not offset:
        return
    if nbytes > limits.QCOW2_MAX_BACKING_NAME_NBYTES:
        raise LimitExceededError(
            f"backing file name takes {nbytes} bytes, allowed up to "
            f"{limits.QCOW2_MAX_BACKING_NAME_NBYTES}",
            path=file.path,
            offset=16,
        )
    if offset < header.header_nbytes or offset + nbytes > header.cluster_size:
        raise _corrupt(
            file,
            f"backing file name at {offset:#x} to {offset + nbytes:#x}, allowed after the header "
            f"({header.header_nbytes:#x}) and inside the first cluster ({header.cluster_size:#x})",
            8,
        )
    if not nbytes:
        return
    name = os.fsdecode(file.pread(offset, nbytes))
    raw_format = header.extensions.get(layout.EXTENSION_BACKING_FORMAT, b"")
    stated = raw_format.rstrip(b"\0").decode("utf-8", "replace") or None
    header.backing = BackingReference(name, stated)


class _Pieces:
    """Reads many small parts of a file, ascending, with few system calls."""

    _PIECE_NBYTES: Final = 65536

    def __init__(self, file: ByteSource) -> None:
        self._file = file
        self._start = 0
        self._piece = b""

    def pread(self, offset: int, length: int) -> bytes:
        start = offset - self._start
        if start < 0 or start + length > len(self._piece):
            rest = self._file.nbytes - offset
            self._piece = self._file.pread(offset, min(rest, max(length, self._PIECE_NBYTES)))
            self._start, start = offset, 0
        return self._piece[start : start + length]


def read_snapshots(file: ByteSource, header: Qcow2Header) -> list[Snapshot]:
    """Read the snapshot table, at most QCOW2_MAX_SNAPSHOT_TABLE_NBYTES bytes."""
    snapshots = []
    position = 0
    table = _Pieces(file)
    for index in range(header.n_snapshots):
        offset = header.snapshots_offset + position
        _check_end(file, f"snapshot {index}", offset, layout.SNAPSHOT.size)
        (
            l1_offset,
            l1_entries,
            id_nbytes,
            name_nbytes,
            seconds,
            nanoseconds,
            clock,
            vm_nbytes,
            extra_nbytes,
        ) = layout.SNAPSHOT.unpack(table.pread(offset, layout.SNAPSHOT.size))
        if extra_nbytes > limits.QCOW2_MAX_SNAPSHOT_EXTRA_NBYTES:
            raise LimitExceededError(
                f"snapshot {index} has {extra_nbytes} bytes of extra data, allowed up to "
                f"{limits.QCOW2_MAX_SNAPSHOT_EXTRA_NBYTES}",
                path=file.path,
                offset=offset,
            )
        variable_nbytes = extra_nbytes + id_nbytes + name_nbytes
        _check_end(file, f"snapshot {index}", offset + layout.SNAPSHOT.size, variable_nbytes)
        variable = table.pread(offset + layout.SNAPSHOT.size, variable_nbytes)
        position += -(-(layout.SNAPSHOT.size + variable_nbytes) // 8) * 8
        if position > limits.QCOW2_MAX_SNAPSHOT_TABLE_NBYTES:
            raise LimitExceededError(
                f"snapshot table takes more than {limits.QCOW2_MAX_SNAPSHOT_TABLE_NBYTES} bytes",
                path=file.path,
                offset=header.snapshots_offset,
            )
        extra, text = variable[:extra_nbytes], variable[extra_nbytes:]
        info = SnapshotInfo(
            text[:id_nbytes].decode("utf-8", "replace"),
            text[id_nbytes:].decode("utf-8", "replace"),
            seconds * _NANOSECONDS + nanoseconds,
            vm_state_nbytes=vm_nbytes,
            vm_clock_ns=clock,
        )
        info = _with_extra(info, extra)
        snapshots.append(Snapshot(l1_offset, l1_entries, info, position))
    return snapshots


def _with_extra(info: SnapshotInfo, extra: bytes) -> SnapshotInfo:
    """Return the description of a snapshot with what its extra data adds."""
    known = extra[: layout.SNAPSHOT_EXTRA.size].ljust(layout.SNAPSHOT_EXTRA.size, b"\0")
    vm_state, virtual_size, icount = layout.SNAPSHOT_EXTRA.unpack(known)
    if len(extra) >= layout.SNAPSHOT_EXTRA_VM_STATE_NBYTES:
        info = info._replace(vm_state_nbytes=vm_state)
    if len(extra) >= layout.SNAPSHOT_EXTRA_SIZE_NBYTES:
        info = info._replace(virtual_size=virtual_size)
    if len(extra) >= layout.SNAPSHOT_EXTRA_ICOUNT_NBYTES and icount != layout.SNAPSHOT_NO_ICOUNT:
        info = info._replace(icount=icount)
    return info


def read_bitmaps(file: ByteSource, header: Qcow2Header) -> list[Bitmap]:
    """Read the bitmap directory; empty if the image has no consistent bitmaps."""
    if header.bitmaps is None:
        return []
    n_bitmaps, offset, nbytes = header.bitmaps
    raw = file.pread(offset, nbytes)
    bitmaps, position = [], 0
    for index in range(n_bitmaps):
        if position + layout.BITMAP_ENTRY.size > nbytes:
            raise _corrupt(file, f"bitmap {index} lies outside its directory", offset + position)
        table, entries, flags, kind, granularity, name_nbytes, extra_nbytes = (
            layout.BITMAP_ENTRY.unpack_from(raw, position)
        )
        start = position + layout.BITMAP_ENTRY.size + extra_nbytes
        if start + name_nbytes > nbytes:
            raise _corrupt(file, f"bitmap {index} lies outside its directory", offset + position)
        name = raw[start : start + name_nbytes].decode("utf-8", "replace")
        bitmaps.append(
            Bitmap(
                table,
                entries,
                flags,
                kind,
                min(granularity, 63),
                name,
                extra_nbytes,
                offset + position,
            )
        )
        position += -(-(start + name_nbytes - position) // 8) * 8
    return bitmaps
