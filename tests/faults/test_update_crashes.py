"""An image that is written in place is cut at any moment: it is sound, and goes on."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.harness import Agent, agent_in
from tests.faults.update_cuts import UpdateCuts, without_inner_syncs, without_last_syncs
from tests.helpers import images
from tests.helpers.update_variants import MIB, VARIANTS, UpdateVariant

DISK_NBYTES = 3 * MIB
N_FEW_CUTS = 50
N_CUTS = 100
N_SESSIONS = 10


@pytest.fixture
def agent(shim: Path) -> Iterator[Agent]:
    """Give an agent whose folder is in memory: syncs cost nothing there."""
    memory = Path("/dev/shm")
    with (
        tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        agent_in(shim, Path(folder) / "image") as agent,
    ):
        yield agent


def content_of(rng: random.Random) -> bytes:
    """Return a disk of data and zeros in pieces of odd lengths."""
    pieces = bytearray()
    while len(pieces) < DISK_NBYTES:
        length = rng.randint(1, 200_000)
        pieces += rng.randbytes(length) if rng.random() < 0.5 else bytes(length)
    return bytes(pieces[:DISK_NBYTES])


def cut_sessions(
    agent: Agent, variant: UpdateVariant, log: Path, seed: int, n_sessions: int, n_cuts: int
) -> None:
    rng = random.Random(f"{images.SEED} {seed}")
    cuts = UpdateCuts(agent, variant, content_of(rng), log)
    for _ in range(n_sessions):
        cuts.run(rng, n_cuts)
    assert cuts.n_cuts >= n_sessions * n_cuts


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_power_cuts(variant: UpdateVariant, agent: Agent, tmp_path: Path) -> None:
    cut_sessions(agent, variant, tmp_path / "log", 0, 2, N_FEW_CUTS // 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, N_SESSIONS + 1))
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_many_power_cuts(variant: UpdateVariant, seed: int, agent: Agent, tmp_path: Path) -> None:
    cut_sessions(agent, variant, tmp_path / "log", seed, 2, N_CUTS // 2)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_flush_that_syncs_too_early_is_noticed(
    variant: UpdateVariant, agent: Agent, tmp_path: Path
) -> None:
    """Tests the suite: the last sync of each flush is missing."""
    cuts = UpdateCuts(
        agent, variant, content_of(random.Random(1)), tmp_path / "log", without_last_syncs
    )
    with pytest.raises(AssertionError, match="^cut after"):
        for _ in range(5):
            cuts.run(random.Random(1), N_CUTS)


# Whose tables take more than one step to change.
IN_STEPS = [variant for variant in VARIANTS if variant.name.startswith(("qcow2", "vhd", "vmdk-8k"))]


@pytest.mark.skipif(not IN_STEPS, reason="no format has steps")
@pytest.mark.parametrize("variant", IN_STEPS[:4], ids=lambda variant: variant.name)
def test_an_order_that_is_not_kept_is_noticed(
    variant: UpdateVariant, agent: Agent, tmp_path: Path
) -> None:
    """Tests the suite: an updater that does not sync between its steps fails."""
    cuts = UpdateCuts(
        agent, variant, content_of(random.Random(1)), tmp_path / "log", without_inner_syncs
    )
    with pytest.raises(AssertionError, match="^cut after"):
        for _ in range(10):
            cuts.run(random.Random(1), N_CUTS)
