"""Read QCOW2 images of versions 2 and 3.

NumPy is imported only when tables are read, so that ``info`` starts fast.
Source: QEMU docs/interop/qcow2.rst.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from imgcore.engine.source_file import SourceFile
from imgcore.errors import UnsupportedFeatureError
from imgcore.formats.api import BackingReference, SnapshotInfo
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.header import (
    Qcow2Header,
    read_bitmaps,
    read_header,
    read_snapshots,
)
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.shared.last_sector import filled_up, whole_sectors
from imgcore.formats.shared.snapshot_row import snapshot_row
from imgcore.formats.shared.stream_end import ends_early, goes_on

if TYPE_CHECKING:
    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.formats.api import Repair
    from imgcore.formats.qcow2.tables import ExtentTables
    from imgcore.formats.shared.check_report import CheckReport


def reader_for(
    file: ByteSource, _gate: ReferenceGate, _options: object, damage: Damage
) -> Qcow2Reader:
    """Return the reader of an image; see `imgcore.formats.api.Driver`."""
    return Qcow2Reader(file, damage)


class Qcow2Reader:
    """Reads one QCOW2 layer.

    Parameters
    ----------
    file : ByteSource
        Closed with the reader.  If the constructor raises, the caller closes it.
    damage : Damage
        When salvaging, refcounts, snapshots and bitmaps are not looked at.

    Raises
    ------
    WrongFormatError
        The magic is absent.
    CorruptImageError, LimitExceededError, UnsupportedFeatureError
        The header is invalid, exceeds a limit or needs an unsupported feature.

    Notes
    -----
    An image that is marked dirty or corrupt is read, with a warning in the log
    ``imgcore``.  Dirty means that refcounts may be stale, which reading does not need.
    Corrupt forbids writing only.
    """

    format_name: ClassVar[str] = "qcow2"
    is_flat: ClassVar[bool] = False

    def __init__(self, file: ByteSource, damage: Damage = STRICT) -> None:
        self._file = file
        self._damage = damage
        self._header = read_header(file, damage)
        self.subformat: str | None = None
        self.virtual_size: int = whole_sectors(self._header.virtual_size, file.path)
        self.block_nbytes: int = self._header.cluster_size
        self.backing: BackingReference | None = self._header.backing
        self.identities: Mapping[str, str] = {}
        self.sources: Sequence[SourceFile] = (
            SourceFile(file, guest_base=0, block_nbytes=self._header.cluster_size),
        )
        self._tables: ExtentTables | None = None
        self._warn()

    @property
    def file(self) -> ByteSource:
        """The image's file."""
        return self._file

    @property
    def header(self) -> Qcow2Header:
        """The header, which changes when the image is written in place."""
        return self._header

    def _warn(self) -> None:
        header = self._header
        if header.has_refcount_table and not header.is_dirty and not header.is_corrupt:
            return
        from imgcore.log import log

        if header.is_dirty:
            log.warning(
                "%s: the image was not closed cleanly, its refcounts may be stale", self._file.path
            )
        if not header.has_refcount_table:
            log.warning(
                "%s: the image has no refcount table; check -r all rebuilds it", self._file.path
            )
        if header.is_corrupt:
            log.warning(
                "%s: the image is marked as corrupt, its data may be wrong", self._file.path
            )

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches; see `imgcore.formats.api.Reader`.

        Notes
        -----
        Complexity: O(L2 entries that exist in the range).  Memory: one batch and 1 MiB
        of the L1 table.  Not thread-safe.
        """
        if self._tables is None:
            from imgcore.formats.qcow2.tables import ExtentTables

            self._tables = ExtentTables(self._file, self._header, self._damage)
        n_filled = max(0, start + length - self._header.virtual_size)
        batches = self._tables.extents(start, length - n_filled)
        return filled_up(batches, start + length) if n_filled else batches

    def verify_end(self, read_rest: Callable[[], tuple[int, bytes]]) -> None:
        """Raise unless all refcounts came; see `EndsItself`."""
        needed, is_known = self._refcounts_end()
        end, _ = read_rest()
        if needed > self._file.nbytes:
            raise ends_early(self._file.path, self._file.nbytes, needed)
        # Snapshots and bitmaps have clusters that are not read.
        has_others = self._header.n_snapshots or self._header.bitmaps is not None
        if is_known and not has_others and end > needed:
            raise goes_on(self._file.path, end)

    def _refcounts_end(self) -> tuple[int, bool]:
        """Return the end of the refcount table and its blocks, and whether it is known.

        It is not if the table was among the blocks of a stream.
        """
        header = self._header
        if not header.has_refcount_table:
            return 0, False
        nbytes = header.refcount_table_clusters * header.cluster_size
        end = header.refcount_table_offset + nbytes
        try:
            table = self._file.pread(header.refcount_table_offset, nbytes)
        except UnsupportedFeatureError:
            return end, False
        last = max(offset for (offset,) in struct.iter_unpack(">Q", table))
        return max(end, last + header.cluster_size if last else 0), True

    def info(self) -> dict[str, Any]:
        """Return what ``qemu-img info`` reports about the format, under its keys."""
        header = self._header
        info: dict[str, Any] = {
            "cluster-size": header.cluster_size,
            "dirty-flag": header.is_dirty,
            "format-specific": {"type": "qcow2", "data": self._format_specific()},
        }
        if header.backing is not None:
            info["backing-filename"] = header.backing.name
            if header.backing.format is not None:
                info["backing-filename-format"] = header.backing.format
        if header.n_snapshots:
            info["snapshots"] = [snapshot_row(snapshot) for snapshot in self.snapshots()]
        return info

    def _format_specific(self) -> dict[str, Any]:
        header = self._header
        data: dict[str, Any] = {
            "compat": "1.1" if header.version >= 3 else "0.10",
            "compression-type": layout.COMPRESSION_NAMES[header.compression_type],
            "refcount-bits": header.refcount_bits,
        }
        if header.version < 3:
            return data
        lazy = bool(header.compatible & layout.COMPATIBLE_LAZY_REFCOUNTS)
        data |= {"lazy-refcounts": lazy, "corrupt": header.is_corrupt, "extended-l2": False}
        bitmaps = read_bitmaps(self._file, header)
        if bitmaps:
            data["bitmaps"] = [
                {
                    "flags": [name for bit, name in layout.BITMAP_FLAGS if bitmap.flags & bit],
                    "name": bitmap.name,
                    "granularity": 1 << bitmap.granularity_bits,
                }
                for bitmap in bitmaps
            ]
        return data

    def snapshots(self) -> list[SnapshotInfo]:
        """Return the internal snapshots; see `HasSnapshots`."""
        return [snapshot.info for snapshot in read_snapshots(self._file, self._header)]

    def left_out(self) -> list[str]:
        """Name snapshots and bitmaps: a conversion carries over the disk of today."""
        header = self._header
        found = []
        if header.n_snapshots:
            found.append(
                f"internal snapshots ({header.n_snapshots}) are left out; "
                "qemu-img convert -l NAME makes an image of one"
            )
        if header.bitmaps is not None and header.bitmaps[0]:
            found.append(
                f"persistent bitmaps ({header.bitmaps[0]}) are left out: the next incremental "
                "backup of the target must be a full one; qemu-img convert --bitmaps keeps them"
            )
        return found

    def bitmap_areas(self, name: str) -> Iterator[tuple[int, int]]:
        """Yield the ranges that a persistent bitmap has marked; see `HasBitmaps`.

        Notes
        -----
        Complexity: O(bits that are in the file).  Memory: at most 40 MiB.
        """
        from imgcore.formats.qcow2.bitmaps import dirty_ranges

        return dirty_ranges(self._file, self._header, name)

    def refuse_rewriting(self) -> None:
        """Raise if the image is marked as corrupt; see `RefusesRewriting`."""
        if self._header.is_corrupt:
            raise UnsupportedFeatureError(
                "the image is marked as corrupt: imgcore check tells why, and imgcore convert "
                "makes a new image of what it reads",
                path=self._file.path,
            )

    def conflicts(self) -> CheckReport:
        """Report what is used twice; see `KnowsConflicts`."""
        from imgcore.formats.qcow2.check import ConflictFinder

        return ConflictFinder(self._file, self._header).run()

    def check(self) -> CheckReport:
        """Compare all refcounts with the references that exist.

        Notes
        -----
        Complexity: O(L2 entries) for each 2^23 clusters of the file.  Memory: about
        250 MiB.
        """
        from imgcore.formats.qcow2.check import Qcow2Checker

        return Qcow2Checker(self._file, self._header).run()

    def repairs(self, *, leaks_only: bool = False) -> list[Repair]:
        """Return how to correct refcounts and copied flags; see `Repairable`."""
        from imgcore.formats.qcow2.repair import RefcountRepair

        return RefcountRepair(self._file, self._header, leaks_only=leaks_only).repairs()

    def obstacles(self, *, leaks_only: bool = False) -> list[str]:
        """Return why problems are not repaired; see `Repairable`."""
        from imgcore.formats.qcow2.repair import RefcountRepair

        return RefcountRepair(self._file, self._header, leaks_only=leaks_only).obstacles()

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        self._file.close()
