"""Keeps L2 tables of an image that comes in order, where each byte comes once."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from imgcore.limits import MIB

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource

_MAX_NBYTES: Final = 4 * MIB


class WholeTables:
    """Reads parts of L2 tables, and keeps the latest tables whole.

    The entries of one table are asked for little by little, as their clusters come,
    and these may be far behind the table.
    """

    def __init__(self, file: ByteSource, table_nbytes: int) -> None:
        self._file = file
        self._table_nbytes = table_nbytes
        self._tables: OrderedDict[int, bytes] = OrderedDict()

    def pread_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with parts of tables that follow each other."""
        done = 0
        while done < len(buffer):
            start = (offset + done) % self._table_nbytes
            part = self._table(offset + done - start)[start : start + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def _table(self, offset: int) -> bytes:
        table = self._tables.get(offset)
        if table is None:
            table = self._tables[offset] = self._file.pread(offset, self._table_nbytes)
            if len(self._tables) * self._table_nbytes > _MAX_NBYTES:
                self._tables.popitem(last=False)
        return table
