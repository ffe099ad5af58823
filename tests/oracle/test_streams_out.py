"""Images that are written as streams, through real pipes, read by other programs.

The bytes of a stream are those of a file that is written with ``-o tables=front``, or
of any file where a format has one order only.
"""

from __future__ import annotations

import fcntl
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import qemu
from tests.helpers.command import imgcore
from tests.helpers.images import SEED, noise, text
from tests.helpers.mounts import loop_device
from tests.helpers.qemu import Variant

KIB, MIB = 1 << 10, 1 << 20

ONE_ORDER = (qemu.RAW, qemu.VMDK_STREAM, qemu.VHD_FIXED)
IN_FRONT = (qemu.VHDX_FIXED, qemu.VDI_FIXED)
FRONT = (
    qemu.QCOW2,
    qemu.QCOW2.with_options("cluster_size=512"),
    qemu.QCOW2.with_options("cluster_size=2M"),
    qemu.QCOW2.with_options("compat=0.10"),
    qemu.QCOW2.with_options("refcount_bits=1"),
    qemu.QCOW2_ZLIB,
    qemu.QCOW2_ZLIB.with_options("cluster_size=4k"),
    qemu.QCOW2_ZSTD,
    qemu.QCOW2.with_options("preallocation=metadata"),
    qemu.VMDK_SPARSE,
    qemu.VHD_DYNAMIC,
    qemu.VDI,
    qemu.VHDX_DYNAMIC,
)
VARIANTS = (*ONE_ORDER, *IN_FRONT, *FRONT)


def make_disk(path: Path) -> Path:
    """Write data of several kinds, holes, and zeros that are stored."""
    with open(path, "wb") as file:
        file.write(text(1 * MIB + 700))
        file.seek(3 * MIB + 4096)
        file.write(noise(2 * MIB))
        file.write(bytes(300 * KIB))
        file.seek(40 * MIB + 512)
        for i in range(40):
            file.write(noise(3000, SEED + i) if i % 3 else text(70_000, i))
            file.seek(90_000 * (i % 5), os.SEEK_CUR)
        # The end of a stream is copied, and what precedes it moved into the pipe.
        file.seek(60 * MIB + 512)
        file.write(noise(18 * MIB))
        file.seek(97 * MIB - 1536)
        file.write(text(1024))
        file.truncate(97 * MIB + 512)
    return path


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_disk(tmp_path_factory.mktemp("disk") / "disk.raw")


def words_of(variant: Variant, *more: str) -> list[str]:
    words = ["convert", "-O", variant.format, *(["-c"] if variant.compress else [])]
    for option in (*variant.options, *variant.own_options, *more):
        words += ["-o", option]
    return words


def streamed(words: list[str], source: Path, target: Path, pace: str) -> None:
    """Write a conversion's stream to a file: by pieces of random sizes, with pauses."""
    chance = random.Random(SEED)
    with (
        subprocess.Popen(
            [sys.executable, "-m", "imgcore", *words, str(source), "-"], stdout=subprocess.PIPE
        ) as process,
        open(target, "wb") as file,
    ):
        assert process.stdout is not None
        reader = process.stdout.fileno()
        while piece := os.read(reader, chance.choice((1, 511, 4096, 65_536, MIB))):
            file.write(piece)
            if pace == "slow" and chance.random() < 0.05:
                time.sleep(0.01)
    assert process.returncode == 0


def assert_reads_the_same(source: Path, image: Path, variant: Variant) -> None:
    qemu.assert_same(source, image, source_format="raw", target_format=variant.format)
    if variant.format in ("qcow2", "vmdk", "vhdx", "vdi"):
        qemu.assert_check_clean(image, variant.format)
    if variant.format != "raw":
        checked = imgcore("check", "-f", variant.format, image)
        assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("threads", ["1", "4"])
