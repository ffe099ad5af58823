"""Whole commands that change the format of images of 1 TiB in place, on ext4.

``pytest benchmarks/bench_rewriting.py --benchmark-enable -s`` needs root, for the file
system.  It is in ``IMGCORE_BENCH_DIR``, if that is set.
"""

from __future__ import annotations

import os
import tempfile
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

ROUNDS: Final = 3

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


@pytest.fixture(scope="module")
def ext4() -> Iterator[Path]:
    parent = os.environ.get("IMGCORE_BENCH_DIR")
    with tempfile.TemporaryDirectory(prefix="imgcore-bench-", dir=parent) as name:
        folder = Path(name)
        image = make_file_system("ext4", folder / "image", 200 * GIB)
        with mounted(image, folder / "mounted", "-o", "loop,discard") as top:
            yield top


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

    benchmark.pedantic(lambda: run(command), setup=put_source, rounds=ROUNDS)
    benchmark.extra_info["file_nbytes"] = out.stat().st_size
    if benchmark.stats is not None:
        median = benchmark.stats.stats.median
        print(f"\n{source.name} to {target.name}: {median:.2f} s")
