"""Writing in place: what is the same for every format."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.helpers.updates import Model, change_at_random

import imgcore

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(MIB))
    return path


def test_what_was_written_is_read(disk: Path) -> None:
    expected = bytearray(disk.read_bytes())
    with imgcore.open(disk, mode="r+") as image:
        image.write(1000, b"abc")
        image.zero(5000, 70_000)
        expected[1000:1003] = b"abc"
        expected[5000:75_000] = bytes(70_000)
        assert image.read(0, MIB) == expected
    assert disk.read_bytes() == expected


def test_an_image_for_reading_is_not_written(disk: Path) -> None:
    with imgcore.open(disk) as image, pytest.raises(imgcore.ImgcoreError, match="reading only"):
        image.write(0, b"abc")


def test_a_second_writer_is_refused(disk: Path) -> None:
    with imgcore.open(disk, mode="r+"), pytest.raises(imgcore.ImgcoreError, match="in use"):
        imgcore.open(disk, mode="r+")


def test_a_disk_that_shrinks_must_be_meant_to(disk: Path) -> None:
    with imgcore.open(disk, mode="r+") as image:
        with pytest.raises(imgcore.OptionError, match="shrink=True"):
            image.resize(MIB // 2)
        image.resize(MIB // 2, shrink=True)
        image.resize(2 * MIB)
        assert image.read(MIB // 2, 3 * MIB // 2) == bytes(3 * MIB // 2)


@pytest.mark.parametrize("seed", range(4))
def test_random_changes(disk: Path, seed: int) -> None:
    change_at_random(disk, Model(disk.read_bytes()), seed=seed, sizes=(MIB // 2, 2 * MIB))
