"""The verb ``sync``: what it finds, copies and refuses."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import qemu
from tests.helpers.command import imgcore as imgcore_command
from tests.helpers.images import KIB, MIB, noise

import imgcore
from imgcore.checksums.new_tree import NewTree
from imgcore.disk import block_copy
from imgcore.files.update_file import UpdateFile

SIZE = 6 * MIB + 512


def disks(folder: Path, size: int = SIZE) -> tuple[Path, Path, list[tuple[int, int]]]:
    """Write a disk, and a changed copy; return both, new first, and what differs."""
    old = bytearray(noise(size, 1))
    old[2 * MIB : 3 * MIB] = bytes(MIB)
    new = bytearray(old)
    changed = [(0, 512), (70_000, 5_000), (MIB, 64 * KIB), (2 * MIB + 5, 3), (size - 700, 700)]
    for offset, length in changed:
        new[offset : offset + length] = noise(length, 2)
    new[MIB : MIB + 64 * KIB] = bytes(64 * KIB)
    (folder / "new.raw").write_bytes(new)
    (folder / "old.raw").write_bytes(old)
    return folder / "new.raw", folder / "old.raw", changed


Find = Callable[[Path, Path, list[tuple[int, int]]], dict[str, Any]]


def by_tree(_new: Path, old: Path, _changed: object) -> dict[str, Any]:
    tree = old.with_suffix(".tree")
    imgcore.checksum(old, tree=tree)
    return {"tree": tree}


def by_areas_and_tree(new: Path, old: Path, changed: list[tuple[int, int]]) -> dict[str, Any]:
    return by_tree(new, old, changed) | {"areas": changed}


def since(_new: Path, old: Path, _changed: object) -> dict[str, Any]:
    copy = old.with_name("base.raw")
    copy.write_bytes(old.read_bytes())
    return {"since": copy}


FINDERS: dict[str, Find] = {
    "areas": lambda _new, _old, changed: {"areas": changed},
    "since": since,
    "tree": by_tree,
    "areas and tree": by_areas_and_tree,
    "comparison": lambda *_: {},
    "by_checksum": lambda *_: {"by_checksum": True},
    "by_checksum and tree": lambda _new, old, _: {
        "by_checksum": True,
        "tree": old.with_suffix(".tree"),
    },
    "areas and digest": lambda _new, _old, changed: {"areas": changed, "checksum": "sha256"},
}


@pytest.mark.parametrize("finder", FINDERS.values(), ids=FINDERS)
def test_each_way_to_find_changes(finder: Find, tmp_path: Path) -> None:
    new, old, changed = disks(tmp_path)
    keywords = finder(new, old, changed)
    reports: list[imgcore.Progress] = []
    result = imgcore.sync(new, old, progress=reports.append, **keywords)
    assert old.read_bytes() == new.read_bytes()
    limit = 64 * KIB if "tree" in keywords and "by_checksum" not in keywords else 4 * KIB
    assert result.bytes_written + result.bytes_zeroed <= sum(n + 2 * limit for _, n in changed)
    assert result.bytes_zeroed >= 64 * KIB
    assert result.virtual_size == SIZE
    assert [r.done for r in reports] == sorted(r.done for r in reports)
    assert reports[-1].done == reports[-1].total == SIZE
    digest = imgcore.checksum(new)
    assert result.checksum == (digest if {"tree", "checksum"} & keywords.keys() else None)
    if "tree" in keywords:
        assert imgcore.checksum(new, tree=keywords["tree"]) == digest
        again = imgcore.sync(new, old, tree=keywords["tree"])
        assert (again.areas, again.bytes_written, again.checksum) == (0, 0, digest)


def test_images_may_be_open(tmp_path: Path) -> None:
    new, old, _ = disks(tmp_path)
    with imgcore.open(new) as source, imgcore.open(old, mode="r+") as target:
        imgcore.sync(source, target)
        assert target.read(70_000, 5_000) == noise(5_000, 2)
        assert imgcore.sync(source, target).areas == 0
        with pytest.raises(imgcore.OptionError, match="takes no options"):
            imgcore.sync(source, target, target_format="raw")
        with pytest.raises(imgcore.ImgcoreError, match="for reading only"):
            imgcore.sync(target, source)
    assert old.read_bytes() == new.read_bytes()


def test_a_bitmap_tells(tmp_path: Path) -> None:
    if qemu.find_program("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    raw, old, changed = disks(tmp_path)
    new = tmp_path / "new.qcow2"
    imgcore.convert(old, new)
    qemu.run("bitmap", "--add", "--enable", new, "b0")
    content = raw.read_bytes()
    for number, (offset, length) in enumerate(changed):
        part = tmp_path / f"part{number}"
        part.write_bytes(content[offset : offset + length])
        qemu.checked(["qemu-io", "-f", "qcow2", "-c", f"write -s {part} {offset} {length}", new])
    result = imgcore.sync(new, old, bitmap="b0")
    assert old.read_bytes() == content
    assert result.bytes_read < SIZE // 2


def test_a_larger_source(tmp_path: Path) -> None:
    new, old, _ = disks(tmp_path)
    with new.open("ab") as file:
        file.write(noise(MIB, 3))
    before = old.read_bytes()
    with pytest.raises(imgcore.OptionError, match=r"may grow \(--resize\)"):
        imgcore.sync(new, old)
    assert old.read_bytes() == before
    imgcore.sync(new, old, resize=True)
    assert old.read_bytes() == new.read_bytes()


def test_a_smaller_source_leaves_the_rest(tmp_path: Path) -> None:
    new, old, _ = disks(tmp_path)
    rest = noise(MIB, 4)
    with old.open("ab") as file:
        file.write(rest)
    imgcore.sync(new, old)
    assert old.read_bytes() == new.read_bytes() + rest


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"areas": [], "bitmap": "b"}, "areas and bitmap are given"),
        ({"since": "x", "by_checksum": True}, "since and by_checksum are given"),
        ({"areas": [(0, SIZE + 512)]}, "outside the disk"),
        ({"bitmap": "b"}, "no bitmap 'b'"),
        ({"checksum": "md5"}, "no checksum algorithm"),
        ({"rate": 1, "control": imgcore.Control()}, "rate and control are both"),
    ],
)
def test_wrong_arguments(keywords: dict[str, Any], words: str, tmp_path: Path) -> None:
    new, old, _ = disks(tmp_path)
    before = old.read_bytes()
    with pytest.raises(imgcore.OptionError, match=words):
        imgcore.sync(new, old, **keywords)
    assert old.read_bytes() == before


def test_trees_of_other_disks_are_refused(tmp_path: Path) -> None:
    new, old, _ = disks(tmp_path)
    other = tmp_path / "other.raw"
    other.write_bytes(b"x" * MIB)
    tree = tmp_path / "t"
    imgcore.checksum(other, tree=tree)
    for keywords in ({}, {"areas": [(0, 512)]}):
        with pytest.raises(imgcore.OptionError, match="the checksum tree"):
            imgcore.sync(new, old, tree=tree, **keywords)
    with pytest.raises(FileNotFoundError):
        imgcore.sync(new, old, tree=tmp_path / "none")


def test_the_target_is_not_its_own_source(tmp_path: Path) -> None:
    new, _, _ = disks(tmp_path)
    link = tmp_path / "link.raw"
    link.hardlink_to(new)
    overlay = tmp_path / "o.qcow2"
    imgcore.create(overlay, backing="new.raw", backing_format="raw")
    for source in (new, link, overlay):
        with pytest.raises(imgcore.TargetError, match="would change while it is read"):
            imgcore.sync(source, new)


def test_a_tree_is_not_one_of_the_images(tmp_path: Path) -> None:
    new, old, _ = disks(tmp_path)
    for path in (new, old):
        with pytest.raises(imgcore.TargetError, match="is read by this|in use"):
            imgcore.sync(new, old, by_checksum=True, tree=path)


@pytest.mark.parametrize("has_tree", [True, False])
def test_an_error_keeps_no_file_open(
    has_tree: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even while the exception is there, whose frames hold the search."""
    new, copy = tmp_path / "new.raw", tmp_path / "copy.qcow2"
    new.write_bytes(noise(8 * MIB, 9))
    imgcore.create(copy, 8 * MIB)
    keywords = by_tree(new, copy, None) if has_tree else {"by_checksum": True}
    n_open = len(os.listdir("/proc/self/fd"))

    def full(self: UpdateFile, offset: int, data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", self.path)

    monkeypatch.setattr(UpdateFile, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught:
        imgcore.sync(new, copy, **keywords)
    assert caught.value.errno == errno.ENOSPC
    assert len(os.listdir("/proc/self/fd")) == n_open


def test_a_full_disk_says_how_far_it_got(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, copy = tmp_path / "new.raw", tmp_path / "copy.qcow2"
    content = noise(16 * MIB, 9)
    new.write_bytes(content)
    imgcore.create(copy, 16 * MIB)
    keywords = by_tree(new, copy, None)
    tree = keywords["tree"].read_bytes()
    pwrite = UpdateFile.pwrite

    def full(self: UpdateFile, offset: int, data: Any) -> None:
        if offset >= 8 * MIB:
            raise OSError(errno.ENOSPC, "No space left on device", self.path)
        pwrite(self, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(UpdateFile, "pwrite", full)
        with pytest.raises(OSError, match=r"is written up to its offset \d+") as caught:
            imgcore.sync(new, copy, **keywords)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(copy)
    position = int(str(caught.value).split("its offset ")[1].split(")")[0])
    assert position > MIB
    with imgcore.open(copy) as image:
        assert image.read(0, position) == content[:position]
    assert not imgcore.check(copy).corruptions
    assert keywords["tree"].read_bytes() == tree
    imgcore.sync(new, copy, **keywords)
    assert imgcore.compare(new, copy).identical


def test_a_callback_that_raises(tmp_path: Path) -> None:
    new, old, _ = disks(tmp_path)
    keywords = by_tree(new, old, None)
    tree = keywords["tree"].read_bytes()

    def refuse(_: imgcore.Progress) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        imgcore.sync(new, old, progress=refuse, **keywords)
    assert keywords["tree"].read_bytes() == tree
    imgcore.sync(new, old, **keywords)
    assert old.read_bytes() == new.read_bytes()


@pytest.mark.parametrize("finder", ["tree", "areas and tree", "by_checksum and tree"])
def test_a_source_that_goes_back_after_a_failed_run(
    finder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The old tree alone would not tell what the failed run has written."""
    new, old, changed = disks(tmp_path)
    before, tree = old.read_bytes(), tmp_path / "tree"
    imgcore.checksum(old, tree=tree)
    keywords = FINDERS[finder](new, old, changed) | {"tree": tree}

    def fail(_: object) -> None:
        raise KeyError("enough")

    with monkeypatch.context() as patched:
        patched.setattr(NewTree, "finish", fail)
        with pytest.raises(KeyError, match="enough"):
            imgcore.sync(new, old, **keywords)
    assert old.read_bytes() == new.read_bytes()
    new.write_bytes(before)
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            imgcore.sync(new, old, tree=tree)
        assert old.read_bytes() == before
    assert caplog.text.count("both disks are compared") == 1
    assert imgcore.checksum(old, tree=tree) == imgcore.checksum(new)
    assert {path.name for path in tmp_path.glob("tree*")} == {"tree"}


def test_the_mark_of_another_tree(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tree that was made anew suits the target."""
    new, old, _ = disks(tmp_path)
    tree = tmp_path / "tree"
    tree.with_name("tree.imgcore-sync").write_text("of an older one\n")
    imgcore.checksum(old, tree=tree)
    with caplog.at_level(logging.WARNING):
        imgcore.sync(new, old, tree=tree)
    assert old.read_bytes() == new.read_bytes()
    assert not caplog.text
    assert not list(tmp_path.glob("*.imgcore-sync"))


def test_a_source_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, old, _ = disks(tmp_path)
    keywords = by_tree(new, old, None)
    tree = keywords["tree"].read_bytes()

    def change(_: imgcore.Progress) -> None:
        new.write_bytes(bytes(SIZE))

    with pytest.raises(imgcore.ImgcoreError, match="changed"):
        imgcore.sync(new, old, progress=change, **keywords)
    assert keywords["tree"].read_bytes() == tree


def test_many_small_and_some_long_areas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_copy, "_PIECE_NBYTES", 64 * KIB)
    monkeypatch.setattr(block_copy, "_PIECE_RANGES", 4)
    monkeypatch.setattr(block_copy, "_GRAIN_NBYTES", 4 * KIB)
    chance = random.Random(5)
    new, old = tmp_path / "new.raw", tmp_path / "old.raw"
    content, before = bytearray(chance.randbytes(MIB)), chance.randbytes(MIB)
    for _ in range(20):
        at = chance.randrange(MIB - 40_000)
        content[at : at + 40_000] = bytes(40_000)
    new.write_bytes(content)
    old.write_bytes(before)
    areas, at, expected = [], 0, bytearray(before)
    while at < MIB - 200_000:
        length = chance.choice((512, 4 * KIB, 200_000))
        areas.append((at, length))
        at += length + 512 * chance.randrange(20)
    for offset, length in areas:
        first, end = offset - offset % 4096, offset + length + -(offset + length) % 4096
        expected[first:end] = content[first:end]
    imgcore.sync(new, old, areas=areas)
    assert old.read_bytes() == expected


def test_the_command(tmp_path: Path) -> None:
    new, old, changed = disks(tmp_path)
    areas = tmp_path / "areas.json"
    rows = [{"start": o, "length": n, "zero": False, "data": True} for o, n in changed]
    areas.write_text(json.dumps(rows))
    done = imgcore_command("sync", "--areas", str(areas), str(new), str(old), "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["areas"] == len(changed)
    assert answer["checksum"] is None
    assert old.read_bytes() == new.read_bytes()
    done = imgcore_command("sync", str(new), str(old), "--checksum")
    assert done.stdout == imgcore_command("checksum", str(new)).stdout.replace("new", "old")
    done = imgcore_command("sync", str(new), str(old))
    assert done.stdout.endswith("old.raw: 0 areas, 0 B read, 0 B written, 0 B zeroed\n")
    assert imgcore_command("sync", "-q", str(new), str(old)).stdout == ""
    assert imgcore_command("sync", str(new)).returncode == 2
    with new.open("ab") as file:
        file.write(bytes(MIB))
    assert imgcore_command("sync", str(new), str(old)).returncode == 2
    assert imgcore_command("sync", str(new), str(old), "--resize").returncode == 0
    assert imgcore_command("sync", str(new), str(new)).returncode == 1
