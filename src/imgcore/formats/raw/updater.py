"""Raw: writing in place, where the file is the disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from imgcore.errors import OptionError
from imgcore.formats.shared.flat_updater import FlatUpdater

if TYPE_CHECKING:
    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.raw.reader import RawReader


def prepare(_file: UpdateFile) -> None:
    """Do nothing: nothing is ever left; see `imgcore.formats.api.Driver`."""


def updater_for(reader: RawReader, _parent_nbytes: int | None) -> RawUpdater:
    """Return what changes an image; see `imgcore.formats.api.Driver`."""
    return RawUpdater(cast("UpdateFile", reader.file))


class RawUpdater(FlatUpdater):
    """Changes a raw disk."""

    def resize(self, virtual_size: int) -> None:
        """Change the file's size; see `imgcore.formats.api.Updater`."""
        if self._file.is_block_device:
            raise OptionError("a block device keeps its size", path=self._file.path)
        self._file.grow(virtual_size)
        self._file.cut(virtual_size)
