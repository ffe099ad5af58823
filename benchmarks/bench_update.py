"""Writing in place, compared with QEMU's programs and dd, in turns.

``pytest benchmarks/bench_update.py --benchmark-enable -s``; ``IMGCORE_BENCH_DIR`` names
the folder, ``IMGCORE_BENCH_MIB`` the size of the disks, which is 4096 by default.  Each
round lets the peer do the same before, and verifies our result; lines have the ratios
of time and of processor time, of all processes that take part: the peer's over ours.
Both sides flush at the same moments.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import imgcore

ROUNDS: Final = 3
MIB: Final = 1 << 20
KIB: Final = 1024
PEERS: Final = Path(
    os.environ.get("IMGCORE_PEERS", Path.home() / ".cache" / "imgcore-peers")
).joinpath("bin")
N_MIB: Final = int(os.environ.get("IMGCORE_BENCH_MIB", "4096"))
NBYTES: Final = N_MIB * MIB
# What qemu-img calls the formats.
FORMATS: Final = {
    "raw": "raw",
    "qcow2": "qcow2",
    "vmdk": "vmdk",
    "vhd": "vpc",
    "vhdx": "vhdx",
    "vdi": "vdi",
}
BYTE: Final = 0x5A
N_RANDOM: Final = 4096
N_OF_FLUSH: Final = 256


class Turn(NamedTuple):
    """What one turn took."""

    seconds: float
    cpu_seconds: float


def cpu_seconds() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def turn(work: Callable[[], object]) -> Turn:
    """Measure one turn; programs that it starts have ended then."""
    begun, cpu = time.perf_counter(), cpu_seconds()
    work()
    return Turn(time.perf_counter() - begun, cpu_seconds() - cpu)


def peer(name: str, *arguments: object, commands: str = "") -> None:
    """Run a program of QEMU, which may read commands."""
    command = [str(PEERS / name), *map(str, arguments)]
    subprocess.run(command, input=commands.encode(), stdout=subprocess.DEVNULL, check=True)


def compare(
    benchmark: BenchmarkFixture,
    title: str,
    *,
    prepare: Callable[[], None],
    theirs: Callable[[], object],
    ours: Callable[[], object],
    verify: Callable[[], None],
) -> None:
    """Let the peer and us have our turns, each on new files, and print the ratios."""
    pairs: list[tuple[Turn, Turn]] = []
    waiting: list[Turn] = []

    def begin() -> None:
        if pairs:
            verify()
        prepare()
        waiting.append(turn(theirs))
        prepare()

    def work() -> None:
        pairs.append((waiting.pop(), turn(ours)))

    benchmark.pedantic(work, setup=begin, rounds=ROUNDS)
    verify()
    by_time = [them.seconds / us.seconds for them, us in pairs]
    by_cpu = [them.cpu_seconds / us.cpu_seconds for them, us in pairs]
    benchmark.extra_info.update(time_ratios=by_time, cpu_ratios=by_cpu)
    print(
        f"\n{title}: {median(us.seconds for _, us in pairs):.2f} s; peer over ours: "
        f"time {median(by_time):.2f} ({min(by_time):.2f} to {max(by_time):.2f}), "
        f"processor time {median(by_cpu):.2f}"
    )


@pytest.fixture
def folder() -> Iterator[Path]:
    parent = os.environ.get("IMGCORE_BENCH_DIR", "/dev/shm")
    with tempfile.TemporaryDirectory(prefix="imgcore-bench-", dir=parent) as name:
        yield Path(name)


def create(path: Path, format: str) -> None:
    path.unlink(missing_ok=True)
    imgcore.create(path, NBYTES, format=format, sync=False)


# -- sequential writes -----------------------------------------------------------------


def write_all(path: Path, format: str, data: bytes) -> None:
    with imgcore.open(path, mode="r+", format=format) as image:
        for offset in range(0, NBYTES, len(data)):
            image.write(offset, data)


def verify_all(path: Path, format: str, data: bytes) -> None:
    with imgcore.open(path, format=format) as image:
        for offset in range(0, NBYTES, len(data)):
            assert image.read(offset, len(data)) == data
    if format != "raw":
        assert imgcore.check(path).problems == []


@pytest.mark.parametrize("format", FORMATS)
def test_sequential(benchmark: BenchmarkFixture, folder: Path, format: str) -> None:
    """Pieces of 1 MiB into an empty image, against qemu-io."""
    path, data = folder / f"disk.{format}", bytes([BYTE]) * MIB
    lines = [f"write -q -P {BYTE} {at}M 1M" for at in range(N_MIB)]
    commands = "\n".join([*lines, "quit", ""])
    compare(
        benchmark,
        f"sequential, {format}",
        prepare=lambda: create(path, format),
        theirs=lambda: peer("qemu-io", "-f", FORMATS[format], path, commands=commands),
        ours=lambda: write_all(path, format, data),
        verify=lambda: verify_all(path, format, data),
    )


def test_sequential_raw_and_dd(benchmark: BenchmarkFixture, folder: Path) -> None:
    """Pieces of 1 MiB into a raw disk, against dd, which reads from a pipe of zeros."""
    path, source, data = folder / "disk.raw", folder / "source", bytes([BYTE]) * MIB
    source.write_bytes(data * 64)
    command = ["dd", f"if={source}", f"of={path}", "bs=1M", "conv=notrunc", "status=none"]

    def dd() -> None:
        for at in range(0, N_MIB, 64):
            subprocess.run([*command, f"seek={at}"], check=True)

    with source.open("rb") as file:

        def write() -> None:
            buffer = bytearray(MIB)
            with imgcore.open(path, mode="r+") as image:
                for offset in range(0, NBYTES, MIB):
                    file.seek(offset % (64 * MIB))
                    file.readinto(buffer)
                    image.write(offset, buffer)

        compare(
            benchmark,
            "sequential, raw and dd",
            prepare=lambda: create(path, "raw"),
            theirs=dd,
            ours=write,
            verify=lambda: verify_all(path, "raw", data),
        )


# -- random writes ---------------------------------------------------------------------


def test_random_with_flushes(benchmark: BenchmarkFixture, folder: Path) -> None:
    """4 KiB at random places of a full QCOW2 image, with a flush every 256."""
    full, path, socket = folder / "full.qcow2", folder / "disk.qcow2", folder / "socket"
    create(full, "qcow2")
    write_all(full, "qcow2", bytes([1]) * MIB)
    chance = random.Random(1)
    offsets = [chance.randrange(NBYTES // (4 * KIB)) * 4 * KIB for _ in range(N_RANDOM)]
    lines: list[str] = []
    for index, offset in enumerate(offsets, 1):
        lines.append(f"write -q -P {BYTE} {offset} 4k")
        if index % N_OF_FLUSH == 0:
            lines.append("flush")
    commands = "\n".join([*lines, "quit", ""])
    data = bytes([BYTE]) * 4 * KIB

    def prepare() -> None:
        shutil.copyfile(full, path)
        os.sync()

    def nbd() -> None:
        command = [PEERS / "qemu-nbd", "-f", "qcow2", "-k", socket, "--cache=writeback", path]
        with subprocess.Popen(command) as server:
            while not socket.exists():
                time.sleep(0.001)
            uri = f"nbd+unix:///?socket={socket}"
            peer("qemu-io", "-f", "raw", "-t", "writeback", uri, commands=commands)
            server.wait()
        socket.unlink(missing_ok=True)

    def write() -> None:
        with imgcore.open(path, mode="r+") as image:
            for index, offset in enumerate(offsets, 1):
                image.write(offset, data)
                if index % N_OF_FLUSH == 0:
                    image.flush()

    def verify() -> None:
        with imgcore.open(path) as image:
            assert all(image.read(offset, len(data)) == data for offset in offsets)
        assert imgcore.check(path).problems == []

    compare(
        benchmark,
        "random with flushes, qcow2",
        prepare=prepare,
        theirs=nbd,
        ours=write,
        verify=verify,
    )


# -- verbs -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_commit(benchmark: BenchmarkFixture, folder: Path, format: str) -> None:
    """An overlay of which a quarter is data, against qemu-img commit."""
    base, overlay = folder / f"base.{format}", folder / "overlay.qcow2"
    copy = folder / "copy.qcow2"
    data = bytes([BYTE]) * MIB

    def prepare() -> None:
        for path in (base, overlay):
            path.unlink(missing_ok=True)
        create(base, format)
        backing = ("-b", base, "-F", format)
        peer("qemu-img", "create", "-q", "-f", "qcow2", *backing, overlay)
        with imgcore.open(overlay, mode="r+") as image:
            for offset in range(0, NBYTES, 4 * MIB):
                image.write(offset, data)
        os.sync()
        shutil.copyfile(overlay, copy)

    def verify() -> None:
        # The overlay is empty by now.
        compared = ("-f", "qcow2", "-F", format, copy, base)
        peer("qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-b", "", copy)
        peer("qemu-img", "compare", "-q", *compared)
        if format != "raw":
            assert imgcore.check(base).problems == []

    compare(
        benchmark,
        f"commit to {format}",
        prepare=prepare,
        theirs=lambda: peer("qemu-img", "commit", "-q", overlay),
        ours=lambda: imgcore.commit(overlay),
        verify=verify,
    )


def changing_disk(folder: Path) -> tuple[Path, list[tuple[int, int]], Callable[[], None]]:
    """Return a raw disk, areas of 64 KiB that are 1 % of it, and what changes them."""
    source = folder / "source.raw"
    with source.open("wb") as file:
        for _ in range(N_MIB):
            file.write(os.urandom(MIB))
    n_units = NBYTES // (64 * KIB)
    units = sorted(random.Random(1).sample(range(n_units), n_units // 100))
    areas = [(unit * 64 * KIB, 64 * KIB) for unit in units]

    def change() -> None:
        with source.open("r+b") as file:
            for offset, length in areas:
                file.seek(offset)
                file.write(os.urandom(length))

    return source, areas, change


@pytest.mark.parametrize("format", FORMATS)
def test_sync(benchmark: BenchmarkFixture, folder: Path, format: str) -> None:
    """1 % of a disk, whose areas are given, against a conversion of it."""
    source, areas, change = changing_disk(folder)
    path, copy = folder / f"disk.{format}", folder / "copy"
    imgcore.convert(source, path, target_format=format, sync=False)

    def prepare() -> None:
        copy.unlink(missing_ok=True)
        change()

    def verify() -> None:
        assert imgcore.compare(source, path).identical

    compare(
        benchmark,
        f"sync of 1 %, {format}",
        prepare=prepare,
        theirs=lambda: imgcore.convert(source, copy, target_format=format, sync=False),
        ours=lambda: imgcore.sync(source, path, areas=areas),
        verify=verify,
    )


def test_sync_by_tree(benchmark: BenchmarkFixture, folder: Path) -> None:
    """1 % of a disk, which a tree of its former state finds, against `checksum`."""
    source, _, change = changing_disk(folder)
    path, tree, former = folder / "disk.qcow2", folder / "tree", folder / "former"
    imgcore.convert(source, path, sync=False)
    imgcore.checksum(source, tree=former)

    def prepare() -> None:
        shutil.copyfile(former, tree)
        change()

    def verify() -> None:
        assert imgcore.compare(source, path).identical
        shutil.copyfile(tree, former)

    compare(
        benchmark,
        "sync of 1 % by tree",
        prepare=prepare,
        theirs=lambda: imgcore.checksum(source),
        ours=lambda: imgcore.sync(source, path, tree=tree, checksum="sha256"),
        verify=verify,
    )
