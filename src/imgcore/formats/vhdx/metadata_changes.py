"""VHDX: changes of the metadata region.

Source: [MS-VHDX] 2.6.1, "Metadata Table".
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, NamedTuple

from imgcore.errors import LimitExceededError
from imgcore.files.update_file import Step
from imgcore.formats.vhdx import layout

if TYPE_CHECKING:
    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.vhdx.header import Region


class _Entry(NamedTuple):
    """An entry of the table, and the item's place in the region."""

    guid: bytes
    offset: int
    nbytes: int
    flags: int
    reserved: int

    @property
    def is_user(self) -> bool:
        return bool(self.flags & layout.ITEM_IS_USER)


class MetadataChanges:
    """Changes items of the system; few sectors of the table change with each.

    The region has been verified (`read_image`).
    """

    def __init__(self, file: UpdateFile, region: Region) -> None:
        self._file = file
        self._region = region
        table = file.pread(region.offset, layout.METADATA_TABLE_NBYTES)
        _, _, n_entries, _ = layout.METADATA_HEADER.unpack_from(table)
        start = layout.METADATA_HEADER.size
        raw = table[start : start + n_entries * layout.METADATA_ENTRY.size]
        self._entries = [_Entry(*fields) for fields in layout.METADATA_ENTRY.iter_unpack(raw)]

    def change(self, guid: uuid.UUID, data: bytes) -> None:
        """Change the first bytes of an item."""
        index = self._find(guid)
        assert index is not None
        self._file.put(self._region.offset + self._entries[index].offset, data, Step.REFERENCE)

    def store(self, guid: uuid.UUID, flags: int, data: bytes) -> None:
        """Store an item in unused space, and let the table refer to that."""
        offset = self._unused(len(data))
        self._file.pwrite(self._region.offset + offset, data)
        entry = _Entry(guid.bytes_le, offset, len(data), flags, 0)
        index = self._find(guid)
        if index is not None:
            self._put_entry(index, entry)
            return
        if len(self._entries) == layout.MAX_TABLE_ENTRIES:
            raise LimitExceededError(
                f"the metadata table has {layout.MAX_TABLE_ENTRIES} entries: it has no room for "
                "another",
                path=self._file.path,
                offset=self._region.offset,
            )
        self._put_entry(len(self._entries), entry)
        self._put_count()

    def remove(self, guid: uuid.UUID) -> None:
        """Let the table lack an item; the last entry takes its place."""
        index = self._find(guid)
        if index is not None:
            self._put_entry(index, self._entries[-1])
            self._put_entry(len(self._entries) - 1, _Entry(bytes(16), 0, 0, 0, 0))
            self._entries.pop()
            self._put_count()

    def _find(self, guid: uuid.UUID) -> int | None:
        for index, entry in enumerate(self._entries):
            if entry.guid == guid.bytes_le and not entry.is_user:
                return index
        return None

    def _put_entry(self, index: int, entry: _Entry) -> None:
        self._entries[index : index + 1] = [entry]
        offset = layout.METADATA_HEADER.size + index * layout.METADATA_ENTRY.size
        raw = layout.METADATA_ENTRY.pack(*entry)
        self._file.put(self._region.offset + offset, raw, Step.REFERENCE)

    def _put_count(self) -> None:
        raw = layout.METADATA_HEADER.pack(
            layout.METADATA_SIGNATURE, 0, len(self._entries), bytes(20)
        )
        self._file.put(self._region.offset, raw, Step.REFERENCE)

    def _unused(self, nbytes: int) -> int:
        """Return the offset in the region of bytes that no item uses."""
        start = layout.METADATA_TABLE_NBYTES
        for entry in sorted(self._entries, key=lambda entry: entry.offset):
            if entry.nbytes and entry.offset - start >= nbytes:
                break
            start = max(start, entry.offset + entry.nbytes)
        if start + nbytes > self._region.nbytes:
            raise LimitExceededError(
                f"the metadata region has no room for {nbytes} bytes more",
                path=self._file.path,
                offset=self._region.offset,
            )
        return start
