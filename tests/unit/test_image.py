"""An open disk: reads outside of it, closing, and its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import imgcore

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    return path


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, MIB + 1), (MIB + 1, None), (5, -1)])
def test_extents_outside_the_disk(path: Path, start: int, length: int | None) -> None:
    with imgcore.open(path, format="raw") as image:
        with pytest.raises(ValueError, match="is not inside the disk"):
            list(image.extents(start, length))


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (MIB, 1), (MIB - 1, 2)])
def test_reads_outside_the_disk(path: Path, offset: int, nbytes: int) -> None:
    with imgcore.open(path, format="raw") as image:
        with pytest.raises(ValueError, match="is not inside the disk"):
            image.readinto(offset, bytearray(nbytes))
        assert image.readinto(MIB, bytearray()) in (None, 0)


def test_an_image_may_be_closed_twice(path: Path) -> None:
    image = imgcore.open(path, format="raw")
    assert repr(image) == f"<Image {str(path)!r} raw {MIB}>"
    image.close()
    image.close()


def test_a_change_while_it_is_open(path: Path) -> None:
    with imgcore.open(path, format="raw") as image:
        image.check_unchanged()
        os.utime(path, ns=(0, 12345))
        with pytest.raises(imgcore.ImgcoreError, match="time of modification"):
            image.check_unchanged()


def test_the_package_lists_its_public_names() -> None:
    assert dir(imgcore) == sorted(imgcore.__all__)
