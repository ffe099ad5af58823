"""Internal snapshots: listed, created, applied and deleted, against qemu-img."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tests.helpers import qemu
from tests.helpers.updates import Model

import imgcore
from imgcore.cli import main as cli

MIB = 1 << 20
SIZE = 4 * MIB
WHEN_NS = 1_700_000_000_123_456_789
OPTIONS = ("cluster_size=64k", "cluster_size=512", "refcount_bits=64", "compat=0.10")


def made(folder: Path, options: str = OPTIONS[0]) -> tuple[Path, Model]:
    """Return an image with data, compressed clusters and zeros, and its content."""
    path = folder / "disk.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", "-o", options, path, str(SIZE))
    model = Model(bytes(SIZE))
    with imgcore.open(path, mode="r+") as image:
        changed(image, model, 1)
    return path, model


def changed(image: imgcore.Image, model: Model, seed: int) -> None:
    """Write, zero and discard at random."""
    chance = random.Random(seed)
    for _ in range(20):
        offset, nbytes = chance.randrange(SIZE - 100_000), chance.randrange(1, 100_000)
        if chance.random() < 0.7:
            data = chance.randbytes(nbytes)
            image.write(offset, data)
            model.write(offset, data)
        else:
            image.zero(offset, nbytes)
            model.write(offset, bytes(nbytes))


def verify(path: Path, content: bytes) -> None:
    """Fail unless the image is sound and has this content."""
    qemu.run("check", "-q", path)
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems
    copy = path.with_suffix(".raw")
    qemu.run("convert", "-O", "raw", path, copy)
    assert copy.read_bytes() == content


@pytest.mark.parametrize("options", OPTIONS)
def test_states_come_back(options: str, tmp_path: Path) -> None:
    path, model = made(tmp_path, options)
    states = {}
    for name in ("one", "two", "three"):
        states[name] = bytes(model.content)
        assert imgcore.create_snapshot(path, name, created_ns=WHEN_NS).name == name
        verify(path, states[name])
        with imgcore.open(path, mode="r+") as image:
            changed(image, model, len(states))
        verify(path, bytes(model.content))
    for name in ("two", "one", "three"):
        imgcore.apply_snapshot(path, name)
        verify(path, states[name])
        copy = tmp_path / "snapshot.raw"
        qemu.run("convert", "-l", name, "-O", "raw", path, copy)
        assert copy.read_bytes() == states[name]
    for name in ("one", "three", "two"):
        imgcore.delete_snapshot(path, name)
        verify(path, states["three"])
    assert imgcore.snapshots(path) == []


def test_snapshots_of_an_open_image(tmp_path: Path) -> None:
    path, model = made(tmp_path)
    with imgcore.open(path, mode="r+") as image:
        imgcore.create_snapshot(image, "before")
        before = bytes(model.content)
        changed(image, model, 7)
        imgcore.apply_snapshot(image, "1")
        assert image.read(0, SIZE) == before
        assert [item.name for item in imgcore.snapshots(image)] == ["before"]
    verify(path, before)


def test_the_list_is_that_of_qemu(tmp_path: Path) -> None:
    path, _ = made(tmp_path)
    added = imgcore.create_snapshot(path, "größer", created_ns=WHEN_NS)
    assert added == imgcore.SnapshotInfo("1", "größer", WHEN_NS, SIZE)
    qemu.run("snapshot", "-c", "second", path)
    theirs = json.loads(qemu.run("info", "--output=json", path).stdout)["snapshots"]
    ours = imgcore.info(path)["snapshots"]
    assert [row["name"] for row in theirs] == ["größer", "second"]
    for a, b in zip(theirs, ours, strict=True):
        assert {key: a[key] for key in b} == b


def test_qemu_deletes_and_applies_ours(tmp_path: Path) -> None:
    path, model = made(tmp_path)
    before = bytes(model.content)
    imgcore.create_snapshot(path, "before")
    with imgcore.open(path, mode="r+") as image:
        changed(image, model, 3)
    qemu.run("snapshot", "-a", "before", path)
    verify(path, before)
    qemu.run("snapshot", "-d", "before", path)
    verify(path, before)


def test_a_disk_that_was_smaller(tmp_path: Path) -> None:
    path, model = made(tmp_path)
    before = bytes(model.content)
    imgcore.create_snapshot(path, "small")
    qemu.run("resize", "-q", path, str(2 * SIZE))
    imgcore.apply_snapshot(path, "small")
    assert imgcore.info(path)["virtual-size"] == SIZE
    verify(path, before)


def test_refcounts_too_narrow_for_a_snapshot(tmp_path: Path) -> None:
    path, model = made(tmp_path, "refcount_bits=1")
    old = path.read_bytes()
    with pytest.raises(imgcore.LimitExceededError, match="refcounts of 1 bits count up to 1"):
        imgcore.create_snapshot(path, "one")
    verify(path, bytes(model.content))
    assert path.read_bytes() == old


@pytest.mark.parametrize("name", ["", "x" * 256, "a\0b"])
def test_names_that_are_refused(name: str, tmp_path: Path) -> None:
    path, _ = made(tmp_path)
    with pytest.raises(imgcore.OptionError, match="1 to 255 bytes"):
        imgcore.create_snapshot(path, name)
    assert imgcore.snapshots(path) == []


def test_names_that_are_ambiguous(tmp_path: Path) -> None:
    path, _ = made(tmp_path)
    for name in ("same", "same", "1"):
        imgcore.create_snapshot(path, name)
    for key in ("same", "1"):
        with pytest.raises(imgcore.OptionError, match="2 snapshots have"):
            imgcore.delete_snapshot(path, key)
    imgcore.delete_snapshot(path, "2")
    imgcore.delete_snapshot(path, "same")
    with pytest.raises(imgcore.OptionError, match="no snapshot has the identifier or name '7'"):
        imgcore.apply_snapshot(path, "7")


def test_other_formats_have_none(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    assert imgcore.snapshots(path) == []
    with pytest.raises(imgcore.UnsupportedFeatureError, match="raw images have no snapshots"):
        imgcore.create_snapshot(path, "one")


def test_damaged_refcounts_are_found_before_anything_changes(tmp_path: Path) -> None:
    path, model = made(tmp_path)
    imgcore.create_snapshot(path, "one")
    with path.open("r+b") as file:
        content = file.read()
        table = int.from_bytes(content[48:56], "big")
        block = int.from_bytes(content[table : table + 8], "big")
        file.seek(block + 2 * 5)  # a cluster with data: 16 bits each
        file.write(bytes(2))
    damaged = path.read_bytes()
    with pytest.raises(imgcore.CorruptImageError, match="check -r all corrects it"):
        imgcore.delete_snapshot(path, "one")
    assert path.read_bytes() == damaged
    imgcore.check(path, repair="all")
    imgcore.delete_snapshot(path, "one")
    verify(path, bytes(model.content))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = made(tmp_path)
    assert cli.main(["snapshot", "-c", "one", str(path)]) == 0
    assert capsys.readouterr() == ("", "")
    assert cli.main(["snapshot", str(path)]) == 0
    assert "one" in capsys.readouterr().out
    assert cli.main(["snapshot", "-l", "--json", str(path)]) == 0
    assert [row["id"] for row in json.loads(capsys.readouterr().out)] == ["1"]
    assert cli.main(["snapshot", "-a", "one", "-d", "one", str(path)]) == 2
    assert cli.main(["snapshot", "-U", "-d", "one", str(path)]) == 2
    assert cli.main(["snapshot", "-d", "one", str(path)]) == 0
    assert imgcore.snapshots(path) == []
