"""Conversions that go on after a break, until they are done.

The target then has the bytes of a conversion without a break, whatever has ended the
others: SIGKILL at random moments, power cuts, calls that fail.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.crash import Disk, Event, Row, random_crash, read_log
from tests.faults.harness import Agent, Calls, Mode
from tests.faults.resumed import DISK, KINDS, Kind, parent_of
from tests.helpers import images, qemu

KIB, MIB = images.KIB, images.MIB


class Job:
    """A conversion in the agent's folder, and its target without a break."""

    def __init__(self, agent: Agent, kind: Kind, source: Path, **more: Any) -> None:
        self.agent, self._source = agent, source
        self.folder, self.target = agent.folder, agent.folder / kind.target
        self.journal = agent.folder / f"{kind.target}.imgcore-resume"
        self.partial = agent.folder / f".{kind.target}.imgcore-partial"
        more = {"batch_nbytes": 512 * KIB, **kind.arguments, **more}
        if "backing" in more:
            more["backing"] = parent_of(source, more["backing_format"])
        self._more = more
        started = time.monotonic()
        answer = self.run()
        self.seconds = time.monotonic() - started
        assert answer["outcome"] == "ok", answer
        self.result = answer["result"]
        self.new = self.files()
        self.clear()

    def run(self, *, more: Any = None, **job: Any) -> dict[str, Any]:
        # A journal that goes on keeps the seed that it was begun with.
        goes_on = self.journal.exists() and self.partial.exists()
        arguments = {
            "source": self._source,
            "target": self.target,
            "format": "raw",
            "threads": 2,
            "force": True,
            "seed": "other" if goes_on else "first",
            **self._more,
            **(more or {}),
        }
        return self.agent.do("resume", arguments, **job)

    def files(self) -> dict[str, bytes]:
        return {entry.name: entry.read_bytes() for entry in self.folder.iterdir()}

    def clear(self) -> None:
        for entry in self.folder.iterdir():
            entry.unlink()

    def finish(self) -> None:
        """Run it to its end, and compare what it has written."""
        answer = self.run()
        assert answer["outcome"] == "ok", answer
        self.assert_done(answer["result"])

    def assert_done(self, result: dict[str, Any] | None = None) -> None:
        files = self.files()
        sizes = {name: len(content) for name, content in files.items()}
        assert files.keys() == self.new.keys(), sizes
        assert files == self.new, sizes
        if result is not None:
            for key in ("bytes_data", "bytes_zero", "file_size", "checksum"):
                assert result[key] == self.result[key], key


ORDINARY = (
    "raw",
    "qcow2-zlib",
    "vmdk-streamOptimized",
    "vmdk-monolithicFlat",
    "raw-zst",
    "gce",
    "qcow2-front-zlib",
    "vhd-child",
)
ALL = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def _params() -> list[Any]:
    return [
        pytest.param(kind, id=kind.name, marks=() if kind.name in ORDINARY else pytest.mark.slow)
        for kind in KINDS
    ]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.raw"
    DISK.write(path)
    return path


@pytest.fixture
def job(agent: Agent, source: Path) -> Callable[..., Job]:
    return lambda kind, **more: Job(agent, kind, source, **more)


def kill_at_random_moments(job: Job, n_kills: int, rng: random.Random) -> int:
    """Return how many targets were completed meanwhile."""
    n_done = 0
    for _ in range(n_kills):
        job.run(fork=True, kill_after=rng.uniform(0, 1.1 * job.seconds))
        files = job.files()
        if job.target.name in files and job.journal.name not in files:
            job.assert_done()
            job.clear()
            n_done += 1
    job.finish()
    return n_done + 1


@pytest.mark.parametrize("kind", _params())
def test_killed_at_random_moments(kind: Kind, job: Callable[..., Job]) -> None:
    kill_at_random_moments(job(kind), 10, random.Random(images.SEED))


@pytest.mark.slow
@ALL
def test_killed_at_many_moments(kind: Kind, job: Callable[..., Job]) -> None:
    assert kill_at_random_moments(job(kind), 200, random.Random(7)) > 5


# -- power cuts ------------------------------------------------------------------------


