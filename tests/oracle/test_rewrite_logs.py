"""VHDX images with a log to replay change their format: the log's changes are kept."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Final

import pytest

import imgcore
from tests.helpers import images, qemu, vhdx
from tests.helpers import rewrite_pairs as pairs
from tests.helpers.rewrite_pairs import Becomes
from tests.helpers.samples import unpacked_samples
from tests.helpers.vhdx import BAT_OFFSET, FULL, MIB, Vhdx, pattern

# With clusters as large as the log's sectors, each sector is a block that could stay.
TO_QCOW2_4K: Final = Becomes("qcow2-4k", "qcow2", ("cluster_size=4k",))
TARGETS: Final = (TO_QCOW2_4K, pairs.TO_QCOW2, pairs.TO_VMDK, pairs.TO_VDI)
GUID: Final = vhdx.guid(0x106)
SECTOR: Final = 4096
PAYLOAD: Final = {n: (FULL, pattern(n, MIB)) for n in range(4)}
BAT: Final = struct.pack("<4Q", *(at * MIB | FULL for at in (7, 6, 5, 4))).ljust(SECTOR, b"\0")
# Changes of tables only, and of a block that would otherwise stay.
LOGS: Final[dict[str, tuple[vhdx.Write, ...]]] = {
    "tables": ((BAT_OFFSET, BAT),),
    "data": ((BAT_OFFSET, BAT), (5 * MIB + 2 * SECTOR, pattern(99, SECTOR))),
}


def replayed(path: Path, raw: Path) -> None:
    """Let QEMU replay the log of a copy, and write its disk as raw."""
    copy = raw.with_suffix(".vhdx")
    qemu.checked(["cp", "--sparse=always", str(path), str(copy)])
    qemu.run("check", "-q", "-f", "vhdx", "-r", "all", copy)
    qemu.run("convert", "-f", "vhdx", "-O", "raw", copy, raw)


def assert_keeps_the_log(path: Path, target: Becomes, beside: Path) -> None:
    assert imgcore.info(path)["dirty-flag"] is True
    raw = beside / "replayed.raw"
    replayed(path, raw)
    before = images.sha256(path)
    result = imgcore.rewrite(path, target.format, options=list(target.options))
    pairs.assert_reads_as(raw, Path(result.path), target.format, leaks=True)
    assert Path(imgcore.undo_rewrite(result.path)) == path
    assert images.sha256(path) == before
    assert imgcore.info(path)["dirty-flag"] is True


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
@pytest.mark.parametrize("writes", LOGS.values(), ids=LOGS)
def test_a_log_by_hand(writes: tuple[vhdx.Write, ...], target: Becomes, tmp_path: Path) -> None:
    entry = vhdx.log_entry(1, 0, list(writes), log_guid=GUID, flushed=8 * MIB, last=8 * MIB)
    disk = Vhdx(4 * MIB, blocks=PAYLOAD, log_guid=GUID, log=entry.ljust(vhdx.LOG_NBYTES, b"\0"))
    folder = tmp_path / "images"
    folder.mkdir()
    path = disk.write(folder / "dirty.vhdx")
    with open(path, "r+b") as file:
        file.seek(BAT_OFFSET)
        file.write(bytes(SECTOR))
    assert_keeps_the_log(path, target, tmp_path)


@pytest.mark.slow
@pytest.mark.rewriting
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name)
def test_a_log_of_hyper_v(target: Becomes, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    path = folder / "dirty.vhdx"
    sample = unpacked_samples() / "qemu-iotests" / "iotest-dirtylog-10G-4M.vhdx"
    shutil.copyfile(sample, path)
    assert_keeps_the_log(path, target, tmp_path)
