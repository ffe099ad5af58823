"""Batches of a disk that one file stores unchanged, for a target of the same kind."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.helpers.images import MIB

import imgcore
from imgcore.disk import flat_batches
from imgcore.disk.image_batches import disk_batches
from imgcore.engine.extents import EXTENT_DTYPE, Extents, join_neighbours
from imgcore.engine.geometry import Geometry, Placing

BLOCK_NBYTES = 64 << 10


def geometry_of(nbytes: int) -> Geometry:
    return Geometry(BLOCK_NBYTES, nbytes, placing=Placing.IDENTITY)


def ours(image: imgcore.Image, nbytes: int) -> list[tuple[int, int, Extents]]:
    batches = flat_batches.flat_batches(
        image.sources[0].file, image.virtual_size, geometry_of(nbytes)
    )
    return [
        (batch.start, batch.end, np.asarray(batch.rows).astype(EXTENT_DTYPE)) for batch in batches
    ]


@pytest.mark.parametrize("excess", [0, -100, MIB])
@pytest.mark.parametrize("batch_rows", [1, 2, 7, 1 << 14])
def test_rows_are_those_of_the_general_way(
    excess: int, batch_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows, in batches that end with whole blocks."""
    monkeypatch.setattr(flat_batches, "_BATCH_ROWS", batch_rows)
    rng = random.Random(batch_rows)
    path = tmp_path / "a.raw"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
        for _ in range(150):
            file.seek(4096 * rng.randrange(2048))
            file.write(b"data" * 1024 * rng.choice((1, 1, 3, 40)))
        file.truncate(8 * MIB)
    with imgcore.open(path) as image:
        nbytes = image.virtual_size + excess
        batches = ours(image, nbytes)
        general = disk_batches(image.extents(), image.virtual_size, geometry_of(nbytes))
        expected = np.concatenate([batch.rows for batch in general])
    assert len(expected) > 50
    assert [start for start, _, _ in batches] == [0, *(end for _, end, _ in batches[:-1])]
    assert batches[-1][1] == nbytes
    assert all(end % BLOCK_NBYTES == 0 for _, end, _ in batches[:-1])
    for start, end, rows in batches:
        assert (int(rows[0]["guest_offset"]), int(rows["length"].sum())) == (start, end - start)
        assert len(rows) <= batch_rows + BLOCK_NBYTES // 4096 + 1
    assert (len(batches) > 1) == (batch_rows < 1 << 14)
    joined = join_neighbours(np.concatenate([rows for _, _, rows in batches]))
    assert joined.tolist() == join_neighbours(expected).tolist()


@pytest.mark.parametrize("more", [[], ["--resume"]], ids=["", "resume"])
@pytest.mark.parametrize("target", ["b.raw", "b.vhd"])
def test_flat_to_flat_needs_no_numpy(target: str, more: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(MIB) + b"data" * MIB)
    code = (
        "import sys; from imgcore.cli.main import main;"
        "code = main(['convert', *sys.argv[1:]]);"
        "sys.exit(code or ('loaded' if 'numpy' in sys.modules else 0))"
    )
    options = ["-o", "subformat=fixed"] if target == "b.vhd" else []
    command = [sys.executable, "-c", code, *options, *more, "a.raw", target]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with imgcore.open(tmp_path / target) as image:
        assert image.read(0, 5 * MIB) == (tmp_path / "a.raw").read_bytes()
    if target == "b.raw" and not more:
        command = [sys.executable, "-c", code, "-q", "-O", "raw", "a.raw", "-"]
        streamed = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
        assert streamed.stdout == (tmp_path / "a.raw").read_bytes()


def test_tables_of_the_core_have_the_layout_of_arrays() -> None:
    from imgcore._core import extent_table

    rows = [(1, 2, 3, 4, 5, 6, 7), (8 << 60, 2**63, 10, 11, 12, 13, 14)]
    table = np.asarray(extent_table(rows))
    assert table.tolist() == rows
    assert table.dtype == EXTENT_DTYPE
    with pytest.raises(OverflowError):
        extent_table([(1, 2, 3, 4, 5, 2**16, 7)])
