"""VDI: the reader of dynamic, fixed and differencing images.

Source: VirtualBox src/VBox/Storage/VDICore.h.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from imgcore.engine.source_file import SourceFile
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.vdi.header import VdiHeader, read_header

if TYPE_CHECKING:
    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.formats.api import BackingReference, Repair
    from imgcore.formats.shared.check_report import CheckReport
    from imgcore.formats.vdi.tables import ExtentTables


def reader_for(
    file: ByteSource, gate: ReferenceGate, _options: object, damage: Damage
) -> VdiReader:
    """Return the reader of an image; see `imgcore.formats.api.Driver`."""
    return VdiReader(file, gate, damage)


class VdiReader:
    """Reads one VDI.

    Parameters
    ----------
    file : ByteSource
        Closed with the reader; the caller closes it if this raises.
    gate : ReferenceGate
        Opens the files among which the parent is searched.
    damage : Damage
        Decides about a damaged block map.

    Raises
    ------
    WrongFormatError
        The signature is absent.
    CorruptImageError, LimitExceededError, UnsupportedFeatureError
        The header is damaged, unsupported or over a limit.
    """

    format_name: ClassVar[str] = "vdi"
    is_flat: ClassVar[bool] = False

    def __init__(self, file: ByteSource, gate: ReferenceGate, damage: Damage = STRICT) -> None:
        self._file = file
        self._gate = gate
        self._damage = damage
        self.header: VdiHeader = read_header(file, damage)
        self.subformat: str | None = self.header.subformat
        self.virtual_size: int = self.header.virtual_size
        self.block_nbytes: int = self.header.block_nbytes
        self.sources: Sequence[SourceFile] = (SourceFile(file),)
        self.identities: Mapping[str, str] = self.header.identities
        self._backing: BackingReference | None = None
        self._tables: ExtentTables | None = None

    @property
    def backing(self) -> BackingReference | None:
        """The parent; the first use searches for it by its UUID."""
        if self._backing is None and self.header.parent_uuid is not None:
            from imgcore.formats.vdi.parent import find_parent

            self._backing = find_parent(self.header, self._gate, self._file.path)
        return self._backing

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches; see `imgcore.formats.api.Reader`.

        Notes
        -----
        Complexity: O(blocks in the range).  Memory: one piece of the block map and one
        batch.
        """
        if self._tables is None:
            from imgcore.formats.vdi.tables import ExtentTables

            self._tables = ExtentTables(self._file, self.header, self._damage)
        return self._tables.extents(start, length)

    def info(self) -> dict[str, Any]:
        """Return UUIDs and the kind of image, in the keys of ``qemu-img info``."""
        header = self.header
        data: dict[str, Any] = {
            "subformat": header.subformat,
            "uuid": str(header.uuid),
            "modification-uuid": str(header.modification_uuid),
            "allocated-blocks": header.n_allocated,
        }
        if header.parent_uuid is not None:
            data["parent-uuid"] = str(header.parent_uuid)
        if header.parent_modification_uuid is not None:
            data["parent-modification-uuid"] = str(header.parent_modification_uuid)
        if header.comment:
            data["comment"] = header.comment
        return {
            "cluster-size": header.block_nbytes,
            "format-specific": {"type": "vdi", "data": data},
        }

    def check(self) -> CheckReport:
        """Find blocks outside the file, blocks used twice, and leaked blocks.

        Notes
        -----
        Complexity: O(blocks) for each 2^26 blocks of the file.  Memory: up to 64 MiB.
        """
        from imgcore.formats.vdi.check import check

        return check(self._file, self.header)

    def repairs(self, *, leaks_only: bool = False) -> list[Repair]:
        """Return the possible repairs; see `imgcore.formats.api.Repairable`."""
        from imgcore.formats.vdi.check import find_repairs

        repairs = find_repairs(self._file, self.header)
        return [item for item in repairs if item.is_leak or not leaks_only]

    def obstacles(self, *, leaks_only: bool = False) -> list[str]:
        """Return why problems are not repaired; see `Repairable`."""
        from imgcore.formats.vdi.check import find_obstacles

        return find_obstacles(self._file, self.header, leaks_only=leaks_only)

    def close(self) -> None:
        """Close the file; more than once is allowed."""
        self._file.close()
