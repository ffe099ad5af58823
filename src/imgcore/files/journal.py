"""The journal beside an image that is rewritten: records that no crash can tear.

A file of records, each of which is there whole or not at all:

* a line with the version, and 16 random bytes;
* of each record, the length of its body and a CRC-32C, 32 bits each, little-endian.
  The CRC is that of the random bytes and the body, so that no old content of the disk
  passes for a record;
* the body: the length of its head (32 bits), the head in JSON, and bytes.

The first record that is not whole ends the journal.  A length below 4 is none, because
a crash may leave zeros, and the CRC of nothing is 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore.errors import ImgcoreError, LimitExceededError, TargetError, UnsupportedFeatureError
from imgcore.files.descriptors import close, named_errors
from imgcore.limits import MAX_JOURNAL_BLOB_NBYTES, MAX_JOURNAL_HEAD_NBYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from imgcore.files.folder import Folder

SUFFIX: Final = ".imgcore-journal"
_TEMPORARY: Final = "-new"
_MAGIC: Final = b"imgcore journal "
_LINE: Final = _MAGIC + b"1\n"
_SALT_NBYTES: Final = 16
_START: Final = len(_LINE) + _SALT_NBYTES
_FRAME: Final = struct.Struct("<II")
_HEAD_NBYTES: Final = struct.Struct("<I")
_MAX_BODY_NBYTES: Final = _HEAD_NBYTES.size + MAX_JOURNAL_HEAD_NBYTES + MAX_JOURNAL_BLOB_NBYTES
# Room for the short records that follow, which a full disk must not stop.
_ROOM: Final = bytes(4096)


def temporary_of(name: str) -> str:
    """Return the name that files beside an image have before they are whole.

    ``name`` is that of the journal.
    """
    return name + _TEMPORARY


class Record(NamedTuple):
    """One record: JSON and bytes."""

    head: Mapping[str, Any]
    blob: bytes


class Journal:
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
        self._folder = folder
        self.name: str = name
        self.fd: int = fd
        self.records: dict[str, Record] = {}
        self._salt = b""
        self._end = 0

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
            journal._salt = os.urandom(_SALT_NBYTES)
            journal._end = journal._pwrite(0, _LINE + journal._salt)
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
            journal._read(status.st_size)
        except BaseException:
            journal.close()
            raise
        return journal

    def _read(self, nbytes: int) -> None:
        start = self._pread(0, _START)
        line, self._salt = start[: len(_LINE)], start[len(_LINE) :]
        if line.startswith(_MAGIC) and line != _LINE:
            raise UnsupportedFeatureError(
                "is the journal of another version of imgcore", path=self.path
            )
        self._end = _START
        try:
            while line == _LINE and (record := self._read_record(nbytes)) is not None:
                self.records[record.head["kind"]] = record
        except (KeyError, TypeError, ValueError, RecursionError):
            self.records.clear()
        if not self.records:
            raise self.damaged("the record at its start is not whole")

    def damaged(self, why: str) -> ImgcoreError:
        """Return the error of a journal that cannot be followed."""
        return ImgcoreError(f"the journal is damaged: {why}", path=self.path)

    def _read_record(self, file_nbytes: int) -> Record | None:
        """Return the record after those read so far; None if there is none."""
        frame = self._pread(self._end, _FRAME.size)
        if len(frame) < _FRAME.size:
            return None
        nbytes, crc = _FRAME.unpack(frame)
        end = self._end + _FRAME.size + nbytes
        if not _HEAD_NBYTES.size <= nbytes <= _MAX_BODY_NBYTES or end > file_nbytes:
            return None
        body = self._pread(self._end + _FRAME.size, nbytes)
        if len(body) != nbytes or self._crc(body) != crc:
            return None
        start = _HEAD_NBYTES.size + _HEAD_NBYTES.unpack_from(body)[0]
        record = Record(json.loads(body[_HEAD_NBYTES.size : start]), body[start:])
        if hashlib.sha256(record.blob).hexdigest() != record.head["sha256"]:
            return None
        self._end = end
        return record

    def _crc(self, *parts: bytes) -> int:
        from imgcore._core import crc32c

        crc = crc32c(self._salt)
        for part in parts:
            crc = crc32c(part, crc)
        return crc

    def append(self, kind: str, head: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Add a record, which is durable then.

        Raises
        ------
        LimitExceededError
            It is too large.
        OSError
            It cannot be written; the records before it stay.
        """
        blob = b"".join(blobs)
        head = {"kind": kind, "sha256": hashlib.sha256(blob).hexdigest(), **head}
        text = json.dumps(head).encode()
        if len(text) > MAX_JOURNAL_HEAD_NBYTES or len(blob) > MAX_JOURNAL_BLOB_NBYTES:
            raise LimitExceededError(
                f"the journal would hold {len(blob)} bytes and {len(text)} about them: "
                f"at most {MAX_JOURNAL_BLOB_NBYTES} and {MAX_JOURNAL_HEAD_NBYTES}",
                path=self.path,
            )
        body = _HEAD_NBYTES.pack(len(text)) + text
        frame = _FRAME.pack(len(body) + len(blob), self._crc(body, blob))
        end = self._pwrite(self._end, frame + body, blob)
        with named_errors(self.path):
            if os.fstat(self.fd).st_size == end:
                self._pwrite(end, _ROOM)
            os.fsync(self.fd)
        self._end = end
        self.records[kind] = Record(head, blob)

    def _pwrite(self, offset: int, *parts: bytes) -> int:
        """Write parts one after the other, and return where they end."""
        with named_errors(self.path):
            for part in parts:
                view = memoryview(part)
                while view:
                    done = os.pwrite(self.fd, view, offset)
                    view, offset = view[done:], offset + done
        return offset

    def _pread(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes, fewer only at the end of the file."""
        pieces = []
        with named_errors(self.path):
            while length > 0 and (piece := os.pread(self.fd, length, offset)):
                pieces.append(piece)
                offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)

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

    def close(self) -> None:
        """Close it; more than once is allowed."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close(fd)


def first_head(folder: Folder, name: str) -> Mapping[str, Any] | None:
    """Return the head of a journal's first record, unverified; None if it has none.

    It tells cheaply which image the journal may belong to.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError, struct.error):
        start = folder.read(name, _START + _FRAME.size + _HEAD_NBYTES.size - 1) or b""
        (nbytes,) = _HEAD_NBYTES.unpack_from(start, _START + _FRAME.size)
        if start.startswith(_LINE) and nbytes <= MAX_JOURNAL_HEAD_NBYTES:
            at = _START + _FRAME.size + _HEAD_NBYTES.size
            head = json.loads((folder.read(name, at + nbytes - 1) or b"")[at:])
            return head if isinstance(head, dict) else None
    return None
