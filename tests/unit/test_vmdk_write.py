"""The VMDK writers: other programs read and check their files; bytes are compared."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers import qemu
from tests.helpers.images import DENSE, FAR, RAW_IMAGES, SPARSE, RawImage, noise, text
from tests.helpers.vmdk import GRAIN, SECTOR, hosted, marker, open_vmdk, read_guest

import imgcore
from imgcore import limits
from imgcore.engine.extents import PLACEMENT_DTYPE, BlockState
from imgcore.errors import (
    ImgcoreError,
    LimitExceededError,
    OptionError,
    TargetError,
    UnsupportedFeatureError,
)
from imgcore.files.target import Target
from imgcore.formats.api import BackingReference, WriteRequest
from imgcore.formats.option_texts import parse_options
from imgcore.formats.vmdk.driver import DRIVER

SUBFORMATS = ["monolithicSparse", "streamOptimized", "monolithicFlat", "vmfs"]
MIB, GIB, TIB = limits.MIB, limits.GIB, limits.TIB


def _write(raw: Path, path: Path, *options: str, **more: Any) -> Path:
    imgcore.convert(raw, path, format="raw", options=list(options), sync=False, **more)
    return path


def _request(virtual_size: int, *options: str, **more: Any) -> WriteRequest[Any]:
    values = parse_options(DRIVER, options)
    return WriteRequest(virtual_size, values, target_name="disk.vmdk", **more)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "source.raw"
    pieces = [text(200_000), bytes(300_000), noise(90_000), bytes(GRAIN * 600), text(70_000, 3)]
    data = b"".join(pieces)
    path.write_bytes(data.ljust(len(data) + -len(data) % SECTOR, b"\0"))
    return path


@pytest.mark.parametrize("image", RAW_IMAGES, ids=lambda image: image.name)
@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_other_programs_read_it(
    tmp_path: Path, raw_images: Any, image: RawImage, subformat: str
) -> None:
    source = raw_images(image)
    path = _write(source, tmp_path / "a.vmdk", f"subformat={subformat}")
    qemu.assert_check_clean(path, "vmdk")
    qemu.assert_same(source, path, source_format="raw", target_format="vmdk")
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks, report.problems) == (0, 0, [])
    if image is not FAR:
        assert read_guest(open_vmdk(path)) == source.read_bytes()
    vbox = qemu.find_program("vbox-img")
    if vbox is not None and image is not FAR:
        copy = tmp_path / "v.raw"
        command = [vbox, "convert", "--srcfilename", str(path), "--srcformat", "VMDK"]
        command += ["--dstfilename", str(copy), "--dstformat", "RAW"]
        subprocess.run(command, check=True, capture_output=True)
        assert copy.read_bytes() == source.read_bytes()


DISSECT = """
import sys
from pathlib import Path
from dissect.hypervisor.disk.vmdk import VMDK
disk = VMDK(Path(sys.argv[1]))
sys.stdout.buffer.write(disk.read(disk.size))
"""
LIBVMDK = """
import sys
import pyvmdk
handle = pyvmdk.handle()
handle.open(sys.argv[1])
handle.open_extent_data_files()
size = handle.get_media_size()
for at in range(0, size, 65536):
    sys.stdout.buffer.write(handle.read_buffer(min(65536, size - at)))
