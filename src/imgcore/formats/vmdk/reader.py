"""Read VMDK disks: open their files, and find where their guest bytes are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Final

from imgcore.engine.source_file import SourceFile
from imgcore.errors import (
    CorruptImageError,
    FormatError,
    ImgcoreError,
    LimitExceededError,
    UnsafeReferenceError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.formats.api import BackingReference
from imgcore.formats.magic import is_vmdk_descriptor
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.shared.flat_reader import FlatExtents, first_lost, lost_file
from imgcore.formats.shared.windows_paths import names_beside, names_from_windows_path
from imgcore.formats.vmdk.descriptor import (
    Descriptor,
    ExtentLine,
    descriptor_without_parent,
    parse_descriptor,
)
from imgcore.formats.vmdk.extent import DiskExtent
from imgcore.formats.vmdk.header import (
    QEMU_READS,
    SparseExtent,
    open_sparse,
    read_embedded_descriptor,
    refuse_foreign_extent,
    short_last_grain,
)
from imgcore.formats.vmdk.layout import NO_PARENT_CID, SPARSE_MAGIC
from imgcore.limits import SECTOR_NBYTES, VMDK_MAX_DESCRIPTOR_NBYTES
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.host_file import HostFile
    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.formats.shared.check_report import CheckReport
    from imgcore.formats.vmdk.stream_layout import StreamLayout
    from imgcore.formats.vmdk.tables import SparseTables

_PROBE_NBYTES: Final = 65536
# Types of disks whose descriptor is embedded in the only extent.
_MONOLITHIC_TYPES: Final = frozenset({"monolithicsparse", "streamoptimized"})
_READABLE_TYPES: Final = _MONOLITHIC_TYPES | {
    "monolithicflat",
    "twogbmaxextentsparse",
    "2gbmaxextentsparse",
    "twogbmaxextentflat",
    "2gbmaxextentflat",
    "vmfs",
    "vmfsthin",
    "vmfspreallocated",
    "vmfseagerzeroedthick",
    "custom",
}
_TYPES_OF_QEMU: Final = frozenset({"vmfssparse", "sesparse"})
# The filter of vSphere that encrypts a disk.
_VM_CRYPT: Final = "vmwarevmcrypt"
_FLAT_KINDS: Final = frozenset({"FLAT", "VMFS"})


def reader_for(
    file: ByteSource, gate: ReferenceGate, _options: object, damage: Damage
) -> VmdkReader:
    """Return the reader of an image: its descriptor file, or its only extent.

    See `imgcore.formats.api.Driver`.
    """
    return VmdkReader(file, gate, damage)


class VmdkReader:
    """Reads a VMDK disk of one or several files."""

    format_name: ClassVar[str] = "vmdk"
    is_flat: ClassVar[bool] = False

    def __init__(self, file: ByteSource, gate: ReferenceGate, damage: Damage = STRICT) -> None:
        # The descriptor's file, or the only extent.
        self.file = file
        self._path = file.path
        self._damage = damage
        self._opened = ExitStack()
        self._sources: list[SourceFile] = []
        self._extents: list[DiskExtent] = []
        # Keyed by the guest offset of an extent, made when first needed.
        self._tables: dict[int, SparseTables | FlatExtents] = {}
        self.virtual_size: int = 0
        self._unopened: UnsafeReferenceError | None = None
        with self._opened:
            head = file.pread(0, min(file.nbytes, _PROBE_NBYTES))
            refuse_foreign_extent(file, head)
            if head.startswith(SPARSE_MAGIC):
                self.descriptor: Descriptor = self._open_monolithic(file)
            elif is_vmdk_descriptor(head):
                self.descriptor = self._open_described(file, gate)
            else:
                raise WrongFormatError(
                    "neither a VMDK sparse extent nor a VMDK descriptor", path=file.path
                )
            self.backing: BackingReference | None = self._find_backing()
            # Everything was opened, so the files stay open until close().
            self._opened = self._opened.pop_all()

    @property
    def identities(self) -> Mapping[str, str]:
        """The content ID, which a delta states for its parent."""
        return _content_id(self.descriptor.cid)

    @property
    def logical_sector_nbytes(self) -> int:
        """The logical sector size, 512 bytes unless the descriptor states another."""
        return self.descriptor.logical_sector_nbytes

    def raw_descriptor(self) -> tuple[bytes | None, int]:
        """Return the descriptor as it is in `file`, and where; None without one."""
        sparse = self._extents[0].sparse
        if sparse is None or sparse.file is not self.file:
            return self.file.pread(0, self.file.nbytes), 0
        return read_embedded_descriptor(sparse), sparse.descriptor_offset

    @property
    def sources(self) -> Sequence[SourceFile]:
        """The host files that extents refer to by index."""
        return self._sources

    @property
    def disk_extents(self) -> Sequence[DiskExtent]:
        """The disk's pieces in guest order."""
        return self._extents

    @property
    def subformat(self) -> str | None:
        """The kind of the files, which the descriptors of some exports misstate."""
        first = self._extents[0].sparse if len(self._extents) == 1 else None
        stated = self.descriptor.create_type
        if first is not None and stated.lower() in _MONOLITHIC_TYPES | {""}:
            return "streamOptimized" if first.is_compressed else "monolithicSparse"
        return stated or None

    @property
    def starts_with_disk(self) -> bool:
        """Whether one flat extent has the whole disk; see `MaybeFlat`."""
        first = self._extents[0]
        is_flat = first.sparse is None and first.file is not None
        return len(self._extents) == 1 and is_flat and first.file_offset == 0

    @cached_property
    def stream_layout(self) -> StreamLayout:
        """The layout of a streamOptimized disk; first use reads all grain tables."""
        from imgcore.formats.vmdk.stream_layout import find_stream_layout

        sparse = self._extents[0].sparse
        assert sparse is not None
        return find_stream_layout(sparse, self.extents(0, self.virtual_size))

    @property
    def block_nbytes(self) -> int:
        """The size of a grain in bytes, or of a sector if all extents are flat."""
        grains = [item.sparse.grain_nbytes for item in self._extents if item.sparse is not None]
        return max(grains, default=SECTOR_NBYTES)

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches that cover ``[start, start + length)`` of this layer.

        See `imgcore.formats.api.Reader.extents`.  Memory: one piece of the grain
        directory, one window of grain tables and one batch.
        """
        self.require_extents()
        stop = start + length
        for item in self._extents:
            low = max(start, item.guest_base)
            high = min(stop, item.guest_base + item.nbytes)
            if low < high:
                yield from self._extents_of(item, low, high - low)

    def _extents_of(self, item: DiskExtent, start: int, length: int) -> Iterator[Extents]:
        from imgcore.engine.extents import Kind, single
        from imgcore.formats.vmdk.table_size import refuse_contradicting_tables
        from imgcore.formats.vmdk.tables import SparseTables

        if item.is_lost:
            return iter([lost_file(start, length)])
        if item.file is None:
            return iter([single(start, length, Kind.ZERO)])
        found = self._tables.get(item.guest_base)
        if found is None:
            if item.sparse is None:
                shift = item.file_offset - item.guest_base
                held_nbytes = max(item.file.nbytes - item.file_offset, 0)
                lost_from = first_lost(item.guest_base, item.nbytes, held_nbytes)
                found = FlatExtents(
                    item.file,
                    shift=shift,
                    file_index=item.file_index,
                    lost_from=lost_from,
                )
            else:
                if not self._damage.salvages:
                    refuse_contradicting_tables(item.sparse)
                found = SparseTables(
                    item.sparse,
                    item.guest_base,
                    item.nbytes,
                    item.file_index,
                    item.short_nbytes,
                    self._damage,
                )
            self._tables[item.guest_base] = found
        return found.extents(start, length)

    def info(self) -> dict[str, Any]:
        """Return content IDs, type and extents, under the keys of ``qemu-img info``."""
        grains = {item.sparse.grain_nbytes for item in self._extents if item.sparse is not None}
        result: dict[str, Any] = {
            "cid": self.descriptor.cid,
            "parent-cid": self.descriptor.parent_cid,
            "create-type": self.descriptor.create_type or self.subformat,
            "logical-sector-size": self.logical_sector_nbytes,
            "extents": [self._extent_info(item) for item in self._extents],
        }
        if grains:
            result["cluster-size"] = max(grains)
        if any(item.sparse is not None and item.sparse.unclean_shutdown for item in self._extents):
            result["dirty-flag"] = True
        return result

    def _extent_info(self, item: DiskExtent) -> dict[str, Any]:
        result: dict[str, Any] = {"virtual-size": item.nbytes, "format": item.kind}
        if item.file is not None:
            result["filename"] = self._name_of(item.file.path)
        if item.sparse is not None:
            result["cluster-size"] = item.sparse.grain_nbytes
            if item.sparse.is_compressed:
                result["compressed"] = True
        return result

    def _name_of(self, path: str) -> str:
        """Return the path of a file beside the image as the image's own is given."""
        folder = os.path.dirname(self._path)
        prefix = os.path.join(os.path.abspath(folder or "."), "")
        return os.path.join(folder, path.removeprefix(prefix)) if path.startswith(prefix) else path

    def require_extents(self) -> None:
        """Raise UnsafeReferenceError if the gate did not open the extents.

        The disk can then be described, but not read.
        """
        if self._unopened is not None:
            raise self._unopened

    def check(self) -> CheckReport:
        """Verify grain directories, grain tables and markers of all sparse extents."""
        from imgcore.formats.vmdk.check import check_extents

        self.require_extents()
        return check_extents(self._path, self._extents)

    def close(self) -> None:
        """Close the extents that this reader opened; further calls do nothing."""
        self._opened.close()

    def _open_monolithic(self, file: ByteSource) -> Descriptor:
        """Open a sparse extent by its embedded descriptor, ignoring the name in it."""
        sparse = self._open_only_extent(file)
        descriptor = self._embedded_descriptor(sparse)
        stated = descriptor.create_type.lower()
        if sparse.is_compressed != (stated == "streamoptimized") and stated in _MONOLITHIC_TYPES:
            log.warning(
                "%s: the descriptor says %s, the header says the grains are %s; using the header",
                file.path,
                descriptor.create_type,
                "compressed" if sparse.is_compressed else "not compressed",
            )
        line = descriptor.extents[0]
        self._refuse_access(line)
        # qemu-img info shows no type for the extent of such a disk.
        self._add_sparse(sparse, line, "")
        return descriptor

    def _open_only_extent(self, file: ByteSource) -> SparseExtent:
        return open_sparse(file, self._damage)

    def _embedded_descriptor(self, sparse: SparseExtent) -> Descriptor:
        raw, path = read_embedded_descriptor(sparse), sparse.file.path
        if raw is None or not raw.strip(b"\0 \t\r\n"):
            raise UnsupportedFeatureError(
                "one extent of a disk, without a descriptor: open the disk's descriptor file",
                path=path,
            )
        try:
            descriptor = parse_descriptor(raw, path)
        except ImgcoreError as error:
            if b"parentFileNameHint" in raw:
                raise
            # The header is enough for a disk without a parent.
            self._damage.report(error)
            return descriptor_without_parent(sparse.capacity)
        self._refuse_type(descriptor)
        if len(descriptor.extents) != 1:
            raise UnsupportedFeatureError(
                f"a sparse extent whose descriptor lists {len(descriptor.extents)} extents",
                path=path,
            )
        return descriptor

    def _open_described(self, file: ByteSource, gate: ReferenceGate) -> Descriptor:
        """Open the extents that a descriptor file lists."""
        if file.nbytes > VMDK_MAX_DESCRIPTOR_NBYTES:
            raise LimitExceededError(
                f"descriptor of {file.nbytes} bytes, allowed up to {VMDK_MAX_DESCRIPTOR_NBYTES}",
                path=file.path,
            )
        descriptor = parse_descriptor(file.pread(0, file.nbytes), file.path)
        self._refuse_type(descriptor)
        if not descriptor.extents:
            raise CorruptImageError("the descriptor lists no extent", path=file.path)
        for line in descriptor.extents:
            self._refuse_access(line)
            self._refuse_kind(line)
        opened: dict[str, ByteSource] = {}
        for line in self._used_lines(descriptor):
            if line.kind == "ZERO":
                self._add(DiskExtent("ZERO", self.virtual_size, line.nbytes))
                continue
            try:
                if line.name not in opened:
                    opened[line.name] = self._open_extent(file, gate, line.name, opened)
                self._add_described(opened[line.name], line)
            except UnsafeReferenceError as error:
                if not gate.unstated:
                    raise
                self._unopened = error
                self._add(DiskExtent(line.kind, self.virtual_size, line.nbytes))
            except (FormatError, LimitExceededError, OSError) as error:
                self._lose(line, error)
        if not self._sources and any(item.is_lost for item in self._extents):
            raise CorruptImageError("none of its extents can be read", path=file.path)
        return descriptor

    def _used_lines(self, descriptor: Descriptor) -> list[ExtentLine]:
        """Return the extents that have sectors; QEMU ignores the others as well."""
        used = [line for line in descriptor.extents if line.nbytes]
        n_empty = len(descriptor.extents) - len(used)
        if n_empty and used:
            log.warning("%s: %d extents of 0 sectors are ignored", self._path, n_empty)
        return used or list(descriptor.extents)

    def _add_described(self, file: ByteSource, line: ExtentLine) -> None:
        if line.kind in _FLAT_KINDS:
            self._add_flat(file, line)
        else:
            self._add_sparse(open_sparse(file, self._damage), line, line.kind)

    def _lose(self, line: ExtentLine, error: Exception) -> None:
        """Salvage the other extents of a disk; raise the error if not salvaging."""
        if not self._damage.salvages:
            raise error
        reason = error.strerror if isinstance(error, OSError) else str(error)
        self._damage.report(
            CorruptImageError(f"its extent {line.name!r} is lost ({reason})", path=self._path)
        )
        lost = DiskExtent(line.kind, self.virtual_size, line.nbytes, is_lost=True)
        self._add(lost)

    def _open_extent(
        self, file: ByteSource, gate: ReferenceGate, name: str, opened: Mapping[str, ByteSource]
    ) -> ByteSource:
        if not name:
            raise CorruptImageError("an extent in the descriptor has no file name", path=file.path)
        extent_file = self._opened.enter_context(_open_moved(file, gate, name, opened))
        if extent_file.is_block_device:
            raise UnsupportedFeatureError(f"extent {name!r} is a block device", path=file.path)
        if extent_file.identity == file.identity:
            raise CorruptImageError("the descriptor lists itself as an extent", path=file.path)
        return extent_file

    def _refuse_type(self, descriptor: Descriptor) -> None:
        stated = descriptor.create_type
        if stated and stated.lower() not in _READABLE_TYPES:
            raise UnsupportedFeatureError(
                f"VMDK of type {stated[:60]!r}, which is not supported"
                + (f": {QEMU_READS}" if stated.lower() in _TYPES_OF_QEMU else ""),
                path=self._path,
            )
        if _VM_CRYPT in descriptor.values.get("ddb.iofilters", "").lower():
            raise UnsupportedFeatureError(
                "the disk is encrypted (ddb.iofilters): decrypt it in vSphere first",
                path=self._path,
            )

    def _refuse_access(self, line: ExtentLine) -> None:
        if line.access == "NOACCESS":
            raise UnsupportedFeatureError(
                f"access to extent {line.name!r} is not allowed (NOACCESS)", path=self._path
            )

    def _refuse_kind(self, line: ExtentLine) -> None:
        if line.kind not in _FLAT_KINDS | {"SPARSE", "ZERO"}:
            raise UnsupportedFeatureError(
                f"VMDK extent {line.name!r} of type {line.kind[:40]}, which is not supported",
                path=self._path,
            )

    def _add(self, item: DiskExtent) -> None:
        self._extents.append(item)
        self.virtual_size += item.nbytes

    def _add_flat(self, file: ByteSource, line: ExtentLine) -> None:
        end = line.offset_nbytes + line.nbytes
        if end > file.nbytes:
            self._damage.report(
                CorruptImageError(
                    f"the extent ends at {end:#x}, past the end of the file ({file.nbytes:#x})",
                    path=file.path,
                    offset=file.nbytes,
                )
            )
        self._sources.append(SourceFile(file, self.virtual_size))
        self._add(
            DiskExtent(
                line.kind,
                self.virtual_size,
                line.nbytes,
                file,
                line.offset_nbytes,
                file_index=len(self._sources) - 1,
            )
        )

    def _add_sparse(self, sparse: SparseExtent, line: ExtentLine, kind: str) -> None:
        # VirtualBox rounds the header's capacity up to whole grains; the line is exact.
        if not 0 <= sparse.capacity - line.nbytes < sparse.grain_nbytes:
            self._damage.report(
                CorruptImageError(
                    f"the descriptor says {line.nbytes // SECTOR_NBYTES} sectors, the header "
                    f"{sparse.capacity // SECTOR_NBYTES}",
                    path=sparse.file.path,
                    offset=12,
                )
            )
        base = self.virtual_size
        nbytes = min(line.nbytes, sparse.capacity)
        self._sources.append(SourceFile(sparse.file, base, sparse.grain_nbytes))
        index = len(self._sources) - 1
        short_nbytes = self._short_last_grain(sparse, nbytes)
        if short_nbytes:
            last_grain = nbytes // sparse.grain_nbytes * sparse.grain_nbytes
            self._sources.append(SourceFile(sparse.file, base + last_grain, short_nbytes))
        self._add(
            DiskExtent(
                kind,
                base,
                nbytes,
                sparse.file,
                0,
                sparse,
                index,
                short_nbytes,
            )
        )
        if nbytes < line.nbytes:
            rest = line.nbytes - nbytes
            self._add(DiskExtent(kind, self.virtual_size, rest, is_lost=True))

    def _short_last_grain(self, sparse: SparseExtent, nbytes: int) -> int:
        if not self._damage.salvages:
            return short_last_grain(sparse, nbytes)
        if not sparse.is_compressed or nbytes % sparse.grain_nbytes == 0:
            return 0
        try:
            found = short_last_grain(sparse, nbytes)
            if not found and sparse.has_markers:
                # The tables may be lost.
                from imgcore.formats.vmdk.stream_grains import StreamGrains

                grains = StreamGrains(sparse, 0, nbytes)
                place = grains.place_of(nbytes // sparse.grain_nbytes)
                found = 0 if place is None else short_last_grain(sparse, nbytes, place)
        except OSError:
            # The engine finds the grain unreadable, too.
            return 0
        return found

    def _find_backing(self) -> BackingReference | None:
        """Return the parent; a delta is never taken for a whole disk.

        The hint is a path on the machine that made the delta, perhaps a Windows path.
        If a content ID identifies the parent, names from such a path are tried as well.
        """
        hint = self.descriptor.parent_hint
        if hint and self.descriptor.parent_cid == NO_PARENT_CID:
            return BackingReference(hint, "vmdk")
        if hint:
            identities = _content_id(self.descriptor.parent_cid)
            names = names_from_windows_path(hint)
            return BackingReference(hint, "vmdk", identities, other_names=names)
        if self.descriptor.parent_cid == 0:
            # No disk has this content ID: some producers write it instead of ffffffff.
            log.warning("%s: it states no parent, but the parent's content ID 0", self._path)
            return None
        if self.descriptor.parent_cid != NO_PARENT_CID:
            raise CorruptImageError(
                "the disk is a delta of the disk with content ID "
                f"{self.descriptor.parent_cid:08x}, but the descriptor does not name its file",
                path=self._path,
            )
        return None


def _open_moved(
    file: ByteSource, gate: ReferenceGate, name: str, others: Mapping[str, ByteSource]
) -> HostFile:
    """Open an extent, or the file of its name beside the image.

    A path of another host does not lead to a file here.  A file that is another extent
    already is not used.
    """

    def opened(name: str) -> HostFile:
        return gate.open(name, share=file.share, role="extent", remedy="copy it there")

    try:
        return opened(name)
    except (FileNotFoundError, NotADirectoryError, UnsafeReferenceError) as error:
        if gate.unstated or not gate.is_foreign(name):
            raise
        for other in names_beside(name):
            if other == name:
                continue
            try:
                found = opened(other)
            except (FileNotFoundError, NotADirectoryError, UnsafeReferenceError):
                continue
            if any(found.identity == used.identity for used in others.values()):
                found.close()
                raise error
            log.warning(
                "%s: the extent %s is not on this host, %s is used", file.path, name, found.path
            )
            return found
        raise error


def _content_id(cid: int) -> dict[str, str]:
    return {"content ID": f"{cid:08x}"}
