"""Placements in few bytes: kept while a job runs, and given to a writer again later.

Packed placements are a stream of zlib.  It holds the columns of the rows: the states of
all of them, 8 bits each; then, of those that have a place, how much further each place
is than the end of the one before, 64 bits, and how much longer it is, 32 bits.
Differences wrap around.  Of a column, the lowest bytes of all rows come first, then the
next ones.  So blocks that follow each other at regular distances take no space to speak
of, and compressed ones about two bytes each.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from imgcore.engine.extents import PLACEMENT_DTYPE
from imgcore.engine.inflating import inflated_at_most

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from imgcore.engine.extents import Placements

# Most bytes are zeros, which level 1 finds as well.
_LEVEL: Final = 1
# Bytes of a row before compression: one column after the other.
_STATE_NBYTES, _OFFSET_NBYTES, _LENGTH_NBYTES = 1, 8, 4


def pack_placements(placements: Placements) -> bytes:
    """Return placements in few bytes."""
    states = placements["state"].astype(np.uint8)
    rows = placements[_has_place(placements)]
    offsets, lengths = rows["host_offset"], rows["length"].astype(np.uint64)
    gaps = np.diff(offsets, prepend=np.uint64(0))
    gaps[1:] -= lengths[:-1]
    growth = np.diff(rows["length"], prepend=np.uint32(0))
    places = _has_place(placements).astype(np.uint8) << 7
    columns = ((states | places).tobytes(), _by_byte(gaps), _by_byte(growth))
    return zlib.compress(b"".join(columns), _LEVEL)


def unpack_placements(packed: bytes, n_rows: int) -> Placements:
    """Return ``n_rows`` placements as they were packed.

    Raises
    ------
    ValueError
        These bytes are not so many placements.
    """
    columns = inflated_at_most(packed, n_rows * (_STATE_NBYTES + _OFFSET_NBYTES + _LENGTH_NBYTES))
    states = np.frombuffer(columns[:n_rows], np.uint8)
    has_place = states >> 7 == 1
    n_places = int(has_place.sum())
    end = n_rows + n_places * _OFFSET_NBYTES
    if len(states) != n_rows or len(columns) != end + n_places * _LENGTH_NBYTES:
        raise ValueError(f"no {n_rows} placements")
    gaps = _from_bytes(columns[n_rows:end], n_places, "<u8")
    lengths = _from_bytes(columns[end:], n_places, "<u4").cumsum(dtype=np.uint32)
    gaps[1:] += lengths[:-1]
    placements = np.zeros(n_rows, PLACEMENT_DTYPE)
    placements["state"] = states & 0x7F
    placements["host_offset"][has_place] = gaps.cumsum(dtype=np.uint64)
    placements["length"][has_place] = lengths
    return placements


class PlacedBlocks(NamedTuple):
    """The placements of one batch of blocks, as `Writer.place` takes them."""

    first_block: int
    placements: Placements


class PlacementLog:
    """The placements of a job's batches, in memory; iterating gives them again.

    Attributes
    ----------
    nbytes : int
        Bytes that it takes.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[int, int, bytes]] = []
        self.nbytes: int = 0

    def add(self, first_block: int, placements: Placements) -> None:
        """Add a batch, which comes after those added before."""
        packed = pack_placements(placements)
        self._batches.append((first_block, len(placements), packed))
        self.nbytes += len(packed)

    def __iter__(self) -> Iterator[PlacedBlocks]:
        for first_block, n_rows, packed in self._batches:
            yield PlacedBlocks(first_block, unpack_placements(packed, n_rows))


def _has_place(placements: Placements) -> NDArray[np.bool_]:
    has_place: NDArray[np.bool_] = (placements["host_offset"] != 0) | (placements["length"] != 0)
    return has_place


def _by_byte(column: NDArray[Any]) -> bytes:
    """Return the lowest bytes of all values, then the next ones."""
    octets = column.astype(column.dtype.newbyteorder("<")).view(np.uint8)
    return octets.reshape(-1, column.itemsize).T.tobytes()


def _from_bytes(octets: bytes, n_values: int, dtype: str) -> NDArray[Any]:
    nbytes = np.dtype(dtype).itemsize
    rows = np.frombuffer(octets, np.uint8).reshape(nbytes, n_values).T
    # A copy: the bytes are not to be changed.
    return rows.copy(order="C").reshape(-1).view(dtype)
