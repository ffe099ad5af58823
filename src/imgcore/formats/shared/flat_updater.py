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

    Parameters
    ----------
    file : UpdateFile
    shift : int
        Host offset minus guest offset, in bytes.
    """

    granule_nbytes: int = SECTOR_NBYTES

    def __init__(self, file: UpdateFile, shift: int = 0) -> None:
        self._file = file
        self._shift = shift

    def begin(self, *, again: bool) -> None:
        """Let the file's holes be data: they will not stay holes."""
        self._file.note_written()

    def place(self, start: int, length: int) -> list[Place]:
        """Return the same range of the file, which may be shorter than the disk."""
        host_offset = start + self._shift
        is_new = host_offset + length > self._file.nbytes
        return [Place(start, length, host_offset, is_new=is_new)]

    def overwritable(self, start: int, length: int) -> list[Place]:
        """Return what the file has of a range."""
        nbytes = min(length, self._file.nbytes - start - self._shift)
        return [Place(start, nbytes, start + self._shift)] if nbytes > 0 else []

    def refer(self, places: Sequence[Place]) -> None:
        """Do nothing: there are no tables."""

    def give_up(self, places: Sequence[Place]) -> None:
        """Do nothing: nothing was reserved."""

    def zero(self, start: int, length: int, *, unmap: bool) -> list[tuple[int, int]]:
        """Punch a hole if the space may be given back, or zero the range in place."""
        if start + self._shift + length > self._file.nbytes:
            return [(start, length)]
        if not unmap:
            self._file.zero_in_place(start + self._shift, length)
        elif not self._file.punch(start + self._shift, length):
            return [(start, length)]
        return []

    def discard(self, start: int, length: int) -> None:
        """Punch a hole if the file can have one."""
        self._file.punch(start + self._shift, length)

    def flush(self, *, is_unread: bool) -> None:
        """Sync the file."""
        self._file.write_steps()

    def withhold(self) -> None:
        """Do nothing: there is no free space."""

    def finish(self) -> None:
        """Do nothing: nothing states that the disk is in use."""
