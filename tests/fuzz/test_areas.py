"""Lists of changed areas that fuzzing found are used in every run of the tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.area_files import Folder, seeds

CORPUS = Path(__file__).parent / "corpus_areas"


@pytest.fixture(scope="module")
def folder() -> Iterator[Folder]:
    folder = Folder()
    yield folder
    folder.close()


def test_seeds_are_valid(folder: Folder) -> None:
    outcomes = {name: folder.use(data) for name, data in seeds()}
    assert outcomes.pop("ctk") == "UnsupportedFeatureError"
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "ok"} == {}


def test_corpus(folder: Folder) -> None:
    """Each file ends with success or an error of imgcore, in time."""
    outcomes: Counter[str] = Counter()
    for path in sorted(CORPUS.iterdir()):
        outcomes[folder.use(path.read_bytes())] += 1
    assert outcomes["ok"] >= 5
    assert len(outcomes) >= 4, outcomes
