"""JSON that has qemu-img's keys has qemu-img's values, in every format."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import openings, qemu
from tests.helpers.command import imgcore as imgcore_command

# What imgcore adds.
OWN_KEYS = {"logical-sector-size"}
# Images by name: qemu-img's format, its options, whether it probes the format.
MADE: dict[str, tuple[str, tuple[str, ...]]] = {
    "v3.qcow2": ("qcow2", ()),
    "v2.qcow2": ("qcow2", ("-o", "compat=0.10")),
    "zstd.qcow2": ("qcow2", ("-o", "compression_type=zstd,lazy_refcounts=on")),
    "sparse.vmdk": ("vmdk", ()),
    "stream.vmdk": ("vmdk", ("-o", "subformat=streamOptimized")),
    "flat.vmdk": ("vmdk", ("-o", "subformat=monolithicFlat")),
    "split.vmdk": ("vmdk", ("-o", "subformat=twoGbMaxExtentSparse")),
    "split-flat.vmdk": ("vmdk", ("-o", "subformat=twoGbMaxExtentFlat")),
    "dynamic.vhd": ("vpc", ("-o", "force_size")),
    "fixed.vhd": ("vpc", ("-o", "subformat=fixed,force_size")),
    "dynamic.vhdx": ("vhdx", ()),
    "fixed.vhdx": ("vhdx", ("-o", "subformat=fixed")),
    "dynamic.vdi": ("vdi", ()),
    "static.vdi": ("vdi", ("-o", "static=on")),
}
BACKING = {
    "by-name": ("base.vhd", "vpc"),
    "in-folder": ("./base.vhd", "vpc"),
    "elsewhere": ("/no/such/base.vmdk", "vmdk"),
    "nbd": ("nbd://localhost/x", "raw"),
    "nbd-unix": ("nbd+unix:///?socket=/x", "raw"),
    "https": ("https://localhost/a/b.qcow2", "qcow2"),
    "rbd": ("rbd:pool/disk", "raw"),
    "json": ('json:{"driver":"nbd","host":"localhost"}', "raw"),
    "drive": ("C:\\vms\\x.vhd", "vpc"),
    "drive-slashes": ("c:/vms/x.vhd", "vpc"),
    "colon-in-folder": ("a/b:c", "raw"),
    "colon": ("a:b/c", "raw"),
}


def differences(ours: Any, theirs: Any, where: str = "") -> list[str]:
    """Return where the values of any key but `OWN_KEYS` differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            line
            for key in sorted((ours.keys() | theirs.keys()) - OWN_KEYS)
            for line in differences(ours.get(key), theirs.get(key), f"{where}/{key}")
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            line
            for index, pair in enumerate(zip(ours, theirs, strict=True))
            for line in differences(*pair, f"{where}/{index}")
        ]
    return [] if ours == theirs else [f"{where}: {ours!r}, qemu-img has {theirs!r}"]


def info_pair(path: str | Path, folder: Path, *words: str) -> tuple[Any, Any]:
    done = imgcore_command("info", "--json", *words, path, cwd=folder)
    assert done.returncode == 0, done.stderr
    own = json.loads(done.stdout)
    qemu_words = [qemu.require_qemu_img(), "info", "--output=json", *words, path]
    theirs = json.loads(qemu.checked([str(word) for word in qemu_words], cwd=folder).stdout)
    for image in theirs if isinstance(theirs, list) else [theirs]:
        image.pop("children", None)  # of QEMU 8.2 and later
    return own, theirs


@pytest.mark.parametrize("with_folder", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_info(name: str, with_folder: bool, tmp_path: Path) -> None:
    image_format, options = MADE[name]
    raw = openings.disk(tmp_path / "disk.raw")
    path = tmp_path / name
    qemu.run("convert", "-f", "raw", "-O", image_format, *options, raw, path)
    own, theirs = info_pair(path if with_folder else name, tmp_path, "-f", image_format)
    if "format-specific" not in theirs:
        # QEMU has nothing to say about these formats.
        assert own.pop("format-specific")["type"] == image_format
    assert differences(own, theirs) == []


@pytest.mark.parametrize("with_folder", [False, True])
@pytest.mark.parametrize("name", BACKING)
def test_names_of_backing_files(name: str, with_folder: bool, tmp_path: Path) -> None:
    backing, backing_format = BACKING[name]
    path = tmp_path / "o.qcow2"
    words = ("-u", "-f", "qcow2", "-F", backing_format, "-b", backing)
    qemu.run("create", "-q", *words, path, "4M")
    own, theirs = info_pair(path if with_folder else path.name, tmp_path)
    assert differences(own, theirs) == []


@pytest.mark.parametrize("image_format", ["qcow2", "vmdk"])
def test_a_chain(image_format: str, tmp_path: Path) -> None:
    images, _ = openings.chain(tmp_path, image_format, 3)
    own, theirs = info_pair(images[2], tmp_path, "--backing-chain")
    assert differences(own, theirs) == []


@pytest.mark.parametrize("image_format", ["vhd", "vpc"])
def test_a_backing_format_that_imgcore_writes(image_format: str, tmp_path: Path) -> None:
    raw = openings.disk(tmp_path / "disk.raw")
    imgcore_command("convert", raw, tmp_path / "base.vhd")
    done = imgcore_command("create", "-b", "base.vhd", "-F", image_format, tmp_path / "o.qcow2")
    assert done.returncode == 0, done.stderr
    own, theirs = info_pair("o.qcow2", tmp_path)
    assert own["backing-filename-format"] == theirs["backing-filename-format"] == "vpc"
    qemu.run("compare", "-f", "qcow2", "-F", "raw", tmp_path / "o.qcow2", raw)
    chain = json.loads(
        imgcore_command("info", "--json", "--backing-chain", tmp_path / "o.qcow2").stdout
    )
    assert [image["format"] for image in chain] == ["qcow2", "vpc"]


def test_a_differencing_vhd(tmp_path: Path) -> None:
    images, _ = openings.chain(tmp_path, "vhd", 2)
    own = json.loads(imgcore_command("info", "--json", images[1]).stdout)
    assert (own["format"], own["backing-filename-format"]) == ("vpc", "vpc")
    assert own["format-specific"]["type"] == "vpc"


@pytest.mark.parametrize("name", [name for name in MADE if name.endswith((".qcow2", ".vhd"))])
def test_check(name: str, tmp_path: Path) -> None:
    image_format, options = MADE[name]
    path = tmp_path / name
    raw = openings.disk(tmp_path / "disk.raw")
    qemu.run("convert", "-f", "raw", "-O", image_format, *options, raw, path)
    own = json.loads(imgcore_command("check", "--json", path).stdout)
    assert own["format"] == image_format
    if image_format == "qcow2":
        words = [qemu.require_qemu_img(), "check", "--output=json", os.fspath(path)]
        assert differences(own, json.loads(qemu.checked(words).stdout)) == []
