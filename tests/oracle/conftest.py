"""Fixtures of tests that need a file system of their own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.images import MIB
from tests.helpers.mounts import make_file_system, mounted


@pytest.fixture(scope="module", params=["xfs", "btrfs"])
def file_system(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Mount a file system with reflinks."""
    folder = tmp_path_factory.mktemp(request.param)
    image = make_file_system(request.param, folder / "image", 2048 * MIB)
    with mounted(image, folder / "mounted", "-o", "loop") as top:
        yield top


@pytest.fixture
def here(file_system: Path) -> Iterator[Path]:
    """Give an empty folder on a file system with reflinks."""
    folder = file_system / "test"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)
