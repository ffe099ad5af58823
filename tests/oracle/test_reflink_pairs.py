"""Every pair of formats by ``--reflink=always``, on XFS and Btrfs, judged by others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import imgcore
from tests.helpers import rewrite_pairs as pairs
from tests.helpers.images import MIB
from tests.helpers.rewrite_pairs import DISK, MOVED_NBYTES, ODD_DISK, PAIRS, USUAL, Pair


def _params(chosen: Iterable[Pair]) -> list[Any]:
    return [pytest.param(pair, id=pair.name) for pair in chosen]


def convert(pair: Pair, source: Path, target: Path) -> imgcore.ConvertResult:
    return imgcore.convert(
        source,
        target,
        format="raw" if source.suffix == ".raw" else None,
        target_format=pair.target.format,
        options=list(pair.target.options),
        reflink="always",
        sync=False,
    )


def goes_by_reflink(pair: Pair, here: Path, beside: Path) -> None:
    raw, folder = beside / "disk.raw", here / "source"
    folder.mkdir()
    disk = ODD_DISK if "aged" in pair.name or "plain" in pair.name else DISK
    disk.write(raw)
    source = folder / f"disk{pair.source.suffix}"
    pair.source.make(raw, source)
    before = pairs.digests(folder)
    target = here / f"target{pair.target.suffix}"
    result = convert(pair, source, target)
    assert result.virtual_size == raw.stat().st_size
    moved_nbytes = MOVED_NBYTES.get(pair.target.name, 2 * MIB)
    assert result.bytes_shared > 0
    # Compressed blocks are read once, to verify them.
    verified_nbytes = result.bytes_shared if result.bytes_reused else 0
    assert result.bytes_read <= moved_nbytes + verified_nbytes
    assert result.bytes_written <= moved_nbytes
    assert pairs.digests(folder) == before
    pairs.assert_reads_as(raw, target, pair.target.format, leaks=True)
    # A guest of the target does not change the source.
    pairs.write_as_guest(raw, target, pair.target.format)
    pairs.assert_reads_as(raw, target, pair.target.format, leaks=True)
    assert pairs.digests(folder) == before


@pytest.mark.slow
@pytest.mark.rewriting
@pytest.mark.parametrize("pair", _params(pair for pair in PAIRS if not pair.target.inflate))
def test_every_pair(pair: Pair, here: Path, tmp_path: Path) -> None:
    goes_by_reflink(pair, here, tmp_path)


@pytest.mark.parametrize("pair", _params(pair for pair in PAIRS if pair.name in USUAL[:4]))
def test_usual_pairs(pair: Pair, here: Path, tmp_path: Path) -> None:
    goes_by_reflink(pair, here, tmp_path)