"""


# dissect is in the test environment, libvmdk in the system's (Debian: python3-libvmdk).
@pytest.mark.parametrize(
    ("python", "module", "code"),
    [
        (sys.executable, "dissect.hypervisor", DISSECT),
        ("/usr/bin/python3", "pyvmdk", LIBVMDK),
    ],
    ids=["dissect", "libvmdk"],
)
@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_other_readers(
    tmp_path: Path, raw_images: Any, subformat: str, python: str, module: str, code: str
) -> None:
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
        pytest.skip(f"{python} has no {module}")
    for image in (DENSE, SPARSE):
        folder = tmp_path / image.name
        folder.mkdir()
        path = _write(raw_images(image), folder / "a.vmdk", f"subformat={subformat}")
        done = subprocess.run([python, "-c", code, str(path)], check=True, capture_output=True)
        assert done.stdout == raw_images(image).read_bytes()


def _structures(image: bytes) -> list[tuple[str, int, int]]:
    """Return (kind, sector, value) of each marker in a streamOptimized file."""
    found = []
    sector = 128
    names = {0: "eos", 1: "table", 2: "directory", 3: "footer"}
    while sector * SECTOR < len(image):
        value, nbytes, kind = struct.unpack_from("<QII", image, sector * SECTOR)
        if nbytes:
            found.append(("grain", sector, value))
            sector += -(-(12 + nbytes) // SECTOR)
        else:
            found.append((names[kind], sector, value))
            sector += 1 + value
    assert sector * SECTOR == len(image)
    return found


def test_the_parts_of_a_stream(tmp_path: Path, raw: Path) -> None:
    path = _write(raw, tmp_path / "a.vmdk", "subformat=streamOptimized")
    image = path.read_bytes()
    found = _structures(image)
    # Two tables of 512 grains, each after its grains, then directory, footer, end.
    assert [part[0] for part in found] == (
        ["grain"] * 7 + ["table"] + ["grain"] * 2 + ["table", "directory", "footer", "eos"]
    )
    assert image[-SECTOR:] == marker(0, 0)
    assert image[-3 * SECTOR : -2 * SECTOR] == marker(1, 3)
    lbas = [part[2] for part in found if part[0] == "grain"]
    assert lbas == sorted(lbas)
    head, footer = image[:SECTOR], image[-2 * SECTOR : -SECTOR]
    assert head[:56] == footer[:56]
    assert head[64:] == footer[64:]
    version, flags = struct.unpack_from("<II", head, 4)
    assert (version, flags) == (3, 0x30001)
    assert struct.unpack_from("<Q", head, 56)[0] == (1 << 64) - 1
    directory = next(part[1] + 1 for part in found if part[0] == "directory")
    assert struct.unpack_from("<Q", footer, 56)[0] == directory
    tables = [part[1] + 1 for part in found if part[0] == "table"]
    assert list(struct.unpack_from("<2I", image, directory * SECTOR)) == tables
    for _, sector, lba in (part for part in found if part[0] == "grain"):
        nbytes = struct.unpack_from("<I", image, sector * SECTOR + 8)[0]
        start = sector * SECTOR + 12
        grain = zlib.decompress(image[start : start + nbytes])
        assert len(grain) == GRAIN
        whole = raw.read_bytes()[lba * SECTOR : lba * SECTOR + GRAIN]
        assert grain == whole.ljust(GRAIN, b"\0")
        # The sector is padded with zeros.
        assert not any(image[start + nbytes : start + nbytes + -(start + nbytes) % SECTOR])


def test_an_empty_stream(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    imgcore.create(path, 8 * GIB, options=["subformat=streamOptimized"], sync=False)
    kinds = [part[0] for part in _structures(path.read_bytes())]
    assert kinds == ["directory", "footer", "eos"]
    qemu.assert_check_clean(path, "vmdk")


def test_the_descriptor_of_a_stream(tmp_path: Path, raw: Path) -> None:
    options = ("subformat=streamOptimized", "adapter_type=buslogic", "hwversion=13", "cid=00c0ffee")
    path = _write(raw, tmp_path / "a.vmdk", *options)
    reader = open_vmdk(path)
    values = reader.descriptor.values
    assert values["encoding"] == "UTF-8"
    assert values["createtype"] == "streamOptimized"
    assert values["ddb.adaptertype"] == "buslogic"
    assert values["ddb.virtualhwversion"] == "13"
    assert values["ddb.toolsversion"] == "2147483647"
    assert values["ddb.toolsinstalltype"] == "4"
    assert values["ddb.longcontentid"].endswith("00c0ffee")
    assert len(values["ddb.longcontentid"]) == 32
    assert not [key for key in values if "uuid" in key]
    assert reader.descriptor.cid == 0xC0FFEE
    assert reader.descriptor.extents[0].name == "a.vmdk"


def test_the_parts_of_a_hosted_extent(tmp_path: Path) -> None:
    """The tables have the same offsets as in qemu-img's files."""
    ours, theirs = tmp_path / "a.vmdk", tmp_path / "b.vmdk"
    imgcore.create(ours, 3 * GIB, options=["adapter_type=ide"], sync=False)
    qemu.run("create", "-q", "-f", "vmdk", theirs, "3G")
    image, other = ours.read_bytes(), theirs.read_bytes()
    assert image[:SECTOR] == other[:SECTOR]
    assert image[21 * SECTOR :] == other[21 * SECTOR :]


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_the_same_bytes_with_any_threads(
    tmp_path: Path, raw: Path, subformat: str, threads: int
) -> None:
    options = (f"subformat={subformat}", "cid=12345678")
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    one = _write(raw, tmp_path / "one" / "a.vmdk", *options, threads=1)
    many = _write(raw, tmp_path / "many" / "a.vmdk", *options, threads=threads)
    assert one.read_bytes() == many.read_bytes()


