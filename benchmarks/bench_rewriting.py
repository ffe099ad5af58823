"""Conversion without copying: whole commands, in place on ext4 and by reflink on XFS.

``pytest benchmarks/bench_rewriting.py --benchmark-enable -s`` needs root, for the file
systems.  qemu-img and imgcore run in turns, and the ratio is that of one round.
``IMGCORE_BENCH_MIB`` is the size of the real disk (4096).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from tests.helpers import rewrite_pairs as pairs
from tests.helpers.images import GIB, KIB, MIB
from tests.helpers.mounts import make_file_system, mounted
from tests.helpers.rewrite_pairs import Becomes
from tests.helpers.stand_ins import StandIn

from benchmarks import _environment
from benchmarks._harness import run

ROOT: Final = Path(__file__).resolve().parent.parent
DISK_MIB: Final = int(os.environ.get("IMGCORE_BENCH_MIB", "4096"))
ROUNDS: Final = 3
TO_QCOW2_1M: Final = Becomes("qcow2-1M", "qcow2", ("cluster_size=1M",))

IN_PLACE: Final = (
    (StandIn("vhdx", 32 * MIB, True, 32 * MIB), pairs.TO_QCOW2),
    (StandIn("vhdx", 32 * MIB, True, 32 * MIB), pairs.TO_VMDK),
    (StandIn("vhdx", MIB, True, MIB), pairs.TO_VDI),
    (StandIn("qcow2", 64 * KIB, True, 64 * KIB), pairs.TO_VMDK),
    (StandIn("qcow2", MIB, True, MIB), pairs.TO_VHDX),
    (StandIn("vmdk", 64 * KIB, True, 64 * KIB), pairs.TO_QCOW2),
    (StandIn("vdi", MIB, True, MIB), pairs.TO_QCOW2),
    (StandIn("vdi", MIB, True, MIB), pairs.TO_VHDX),
)
FORMATS: Final = ("raw", "qcow2", "vmdk", "vhdx", "vdi")
BY_REFLINK: Final = (
    ("raw", pairs.TO_QCOW2),
    ("raw", pairs.TO_VMDK),
    ("raw", pairs.TO_VHDX),
    ("raw", pairs.TO_VDI),
    ("vhdx", pairs.TO_QCOW2),
    ("vhdx", pairs.TO_VMDK),
    ("vhdx", pairs.TO_VDI),
    ("qcow2", pairs.TO_VMDK),
    ("vmdk", pairs.TO_QCOW2),
    ("vdi", pairs.TO_VMDK),
)


def _mounted(kind: str, factory: pytest.TempPathFactory, nbytes: int) -> Iterator[Path]:
    folder = Path(os.environ.get("IMGCORE_BENCH_DIR") or factory.mktemp(kind)) / f"bench-{kind}"
    folder.mkdir()
    image = make_file_system(kind, folder / "image", nbytes)
    try:
        with mounted(image, folder / "mounted", "-o", "loop") as top:
            yield top
    finally:
        image.unlink()
        (folder / "mounted").rmdir()
        folder.rmdir()


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from _mounted("ext4", tmp_path_factory, 200 * GIB)


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from _mounted("xfs", tmp_path_factory, 200 * GIB)


@pytest.fixture(scope="module")
def disk(xfs: Path) -> Path:
    """Return a raw ext4 file system of installed files."""
    path = xfs / "disk.raw"
    maker = ROOT / "tools" / "make_image.py"
    subprocess.run([sys.executable, maker, path, str(DISK_MIB)], check=True)
    return path


@pytest.mark.parametrize(
    ("source", "target"), IN_PLACE, ids=lambda x: x.name if isinstance(x, tuple) else None
)
def test_in_place(
    benchmark: BenchmarkFixture, source: StandIn, target: Becomes, ext4: Path
) -> None:
    """A stand-in for 100 GiB of data on a disk of 1 TiB."""
    path, out = ext4 / f"disk{source.format}.img", ext4 / f"out{target.suffix}"
    command = [_environment.find_imgcore(), "rewrite", "-q", "-O", target.format]
    command += [word for option in target.options for word in ("-o", option)]
    command += ["-f", source.format, "--name", out.name, str(path)]

    def put_source() -> None:
        for old in ext4.iterdir():
            if old.is_file():
                old.unlink()
        source.make(path)
        os.sync()

    peaks: list[int] = []
    benchmark.pedantic(
        lambda: peaks.append(run(command).peak_nbytes), setup=put_source, rounds=ROUNDS
    )
    benchmark.extra_info["file_nbytes"] = out.stat().st_size
    if benchmark.stats is not None:
        median = benchmark.stats.stats.median
        print(f"\n{source.name} to {target.name}: {median:.2f} s, peak {max(peaks) / MIB:.0f} MiB")


def made(image_format: str, disk: Path) -> Path:
    """Return the disk as an image; qemu-img makes it, for VDI imgcore does."""
    if image_format == "raw":
        return disk
    path = disk.with_suffix(f".{image_format}")
    if not path.exists():
        words = ["convert", "-f", "raw", "-O", image_format, str(disk), str(path)]
        # The blocks of a VDI by qemu-img are off every block of the others.
        program = _environment.find_imgcore() if image_format == "vdi" else None
        run([program or _environment.find_qemu_img(), *words])
    os.sync()
    return path


@pytest.mark.parametrize(
    ("source", "target"), BY_REFLINK, ids=lambda x: x if isinstance(x, str) else x.name
)
def test_by_reflink(benchmark: BenchmarkFixture, source: str, target: Becomes, disk: Path) -> None:
    path = made(source, disk)
    ours, theirs = (disk.with_name(f"{who}{target.suffix}") for who in ("ours", "theirs"))
    words = ["convert", "-f", source, "-O", target.format]
    options = ["-o", ",".join(target.options)] if target.options else []
    peer = [_environment.find_qemu_img(), *words, "-m", "16", "-W"]
    own = [_environment.find_imgcore(), *words, *options, "-q", "--no-sync"]
    own += ["--reflink", "always", str(path), str(ours)]
    peer_seconds: list[float] = []
    seconds: list[float] = []

    def run_peer() -> None:
        for out in (ours, theirs):
            out.unlink(missing_ok=True)
        peer_seconds.append(run([*peer, str(path), str(theirs)]).seconds)

    benchmark.pedantic(lambda: seconds.append(run(own).seconds), setup=run_peer, rounds=ROUNDS)
    run(
        [_environment.find_qemu_img(), "compare", "-f", "raw", "-F", target.format, str(disk), ours]
    )
    ratio = statistics.median(a / b for a, b in zip(peer_seconds, seconds, strict=True))
    benchmark.extra_info["times_as_fast"] = ratio
    print(
        f"\n{source} to {target.name}: qemu-img {statistics.median(peer_seconds):.2f} s, "
        f"imgcore {statistics.median(seconds):.2f} s, {ratio:.1f} times as fast"
    )
