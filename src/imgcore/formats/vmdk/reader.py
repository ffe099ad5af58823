"""Opening VMDK disks: which files they consist of, and where their guest bytes are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Final

from imgcore.engine.sources import SourceFile
from imgcore.errors import (
    CorruptImageError,
    LimitExceededError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.formats.api import BackingReference, CheckReport
from imgcore.formats.magic import is_vmdk_descriptor
from imgcore.formats.shared.windows_paths import names_from_windows_path
from imgcore.formats.vmdk.descriptor import Descriptor, ExtentLine, parse_descriptor
from imgcore.formats.vmdk.extent import DiskExtent
from imgcore.formats.vmdk.header import (
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
    from imgcore.files.gate import ReferenceGate
    from imgcore.formats.vmdk.stream_layout import StreamLayout
    from imgcore.formats.vmdk.tables import SparsePlanner

_PROBE_NBYTES: Final = 65536
# Types of disks whose descriptor lies in the only extent.
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
_FLAT_KINDS: Final = frozenset({"FLAT", "VMFS"})


class VmdkReader:
    """A VMDK disk of one or several files."""

    format_name: ClassVar[str] = "vmdk"
    is_flat: ClassVar[bool] = False

    def __init__(self, file: ByteSource, gate: ReferenceGate) -> None:
        self._path = file.path
        self._opened = ExitStack()
        self._sources: list[SourceFile] = []
        self._extents: list[DiskExtent] = []
        self._planners: dict[int, SparsePlanner] = {}
        self.virtual_size = 0
        with self._opened:
            head = file.pread(0, min(file.nbytes, _PROBE_NBYTES))
            refuse_foreign_extent(file, head)
            if head.startswith(SPARSE_MAGIC):
                self.descriptor = self._open_monolithic(file)
            elif is_vmdk_descriptor(head):
                self.descriptor = self._open_described(file, gate)
            else:
                raise WrongFormatError(
                    "neither a VMDK sparse extent nor a VMDK descriptor", path=file.path
                )
            self.backing = self._find_backing()
            # Opened without a failure: they stay open until close.
            self._opened = self._opened.pop_all()

    @property
    def identities(self) -> Mapping[str, str]:
        """What a delta of this disk states as its parent's."""
        return _content_id(self.descriptor.cid)

    @property
    def logical_sector_nbytes(self) -> int:
        """Bytes of a logical sector, 512 unless the descriptor states another size."""
        return self.descriptor.logical_sector_nbytes

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
        """What the files are, which differs from the descriptor's word in some exports."""
        first = self._extents[0].sparse if len(self._extents) == 1 else None
        stated = self.descriptor.create_type
        if first is not None and stated.lower() in _MONOLITHIC_TYPES | {""}:
            return "streamOptimized" if first.is_compressed else "monolithicSparse"
        return stated or None

    @cached_property
    def stream_layout(self) -> StreamLayout:
        """Where the grains of a streamOptimized disk lie; all grain tables are read for it."""
        from imgcore.formats.vmdk.stream_layout import find_stream_layout

        sparse = self._extents[0].sparse
        assert sparse is not None
        return find_stream_layout(sparse, self.plan(0, self.virtual_size))

    @property
    def block_nbytes(self) -> int:
        """Bytes of a grain; of a sector for a disk of flat extents."""
        grains = [item.sparse.grain_nbytes for item in self._extents if item.sparse is not None]
        return max(grains, default=SECTOR_NBYTES)

    def plan(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches that cover ``[start, start + length)`` of this layer.

        See :meth:`imgcore.formats.api.Reader.plan`.  Memory is one piece of the grain
        directory, one window of grain tables and one batch.
        """
        from imgcore.engine.extents import Kind, single
        from imgcore.formats.shared.flat import plan_flat

        stop = start + length
        if start < 0 or length < 0 or stop > self.virtual_size:
            raise ValueError(f"[{start}, {stop}) is not inside {self.virtual_size} bytes")
        for item in self._extents:
            low = max(start, item.guest_base)
            high = min(stop, item.guest_base + item.nbytes)
            if low >= high:
                continue
            if item.sparse is not None:
                yield from self._planner(item).plan(low, high)
            elif item.file is not None:
                yield from plan_flat(
                    item.file, item.file_offset, low, high, item.guest_base, item.file_index
                )
            else:
                yield single(low, high - low, Kind.ZERO)

    def _planner(self, item: DiskExtent) -> SparsePlanner:
        from imgcore.formats.vmdk.tables import SparsePlanner

        planner = self._planners.get(item.guest_base)
        if planner is None:
            assert item.sparse is not None
            planner = SparsePlanner(
                item.sparse, item.guest_base, item.nbytes, item.file_index, item.short_nbytes
            )
            self._planners[item.guest_base] = planner
        return planner

    def info(self) -> dict[str, Any]:
        """Return content IDs, type and extents, in the keys of ``qemu-img info``."""
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
            result["filename"] = item.file.path
        if item.sparse is not None:
            result["cluster-size"] = item.sparse.grain_nbytes
            if item.sparse.is_compressed:
                result["compressed"] = True
        return result

    def check(self) -> CheckReport:
        """Verify grain directories, grain tables and markers of all sparse extents."""
        from imgcore.formats.vmdk.check import check_extents

        return check_extents(self._path, self._extents)

    def close(self) -> None:
        """Close the extents that this reader opened; more than once is allowed."""
        self._opened.close()

    def _open_monolithic(self, file: ByteSource) -> Descriptor:
        """Open a sparse extent with its descriptor inside, whatever name that one gives it."""
        sparse = open_sparse(file)
        raw = read_embedded_descriptor(sparse)
        if raw is None or not raw.strip(b"\0 \t\r\n"):
            raise UnsupportedFeatureError(
                "one extent of a disk, without a descriptor: open the file that describes the disk",
                path=file.path,
            )
        descriptor = parse_descriptor(raw, file.path)
        self._refuse_type(descriptor)
        if len(descriptor.extents) != 1:
            raise UnsupportedFeatureError(
                f"a sparse extent whose descriptor lists {len(descriptor.extents)} extents",
                path=file.path,
            )
        stated = descriptor.create_type.lower()
        if sparse.is_compressed != (stated == "streamoptimized") and stated in _MONOLITHIC_TYPES:
            log.warning(
                "%s: the descriptor says %s, the header says the grains are %s; reading them so",
                file.path,
                descriptor.create_type,
                "compressed" if sparse.is_compressed else "not compressed",
            )
        line = descriptor.extents[0]
        self._refuse_access(line)
        self._add_sparse(sparse, line, "SPARSE")
        return descriptor

    def _open_described(self, file: ByteSource, gate: ReferenceGate) -> Descriptor:
        """Open the extents that a descriptor file lists."""
        if file.nbytes > VMDK_MAX_DESCRIPTOR_NBYTES:
            raise LimitExceededError(
                f"descriptor of {file.nbytes} bytes, allowed are {VMDK_MAX_DESCRIPTOR_NBYTES}",
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
        for line in descriptor.extents:
            if line.kind == "ZERO":
                self._add(DiskExtent("ZERO", self.virtual_size, line.nbytes))
                continue
            if line.name not in opened:
                opened[line.name] = self._open_extent(file, gate, line.name)
            extent_file = opened[line.name]
            if line.kind in _FLAT_KINDS:
                self._add_flat(extent_file, line)
            else:
                self._add_sparse(open_sparse(extent_file), line, line.kind)
        return descriptor

    def _open_extent(self, file: ByteSource, gate: ReferenceGate, name: str) -> ByteSource:
        if not name:
            raise CorruptImageError("an extent of the descriptor names no file", path=file.path)
        extent_file = self._opened.enter_context(gate.open(name, share=file.share))
        if extent_file.is_block_device:
            raise UnsupportedFeatureError(f"extent {name!r} is a block device", path=file.path)
        if extent_file.identity == file.identity:
            raise CorruptImageError("the descriptor lists itself as an extent", path=file.path)
        return extent_file

    def _refuse_type(self, descriptor: Descriptor) -> None:
        stated = descriptor.create_type
        if stated and stated.lower() not in _READABLE_TYPES:
            raise UnsupportedFeatureError(f"VMDK of type {stated[:60]!r}", path=self._path)

    def _refuse_access(self, line: ExtentLine) -> None:
        if line.access == "NOACCESS":
            raise UnsupportedFeatureError(
                f"extent {line.name!r} may not be accessed (NOACCESS)", path=self._path
            )

    def _refuse_kind(self, line: ExtentLine) -> None:
        if line.kind not in _FLAT_KINDS | {"SPARSE", "ZERO"}:
            raise UnsupportedFeatureError(
                f"VMDK extent {line.name!r} of type {line.kind[:40]}", path=self._path
            )

    def _add(self, item: DiskExtent) -> None:
        self._extents.append(item)
        self.virtual_size += item.nbytes

    def _add_flat(self, file: ByteSource, line: ExtentLine) -> None:
        end = line.offset_nbytes + line.nbytes
        if end > file.nbytes:
            raise CorruptImageError(
                f"the extent ends at {end:#x}, past the end of the file ({file.nbytes:#x})",
                path=file.path,
                offset=file.nbytes,
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
        # VirtualBox rounds the header's capacity up to whole grains; the line has the true size.
        if not 0 <= sparse.capacity - line.nbytes < sparse.grain_nbytes:
            raise CorruptImageError(
                f"the descriptor says {line.nbytes // SECTOR_NBYTES} sectors, the header "
                f"{sparse.capacity // SECTOR_NBYTES}",
                path=sparse.file.path,
                offset=12,
            )
        base = self.virtual_size
        self._sources.append(SourceFile(sparse.file, base, sparse.grain_nbytes))
        index = len(self._sources) - 1
        short_nbytes = short_last_grain(sparse, line.nbytes)
        if short_nbytes:
            last_grain = line.nbytes // sparse.grain_nbytes * sparse.grain_nbytes
            self._sources.append(SourceFile(sparse.file, base + last_grain, short_nbytes))
        self._add(
            DiskExtent(
                kind,
                base,
                line.nbytes,
                sparse.file,
                0,
                sparse,
                index,
                short_nbytes,
            )
        )

    def _find_backing(self) -> BackingReference | None:
        """Return the parent; a delta is never taken for a whole disk.

        The hint is a path of the machine that the delta was made on, which may be one of
        Windows: where the content ID tells the parent, it is looked for as that means it here.
        """
        hint = self.descriptor.parent_hint
        if hint and self.descriptor.parent_cid == NO_PARENT_CID:
            return BackingReference(hint, "vmdk")
        if hint:
            identities = _content_id(self.descriptor.parent_cid)
            names = names_from_windows_path(hint)
            return BackingReference(hint, "vmdk", identities, other_names=names)
        if self.descriptor.parent_cid != NO_PARENT_CID:
            raise CorruptImageError(
                f"the disk is a delta of the one with content ID {self.descriptor.parent_cid:08x}, "
                "but the descriptor does not name that file",
                path=self._path,
            )
        return None


def _content_id(cid: int) -> dict[str, str]:
    return {"content ID": f"{cid:08x}"}
