"""A file whose old content stays valid while a new image is written into it."""

from __future__ import annotations

import os
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore.files.descriptors import duplicate, forks_held_back, named_errors
from imgcore.files.ranges import Range, add_range, gaps, is_inside, joined
from imgcore.files.target_file import TargetFile
from imgcore.limits import MIB, SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

_PAGE_NBYTES: Final = 4096
_ZEROS_NBYTES: Final = MIB


class Change(NamedTuple):
    """What turns a file with an old image and new tables into the new image.

    Attributes
    ----------
    pieces : list of (offset, bytes)
        What is overwritten, ascending.
    cleared : list of (offset, length)
        What is overwritten with zeros, once the new image is valid.
    file_size : int
        The new size of the file.
    """

    pieces: list[tuple[int, bytes]]
    cleared: list[Range]
    file_size: int

    def apply(self, file: TargetFile, *, sync: bool) -> None:
        """Make the change: tables, then the first sector, the size, and the zeros.

        With ``sync``, it is durable before the zeros are written, and these at the end.
        """
        for offset, data in self.pieces:
            start = min(max(SECTOR_NBYTES - offset, 0), len(data))
            file.pwrite(offset + start, memoryview(data)[start:])
        for offset, data in self.pieces:
            if offset < SECTOR_NBYTES:
                file.pwrite(offset, data[: SECTOR_NBYTES - offset])
        if file.nbytes != self.file_size:
            file.truncate(self.file_size)
        if sync:
            file.sync()
        if self.cleared:
            _write_zeros(file, self.cleared)
            if sync:
                file.sync()


def _write_zeros(file: TargetFile, ranges: Iterable[Range]) -> None:
    zeros = memoryview(bytes(_ZEROS_NBYTES))
    for offset, length in ranges:
        for start in range(offset, offset + length, _ZEROS_NBYTES):
            write_different(file, start, zeros[: offset + length - start])


def write_different(file: TargetFile, offset: int, data: bytes | memoryview) -> None:
    """Write the pages in which a file differs; a hole that reads the same stays one."""
    view = memoryview(data)
    while view:
        nbytes = min(_PAGE_NBYTES - offset % _PAGE_NBYTES, len(view))
        with named_errors(file.path):
            present = os.pread(file.fd, nbytes, offset)
        if present != view[:nbytes]:
            file.pwrite(offset, view[:nbytes])
        offset, view = offset + nbytes, view[nbytes:]


class StagedFile(TargetFile):
    """A file that keeps back what would change its old content.

    Bytes at or past ``append_offset`` are written at once: nothing refers to them yet.
    Bytes before it, and a new size, are kept back.  So whoever writes the new image
    need not know how it becomes valid.

    Parameters
    ----------
    file : TargetFile
        The open file; it stays the caller's.
    append_offset : int
        Size of the old content.
    overwrites : iterable of (offset, length)
        The parts of the old content that may be overwritten or cut off.

    Attributes
    ----------
    append_offset : int
    overwrites : list of (offset, length)
        As given, ascending and joined.
    appended_nbytes : int
        Bytes that `pwrite` has written at once; the native engine's are not counted.
    """

    def __init__(self, file: TargetFile, append_offset: int, overwrites: Iterable[Range]) -> None:
        with forks_held_back():
            with named_errors(file.path):
                fd = duplicate(file.fd)
            super().__init__(fd, file.path)
        self._file = file
        self.append_offset = append_offset
        self.overwrites: list[Range] = joined(overwrites)
        self.appended_nbytes: int = 0
        self._appended: list[Range] = []
        # In the order of the calls; later ones win.
        self._kept: list[tuple[int, bytearray]] = []
        self._cleared: list[Range] = []
        self._new_size: int | None = None

    @property
    def nbytes(self) -> int:
        """The size that the file will have."""
        return super().nbytes if self._new_size is None else self._new_size

    def pwrite(self, offset: int, data: Any) -> None:
        """Write a whole buffer, and keep back its part before ``append_offset``."""
        with memoryview(data) as view, view.cast("B") as octets:
            n_kept = min(max(self.append_offset - offset, 0), len(octets))
            if n_kept:
                self._require_declared(offset, n_kept)
                self._keep(offset, octets[:n_kept])
            if n_kept < len(octets):
                super().pwrite(offset + n_kept, octets[n_kept:])
                self.appended_nbytes += len(octets) - n_kept
                add_range(self._appended, offset + n_kept, len(octets) - n_kept)
            if self._new_size is not None:
                self._new_size = max(self._new_size, offset + len(octets))

    def truncate(self, nbytes: int) -> None:
        """Note the file's new size; what that cuts off must have been declared."""
        if nbytes < self.append_offset:
            self._require_declared(nbytes, self.append_offset - nbytes)
        self._new_size = nbytes

    def clear(self, nbytes: int) -> None:
        """Refuse: the old content stays."""
        raise AssertionError(f"{self.path}: cleared to {nbytes} bytes although its blocks stay")

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros, which may not be in the old content."""
        if offset < self.append_offset:
            raise AssertionError(f"{self.path}: zeroed at 0x{offset:x}, in the old content")
        super().zero(offset, length)

    def clear_rest(self, end: int) -> None:
        """Keep back zeros for what nobody has written before ``end``.

        Programs could take traces of the old image there for an image.
        """
        written = [(offset, len(data)) for offset, data in self._kept]
        self._cleared = list(gaps(joined(written), min(end, self.append_offset)))
        for offset, length in self._cleared:
            self._require_declared(offset, length)

    def _keep(self, offset: int, octets: memoryview) -> None:
        if self._kept:
            start, before = self._kept[-1]
            if start + len(before) == offset:
                before += octets
                return
        self._kept.append((offset, bytearray(octets)))

    def _require_declared(self, offset: int, length: int) -> None:
        if not is_inside(offset, length, self.overwrites):
            raise AssertionError(
                f"{self.path}: {length} bytes at 0x{offset:x} are not declared as overwritten"
            )

    @property
    def appended(self) -> list[Range]:
        """What `pwrite` has written at once."""
        return joined(self._appended)

    @property
    def staged_nbytes(self) -> int:
        """Bytes that will be overwritten, zeros included."""
        change = self.change
        return sum(len(data) for _, data in change.pieces) + sum(n for _, n in change.cleared)

    @property
    def change(self) -> Change:
        """What has been kept back."""
        pieces = [
            (offset, bytearray(length))
            for offset, length in joined((offset, len(data)) for offset, data in self._kept)
        ]
        starts = [offset for offset, _ in pieces]
        for offset, data in self._kept:
            start, piece = pieces[bisect_right(starts, offset) - 1]
            piece[offset - start : offset - start + len(data)] = data
        return Change([(at, bytes(data)) for at, data in pieces], self._cleared, self.nbytes)

    def apply(self) -> None:
        """Make the change to a file that nobody needs until all is written."""
        self.change.apply(self._file, sync=False)
