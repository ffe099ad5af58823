"""A conversion in place is cut at any moment: the image is the old or the new one.

The power fails at random points, also during the recovery; what was not synced is lost,
torn, or written in another order.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Agent, agent_in
from tests.faults.power_cuts import PowerCuts, without_syncs
from tests.helpers import images
from tests.helpers.tiny import OLD

N_CUTS = 400
N_FEW_CUTS = 60


@pytest.fixture
def agent(shim: Path) -> Iterator[Agent]:
    """Give an agent whose folder is in memory: syncs cost nothing there."""
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        agent_in(shim, Path(folder) / "image") as agent,
    ):
        yield agent


def tiny(agent: Agent, **more: Any) -> tuple[str, Callable[..., Mapping[str, Any]]]:
    """Write the tiny format's old image, and return its name and the conversion."""
    path = agent.folder / "disk.old"
    path.write_bytes(OLD)
    for name in more.get("removed", ()):
        (agent.folder / name).write_bytes(f"old {name}".encode())
    return path.name, lambda **job: agent.do("tiny", {"path": path, **more}, **job)


# New names, side files, and a side file that takes the place of another.
NAMES: dict[str, dict[str, Any]] = {
    "renamed": {},
    "same-name": {"name": None},
    "side-files": {"created": {"a.txt": "new a", "c.txt": "new c"}, "removed": ["a.txt", "b.txt"]},
    "in-place-of-side-file": {"name": "a.txt", "removed": ["a.txt"]},
}


@pytest.mark.parametrize("n_cuts", [N_FEW_CUTS, pytest.param(N_CUTS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("names", NAMES)
def test_power_cuts(names: str, n_cuts: int, agent: Agent, tmp_path: Path) -> None:
    cuts = PowerCuts(agent, *tiny(agent, **NAMES[names]), tmp_path / "log")
    rng = random.Random(images.SEED)
    for _ in range(n_cuts):
        cuts.run(rng)
    assert {*cuts.seen} == {"recover: old", "recover: new", "undo: old"}


@pytest.mark.parametrize("what", ["journal", "folder", "image"])
def test_every_barrier_is_needed(what: str, agent: Agent, tmp_path: Path) -> None:
    """If the disk forgets one kind of sync, the test above must find broken images."""
    cuts = PowerCuts(agent, *tiny(agent), tmp_path / "log", without_syncs(what))
    rng = random.Random(images.SEED)
    with pytest.raises(AssertionError, match="broken"):
        for _ in range(N_CUTS):
            cuts.run(rng)
