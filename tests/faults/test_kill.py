"""A process that is killed leaves the old image, the new one, or no file as the target.

It is killed before and during every change that it makes to its folder, and at twenty
random moments.  The next run succeeds in spite of the files left.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from tests.faults.harness import CHANGES, Mode, Place, params
from tests.helpers import images, qemu
from tests.helpers.qemu import Variant

N_MOMENTS = 20


def assert_next_run_is_whole(place: Place) -> None:
    """Convert once more over the files that a killed process left."""
    answer = place.convert()
    assert answer["outcome"] == "ok", answer
    assert place.files() == place.new


def kill_at_every_change(place: Place, mode: Mode) -> dict[str, int]:
    """Return how often each state was found."""
    states: dict[str, int] = {}
    for nth in range(1, 2000):
        place.reset()
        answer = place.convert(arm=(CHANGES, nth, 0, mode), fork=True)
        files = place.files()
        state = place.state(files)
        if answer["outcome"] == "ok":
            assert state == "new"
            assert sum(states.values()) > 3
            return states
        assert answer["outcome"] == "killed", answer
        states[state] = states.get(state, 0) + 1
        assert_next_run_is_whole(place)
    raise AssertionError("no end of the changes")


@pytest.mark.parametrize("mode", [Mode.KILL_BEFORE, Mode.KILL_HALFWAY], ids=["before", "halfway"])
@pytest.mark.parametrize("variant", params())
def test_at_every_change(variant: Variant, mode: Mode, place: Callable[[Variant], Place]) -> None:
    states = kill_at_every_change(place(variant), mode)
    assert states["old"] > 0
    if len(place_files(variant)) == 1:
        assert "absent" not in states


def place_files(variant: Variant) -> tuple[str, ...]:
    """Return the suffixes of the files that a target of the format has."""
    flat = "subformat=monolithicFlat" in variant.options or "subformat=vmfs" in variant.options
    return ("", "-flat") if flat else ("",)


@pytest.mark.parametrize("variant", params())
def test_at_random_moments(variant: Variant, place: Callable[[Variant], Place]) -> None:
    here = place(variant)
    rng = random.Random(images.SEED)
    started = time.monotonic()
    here.convert(fork=True)
    seconds = time.monotonic() - started
    for _ in range(N_MOMENTS):
        here.reset()
        here.convert(fork=True, kill_after=rng.uniform(0, 1.2 * seconds))
        here.state(here.files())
    assert_next_run_is_whole(here)
    qemu.assert_same(here.source, here.target, source_format="raw", target_format=variant.format)


@pytest.mark.parametrize("variant", [qemu.VMDK_FLAT], ids=lambda v: v.name)
def test_an_interrupted_pair_is_put_back(
    variant: Variant, place: Callable[[Variant], Place]
) -> None:
    """Killed between the renames of two files: the next run restores the old pair."""
    here = place(variant)
    found = 0
    for nth in range(1, 2000):
        here.reset()
        if here.convert(arm=(CHANGES, nth, 0, Mode.KILL_BEFORE), fork=True)["outcome"] == "ok":
            break
        if here.state(here.files()) != "absent":
            continue
        found += 1
        # This run fails before it replaces anything.
        answer = here.convert(more={"source": here.source.with_name("missing.raw")})
        assert answer["outcome"] == "error"
        answer = here.convert(more={"options": ["subformat=monolithicFlat", "cid=0"]})
        assert answer["outcome"] in ("ok", "error")
        if answer["outcome"] == "error":
            assert here.state(here.files()) == "old"
    assert found >= 2
