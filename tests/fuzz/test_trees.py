"""Checksum trees that fuzzing found are used in every run of the tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.tree_files import TreeFolder, seeds, with_digests

CORPUS = Path(__file__).parent / "corpus_trees"


@pytest.fixture
def folder() -> Iterator[TreeFolder]:
    folder = TreeFolder()
    yield folder
    folder.close()


def test_seeds_are_valid(folder: TreeFolder) -> None:
    outcomes = {name: folder.use(data) for name, data in seeds()}
    assert outcomes.pop("magic") == "CorruptImageError"
    del outcomes["blake3"]  # its digest is not corrected
    assert set(outcomes.values()) == {"ok"}


def test_digests_are_corrected() -> None:
    for name, data in seeds():
        if name not in ("blake3", "magic"):
            assert with_digests(data[:-64] + bytes(64)) == data


def test_corpus(folder: TreeFolder) -> None:
    """Each file ends with success or an error of imgcore, in time."""
    outcomes: Counter[str] = Counter()
    for path in sorted(CORPUS.iterdir()):
        outcomes[folder.use(path.read_bytes())] += 1
    assert outcomes["ok"] >= 3
    assert len(outcomes) >= 4, outcomes
