"""Differencing VHD and VHDX with random sector bitmaps, which no available tool writes.

tests/helpers builds them from the specifications.  The content expected is computed
sector by sector.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import imgcore
from tests.helpers import crosscheck, vhd, vhdx
from tests.helpers.crosscheck import Case
from tests.helpers.images import KIB, MIB

SECTOR = 512


def random_sectors(rng: random.Random, n: int) -> frozenset[int]:
    """Return some of n sectors: runs, single ones, all but one, or none."""
    kind = rng.randrange(5)
    if kind == 0:
        return frozenset(range(rng.randrange(n), n))
    if kind == 1:
        return frozenset(rng.sample(range(n), rng.randrange(n + 1)))
    if kind == 2:
        return frozenset(range(n)) - {rng.randrange(n)}
    if kind == 3:
        return frozenset(range(0, n, rng.randrange(1, 9)))
    return frozenset()


def vhd_case(rng: random.Random, folder: Path) -> None:
    """A dynamic disk with up to three differencing children."""
    nbytes = rng.randrange(1, 600) * SECTOR
    disk, uuid = bytearray(nbytes), b""
    path = folder / "0.vhd"
    for depth in range(rng.randrange(1, 5)):
        block_nbytes = SECTOR << rng.randrange(8)
        blocks = {
            index: vhd.Block(
                rng.randbytes(block_nbytes),
                rng.choice((None, random_sectors(rng, block_nbytes // SECTOR))),
            )
            for index in range(-(-nbytes // block_nbytes))
            if rng.random() < 0.5
        }
        parent, uuid = uuid, rng.randbytes(16)
        fields = {"uuid": uuid}
        path = folder / f"{depth}.vhd"
        if depth == 0:
            vhd.dynamic(path, nbytes, blocks, block_nbytes=block_nbytes, footer_fields=fields)
        else:
            vhd.differencing(
                path,
                nbytes,
                blocks,
                {b"W2ru": f".\\{depth - 1}.vhd".encode("utf-16-le")},
                parent_uuid=parent,
                block_nbytes=block_nbytes,
                footer_fields=fields,
            )
        for index, block in blocks.items():
            n_sectors = block_nbytes // SECTOR
            for sector in range(n_sectors) if block.bits is None else block.bits:
                at = index * block_nbytes + sector * SECTOR
                if at < nbytes:
                    start = sector * SECTOR
                    disk[at : at + SECTOR] = block.data[start : start + SECTOR]
    assert_reads_as(rng, path, disk)


def vhdx_case(rng: random.Random, folder: Path) -> None:
    """A disk with blocks in every state, with up to two differencing children."""
    logical = rng.choice((512, 4096))
    block_nbytes = rng.choice((MIB, 2 * MIB))
    nbytes = rng.randrange(1, 5 * MIB // logical) * logical
    content, path = b"", folder / "0.vhdx"
    for depth in range(rng.randrange(1, 4)):
        image = vhdx.Vhdx(nbytes, block_nbytes, logical=logical, data_guid=vhdx.guid(50 + depth))
        states = [vhdx.NOT_PRESENT, vhdx.UNDEFINED, vhdx.ZERO, vhdx.UNMAPPED, vhdx.FULL, vhdx.FULL]
        if depth:
            image.locator = {
                "parent_linkage": f"{{{vhdx.guid(49 + depth)}}}",
                "relative_path": f".\\{depth - 1}.vhdx",
            }
            states += [vhdx.PARTIAL] * 4
        for index in range(-(-nbytes // block_nbytes)):
            state = rng.choice(states)
            stored = state in (vhdx.FULL, vhdx.PARTIAL)
            data = rng.randbytes(64 * KIB) * (block_nbytes // (64 * KIB)) if stored else b""
            image.blocks[index] = (state, data)
            if state == vhdx.PARTIAL:
                image.own_sectors[index] = set(random_sectors(rng, block_nbytes // logical))
        path = folder / f"{depth}.vhdx"
        image.write(path)
        content = bytes(image.expected(content))
    assert_reads_as(rng, path, content)


def assert_reads_as(rng: random.Random, path: Path, content: bytes | bytearray) -> None:
    """Read the disk as a whole, in random pieces, by conversion and by comparison."""
    with imgcore.open(path) as image:
        assert image.read(0, len(content)) == content
        for _ in range(10):
            length = rng.randrange(1, len(content) + 1)
            offset = rng.randrange(len(content) - length + 1)
            assert image.read(offset, length) == content[offset : offset + length]
    raw, qcow2 = path.with_suffix(".raw"), path.with_suffix(".qcow2")
    imgcore.convert(path, raw, sync=False, threads=rng.choice((1, 3)))
    assert raw.read_bytes() == content
    imgcore.convert(path, qcow2, sync=False, compress=rng.choice((False, True)))
    assert imgcore.compare(path, qcow2).identical
    assert imgcore.check(path).corruptions == 0


CASES: dict[str, Case] = {"vhd": vhd_case, "vhdx": vhdx_case}


@pytest.mark.parametrize("seed", crosscheck.seeds(3))
@pytest.mark.parametrize("name", CASES)
def test_bitmaps_are_honoured(name: str, seed: int, tmp_path: Path) -> None:
    crosscheck.run(name, CASES[name], seed, tmp_path)


@pytest.mark.crosscheck
@pytest.mark.slow
def test_bitmaps_are_honoured_for_a_while(tmp_path: Path) -> None:
    assert crosscheck.run_for_a_while(CASES, tmp_path, crosscheck.SECONDS / 6)
