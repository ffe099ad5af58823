"""Random extents are converted to every format and back, and asked for in pieces."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import imgcore
from tests.helpers import images, own, qemu
from tests.helpers.qemu import VARIANTS, Variant

MAX_SECTORS = 6 * 2048  # 6 MiB: several L2 tables at 512-byte clusters, several grain tables

pieces = st.lists(
    st.tuples(
        st.integers(0, MAX_SECTORS - 1),
        st.integers(1, 400),
        st.sampled_from(["noise", "text", "zeros", "edge"]),
    ),
    max_size=12,
)

relaxed = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


def write_raw(path: Path, n_sectors: int, rows: list[tuple[int, int, str]]) -> None:
    """Write a sparse raw image from (sector, sectors, content) rows."""
    with open(path, "wb") as file:
        for sector, length, content in rows:
            nbytes = min(length, n_sectors - sector) * 512
            if nbytes <= 0:
                continue
            file.seek(sector * 512)
            file.write(fill(content, nbytes, sector))
        file.truncate(n_sectors * 512)


def fill(content: str, nbytes: int, seed: int) -> bytes:
    """Return ``nbytes`` bytes of one kind."""
    if content == "noise":
        return images.noise(nbytes, seed)
    if content == "text":
        return images.text(nbytes, seed)
    if content == "edge":
        return b"\x01" + bytes(nbytes - 2) + b"\x80"
    return bytes(nbytes)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@relaxed
@given(n_sectors=st.integers(1, MAX_SECTORS), rows=pieces, threads=st.sampled_from([1, 2, 5]))
def test_there_and_back(
    variant: Variant, n_sectors: int, rows: list[tuple[int, int, str]], threads: int
) -> None:
    with tempfile.TemporaryDirectory(prefix="imgcore-property-") as name:
        folder = Path(name)
        raw = folder / "in.raw"
        write_raw(raw, n_sectors, rows)
        target = folder / f"out{variant.suffix}"
        own.convert(raw, target, variant, threads=threads)
        back = folder / "back.raw"
        own.convert(target, back, qemu.RAW, source_format=variant.format, threads=threads)
        assert back.read_bytes() == raw.read_bytes()
        extents_in_pieces_equal_those_at_once(target, variant, n_sectors)


def extents_in_pieces_equal_those_at_once(path: Path, variant: Variant, n_sectors: int) -> None:
    """Ask for extents in odd pieces, and join them again."""
    with imgcore.open(str(path), format=variant.format) as image:
        virtual_size = n_sectors * 512
        assert image.virtual_size == virtual_size
        whole = joined(image, [(0, virtual_size)])
        rng = np.random.default_rng(n_sectors)
        cuts = sorted({0, n_sectors, *rng.integers(0, n_sectors + 1, size=9).tolist()})
        parts = [(a * 512, (b - a) * 512) for a, b in itertools.pairwise(cuts)]
        assert joined(image, parts) == whole


def joined(image: imgcore.Image, parts: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Return the extents as rows, with neighbours that continue each other joined."""
    rows: list[list[int]] = []
    for start, length in parts:
        position = start
        for batch in image.extents(start, length):
            for row in batch.tolist():
                assert row[0] == position, "a gap or an overlap"
                assert row[1] > 0
                position = row[0] + row[1]
                if rows and continues(rows[-1], row):
                    rows[-1][1] += row[1]
                else:
                    # For compressed blocks, host_length is an upper bound.
                    rows.append([*row[:3], 0, *row[4:]])
        assert position == start + length
    return [tuple(row) for row in rows]


def continues(before: list[int], row: tuple[int, ...]) -> bool:
    """Tell whether ``row`` continues ``before`` in the guest and on the host."""
    if before[4:] != list(row[4:]) or before[0] + before[1] != row[0]:
        return False
    if row[5] in (0, 1):
        return True
    if row[5] == 2:
        return before[2] + before[1] == row[2]
    return before[2] == row[2]  # two parts of one compressed block


def test_extent_arithmetic_stays_integer(tmp_path: Path) -> None:
    """NumPy turns mixed uint64 and int64 into floats; columns must stay integers."""
    raw = tmp_path / "in.raw"
    images.FRAGMENTED.write(raw)
    for variant in VARIANTS:
        target = tmp_path / f"{variant.name}{variant.suffix}"
        own.convert(raw, target, variant)
        with imgcore.open(str(target), format=variant.format) as image:
            for batch in image.extents(0, image.virtual_size):
                assert all(batch.dtype[name].kind == "u" for name in batch.dtype.names or ())
