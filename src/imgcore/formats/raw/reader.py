"""Raw: the reader of files and block devices that hold only the guest's bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from imgcore.engine.source_file import SourceFile
from imgcore.formats.shared.flat_reader import FlatExtents
from imgcore.formats.shared.last_sector import whole_sectors
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.formats.api import BackingReference
    from imgcore.formats.shared.check_report import CheckReport
    from imgcore.formats.shared.damage import Damage


def reader_for(
    file: ByteSource, _gate: ReferenceGate, _options: object, _damage: Damage
) -> RawReader:
    """Return the reader of an image; see `imgcore.formats.api.Driver`."""
    return RawReader(file)


class RawReader:
    """Reads a raw file or block device; closing the reader closes it."""

    format_name: ClassVar[str] = "raw"
    is_flat: ClassVar[bool] = True

    def __init__(self, file: ByteSource) -> None:
        self.file = file
        self.subformat: str | None = None
        self.virtual_size: int = whole_sectors(file.nbytes, file.path)
        self.block_nbytes: int = SECTOR_NBYTES
        self.logical_sector_nbytes: int | None = (
            file.logical_sector_nbytes if file.is_block_device else None
        )
        self.sources: tuple[SourceFile] = (SourceFile(file),)
        self.backing: BackingReference | None = None
        self.identities: Mapping[str, str] = {}
        self._flat = FlatExtents(file, hides_parent=False)

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield batches of DATA and HOLE; see `imgcore.formats.api.Reader.extents`."""
        return self._flat.extents(start, length)

    def info(self) -> dict[str, Any]:
        """Return nothing: a raw disk has no properties of its format."""
        return {}

    def check(self) -> CheckReport:
        """Return an empty report: a raw disk has no tables."""
        from imgcore.formats.shared.check_report import CheckReport

        return CheckReport()

    def close(self) -> None:
        """Close the file."""
        self.file.close()
