"""Writing VHD: exact sizes, geometry, headers byte by byte, options and limits."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers import vhd
from tests.helpers.images import GIB, KIB, MIB, noise, text

import imgcore
from imgcore import LimitExceededError, OptionError
from imgcore.engine.extents import PLACEMENT_DTYPE, BlockState
from imgcore.files.target import Target
from imgcore.formats.api import WriteRequest
from imgcore.formats.option_texts import parse_options
from imgcore.formats.vhd.driver import DRIVER
from imgcore.formats.vhd.options import geometry_of, rounded_to_chs

SECTOR = 512
UUID = "6b8b4567-327b-43c6-a43c-9869de3f1c11"
MAX_CHS_NBYTES = 65535 * 16 * 255 * SECTOR


def convert(tmp_path: Path, content: bytes, *options: str, **more: Any) -> Path:
    raw = tmp_path / "in.raw"
    raw.write_bytes(content)
    path = tmp_path / "out.vhd"
    imgcore.convert(raw, path, options=[f"uuid={UUID}", *options], force=True, sync=False, **more)
    return path


def create(tmp_path: Path, nbytes: int, *options: str) -> Path:
    path = tmp_path / "new.vhd"
    imgcore.create(path, nbytes, options=list(options), force=True, sync=False)
    return path


@pytest.mark.parametrize(
    ("nbytes", "chs"),
    [
        (0, (0, 4, 17)),
        (512, (0, 4, 17)),
        (10 * MIB, (301, 4, 17)),
        (1 * GIB, (2080, 16, 63)),
        (127 * GIB, (65278, 16, 255)),
        (65535 * 16 * 63 * SECTOR - SECTOR, (65534, 16, 63)),
        (65535 * 16 * 63 * SECTOR, (16191, 16, 255)),
        (MAX_CHS_NBYTES, (65535, 16, 255)),
        (64 << 40, (65535, 16, 255)),
    ],
)
def test_geometry(nbytes: int, chs: tuple[int, int, int]) -> None:
    assert geometry_of(nbytes) == chs


@pytest.mark.parametrize(
    ("nbytes", "rounded"),
    [
        (0, 0),
        (512, 4 * 17 * SECTOR),
        (10 * MIB, 10_514_432),
        (4 * MIB, 4_212_736),
        (MAX_CHS_NBYTES, MAX_CHS_NBYTES),
        (MAX_CHS_NBYTES + SECTOR, MAX_CHS_NBYTES + SECTOR),
    ],
)
def test_rounding_to_a_geometry(nbytes: int, rounded: int) -> None:
    assert rounded_to_chs(nbytes) == rounded
    if rounded <= MAX_CHS_NBYTES:
        cylinders, heads, per_track = geometry_of(rounded)
        assert cylinders * heads * per_track * SECTOR == rounded


def test_fixed_to_the_byte(tmp_path: Path) -> None:
    content = text(3 * MIB + 5 * SECTOR)
    path = convert(tmp_path, content, "subformat=fixed", "timestamp=946684807")
    raw = path.read_bytes()
    assert raw[: len(content)] == content
    expected = vhd.footer(
        len(content),
        vhd.FIXED,
        timestamp=7,
        chs=geometry_of(len(content)),
        uuid=bytes.fromhex(UUID.replace("-", "")),
    )
    assert raw[len(content) :] == expected


def test_dynamic_to_the_byte(tmp_path: Path) -> None:
    """Footer's copy, header, BAT, bitmap and block (aligned to 4096), footer."""
    block = noise(2 * MIB)
    content = bytes(2 * MIB) + block + bytes(MIB)
    raw = convert(tmp_path, content).read_bytes()
    expected = vhd.footer(
        len(content),
        vhd.DYNAMIC,
        chs=geometry_of(len(content)),
        uuid=bytes.fromhex(UUID.replace("-", "")),
    )
    expected += vhd.header(3, 2 * MIB)
    expected += struct.pack(">3I", vhd.ABSENT, 7, vhd.ABSENT).ljust(SECTOR, b"\xff")
    expected = expected.ljust(3584, b"\0") + b"\xff" * SECTOR + block
    assert raw == expected + expected[:SECTOR]


