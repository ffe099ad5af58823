"""The journal of a conversion that can go on after a break.

A file of records (`imgcore.files.record_file`): the first, of kind "begin", says what
is converted and how; each of kind "checkpoint" says what of the target is durable since
the one before; "file" names a second file of the target; and "names" says which files
are about to get their final names.  See docs/resuming.md for what they hold.
"""

from __future__ import annotations

import contextlib
import os
import stat
import zlib
from typing import TYPE_CHECKING, Any, Final

from imgcore.errors import ImgcoreError, TargetError
from imgcore.files.descriptors import close, forks_held_back, give_up_in_children
from imgcore.files.folder import Folder
from imgcore.files.locks import Lock, lock
from imgcore.files.record_file import FRAME, Record, RecordFile
from imgcore.files.temporary_names import new_token, partial_name, remove_stale, temporary_name
from imgcore.sizes import MAX_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Self

SUFFIX: Final = ".imgcore-resume"
# What a record leads to that is not as it is written.
MALFORMED: Final = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    zlib.error,
)
_MAGIC: Final = b"imgcore resume "
_VERSION: Final = 1
_BEGIN: Final = "begin"
_CHECKPOINT: Final = "checkpoint"
_NAMES: Final = "names"
_FILE: Final = "file"


class JournalInUseError(TargetError):
    """A run of the journal's conversion is at work."""


