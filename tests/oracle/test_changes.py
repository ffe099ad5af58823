"""Changed areas of chains and bitmaps that QEMU writes."""

from __future__ import annotations

import random
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

import imgcore
from imgcore.disk.open_options import OpenOptions
from imgcore.verbs.changes import differences
from tests.helpers import qemu
from tests.helpers.images import KIB, MIB, noise

GRANULARITIES: Final = (512, 4 * KIB, 64 * KIB, 2 * MIB)


def write(path: Path, format: str, *commands: str) -> None:
    """Write into an image with qemu-io."""
    program = shutil.which("qemu-io")
    if program is None:
        pytest.skip("qemu-io is not installed (Debian: qemu-utils)")
    words = [word for command in commands for word in ("-c", command)]
    subprocess.run([program, "-f", format, *words, path], capture_output=True, check=True)


def disk_of(path: Path, format: str) -> bytes:
    """Return what QEMU reads from an image."""
    raw = path.with_name("read.raw")
    qemu.run("convert", "-f", format, "-O", "raw", path, raw)
    return raw.read_bytes()


def applied(old: bytes, new: bytes, areas: list[imgcore.Area]) -> bytes:
    """Return the old disk with the areas of the new one, and of its size."""
    disk = bytearray(old[: len(new)].ljust(len(new), b"\0"))
    for offset, length, is_zero in areas:
        disk[offset : offset + length] = bytes(length) if is_zero else new[offset : offset + length]
    return bytes(disk)


def assert_areas(top: Path, old: Path, format: str) -> None:
    """The areas make the new disk of the old one; those of a comparison no larger."""
    old_disk, new_disk = disk_of(old, format), disk_of(top, format)
    for granularity in GRANULARITIES:
        listed = list(imgcore.changes(top, since=old, granularity=granularity))
        assert applied(old_disk, new_disk, listed) == new_disk
        with imgcore.open(top) as image:
            compared = list(differences(image, old, OpenOptions(), granularity=granularity))
        compared = [area for area in compared if area.offset < len(new_disk)]
        assert applied(old_disk, new_disk, compared) == new_disk
        covered = {
            block
            for offset, length, _ in listed
            for block in range(offset // granularity, -(-(offset + length) // granularity))
        }
        for offset, length, _ in compared:
            assert {*range(offset // granularity, -(-(offset + length) // granularity))} <= covered
        for offset, length, is_zero in [*listed, *compared]:
            if is_zero:
                assert not any(new_disk[offset : offset + length])


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("qcow2", ()),
        ("qcow2", ("-o", "cluster_size=4k")),
        ("vmdk", ()),
    ],
)
def test_chains(format: str, options: tuple[str, ...], tmp_path: Path) -> None:
    rng = random.Random(f"{format}{options}")
    raw = tmp_path / "disk.raw"
    raw.write_bytes(noise(5 * MIB))
    layers = [tmp_path / f"{number}.{format}" for number in range(4)]
    qemu.run("convert", "-f", "raw", "-O", format, *options, raw, layers[0])
    for below, path in pairwise(layers):
        create = ("create", "-q", "-f", format, "-b", below.name, "-F", format, *options)
        qemu.run(*create, path)
        commands = []
        for _ in range(4):
            start, length = rng.randrange(9000) * 512, rng.randrange(1, 700) * 512
            how = rng.choice(("-P 7", "-P 0", "-z"))
            commands.append(f"write {how} {start} {length}")
        write(path, format, *commands)
    for old in layers:
        assert_areas(layers[-1], old, format)
    assert list(imgcore.changes(layers[-1], since=layers[-1])) == []


@pytest.mark.parametrize("sizes", [(4, 1, 4), (1, 4, 4), (4, 4, 1), (1, 2, 4), (2, 1, 4)])
def test_layers_of_other_sizes(sizes: tuple[int, ...], tmp_path: Path) -> None:
    """Where a layer ends, the disk above it is zeros."""
    layers = [tmp_path / f"{number}.qcow2" for number in range(3)]
    qemu.run("create", "-q", "-f", "qcow2", layers[0], f"{sizes[0]}M")
    write(layers[0], "qcow2", f"write -P 1 0 {sizes[0]}M")
    for number in (1, 2):
        backing = ("-b", layers[number - 1].name, "-F", "qcow2")
        qemu.run("create", "-q", "-f", "qcow2", *backing, layers[number], f"{sizes[number]}M")
    write(layers[2], "qcow2", "write -P 2 128k 100k")
    for old in layers[:2]:
        assert_areas(layers[2], old, "qcow2")
    sizes_differ = sizes[1] < min(sizes[0], sizes[2])
    areas = list(imgcore.changes(layers[2], since=layers[0]))
    assert any(area.is_zero for area in areas) == sizes_differ
    assert all(area.offset < sizes[0] * MIB for area in areas)


def test_new_data_past_the_end_of_the_older_disk(tmp_path: Path) -> None:
    old, new = tmp_path / "old.qcow2", tmp_path / "new.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", old, "1M")
    qemu.run("create", "-q", "-f", "qcow2", "-b", old.name, "-F", "qcow2", new, "8M")
    write(new, "qcow2", "write -z 512k 4M", "write -P 1 6M 64k", "write -z 7M 64k")
    assert list(imgcore.changes(new, since=old)) == [
        (512 * KIB, 512 * KIB, True),
        (6 * MIB, 64 * KIB, False),
    ]


def test_a_bitmap(tmp_path: Path) -> None:
    path, old = tmp_path / "disk.qcow2", tmp_path / "old.raw"
    raw = tmp_path / "disk.raw"
    raw.write_bytes(noise(8 * MIB))
    qemu.run("convert", "-f", "raw", "-O", "qcow2", raw, path)
    old.write_bytes(raw.read_bytes())
    qemu.run("bitmap", "--add", "-g", "4k", path, "since")
    write(path, "qcow2", "write -P 5 1M 10k", "write -z 2M 128k", "write -P 0 5000k 1k")
    new_disk = disk_of(path, "qcow2")
    for granularity in GRANULARITIES:
        areas = list(imgcore.changes(path, bitmap="since", granularity=granularity))
        assert applied(old.read_bytes(), new_disk, areas) == new_disk
    assert list(imgcore.changes(path, bitmap="since")) == [
        (MIB, 64 * KIB, False),
        (2 * MIB, 128 * KIB, True),
        (4992 * KIB, 64 * KIB, False),
    ]
    with pytest.raises(imgcore.OptionError, match="no bitmap 'other'"):
        list(imgcore.changes(path, bitmap="other"))
