"""The verb ``resize``: sizes as people write them, refusals, and children."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as imgcore_command
from tests.helpers.images import MIB, noise

import imgcore


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(noise(2 * MIB))
    return path


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (3 * MIB, 3 * MIB),
        ("3M", 3 * MIB),
        ("+1M", 3 * MIB),
        ("+512", 2 * MIB + 512),
        ("-1M", MIB),
        (" -1.5M ", MIB // 2),
        ("+0", 2 * MIB),
    ],
)
def test_sizes(size: int | str, nbytes: int, disk: Path) -> None:
    content = disk.read_bytes()
    result = imgcore.resize(disk, size, shrink=True)
    assert result == (str(disk), "raw", 2 * MIB, nbytes)
    assert disk.read_bytes() == content[:nbytes].ljust(nbytes, b"\0")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("-2M", "cannot become smaller by 2097152"),
        ("-3M", "cannot become smaller"),
        ("1M", "state that it may shrink"),
        ("+1", "not a positive multiple of 512"),
        (0, "not a positive multiple"),
        ("x", "invalid size"),
        ("--1M", "invalid size"),
        ("+", r"\+ alone is no size: expected a number of bytes after it"),
        (" - ", "- alone is no size"),
    ],
)
def test_wrong_sizes(size: int | str, words: str, disk: Path) -> None:
    content = disk.read_bytes()
    with pytest.raises(imgcore.OptionError, match=words):
        imgcore.resize(disk, size)
    assert disk.read_bytes() == content


def test_an_open_image(disk: Path) -> None:
    with imgcore.open(disk, mode="r+") as image:
        assert imgcore.resize(image, "+1M").virtual_size == image.virtual_size == 3 * MIB
        assert image.read(2 * MIB, MIB) == bytes(MIB)


@pytest.mark.parametrize("name", ["qcow2", "vhdx"])
def test_a_larger_parent_does_not_show(name: str, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(b"x" * (8 * MIB))
    imgcore.convert(tmp_path / "base.raw", tmp_path / f"base.{name}")
    path = tmp_path / f"disk.{name}"
    imgcore.create(path, 4 * MIB, backing=f"base.{name}", backing_format=name)
    for size, nbytes in (("+4M", 4 * MIB), ("2M", 2 * MIB), ("8M", 2 * MIB)):
        imgcore.resize(path, size, shrink=True)
        with imgcore.open(path) as image:
            content = b"x" * nbytes + bytes(image.virtual_size - nbytes)
            assert image.read(0, image.virtual_size) == content


def test_children_are_named(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "imgcore"):
        imgcore.resize(disk, "+1M")
    assert caplog.text == ""
    imgcore.create(disk.with_name("c.qcow2"), backing="disk.raw", backing_format="raw")
    with caplog.at_level(logging.WARNING, "imgcore"):
        imgcore.resize(disk, "+1M")
    assert "is the parent of" in caplog.text
    assert "c.qcow2" in caplog.text


@pytest.mark.parametrize(
    ("name", "size"),
    [("raw", "1M"), ("raw", "+1"), ("vhd", "3T"), ("vhdx", "65T"), ("vdi", "-1M"), ("vmdk", "1M")],
)
def test_refusals_name_no_children(
    name: str, size: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"disk.{name}"
    imgcore.create(path, 4 * MIB)
    imgcore.create(tmp_path / "c.qcow2", backing=path.name, backing_format=name)
    with caplog.at_level(logging.WARNING), pytest.raises(imgcore.ImgcoreError):
        imgcore.resize(path, size)
    assert caplog.text == ""
    imgcore.resize(path, 8 * MIB)
    assert "is the parent of" in caplog.text


@pytest.mark.parametrize("name", ["vhd", "vhdx"])
def test_children_that_state_an_identity_are_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / f"disk.{name}"
    imgcore.create(path, 4 * MIB)
    imgcore.create(tmp_path / f"c.{name}", backing=path.name, backing_format=name)
    with caplog.at_level(logging.WARNING):
        imgcore.resize(path, 8 * MIB)
    assert f"is the parent of {tmp_path / 'c'}.{name}" in caplog.text


def test_children_of_other_formats_are_not_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    imgcore.create(tmp_path / "base.vdi", MIB)
    imgcore.create(tmp_path / "c.vdi", backing="base.vdi", backing_format="vdi")
    imgcore.create(tmp_path / "other.qcow2", MIB)
    with caplog.at_level(logging.WARNING):
        imgcore.resize(tmp_path / "other.qcow2", 2 * MIB)
    assert caplog.text == ""


def test_the_command(disk: Path) -> None:
    done = imgcore_command("resize", str(disk), "+1M")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Image resized.\n", "")
    done = imgcore_command("resize", str(disk), "-1M")
    assert_one_line_error(done, "--shrink", code=2)
    done = imgcore_command("resize", "--shrink", str(disk), "-1M", "--json")
    assert json.loads(done.stdout)["virtual_size"] == disk.stat().st_size == 2 * MIB
    done = imgcore_command("resize", "-q", "--shrink", "-f", "raw", str(disk), "1M")
    assert (done.returncode, done.stdout) == (0, "")
    assert imgcore_command("resize", str(disk)).returncode == 2
