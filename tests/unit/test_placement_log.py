"""Placements in few bytes."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcore.engine.extents import PLACEMENT_DTYPE
from imgcore.engine.kinds import BlockState
from imgcore.engine.placement_log import PlacementLog, pack_placements, unpack_placements

_ROWS = st.lists(
    st.one_of(
        st.tuples(st.just(0), st.just(0), st.sampled_from((0, 1))),
        st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.sampled_from((2, 3))),
    ),
    max_size=60,
)


@given(_ROWS)
def test_any_placements_come_back(rows: list[tuple[int, int, int]]) -> None:
    placements = np.array(rows, PLACEMENT_DTYPE)
    packed = pack_placements(placements)
    assert np.array_equal(unpack_placements(packed, len(rows)), placements)


def test_regular_blocks_take_no_space() -> None:
    placements = np.zeros(1 << 17, PLACEMENT_DTYPE)
    placements["state"] = BlockState.STORED
    placements["length"] = 1 << 16
    placements["host_offset"] = 0x50000 + np.arange(1 << 17, dtype=np.uint64) * np.uint64(1 << 16)
    assert len(pack_placements(placements)) < 1 << 14


def test_compressed_blocks_take_two_bytes() -> None:
    lengths = np.random.default_rng(1).integers(20000, 30000, 1 << 14)
    placements = np.zeros(1 << 14, PLACEMENT_DTYPE)
    placements["state"] = BlockState.COMPRESSED
    placements["length"] = lengths
    placements["host_offset"] = 0x50000 + np.cumsum(lengths) - lengths
    assert len(pack_placements(placements)) < 2.5 * len(placements)


@pytest.mark.parametrize(
    ("n_rows", "message"),
    [(0, "the stream is longer"), (1, "the stream is longer"), (3, "no 3 placements")],
)
def test_another_number_is_an_error(n_rows: int, message: str) -> None:
    placements = np.zeros(2, PLACEMENT_DTYPE)
    placements[0] = (512, 512, BlockState.STORED)
    with pytest.raises(ValueError, match=message):
        unpack_placements(pack_placements(placements), n_rows)


def test_damaged() -> None:
    packed = pack_placements(np.zeros(5, PLACEMENT_DTYPE))
    for wrong in (b"", packed[:-1], packed + b"x", zlib.compress(bytes(1 << 20))):
        with pytest.raises(ValueError, match=r"stream|zlib"):
            unpack_placements(wrong, 5)


def test_a_log_gives_batches_again() -> None:
    log = PlacementLog()
    first, second = np.zeros(3, PLACEMENT_DTYPE), np.zeros(2, PLACEMENT_DTYPE)
    first[1] = (4096, 512, BlockState.STORED)
    log.add(0, first)
    log.add(7, second)
    again = list(log)
    assert [blocks.first_block for blocks in again] == [0, 7]
    assert np.array_equal(again[0].placements, first)
    assert np.array_equal(again[1].placements, second)
    assert 0 < log.nbytes < 100
