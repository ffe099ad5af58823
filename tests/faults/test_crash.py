"""A power cut at any moment: writes that were not synced are lost, or partly there.

The log of a real conversion is replayed up to every point.  The target is the old image
or the complete new one; after success it always is the new one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.crash import Event, Row, after_crashes, read_log
from tests.faults.harness import VARIANTS, Agent, Place, agent_in, params, state_of
from tests.helpers import images
from tests.helpers.qcow2 import create, qemu_io
from tests.helpers.qemu import Variant
from tests.helpers.reading import poke


def recorded(place: Place, log: Path) -> list[Row]:
    """Return the log of a conversion over the old image."""
    place.reset()
    assert place.convert(log=str(log))["outcome"] == "ok"
    return read_log(log)


@pytest.mark.parametrize("variant", params())
def test_power_cut(variant: Variant, place: Callable[[Variant], Place], tmp_path: Path) -> None:
    here = place(variant)
    rows = recorded(here, tmp_path / "log")
    rng = random.Random(images.SEED)
    states: dict[str, int] = {}
    for where, files in after_crashes(here.old, rows, rng):
        try:
            state = here.state(files)
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from None
        states[state] = states.get(state, 0) + 1
        # After the command has ended, nothing may be lost.
        if where.startswith(f"cut after {len(rows)} of"):
            assert state == "new", where
    assert states["old"] > 0
    assert states["new"] > 0


def test_the_replay_sees_what_is_not_synced(
    place: Callable[[Variant], Place], tmp_path: Path
) -> None:
    """Tests the replay: without the syncs, the same log leaves broken images."""
    here = place(VARIANTS[1])
    rows = [row for row in recorded(here, tmp_path / "log") if row.event is not Event.SYNC]
    with pytest.raises(AssertionError, match="neither the old nor the new"):
        for _, files in after_crashes(here.old, rows, random.Random(1)):
            here.state(files)


def test_the_log_is_complete(place: Callable[[Variant], Place], tmp_path: Path) -> None:
    """Replayed to its end without losses, the log gives the same files."""
    for variant in VARIANTS:
        here = place(variant)
        rows = recorded(here, tmp_path / "log")
        *_, (_, files) = after_crashes(here.old, rows, random.Random(1))
        assert files == here.new, variant.name
        break


@pytest.fixture
def leaky(tmp_path: Path, shim: Path) -> Iterator[tuple[Agent, Path]]:
    """An image with a leaked cluster, in the agent's folder."""
    folder = tmp_path / "target"
    folder.mkdir()
    path = create(folder / "a.qcow2", images.MIB)
    qemu_io(path, "write -P 7 0 192k")
    poke(path, (0x40008, bytes(8)))
    with agent_in(shim, folder) as agent:
        yield agent, path


def test_repair_is_whole_at_every_point(leaky: tuple[Agent, Path], tmp_path: Path) -> None:
    """The image is damaged as before or repaired: a repair works in a copy."""
    agent, path = leaky
    old = {path.name: path.read_bytes()}
    answer = agent.do("repair", {"path": path}, log=str(tmp_path / "log"))
    assert answer["outcome"] == "ok", answer
    new = {path.name: path.read_bytes()}
    assert old != new
    rows = read_log(tmp_path / "log")
    seen = set()
    for _, files in after_crashes(old, rows, random.Random(images.SEED)):
        seen.add(state_of(files, old, new, path.name))
    assert seen == {"old", "new"}
