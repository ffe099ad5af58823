"""Which blocks of a rewritten image stay and which move, and the whole rewrite."""

from __future__ import annotations

import random
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers.rewriting import director_for, open_target, rewritten

import imgcore
from imgcore import LimitExceededError, UnsupportedFeatureError, limits
from imgcore.engine.extents import EXTENT_DTYPE, BlockState, Kind
from imgcore.engine.progress import Progress, Tally
from imgcore.files.staged_file import StagedFile
from imgcore.formats.api import BlockRule, Survey
from imgcore.rewriting import layout as layout_module
from imgcore.rewriting.layout import Layout, Runs, lay_out, placements
from imgcore.rewriting.survey import survey_image

SECTOR = 512
KIB, MIB = limits.KIB, limits.MIB
Row = tuple[int, int, int]
Packed = tuple[int, int, int, int, int, Kind, int]


def rows_of(*rows: Row | Packed) -> np.ndarray[Any, Any]:
    """Return extents from (guest, length, host), or from all fields."""
    full = [row if len(row) > 3 else (*row, row[1], 0, Kind.DATA, 0) for row in rows]
    return np.array(full, dtype=EXTENT_DTYPE)


def survey_of(*rows: Row | Packed, file_nbytes: int = 1 << 30, is_flat: bool = False) -> Survey:
    return Survey(file_nbytes, is_flat, rows_of(*rows))


def stays(found: Layout) -> dict[int, int]:
    """Return the host offset of each block that stays."""
    runs = found.stay
    return {
        int(first) + k: int(host) + k * found.block_nbytes
        for first, n, host in zip(runs.first, runs.n_blocks, runs.host, strict=True)
        for k in range(int(n))
    }


def moves(found: Layout) -> list[int]:
    pairs = zip(found.moved_first.tolist(), found.moved_count.tolist(), strict=True)
    return [first + k for first, n in pairs for k in range(n)]


RULE = BlockRule(block_nbytes=4096, alignment=4096, first_offset=4096)


@pytest.mark.parametrize(
    ("rows", "stay", "moved"),
    [
        pytest.param([], {}, [], id="empty disk"),
        pytest.param([(0, 8192, 65536)], {0: 65536, 1: 69632}, [], id="whole blocks"),
        pytest.param([(0, 8192, 0)], {1: 4096}, [0], id="front"),
        pytest.param([(0, 8192, 66048)], {}, [0, 1], id="alignment"),
        pytest.param([(512, 8192, 66048)], {1: 69632}, [0, 2], id="partial blocks"),
        pytest.param(
            [(0, 2048, 65536), (2048, 2048, 67584)],
            {},
            [0],
            id="pieces",
        ),
        pytest.param([(0, 2048, 65536), (2048, 512, 4096)], {}, [0], id="two pieces, one move"),
        pytest.param([(0, 4096, 65536), (8192, 4096, 65536)], {0: 65536}, [2], id="same place"),
        pytest.param(
            [(0, 8192, 65536), (8192, 8192, 69632)], {0: 65536, 1: 69632}, [2, 3], id="overlap"
        ),
        pytest.param(
            [(0, 4096, 65536, 4096, 1, Kind.DATA, 0), (4096, 4096, 65536)],
            {1: 65536},
            [0],
            id="data of another file",
        ),
        pytest.param([(0, 4096, 65536, 900, 0, Kind.ZLIB, 0)], {}, [0], id="compressed"),
    ],
)
def test_blocks_that_stay(rows: list[Row], stay: dict[int, int], moved: list[int]) -> None:
    found = lay_out(survey_of(*rows), RULE, 1 << 20, [])
    assert stays(found) == stay
    assert moves(found) == moved


@pytest.mark.parametrize(
    ("disk", "host", "file_nbytes", "does_stay"),
    [
        # The file ends with the disk, or earlier than the block would: zeros follow.
        (6144, 65536, 65536 + 6144, True),
        # Other bytes of the file follow, which a larger disk would show.
        (6144, 65536, 1 << 20, False),
        (6144, 65536, 65536 + 6144 + 512, False),
        (8192, 65536, 1 << 20, True),
    ],
)
def test_the_last_block(disk: int, host: int, file_nbytes: int, does_stay: bool) -> None:
    survey = survey_of((0, disk, host), file_nbytes=file_nbytes)
    found = lay_out(survey, RULE, disk, [])
    assert stays(found) == {0: host} | ({1: host + 4096} if does_stay else {})
    assert moves(found) == ([] if does_stay else [1])


