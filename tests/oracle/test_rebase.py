"""Rebase and flatten against qemu-img, and against the contents, in every format."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import imgcore
from tests.helpers import qemu
from tests.helpers.chains import (
    FORMATS,
    MIB,
    PAIRS,
    SIZE,
    chain,
    check,
    child,
    content_of,
    disks,
    own_nbytes,
)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("name", "parent"), PAIRS)
def test_flatten(name: str, parent: str, seed: int, tmp_path: Path) -> None:
    contents = disks(seed, 2)
    base, top = chain(tmp_path, (parent, name), contents)
    result = imgcore.flatten(top)
    base.unlink()
    assert content_of(top) == contents[1]
    assert "backing-filename" not in imgcore.info(top)
    assert result.bytes_written <= SIZE
    check(top)
    assert imgcore.flatten(top)[2:5] == (0, 0, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_flatten_leaves_empty_blocks_out(name: str, tmp_path: Path) -> None:
    """What no image of the chain has stays unallocated, and zeros of a parent, too."""
    content = bytearray(64 * MIB)
    content[:65536] = b"x" * 65536
    base = child(tmp_path / f"0.{name}", bytes(content), None)
    content[40 * MIB : 40 * MIB + 512] = b"y" * 512
    top = child(tmp_path / f"1.{name}", bytes(content), base)
    imgcore.flatten(top)
    assert content_of(top) == content
    assert own_nbytes(top) <= 2 * 32 * MIB
    check(top)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("name", "parent"), PAIRS)
def test_rebase_to_another_disk(name: str, parent: str, seed: int, tmp_path: Path) -> None:
    base, mid, content = disks(seed, 3)
    first, top = chain(tmp_path, (parent, name), (base, content))
    other = child(tmp_path / f"other.{parent}", mid, None)
    result = imgcore.rebase(top, backing=other.name, backing_format=parent)
    assert (result.backing, result.backing_format) == (other.name, parent)
    first.unlink()
    assert content_of(top) == content
    assert result.bytes_written + result.bytes_zeroed < SIZE
    check(top)
    imgcore.rebase(top, backing=None)
    other.unlink()
    assert content_of(top) == content
    check(top)


@pytest.mark.parametrize("name", FORMATS)
def test_rebase_inside_the_chain(name: str, tmp_path: Path) -> None:
    """The image between is left out: what it has moves into the overlay."""
    contents = disks(3, 3)
    base, mid, top = chain(tmp_path, [name] * 3, contents)
    imgcore.rebase(top, backing=base.name, backing_format=name)
    mid.unlink()
    assert content_of(top) == contents[2]
    check(top)


def test_what_is_the_same_is_not_copied(tmp_path: Path) -> None:
    contents = disks(4, 2)
    base, top = chain(tmp_path, ("qcow2", "qcow2"), contents)
    copy = tmp_path / "copy.raw"
    imgcore.convert(base, copy)
    result = imgcore.rebase(top, backing="copy.raw", backing_format="raw")
    assert (result.bytes_read, result.bytes_written, result.bytes_zeroed) == (0, 0, 0)
    base.unlink()
    assert content_of(top) == contents[1]


@pytest.mark.parametrize("sizes", [(8, 12, 12), (12, 8, 12), (16, 12, 12), (12, 16, 12)])
def test_sizes(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    """The old parent, the new one and the overlay differ in size."""
    old, new, own = (number * MIB for number in sizes)
    contents = disks(5, 3, 16 * MIB)
    first = child(tmp_path / "0.qcow2", contents[0][:old], None)
    top = tmp_path / "1.qcow2"
    imgcore.create(top, own, backing=first.name, backing_format="qcow2")
    other = child(tmp_path / "2.raw", contents[1][:new], None)
    before = content_of(top)
    imgcore.rebase(top, backing=other.name, backing_format="raw")
    assert content_of(top) == before
    check(top)


@pytest.mark.parametrize("name", ["qcow2"])
@pytest.mark.parametrize("seed", range(3))
def test_qemu_img_agrees(name: str, seed: int, tmp_path: Path) -> None:
    """The same call on copies leaves the same disks, and qemu-img reads ours."""
    base, mid, content = disks(seed + 20, 3)
    _, top = chain(tmp_path, (name, name), (base, content))
    child(tmp_path / f"other.{name}", mid, None)
    theirs = tmp_path / f"theirs.{name}"
    shutil.copy(top, theirs)
    qemu.run("rebase", "-f", name, "-F", name, "-b", f"other.{name}", theirs)
    imgcore.rebase(top, backing=f"other.{name}", backing_format=name)
    (tmp_path / f"0.{name}").unlink()
    qemu.run("compare", "-f", name, "-F", name, top, theirs)
    assert content_of(theirs) == content
    for key in ("backing-filename", "backing-filename-format"):
        assert imgcore.info(top)[key] == imgcore.info(theirs)[key]


@pytest.mark.parametrize("name", FORMATS)
def test_unsafe_only_changes_the_link(name: str, tmp_path: Path) -> None:
    contents = disks(6, 2)
    base, top = chain(tmp_path, (name, name), contents)
    moved = base.rename(tmp_path / f"moved.{name}")
    result = imgcore.rebase(top, backing=moved.name, backing_format=name, unsafe=True)
    assert (result.bytes_read, result.bytes_written) == (0, 0)
    assert content_of(top) == contents[1]
    check(top)


@pytest.mark.parametrize("name", FORMATS)
def test_unsafe_makes_no_loop(name: str, tmp_path: Path) -> None:
    contents = disks(6, 2)
    _, top = chain(tmp_path, (name, name), contents)
    link = tmp_path / f"link.{name}"
    link.symlink_to(top.name)
    for other in (top, link):
        with pytest.raises(imgcore.OptionError, match="is the image"):
            imgcore.rebase(top, backing=other.name, backing_format=name, unsafe=True)
    assert content_of(top) == contents[1]


@pytest.mark.parametrize("is_unsafe", [True, False], ids=["unsafe", "safe"])
def test_children_are_named_when_nothing_is_refused(
    is_unsafe: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = disks(11, 3)
    base, middle, _ = chain(tmp_path, ("vhdx",) * 3, contents)
    other = child(tmp_path / "other.vhdx", contents[0], None)
    with pytest.raises(imgcore.OptionError, match="is the image"):
        imgcore.rebase(middle, backing=middle.name, backing_format="vhdx", unsafe=is_unsafe)
    with pytest.raises(imgcore.ImgcoreError):
        imgcore.rebase(middle, backing=base.name, backing_format="vmdk", unsafe=is_unsafe)
    assert caplog.text == ""
    imgcore.rebase(middle, backing=other.name, backing_format="vhdx", unsafe=is_unsafe)
    assert "is the parent of" in caplog.text


def test_unsafe_needs_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, top = chain(tmp_path, ("qcow2", "qcow2"), disks(7, 2))
    imgcore.rebase(top, backing="elsewhere.raw", backing_format="raw", unsafe=True)
    assert imgcore.info(top)["backing-filename"] == "elsewhere.raw"
    assert "cannot be read" in caplog.text
    assert "[Errno" not in caplog.text
    with pytest.raises(FileNotFoundError):
        imgcore.rebase(top, backing="0.qcow2", backing_format="qcow2")
    imgcore.rebase(top, backing="0.qcow2", backing_format="qcow2", unsafe=True)
    imgcore.rebase(top, backing=None, unsafe=True)
    assert "backing-filename" not in imgcore.info(top)
    check(top)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "qcow2"])
def test_parents_have_the_format_of_their_children(name: str, tmp_path: Path) -> None:
    contents = disks(9, 2)
    _, top = chain(tmp_path, (name, name), contents)
    other = child(tmp_path / "o.qcow2", contents[0], None)
    with pytest.raises(imgcore.OptionError, match="this format, too"):
        imgcore.rebase(top, backing=other.name, backing_format="qcow2")
    assert content_of(top) == contents[1]


def test_refusals(tmp_path: Path) -> None:
    contents = disks(8, 2)
    base, top = chain(tmp_path, ("qcow2", "qcow2"), contents)
    with pytest.raises(imgcore.OptionError, match="never guessed"):
        imgcore.rebase(top, backing=base.name)
    above = child(tmp_path / "above.qcow2", contents[0], top)
    with pytest.raises(imgcore.OptionError, match="has it as its own backing file"):
        imgcore.rebase(top, backing=above.name, backing_format="qcow2")
    with pytest.raises(imgcore.OptionError, match="is the image"):
        imgcore.rebase(top, backing=top.name, backing_format="qcow2")
    lone = child(tmp_path / "lone.qcow2", contents[0], None)
    with pytest.raises(imgcore.OptionError, match="imgcore convert -B"):
        imgcore.rebase(lone, backing=base.name, backing_format="qcow2")
    imgcore.convert(lone, tmp_path / "n.qcow2", backing=base.name, backing_format="qcow2")
    raw = child(tmp_path / "d.raw", contents[0], None)
    with pytest.raises(imgcore.UnsupportedFeatureError, match="not changed in place"):
        imgcore.rebase(raw, backing=base.name, backing_format="qcow2")
    with qemu.held_open("-f", "qcow2", top), pytest.raises(imgcore.TargetError, match="in use"):
        imgcore.rebase(top, backing=base.name, backing_format="qcow2")
    assert content_of(top) == contents[1]
