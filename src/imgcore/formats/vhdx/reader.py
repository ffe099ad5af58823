"""VHDX: the reader of fixed, dynamic and differencing disks.

NumPy is imported only when the BAT is read, so that ``info`` starts fast.

Source: [MS-VHDX] Virtual Hard Disk v2 (VHDX) File Format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from imgcore.engine.source_file import SourceFile
from imgcore.formats.api import BackingReference
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.vhdx.header import MetadataItem, inherited_items, read_image
from imgcore.formats.vhdx.parent import (
    DATA_WRITE_GUID,
    LOGICAL_SECTOR_SIZE,
    PHYSICAL_SECTOR_SIZE,
    VIRTUAL_DISK_ID,
)
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.formats.api import Repair
    from imgcore.formats.shared.check_report import CheckReport
    from imgcore.formats.vhdx.header import FileHeader, VhdxImage
    from imgcore.formats.vhdx.tables import ExtentTables


def reader_for(
    file: ByteSource, _gate: ReferenceGate, _options: object, damage: Damage
) -> VhdxReader:
    """Return the reader of an image; see `imgcore.formats.api.Driver`."""
    return VhdxReader(file, damage)


class VhdxReader:
    """Reads one VHDX.

    Parameters
    ----------
    file : ByteSource
        Closed with the reader; the caller closes it if this raises.
    damage : Damage
        Decides about damaged headers, logs and tables.

    Raises
    ------
    CorruptImageError, LimitExceededError, UnsupportedFeatureError
        The image is damaged, unsupported or over a limit.

    Notes
    -----
    A log is replayed in memory; the file is never written to.  If one copy of a header
    or region table is damaged, the other one is used, with a warning in the log
    ``imgcore``.
    """

    format_name: ClassVar[str] = "vhdx"
    is_flat: ClassVar[bool] = False

    def __init__(self, file: ByteSource, damage: Damage = STRICT) -> None:
        self._file = file
        self._damage = damage
        self._image = read_image(file, damage)
        metadata = self._image.metadata
        self.subformat: str | None = "dynamic"
        if metadata.has_parent:
            self.subformat = "differencing"
        elif metadata.leave_block_allocated:
            self.subformat = "fixed"
        self.virtual_size: int = metadata.virtual_size
        self.block_nbytes: int = metadata.block_nbytes
        self.logical_sector_nbytes: int = metadata.logical_sector_nbytes
        self.backing: BackingReference | None = self._image.backing
        replayed = self._image.replayed
        files = [file] if replayed is None else [file, replayed.store]
        self.sources: Sequence[SourceFile] = [SourceFile(source) for source in files]
        self._tables: ExtentTables | None = None
        for problem in self._image.problems:
            log.warning("%s: %s", file.path, problem.line)

    @property
    def image(self) -> VhdxImage:
        """Its structures."""
        return self._image

    def note_header(self, header: FileHeader) -> None:
        """Note that the header has been changed."""
        self._image = self._image._replace(header=header)

    @property
    def identities(self) -> Mapping[str, str]:
        """Facts by which children know it; see `imgcore.formats.api.Reader`."""
        metadata = self._image.metadata
        return {
            DATA_WRITE_GUID: str(self._image.header.data_write_guid),
            LOGICAL_SECTOR_SIZE: str(metadata.logical_sector_nbytes),
            PHYSICAL_SECTOR_SIZE: str(metadata.physical_sector_nbytes),
            VIRTUAL_DISK_ID: str(metadata.virtual_disk_id),
        }

    def inherited(self) -> tuple[MetadataItem, ...]:
        """Return the metadata items that a child takes over (`Inheritable`)."""
        return inherited_items(self._image)

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches; see `imgcore.formats.api.Reader`.

        Notes
        -----
        Complexity: O(BAT entries in the range, and sectors of partially present
        blocks).  Memory: a few batches.  Thread safety: none.
        """
        if self._tables is None:
            from imgcore.formats.vhdx.tables import ExtentTables

            self._tables = ExtentTables(self._image, self._damage)
        return self._tables.extents(start, length)

    def info(self) -> dict[str, Any]:
        """Return what is specific to the format, in the keys of ``qemu-img info``."""
        image, metadata = self._image, self._image.metadata
        data: dict[str, Any] = {
            "subformat": self.subformat,
            "creator": image.creator,
            "logical-sector-size": metadata.logical_sector_nbytes,
            "physical-sector-size": metadata.physical_sector_nbytes,
            "virtual-disk-id": str(metadata.virtual_disk_id),
            "data-write-guid": str(image.header.data_write_guid),
            "file-write-guid": str(image.header.file_write_guid),
            "log-size": image.header.log_nbytes,
        }
        if image.replayed is not None:
            data["log-entries-replayed"] = image.replayed.n_entries
        if metadata.locator is not None:
            data["parent-locator"] = dict(metadata.locator)
        return {
            "cluster-size": metadata.block_nbytes,
            "dirty-flag": image.replayed is not None,
            "format-specific": {"type": "vhdx", "data": data},
        }

    def check(self) -> CheckReport:
        """Verify headers, tables and the BAT.

        Notes
        -----
        Complexity: O(BAT entries) for each 8 TiB of the file.  Memory: about 100 MiB.
        """
        from imgcore.formats.vhdx.check import VhdxChecker

        return VhdxChecker(self._image).run()

    def repairs(self, *, leaks_only: bool = False) -> list[Repair]:
        """Return the possible repairs; see `imgcore.formats.api.Repairable`."""
        from imgcore.formats.vhdx.check import find_repairs

        repairs = find_repairs(self._image)
        return [item for item in repairs if item.is_leak or not leaks_only]

    def obstacles(self, *, leaks_only: bool = False) -> list[str]:
        """Return why problems are not repaired; see `Repairable`."""
        from imgcore.formats.vhdx.check import find_obstacles

        return find_obstacles(self._image, leaks_only=leaks_only)

    def close(self) -> None:
        """Close the file; more than once is allowed."""
        for source in self.sources:
            source.file.close()
