"""The benchmark runs and writes its record; its figures are meaningless here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import qemu
from tests.helpers.images import MIB
from tests.helpers.mounts import make_file_system, mounted

ROOT = Path(__file__).resolve().parent.parent


def test_the_table_is_printed_and_recorded(tmp_path: Path) -> None:
    qemu.require_qemu_img()
    record = tmp_path / "out.json"
    words = ["--mib", "24", "--rounds", "1", "--only", "raw to QCOW2", "--json", str(record)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "IMGCORE_BENCH_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(record.read_text())
    titles = [line["title"] for line in answer["ratios"]]
    assert "raw to QCOW2 zlib, 4 KiB window" in titles
    assert all(title in done.stdout for title in titles)
    assert all(line["ratio"]["median"] > 0 for line in answer["ratios"])
    assert answer["environment"]["cpu"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json"]


@pytest.mark.parametrize("pair", ["vhdx to qcow2", "raw to qcow2 against -C"])
def test_reflinks_are_compared(pair: str, tmp_path: Path) -> None:
    qemu.require_qemu_img()
    image = make_file_system("xfs", tmp_path / "image", 512 * MIB)
    with mounted(image, tmp_path / "mounted", "-o", "loop") as folder:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.bench_reflink", str(folder)]
            + ["--mib", "8", "--rounds", "1", "--only", pair],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[2].startswith(pair)
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "only", "titles"),
    [
        (
            "bench_random",
            ", raw",
            ("4 KiB, raw", "16 threads, raw", "readv of 1000, raw", "as_file 1 MiB, raw"),
        ),
        ("bench_checksum", "nothing", ("checksum of 1 TiB of nothing",)),
    ],
)
def test_reads_and_checksums_are_compared(
    module: str, only: str, titles: tuple[str, ...], tmp_path: Path
) -> None:
    qemu.require_qemu_img()
    words = ["--mib", "24", "--rounds", "1", "--only", only]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "IMGCORE_BENCH_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(any(line.startswith(title) for line in lines) for title in titles), lines
    assert list(tmp_path.iterdir()) == []


def test_fragmented_images_are_compared() -> None:
    qemu.require_qemu_img()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_fragmented"]
        + ["--mib", "8", "--rounds", "1", "--only", "latency, shuffled, zlib"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[2:]
    if lines[0].startswith("skipped:"):
        pytest.skip(lines[0])
    titles = [line.partition("  ")[0] for line in lines]
    assert titles == [f"{verb}, latency, shuffled, zlib" for verb in ("convert", "compare")]
