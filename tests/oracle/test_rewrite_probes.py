"""After a change of format, programs that probe a file find nothing of the old one."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

import imgcore
from tests.helpers import images, own, qemu
from tests.helpers import rewrite_pairs as pairs
from tests.helpers.images import KIB, MIB
from tests.helpers.rewrite_pairs import Becomes

NBYTES: Final = 128 * MIB  # mkfs.btrfs wants 109 MiB
_PATH: Final = "/usr/sbin:/sbin"

TARGETS: Final = (pairs.TO_QCOW2, Becomes("qcow2-4k", "qcow2", ("cluster_size=4k",)))
TARGETS += (pairs.TO_VMDK, pairs.TO_VHDX, pairs.TO_VDI)
# What `file` says of each format.
NAMES: Final = {
    "qcow2": "QEMU QCOW",
    "vmdk": "VMware4 disk image",
    "vhdx": "Microsoft Disk Image eXtended",
    "vdi": "VirtualBox Disk Image",
}


def _program(name: str, package: str) -> str:
    program = shutil.which(name) or shutil.which(name, path=_PATH)
    if program is None:
        pytest.skip(f"{name} is not installed (Debian: {package})")
    return program


def _empty(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(NBYTES)


def _ext4(path: Path) -> None:
    _empty(path)
    qemu.checked([_program("mkfs.ext4", "e2fsprogs"), "-q", "-F", str(path)])


def _swap(path: Path) -> None:
    _empty(path)
    path.chmod(0o600)
    qemu.checked([_program("mkswap", "util-linux"), str(path)])


def _btrfs(path: Path) -> None:
    _empty(path)
    qemu.checked([_program("mkfs.btrfs", "btrfs-progs"), "-q", str(path)])


def _partition(kind: int, first: int, count: int) -> bytes:
    return struct.pack("<B3sB3sII", 0, b"\0\2\0", kind, b"\xff\xff\xff", first, count)


def _mbr(path: Path, kind: int = 0x83, first: int = 2048) -> None:
    _ext4(path)
    sector = bytes(446) + _partition(kind, first, NBYTES // 512 - first)
    with open(path, "r+b") as file:
        # The old file system's superblock would win over the partition table.
        file.write(bytes(64 * KIB))
        file.seek(0)
        file.write(sector.ljust(510, b"\0") + b"\x55\xaa")


def _gpt(path: Path) -> None:
    """Write both copies of a GUID partition table (UEFI 5.3)."""
    _mbr(path, 0xEE, 1)
    last = NBYTES // 512 - 1
    linux = bytes.fromhex("af3dc60f838472478e793d69d8477de4")
    entry = struct.pack("<16s16sQQQ72s", linux, b"\x11" * 16, 2048, last - 40, 0, b"")
    entries = entry.ljust(128 * 128, b"\0")

    def header(here: int, other: int, table: int) -> bytes:
        def pack(crc: int) -> bytes:
            words = (b"EFI PART", 0x10000, 92, crc, 0, here, other, 34, last - 34, b"\x22" * 16)
            end = (table, 128, 128, zlib.crc32(entries))
            return struct.pack("<8sIIIIQQQQ16sQIII", *words, *end)

        return pack(zlib.crc32(pack(0))).ljust(512, b"\0")

    with open(path, "r+b") as file:
        file.seek(512)
        file.write(header(1, last, 2) + entries)
        file.seek((last - 32) * 512)
        file.write(entries + header(last, 1, last - 32))


# Each writes a raw disk in which blkid finds this word.
DISKS: Final[dict[str, Callable[[Path], None]]] = {
    "ext4": _ext4,
    "swap": _swap,
    "btrfs": _btrfs,
    "dos": _mbr,
    "gpt": _gpt,
}


def probed(path: Path) -> str:
    """Return what blkid finds in a file; empty if nothing."""
    command = [_program("blkid", "util-linux"), "-p", "-o", "export", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 2), done
    return done.stdout


def assert_only_new(raw: Path, path: Path, target: Becomes) -> None:
    assert probed(path) == ""
    said = qemu.checked([_program("file", "file"), "-b", str(path)]).stdout
    assert said.startswith(NAMES[target.format]), said
    for program in pairs.qemu_imgs():
        said = qemu.checked([program, "info", str(path)]).stdout
        assert f"file format: {pairs.qemu_name(target.format)}\n" in said
    assert imgcore.info(path)["format"] == target.format
    pairs.assert_reads_as(raw, path, target.format, leaks=True)


def each(*kinds: str) -> list[Any]:
    """Return all disks with all targets; each disk with one target in ordinary runs."""
    usual = {(kind, TARGETS[number % len(TARGETS)]) for number, kind in enumerate(kinds)}
    return [
        pytest.param(
            kind,
            target,
            id=f"{kind}-{target.name}",
            marks=() if (kind, target) in usual else (pytest.mark.slow, pytest.mark.rewriting),
        )
        for kind in kinds
        for target in TARGETS
    ]


@pytest.mark.parametrize(("kind", "target"), each(*DISKS))
def test_nothing_is_left_of_a_raw_disk(kind: str, target: Becomes, tmp_path: Path) -> None:
    raw, path = tmp_path / "copy.raw", tmp_path / "disk.raw"
    DISKS[kind](raw)
    qemu.checked(["cp", "--sparse=always", str(raw), str(path)])
    assert f"TYPE={kind}\n" in probed(path)
    result = imgcore.rewrite(path, target.format, options=list(target.options), format="raw")
    assert_only_new(raw, Path(result.path), target)
    back = Path(imgcore.undo_rewrite(result.path))
    assert f"TYPE={kind}\n" in probed(back)
    assert images.sha256(back) == images.sha256(raw)


@pytest.mark.parametrize(("kind", "target"), each("ext4", "gpt"))
def test_nothing_is_left_of_a_fixed_vhd(kind: str, target: Becomes, tmp_path: Path) -> None:
    raw, path = tmp_path / "copy.raw", tmp_path / "disk.vhd"
    DISKS[kind](raw)
    own.convert(raw, path, qemu.VHD_FIXED)
    assert f"TYPE={kind}\n" in probed(path)
    result = imgcore.rewrite(path, target.format, options=list(target.options))
    target_path = Path(result.path)
    assert target_path.read_bytes()[-512:].find(b"conectix") == -1
    assert_only_new(raw, target_path, target)


def test_a_vhd_that_becomes_raw_has_no_footer(tmp_path: Path) -> None:
    raw, path = tmp_path / "copy.raw", tmp_path / "disk.vhd"
    _ext4(raw)
    own.convert(raw, path, qemu.VHD_FIXED)
    result = imgcore.rewrite(path, "raw")
    assert images.sha256(Path(result.path)) == images.sha256(raw)
