"""VHD: the reader of fixed, dynamic and differencing disks.

Sources: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0; libvhdi,
"Virtual Hard Disk (VHD) image format".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from imgcore.engine.source_file import SourceFile
from imgcore.errors import CorruptImageError
from imgcore.formats.api import BackingReference
from imgcore.formats.options import FormatOptions, choice
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.shared.flat_reader import FlatExtents, first_lost
from imgcore.formats.vhd import layout
from imgcore.formats.vhd.header import VhdHeader, parent_texts, read_header, uuid_text
from imgcore.formats.vhd.layout import DiskType
from imgcore.formats.vhd.parent import find_parent
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.formats.api import Repair
    from imgcore.formats.shared.check_report import CheckReport
    from imgcore.formats.vhd.tables import ExtentTables

_SUBFORMATS: Final = {
    DiskType.FIXED: "fixed",
    DiskType.DYNAMIC: "dynamic",
    DiskType.DIFFERENCING: "differencing",
}


class ReadOptions(FormatOptions):
    """The options for reading."""

    size: str | None = choice(
        None, ("chs", "current"), "The size to use, regardless of the creator"
    )


def reader_for(
    file: ByteSource, _gate: ReferenceGate, options: ReadOptions, damage: Damage
) -> VhdReader:
    """Return the reader of an image; see `imgcore.formats.api.Driver`."""
    return VhdReader(file, options.size, damage)


class VhdReader:
    """Reads one VHD.

    Parameters
    ----------
    file : ByteSource
        Closed with the reader; the caller closes it if this raises.
    size : str, optional
        ``chs`` or ``current``: the size to use; by default, the one the creator uses.
    damage : Damage
        Decides about damaged headers, tables and bitmaps.

    Raises
    ------
    WrongFormatError
        There is no footer.
    CorruptImageError, LimitExceededError, UnsupportedFeatureError
        No footer is sound, or a header is damaged, unsupported or over a limit.

    Notes
    -----
    If the footer or its copy is damaged, the other one is used, with a warning in the
    log ``imgcore``.
    """

    format_name: ClassVar[str] = "vhd"
    is_flat: ClassVar[bool] = False

    def __init__(self, file: ByteSource, size: str | None = None, damage: Damage = STRICT) -> None:
        self._file = file
        self._damage = damage
        self.header: VhdHeader = read_header(file, size, damage)
        self.backing: BackingReference | None = find_parent(file, self.header)
        self.subformat: str | None = _SUBFORMATS[self.header.disk_type]
        self.virtual_size: int = self.header.size.nbytes
        dynamic = self.header.dynamic
        self.block_nbytes: int = SECTOR_NBYTES if dynamic is None else dynamic.block_nbytes
        self.sources: tuple[SourceFile] = (SourceFile(file),)
        self._footer_moves = False
        self._tables: ExtentTables | FlatExtents | None = None
        if dynamic is None:
            end = self.header.end
            assert end is not None
            lost_from = first_lost(0, self.virtual_size, end.offset)
            self._tables = FlatExtents(file, lost_from=lost_from)

    @property
    def identities(self) -> Mapping[str, str]:
        """The UUID by which a differencing disk identifies its parent."""
        return {"UUID": uuid_text(self.header.footer.uuid)}

    @property
    def starts_with_disk(self) -> bool:
        """Whether this is a fixed disk; see `imgcore.formats.api.MaybeFlat`."""
        return self.header.disk_type is DiskType.FIXED

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches; see `imgcore.formats.api.Reader`.

        Notes
        -----
        Complexity: O(BAT entries of the range), and one read for the sector bitmap of
        each block.  Memory: one batch and 1 MiB of bitmaps.
        """
        if self._tables is None:
            from imgcore.formats.vhd.tables import ExtentTables

            self._tables = ExtentTables(
                self._file, self.header, self._damage, footer_moves=self._footer_moves
            )
        return self._tables.extents(start, length)

    def verify_end(self, read_rest: Callable[[], tuple[int, bytes]]) -> None:
        """Raise unless the footer ends the stream; see `EndsItself`."""
        content = self._file.pread(0, layout.FOOTER_NBYTES).rstrip(b"\0")
        end, tail = read_rest()
        start, nbytes = end - len(content), self._file.nbytes
        if not end or nbytes < start + layout.FOOTER_NBYTES:
            raise CorruptImageError(
                f"the stream ends after {nbytes} bytes without a footer: it is not complete",
                path=self._file.path,
                offset=nbytes,
            )
        if start % SECTOR_NBYTES or not tail.endswith(content):
            raise CorruptImageError(
                "the stream does not end with a footer that is the same as its copy at the "
                "start: it is not complete, or other bytes follow",
                path=self._file.path,
                offset=end,
            )

    def let_footer_move(self) -> None:
        """Expect blocks where the footer is now: the image is written in place."""
        self._footer_moves = True

    def info(self) -> dict[str, Any]:
        """Return the fields of the footer and the headers."""
        footer, size = self.header.footer, self.header.size
        data: dict[str, Any] = {
            "subformat": self.subformat,
            "creator": printable(footer.creator),
            "creator-version": f"{footer.creator_version >> 16}.{footer.creator_version & 0xFFFF}",
            "creator-os": printable(footer.creator_os),
            "uuid": uuid_text(footer.uuid),
            "timestamp": footer.timestamp + layout.EPOCH_UNIX_SECONDS,
            "size": {
                "from": size.field,
                "because": size.because,
                "current": footer.current_size,
                "chs": self.header.chs_nbytes,
            },
            "geometry": {
                "cylinders": footer.cylinders,
                "heads": footer.heads,
                "sectors": footer.sectors_per_track,
            },
            "saved-state": bool(footer.saved_state),
        }
        info: dict[str, Any] = {"format-specific": {"type": "vhd", "data": data}}
        dynamic = self.header.dynamic
        if dynamic is not None:
            info["cluster-size"] = dynamic.block_nbytes
        if dynamic is not None and self.header.disk_type is DiskType.DIFFERENCING:
            data["parent-uuid"] = uuid_text(dynamic.parent_uuid)
            data["parent-timestamp"] = dynamic.parent_timestamp + layout.EPOCH_UNIX_SECONDS
            data["parent-names"] = [
                {"locator": printable(code) or "header", "name": text}
                for code, text in parent_texts(self._file, self.header)[0]
            ]
        return info

    def check(self) -> CheckReport:
        """Verify footers, headers, BAT and batmap; a fixed disk has only its footer.

        Notes
        -----
        Complexity: O(n log n) in BAT entries.  Memory: about 60 bytes for each.
        """
        from imgcore.formats.vhd.check import check_image

        return check_image(self._file, self.header)

    def repairs(self, *, leaks_only: bool = False) -> list[Repair]:
        """Return the possible repairs; see `imgcore.formats.api.Repairable`."""
        from imgcore.formats.vhd.check import find_repairs

        repairs = find_repairs(self._file, self.header)
        return [item for item in repairs if item.is_leak or not leaks_only]

    def obstacles(self, *, leaks_only: bool = False) -> list[str]:
        """Return why problems are not repaired; see `Repairable`."""
        from imgcore.formats.vhd.check import find_obstacles

        return find_obstacles(self._file, self.header, leaks_only=leaks_only)

    def close(self) -> None:
        """Close the file; more than once is allowed."""
        self._file.close()


def printable(code: bytes) -> str:
    """Return a four-letter code, such as a creator's, without its padding."""
    return code.rstrip(b"\0").decode("ascii", "backslashreplace").rstrip()
