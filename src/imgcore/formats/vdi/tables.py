"""VDI: turns the block map into extents.

Source: VirtualBox src/VBox/Storage/VDICore.h, VDIIMAGEBLOCKPOINTER.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore._core import TableFormat
from imgcore.engine.extents import EXTENT_DTYPE, Kind, clip, single
from imgcore.errors import CorruptImageError
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.formats.shared.flat_reader import HostData, flat_rows
from imgcore.formats.shared.tables import decode_entries
from imgcore.formats.vdi import layout
from imgcore.formats.vdi.layout import ImageType
from imgcore.limits import MAX_BATCH_ROWS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.vdi.header import VdiHeader


# The largest block number: no file is so long.
_IMPOSSIBLE_ENTRY: Final = (layout.BLOCK_ZERO - 1).to_bytes(layout.ENTRY_NBYTES, "little")


def table_format(block_nbytes: int, data_offset: int) -> TableFormat:
    """Describe a block map to the table kernels."""
    return TableFormat(
        entry_nbytes=layout.ENTRY_NBYTES,
        big_endian=False,
        block_nbytes=block_nbytes,
        offset_mask=layout.ENTRY_MASK,
        offset_lshift=block_nbytes.bit_length() - 1,
        host_base=data_offset,
        default_kind=int(Kind.DATA),
        rules=[
            (layout.ENTRY_MASK, layout.BLOCK_FREE, int(Kind.HOLE)),
            (layout.ENTRY_MASK, layout.BLOCK_ZERO, int(Kind.ZERO)),
        ],
        absent_entry=layout.BLOCK_FREE,
        zero_entry=layout.BLOCK_ZERO,
    )


def read_map(
    file: ByteSource, header: VdiHeader, first: int, last: int, damage: Damage = STRICT
) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """Yield (first index, entries) for pieces of entries [first, last) of the map."""
    for start in range(first, last, MAX_BATCH_ROWS):
        count = min(MAX_BATCH_ROWS, last - start)
        offset, nbytes = start * layout.ENTRY_NBYTES, count * layout.ENTRY_NBYTES
        raw = damage.read_table(file, header.map_offset + offset, nbytes, _IMPOSSIBLE_ENTRY)
        yield start, np.frombuffer(raw, dtype="<u4")


class ExtentTables:
    """Turns the block map into extents; keeps none of it in memory between calls."""

    def __init__(self, file: ByteSource, header: VdiHeader, damage: Damage = STRICT) -> None:
        self._file = file
        self._damage = damage
        self._header = header
        self._format = table_format(header.block_nbytes, header.data_offset)
        # Only the file system knows which blocks of a fixed image were ever written.
        self._asks_file = header.image_type == ImageType.FIXED

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        """Yield extent batches; see `imgcore.formats.api.Reader.extents`."""
        block_nbytes = self._header.block_nbytes
        stop = held_to = start + length
        if self._damage.salvages:
            # The map may be cut off, and claim any size.
            map_nbytes = max(self._file.nbytes - self._header.map_offset, 0)
            n_held = map_nbytes // layout.ENTRY_NBYTES
            held_to = max(start, min(stop, n_held * block_nbytes))
        if start < held_to:
            yield from self._extents(start, held_to)
        if held_to < stop:
            yield single(held_to, stop - held_to, Kind.LOST)

    def _extents(self, start: int, stop: int) -> Iterator[Extents]:
        block_nbytes = self._header.block_nbytes
        first, last = start // block_nbytes, -(-stop // block_nbytes)
        for index, entries in read_map(self._file, self._header, first, last, self._damage):
            guest_end = min(stop, (index + len(entries)) * block_nbytes)
            rows = self._decode(entries, index, guest_end)
            rows = clip(rows, max(start, index * block_nbytes), guest_end)
            if self._asks_file:
                yield from self._without_holes(rows)
            else:
                yield rows

    def _decode(self, entries: NDArray[np.uint32], first_block: int, guest_end: int) -> Extents:
        return decode_entries(
            self._format,
            entries,
            lambda index: self._outside(first_block + index, int(entries[index])),
            guest_offset=first_block * self._header.block_nbytes,
            guest_end=guest_end,
            file_nbytes=self._file.nbytes,
            damage=self._damage,
        )

    def _outside(self, block: int, entry: int) -> CorruptImageError:
        place = self._header.data_offset + entry * self._header.block_nbytes
        return CorruptImageError(
            f"block {block} is at {place:#x} (entry {entry:#x}), past the end of the file "
            f"({self._file.nbytes:#x})",
            path=self._file.path,
            offset=place,
        )

    def _without_holes(self, rows: Extents) -> Iterator[Extents]:
        """Yield rows of a fixed image, with holes of its file as ZERO."""
        data = HostData(self._file)
        for row in rows:
            guest_offset, length = int(row["guest_offset"]), int(row["length"])
            if row["kind"] == Kind.DATA:
                yield from flat_rows(
                    data,
                    guest_offset,
                    guest_offset + length,
                    shift=int(row["host_offset"]) - guest_offset,
                    hole=Kind.ZERO,
                    max_rows=MAX_BATCH_ROWS,
                )
            else:
                yield np.array([row], dtype=EXTENT_DTYPE)