def test_content_ids_are_random(tmp_path: Path) -> None:
    cids = set()
    for name in "ab":
        imgcore.create(tmp_path / f"{name}.vmdk", MIB, sync=False)
        cids.add(open_vmdk(tmp_path / f"{name}.vmdk").descriptor.cid)
    assert len(cids) == 2


@pytest.mark.parametrize("grain", ["8k", "64k", "1M"])
@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized"])
def test_grain_sizes(tmp_path: Path, raw: Path, subformat: str, grain: str) -> None:
    path = _write(raw, tmp_path / "a.vmdk", f"subformat={subformat}", f"grain_size={grain}")
    qemu.assert_same(raw, path, source_format="raw", target_format="vmdk")
    assert imgcore.check(path).ok


@pytest.mark.parametrize("level", ["fastest", "fast", "default", "best"])
def test_levels(tmp_path: Path, raw: Path, level: str) -> None:
    path = _write(raw, tmp_path / "a.vmdk", f"level={level}", compress=True)
    qemu.assert_same(raw, path, source_format="raw", target_format="vmdk")
    assert open_vmdk(path).subformat == "streamOptimized"


def test_zeroed_grains_are_written(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    writer = DRIVER.writer(_request(4 * GRAIN, "zeroed_grain=on"))
    placements = np.zeros(4, PLACEMENT_DTYPE)
    placements["state"][1] = BlockState.ZERO
    with Target(path, sync=False) as target:
        writer.begin(target)
        writer.place(0, placements, writer.first_offset)
        writer.finish(writer.first_offset)
        target.commit()
    entries = qemu.map_entries(path, "vmdk")
    assert not any(row["data"] for row in entries)
    rows = [row for batch in open_vmdk(path).extents(0, 4 * GRAIN) for row in batch.tolist()]
    assert [(row[1] // GRAIN, row[5]) for row in rows] == [(1, 0), (1, 1), (2, 0)]
    assert path.read_bytes()[4] == 2


def test_zeros_are_stored_if_asked(tmp_path: Path) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(4 * GRAIN))
    for subformat in ("monolithicSparse", "streamOptimized"):
        path = _write(raw, tmp_path / f"{subformat}.vmdk", f"subformat={subformat}", sparse=0)
        assert imgcore.check(path).allocated_clusters == 4


@pytest.mark.parametrize("pieces", [[1024], [300, 724], [100, 300, 100, 524], [512, 512]])
def test_groups_that_are_placed_in_pieces(tmp_path: Path, pieces: list[int]) -> None:
    """Tables are correct even if batches do not end with a group."""
    path = tmp_path / "a.vmdk"
    writer = DRIVER.writer(_request(1024 * GRAIN, "subformat=streamOptimized"))
    packed = zlib.compress(b"x" * GRAIN)
    with Target(path, sync=False) as target:
        file = writer.begin(target)
        offset, block = writer.first_offset, 0
        for n_blocks in pieces:
            placements = np.zeros(n_blocks, PLACEMENT_DTYPE)
            for i in range(n_blocks):
                file.pwrite(offset, struct.pack("<QI", (block + i) * 128, len(packed)) + packed)
                placements[i] = (offset, 12 + len(packed), BlockState.COMPRESSED)
                offset += SECTOR
                if (block + i) % 512 == 511 or i == n_blocks - 1:
                    offset += 5 * SECTOR
            offset = writer.place(block, placements, offset)
            block += n_blocks
        writer.finish(offset)
        target.commit()
    assert read_guest(open_vmdk(path)) == b"x" * (1024 * GRAIN)
    kinds = [part[0] for part in _structures(path.read_bytes())]
    assert kinds.count("grain") == 1024
    assert imgcore.check(path).ok


# -- flat kinds -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["off", "falloc", "full"])
def test_flat_kinds_lie_in_two_files(tmp_path: Path, raw: Path, mode: str) -> None:
    path = _write(raw, tmp_path / "disk.vmdk", "subformat=vmfs", f"preallocation={mode}")
    flat = tmp_path / "disk-flat.vmdk"
    assert flat.read_bytes() == raw.read_bytes()
    n_sectors = raw.stat().st_size // SECTOR
    assert f'RW {n_sectors} VMFS "disk-flat.vmdk"\n' in path.read_text()
    allocated = os.stat(flat).st_blocks * 512
    assert (allocated >= flat.stat().st_size) == (mode != "off")
    with pytest.raises(TargetError):
        _write(raw, tmp_path / "disk.vmdk", "subformat=monolithicFlat")
    _write(raw, tmp_path / "disk.vmdk", "subformat=monolithicFlat", force=True)
    assert f'RW {n_sectors} FLAT "disk-flat.vmdk" 0\n' in path.read_text()


def test_a_data_file_replaces_a_symbolic_link(tmp_path: Path, raw: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"kept")
    flat = tmp_path / "disk-flat.vmdk"
    flat.symlink_to(other)
    _write(raw, tmp_path / "disk.vmdk", "subformat=monolithicFlat", force=True)
    assert not flat.is_symlink()
    assert flat.read_bytes() == raw.read_bytes()
    assert other.read_bytes() == b"kept"


@pytest.mark.parametrize("name", ['a"b.vmdk', "vm-2024-01-01T10:00.vmdk"])
def test_odd_names(tmp_path: Path, raw: Path, name: str) -> None:
    path = _write(raw, tmp_path / name, "subformat=streamOptimized")
    assert open_vmdk(path).descriptor.extents[0].name == "disk.vmdk"
    with pytest.raises(OptionError, match="descriptor"):
        _write(raw, tmp_path / f"c{name}", "subformat=monolithicFlat")
    assert set(os.listdir(tmp_path)) == {name, raw.name}


# -- refusals, limits, measure --------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["subformat=twoGbMaxExtentSparse"], "subformat"),
        (["grain_size=4k"], "grain_size"),
        (["grain_size=96k"], "grain_size"),
        (["grain_size=2M"], "grain_size"),
        (["cid=xyz"], "cid"),
        (["cid=ffffffff"], "cid"),
        (["cid=fffffffe"], "cid"),
        (["hwversion=a"], "hwversion"),
        (["hwversion=4", "compat6=on"], "compat6"),
        (['toolsversion="1'], "toolsversion"),
        (["adapter_type=nvme"], "adapter_type"),
        (["subformat=streamOptimized", "zeroed_grain=on"], "zeroed_grain"),
        (["level=best"], "level"),
        (["subformat=vmfs", "grain_size=128k"], "grain_size"),
        (["preallocation=full"], "preallocation"),
        (["logical_sector_size=1024"], "512, 4096"),
    ],
)
def test_bad_options(options: list[str], word: str) -> None:
    with pytest.raises(OptionError, match=word):
        DRIVER.writer(_request(MIB, *options))


