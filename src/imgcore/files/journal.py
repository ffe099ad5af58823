"""The journal beside an image that is rewritten: records, one of each kind."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import struct
from typing import TYPE_CHECKING, Any, Final

from imgcore.errors import TargetError
from imgcore.files.descriptors import named_errors
from imgcore.files.record_file import FRAME, HEAD_NBYTES, SALT_NBYTES, Record, RecordFile
from imgcore.limits import MAX_JOURNAL_HEAD_NBYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from imgcore.files.folder import Folder

SUFFIX: Final = ".imgcore-journal"
_TEMPORARY: Final = "-new"
_MAGIC: Final = b"imgcore journal "
_VERSION: Final = 1
_START: Final = len(_MAGIC) + len(f"{_VERSION}\n") + SALT_NBYTES


def temporary_of(name: str) -> str:
    """Return the name that files beside an image have before they are whole.

    ``name`` is that of the journal.
    """
    return name + _TEMPORARY


class Journal(RecordFile):
    """The open journal of an image.

    Attributes
    ----------
    name : str
        Its name in the folder.
    records : dict of str to Record
        By kind; there is one of each at most.
    """

    def __init__(self, folder: Folder, name: str, fd: int) -> None:
        """Take over an open descriptor."""
        super().__init__(fd, folder.path_of(name), _MAGIC, _VERSION)
        self._folder = folder
        self.name: str = name
        self.records: dict[str, Record] = {}

    @property
    def path(self) -> str:
        """Its path, for messages."""
        return self._folder.path_of(self.name)

    @property
    def temporary(self) -> str:
        """The name that files beside the image have before they are whole."""
        return temporary_of(self.name)

    @classmethod
    def create(
        cls, folder: Folder, name: str, kind: str, head: Mapping[str, Any], blobs: Sequence[bytes]
    ) -> Journal:
        """Create a journal with its first record; both are durable then.

        It gets its name when it is complete: a journal whose first record is not whole
        has been damaged.
        """
        temporary = temporary_of(name)
        folder.remove(temporary)
        fd = folder.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        journal, present = cls(folder, name, fd), temporary
        try:
            journal.begin()
            journal.append(kind, head, blobs)
            folder.rename(temporary, name)
            present = name
            folder.sync()
        except BaseException:
            journal.close()
            with contextlib.suppress(OSError):
                folder.remove(present)
            raise
        return journal

    @classmethod
    def open(cls, folder: Folder, name: str) -> Journal | None:
        """Open and read a journal; None if there is none.

        Raises
        ------
        ImgcoreError
            It is damaged, or of another version, or no file of this user.
        """
        status = folder.find(name)
        if status is None:
            return None
        path = folder.path_of(name)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise TargetError("is no journal: no regular file, or one of several names", path=path)
        journal = cls(folder, name, folder.open(name, os.O_RDWR))
        try:
            journal._read()
        except BaseException:
            journal.close()
            raise
        return journal

    def _read(self) -> None:
        try:
            for record in self.read():
                self.records[record.head["kind"]] = record
        except (KeyError, TypeError, ValueError, RecursionError):
            self.records.clear()
        if not self.records:
            raise self.damaged("the record at its start is not whole")

    def append(self, kind: str, head: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> Record:
        """Add a record; see `RecordFile.append`."""
        self.records[kind] = record = super().append(kind, head, blobs)
        return record

    def rename(self, name: str) -> None:
        """Rename it in its folder; FileExistsError if the name is taken."""
        self._folder.rename(self.name, name)
        self.name = name

    def sync(self) -> None:
        """Make its name and its records durable, which a crash may not have been."""
        with named_errors(self.path):
            os.fsync(self.fd)
        self._folder.sync()

    def remove(self) -> None:
        """Remove it durably."""
        self._folder.remove(self.temporary)
        self._folder.remove(self.name)
        self._folder.sync()


def first_head(folder: Folder, name: str) -> Mapping[str, Any] | None:
    """Return the head of a journal's first record, unverified; None if it has none.

    It tells cheaply which image the journal may belong to.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError, struct.error):
        start = folder.read(name, _START + FRAME.size + HEAD_NBYTES.size - 1) or b""
        (nbytes,) = HEAD_NBYTES.unpack_from(start, _START + FRAME.size)
        if start.startswith(_MAGIC + b"%d\n" % _VERSION) and nbytes <= MAX_JOURNAL_HEAD_NBYTES:
            at = _START + FRAME.size + HEAD_NBYTES.size
            head = json.loads((folder.read(name, at + nbytes - 1) or b"")[at:])
            return head if isinstance(head, dict) else None
    return None
