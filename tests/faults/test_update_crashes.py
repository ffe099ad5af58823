"""An image that is written in place is cut at any moment: it is sound, and goes on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.crash import Row
from tests.faults.harness import Agent
from tests.faults.update_cuts import (
    FORMATS,
    UpdateCuts,
    content_of,
    of_format,
    without_inner_syncs,
    without_last_syncs,
)
from tests.helpers import images
from tests.helpers.update_variants import MIB, VARIANTS, UpdateVariant

DISK_NBYTES = 3 * MIB

# Cuts of all variants of a format together, or of one if that is more.
N_FEW_CUTS, N_FEW_CUTS_OF_ONE = 50, 15
N_CUTS, N_CUTS_OF_ONE = 1000, 300
N_CUTS_A_TEST = 100


# The seeds of each variant: one for 100 cuts.
SEEDED = [
    pytest.param(variant, seed, id=f"{variant.name}-{seed}")
    for variant in VARIANTS
    for seed in range(max(N_CUTS // len(of_format(variant)), N_CUTS_OF_ONE) // N_CUTS_A_TEST)
]


def cut_sessions(agent: Agent, variant: UpdateVariant, log: Path, seed: int, n_cuts: int) -> None:
    """Record two sessions of an image, and cut each."""
    rng = random.Random(f"{images.SEED} {seed}")
    cuts = UpdateCuts(agent, variant, content_of(rng, DISK_NBYTES), log)
    for _ in range(2):
        cuts.run(rng, n_cuts // 2)
    assert cuts.n_cuts >= n_cuts - 1


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_power_cuts(variant: UpdateVariant, agent: Agent, tmp_path: Path) -> None:
    n_cuts = max(N_FEW_CUTS // len(of_format(variant)), N_FEW_CUTS_OF_ONE)
    cut_sessions(agent, variant, tmp_path / "log", -1, n_cuts)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "seed"), SEEDED)
def test_many_power_cuts(variant: UpdateVariant, seed: int, agent: Agent, tmp_path: Path) -> None:
    cut_sessions(agent, variant, tmp_path / "log", seed, N_CUTS_A_TEST)


def expect_a_failure(
    agent: Agent, variant: UpdateVariant, log: Path, keep: Callable[[list[Row]], list[Row]]
) -> None:
    """Cut sessions whose log lacks syncs until the image is not as it must be."""
    rng = random.Random(1)
    cuts = UpdateCuts(agent, variant, content_of(rng, DISK_NBYTES), log, keep)
    with pytest.raises(AssertionError, match="^cut after"):
        for _ in range(20):
            cuts.run(rng, N_CUTS_A_TEST)


@pytest.mark.parametrize("variant", FORMATS, ids=lambda variant: variant.name)
def test_a_flush_that_syncs_too_early_is_noticed(
    variant: UpdateVariant, agent: Agent, tmp_path: Path
) -> None:
    """Tests the suite: the last sync of each flush is missing."""
    expect_a_failure(agent, variant, tmp_path / "log", without_last_syncs)


# Whose tables depend on each other, so that few cuts are enough.
IN_STEPS = [variant for variant in VARIANTS if variant.name in ("qcow2", "vdi-dynamic")]


@pytest.mark.parametrize("variant", IN_STEPS, ids=lambda variant: variant.name)
def test_an_order_that_is_not_kept_is_noticed(
    variant: UpdateVariant, agent: Agent, tmp_path: Path
) -> None:
    """Tests the suite: the updater does not sync between the steps of a flush."""
    expect_a_failure(agent, variant, tmp_path / "log", without_inner_syncs)
