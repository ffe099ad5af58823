"""VHD: writing in place, and fixed disks, whose only table is the footer.

Children recognise their parent by its UUID, which stays, and by the time of the file's
last change, so that they notice a parent that was written to.

Source: Microsoft, "Virtual Hard Disk Image Format Specification" 1.0, "Hard Disk Footer
Format".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from imgcore.errors import CorruptImageError, UnsupportedFeatureError
from imgcore.formats.shared.flat_updater import FlatUpdater
from imgcore.formats.vhd import layout
from imgcore.formats.vhd.changes import resized_footer
from imgcore.formats.vhd.header import are_of_one_change, find_footers
from imgcore.formats.vhd.layout import DiskType
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.api import Updater
    from imgcore.formats.vhd.reader import VhdReader


def prepare(file: UpdateFile) -> None:
    """Complete an interrupted change of both footers; see `imgcore.formats.api.Driver`.

    The footer at the end counts for all readers but those that start with its copy.
    """
    end, copy = find_footers(file)
    if end is None or copy is None or end.problem is not None or copy.problem is not None:
        return
    is_dynamic = DiskType.FIXED not in (end.footer.disk_type, copy.footer.disk_type)
    if is_dynamic and end.raw != copy.raw and are_of_one_change(end.raw, copy.raw):
        file.pwrite(0, end.raw)
        file.sync()


def updater_for(reader: VhdReader, _parent_nbytes: int | None) -> Updater:
    """Return what changes an image; see `imgcore.formats.api.Driver`."""
    header, path = reader.header, reader.sources[0].file.path
    if header.footer.saved_state:
        raise UnsupportedFeatureError(
            "a machine in a saved state uses this VHD, and would be wrong about the disk if it "
            "were written to: let the machine go on and shut it down first",
            path=path,
        )
    if header.dynamic is None:
        return FixedUpdater(reader)
    footers = (header.end, header.copy)
    if any(footer is None or footer.problem is not None for footer in footers):
        raise CorruptImageError(
            "one of its footers is missing or damaged: imgcore check --repair restores it from "
            "the other one",
            path=path,
        )
    from imgcore.formats.vhd.block_updater import BlockUpdater

    return BlockUpdater(reader)


class FixedUpdater(FlatUpdater):
    """Changes a fixed disk."""

    def __init__(self, reader: VhdReader) -> None:
        super().__init__(cast("UpdateFile", reader.sources[0].file))
        self._header = reader.header

    def resize(self, virtual_size: int) -> None:
        """Move the footer; see `imgcore.formats.api.Updater`.

        The file ends with a footer at every moment, and what the footer states ends
        before it.
        """
        file, header = self._file, self._header
        assert header.end is not None
        place = header.end.offset
        if place % SECTOR_NBYTES:
            raise UnsupportedFeatureError(
                f"the footer of this VHD is at {place:#x}, which is not a multiple of "
                f"{SECTOR_NBYTES}: imgcore convert writes an image that can be resized",
                path=file.path,
            )
        new = resized_footer(header.end.raw, header, virtual_size, file.path)
        if virtual_size > place:
            place = virtual_size
            self._write(place, header.end.raw)
        if virtual_size > header.size.nbytes:
            # The old footer is among what the disk gets.
            file.zero(header.size.nbytes, virtual_size - header.size.nbytes)
            file.sync()
        self._write(place, new)
        if virtual_size < place and not file.is_block_device:
            self._write(virtual_size, new)
        file.cut(virtual_size + layout.FOOTER_NBYTES)

    def _write(self, offset: int, footer: bytes) -> None:
        self._file.pwrite(offset, footer)
        self._file.sync()
