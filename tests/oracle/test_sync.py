"""Sync into and from every kind of image, against the contents and qemu-img."""

from __future__ import annotations

from pathlib import Path

import pytest

import imgcore
from imgcore.disk.write_access import WriteAccess
from tests.helpers import qemu
from tests.helpers.chains import MIB, check, content_of, disks
from tests.helpers.update_variants import VARIANTS, UpdateVariant

SIZE = 2 * MIB


def states(seed: int) -> list[bytes]:
    """Return a disk at three times."""
    return disks(seed, 3, SIZE)


def made(variant: UpdateVariant, folder: Path, content: bytes) -> Path:
    folder.mkdir()
    return variant.make(folder, content)


def verify(variant: UpdateVariant, path: Path, content: bytes) -> None:
    """Compare the disk, as imgcore and as qemu-img read it."""
    assert content_of(path) == content
    if variant.name != "raw":
        report = imgcore.check(path)
        assert (report.corruptions, report.leaks) == (0, 0), report.problems
    if variant.qemu_format is not None:
        copy = path.with_suffix(".copy")
        qemu.run("convert", "-f", variant.qemu_format, "-O", "raw", path, copy)
        assert copy.read_bytes()[: len(content)] == content


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_into(variant: UpdateVariant, tmp_path: Path) -> None:
    """By a tree, then by areas with the tree, then by a comparison."""
    old, mid, new = states(1)
    target = made(variant, tmp_path / "target", old)
    source, tree = tmp_path / "source.raw", tmp_path / "tree"
    imgcore.checksum(target, tree=tree)
    source.write_bytes(mid)
    result = imgcore.sync(source, target, tree=tree)
    assert 0 < result.bytes_read < SIZE
    verify(variant, target, mid)
    before = tmp_path / "before.raw"
    source.rename(before)
    source.write_bytes(new)
    areas = list(imgcore.changes(source, since=before))
    result = imgcore.sync(source, target, areas=areas, tree=tree)
    verify(variant, target, new)
    assert result.checksum == imgcore.checksum(target, tree=tree)
    source.write_bytes(old)
    imgcore.sync(source, target)
    verify(variant, target, old)
    assert imgcore.sync(source, target).areas == 0


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_from(variant: UpdateVariant, tmp_path: Path) -> None:
    old, new, _ = states(2)
    source = made(variant, tmp_path / "source", new)
    target = tmp_path / "target.qcow2"
    (tmp_path / "old.raw").write_bytes(old)
    imgcore.convert(tmp_path / "old.raw", target)
    imgcore.sync(source, target, since=tmp_path / "old.raw")
    assert content_of(target) == new
    check(target)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.sizes], ids=lambda v: v.name)
def test_a_larger_source(variant: UpdateVariant, tmp_path: Path) -> None:
    old = states(3)[0]
    target = made(variant, tmp_path / "target", old)
    larger = max(variant.sizes)
    source = tmp_path / "source.raw"
    content = old + disks(4, 1, 4 * MIB)[0][: larger - SIZE]
    source.write_bytes(content)
    with pytest.raises(imgcore.OptionError, match="--resize"):
        imgcore.sync(source, target)
    imgcore.sync(source, target, resize=True)
    verify(variant, target, content)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.sizes], ids=lambda v: v.name)
def test_a_larger_source_while_a_read_goes_on(
    variant: UpdateVariant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was appended behind a gap, for a read that went on, is moved into it."""
    begin = WriteAccess._begin_changes

    def begin_while_read(self: WriteAccess) -> None:
        is_unread, self._is_unread = self._is_unread, lambda: False
        begin(self)
        self._is_unread = is_unread

    monkeypatch.setattr(WriteAccess, "_begin_changes", begin_while_read)
    target = made(variant, tmp_path / "target", states(3)[0])
    source = tmp_path / "source.raw"
    content = states(3)[0] + disks(4, 1, 4 * MIB)[0][: max(variant.sizes) - SIZE]
    source.write_bytes(content)
    imgcore.sync(source, target, resize=True)
    verify(variant, target, content)
