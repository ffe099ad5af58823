"""Disks whose size is no multiple of 512: every reader fills up the last sector."""

from __future__ import annotations

import gzip
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from tests.helpers import qemu
from tests.helpers.images import noise
from tests.helpers.qcow2 import qemu_io

import imgcore

MIB = 1 << 20
ODD_SIZES = (1, 511, 513, 65537, 2 * MIB + 100, 2 * MIB + 511)
SUFFIXES = ("qcow2", "vmdk", "vhd", "vhdx", "vdi")
NAMES = {"vhd": "vpc"}


def whole(nbytes: int) -> int:
    return -(-nbytes // 512) * 512


def content(nbytes: int) -> bytes:
    """Return data at both ends, and zeros between them."""
    edge = min(nbytes, 5000)
    return noise(edge, 1) + bytes(max(0, nbytes - 2 * edge)) + noise(min(edge, nbytes - edge), 2)


def plain(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def zstd(path: Path, data: bytes) -> Path:
    return plain(path.with_suffix(".raw.zst"), zstandard.compress(data))


def gzipped(path: Path, data: bytes) -> Path:
    return plain(path.with_suffix(".raw.gz"), gzip.compress(data))


def odd_qcow2(path: Path, data: bytes) -> Path:
    """Return an image of an odd size, with noise after it in its last cluster."""
    image = path.with_suffix(".qcow2")
    imgcore.convert(plain(path.with_name("padded.raw"), data.ljust(whole(len(data)), b"z")), image)
    with image.open("r+b") as file:
        file.seek(24)
        file.write(len(data).to_bytes(8, "big"))
    return image


def overlay(path: Path, data: bytes) -> Path:
    base = plain(path.with_name("base.raw"), data)
    image = path.with_suffix(".qcow2")
    qemu.run("create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image)
    return image


MAKERS: dict[str, Callable[[Path, bytes], Path]] = {
    "raw": plain,
    "zst": zstd,
    "gz": gzipped,
    "qcow2": odd_qcow2,
    "backing": overlay,
}
ACCESSIBLE = [name for name in MAKERS if name not in ("zst", "gz")]


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[[Path, bytes], Path]:
    return MAKERS[request.param]


@pytest.mark.parametrize("nbytes", ODD_SIZES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_qemu_reads_what_was_converted(
    tmp_path: Path, make: Callable[[Path, bytes], Path], suffix: str, nbytes: int
) -> None:
    data = content(nbytes)
    source = make(tmp_path / "a.raw", data)
    target = tmp_path / f"b.{suffix}"
    result = imgcore.convert(source, target)
    assert result.virtual_size == result.bytes_data + result.bytes_zero == whole(nbytes)
    name = NAMES.get(suffix, suffix)
    qemu.run("convert", "-f", name, "-O", "raw", target, tmp_path / "back.raw")
    back = (tmp_path / "back.raw").read_bytes()
    assert back[: whole(nbytes)] == data.ljust(whole(nbytes), b"\0")
    # VHD: qemu-img rounds the size up to a geometry.
    assert not any(back[whole(nbytes) :])


@pytest.mark.parametrize("nbytes", ODD_SIZES)
@pytest.mark.parametrize("name", ["raw", "zst", "gz"])
@pytest.mark.parametrize("target", ["b.raw", "b.raw.gz", "b.raw.zst"])
def test_raw_to_raw_keeps_the_size(tmp_path: Path, name: str, target: str, nbytes: int) -> None:
    data = content(nbytes)
    source = MAKERS[name](tmp_path / "a.raw", data)
    result = imgcore.convert(source, tmp_path / target)
    assert result.virtual_size == result.bytes_data + result.bytes_zero == whole(nbytes)
    written = (tmp_path / target).read_bytes()
    if target.endswith(".gz"):
        written = gzip.decompress(written)
    elif target.endswith(".zst"):
        written = zstandard.decompress(written)
    assert written == data


@pytest.mark.parametrize("preallocation", ["falloc", "full"])
def test_preallocated_raw(tmp_path: Path, preallocation: str) -> None:
    source = plain(tmp_path / "a.raw", content(2 * MIB + 100))
    imgcore.convert(source, tmp_path / "b.raw", options={"preallocation": preallocation}, sparse=0)
    assert (tmp_path / "b.raw").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("nbytes", ODD_SIZES)
@pytest.mark.parametrize("name", ACCESSIBLE)
def test_read_and_extents(tmp_path: Path, name: str, nbytes: int) -> None:
    data = content(nbytes)
    with imgcore.open(MAKERS[name](tmp_path / "a.raw", data)) as image:
        assert image.virtual_size == whole(nbytes)
        padded = data.ljust(whole(nbytes), b"\0")
        assert image.read(0, whole(nbytes)) == padded
        last = whole(nbytes) - 512
        for offset, length in ((last, 512), (nbytes - 1, 1), (whole(nbytes) - 3, 3)):
            assert image.read(offset, length) == padded[offset : offset + length]
        for start in (0, last):
            rows = [row for batch in image.extents(start) for row in batch.tolist()]
            assert [row[0] for row in rows] == [start, *(row[0] + row[1] for row in rows[:-1])]
            assert rows[-1][0] + rows[-1][1] == whole(nbytes)
        with pytest.raises(ValueError, match="not inside the disk"):
            image.read(whole(nbytes), 1)


@pytest.mark.parametrize("nbytes", ODD_SIZES)
@pytest.mark.parametrize("name", ACCESSIBLE)
def test_compare_with_what_was_converted(tmp_path: Path, name: str, nbytes: int) -> None:
    source = MAKERS[name](tmp_path / "a.raw", content(nbytes))
    target = tmp_path / "b.vhdx"
    imgcore.convert(source, target)
    assert imgcore.compare(source, target).identical
    data = bytearray(content(nbytes))
    data[-1] ^= 1
    plain(tmp_path / "c.raw", bytes(data))
    assert imgcore.compare(tmp_path / "c.raw", target).first_difference == nbytes - 1
    assert imgcore.compare(target, tmp_path / "c.raw").first_difference == nbytes - 1


@pytest.mark.parametrize("nbytes", ODD_SIZES)
def test_info_measure_and_map_agree_with_qemu(tmp_path: Path, nbytes: int) -> None:
    path = plain(tmp_path / "a.raw", content(nbytes))
    info = imgcore.info(path)
    assert info["virtual-size"] == qemu.info(path, "raw")["virtual-size"] == whole(nbytes)
    for format in ("raw", "qcow2"):
        theirs = qemu.run("measure", "-f", "raw", "-O", format, path).stdout
        ours = imgcore.measure(path, target_format=format)
        assert theirs.split()[2] == str(ours.required)
        assert theirs.split()[-1] == str(ours.fully_allocated)


@pytest.mark.parametrize("nbytes", ODD_SIZES)
def test_an_odd_base(tmp_path: Path, nbytes: int) -> None:
    base = plain(tmp_path / "base.raw", content(nbytes))
    changed = bytearray(content(nbytes))
    changed[-1] ^= 1
    source = plain(tmp_path / "a.raw", bytes(changed))
    target = tmp_path / "b.qcow2"
    imgcore.convert(source, target, backing=base, backing_format="raw")
    qemu.assert_same(source, target, source_format="raw", target_format="qcow2")
    made = imgcore.create(tmp_path / "c.qcow2", backing=base, backing_format="raw")
    assert made.virtual_size == whole(nbytes)
    qemu.assert_same(base, tmp_path / "c.qcow2", source_format="raw", target_format="qcow2")


@pytest.mark.parametrize("over", [0, 512, MIB])
def test_an_odd_base_below_a_larger_overlay(tmp_path: Path, over: int) -> None:
    nbytes = 2 * MIB + 1124
    plain(tmp_path / "base.raw", content(nbytes))
    image = tmp_path / "a.qcow2"
    size = f"size={whole(nbytes) + over}"
    qemu.run("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "-o", size, image)
    for written in (False, True):
        if written:
            # A cluster of the overlay reaches over the end of the base.
            qemu_io(image, f"write -P 7 {2 * MIB} 512")
        imgcore.convert(image, tmp_path / "b.raw", force=True)
        qemu.assert_same(image, tmp_path / "b.raw", source_format="qcow2", target_format="raw")
        with imgcore.open(image) as disk:
            assert disk.read(2 * MIB, 1536)[512:] == content(nbytes)[-612:].ljust(1024, b"\0")


@pytest.mark.parametrize("profile", ["azure", "gce"])
def test_a_profile_that_pads(tmp_path: Path, profile: str) -> None:
    target = tmp_path / {"azure": "b.vhd", "gce": "b.tar.gz"}[profile]
    for maker in (plain, gzipped):
        source = maker(tmp_path / "a.raw", content(25_000_100))
        result = imgcore.convert(source, target, profile=profile, force=True)
        assert result.virtual_size % MIB == 0
        assert imgcore.lint(target, profile=profile).ok


def test_a_word_is_said(
    tmp_path: Path, make: Callable[[Path, bytes], Path], caplog: pytest.LogCaptureFixture
) -> None:
    source = make(tmp_path / "a.raw", content(1000))
    caplog.set_level(logging.WARNING, "imgcore")
    imgcore.convert(source, tmp_path / "b.vdi")
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 1
    assert "1000 bytes, is not a multiple of 512: zeros fill up the last sector" in texts[0]


@pytest.mark.parametrize("n_missing", [1, 24, 511, 512, 700])
def test_a_flat_extent_that_lacks_bytes_is_cut(tmp_path: Path, n_missing: int) -> None:
    """Its descriptor states the sectors, so nothing may be filled up."""
    image = tmp_path / "a.vmdk"
    imgcore.convert(
        plain(tmp_path / "a.raw", content(2048)), image, options=["subformat=monolithicFlat"]
    )
    os.truncate(tmp_path / "a-flat.vmdk", 2048 - n_missing)
    with pytest.raises(imgcore.CorruptImageError, match="past the end of the file"):
        imgcore.open(image)