def test_holes_of_a_flat_disk_are_zeros() -> None:
    """A block of which the file has a part stays; front and cut last block move."""
    survey = survey_of(
        (512, 512, 512), (8192, 512, 8192), (9216, 512, 9216), (20480, 512, 20480),
        file_nbytes=22016, is_flat=True,
    )  # fmt: skip
    found = lay_out(survey, RULE, 21504, [])
    assert (stays(found), moves(found)) == ({2: 8192}, [0, 5])


def test_compressed_blocks_stay_where_the_format_takes_them() -> None:
    rule = RULE._replace(takes_compressed=frozenset({Kind.DEFLATE}))
    survey = survey_of(
        (0, 4096, 5001, 900, 0, Kind.DEFLATE, 0),
        (4096, 4096, 9001, 900, 0, Kind.ZLIB, 0),
        (8192, 4096, 5901, 100, 0, Kind.DEFLATE, 0),
        (12288, 2048, 8000, 100, 0, Kind.DEFLATE, 0),
    )
    found = lay_out(survey, rule, 14336, [])
    assert stays(found) == {0: 5001, 2: 5901}
    assert moves(found) == [1, 3]
    (first, batch), *rest = placements(found.stay, 4096)
    assert (first, rest) == (0, [])
    assert batch["state"].tolist() == [
        BlockState.COMPRESSED,
        BlockState.ABSENT,
        BlockState.COMPRESSED,
    ]
    assert batch["length"].tolist() == [900, 0, 100]


def test_nothing_stays_where_the_rewriter_writes() -> None:
    found = lay_out(survey_of((0, 40960, 65536)), RULE, 1 << 20, [(70000, 5000), (81920, 1)])
    assert moves(found) == [1, 2, 4]
    assert stays(found) == {k: 65536 + 4096 * k for k in (0, 3, 5, 6, 7, 8, 9)}


def random_survey(rng: random.Random) -> tuple[Survey, int]:
    """Return a survey of small units: rows may overlap and repeat in the file."""
    rows: list[Row | Packed] = []
    disk = SECTOR * rng.randrange(1, 200)
    guest = 0
    while (guest := guest + SECTOR * rng.choice((0, 0, 1, 5, 9))) < disk:
        length = min(SECTOR * rng.choice((1, 3, 8, 8, 16, 40)), disk - guest)
        host = SECTOR * rng.randrange(300)
        if rng.random() < 0.7:
            host = host // 8 * 8 + guest % 4096 // SECTOR * SECTOR
        kind, file = rng.choice((Kind.DATA,) * 6 + (Kind.ZLIB, Kind.DEFLATE)), rng.random() < 0.1
        rows.append((guest, length, host, length if kind is Kind.DATA else 700, file, kind, 0))
        guest += length
    return survey_of(*rows, file_nbytes=SECTOR * 400), disk


