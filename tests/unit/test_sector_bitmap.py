"""Sector bitmaps against a loop over sectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcore.engine.extents import EXTENT_DTYPE, Kind, join_neighbours
from imgcore.formats.shared import sector_bitmap
from imgcore.formats.shared.sector_bitmap import expand

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents

SECTOR = 512
N_BITS = 16
BLOCK = N_BITS * SECTOR


def row(guest: int, length: int, kind: Kind, host: int = 0, file: int = 0) -> tuple[int, ...]:
    stored = kind is Kind.DATA
    return (guest, length, host * stored, length * stored, file * stored, kind, 0)


def blocks_of(places: list[tuple[int, int]], last_nbytes: int = BLOCK) -> Extents:
    """Return a block for each guest offset (in blocks) and host offset (in bytes)."""
    rows = [row(guest * BLOCK, BLOCK, Kind.DATA, host, file=3) for guest, host in places]
    blocks = np.array(rows, EXTENT_DTYPE)
    if len(blocks):
        blocks["length"][-1] = blocks["host_length"][-1] = last_nbytes
    return blocks


def sector_by_sector(
    bitmaps: NDArray[np.uint8], blocks: Extents, absent: Kind, *, lsb_first: bool, sector: int
) -> Extents:
    rows = []
    for bitmap, block in zip(bitmaps, blocks, strict=True):
        guest, host, length = (int(block[k]) for k in ("guest_offset", "host_offset", "length"))
        for at in range(0, length, sector):
            byte, bit = divmod(at // sector, 8)
            mask = 1 << bit if lsb_first else 0x80 >> bit
            kind = Kind.DATA if bitmap[byte] & mask else absent
            rows.append(row(guest + at, min(sector, length - at), kind, host + at, file=3))
    return join_neighbours(np.array(rows, EXTENT_DTYPE))


bitmap_bytes = st.one_of(st.sampled_from([0x00, 0xFF, 0x0F, 0x80, 0x01]), st.integers(0, 255))
places = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 3)), max_size=8, unique_by=lambda pair: pair[0]
)


@given(places, st.data(), st.booleans(), st.sampled_from([Kind.HOLE, Kind.ZERO]))
@pytest.mark.parametrize("piece_bits", [1, 1 << 18])
@pytest.mark.parametrize("sector", [512, 4096])
def test_every_sector_is_where_its_bit_says(
    piece_bits: int,
    sector: int,
    where: list[tuple[int, int]],
    data: st.DataObject,
    lsb_first: bool,
    absent: Kind,
) -> None:
    # Some blocks follow each other in the file, some do not.
    where = [(guest, guest * BLOCK + apart * SECTOR) for guest, apart in sorted(where)]
    blocks = blocks_of(where, data.draw(st.integers(1, N_BITS)) * SECTOR)
    flat = data.draw(st.lists(bitmap_bytes, min_size=2 * len(blocks), max_size=2 * len(blocks)))
    bitmaps = np.array(flat, np.uint8).reshape(len(blocks), 2)
    before = blocks.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sector_bitmap, "_PIECE_BITS", piece_bits)
        got = expand(
            bitmaps, lsb_first=lsb_first, blocks=blocks, absent=absent, sector_nbytes=sector
        )
    wanted = sector_by_sector(bitmaps, blocks, absent, lsb_first=lsb_first, sector=sector)
    assert got.tolist() == wanted.tolist()
    assert blocks.tolist() == before.tolist(), "the argument was changed"


def test_bit_orders() -> None:
    bitmaps = np.array([[0x01, 0x80]], np.uint8)
    blocks = blocks_of([(0, 4096)])
    rows = expand(bitmaps, lsb_first=True, blocks=blocks, absent=Kind.HOLE)
    assert rows["length"].tolist() == [SECTOR, 14 * SECTOR, SECTOR]
    assert rows["kind"].tolist() == [Kind.DATA, Kind.HOLE, Kind.DATA]
    assert rows["host_offset"].tolist() == [4096, 0, 4096 + 15 * SECTOR]
    rows = expand(bitmaps, lsb_first=False, blocks=blocks, absent=Kind.ZERO)
    assert rows["length"].tolist() == [7 * SECTOR, 2 * SECTOR, 7 * SECTOR]
    assert rows["kind"].tolist() == [Kind.ZERO, Kind.DATA, Kind.ZERO]


def test_full_blocks_that_go_on_are_one_row() -> None:
    """2^16 full bitmaps of 2 MiB blocks take no work or memory for each sector."""
    n = 1 << 16
    bitmaps = np.full((n, 512), 0xFF, np.uint8)
    blocks = np.zeros(n, EXTENT_DTYPE)
    nbytes = np.uint64(4096 * SECTOR)
    blocks["guest_offset"] = np.arange(n, dtype=np.uint64) * nbytes
    blocks["host_offset"] = blocks["guest_offset"] + np.uint64(1 << 20)
    blocks["length"] = blocks["host_length"] = nbytes
    blocks["kind"] = Kind.DATA
    rows = expand(bitmaps, lsb_first=True, blocks=blocks, absent=Kind.HOLE)
    assert rows.tolist() == [row(0, n * int(nbytes), Kind.DATA, 1 << 20)]


def test_what_does_not_fit_is_refused() -> None:
    blocks = blocks_of([(0, 0)])
    for shape in ((1, 1), (2, 2), (0, 2)):
        with pytest.raises(ValueError, match="do not fit"):
            expand(np.zeros(shape, np.uint8), lsb_first=True, blocks=blocks, absent=Kind.HOLE)
