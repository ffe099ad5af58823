"""VDI around blocks that stay: slots without gaps, wherever the first block is."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.helpers import vdi, vhdx
from tests.helpers.directed import content, rewrite
from tests.helpers.reading import poke
from tests.helpers.vhdx import FULL, MIB, Vhdx, pattern

import imgcore
from imgcore.errors import LimitExceededError, OptionError, UnsupportedFeatureError
from imgcore.formats.vdi import rewriter as vdi_rewriter

N_BLOCKS = 8
FOOTER_NBYTES = 512


def stored_vhdx(path: Path, blocks: Sequence[int], *, unused: Sequence[int] = ()) -> Path:
    """Make a disk of 8 blocks, stored from the file's end on; those unused are lost.

    Their places in the file keep their bytes, but nothing refers to them.
    """
    image = Vhdx(N_BLOCKS * MIB, blocks={n: (FULL, pattern(n + 1, MIB)) for n in blocks})
    image.write(path)
    return poke(path, *((vhdx.BAT_OFFSET + 8 * n, bytes(8)) for n in unused))


def slots(path: Path) -> tuple[list[int], int, int]:
    """Return the used entries of the map, the count in the header, and entries."""
    raw = path.read_bytes()[:8192]
    n_entries, n_allocated = struct.unpack_from("<II", raw, 0x180)
    (map_offset,) = struct.unpack_from("<I", raw, 0x154)
    entries = np.frombuffer(raw[map_offset:], "<u4", n_entries)
    return sorted(entries[entries < vdi.ZERO].tolist()), n_allocated, n_entries


def assert_sound(path: Path, disk: bytes) -> None:
    """Every slot below the count is used once, and nothing else is."""
    used, n_allocated, _ = slots(path)
    assert used == list(range(n_allocated))
    assert imgcore.check(path, format="vdi").ok
    assert content(path, "vdi") == disk


def test_all_stays_and_what_follows_is_cut_off(tmp_path: Path) -> None:
    path = stored_vhdx(tmp_path / "a", [0, 2, 3, 5], unused=[0])
    disk = content(path, "vhdx")
    assert path.stat().st_size == 8 * MIB
    cost = rewrite(path, "vhdx", "vdi")
    assert (cost.bytes_stayed, cost.bytes_moved) == (3 * MIB, 0)
    # The blocks are in the order 5, 3, 2, 0.
    assert path.stat().st_size == cost.file_size == 7 * MIB
    assert_sound(path, disk)
    assert slots(path) == ([0, 1, 2], 3, N_BLOCKS)


def test_unused_slots_get_blocks_of_zeros(tmp_path: Path) -> None:
    path = stored_vhdx(tmp_path / "a", [0, 2, 3, 5, 6], unused=[2, 5])
    disk = content(path, "vhdx")
    cost = rewrite(path, "vhdx", "vdi")
    assert cost.bytes_moved == 0
    assert_sound(path, disk)
    assert slots(path) == ([0, 1, 2, 3, 4], 5, N_BLOCKS)
    # The old bytes are nowhere: a guest must not see them.
    assert pattern(3, MIB)[:512] not in path.read_bytes()
    assert pattern(6, MIB)[:512] not in path.read_bytes()


def test_without_free_blocks_the_map_has_more_entries(tmp_path: Path) -> None:
    disk = pattern(1, 4 * MIB)
    path = tmp_path / "a"
    (tmp_path / "d.raw").write_bytes(disk)
    imgcore.convert(
        tmp_path / "d.raw", path, target_format="vhd", options={"subformat": "fixed"}, sync=False
    )
    cost = rewrite(path, "vhd", "vdi")
    assert (cost.bytes_stayed, cost.bytes_moved) == (3 * MIB, MIB)
    assert_sound(path, disk)
    # The slot that the footer was in lies before that of the block that moved.
    assert slots(path) == ([0, 1, 2, 3, 4], 5, 5)
    assert b"conectix" not in path.read_bytes()


def test_too_many_unused_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vdi_rewriter, "_MAX_GAPS", 2)
    path = stored_vhdx(tmp_path / "a", range(8), unused=[1, 3, 5])
    before = path.read_bytes()
    with pytest.raises(
        UnsupportedFeatureError, match="3 blocks .* at most 2 can be filled .*: imgcore convert"
    ):
        rewrite(path, "vhdx", "vdi")
    assert path.read_bytes() == before
    imgcore.convert(path, tmp_path / "b.vdi", format="vhdx", sync=False)
    stored_vhdx(path, range(8), unused=[1, 3, 7])
    assert rewrite(path, "vhdx", "vdi").bytes_moved == 0


def test_what_is_too_much_to_cut_off_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vdi_rewriter, "MAX_DROPPED_NBYTES", MIB)
    path = stored_vhdx(tmp_path / "a", range(4), unused=[0, 1])
    disk = content(path, "vhdx")
    rewrite(path, "vhdx", "vdi")
    assert path.stat().st_size == 8 * MIB
    assert content(path, "vdi") == disk
    result = imgcore.check(path, format="vdi")
    assert (result.corruptions, result.leaks) == (0, 2)


@pytest.mark.parametrize("mib", [5000, 3000])
def test_the_first_block_lies_below_4_gib(tmp_path: Path, mib: int) -> None:
    path = stored_vhdx(tmp_path / "a", [])
    poke(
        path,
        (mib * MIB, pattern(7, MIB)),
        (vhdx.BAT_OFFSET, (mib << 20 | FULL).to_bytes(8, "little")),
    )
    disk = content(path, "vhdx")
    assert disk[:512] == pattern(7, 512)
    if mib > 4096:
        with pytest.raises(LimitExceededError, match="the first block would be at 0x138800000"):
            rewrite(path, "vhdx", "vdi")
        imgcore.convert(path, tmp_path / "b.vdi", format="vhdx", sync=False)
        assert content(tmp_path / "b.vdi", "vdi") == disk
    else:
        assert rewrite(path, "vhdx", "vdi").bytes_moved == 0
        assert content(path, "vdi") == disk


def test_slots_start_where_most_blocks_do(tmp_path: Path) -> None:
    """Clusters of 64 KiB: the blocks' phase is none of the map's."""
    disk = pattern(1, 40 * MIB)
    raw, path = tmp_path / "d.raw", tmp_path / "a"
    raw.write_bytes(disk)
    imgcore.convert(raw, path, target_format="qcow2", sync=False)
    cost = rewrite(path, "qcow2", "vdi")
    assert (cost.bytes_stayed, cost.bytes_moved) == (40 * MIB, 0)
    assert_sound(path, disk)
    (data_offset,) = struct.unpack_from("<I", path.read_bytes()[:512], 0x158)
    assert data_offset % MIB


@pytest.mark.parametrize("odd_nbytes", [0, 77 * 512])
@pytest.mark.parametrize("source_format", ["raw", "vhd"])
def test_a_flat_disk_keeps_its_holes(tmp_path: Path, source_format: str, odd_nbytes: int) -> None:
    nbytes = 12 * MIB + odd_nbytes
    raw, path = tmp_path / "d.raw", tmp_path / "a"
    with raw.open("wb") as file:
        file.truncate(nbytes)
    poke(
        raw,
        (0, pattern(1, 4096)),
        (5 * MIB + 4096, pattern(2, 4096)),
        (nbytes - 512, pattern(3, 512)),
    )
    options = {"subformat": "fixed"} if source_format == "vhd" else {}
    imgcore.convert(raw, path, target_format=source_format, options=options, sync=False)
    disk = raw.read_bytes()
    cost = rewrite(path, source_format, "vdi")
    # A last block with a footer in it moves as well.
    moves = odd_nbytes and source_format == "vhd"
    assert cost.bytes_moved == MIB + (odd_nbytes if moves else 0)
    assert_sound(path, disk)
    assert b"conectix" not in path.read_bytes()
    assert path.stat().st_blocks * 512 < 4 * MIB


def test_only_zeros(tmp_path: Path) -> None:
    for source_format in ("raw", "qcow2", "vhdx"):
        path = tmp_path / source_format
        imgcore.create(path, 5 * MIB, format=source_format)
        rewrite(path, source_format, "vdi")
        assert_sound(path, bytes(5 * MIB))


def test_a_block_that_moves_and_is_zeros(tmp_path: Path) -> None:
    """It is left out, and with it the old footer, which programs would find."""
    raw, path = tmp_path / "d.raw", tmp_path / "a"
    raw.write_bytes(bytes(MIB) + pattern(1, 2 * MIB) + bytes(MIB))
    options = {"subformat": "fixed"}
    imgcore.convert(raw, path, target_format="vhd", options=options, sparse=0, sync=False)
    assert rewrite(path, "vhd", "vdi").bytes_moved == MIB
    assert_sound(path, raw.read_bytes())
    assert path.stat().st_size == 4 * MIB
    assert b"conectix" not in path.read_bytes()


def test_options(tmp_path: Path) -> None:
    path = stored_vhdx(tmp_path / "a", [0, 1])
    with pytest.raises(UnsupportedFeatureError, match="imgcore convert writes one"):
        rewrite(path, "vhdx", "vdi", {"subformat": "fixed"})
    with pytest.raises(OptionError, match="power"):
        rewrite(path, "vhdx", "vdi", {"block_size": 3 * MIB})
    disk = content(path, "vhdx")
    identity = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    rewrite(path, "vhdx", "vdi", {"uuid": identity, "block_size": "512k"})
    assert_sound(path, disk)
    info = imgcore.info(path, format="vdi")
    assert info["format-specific"]["data"]["uuid"] == identity
    assert info["cluster-size"] == MIB // 2


def test_a_map_too_large_to_exchange(tmp_path: Path) -> None:
    path = tmp_path / "a"
    imgcore.create(path, 17 << 40, format="qcow2")
    with pytest.raises(LimitExceededError, match="a larger block_size helps"):
        rewrite(path, "qcow2", "vdi")
    rewrite(path, "qcow2", "vdi", {"block_size": "2M"})
    assert imgcore.check(path, format="vdi").ok
