"""Writes in place to a disk that one host file stores unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore.formats.api import Place
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imgcore.files.update_file import UpdateFile


class FlatUpdater:
    """Changes a disk whose guest byte i is byte i of a file: there are no tables.

    A subclass adds `resize`.
    """

    granule_nbytes: int = SECTOR_NBYTES

    def __init__(self, file: UpdateFile) -> None:
        self._file = file

    def begin(self) -> None:
        """Let the file's holes be data: they will not stay holes."""
        self._file.note_written()

    def place(self, start: int, length: int) -> list[Place]:
        """Return the same range of the file, which may be shorter than the disk."""
        is_new = start + length > self._file.nbytes
        return [Place(start, length, start, is_new=is_new)]

    def refer(self, places: Sequence[Place]) -> None:
        """Do nothing: there are no tables."""

    def give_up(self, places: Sequence[Place]) -> None:
        """Do nothing: nothing was reserved."""

    def zero(self, start: int, length: int, *, unmap: bool) -> list[tuple[int, int]]:
        """Punch a hole if the space may be given back; zeros are written otherwise."""
        is_inside = start + length <= self._file.nbytes
        if unmap and is_inside and self._file.punch(start, length):
            return []
        return [(start, length)]

    def discard(self, start: int, length: int) -> None:
        """Punch a hole if the file can have one."""
        self._file.punch(start, length)

    def flush(self, *, is_unread: bool) -> None:
        """Sync the file."""
        self._file.write_steps()

    def finish(self) -> None:
        """Do nothing: nothing states that the disk is in use."""
