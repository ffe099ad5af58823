"""Disks of 0 bytes: what is written is read by qemu-img, all else is one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import imgcore
from tests.helpers import qemu
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as command

NAMES = {"vhd": "vpc"}
WRITTEN = [
    ("raw", []),
    ("raw", ["-o", "preallocation=full"]),
    ("qcow2", []),
    ("qcow2", ["-o", "compat=0.10"]),
    ("qcow2", ["-o", "preallocation=metadata"]),
    ("qcow2", ["-o", "preallocation=full"]),
    ("qcow2", ["-o", "cluster_size=512"]),
    ("vhd", []),
    ("vhd", ["-o", "batmap=on"]),
    ("vdi", []),
    ("vdi", ["-o", "static=on"]),
]
REFUSED = [
    ("vmdk", []),
    ("vmdk", ["-o", "subformat=streamOptimized"]),
    ("vmdk", ["-o", "subformat=monolithicFlat"]),
    ("vmdk", ["-o", "subformat=vmfs"]),
    ("vhd", ["-o", "subformat=fixed"]),
    ("vhdx", []),
    ("vhdx", ["-o", "subformat=fixed"]),
]


@pytest.fixture(params=["raw", "raw.gz", "raw.zst", "qcow2", "vhd", "vdi"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a disk of 0 bytes in each format that can be one."""
    raw, path = tmp_path / "empty.raw", tmp_path / f"source.{request.param}"
    raw.write_bytes(b"")
    if path.suffix in (".qcow2", ".vhd", ".vdi"):
        name = NAMES.get(path.suffix[1:], path.suffix[1:])
        qemu.run("create", "-q", "-f", name, path, "0")
    else:
        imgcore.convert(raw, path)
    return path


def assert_empty(path: Path, format: str) -> None:
    name = NAMES.get(format, format)
    assert qemu.info(path, name)["virtual-size"] == 0
    back = path.with_name("back.raw")
    qemu.run("convert", "-f", name, "-O", "raw", path, back)
    assert back.stat().st_size == 0
    if format in ("qcow2", "vdi"):
        qemu.run("check", "-f", format, path)
    with imgcore.open(path, format=format) as image:
        assert image.virtual_size == 0
        assert image.read(0, 0) == b""
        assert list(image.extents()) == []
    if format != "raw":
        assert not imgcore.check(path, format=format).problems


@pytest.mark.parametrize(("format", "options"), WRITTEN)
def test_written(tmp_path: Path, empty: Path, format: str, options: list[str]) -> None:
    target = tmp_path / f"target.{format}"
    done = command("convert", *options, empty, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert_empty(target, format)


@pytest.mark.parametrize(("format", "options"), WRITTEN)
def test_created(tmp_path: Path, format: str, options: list[str]) -> None:
    target = tmp_path / f"target.{format}"
    assert command("create", *options, target, "0").returncode == 0
    assert_empty(target, format)


@pytest.mark.parametrize(("format", "options"), REFUSED)
def test_refused(tmp_path: Path, empty: Path, format: str, options: list[str]) -> None:
    target = tmp_path / f"target.{format}"
    before = sorted(tmp_path.iterdir())
    for arguments in (("convert", empty, target), ("create", target, "0")):
        done = command(arguments[0], *options, *arguments[1:])
        assert_one_line_error(done, "of 0 bytes", code=2)
        assert sorted(tmp_path.iterdir()) == before
    # What the line advises.
    least = re.search(r"at least (\d+) are needed", done.stderr)
    assert least is not None
    assert command("create", *options, target, least[1]).returncode == 0
    for other in ("qcow2", "raw"):
        assert f"{other}" in done.stderr
        assert command("convert", empty, tmp_path / f"other.{other}").returncode == 0


def test_measured(empty: Path) -> None:
    for format in ("raw", "qcow2"):
        theirs = qemu.run("measure", "-O", format, "--size", "0").stdout.split()
        ours = imgcore.measure(empty, target_format=format)
        assert (str(ours.required), str(ours.fully_allocated)) == (theirs[2], theirs[-1])


def test_compared_and_concatenated(tmp_path: Path, empty: Path) -> None:
    if empty.suffix in (".gz", ".zst"):
        pytest.skip("a stream has no random access")
    raw = tmp_path / "a.raw"
    raw.write_bytes(b"x" * 1024)
    assert imgcore.compare(empty, tmp_path / "empty.raw").identical
    assert not imgcore.compare(empty, raw).identical
    imgcore.convert([empty, raw, empty], tmp_path / "b.qcow2")
    qemu.assert_same(raw, tmp_path / "b.qcow2", source_format="raw", target_format="qcow2")
