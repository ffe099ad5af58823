"""VHDX: writes log entries and headers of an image that is written in place.

Changes of tables go to the log first, and are durable there before they are written
where they belong.  Each entry is sound without the next one.

Source: [MS-VHDX] 2.2.2.1, "Updating the Headers", and 2.3, "Log".
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore import limits
from imgcore._core import crc32c
from imgcore.errors import CorruptImageError, LimitExceededError, UnsupportedFeatureError
from imgcore.formats.vhdx import layout
from imgcore.formats.vhdx.header import FileHeader, pack_header, with_checksum
from imgcore.formats.vhdx.parent import NIL

if TYPE_CHECKING:
    from imgcore.files.update_file import UpdateFile

PAGE_NBYTES: Final = layout.LOG_SECTOR_NBYTES
# So many descriptors are in the first 512 bytes of an entry.  QEMU does not open an
# image if it finds a valid header of an entry, but not its descriptors.
_MAX_DESCRIPTORS: Final = (512 - layout.LOG_ENTRY.size) // layout.LOG_DESCRIPTOR.size
# Far more changes than a disk sees; a header of an untrusted image may have any number.
_MAX_SEQUENCE: Final = 1 << 63


class Page(NamedTuple):
    """The new content of 4 KiB of the file, at a multiple of 4 KiB."""

    offset: int
    content: bytes


class LogWriter:
    """The log and the two headers of an image.

    The log is never continued at its start: it is emptied when it is full.  QEMU would
    otherwise take an old entry for the successor of the first one.

    Attributes
    ----------
    header : FileHeader
        The current header.
    """

    def __init__(self, file: UpdateFile, header: FileHeader) -> None:
        self._file = file
        self.header: FileHeader = header
        self._position = self._sequence = 0
        _check(file, header)
        # The places of the two headers, the next one first.
        self._places = sorted(layout.HEADER_OFFSETS, key=self._is_current)

    def _is_current(self, place: int) -> bool:
        raw = self._file.pread(place, layout.HEADER_NBYTES)
        fields = slice(layout.SEQUENCE_OFFSET, layout.HEADER.size)
        return raw == with_checksum(raw) and raw[fields] == pack_header(self.header)[fields]

    def update_headers(self, **changes: Any) -> None:
        """Change fields of the header, in both copies; each is durable in turn."""
        for _ in layout.HEADER_OFFSETS:
            sequence = self.header.sequence + 1
            header = self.header._replace(sequence=sequence, **changes)
            self._file.pwrite(self._places[0], pack_header(header))
            self._file.sync()
            self.header = header
            self._places.reverse()

    def write(self, offsets: Sequence[int]) -> None:
        """Write pages of the file, with the changes that wait, by way of the log.

        The rest of the file is in sync.  They are durable when this returns, though
        perhaps only in the log.  A crash leaves the first pages, as many as it may be.
        """
        while offsets:
            offsets = offsets[self._write_some(offsets) :]

    def _write_some(self, offsets: Sequence[int]) -> int:
        """Write the first pages, as many as the log has room for; return how many."""
        guid = self.header.log_guid
        if guid == NIL:
            guid, self._position, self._sequence = uuid.uuid4(), 0, 0
        tail = self._position
        pages: list[Page] = []
        while len(pages) < len(offsets):
            places = offsets[len(pages) : len(pages) + _MAX_DESCRIPTORS]
            batch = [Page(place, self._file.pread(place, PAGE_NBYTES)) for place in places]
            sequence = self._sequence + 1
            entry = _pack_entry(batch, guid, sequence, tail, self._file.nbytes)
            if self._position + len(entry) > self.header.log_nbytes:
                break
            place = self.header.log_offset + self._position
            # An entry that could not be written is not replaced: a later one that was
            # written would be taken for the successor of its replacement.
            self._position += len(entry)
            self._sequence = sequence
            self._file.pwrite(place, entry)
            pages += batch
        if not pages:
            self.empty()
            return 0
        self._file.sync()
        if self.header.log_guid == NIL:
            self.update_headers(log_guid=guid)
        for page in pages:
            self._file.pwrite(page.offset, page.content)
        return len(pages)

    def empty(self) -> None:
        """Make durable what was written by way of the log, and empty it."""
        if self.header.log_guid != NIL:
            self._file.sync()
            self.update_headers(log_guid=NIL)


def _check(file: UpdateFile, header: FileHeader) -> None:
    """Raise unless the headers and the log can be written to."""
    start, nbytes = header.log_offset, header.log_nbytes
    if start < layout.HEADER_SECTION_NBYTES or not nbytes:
        raise UnsupportedFeatureError(
            "has no log, without which it is not written in place", path=file.path
        )
    if nbytes > limits.VHDX_MAX_LOG_NBYTES:
        raise LimitExceededError(
            f"has a log of {nbytes} bytes, at most {limits.VHDX_MAX_LOG_NBYTES} are allowed",
            path=file.path,
            offset=start,
        )
    if start > file.nbytes - nbytes:
        raise CorruptImageError(
            f"the log ends at {start + nbytes:#x}, past the end of the file ({file.nbytes:#x})",
            path=file.path,
            offset=start,
        )
    if header.sequence > _MAX_SEQUENCE:
        raise CorruptImageError(
            f"its header has the sequence number {header.sequence}, at most {_MAX_SEQUENCE} is "
            "allowed",
            path=file.path,
        )


def _pack_entry(
    pages: Sequence[Page], guid: uuid.UUID, sequence: int, tail: int, file_nbytes: int
) -> bytes:
    """Return a log entry (2.3.1) with a descriptor for each page."""
    descriptors = sectors = b""
    low, high = sequence & 0xFFFF_FFFF, sequence >> 32
    for offset, content in pages:
        if any(content):
            # The ends of a page are in its descriptor (2.3.1.3); their places in the
            # data sector have the sequence number.
            leading, trailing = content[:8], content[-4:]
            descriptors += layout.LOG_DESCRIPTOR.pack(
                layout.LOG_DATA_SIGNATURE, trailing, leading, offset, sequence
            )
            head = layout.LOG_SECTOR_HEAD.pack(layout.LOG_SECTOR_SIGNATURE, high)
            sectors += head + content[8:-4] + layout.LOG_SECTOR_TAIL.pack(low)
        else:
            length = PAGE_NBYTES.to_bytes(8, "little")
            descriptors += layout.LOG_DESCRIPTOR.pack(
                layout.LOG_ZERO_SIGNATURE, bytes(4), length, offset, sequence
            )
    header = layout.LOG_ENTRY.pack(
        layout.LOG_ENTRY_SIGNATURE,
        0,
        PAGE_NBYTES + len(sectors),
        tail,
        sequence,
        len(pages),
        0,
        guid.bytes_le,
        file_nbytes,
        file_nbytes,
    )
    raw = (header + descriptors).ljust(PAGE_NBYTES, b"\0") + sectors
    end = layout.CHECKSUM_OFFSET + layout.CHECKSUM.size
    checksum = layout.CHECKSUM.pack(crc32c(raw))
    return raw[: layout.CHECKSUM_OFFSET] + checksum + raw[end:]
