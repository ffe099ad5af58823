"""A target that only counts: tells how large an image becomes without writing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imgcore._core import File
from imgcore.files.host_file import OpenFile
from imgcore.files.ranges import add_range, joined
from imgcore.files.target import Target
from imgcore.files.target_file import TargetFile

if TYPE_CHECKING:
    from imgcore.files.ranges import Range
    from imgcore.files.target_folder import TargetFolder


class Rehearsal(Target):
    """Takes the place of a target; nothing is written.

    Parameters
    ----------
    target : Target
        Only its name is used, and what it is.
    file : CountingFile, optional
        What is written to; by default one that counts for a target in place.
    """

    def __init__(self, target: Target, file: CountingFile | None = None) -> None:
        self.path: str = target.path
        self.in_place: bool = file is None
        self.is_block_device: bool = target.is_block_device
        self._folder: TargetFolder | None = None
        self._file = CountingFile(target.path) if file is None else file

    @property
    def main(self) -> CountingFile:
        """The file; ``nbytes`` is the size of the image so far."""
        return self._file


class CountingFile(TargetFile):
    """A file that keeps nothing but its size."""

    def __init__(self, path: str) -> None:
        OpenFile.__init__(self, -1, path)
        self._core = File.null()
        # The size that a block device needs; its last bytes have no place of their own.
        self.is_block_device = True
        self.reads_as_zeros = True
        self._nbytes = 0

    def _free(self) -> None:
        """Do nothing: there is no descriptor."""

    @property
    def nbytes(self) -> int:
        """The size so far."""
        return self._nbytes

    def pwrite(self, offset: int, data: Any) -> None:
        """Count a buffer."""
        self.note_end(offset + memoryview(data).nbytes)

    def write_last(self, data: bytes) -> None:
        """Count nothing: `truncate` has."""

    def truncate(self, nbytes: int) -> None:
        """Count the size."""
        self.note_end(nbytes)

    def clear(self, nbytes: int) -> None:
        """Count from the start again."""
        self._nbytes = nbytes

    def note_end(self, end: int) -> None:
        """Count what the engine would have written."""
        self._nbytes = max(self._nbytes, end)


class WindowFile(CountingFile):
    """Keeps what is written to a part of a file's front, and behind the front.

    Parameters
    ----------
    path : str
    start, nbytes : int
        The part.
    front_nbytes : int
        Where the front ends.

    Attributes
    ----------
    content : bytearray
        The bytes of the part.
    behind : list of (int, bytes)
        Offsets and bytes behind the front, in the order of the writes.
    """

    def __init__(self, path: str, start: int, nbytes: int, front_nbytes: int) -> None:
        super().__init__(path)
        self.is_block_device = False
        self._start = start
        self._front_nbytes = front_nbytes
        self.content: bytearray = bytearray(nbytes)
        self.behind: list[tuple[int, bytes]] = []

    def pwrite(self, offset: int, data: Any) -> None:
        """Keep a buffer, or the part of it that matters."""
        super().pwrite(offset, data)
        with memoryview(data) as view, view.cast("B") as octets:
            if offset >= self._front_nbytes:
                self.behind.append((offset, bytes(octets)))
                return
            low = max(offset, self._start)
            high = min(offset + len(octets), self._start + len(self.content))
            if low < high:
                self.content[low - self._start : high - self._start] = octets[
                    low - offset : high - offset
                ]

    def write_last(self, data: bytes) -> None:
        """Keep the last bytes."""
        self.pwrite(self.nbytes - len(data), data)

    def truncate(self, nbytes: int) -> None:
        """Set the size."""
        self._nbytes = nbytes


class CountingStagedFile(CountingFile):
    """Takes the place of a `StagedFile`: counts what it would write and keep back.

    Parameters
    ----------
    path : str
    append_offset : int
        Size of the old content.

    Attributes
    ----------
    appended_nbytes : int
        Bytes that would be written at once.
    """

    def __init__(self, path: str, append_offset: int) -> None:
        super().__init__(path)
        self.is_block_device = False
        self._append_offset = append_offset
        self._nbytes = append_offset
        self._kept: list[Range] = []
        self.appended_nbytes: int = 0

    @property
    def staged_nbytes(self) -> int:
        """Bytes that would be overwritten."""
        return sum(length for _, length in joined(self._kept))

    def pwrite(self, offset: int, data: Any) -> None:
        """Count a buffer."""
        end = offset + memoryview(data).nbytes
        middle = min(max(offset, self._append_offset), end)
        add_range(self._kept, offset, middle - offset)
        self.appended_nbytes += end - middle
        self.note_end(end)

    def truncate(self, nbytes: int) -> None:
        """Set the size."""
        self._nbytes = nbytes

    def clear_rest(self, end: int) -> None:
        """Count zeros for what nobody has written before ``end``."""
        self._kept.append((0, min(end, self._append_offset)))