def test_last_block_is_whole_in_the_file(tmp_path: Path) -> None:
    path = convert(tmp_path, noise(2 * MIB + SECTOR))
    assert path.stat().st_size == 4096 + 2 * MIB + 4096 + 2 * MIB + SECTOR
    assert imgcore.check(path).ok
    with imgcore.open(path) as image:
        assert image.virtual_size == 2 * MIB + SECTOR


def test_same_bytes_every_time(tmp_path: Path) -> None:
    content = text(5 * MIB)
    assert convert(tmp_path, content).read_bytes() == convert(tmp_path, content).read_bytes()


def test_uuid_is_random_and_not_zero(tmp_path: Path) -> None:
    found = set()
    for _ in range(2):
        data = imgcore.info(create(tmp_path, MIB))["format-specific"]["data"]
        found.add(data["uuid"])
    assert len(found) == 2
    assert "00000000-0000-0000-0000-000000000000" not in found


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("nbytes", [0, SECTOR, 10 * MIB, 10 * MIB + SECTOR, 3 * GIB])
def test_size_is_exact(tmp_path: Path, subformat: str, nbytes: int) -> None:
    if not nbytes and subformat == "fixed":
        pytest.skip("no program reads a fixed VHD of 0 bytes")
    path = create(tmp_path, nbytes, f"subformat={subformat}")
    info = imgcore.info(path)
    assert info["virtual-size"] == nbytes
    size = info["format-specific"]["data"]["size"]
    assert (size["from"], size["current"]) == ("current", nbytes)
    assert size["chs"] <= nbytes
    if subformat == "fixed":
        assert path.stat().st_size == nbytes + SECTOR


@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_size_chs(tmp_path: Path, subformat: str) -> None:
    content = noise(10 * MIB)
    path = convert(tmp_path, content, f"subformat={subformat}", "size=chs")
    data = imgcore.info(path)["format-specific"]["data"]
    assert data["size"] == {
        "from": "chs",
        "because": "creator",
        "current": 10_514_432,
        "chs": 10_514_432,
    }
    with imgcore.open(path) as image:
        assert image.read(0, image.virtual_size) == content + bytes(10_514_432 - len(content))
    assert imgcore.check(path).ok