class ResumeJournal(RecordFile):
    """An open, locked journal; a context manager.

    Leaving the ``with`` block removes a journal that no target was kept for.

    Attributes
    ----------
    begin_head : mapping
        What the first record says.
    kept_nbytes : int
        The target's first bytes that are durable.
    n_checkpoints : int
    companions : list of str
        The final names of the target's other files.
    names : mapping of str to int
        The inodes of the target's complete files by their final names.
    is_removed : bool
    """

    def __init__(self, folder: Folder, name: str, fd: int) -> None:
        """Take over an open folder and descriptor."""
        super().__init__(fd, folder.path_of(name), _MAGIC, _VERSION)
        self._folder = folder
        self._name = name
        # Offset and part of each checkpoint.
        self._checkpoints: list[tuple[int, int]] = []
        self.begin_head: Mapping[str, Any] = {}
        self.kept_nbytes: int = 0
        self.companions: list[str] = []
        self.names: Mapping[str, int] = {}
        self.is_removed: bool = False

    @property
    def n_checkpoints(self) -> int:
        """How many checkpoints it has."""
        return len(self._checkpoints)

    @classmethod
    def create(cls, path: str, head: Mapping[str, Any]) -> Self:
        """Create a journal; its name and its first record are durable then.

        Raises
        ------
        TargetError
            Another run has just created it.
        OSError
            It cannot be written.
        """
        parent, name = os.path.split(path)
        folder = Folder(parent)
        temporary = temporary_name(name, new_token())
        try:
            remove_stale(folder.fd, parent or ".", name)
            fd = _opened(folder, temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except BaseException:
            folder.close()
            raise
        journal = cls(folder, name, fd)
        try:
            lock(fd)
            journal.begin()
            journal.begin_head = RecordFile.append(journal, _BEGIN, head).head
            folder.rename(temporary, name)
            folder.sync()
        except BaseException as error:
            folder.remove(temporary)
            journal.close()
            if isinstance(error, FileExistsError):
                raise _in_use(path) from None
            raise
        return journal

    @classmethod
    def open(cls, path: str) -> Self | None:
        """Open and read a journal; None if there is none.

        Raises
        ------
        TargetError
            Another run is at work, or the file cannot be a journal.
        ImgcoreError
            It is damaged, or of another version.
        """
        parent, name = os.path.split(path)
        folder = Folder(parent)
        try:
            status = folder.find(name)
            if status is None:
                folder.close()
                return None
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                text = "is no journal: no regular file, or one of several names"
                raise TargetError(text, path=path)
            fd = _opened(folder, name, os.O_RDWR)
        except BaseException:
            folder.close()
            raise
        journal = cls(folder, name, fd)
        try:
            # A run that has ended in between has removed it.
            if lock(fd) is Lock.HELD_BY_OTHER or os.fstat(fd).st_nlink == 0:
                raise _in_use(path)
            journal._read_all()
        except BaseException:
            journal.close()
            raise
        return journal

    def _read_all(self) -> None:
        try:
            for record in self.read():
                self._note(record)
            if not self.begin_head:
                raise self.damaged("the record at its start is not whole")
        except MALFORMED:
            raise _unreadable(self.damaged("a record is not as imgcore writes it")) from None
        except ImgcoreError as error:
            raise _unreadable(error) from None
        # What follows is of a checkpoint that was not completed.
        os.ftruncate(self.fd, self._end)

    def _note(self, record: Record) -> None:
        if not self.begin_head:
            if record.head["kind"] != _BEGIN:
                raise ValueError("no first record")
            self.begin_head = record.head
            return
        match record.head["kind"]:
            case "names":
                names = record.head["names"].items()
                self.names = {_file_name(name): int(inode) for name, inode in names}
            case "file":
                self.companions.append(_file_name(record.head["name"]))
            case "checkpoint":
                self._note_checkpoint(record)
            case _:
                raise ValueError("no such record")

    def _note_checkpoint(self, record: Record) -> None:
        offset = self._end - FRAME.size - self.last_nbytes
        self._checkpoints.append((offset, int(record.head["part"])))
        self.kept_nbytes = int(record.head["kept"])
        if not 0 <= self.kept_nbytes <= MAX_SIZE:
            raise ValueError("no size")

    def checkpoints(self, part: int, *, only_last: bool = False) -> Iterator[Record]:
        """Yield the checkpoints of a part of the job, in order."""
        size = os.fstat(self.fd).st_size
        offsets = [offset for offset, of_part in self._checkpoints if of_part == part]
        for offset in offsets[-1:] if only_last else offsets:
            found = self.record_at(offset, size)
            if found is None:
                raise self.damaged("a record has changed")
            yield found.record

    def add(
        self, kept_nbytes: int, head: Mapping[str, Any], blobs: Sequence[bytes], part: int = 0
    ) -> None:
        """Add a checkpoint, which is durable then; the target is already."""
        offset = self._end
        self.append(_CHECKPOINT, {"kept": kept_nbytes, "part": part, **head}, blobs)
        self._checkpoints.append((offset, part))
        self.kept_nbytes = kept_nbytes

    def note_file(self, name: str) -> None:
        """Record that the target has another file."""
        if name not in self.companions:
            self.append(_FILE, {"name": name})
            self.companions.append(name)

    def note_names(self, names: Mapping[str, int]) -> None:
        """Record the attribute ``names``, before the files get them."""
        self.append(_NAMES, {"names": names})
        self.names = names

    def remove(self) -> None:
        """Remove it durably."""
        self.is_removed = True
        self._folder.remove(self._name)
        self._folder.sync()

    def close(self) -> None:
        """Close it; more than once is allowed."""
        super().close()
        self._folder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self.n_checkpoints and not self.is_removed:
                with contextlib.suppress(OSError):
                    self.remove()
        finally:
            self.close()


def _file_name(name: Any) -> str:
    """Return the name of a file in the target's folder; ValueError for others."""
    if not isinstance(name, str) or not name or "/" in name or "\0" in name:
        raise ValueError("no name of a file")
    return name


def give_up_unreadable(path: str) -> bool:
    """Remove a journal that cannot be read, and what was kept of the file beside it.

    Returns
    -------
    bool
        False, and nothing is removed: neither its name nor its start is a journal's.

    Raises
    ------
    TargetError
        A run is at work with it.
    OSError
        It cannot be removed.
    """
    parent, name = os.path.split(path)
    with Folder(parent) as folder:
        fd = _opened(folder, name, os.O_RDONLY)
        try:
            if lock(fd) is Lock.HELD_BY_OTHER:
                raise _in_use(path)
            if name.endswith(SUFFIX):
                folder.remove(partial_name(name.removesuffix(SUFFIX)))
            elif os.pread(fd, len(_MAGIC), 0) != _MAGIC:
                return False
            folder.remove(name)
            folder.sync()
        finally:
            close(fd)
    return True


def _unreadable(error: ImgcoreError) -> ImgcoreError:
    text = f"{error.reason}: give it up (imgcore jobs --remove), and start again"
    return type(error)(text, path=error.path)


def _opened(folder: Folder, name: str, flags: int) -> int:
    with forks_held_back():
        fd = folder.open(name, flags)
        give_up_in_children(fd)
    return fd


def _in_use(path: str) -> ImgcoreError:
    return JournalInUseError("another run of this conversion is at work", path=path)
