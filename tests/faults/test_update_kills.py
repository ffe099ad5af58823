"""A process that writes an image in place is killed: what it acknowledged is there.

It tells this process over a pipe what it begins and what has ended.  So a flush counts
as acknowledged only if its end had been told when the process died.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import imgcore
from tests.faults.acknowledging import changes_of
from tests.faults.update_cuts import FORMATS, UpdatedImage, content_of
from tests.faults.update_history import Change, History
from tests.helpers import images
from tests.helpers.update_variants import MIB, VARIANTS, UpdateVariant

ROOT = Path(__file__).parent.parent.parent
DISK_NBYTES = 3 * MIB
N_CHANGES = 150
# 54 kills in the six formats.
N_FEW_KILLS = 9
N_KILLS = 30
# A process is killed so long after a note, at most.
MAX_DELAY_S = 0.004


@pytest.fixture
def folder() -> Iterator[Path]:
    """Give a folder in memory: most of the time goes into the changes there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name) / "image"


class Kills:
    """An image that one process after the other writes to until it is killed.

    Attributes
    ----------
    n_flushes : int
        Flushes that were acknowledged.
    n_killed : int
        Processes that had not ended.
    """

    def __init__(self, folder: Path, variant: UpdateVariant, rng: random.Random) -> None:
        folder.mkdir()
        self._rng, self._sizes = rng, variant.sizes
        self._content = content_of(rng, DISK_NBYTES)
        self._image = UpdatedImage(folder, variant, self._content)
        self.n_flushes = self.n_killed = 0

    def run(self, program: str = "tests.faults.acknowledging") -> None:
        """Start a process, kill it, and verify the image."""
        seed, n_notes = self._rng.getrandbits(30), self._rng.randrange(2 * N_CHANGES)
        delay = self._rng.uniform(0, MAX_DELAY_S)
        notes = self._notes(program, seed, n_notes, delay)
        changes = changes_of(seed, N_CHANGES, len(self._content), self._sizes)
        last = f"{len(notes)} notes, {changes[int(notes[-1].split()[1])] if notes else ''}"
        try:
            self._content = self._image.examined(self._history(changes, notes))
            self._image.examine_by_qemu(self._content)
        except (AssertionError, imgcore.ImgcoreError, OSError) as error:
            raise AssertionError(f"killed after {last}: {error}") from error

    def _notes(self, program: str, seed: int, n_notes: int, delay: float) -> list[str]:
        """Kill a process soon after so many notes; return all that it has told."""
        words = [self._image.path, seed, N_CHANGES, *self._sizes]
        with subprocess.Popen(
            [sys.executable, "-m", program, *map(str, words)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            notes = [process.stdout.readline() for _ in range(n_notes)]
            time.sleep(delay)
            process.kill()
            # What is still in the pipe was told before the process died.
            notes += process.stdout.readlines()
        self.n_killed += process.returncode == -signal.SIGKILL
        return notes

    def _history(self, changes: list[Change], notes: list[str]) -> History:
        """Return what the disk may have after these notes."""
        history = History(self._content)
        for word, number in (line.split() for line in notes):
            change = changes[int(number)]
            if word == "begin":
                history.begin(change)
            else:
                history.end(change)
                self.n_flushes += change.is_flush
        return history


def kill_often(folder: Path, variant: UpdateVariant, n_kills: int) -> None:
    kills = Kills(folder, variant, random.Random(f"{images.SEED} {variant.name}"))
    for _ in range(n_kills):
        kills.run()
    assert kills.n_killed
    assert kills.n_flushes > n_kills


@pytest.mark.parametrize("variant", FORMATS, ids=lambda variant: variant.name)
def test_acknowledged_flushes_survive(variant: UpdateVariant, folder: Path) -> None:
    kill_often(folder, variant, N_FEW_KILLS)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_acknowledged_flushes_survive_many_kills(variant: UpdateVariant, folder: Path) -> None:
    kill_often(folder, variant, N_KILLS)


# Whose blocks are small, so that changes soon need a table.
WITH_TABLES = [v for v in FORMATS if v.name in ("qcow2", "vmdk-sparse")]


@pytest.mark.parametrize("variant", WITH_TABLES, ids=lambda variant: variant.name)
def test_a_flush_that_does_nothing_is_noticed(variant: UpdateVariant, folder: Path) -> None:
    """Tests the suite: the process acknowledges flushes that it has not made."""
    kills = Kills(folder, variant, random.Random(1))
    with pytest.raises(AssertionError, match="^killed after"):
        for _ in range(20):
            kills.run("tests.faults.boasting")