@pytest.mark.parametrize("block_nbytes", [512 * KIB, MIB, 2 * MIB])
def test_block_sizes(tmp_path: Path, block_nbytes: int) -> None:
    content = bytes(3 * MIB) + noise(700) + bytes(3 * MIB - 700)
    path = convert(tmp_path, content, f"block_size={block_nbytes}")
    report = imgcore.check(path)
    assert report.ok
    assert (report.total_clusters, report.allocated_clusters) == (6 * MIB // block_nbytes, 1)
    with imgcore.open(path) as image:
        assert image.read(0, len(content)) == content


def test_batmap(tmp_path: Path) -> None:
    content = bytearray(40 * MIB)
    for block in (0, 3, 17):
        content[block * 2 * MIB] = 1
    path = convert(tmp_path, bytes(content), "batmap=on")
    raw = path.read_bytes()
    assert raw[28:36] == b"tap\0\0\1\0\3"
    cookie, offset, n_sectors, version, checksum = struct.unpack_from(">8sQIII", raw, 2048)
    assert (cookie, offset, n_sectors, version) == (b"tdbatmap", 2560, 1, 0x00010002)
    assert raw[2560:3072] == b"\x90\0\x40".ljust(SECTOR, b"\0")
    assert checksum == ~(0x90 + 0x40) & 0xFFFFFFFF
    assert imgcore.check(path).ok


@pytest.mark.parametrize("sparse", [0, 4096, 65536])
def test_zeros(tmp_path: Path, sparse: int) -> None:
    content = bytes(2 * MIB) + noise(MIB) + bytes(MIB) + bytes(2 * MIB)
    path = convert(tmp_path, content, sparse=sparse)
    assert imgcore.check(path).allocated_clusters == (3 if sparse == 0 else 1)
    with imgcore.open(path) as image:
        assert image.read(0, len(content)) == content


@pytest.mark.parametrize("options", [(), ("block_size=1M",), ("batmap=on",), ("subformat=fixed",)])
@pytest.mark.parametrize("filled", [0, 2, 5])
def test_measure_is_what_convert_makes(
    tmp_path: Path, options: tuple[str, ...], filled: int
) -> None:
    raw = tmp_path / "in.raw"
    with open(raw, "wb") as file:
        for block in range(filled):
            file.seek(block * 2 * MIB)
            file.write(noise(2 * MIB))
        file.truncate(5 * 2 * MIB)
    measured = imgcore.measure(raw, target_format="vhd", options=list(options))
    path = tmp_path / "out.vhd"
    result = imgcore.convert(raw, path, options=list(options))
    assert measured.required == result.file_size
    assert measured.fully_allocated >= measured.required


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("block_size=256k",), "powers of two from 524288 to 2097152"),
        (("block_size=4M",), "powers of two from 524288 to 2097152"),
        (("block_size=1536k",), "powers of two"),
        (("uuid=00000000-0000-0000-0000-000000000000",), "not all of them zero"),
        (("uuid=me",), "32 hexadecimal digits"),
        (("timestamp=0",), "Unix seconds from 946684800"),
        (("timestamp=5241652096",), "to 5241652095"),
        (("size=exact",), "allowed: current, chs"),
        (("subformat=differencing",), "allowed: dynamic, fixed"),
        (("subformat=fixed", "block_size=1M"), "block_size does not go with subformat=fixed"),
        (("subformat=fixed", "batmap=on"), "batmap does not go with subformat=fixed"),
        (("preallocation=full",), "preallocation does not go with subformat=dynamic"),
    ],
)
def test_options_refused(tmp_path: Path, options: tuple[str, ...], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        create(tmp_path, MIB, *options)
    assert list(tmp_path.iterdir()) == []


def test_timestamp_at_its_end(tmp_path: Path) -> None:
    data = imgcore.info(create(tmp_path, MIB, "timestamp=5241652095"))["format-specific"]["data"]
    assert data["timestamp"] == 5241652095


def test_no_compression(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be compressed"):
        convert(tmp_path, noise(SECTOR), compress=True)


def test_largest_dynamic_disk(tmp_path: Path) -> None:
    path = create(tmp_path, 2040 * GIB)
    assert imgcore.info(path)["virtual-size"] == 2040 * GIB
    assert imgcore.check(path).total_clusters == 2040 * 512
    with pytest.raises(LimitExceededError, match="2040 GiB.*subformat=fixed has no such limit"):
        create(tmp_path, 2040 * GIB + SECTOR)


def test_fixed_disk_beyond_2040_gib(tmp_path: Path) -> None:
    raw, path = tmp_path / "in.raw", tmp_path / "out.vhd"
    with open(raw, "wb") as file:
        file.seek(3 * 1024 * GIB - 4096)
        file.write(noise(4096))
    imgcore.convert(raw, path, options=["subformat=fixed"], sync=False)
    with imgcore.open(path) as image:
        assert image.virtual_size == 3 * 1024 * GIB
        assert image.read(image.virtual_size - 4096, 4096) == noise(4096)
    assert path.stat().st_size == 3 * 1024 * GIB + SECTOR


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_preallocation(tmp_path: Path, mode: str) -> None:
    path = create(tmp_path, 4 * MIB, "subformat=fixed", f"preallocation={mode}")
    assert path.stat().st_blocks * 512 >= 4 * MIB
    with imgcore.open(path) as image:
        assert image.read(0, 4 * MIB) == bytes(4 * MIB)


def test_a_block_beyond_a_bat_entry(tmp_path: Path) -> None:
    options = parse_options(DRIVER, {})
    writer = DRIVER.writer(WriteRequest(4 * MIB, options, False, None, 4096))
    rows = np.array([(2 << 40, 2 * MIB, BlockState.STORED)], dtype=PLACEMENT_DTYPE)
    with Target(tmp_path / "a.vhd", sync=False) as target:
        writer.begin(target)
        with pytest.raises(LimitExceededError, match="block 1 would be at 0x20000000000"):
            writer.place(1, rows, (2 << 40) + 2 * MIB)
