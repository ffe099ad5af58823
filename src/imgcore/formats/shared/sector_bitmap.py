"""Sector bitmaps of VHD and VHDX: which sectors of a block the image itself stores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from imgcore.engine.extents import Kind, join_neighbours
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents

# Bits that are examined together: they take 20 MiB if every sector differs from the
# next.
_PIECE_BITS: Final = 1 << 18


def expand(
    bitmaps: NDArray[np.uint8],
    *,
    lsb_first: bool,
    blocks: Extents,
    absent: Kind,
    sector_nbytes: int = SECTOR_NBYTES,
) -> Extents:
    """Return the extents of blocks, with their sector bitmaps applied.

    Parameters
    ----------
    bitmaps : ndarray, shape (n, nbytes), dtype uint8
        One bitmap for each block: a bit for each of its sectors, in ascending order.
    lsb_first : bool
        Whether a byte's first sector is its lowest bit (VHDX) or its highest bit (VHD).
    blocks : ndarray, shape (n,), dtype EXTENT_DTYPE
        Ascending rows of DATA, one for each block.  A row may be shorter than its
        bitmap; the bits after its end do not count.
    absent : Kind
        Kind of a sector whose bit is not set: HOLE or ZERO.
    sector_nbytes : int
        Sector size in bytes.

    Returns
    -------
    ndarray, shape (m,), dtype EXTENT_DTYPE
        Ascending rows of DATA and ``absent`` that cover the same ranges; neighbours are
        joined.  There may be as many rows as sectors, so the caller must cut them into
        batches.

    Raises
    ------
    ValueError
        A row is longer than its bitmap, or the numbers of rows and bitmaps differ.

    Notes
    -----
    Complexity: O(bytes of bitmaps) for blocks whose bits are all equal, O(bits) for
    others.  Memory: the result and at most 20 MiB.
    """
    n_sectors = -(-blocks["length"].astype(np.int64) // sector_nbytes)
    n_bits = bitmaps.shape[1] * 8
    if len(blocks) != len(bitmaps) or int(n_sectors.max(initial=0)) > n_bits:
        raise ValueError("sector bitmaps do not fit their blocks")
    step = max(1, _PIECE_BITS // n_bits)
    pieces = [blocks[:0]]
    for at in range(0, len(blocks), step):
        part = slice(at, at + step)
        pieces.append(
            _expand_piece(
                bitmaps[part],
                blocks[part],
                n_sectors[part],
                "little" if lsb_first else "big",
                absent,
                sector_nbytes,
            )
        )
    return join_neighbours(np.concatenate(pieces))


def look_overwritten(bitmaps: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Tell which bitmaps, shape (n, nbytes), hold noise rather than runs of sectors.

    Guests write in units of eight sectors, so neighbouring bits rarely differ.  In
    noise, every second pair does.
    """
    changes = np.unpackbits(bitmaps ^ (bitmaps << np.uint8(1)), axis=1)
    looks: NDArray[np.bool_] = changes.sum(axis=1, dtype=np.int64) > bitmaps.shape[1] * 8 // 4
    return looks


def _expand_piece(
    bitmaps: NDArray[np.uint8],
    blocks: Extents,
    n_sectors: NDArray[np.int64],
    order: Literal["little", "big"],
    absent: Kind,
    sector_nbytes: int,
) -> Extents:
    first_byte = bitmaps[:, :1]
    uniform = ((first_byte == 0) | (first_byte == 0xFF))[:, 0] & (bitmaps == first_byte).all(axis=1)
    whole: Extents = blocks[uniform]
    _make_absent(whole, bitmaps[uniform, 0] == 0, absent)
    mixed = ~uniform
    if not mixed.any():
        return whole
    bits = np.unpackbits(bitmaps[mixed], axis=1, bitorder=order)
    parts = _split_at_changes(bits, blocks[mixed], n_sectors[mixed], absent, sector_nbytes)
    rows = np.concatenate((whole, parts))
    return join_neighbours(rows[np.argsort(rows["guest_offset"], kind="stable")])


def _split_at_changes(
    bits: NDArray[np.uint8],
    blocks: Extents,
    n_sectors: NDArray[np.int64],
    absent: Kind,
    sector_nbytes: int,
) -> Extents:
    starts = np.ones(bits.shape, np.bool_)
    np.not_equal(bits[:, 1:], bits[:, :-1], out=starts[:, 1:])
    starts &= np.arange(bits.shape[1]) < n_sectors[:, None]
    block, sector = np.nonzero(starts)
    start = sector.astype(np.uint64) * np.uint64(sector_nbytes)
    end = np.append(start[1:], np.uint64(0))
    last_of_block = np.append(block[1:] != block[:-1], True)
    end[last_of_block] = blocks["length"][block[last_of_block]]
    rows = blocks[block]
    rows["guest_offset"] += start
    rows["host_offset"] += start
    rows["length"] = rows["host_length"] = end - start
    _make_absent(rows, bits[block, sector] == 0, absent)
    return rows


def _make_absent(rows: Extents, which: NDArray[np.bool_], absent: Kind) -> None:
    for name in ("host_offset", "host_length", "file"):
        rows[name][which] = 0
    rows["kind"][which] = absent
