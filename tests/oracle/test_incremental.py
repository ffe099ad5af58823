"""docs/incremental.md: a disk moves to another format while a guest writes to it.

qemu-storage-daemon has the disk and exports it by NBD; qemu-io writes as a guest would.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

import imgcore
from tests.helpers.command import imgcore as imgcore_command
from tests.helpers.storage_daemon import StorageDaemon, storage_daemon

KIB = 1024
MIB = 1024 * KIB
SIZE = 256 * MIB


def run(*words: object) -> str:
    done = imgcore_command(*map(str, words))
    assert done.returncode == 0, done.stderr
    return done.stdout


def random_writes(number: int, seed: int) -> list[str]:
    """Return commands of qemu-io for scattered writes, zeros and discards."""
    found = []
    for index in range(number):
        offset = (index * 7919 + seed * 104_729) * 64 * KIB % SIZE
        kind = ("write -P {p}", "write -P {p}", "write -z", "discard")[index % 4]
        found.append(
            f"{kind.format(p=1 + (seed + index) % 255)} {offset} {4 * KIB * (1 + index % 9)}"
        )
    return found


def identical(a: Path, b: Path) -> bool:
    return imgcore.compare(a, b, share=True).identical


@pytest.mark.parametrize("name", ["qcow2", "vhdx", "raw"])
def test_a_raw_disk_with_dirty_bitmaps(name: str, tmp_path: Path) -> None:
    if shutil.which("nbdinfo") is None:
        pytest.skip("nbdinfo is not installed (Debian: libnbd-bin)")
    disk, copy, areas = tmp_path / "disk.raw", tmp_path / f"copy.{name}", tmp_path / "areas.json"
    with disk.open("wb") as file:
        file.truncate(SIZE)
    with storage_daemon(
        tmp_path,
        *("--blockdev", f"file,filename={disk},node-name=file,discard=unmap"),
        *("--blockdev", "raw,node-name=disk,file=file,discard=unmap"),
        *("--export", "nbd,id=guest,node-name=disk,name=guest,writable=on"),
    ) as qemu:
        qemu.guest_writes("guest", *random_writes(400, 1))
        qemu.call("block-dirty-bitmap-add", node="disk", name="b0", granularity=64 * KIB)
        # 1. The full copy, while the guest writes.
        writer = threading.Thread(target=qemu.guest_writes, args=("guest", *random_writes(80, 2)))
        writer.start()
        run("convert", "-U", "-f", "raw", disk, copy)
        writer.join()
        # 2. Smaller and smaller deltas; what is written meanwhile is in the next one.
        copied = []
        for number, n_writes in enumerate((40, 20, 5, 0)):
            list_changes(qemu, number, areas)
            if n_writes == 20:
                writer = threading.Thread(
                    target=qemu.guest_writes, args=("guest", *random_writes(n_writes, number + 3))
                )
                writer.start()
                run("sync", "-U", "-f", "raw", "--areas", areas, disk, copy)
                writer.join()
            else:
                started = time.monotonic()
                answer = run("sync", "-U", "-f", "raw", "--areas", areas, disk, copy)
                print(f"step {number}: {time.monotonic() - started:.3f} s, {answer}", end="")
                assert identical(disk, copy)
                qemu.guest_writes("guest", *random_writes(n_writes, number + 3))
            copied.append(
                sum(
                    length
                    for _, length, _ in imgcore.changes(disk, areas=areas, share=True, format="raw")
                )
            )
        # 3. Cutover: nothing was written before the last delta.
        assert identical(disk, copy)
        assert copied == sorted(copied, reverse=True)
        assert 0 < copied[-1] < SIZE // 100
    assert imgcore.compare(disk, copy).identical


def list_changes(qemu: StorageDaemon, number: int, areas: Path) -> None:
    """Write what a bitmap has; from then on another one has what is written."""
    old, new = f"b{number}", f"b{number + 1}"
    qemu.call(
        "transaction",
        actions=[
            {
                "type": "block-dirty-bitmap-add",
                "data": {"node": "disk", "name": new, "granularity": 64 * KIB},
            },
            {"type": "block-dirty-bitmap-disable", "data": {"node": "disk", "name": old}},
        ],
    )
    qemu.call("block-export-add", type="nbd", id=old, node_name="disk", name=old, bitmaps=[old])
    words = ["nbdinfo", f"--map=qemu:dirty-bitmap:{old}", "--json", qemu.url(old)]
    listed = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    areas.write_text(listed.stdout)
    qemu.call("block-export-del", id=old, mode="hard")
    while any(export["id"] == old for export in qemu.call("query-block-exports")):
        time.sleep(0.01)
    qemu.call("block-dirty-bitmap-remove", node="disk", name=old)


@pytest.mark.parametrize("name", ["qcow2", "vhdx"])
def test_overlays(name: str, tmp_path: Path) -> None:
    """Each snapshot ends a state of the disk: what is above the last one is copied."""
    disks = [tmp_path / f"{number}.qcow2" for number in range(5)]
    copy = tmp_path / f"copy.{name}"
    imgcore.create(disks[0], SIZE)
    with storage_daemon(
        tmp_path,
        *("--blockdev", f"file,filename={disks[0]},node-name=f0"),
        *("--blockdev", "qcow2,node-name=n0,file=f0"),
        *("--export", "nbd,id=guest,node-name=n0,name=guest,writable=on"),
    ) as qemu:
        for number, n_writes in enumerate((400, 40, 20, 5)):
            qemu.guest_writes("guest", *random_writes(n_writes, number))
            snapshot(qemu, disks, number)
            if number == 0:
                run("convert", "-f", "qcow2", disks[0], copy)
            else:
                since = ("--since", disks[number - 1])
                run("sync", "-f", "qcow2", *since, disks[number], copy)
            assert identical(disks[number], copy)
    assert imgcore.compare(disks[3], copy).identical


def snapshot(qemu: StorageDaemon, disks: list[Path], number: int) -> None:
    """Let the guest write to a new overlay: the image before it does not change."""
    following = disks[number + 1]
    imgcore.create(following, SIZE, backing=disks[number].name, backing_format="qcow2")
    new = number + 1
    qemu.call("blockdev-add", driver="file", filename=str(following), node_name=f"f{new}")
    qemu.call("blockdev-add", driver="qcow2", file=f"f{new}", node_name=f"n{new}", backing=None)
    qemu.call("blockdev-snapshot", node=f"n{number}", overlay=f"n{new}")
