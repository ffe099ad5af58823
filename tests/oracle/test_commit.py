"""Commit against qemu-img, and against the contents, in every format."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

import imgcore
from imgcore.disk import parent_link
from imgcore.files.update_file import UpdateFile
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
from tests.helpers.mounts import make_file_system, mounted


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("name", "parent"), PAIRS)
def test_commit(name: str, parent: str, seed: int, tmp_path: Path) -> None:
    contents = disks(seed, 2)
    base, top = chain(tmp_path, (parent, name), contents)
    result = imgcore.commit(top)
    assert (result.emptied, result.removed) == (True, False)
    assert content_of(base) == contents[1]
    assert own_nbytes(top) == 0
    assert content_of(top) == contents[1]
    check(base)
    check(top)
    # It can be used again.
    with imgcore.open(top, mode="r+") as image:
        image.write(1000, b"again")
    imgcore.commit(top, remove=True)
    assert not top.exists()
    assert content_of(base) == contents[1][:1000] + b"again" + contents[1][1005:]
    assert sorted(path.name for path in tmp_path.iterdir()) == [base.name]


@pytest.mark.parametrize("name", FORMATS)
def test_the_overlay_may_keep_its_data(name: str, tmp_path: Path) -> None:
    contents = disks(2, 2)
    base, top = chain(tmp_path, (name, name), contents)
    before = own_nbytes(top)
    assert not imgcore.commit(top, empty=False).emptied
    assert own_nbytes(top) == before
    assert content_of(top) == content_of(base) == contents[1]
    again = imgcore.commit(top, empty=False)
    assert content_of(top) == content_of(base) == contents[1]
    assert again.bytes_read > 0


@pytest.mark.parametrize("name", FORMATS)
def test_a_base_deeper_in_the_chain(name: str, tmp_path: Path) -> None:
    contents = disks(3, 3)
    base, _, top = chain(tmp_path, [name] * 3, contents)
    result = imgcore.commit(top, base=base)
    assert (result.emptied, result.removed) == (False, False)
    assert content_of(base) == contents[2]
    assert content_of(top) == contents[2]
    check(base)
    check(top)


def test_a_smaller_base_grows(tmp_path: Path) -> None:
    contents = disks(4, 2)
    base = child(tmp_path / "0.qcow2", contents[0][: 8 * MIB], None)
    top = child(tmp_path / "1.qcow2", contents[1], base)
    imgcore.commit(top)
    assert content_of(base) == content_of(top) == contents[1]
    check(base)


def test_a_larger_base_keeps_its_end(tmp_path: Path) -> None:
    contents = disks(5, 2)
    base = child(tmp_path / "0.raw", contents[0], None)
    top = child(tmp_path / "1.qcow2", contents[1][: 8 * MIB], base)
    imgcore.commit(top)
    assert content_of(base) == contents[1][: 8 * MIB] + contents[0][8 * MIB :]
    assert content_of(top) == contents[1][: 8 * MIB]


@pytest.mark.parametrize("seed", range(3))
def test_qemu_img_agrees(seed: int, tmp_path: Path) -> None:
    """The same call on copies leaves the same disks."""
    contents = disks(seed + 10, 3)
    for folder in ("ours", "theirs"):
        (tmp_path / folder).mkdir()
    ours = chain(tmp_path / "ours", ["qcow2"] * 3, contents)
    theirs = [Path(shutil.copy(path, tmp_path / "theirs")) for path in ours]
    imgcore.commit(ours[2])
    qemu.run("commit", "-f", "qcow2", theirs[2])
    imgcore.commit(ours[1], empty=False)
    qemu.run("commit", "-d", "-f", "qcow2", theirs[1])
    for one, other in zip(ours, theirs, strict=True):
        qemu.run("compare", "-f", "qcow2", "-F", "qcow2", one, other)
        check(one)


@pytest.mark.parametrize("name", ["raw", "qcow2", "vmdk"])
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_blocks_are_shared(kind: str, name: str, tmp_path: Path) -> None:
    """No side sees what the other one writes later."""
    image = make_file_system(kind, tmp_path / "image", 512 * MIB)
    with mounted(image, tmp_path / "mounted", "-o", "loop") as top:
        base, overlay = top / f"base.{name}", top / "overlay.qcow2"
        data = random.Random(name).randbytes(64 * MIB)
        imgcore.create(base, len(data), format=name)
        imgcore.create(overlay, backing=base, backing_format=name)
        with imgcore.open(overlay, mode="r+") as disk:
            disk.write(0, data)
        free_nbytes = free(top)
        result = imgcore.commit(overlay, empty=False)
        assert result.bytes_read == result.bytes_written == len(data)
        assert free_nbytes - free(top) < len(data) // 4
        qemu.run("compare", "-f", name, "-F", "qcow2", base, overlay)
        for path, other in ((base, overlay), (overlay, base)):
            before = content_of(other)
            with imgcore.open(path, mode="r+", format=path.suffix[1:]) as disk:
                disk.write(MIB + 1000, b"later")
            assert content_of(path) == data[: MIB + 1000] + b"later" + data[MIB + 1005 :]
            if other == overlay:
                assert content_of(other) == before
        check(overlay)


def free(folder: Path) -> int:
    os.sync()
    status = os.statvfs(folder)
    return status.f_bfree * status.f_frsize


def test_other_children_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    contents = disks(6, 2)
    base, top = chain(tmp_path, ("qcow2", "qcow2"), contents)
    imgcore.commit(top)
    assert caplog.text == ""
    child(tmp_path / "other.qcow2", contents[0], base)
    imgcore.commit(top)
    assert "other.qcow2" in caplog.text


def test_no_child_is_named_before_a_refusal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = disks(6, 3)
    base, middle, top = chain(tmp_path, ("qcow2",) * 3, contents)
    child(tmp_path / "other.qcow2", contents[0], base)
    with imgcore.open(middle, mode="r+", chain=False):
        with pytest.raises(imgcore.ImgcoreError, match="in use"):
            imgcore.commit(top, base=base)
    assert caplog.text == ""


def test_refusals(tmp_path: Path) -> None:
    contents = disks(7, 2)
    base, top = chain(tmp_path, ("raw", "qcow2"), contents)
    other = child(tmp_path / "other.raw", contents[0], None)
    with pytest.raises(imgcore.OptionError, match="no backing file to commit to"):
        imgcore.commit(base)
    with pytest.raises(imgcore.OptionError, match="not one of its backing files"):
        imgcore.commit(top, base=other)
    for held, name in ((base, "raw"), (top, "qcow2")):
        with qemu.held_open("-f", name, held), pytest.raises(imgcore.ImgcoreError, match="in use"):
            imgcore.commit(top)
    with imgcore.open(base, mode="r+"), pytest.raises(imgcore.TargetError, match="in use"):
        imgcore.commit(top)
    assert content_of(base) == contents[0]
    assert content_of(top) == contents[1]


class Cut(BaseException):
    """The program ends here."""


@pytest.mark.parametrize("name", FORMATS)
def test_an_interruption_at_any_write(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write and sync may be the last: the same call then completes the commit."""
    contents = disks(8, 2, 4 * MIB)
    whole = tmp_path / "whole"
    whole.mkdir()
    chain(whole, (name, name), contents)
    calls = 0
    limit: int | None = None

    def counted(function: Any) -> Any:
        def call(self: UpdateFile, *arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if limit is not None and calls > limit:
                raise Cut
            return function(self, *arguments, **keywords)

        return call

    for method in ("pwrite", "sync", "zero", "punch", "cut", "grow"):
        monkeypatch.setattr(UpdateFile, method, counted(getattr(UpdateFile, method)))
    shutil.copytree(whole, tmp_path / "count")
    imgcore.commit(tmp_path / "count" / f"1.{name}")
    total = calls
    step = max(1, total // 40)
    for cut in range(0, total, step):
        folder = tmp_path / f"cut{cut}"
        shutil.copytree(whole, folder)
        base, top = folder / f"0.{name}", folder / f"1.{name}"
        calls, limit = 0, cut
        with pytest.raises(Cut):
            imgcore.commit(top)
        limit = None
        imgcore.commit(top)
        assert content_of(top) == content_of(base) == contents[1], cut
        assert own_nbytes(top) == 0
        assert sorted(path.name for path in folder.iterdir()) == [base.name, top.name]
        shutil.rmtree(folder)


def test_a_link_that_was_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base has begun to change, and the overlay does not name it anew yet."""
    contents = disks(9, 3)
    base, mid, top = chain(tmp_path, ["vdi"] * 3, contents)

    def stop(*_: Any) -> None:
        raise Cut

    with monkeypatch.context() as patched:
        patched.setattr(parent_link, "_store", stop)
        with pytest.raises(Cut):
            imgcore.commit(top, base=base)
    with pytest.raises(imgcore.CorruptImageError, match="was written to since"):
        content_of(top)
    imgcore.commit(top, base=base)
    assert content_of(top) == content_of(base) == contents[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [base.name, mid.name, top.name]


def test_a_parent_that_changed_is_refused(tmp_path: Path) -> None:
    base, top = chain(tmp_path, ("vdi", "vdi"), disks(10, 2))
    with imgcore.open(base, mode="r+") as image:
        image.write(0, b"x")
    before = base.read_bytes()
    with pytest.raises(imgcore.CorruptImageError, match="was written to since"):
        imgcore.commit(top)
    # A mark of another file does not help.
    (tmp_path / "1.vdi.imgcore-commit").write_text("1 2\n")
    with pytest.raises(imgcore.CorruptImageError, match="was written to since"):
        imgcore.commit(top)
    assert base.read_bytes() == before


@pytest.mark.parametrize("is_copied", [False, True])
def test_a_full_disk(is_copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = disks(11, 2)
    base, top = chain(tmp_path, ("raw", "qcow2"), contents)
    pwrite = UpdateFile.pwrite

    def full(self: UpdateFile, offset: int, data: Any) -> None:
        if self.path == str(base) and offset > SIZE // 2:
            raise OSError(errno.ENOSPC, "No space left on device", self.path)
        pwrite(self, offset, data)

    def full_copy(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(UpdateFile, "pwrite", full)
        patched.setattr(UpdateFile, "takes_copies_of", lambda *_: is_copied)
        patched.setattr(os, "copy_file_range", full_copy)
        with pytest.raises(OSError, match="is written up to its offset"):
            imgcore.commit(top)
    assert content_of(top) == contents[1]
    imgcore.commit(top)
    assert content_of(base) == contents[1]


@pytest.mark.parametrize("way", ["takes_copies_of", "pwrite"])
def test_nothing_is_written_after_a_failure(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next piece waits already when one fails."""
    contents = disks(11, 2)
    base, top = chain(tmp_path, ("raw", "qcow2"), contents)
    pwrite, written = UpdateFile.pwrite, []

    def fail_once(self: UpdateFile, offset: int, data: Any) -> None:
        if self.path == str(base):
            written.append(offset)
            if len(written) == 2:
                raise OSError(errno.EIO, "Input/output error", self.path)
        pwrite(self, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(UpdateFile, "pwrite", fail_once)
        if way == "takes_copies_of":
            patched.setattr(UpdateFile, way, lambda *_: True)
            patched.setattr(os, "copy_file_range", lambda *_: 0)
        with pytest.raises(OSError, match="Input/output error"):
            imgcore.commit(top)
    assert len(written) == 2
    imgcore.commit(top)
    assert content_of(base) == contents[1]


def test_a_commit_that_cannot_begin_leaves_no_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mark that stayed would excuse a parent that is changed later."""
    base, top = chain(tmp_path, ("vdi", "vdi"), disks(3, 2))
    begin = imgcore.Image.begin

    def fail(image: imgcore.Image) -> None:
        if image.path == str(base):
            raise OSError(errno.EIO, os.strerror(errno.EIO), image.path)
        begin(image)

    monkeypatch.setattr(imgcore.Image, "begin", fail)
    with pytest.raises(OSError, match="Input/output error"):
        imgcore.commit(top)
    assert not list(tmp_path.glob("*.imgcore-commit"))
    monkeypatch.undo()
    imgcore.commit(top)
