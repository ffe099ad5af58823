"""Which blocks of a new image have a place, before the image is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.engine.extents import PLACEMENT_DTYPE, BlockState, Kind
from imgcore.engine.geometry import ZeroPolicy

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents, Placements
    from imgcore.engine.geometry import Geometry

# Blocks of a chunk: their placements take 2 MiB.
_CHUNK_NBLOCKS: Final = 1 << 17
# The bits of a size that hold the state.
_STATE_BITS: Final = 2


class BlockTable:
    """The states of all blocks in order, in chunks that are absent without a block.

    Memory: a bit for each block that is stored, or 4 bytes if lengths are known.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._n_blocks = -(-geometry.guest_nbytes // geometry.block_nbytes)
        # Packed bits of a chunk, or sizes: states, and lengths in the higher bits.
        self._bits: dict[int, NDArray[np.uint8]] = {}
        self._sizes: dict[int, NDArray[np.uint32]] = {}

    @classmethod
    def of_data(cls, geometry: Geometry, batches: Iterable[Extents]) -> BlockTable:
        """Return the table of an image that stores each block with data.

        Parameters
        ----------
        geometry : Geometry
            The image's.
        batches : iterable of ndarray, dtype EXTENT_DTYPE
            Ascending extents of the disk.
        """
        table = cls(geometry)
        if geometry.zero_policy is ZeroPolicy.STORE:
            table._set(0, table._n_blocks)
            return table
        shift = np.uint64(geometry.block_nbytes.bit_length() - 1)
        for batch in batches:
            rows = batch[batch["kind"] >= Kind.DATA]
            if len(rows):
                firsts = rows["guest_offset"] >> shift
                ends = (
                    (rows["guest_offset"] + rows["length"] - np.uint64(1)) >> shift
                ) + np.uint64(1)
                table._add_ranges(firsts.astype(np.int64), ends.astype(np.int64))
        return table

    def _add_ranges(self, firsts: NDArray[np.int64], ends: NDArray[np.int64]) -> None:
        """Add ascending ranges of blocks, which may touch and share a block."""
        is_first = np.concatenate(([True], firsts[1:] > ends[:-1]))
        is_last = np.concatenate((is_first[1:], [True]))
        firsts, ends = firsts[is_first], ends[is_last]
        for chunk in range(int(firsts[0]) // _CHUNK_NBLOCKS, -(-int(ends[-1]) // _CHUNK_NBLOCKS)):
            start = chunk * _CHUNK_NBLOCKS
            low = int(np.searchsorted(ends, start, side="right"))
            high = int(np.searchsorted(firsts, start + _CHUNK_NBLOCKS, side="left"))
            if low < high:
                edges = np.zeros(_CHUNK_NBLOCKS + 1, dtype=np.int8)
                edges[np.maximum(firsts[low:high] - start, 0)] += 1
                edges[np.minimum(ends[low:high] - start, _CHUNK_NBLOCKS)] -= 1
                self._or(chunk, np.packbits(np.cumsum(edges[:-1], dtype=np.int8) > 0))

    def _set(self, first: int, end: int) -> None:
        if first < end:
            self._add_ranges(np.array([first]), np.array([end]))

    def _or(self, chunk: int, bits: NDArray[np.uint8]) -> None:
        old = self._bits.get(chunk)
        self._bits[chunk] = bits if old is None else old | bits

    def add(self, first_block: int, placements: Placements) -> None:
        """Add blocks of which the engine knows states and lengths."""
        used = placements["state"] != BlockState.ABSENT
        done = 0
        while done < len(placements):
            chunk, at = divmod(first_block + done, _CHUNK_NBLOCKS)
            n = min(len(placements) - done, _CHUNK_NBLOCKS - at)
            if used[done : done + n].any():
                sizes = self._sizes.setdefault(chunk, np.zeros(_CHUNK_NBLOCKS, dtype=np.uint32))
                rows = placements[done : done + n]
                sizes[at : at + n] = rows["length"] << np.uint32(_STATE_BITS) | rows["state"]
            done += n

    def placements(self, first_block: int, n_blocks: int) -> Placements:
        """Return the placements of a range of blocks, without host offsets."""
        rows = np.zeros(n_blocks, dtype=PLACEMENT_DTYPE)
        done = 0
        while done < n_blocks:
            chunk, at = divmod(first_block + done, _CHUNK_NBLOCKS)
            n = min(n_blocks - done, _CHUNK_NBLOCKS - at)
            self._fill(rows[done : done + n], chunk, at)
            done += n
        return rows

    def _fill(self, rows: Placements, chunk: int, at: int) -> None:
        if chunk in self._bits:
            bits = np.unpackbits(self._bits[chunk])[at : at + len(rows)]
            rows["state"] = bits.astype(np.uint32) * np.uint32(BlockState.STORED)
        elif chunk in self._sizes:
            sizes = self._sizes[chunk][at : at + len(rows)]
            rows["state"] = sizes & np.uint32((1 << _STATE_BITS) - 1)
            rows["length"] = sizes >> np.uint32(_STATE_BITS)

    def start_of_last(self, nbytes: int) -> int:
        """Return the offset after which ``nbytes`` of the disk are stored, or 0."""
        n_left = -(-nbytes // self._geometry.block_nbytes)
        for chunk in sorted({*self._bits, *self._sizes}, reverse=True):
            first = chunk * _CHUNK_NBLOCKS
            used = np.flatnonzero(self.placements(first, _CHUNK_NBLOCKS)["state"])
            if len(used) >= n_left:
                return (first + int(used[len(used) - n_left])) * self._geometry.block_nbytes
            n_left -= len(used)
        return 0

    def chunks(self) -> Iterator[tuple[int, Placements]]:
        """Yield (number of the first block, placements) of each chunk with a block."""
        for chunk in sorted({*self._bits, *self._sizes}):
            first = chunk * _CHUNK_NBLOCKS
            yield first, self.placements(first, min(_CHUNK_NBLOCKS, self._n_blocks - first))
