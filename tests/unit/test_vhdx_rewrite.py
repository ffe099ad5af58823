"""VHDX around blocks that stay: its structures at the end, one header section."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from tests.helpers import vhdx
from tests.helpers.directed import content, rewrite
from tests.helpers.reading import poke
from tests.helpers.vhdx import MIB, NIL, crc32c, pattern

import imgcore
from imgcore.errors import OptionError, UnsupportedFeatureError

IDENTITY = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"


def raw_disk(path: Path, nbytes: int) -> bytes:
    """Make a raw disk with data at its start, in its middle and at its end."""
    with path.open("wb") as file:
        file.truncate(nbytes)
    poke(path, (0, pattern(1, 4096)), (5 * MIB - 512, pattern(2, 1024)))
    poke(path, (nbytes - 512, pattern(3, 512)))
    return path.read_bytes()


def structures(path: Path) -> tuple[list[bytes], list[bytes]]:
    """Return the headers and the region tables, whose checksums are right."""
    raw = path.read_bytes()
    headers = [raw[at : at + 4096] for at in vhdx.HEADERS]
    tables = [raw[at : at + 64 * 1024] for at in vhdx.REGION_TABLES]
    for item in (*headers, *tables):
        blank = item[:4] + bytes(4) + item[8:]
        assert struct.unpack_from("<I", item, 4)[0] == crc32c(blank)
    return headers, tables


@pytest.mark.parametrize("odd_nbytes", [0, 77 * 512])
@pytest.mark.parametrize("block_nbytes", [MIB, 4 * MIB, 32 * MIB])
def test_a_raw_disk(tmp_path: Path, block_nbytes: int, odd_nbytes: int) -> None:
    path = tmp_path / "a"
    disk = raw_disk(path, 40 * MIB + odd_nbytes)
    cost = rewrite(path, "raw", "vhdx", {"block_size": block_nbytes})
    assert cost.bytes_moved == block_nbytes
    assert content(path, "vhdx") == disk
    assert imgcore.check(path, format="vhdx").ok
    # Holes stay holes, and the last block is whole in the file.
    assert path.stat().st_blocks * 512 < 3 * MIB
    assert path.stat().st_size == cost.file_size


def test_headers(tmp_path: Path) -> None:
    path = tmp_path / "a"
    raw_disk(path, 12 * MIB + 512)
    options = {"block_size": "1M", "data_write_guid": IDENTITY, "virtual_disk_id": IDENTITY}
    rewrite(path, "raw", "vhdx", options)
    headers, tables = structures(path)
    assert tables[0] == tables[1]
    fields = [struct.unpack("<4sIQ16s16s16sHHIQ", header[:80]) for header in headers]
    assert fields[0][2] != fields[1][2]
    for signature, _, _, _, _, log_guid, log_version, version, log_nbytes, log_offset in fields:
        assert (signature, log_guid, log_version, version) == (b"head", NIL.bytes, 0, 1)
        # The last block ends at 13 MiB, and the first one has moved after all regions.
        assert (log_offset, log_nbytes) == (13 * MIB, MIB)
    regions = [struct.unpack_from("<16sQII", tables[0], 16 + 32 * n)[1:3] for n in range(2)]
    assert regions == [(14 * MIB, MIB), (15 * MIB, MIB)]
    assert path.stat().st_size == 17 * MIB
    data = imgcore.info(path, format="vhdx")["format-specific"]["data"]
    assert data["data-write-guid"] == data["virtual-disk-id"] == IDENTITY


def test_nothing_is_left_of_the_old_front(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"\x77" * (3 * MIB))
    rewrite(path, "raw", "vhdx", {"block_size": "1M"})
    front = path.read_bytes()[:MIB]
    assert front.startswith(b"vhdxfile")
    assert b"\x77\x77" not in front


def test_blocks_of_another_size_at_places_that_are_no_multiples(tmp_path: Path) -> None:
    """Blocks of 32 MiB may be at any MiB, where 32 smaller ones follow each other."""
    raw, path = tmp_path / "d.raw", tmp_path / "a"
    with raw.open("wb") as file:
        file.truncate(96 * MIB)
    poke(raw, (0, pattern(1, 33 * MIB)), (64 * MIB, pattern(2, 32 * MIB)))
    imgcore.convert(raw, path, target_format="vdi", sync=False)
    cost = rewrite(path, "vdi", "vhdx", {"block_size": "32M"})
    assert (cost.block_size, cost.bytes_stayed, cost.bytes_moved) == (32 * MIB, 64 * MIB, 32 * MIB)
    assert content(path, "vhdx") == raw.read_bytes()
    assert imgcore.check(path, format="vhdx").ok


@pytest.mark.parametrize("source_format", ["raw", "qcow2", "vdi"])
def test_only_zeros(tmp_path: Path, source_format: str) -> None:
    path = tmp_path / "a"
    imgcore.create(path, 5 * MIB, format=source_format)
    rewrite(path, source_format, "vhdx")
    assert content(path, "vhdx") == bytes(5 * MIB)
    assert imgcore.check(path, format="vhdx").ok


def test_options(tmp_path: Path) -> None:
    path = tmp_path / "a"
    disk = raw_disk(path, 6 * MIB + 512)
    with pytest.raises(UnsupportedFeatureError, match="leave subformat out, or .*imgcore convert"):
        rewrite(path, "raw", "vhdx", {"subformat": "fixed"})
    with pytest.raises(OptionError, match="logical sector size 4096"):
        rewrite(path, "raw", "vhdx", {"logical_sector_size": "4096"})
    assert path.read_bytes() == disk
    imgcore.convert(
        path, tmp_path / "b.vhdx", format="raw", options=["subformat=fixed"], sync=False
    )
    rewrite(path, "raw", "vhdx")
    assert content(path, "vhdx") == content(tmp_path / "b.vhdx", "vhdx") == disk
