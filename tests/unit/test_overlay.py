"""Chains of layers, compared with a byte-wise model."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcore.disk.image_batches import image_batches
from imgcore.disk.overlay import chain_extents, padded
from imgcore.engine.batches import cut_batches, pair_up
from imgcore.engine.extents import EXTENT_DTYPE, Kind, clip, single
from imgcore.engine.geometry import Geometry
from imgcore.verbs.compare import first_kind_difference

if TYPE_CHECKING:
    from imgcore.engine.extents import Extents

SECTOR = 512


def rows_of(kinds: list[int], file: int = 0) -> Extents:
    """One sector per kind; stored rows are not adjacent to others on the host."""
    rows = np.zeros(len(kinds), EXTENT_DTYPE)
    rows["guest_offset"] = np.arange(len(kinds), dtype=np.uint64) * np.uint64(SECTOR)
    rows["length"] = SECTOR
    rows["kind"] = kinds
    stored = rows["kind"] >= Kind.DATA
    rows["host_offset"][stored] = rows["guest_offset"][stored] * np.uint64(3) + np.uint64(7)
    rows["host_length"][stored] = SECTOR
    rows["file"][stored] = file
    return rows


def joined(kinds: list[int]) -> Extents:
    """The same, but adjacent sectors of a kind are one row, contiguous on the host."""
    rows: list[tuple[int, ...]] = []
    for index, kind in enumerate(kinds):
        if rows and rows[-1][5] == kind:
            last = rows[-1]
            stored = SECTOR if kind == Kind.DATA else 0
            rows[-1] = (last[0], last[1] + SECTOR, last[2], last[3] + stored, 0, kind, 0)
        else:
            host = index * SECTOR if kind == Kind.DATA else 0
            rows.append(
                (index * SECTOR, SECTOR, host, SECTOR if host or kind == 2 else 0, 0, kind, 0)
            )
    return np.array(rows, EXTENT_DTYPE)


class FakeLayer:
    format_name: ClassVar[str] = "fake"

    def __init__(self, rows: Extents, batch_rows: int) -> None:
        self._rows = rows
        self._batch_rows = batch_rows
        self.virtual_size = int(rows["guest_offset"][-1] + rows["length"][-1])

    def extents(self, start: int, length: int) -> Iterator[Extents]:
        rows = clip(self._rows, start, start + length)
        for at in range(0, len(rows), self._batch_rows):
            yield rows[at : at + self._batch_rows]


kinds_lists = st.lists(st.sampled_from([Kind.HOLE, Kind.ZERO, Kind.DATA]), min_size=1, max_size=40)


@given(st.lists(kinds_lists, min_size=1, max_size=4), st.integers(1, 7))
def test_chain_reads_as_the_topmost_layer_that_holds_it(
    layers: list[list[int]], batch_rows: int
) -> None:
    fakes: list[Any] = [FakeLayer(joined(kinds), batch_rows) for kinds in layers]
    n_sectors = len(layers[0])
    got = list(chain_extents(fakes, [10 * i for i in range(len(layers))], 0, n_sectors * SECTOR))
    at = 0
    for rows, depths in got:
        assert len(rows) == len(depths)
        for row, depth in zip(rows, depths, strict=True):
            assert row["guest_offset"] == at
            for sector in range(at // SECTOR, (at + int(row["length"])) // SECTOR):
                holders = [
                    i for i, kinds in enumerate(layers) if sector < len(kinds) and kinds[sector]
                ]
                covered = all(sector < len(kinds) for kinds in layers[: int(depth) + 1])
                assert covered
                if not holders or not reachable(layers, sector, holders[0]):
                    assert row["kind"] == Kind.HOLE
                    continue
                assert depth == holders[0]
                assert row["kind"] == layers[holders[0]][sector]
                if row["kind"] == Kind.DATA:
                    assert row["file"] == 10 * holders[0]
                    within = sector * SECTOR - int(row["guest_offset"])
                    assert row["host_offset"] + within == sector * SECTOR
                    assert row["host_length"] == row["length"]
            at += int(row["length"])
    assert at == n_sectors * SECTOR


def reachable(layers: list[list[int]], sector: int, depth: int) -> bool:
    """A layer that ends early cuts off all layers below it."""
    return all(sector < len(kinds) for kinds in layers[: depth + 1])


@given(kinds_lists, st.data())
def test_clip_in_pieces_is_the_whole(kinds: list[int], data: st.DataObject) -> None:
    rows = joined(kinds)
    end = len(kinds) * SECTOR
    cut = data.draw(st.integers(0, len(kinds))) * SECTOR
    pieces = [clip(rows, a, b) for a, b in ((0, cut), (cut, end)) if a < b]
    sectors = [
        (int(row["guest_offset"]) + at, int(row["host_offset"]) + at, int(row["kind"]))
        for piece in pieces
        for row in piece
        for at in range(0, int(row["length"]), SECTOR)
        if row["kind"] == Kind.DATA
    ]
    assert sectors == [(i * SECTOR, i * SECTOR, 2) for i, k in enumerate(kinds) if k == 2]
    assert sum(int(piece["length"].sum()) for piece in pieces) == end
    assert np.array_equal(rows, joined(kinds)), "the batch itself was changed"


@given(kinds_lists, st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_batches_start_and_end_at_units_and_cover_all_data(
    kinds: list[int], batch_rows: int, unit_sectors: int, skip_empty: bool
) -> None:
    layer = FakeLayer(joined(kinds), batch_rows)
    unit, end = unit_sectors * SECTOR, len(kinds) * SECTOR
    batches = list(
        cut_batches(
            layer.extents(0, end),
            unit=unit,
            max_nbytes=2 * unit,
            disk_end=end,
            skip_empty=skip_empty,
        )
    )
    covered = set()
    at = 0
    for start, stop, rows, *_ in batches:
        assert at <= start < stop <= end
        assert start % unit == 0
        assert stop % unit == 0 or stop == end
        assert stop - start <= 2 * unit
        assert int(rows["guest_offset"][0]) == start
        assert int(rows["length"].sum()) == stop - start
        covered.update(range(start // SECTOR, stop // SECTOR))
        at = stop
    missing = set(range(len(kinds))) - covered
    assert all(kinds[sector] != Kind.DATA for sector in missing)
    if not skip_empty:
        assert not missing


def test_a_batch_may_need_several_of_the_reader_for_one_unit() -> None:
    extents = (rows_of([2] * 8)[i : i + 1] for i in range(8))
    batches = list(cut_batches(extents, unit=4096, max_nbytes=4096, disk_end=4096, skip_empty=True))
    assert [(b.start, b.end, len(b.rows)) for b in batches] == [(0, 4096, 8)]


@given(kinds_lists, kinds_lists, st.integers(1, 5), st.integers(1, 5))
def test_pairs_cover_both_sides(a: list[int], b: list[int], n_a: int, n_b: int) -> None:
    end = max(len(a), len(b)) * SECTOR
    sides = [
        padded(
            FakeLayer(joined(kinds), n).extents(0, len(kinds) * SECTOR), len(kinds) * SECTOR, end
        )
        for kinds, n in ((a, n_a), (b, n_b))
    ]
    at, difference = 0, None
    for start, stop, rows_a, rows_b in pair_up(*sides):
        assert start == at
        for rows in (rows_a, rows_b):
            assert int(rows["guest_offset"][0]) == start
            assert int(rows["length"].sum()) == stop - start
        if difference is None:
            difference = first_kind_difference(rows_a, rows_b)
        at = stop
    assert at == end
    stored = [
        [i < len(kinds) and kinds[i] == Kind.DATA for i in range(end // SECTOR)] for kinds in (a, b)
    ]
    expected = next(
        (i * SECTOR for i in range(end // SECTOR) if stored[0][i] != stored[1][i]), None
    )
    assert difference == expected


@given(kinds_lists, kinds_lists, st.integers(1, 5))
def test_batches_over_a_base_are_bounded_on_both_sides(
    kinds: list[int], base_kinds: list[int], batch_rows: int
) -> None:
    """Both sides cover the same whole units, and few more rows than a unit holds."""
    unit, max_rows = 4 * SECTOR, 8
    images: list[Any] = []
    for side in (kinds, base_kinds):
        layer = FakeLayer(rows_of(side), batch_rows)
        images.append(
            SimpleNamespace(
                virtual_size=layer.virtual_size,
                sources=[
                    SimpleNamespace(
                        file=SimpleNamespace(path="", identity=len(images)),
                        guest_base=0,
                        block_nbytes=0,
                    )
                ],
                data_extents=lambda start=0, length=None, layer=layer: layer.extents(
                    start, layer.virtual_size if length is None else length
                ),
            )
        )
    end = images[0].virtual_size
    geometry = Geometry(block_nbytes=unit, guest_nbytes=end)
    at = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("imgcore.engine.batches.MAX_BATCH_ROWS", max_rows)
        batches = list(image_batches(images[0], images[0].data_extents(), images[1], geometry))
    for start, stop, rows, base, _ in batches:
        assert base is not None
        assert start == at
        assert stop == end or stop % unit == 0
        for side in (rows, base):
            assert int(side["guest_offset"][0]) == start
            assert int(side["length"].sum()) == stop - start
            assert len(side) <= max_rows // 2 + batch_rows + 4
        assert (base["file"] == (base["kind"] == Kind.DATA)).all()
        at = stop
    assert at == end


@pytest.mark.parametrize("kind", [Kind.HOLE, Kind.ZERO, Kind.DATA])
def test_single_is_a_valid_row(kind: Kind) -> None:
    row = single(4096, 512, kind, host_offset=8192 if kind is Kind.DATA else 0)
    assert row.dtype == EXTENT_DTYPE
    assert int(row["host_length"][0]) == (512 if kind is Kind.DATA else 0)