def lay_out(folder: Path, disk: Disk) -> Disk:
    """Make a folder hold a state; files that are there keep their inodes."""
    present = {entry.stat().st_ino: entry for entry in folder.iterdir()}
    wanted = {inode: f"kept-{inode}" for inode in disk.names.values() if inode in present}
    for inode, entry in present.items():
        if inode in wanted:
            entry.rename(folder / wanted[inode])
        else:
            entry.unlink()
    for name, inode in disk.names.items():
        if inode in wanted:
            (folder / wanted[inode]).rename(folder / name)
        (folder / name).write_bytes(disk.contents[inode])
    inodes = {name: (folder / name).stat().st_ino for name in disk.names}
    return Disk(inodes, {inodes[name]: disk.contents[disk.names[name]] for name in disk.names})


def cut_and_finish(
    job: Job, log: Path, rng: random.Random, keep: Callable[[Row, set[int]], bool]
) -> dict[str, Any]:
    """Cut the power up to three times, and let the last run end; return its answer."""
    job.clear()
    disk = Disk({}, {})
    for _ in range(rng.randint(1, 3)):
        answer = job.run(log=str(log))
        if answer["outcome"] != "ok":
            return answer
        rows = read_log(log)
        journals = {row.inode for row in rows if "imgcore-resume" in row.name}
        journals |= {inode for name, inode in disk.names.items() if "imgcore-resume" in name}
        rows = [row for row in rows if keep(row, journals)]
        disk = lay_out(job.folder, random_crash(disk, rows[: rng.randint(0, len(rows))], rng))
    return job.run()


def power_cuts(job: Job, log: Path, n_trials: int) -> None:
    rng = random.Random(images.SEED)
    for _ in range(n_trials):
        answer = cut_and_finish(job, log, rng, lambda _row, _journals: True)
        assert answer["outcome"] == "ok", answer
        job.assert_done(answer["result"])


@pytest.mark.parametrize("kind", _params())
def test_power_cuts(kind: Kind, job: Callable[..., Job], tmp_path: Path) -> None:
    power_cuts(job(kind), tmp_path / "log", 10)


@pytest.mark.slow
@ALL
def test_many_power_cuts(kind: Kind, job: Callable[..., Job], tmp_path: Path) -> None:
    power_cuts(job(kind), tmp_path / "log", 200)


def test_a_missing_sync_is_noticed(job: Callable[..., Job], tmp_path: Path) -> None:
    """Tests the tests: without the syncs of the target, some runs cannot go on."""
    here, rng, outcomes = job(Kind.of(qemu.RAW)), random.Random(1), set()

    def keep(row: Row, journals: set[int]) -> bool:
        return row.event is not Event.SYNC or row.is_folder or row.inode in journals

    for _ in range(40):
        answer = cut_and_finish(here, tmp_path / "log", rng, keep)
        is_whole = answer["outcome"] == "ok" and here.files() == here.new
        outcomes.add("whole" if is_whole else answer["outcome"])
    assert "error" in outcomes


# -- calls that fail -------------------------------------------------------------------

FAULTS = [
    (Calls.WRITE, errno.ENOSPC, Mode.FAIL_ON),
    (Calls.WRITE, errno.EIO, Mode.FAIL_ONCE),
    (Calls.SYNC, errno.EIO, Mode.FAIL_ONCE),
    (Calls.RENAME, errno.EIO, Mode.FAIL_ONCE),
    (Calls.TRUNCATE, errno.EIO, Mode.FAIL_ONCE),
    (Calls.CREATE, errno.ENOSPC, Mode.FAIL_ONCE),
    (Calls.READ, errno.EIO, Mode.FAIL_ONCE),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f"{f[0].name}-{errno.errorcode[f[1]]}")
@pytest.mark.parametrize("kind", _params())
def test_calls_that_fail(
    kind: Kind, fault: tuple[Calls, int, Mode], job: Callable[..., Job]
) -> None:
    """A run in which the n-th call fails, and the next one, which ends."""
    here, nth, n_errors = job(kind), 1, 0
    while True:
        answer = here.run(arm=(fault[0], nth, *fault[1:]))
        if not answer["hits"]:
            break
        if answer["outcome"] == "error":
            n_errors += 1
            assert answer["errno"] == fault[1], answer
            assert "\n" not in answer["text"]
            here.finish()
        else:
            here.assert_done()
        here.clear()
        nth += 1 + nth // 4
    assert n_errors or fault[0] in (Calls.READ, Calls.TRUNCATE)