def test_compressing_means_a_stream() -> None:
    with pytest.raises(OptionError, match="monolithicFlat"):
        DRIVER.writer(_request(MIB, "subformat=monolithicFlat", compress=True))


@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_large_sectors_are_kept(
    tmp_path: Path, subformat: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, back = tmp_path / "a.raw", tmp_path / "back.vhdx"
    source.write_bytes(noise(3 * GRAIN) + bytes(MIB))
    large = tmp_path / "large.vhdx"
    imgcore.convert(source, large, options=["logical_sector_size=4096"], sync=False)
    path = tmp_path / "b.vmdk"
    imgcore.convert(large, path, options=[f"subformat={subformat}"], sync=False)
    imgcore.convert(path, back, sync=False)
    assert not caplog.records
    assert open_vmdk(path).descriptor.values["ddb.logicalsectorsize"] == "4096"
    for image in (path, back):
        with imgcore.open(image) as opened:
            assert opened.logical_sector_nbytes == 4096
    qemu.assert_same(source, path, source_format="raw", target_format="vmdk")
    assert imgcore.compare(source, back).identical


def test_large_sectors_are_stated_only_where_there_are_any(tmp_path: Path, raw: Path) -> None:
    path = _write(raw, tmp_path / "a.vmdk")
    assert "ddb.logicalsectorsize" not in open_vmdk(path).descriptor.values
    assert open_vmdk(path).logical_sector_nbytes == 512
    with pytest.raises(OptionError, match="not a multiple of the logical sector size 4096"):
        DRIVER.writer(_request(MIB + 512, "logical_sector_size=4096"))


def test_hardware_version_6(tmp_path: Path) -> None:
    imgcore.create(tmp_path / "a.vmdk", MIB, options=["compat6=on"], sync=False)
    assert open_vmdk(tmp_path / "a.vmdk").descriptor.values["ddb.virtualhwversion"] == "6"


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (_request(MIB + 1), OptionError),
        (_request(MIB, backing=BackingReference("b.vmdk", "vmdk")), UnsupportedFeatureError),
        (_request(1024 * TIB + SECTOR, "subformat=streamOptimized"), LimitExceededError),
        (_request(limits.MAX_VIRTUAL_NBYTES), LimitExceededError),
    ],
    ids=["odd-size", "backing", "directory", "everything"],
)
def test_refused_requests(request_: WriteRequest[Any], error: type[ImgcoreError]) -> None:
    with pytest.raises(error):
        DRIVER.writer(request_)


