"""Files of records that no crash can tear: each is there whole, or not at all.

* A line with what the file is and its version, and 16 random bytes;
* of each record, the length of its body and a CRC-32C, 32 bits each, little-endian.
  The CRC is that of the random bytes and the body, so that no old content of the disk
  passes for a record;
* the body: the length of its head (32 bits), the head in JSON, and bytes.

The first record that is not whole ends the file.  A length below 4 is none, because a
crash may leave zeros, and the CRC of nothing is 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore.errors import ImgcoreError, LimitExceededError, UnsupportedFeatureError
from imgcore.files.descriptors import close, named_errors
from imgcore.limits import MAX_JOURNAL_BLOB_NBYTES, MAX_JOURNAL_HEAD_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

SALT_NBYTES: Final = 16
FRAME: Final = struct.Struct("<II")
HEAD_NBYTES: Final = struct.Struct("<I")
_MAX_BODY_NBYTES: Final = HEAD_NBYTES.size + MAX_JOURNAL_HEAD_NBYTES + MAX_JOURNAL_BLOB_NBYTES
# Room for the short records that follow, which a full disk must not stop.
_ROOM: Final = bytes(4096)


class Record(NamedTuple):
    """One record: JSON, which states its ``kind``, and bytes."""

    head: Mapping[str, Any]
    blob: bytes


class RecordFile:
    """An open file of records.

    Parameters
    ----------
    fd : int
        Open for reading and writing; this object owns it.
    path : str
        For messages.
    magic : bytes
        What the first line begins with; the version follows.
    version : int
    """

    def __init__(self, fd: int, path: str, magic: bytes, version: int) -> None:
        self.fd: int = fd
        self._path = path
        self._magic = magic
        self._line = magic + b"%d\n" % version
        self._salt = b""
        self._end = 0
        # Bytes of the body of the record that was read last.
        self.last_nbytes: int = 0

    @property
    def path(self) -> str:
        """Its path, for messages."""
        return self._path

    def begin(self) -> None:
        """Write what comes before the first record."""
        self._salt = os.urandom(SALT_NBYTES)
        self._end = self._pwrite(0, self._line + self._salt)

    def read(self) -> Iterator[Record]:
        """Yield the records; the next one will be added after the last.

        Raises
        ------
        UnsupportedFeatureError
            Another version has written the file.
        ImgcoreError
            The file is damaged where it begins.
        """
        start = self._pread(0, len(self._line) + SALT_NBYTES)
        line, self._salt = start[: len(self._line)], start[len(self._line) :]
        if line.startswith(self._magic) and line != self._line:
            raise UnsupportedFeatureError(
                "is the journal of another version of imgcore", path=self.path
            )
        if line != self._line:
            raise self.damaged("the record at its start is not whole")
        self._end = len(start)
        with named_errors(self.path):
            file_nbytes = os.fstat(self.fd).st_size
        while (record := self.record_at(self._end, file_nbytes)) is not None:
            self.last_nbytes = record.nbytes
            self._end += FRAME.size + record.nbytes
            yield record.record

    def damaged(self, why: str) -> ImgcoreError:
        """Return the error of a journal that cannot be followed."""
        return ImgcoreError(f"the journal is damaged: {why}", path=self.path)

    def record_at(self, offset: int, file_nbytes: int) -> _Found | None:
        """Return the record at an offset; None if there is none that is whole."""
        frame = self._pread(offset, FRAME.size)
        if len(frame) < FRAME.size:
            return None
        nbytes, crc = FRAME.unpack(frame)
        end = offset + FRAME.size + nbytes
        if not HEAD_NBYTES.size <= nbytes <= _MAX_BODY_NBYTES or end > file_nbytes:
            return None
        body = self._pread(offset + FRAME.size, nbytes)
        if len(body) != nbytes or self._crc(body) != crc:
            return None
        start = HEAD_NBYTES.size + HEAD_NBYTES.unpack_from(body)[0]
        record = Record(json.loads(body[HEAD_NBYTES.size : start]), body[start:])
        if hashlib.sha256(record.blob).hexdigest() != record.head["sha256"]:
            return None
        return _Found(record, nbytes)

    def _crc(self, *parts: bytes) -> int:
        from imgcore._core import crc32c

        crc = crc32c(self._salt)
        for part in parts:
            crc = crc32c(part, crc)
        return crc

    def append(self, kind: str, head: Mapping[str, Any], blobs: Sequence[bytes] = ()) -> Record:
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
        body = HEAD_NBYTES.pack(len(text)) + text
        frame = FRAME.pack(len(body) + len(blob), self._crc(body, blob))
        end = self._pwrite(self._end, frame + body, blob)
        with named_errors(self.path):
            if os.fstat(self.fd).st_size == end:
                self._pwrite(end, _ROOM)
            os.fsync(self.fd)
        self._end = end
        return Record(head, blob)

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

    def close(self) -> None:
        """Close it; more than once is allowed."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close(fd)


class _Found(NamedTuple):
    record: Record
    nbytes: int
