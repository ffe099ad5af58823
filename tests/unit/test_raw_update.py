"""Writing to raw disks in place: block devices, odd sizes, holes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.helpers.mounts import loop_device, make_file_system, mounted
from tests.helpers.updates import Model

import imgcore
from imgcore.errors import OptionError

KIB = 1024
MIB = 1 << 20


def noise(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def allocated_nbytes(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Return a raw file of 1 MiB without holes."""
    path = tmp_path / "disk.raw"
    path.write_bytes(noise(MIB))
    return path


# -- block devices ---------------------------------------------------------------------


@pytest.mark.parametrize("sector_nbytes", [512, 4096])
def test_random_changes_of_a_device(disk: Path, sector_nbytes: int) -> None:
    chance = random.Random(sector_nbytes)
    model = Model(disk.read_bytes())
    with loop_device(disk, sector_nbytes=sector_nbytes) as device:
        with imgcore.open(device, mode="r+") as image:
            for _ in range(100):
                nbytes = chance.choice((1, 512, 4 * KIB, 100 * KIB))
                offset = chance.randrange(MIB - nbytes)
                action = chance.choice(("write", "zero", "unmap", "discard", "read", "flush"))
                if action == "write":
                    image.write(offset, noise(nbytes, offset))
                    model.write(offset, noise(nbytes, offset))
                elif action in ("zero", "unmap"):
                    image.zero(offset, nbytes, unmap=action == "unmap")
                    model.write(offset, bytes(nbytes))
                elif action == "discard":
                    image.discard(offset, nbytes)
                    model.discard(offset, nbytes)
                elif action == "read":
                    model.check(offset, image.read(offset, nbytes))
                else:
                    image.flush()
        with open(device, "rb") as file:
            model.check(0, file.read())
    model.check(0, disk.read_bytes())


def test_what_a_device_discards_takes_no_space(disk: Path) -> None:
    with loop_device(disk) as device, imgcore.open(device, mode="r+") as image:
        image.discard(0, MIB // 4)
        image.zero(MIB // 4, MIB // 4)
        image.flush()
        assert image.read(0, MIB // 2) == bytes(MIB // 2)
        assert allocated_nbytes(disk) <= MIB // 2 + 8 * KIB
        image.write(5, b"again")
        assert image.read(0, 15) == b"\0" * 5 + b"again" + b"\0" * 5


def test_zeros_that_keep_their_space_on_a_device(disk: Path) -> None:
    with loop_device(disk) as device, imgcore.open(device, mode="r+") as image:
        image.zero(0, MIB, unmap=False)
        image.flush()
        assert allocated_nbytes(disk) >= MIB
    assert disk.read_bytes() == bytes(MIB)


@pytest.mark.parametrize("size", [MIB // 2, 2 * MIB])
def test_a_device_keeps_its_size(disk: Path, size: int) -> None:
    with loop_device(disk) as device, imgcore.open(device, mode="r+") as image:
        with pytest.raises(OptionError, match="block device keeps its size"):
            image.resize(size, shrink=True)
        image.write(0, b"1")
    assert disk.read_bytes() == b"1" + noise(MIB)[1:]


def test_a_read_only_device_is_refused(disk: Path) -> None:
    with loop_device(disk, read_only=True) as device, pytest.raises(OSError, match="read-only"):
        imgcore.open(device, mode="r+")


def test_a_mounted_device_is_refused(tmp_path: Path) -> None:
    disk = make_file_system("ext4", tmp_path / "disk.raw", 16 * MIB)
    before = disk.read_bytes()
    with (
        loop_device(disk) as device,
        mounted(device, tmp_path / "mount", "-o", "ro"),
        pytest.raises(OSError, match="in use or mounted"),
    ):
        imgcore.open(device, mode="r+")
    assert disk.read_bytes() == before


# -- files -----------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1, 511, 513, 1000, 70_001])
def test_the_last_sector_may_be_incomplete(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / "disk.raw"
    content = noise(nbytes)
    whole = nbytes + -nbytes % 512
    path.write_bytes(content)
    with imgcore.open(path, mode="r+") as image:
        assert image.virtual_size == whole
        image.write(0, b"1")
        image.flush()
        assert path.read_bytes() == b"1" + content[1:]
        image.zero(nbytes, whole - nbytes)
        image.write(whole - 1, b"2")
        expected = bytearray((b"1" + content[1:]).ljust(whole, b"\0"))
        expected[-1:] = b"2"
        assert image.read(0, whole) == expected
    assert path.read_bytes() == expected


def test_discards_at_an_incomplete_end(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(noise(1000))
    with imgcore.open(path, mode="r+") as image:
        image.discard(0, 1024)
        assert image.read(0, 1024) in (bytes(1024), noise(1000).ljust(1024, b"\0"))
    assert path.stat().st_size == 1000


def test_holes_are_written_to_and_made(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
    with imgcore.open(path, mode="r+") as image:
        assert image.read(4 * MIB, 10) == bytes(10)
        image.write(4 * MIB, noise(MIB))
        assert image.read(4 * MIB - 5, MIB + 10) == b"\0" * 5 + noise(MIB) + b"\0" * 5
        image.flush()
        assert MIB <= allocated_nbytes(path) < 2 * MIB
        image.zero(4 * MIB, MIB)
        image.flush()
        assert allocated_nbytes(path) < MIB // 2
        assert image.read(4 * MIB, MIB) == bytes(MIB)


def test_zeros_keep_their_space_if_they_shall(disk: Path) -> None:
    with imgcore.open(disk, mode="r+") as image:
        image.zero(0, MIB, unmap=False)
        image.flush()
        assert allocated_nbytes(disk) >= MIB
        image.zero(0, MIB)
        image.flush()
        assert allocated_nbytes(disk) < MIB // 2
    assert disk.read_bytes() == bytes(MIB)