@pytest.mark.parametrize("pace", ["fast", "slow"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_a_stream_is_a_file(
    variant: Variant, pace: str, threads: str, disk: Path, tmp_path: Path
) -> None:
    image = tmp_path / f"disk{variant.suffix}"
    words = [*words_of(variant), "--threads", threads, "-q"]
    streamed(words, disk, image, pace)
    if variant.format == "vhd" and "fixed" in variant.name:
        with open(image, "rb") as file:
            assert file.read(disk.stat().st_size) == disk.read_bytes()
    else:
        assert_reads_the_same(disk, image, variant)
    file = tmp_path / "file" / image.name
    file.parent.mkdir()
    done = imgcore(*words_of(variant, *(["tables=front"] if variant in FRONT else [])), disk, file)
    assert done.returncode == 0, done.stderr
    assert file.read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    "source",
    [qemu.QCOW2, qemu.QCOW2_ZLIB, qemu.VMDK_SPARSE, qemu.VHDX_DYNAMIC],
    ids=lambda v: v.name,
)
@pytest.mark.parametrize(
    "variant", [qemu.QCOW2, qemu.QCOW2_ZLIB, qemu.VHD_DYNAMIC, qemu.VDI], ids=lambda v: v.name
)
def test_from_images(source: Variant, variant: Variant, disk: Path, tmp_path: Path) -> None:
    image = tmp_path / f"source{source.suffix}"
    qemu.convert(disk, image, source)
    target = tmp_path / f"disk{variant.suffix}"
    streamed([*words_of(variant), "-q"], image, target, "fast")
    assert_reads_the_same(disk, target, variant)


@pytest.mark.parametrize("variant", [v for v in FRONT if v.format != "vhdx"], ids=lambda v: v.name)
def test_every_zero_is_stored(variant: Variant, tmp_path: Path) -> None:
    """With -S 0 the holes of the source are stored as well."""
    disk, target = tmp_path / "disk.raw", tmp_path / f"disk{variant.suffix}"
    with open(disk, "wb") as file:
        file.write(noise(100_000))
        file.truncate(5 * MIB + 512)
    streamed([*words_of(variant), "-S", "0", "-q"], disk, target, "fast")
    assert_reads_the_same(disk, target, variant)


@pytest.mark.parametrize("variant", FRONT, ids=lambda v: v.name)
@pytest.mark.parametrize("nbytes", [512, 64 * KIB, 2 * MIB])
def test_small_and_empty_disks(variant: Variant, nbytes: int, tmp_path: Path) -> None:
    disk, target = tmp_path / "disk.raw", tmp_path / f"disk{variant.suffix}"
    for content in (b"", noise(nbytes)):
        disk.write_bytes(content)
        os.truncate(disk, nbytes)
        streamed([*words_of(variant), "-q"], disk, target, "fast")
        assert_reads_the_same(disk, target, variant)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_what_a_reader_has_passed_on_does_not_change(format: str, tmp_path: Path) -> None:
    """Pages of the source are in a pipe of the reader's when the job has ended."""
    disk, nbytes = tmp_path / "disk.raw", 40 * MIB
    disk.write_bytes(noise(nbytes))
    expected = subprocess.run(
        [sys.executable, "-m", "imgcore", "convert", "-q", "-O", format, str(disk), "-"],
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, MIB)
    found = b""
    with subprocess.Popen(
        [sys.executable, "-m", "imgcore", "convert", "-q", "-O", format, str(disk), "-"],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        # It keeps one piece more than it needs.
        held = 0
        while n := os.splice(process.stdout.fileno(), writing, 256 * KIB):
            held += n
            while held > 512 * KIB:
                piece = os.read(reading, 64 * KIB)
                found, held = found + piece, held - len(piece)
    assert process.returncode == 0
    with open(disk, "r+b") as file:
        file.write(bytes(nbytes))
    os.close(writing)
    while piece := os.read(reading, MIB):
        found += piece
    os.close(reading)
    assert found == expected


def test_vmdk_names_disk_vmdk(disk: Path, tmp_path: Path) -> None:
    for variant in (qemu.VMDK_SPARSE, qemu.VMDK_STREAM):
        image = tmp_path / "other.vmdk"
        streamed(words_of(variant), disk, image, "fast")
        assert b'SPARSE "disk.vmdk"' in image.read_bytes()[:2048]


def test_a_block_device_is_refused(tmp_path: Path) -> None:
    """The message's advice works: the device as the target, with -n."""
    disk, medium = tmp_path / "disk.raw", tmp_path / "medium"
    disk.write_bytes(noise(MIB))
    medium.write_bytes(bytes(MIB))
    with loop_device(medium) as device:
        with open(device, "wb") as stdout:
            done = subprocess.run(
                [sys.executable, "-m", "imgcore", "convert", "-O", "raw", str(disk), "-"],
                stdout=stdout,
                stderr=subprocess.PIPE,
                timeout=60,
            )
        assert done.returncode == 1
        assert b"name it as the target instead, with -n" in done.stderr
        written = imgcore("convert", "-n", "-O", "raw", disk, device)
        assert written.returncode == 0, written.stderr
        with open(device, "rb") as file:
            assert file.read() == disk.read_bytes()