@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized"])
def test_a_sparse_file_ends_at_2_tib(tmp_path: Path, subformat: str) -> None:
    state = BlockState.STORED if subformat == "monolithicSparse" else BlockState.COMPRESSED
    for offset, fits in ((2 * TIB - 2 * GRAIN, True), (2 * TIB, False)):
        path = tmp_path / f"{fits}.vmdk"
        writer = DRIVER.writer(_request(4 * TIB, f"subformat={subformat}"))
        placements = np.zeros(1, PLACEMENT_DTYPE)
        placements[0] = (offset, 600, state)
        with Target(path, sync=False) as target:
            writer.begin(target)
            if fits:
                writer.place(0, placements, offset + GRAIN)
                continue
            with pytest.raises(LimitExceededError, match="flat subformat"):
                writer.place(0, placements, offset + GRAIN)


@pytest.mark.parametrize("image", RAW_IMAGES, ids=lambda image: image.name)
@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_measure(tmp_path: Path, raw_images: Any, image: RawImage, subformat: str) -> None:
    options = [f"subformat={subformat}"]
    source = raw_images(image)
    measured = imgcore.measure(source, format="raw", target_format="vmdk", options=options)
    path = _write(source, tmp_path / "a.vmdk", *options)
    total = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert measured.fully_allocated >= measured.required
    if subformat == "monolithicSparse":
        # Data of zeros is not written.
        assert path.stat().st_size <= measured.required
    elif subformat == "streamOptimized":
        assert path.stat().st_size <= measured.required
        if image.name == "incompressible":
            assert measured.required < path.stat().st_size * 1.01
    else:
        assert total <= measured.fully_allocated < total + 1024


def test_unwritten_tables_cost_nothing(tmp_path: Path) -> None:
    """An empty disk of 64 TiB has 4 GiB of tables, all in a hole of the file."""
    path = tmp_path / "a.vmdk"
    imgcore.create(path, 64 * TIB, sync=False)
    assert os.stat(path).st_blocks * 512 < 64 * MIB
    reader = open_vmdk(path)
    started = time.monotonic()
    rows = [row for batch in reader.extents(0, 64 * TIB) for row in batch.tolist()]
    assert time.monotonic() - started < 2
    assert sum(row[1] for row in rows) == 64 * TIB
    assert {row[5] for row in rows} == {0}
    # A written table is found among unwritten ones.
    table = 40 * TIB // (512 * GRAIN)
    sparse = reader.disk_extents[0].sparse
    assert sparse is not None
    first = struct.unpack("<I", sparse.file.pread(sparse.gd_offset, 4))[0]
    offset = first * SECTOR + table * 2048 + 5 * 4
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size + GRAIN)
        file.seek(offset)
        file.write(struct.pack("<I", path.stat().st_size // SECTOR - GRAIN // SECTOR))
    found = [row for batch in open_vmdk(path).extents(0, 64 * TIB) for row in batch if row["kind"]]
    assert [int(row["guest_offset"]) for row in found] == [40 * TIB + 5 * GRAIN]


def test_a_hosted_disk_without_sectors(tmp_path: Path) -> None:
    with imgcore.open(hosted(tmp_path / "a.vmdk", 0, {})) as image:
        assert image.virtual_size == 0


@pytest.mark.parametrize("with_grain", [False, True])
@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized"])
def test_tables_beyond_2_tib_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subformat: str, with_grain: bool
) -> None:
    writer = DRIVER.writer(_request(MIB, f"subformat={subformat}"))
    state = BlockState.STORED if subformat == "monolithicSparse" else BlockState.COMPRESSED
    with Target(tmp_path / "a.vmdk", sync=False) as target:
        writer.begin(target)
        if with_grain:
            rows = np.array([(writer.first_offset, 600, state)], dtype=PLACEMENT_DTYPE)
            writer.place(0, rows, writer.first_offset + GRAIN)
        for module in ("sparse_structures", "sparse_writer"):
            limit = f"imgcore.formats.vmdk.{module}.VMDK_MAX_SPARSE_FILE_NBYTES"
            monkeypatch.setattr(limit, writer.first_offset)
        with pytest.raises(LimitExceededError, match="flat subformat"):
            writer.finish(writer.first_offset + GRAIN)