@pytest.mark.parametrize("seed", range(60))
def test_random_surveys(seed: int) -> None:
    """Each block is judged by itself: this must lead to the same result."""
    rng = random.Random(seed)
    survey, disk = random_survey(rng)
    size = rng.choice((512, 1024, 4096, 8192))
    rule = BlockRule(size, rng.choice((512, size)), first_offset=SECTOR * rng.randrange(20))
    rule = rule._replace(takes_compressed=frozenset({Kind.ZLIB}), end_offset=SECTOR * 290)
    overwrites = [(SECTOR * rng.randrange(300), SECTOR * rng.randrange(1, 9)) for _ in range(3)]
    found = lay_out(survey, rule, disk, overwrites)
    stay, moved = stays(found), moves(found)
    touched = {
        block
        for row in survey.rows
        for block in range(
            int(row["guest_offset"]) // size,
            -(-int(row["guest_offset"] + row["length"]) // size),
        )
    }
    assert set(stay) | set(moved) == touched
    assert len(stay) + len(moved) == len(touched)
    places = {block: place_of(survey, block, rule) for block in touched}
    candidates = {block: place for block, place in places.items() if place is not None}
    assert stay.items() <= {block: place[0] for block, place in candidates.items()}.items()
    spans = sorted(candidates[block] for block in stay)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    taken = [*(candidates[block] for block in candidates), *((o, o + n) for o, n in overwrites)]
    for low, high in spans:
        assert not any(low < o + n and o < high for o, n in overwrites)
    for block in set(candidates) - set(stay):
        low, high = candidates[block]
        others = [span for span in taken if span[0] < high and low < span[1]]
        # The row that the block is from may overlap another one.
        assert len(others) > 1 or overlaps_elsewhere(survey, block, size)


def place_of(survey: Survey, block: int, rule: BlockRule) -> tuple[int, int] | None:
    """Return where one block is in the file if it could stay there."""
    start = block * rule.block_nbytes
    for row in survey.rows:
        guest, length, host = (int(row[k]) for k in ("guest_offset", "length", "host_offset"))
        if row["file"] or not guest <= start < guest + length:
            continue
        if row["kind"] == Kind.ZLIB and (start, rule.block_nbytes) == (guest, length):
            end = host + int(row["host_length"])
        elif row["kind"] == Kind.DATA and start + rule.block_nbytes <= guest + length:
            host += start - guest
            end = host + rule.block_nbytes
            if host % rule.alignment:
                return None
        else:
            return None
        return (host, end) if rule.first_offset <= host and end <= rule.end_offset else None
    return None


def overlaps_elsewhere(survey: Survey, block: int, size: int) -> bool:
    own = next(
        row for row in survey.rows
        if row["guest_offset"] <= block * size < row["guest_offset"] + row["length"]
    )  # fmt: skip
    low, high = own["host_offset"], own["host_offset"] + own["host_length"]
    hits = [
        row for row in survey.rows
        if row["host_offset"] < high and low < row["host_offset"] + row["host_length"]
    ]  # fmt: skip
    return len(hits) > 1


@pytest.mark.parametrize("batch_blocks", [1, 3, 1 << 16])
def test_placements_in_batches(batch_blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "_BATCH_BLOCKS", batch_blocks)
    columns = np.array([[0, 4, 10, 100_000], [3, 1, 7, 2], [8192, 4096, 65536, 4 << 20]])
    runs = Runs.stored(*columns)
    found = {}
    for first, batch in placements(runs, 512):
        assert len(batch) <= batch_blocks
        for k, row in enumerate(batch):
            if row["state"]:
                assert (row["state"], row["length"]) == (BlockState.STORED, 512)
                found[first + k] = int(row["host_offset"])
    expected = {
        f + k: h + 512 * k for f, n, h in zip(*columns.tolist(), strict=True) for k in range(n)
    }
    assert found == expected
    assert list(found) == sorted(found)


# -- with files ------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Make a raw disk with holes, of an odd number of sectors."""
    rng = random.Random(3)
    path = tmp_path / "disk.raw"
    nbytes = 6 * MIB + 77 * SECTOR
    with path.open("wb") as file:
        file.truncate(nbytes)
        for offset in (0, 70_000, 2 * MIB + 5, 5 * MIB, nbytes - 3000):
            file.seek(offset)
            file.write(rng.randbytes(3000))
    return path


@pytest.mark.parametrize("options", [("block_size=1M",), ("block_size=2M",), ()], ids=str)
def test_raw_to_vhdx(disk: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    path = tmp_path / "new.vhdx"
    path.write_bytes(disk.read_bytes())
    cost = rewritten(path, "raw", "vhdx", *options)
    assert imgcore.compare(disk, path).identical
    assert imgcore.check(path).corruptions == 0
    block = cost.block_size or 0
    assert cost.bytes_moved == min(max(block, MIB), disk.stat().st_size)
    with path.open("rb") as file:
        front = file.read(MIB)
    assert front.startswith(b"vhdxfile")
    assert disk.read_bytes()[70_000:73_000] not in front


def test_the_old_image_is_kept_until_the_end(disk: Path) -> None:
    old = disk.read_bytes()
    with imgcore.open(disk, share=True) as image:
        director = director_for(image, "vhdx", "block_size=1M")
        with closing(open_target(disk)) as file:
            with closing(StagedFile(file, len(old), director.overwrites)) as staged:
                director.write(staged, Tally(image.virtual_size, None))
            assert disk.read_bytes()[: len(old)] == old


def test_blocks_that_turn_out_to_be_zeros_get_no_place(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB) + b"x" * MIB)
    with imgcore.open(path) as image:
        moved = director_for(image, "vhdx", "block_size=1M")
        assert moved.moved_nbytes == MIB
    cost = rewritten(path, "raw", "vhdx", "block_size=1M")
    assert cost.bytes_written < MIB + MIB // 2
    with imgcore.open(path, format="vhdx") as image:
        assert next(image.extents())["kind"][0] != Kind.DATA


def test_survey_joins_what_goes_on(tmp_path: Path) -> None:
    """Neighbouring clusters are one row, whatever batches they come in."""
    path, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    raw.write_bytes(random.Random(1).randbytes(3 * MIB))
    imgcore.convert(raw, path, options=["cluster_size=512"])
    with imgcore.open(path) as image:
        survey = survey_image(image)
        assert survey.file_nbytes == path.stat().st_size
        assert not survey.is_flat
        assert survey.rows["length"].sum() == 3 * MIB
        assert len(survey.rows) == 1


def test_a_survey_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
        for offset in range(0, 8 * MIB, MIB):
            file.seek(offset)
            file.write(b"x" * 4096)
    with imgcore.open(path) as image:
        assert len(survey_image(image).rows) > 4
        monkeypatch.setattr(limits, "MAX_SURVEY_ROWS", 4)
        with pytest.raises(LimitExceededError, match="more than 4 pieces"):
            survey_image(image)


def test_flat_images_are_recognised(disk: Path, tmp_path: Path) -> None:
    for name, options, is_flat in (
        ("a.vhd", ["subformat=fixed"], True),
        ("b.vhd", ["subformat=dynamic"], False),
        ("c.vmdk", ["subformat=monolithicFlat"], True),
        ("d.vmdk", [], False),
        ("e.vdi", ["subformat=fixed"], False),
    ):
        imgcore.convert(disk, tmp_path / name, options=options)
        with imgcore.open(tmp_path / name) as image:
            assert survey_image(image).is_flat is is_flat, name


def test_most_of_the_data_must_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(random.Random(1).randbytes(3 * MIB))
    imgcore.convert(raw, tmp_path / "disk.qcow2")
    with imgcore.open(tmp_path / "disk.qcow2") as image:
        director = director_for(image, "vhdx", "block_size=1M")
        assert (director.stayed_nbytes, director.moved_nbytes) == (0, 3 * MIB)
        director.refuse_large_move()
        monkeypatch.setattr("imgcore.rewriting.director._MAX_SMALL_MOVE_NBYTES", MIB)
        with pytest.raises(UnsupportedFeatureError, match=r"only 0 B of 3 MiB could stay"):
            director.refuse_large_move()


def test_compressed_blocks_are_refused_or_inflated(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    imgcore.convert(disk, path, compress=True)
    with imgcore.open(path) as image:
        with pytest.raises(UnsupportedFeatureError, match="--inflate"):
            director_for(image, "vhdx")
    rewritten(path, "qcow2", "vhdx", "block_size=1M", inflate=True)
    assert imgcore.compare(disk, path, format_b="vhdx").identical


def test_progress_never_decreases(disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.raw"
    path.write_bytes(disk.read_bytes())
    seen: list[Progress] = []
    with imgcore.open(path, share=True) as image:
        director = director_for(image, "vhdx", "block_size=1M")
        with closing(open_target(path)) as file:
            with closing(StagedFile(file, path.stat().st_size, director.overwrites)) as staged:
                director.write(staged, Tally(image.virtual_size, seen.append))
    assert seen
    for a, b in pairwise(seen):
        assert all(x <= y for x, y in zip(a, b, strict=True))
