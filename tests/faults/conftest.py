"""Fixtures: the shim, compiled once; an agent and a place for each test."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.harness import Agent, Place, Source, agent_in, shim_path
from tests.helpers.qemu import Variant


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shim_path(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def agent(shim: Path) -> Iterator[Agent]:
    """Give an agent whose folder is in memory: syncs cost nothing there."""
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        agent_in(shim, Path(folder) / "image") as agent,
    ):
        yield agent


@pytest.fixture
def place(shim: Path, tmp_path: Path) -> Iterator[Callable[..., Place]]:
    """Return a function that creates the place for a format."""
    with ExitStack() as stack:

        def make(variant: Variant, **more: str) -> Place:
            agent = stack.enter_context(agent_in(shim, tmp_path / "target", **more))
            return Place(agent, variant, tmp_path)

        yield make


@pytest.fixture
def source(place: Callable[[Variant], Place]) -> Callable[[Variant], Source]:
    """Return a function that creates a source of a format, for reads with faults."""
    return lambda variant: Source(place(variant))
