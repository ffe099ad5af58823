"""Targets that reflink the source's blocks, on XFS and Btrfs.

The content must be that of qemu-img, and that of the same conversion without reflinks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import imgcore
from tests.helpers import images, qcow2, qemu
from tests.helpers.images import KIB, MIB
from tests.helpers.qemu import Variant
from tests.helpers.reflinks import DISK, PLAIN, SHARABLE_NBYTES, convert, make_source

each_source = pytest.mark.parametrize("source", PLAIN, ids=lambda v: f"from-{v.name}")
each_target = pytest.mark.parametrize("target", PLAIN, ids=lambda v: f"to-{v.name}")


def files_of(target: Path) -> dict[str, bytes]:
    """Return the target's files, including an extent, without the target's name."""
    stem = target.name.split(".")[0]
    return {
        path.name[len(stem) :]: path.read_bytes().replace(stem.encode(), b"x")
        for path in target.parent.glob(f"{stem}[.-]*")
    }


@each_source
@each_target
def test_every_pair_is_the_same_with_and_without(
    source: Variant, target: Variant, here: Path
) -> None:
    raw, path = make_source(here, source)
    shared, copied = here / f"shared{target.suffix}", here / f"copied{target.suffix}"
    result = convert(path, shared, target)
    assert convert(path, copied, target, reflink=False).bytes_shared == 0
    assert result.bytes_shared >= SHARABLE_NBYTES * 3 // 4
    assert result.bytes_shared <= SHARABLE_NBYTES
    assert files_of(shared) == files_of(copied)
    qemu.assert_same(raw, shared, source_format="raw", target_format=target.format)
    if target is not qemu.RAW:
        assert imgcore.check(str(shared), format=target.format).ok
    assert qemu.disk_nbytes(shared) <= qemu.disk_nbytes(copied) + 64 * KIB


def free_nbytes(folder: Path) -> int:
    os.sync()
    status = os.statvfs(folder)
    return status.f_bfree * status.f_frsize


def test_no_space_is_taken(here: Path) -> None:
    _, source = make_source(here)
    free = free_nbytes(here)
    convert(source, here / "out.qcow2", qemu.QCOW2)
    assert free - free_nbytes(here) < SHARABLE_NBYTES // 2


def test_neither_sees_what_is_written_to_the_other(here: Path) -> None:
    _, source = make_source(here)
    target = here / "out.raw"
    assert convert(source, target, qemu.RAW).bytes_shared == SHARABLE_NBYTES
    before = target.read_bytes()
    with open(source, "r+b") as file:
        file.write(b"\xff" * MIB)
    assert target.read_bytes() == before
    changed = source.read_bytes()
    with open(target, "r+b") as file:
        file.write(b"\xee" * MIB)
    assert source.read_bytes() == changed


@pytest.mark.parametrize(
    "more",
    [
        {"reflink": False},
        {"sparse": 0},
        {"salvage": True},
        {"options": ["preallocation=falloc"]},
        {"options": ["preallocation=full"]},
        {"in_place": True},
    ],
    ids=lambda more: str(next(iter(more.items()))),
)
def test_blocks_of_its_own(more: dict[str, Any], here: Path) -> None:
    raw, source = make_source(here)
    target = here / "out.raw"
    if "in_place" in more:
        target.write_bytes(b"\x55" * DISK.virtual_size)
    assert convert(source, target, qemu.RAW, **dict(more)).bytes_shared == 0
    qemu.assert_same(raw, target, source_format="raw", target_format="raw")


def test_data_off_the_blocks_is_copied(here: Path) -> None:
    """qemu-img places the blocks of a VDI after the map, without alignment."""
    raw, _ = make_source(here)
    source = here / "theirs.vdi"
    qemu.convert(raw, source, qemu.VDI)
    assert convert(source, here / "out.qcow2", qemu.QCOW2).bytes_shared == 0
    qemu.assert_same(raw, here / "out.qcow2", source_format="raw", target_format="qcow2")


def test_another_file_system_copies(here: Path, tmp_path: Path) -> None:
    raw, _ = make_source(tmp_path)
    assert convert(raw, here / "in.qcow2", qemu.QCOW2).bytes_shared == 0
    assert convert(here / "in.qcow2", tmp_path / "out.raw", qemu.RAW).bytes_shared == 0
    assert images.sha256(tmp_path / "out.raw") == images.sha256(raw)


def test_a_chain_shares_with_each_of_its_files(here: Path) -> None:
    _, base = make_source(here, qemu.QCOW2)
    overlay = here / "overlay.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(overlay))
    qcow2.qemu_io(overlay, "write -P 7 8M 1M")
    result = convert(overlay, here / "out.raw", qemu.RAW)
    assert result.bytes_shared == SHARABLE_NBYTES + MIB
    qemu.assert_same(overlay, here / "out.raw", source_format="qcow2", target_format="raw")


def test_only_what_differs_from_the_backing_file_is_shared(here: Path) -> None:
    raw, base = make_source(here, qemu.QCOW2)
    newer = here / "newer.raw"
    newer.write_bytes(raw.read_bytes())
    with open(newer, "r+b") as file:
        file.seek(8 * MIB)
        file.write(images.noise(MIB, 3))
    target = here / "out.qcow2"
    result = convert(newer, target, qemu.QCOW2, backing=base.name, backing_format="qcow2")
    assert result.bytes_shared == MIB
    qemu.assert_same(newer, target, source_format="raw", target_format="qcow2")
