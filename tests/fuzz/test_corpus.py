"""The inputs that fuzzing found are used in every run of the tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import seeds, structure
from tests.fuzz.exercise import Place
from tests.fuzz.pieces import FORMATS, Pieces
from tests.fuzz.updating import UpdatePlace

CORPUS = Path(__file__).parent / "corpus"
SEEDS = dict(seeds.seeds())
# A compressed raw disk is recognised by its name.
UNREADABLE = ("any-gzip", "any-zstd")


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    place = Place()
    yield place
    place.close()


@pytest.fixture(scope="module")
def update_place() -> Iterator[UpdatePlace]:
    place = UpdatePlace()
    yield place
    place.close()


def test_seeds_are_valid(place: Place) -> None:
    outcomes = {name: place.use(image.pack()) for name, image in SEEDS.items()}
    for name in UNREADABLE:
        assert outcomes.pop(name) == "UnsupportedFeatureError", name
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "ok"} == {}
    for name, image in SEEDS.items():
        assert Pieces.unpack(image.pack()).chunks == image.chunks, name


@pytest.mark.filterwarnings("ignore")
def test_corpus(place: Place) -> None:
    """Each input ends with success or an error of imgcore, in time."""
    outcomes: Counter[str] = Counter()
    for path in sorted(CORPUS.iterdir()):
        outcomes[place.use(path.read_bytes())] += 1
    assert outcomes["ok"] >= 10
    assert len(outcomes) >= 5, outcomes


@pytest.mark.parametrize("format", [name for name in FORMATS[2:] if name], ids=str)
def test_mutations_pass_checksums(format: str, place: Place) -> None:
    """Most mutations get past the checksums, to the changed fields."""
    outcomes: Counter[str] = Counter()
    images = [image.pack() for name, image in SEEDS.items() if name.startswith(f"{format}-")]
    for seed in range(60):
        data = structure.mutate(images[seed % len(images)], 1 << 20, seed)
        outcomes[place.use(data)] += 1
    assert len(outcomes) >= 3, outcomes
    assert outcomes["ok"] >= 5, outcomes


# Of sparse and flat images alone and of children; the others are only read.
WRITTEN = frozenset(
    {
        "any-qcow2",
        "qcow2-backed",
        "qcow2-plain",
        "raw",
        "vdi-child",
        "vdi-dynamic",
        "vdi-fixed",
        "vhd-child",
        "vhd-dynamic",
        "vhd-fixed",
        "vhdx-child",
        "vhdx-dynamic",
        "vhdx-log",
        "vmdk-hosted",
        "vmdk-zeroed",
    }
)


def test_seeds_are_written_to(update_place: UpdatePlace) -> None:
    """A child keeps its size."""
    outcomes = {name: update_place.use(SEEDS[name].pack()) for name in WRITTEN}
    assert {n: o for n, o in outcomes.items() if o not in ("ok", "OptionError")} == {}


@pytest.mark.filterwarnings("ignore")
def test_corpus_is_written_to(update_place: UpdatePlace) -> None:
    """Nothing but the image changes, and it stays sound if it was."""
    outcomes: Counter[str] = Counter()
    for path in sorted(CORPUS.iterdir()):
        outcomes[update_place.use(path.read_bytes())] += 1
    assert outcomes["ok"] >= 10
    assert len(outcomes) >= 5, outcomes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", [name for name in FORMATS[2:] if name], ids=str)
def test_mutations_are_written_to(format: str, update_place: UpdatePlace) -> None:
    outcomes: Counter[str] = Counter()
    images = [SEEDS[name].pack() for name in sorted(WRITTEN) if name.startswith(f"{format}-")]
    for seed in range(60):
        data = structure.mutate(images[seed % len(images)], 1 << 20, seed)
        outcomes[update_place.use(data)] += 1
    assert len(outcomes) >= 3, outcomes
    assert outcomes["ok"] >= 5, outcomes
