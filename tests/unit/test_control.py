"""Jobs that are steered from other threads."""

from __future__ import annotations

import inspect
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.helpers.images import MIB, noise, text

import imgcore
from imgcore.engine.control import Run
from imgcore.engine.progress import Progress

SECONDS = 30.0


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until something is so; fail after a minute."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.002)


class Job:
    """A verb on another thread."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._work = work
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error

    def end(self) -> Any:
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        return self.result


# -- every verb ------------------------------------------------------------------------


class Case(NamedTuple):
    """A verb that reads or writes 8 MiB; ``run`` gets the folder and a control."""

    run: Callable[[Path, imgcore.Control], Any]
    # A file that it makes.
    target: str | None = None


def areas(folder: Path, control: imgcore.Control) -> list[imgcore.Area]:
    return list(imgcore.changes(folder / "a.raw", since=folder / "b.raw", control=control))


def sync(folder: Path, control: imgcore.Control, **how: Any) -> imgcore.SyncResult:
    return imgcore.sync(folder / "a.raw", folder / "b.raw", control=control, **how)


def change(folder: Path, control: imgcore.Control) -> imgcore.ApplyResult:
    data = noise(512)  # several batches
    return imgcore.apply(
        folder / "b.raw", ((at, data) for at in range(0, 8 * MIB, len(data))), control=control
    )


def convert(target: str, **how: Any) -> Case:
    return Case(
        lambda folder, control: imgcore.convert(
            folder / "a.raw", folder / target, control=control, threads=2, **how
        ),
        target,
    )


VERBS: dict[str, Case] = {
    "convert": convert("new.qcow2"),
    "convert one thread": Case(
        lambda folder, control: imgcore.convert(
            folder / "a.raw", folder / "new.vhdx", control=control, threads=1
        ),
        "new.vhdx",
    ),
    "convert compressed": convert("new.vmdk", compress=True),
    "convert raw": convert("new.raw"),
    "convert zstd": convert("new.raw.zst"),
    "convert gzip": convert("new.raw.gz"),
    "convert gce": convert("new.tar.gz", profile="gce"),
    "convert verified": convert("new.vdi", verify=True),
    "convert with a parent": Case(
        lambda folder, control: imgcore.convert(
            folder / "a.raw",
            folder / "new.vhd",
            backing=folder / "base.vhd",
            backing_format="vhd",
            control=control,
        ),
        "new.vhd",
    ),
    "compare": Case(
        lambda folder, control: imgcore.compare(
            folder / "a.raw", folder / "a.qcow2", control=control
        )
    ),
    "compare_trees": Case(
        lambda folder, control: list(
            imgcore.compare_trees(folder / "b.tree", folder / "a.raw", control=control)
        )
    ),
    "checksum": Case(lambda folder, control: imgcore.checksum(folder / "a.raw", control=control)),
    "checksum tree": Case(
        lambda folder, control: imgcore.checksum(
            folder / "a.raw", tree=folder / "new.tree", control=control
        ),
        "new.tree",
    ),
    "changes": Case(areas),
    "changes since a tree": Case(
        lambda folder, control: list(
            imgcore.changes(folder / "a.raw", tree=folder / "b.tree", control=control)
        )
    ),
    "rewrite": Case(
        lambda folder, control: imgcore.rewrite(
            folder / "packed.qcow2", "vdi", inflate=True, control=control
        ),
        "packed.vdi",
    ),
    "sync": Case(sync),
    "sync by a tree": Case(
        lambda folder, control: sync(folder, control, tree=folder / "b.tree"), "b.tree"
    ),
    "apply": Case(change),
    "commit": Case(lambda folder, control: imgcore.commit(folder / "child.qcow2", control=control)),
    "rebase": Case(
        lambda folder, control: imgcore.rebase(
            folder / "child.qcow2",
            backing=folder / "a.raw",
            backing_format="raw",
            control=control,
        )
    ),
    "flatten": Case(
        lambda folder, control: imgcore.flatten(folder / "child.qcow2", control=control)
    ),
    "check": Case(lambda folder, control: imgcore.check(folder / "a.qcow2", control=control)),
    "check a streamOptimized VMDK": Case(
        lambda folder, control: imgcore.check(folder / "packed.vmdk", control=control)
    ),
    "check and repair": Case(
        lambda folder, control: imgcore.check(folder / "leak.vdi", repair=True, control=control)
    ),
    "measure": Case(
        lambda folder, control: imgcore.measure(
            folder / "a.qcow2", target_format="vhdx", control=control
        )
    ),
    "measure_reflink": Case(
        lambda folder, control: imgcore.measure_reflink(
            folder / "a.qcow2", target_format="vhdx", control=control
        )
    ),
    "measure_rewrite": Case(
        lambda folder, control: imgcore.measure_rewrite(folder / "a.qcow2", "vhdx", control=control)
    ),
    "verify": Case(lambda folder, control: imgcore.verify(folder / "a.receipt", control=control)),
    "verify an archive": Case(
        lambda folder, control: imgcore.verify(folder / "gce.receipt", control=control)
    ),
}

IN_PLACE = ("sync", "apply", "commit", "rebase", "flatten")

# Functions that take no control, and why.
NOT_STEERED = {
    **dict.fromkeys(("info", "jobs", "lint", "snapshots"), "reads headers"),
    **dict.fromkeys(("map", "open"), "reads as far as the caller asks"),
    **dict.fromkeys(("create", "resize"), "changes tables at once or not at all"),
    **dict.fromkeys(
        ("create_snapshot", "apply_snapshot", "delete_snapshot"),
        "changes tables at once or not at all",
    ),
    **dict.fromkeys(("finish_rewrite", "undo_rewrite"), "ends what a crash has interrupted"),
    "set_thread_budget": "does nothing else",
}


def test_every_long_verb_is_steered() -> None:
    functions = {
        name: inspect.signature(function)
        for name in imgcore.__all__
        if inspect.isfunction(function := getattr(imgcore, name))
    }
    assert functions.keys() > NOT_STEERED.keys()
    steered = {name for name, signature in functions.items() if "control" in signature.parameters}
    assert steered == functions.keys() - NOT_STEERED.keys()
    assert steered == {name.split()[0] for name in VERBS}
    assert all("progress" in functions[name].parameters for name in steered)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two disks, which differ everywhere."""
    folder = tmp_path_factory.mktemp("control")
    (folder / "a.raw").write_bytes(noise(8 * MIB))
    (folder / "b.raw").write_bytes(noise(8 * MIB, seed=2))
    (folder / "half.raw").write_bytes(noise(4 * MIB) + noise(8 * MIB, seed=2)[4 * MIB :])
    imgcore.convert(folder / "a.raw", folder / "a.qcow2")
    (folder / "text.raw").write_bytes(text(8 * MIB))
    imgcore.convert(folder / "text.raw", folder / "packed.qcow2", compress=True)
    imgcore.convert(folder / "text.raw", folder / "packed.vmdk", compress=True)
    imgcore.convert(folder / "b.raw", folder / "leak.vdi")
    with (folder / "leak.vdi").open("ab") as leak:
        leak.write(noise(2 * MIB))
    imgcore.convert(folder / "a.raw", folder / "seen.qcow2", receipt=folder / "a.receipt")
    imgcore.convert(
        folder / "a.raw", folder / "seen.tar.gz", profile="gce", receipt=folder / "gce.receipt"
    )
    imgcore.convert(folder / "b.raw", folder / "base.vhd")
    imgcore.checksum(folder / "b.raw", tree=folder / "b.tree")
    imgcore.convert(
        folder / "half.raw", folder / "child.qcow2", backing="b.raw", backing_format="raw"
    )
    return folder


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


EVERY_VERB = pytest.mark.parametrize("name", VERBS)


@EVERY_VERB
def test_a_verb_is_paused_and_resumed(name: str, folder: Path) -> None:
    control = imgcore.Control()
    control.pause()
    job = Job(lambda: VERBS[name].run(folder, control))
    wait_for(lambda: control.progress().phase != "waiting")
    job.thread.join(0.15)
    assert job.thread.is_alive(), (job.error, job.result)
    paused = control.progress()
    assert paused.done < paused.total or not paused.total
    control.resume()
    assert job.end() is not None, job.error
    ended = control.progress()
    assert ended.phase == "done"
    assert ended.done == ended.total
    assert ended.eta == 0
    target = VERBS[name].target
    assert target is None or (folder / target).exists()


@EVERY_VERB
def test_a_verb_that_waits_is_cancelled(name: str, folder: Path) -> None:
    before = contents(folder)
    control = imgcore.Control()
    control.pause()
    job = Job(lambda: VERBS[name].run(folder, control))
    wait_for(lambda: control.progress().phase != "waiting")
    control.cancel()
    job.end()
    assert isinstance(job.error, imgcore.ConversionCancelled), job.result
    assert control.progress().phase == "cancelled"
    assert contents(folder) == before
    # It stays so.
    with pytest.raises(imgcore.ConversionCancelled):
        VERBS[name].run(folder, control)


@EVERY_VERB
def test_a_verb_at_work_is_cancelled(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)
    control = imgcore.Control(rate="8M")
    report, seen = Run.report, []

    def cancel(run: Run, counts: Progress) -> None:
        if counts.done:
            seen.append(counts.done)
            control.cancel()
        report(run, counts)

    monkeypatch.setattr(Run, "report", cancel)
    with pytest.raises(imgcore.ConversionCancelled):
        VERBS[name].run(folder, control)
    assert len(seen) == 1
    assert control.progress().phase == "cancelled"
    after = contents(folder)
    assert after.keys() == before.keys()
    assert after == before or name.startswith(IN_PLACE)


# -- snapshots -------------------------------------------------------------------------


def test_a_snapshot_never_goes_backwards(folder: Path) -> None:
    """Threads that come and go, and jobs of one control, which end in all ways."""
    control = imgcore.Control(rate="64M")
    is_over = threading.Event()
    seen: list[list[imgcore.ControlProgress]] = [[], []]

    def look(states: list[imgcore.ControlProgress]) -> None:
        while not is_over.is_set():
            states.append(control.progress())
            time.sleep(0.001)

    lookers = [threading.Thread(target=look, args=(states,)) for states in seen]
    for looker in lookers:
        looker.start()

    def fail(progress: imgcore.Progress) -> None:
        if progress.done > MIB:
            raise ValueError

    cases = list(VERBS.values())[:6]
    jobs = [Job(partial(case.run, folder, control)) for case in cases]
    jobs.append(
        Job(
            lambda: imgcore.convert(
                folder / "a.raw", folder / "fails.vdi", control=control, progress=fail
            )
        )
    )
    try:
        for job in jobs:
            job.end()
    finally:
        is_over.set()
    for looker, states in zip(lookers, seen, strict=True):
        looker.join()
        assert len(states) > 10
        for before, after in pairwise(states):
            assert all(a <= b for a, b in zip(before[:5], after[:5], strict=True))
            assert before.seconds <= after.seconds
    assert isinstance(jobs[-1].error, ValueError)
    last = control.progress()
    assert (last.total, last.phase == "waiting") == (8 * MIB * len(jobs), False)


class Steps:
    """Runs of a control that take steps of a test's own."""

    def __init__(self) -> None:
        self.control = imgcore.Control()
        self.runs: list[tuple[Run, Progress]] = []
        self.ended = Progress(0, 0, 0, 0, 0)
        self.phase = "waiting"

    def begin(self, chance: random.Random) -> None:
        run = Run(self.control, None)
        run.__enter__()
        self.runs.append((run, Progress(0, 0, 0, 0, 0)))

    def report(self, chance: random.Random) -> None:
        index = chance.randrange(len(self.runs))
        run, before = self.runs[index]
        # Some reports are lower than those before, as of work that comes first.
        counts = Progress(*(max(0, n + chance.randrange(-5, 50)) for n in before))
        run.report(counts)
        self.runs[index] = (run, Progress(*map(max, before, counts)))

    def end(self, chance: random.Random) -> None:
        run, counts = self.runs.pop(chance.randrange(len(self.runs)))
        error = chance.choice((None, ValueError(), imgcore.ConversionCancelled(""), SystemExit()))
        run.__exit__(None, error, None)
        self.ended = Progress(*map(int.__add__, self.ended, counts))
        self.phase = run.phase
        names = {type(None): "done", ValueError: "failed"}
        assert run.phase == names.get(type(error), "cancelled")

    def check(self) -> None:
        found = self.control.progress()
        expected = Progress(*map(sum, zip(self.ended, *(one[1] for one in self.runs), strict=True)))
        assert found[:5] == tuple(expected)
        assert found.phase == (self.runs[-1][0].phase if self.runs else self.phase)


@pytest.mark.parametrize("seed", range(20))
def test_a_model_of_a_shared_control(seed: int) -> None:
    chance, steps = random.Random(seed), Steps()
    for _ in range(200):
        ways = [steps.begin, steps.report, steps.report, steps.end] if steps.runs else [steps.begin]
        chance.choice(ways)(chance)
        steps.check()


def test_a_signal_handler_may_use_a_control(folder: Path) -> None:
    """It comes in the middle of the job that the control steers, on the same thread."""
    control = imgcore.Control(rate="16M")
    calls: list[str] = []

    def handle(_number: int, _frame: object) -> None:
        calls.append(control.progress().phase)
        control.pause()
        control.rate = "1G"
        control.resume()
        if len(calls) >= 20:
            control.cancel()

    previous = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        with pytest.raises(imgcore.ConversionCancelled):
            while True:
                imgcore.checksum(folder / "a.raw", control=control)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert len(calls) >= 20


def test_a_forked_child_may_use_a_control(folder: Path) -> None:
    """Another thread has the locks of the control and of its limit at the fork."""
    control = imgcore.Control(rate="4M")
    job = Job(lambda: imgcore.checksum(folder / "a.raw", control=control))
    wait_for(lambda: control.progress().done > 0)
    with control._lock, control._jobs._lock:
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            # Its parent's jobs are not its own.
            if control.progress().phase == "waiting" and control.rate == 4 * MIB:
                control.rate = None
                imgcore.checksum(folder / "a.raw", control=control, threads=1)
                code = 0 if control.progress().done == 8 * MIB else 2
        finally:
            os._exit(code)
    ended: list[int] = []

    def has_ended() -> bool:
        found, status = os.waitpid(pid, os.WNOHANG)
        ended.append(status)
        return found == pid

    try:
        wait_for(has_ended)
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    finally:
        control.cancel()
        job.end()
    assert ended[-1] == 0


def test_a_job_that_is_cancelled_before_it_begins(folder: Path) -> None:
    control, before = imgcore.Control(), contents(folder)
    control.cancel()
    with pytest.raises(imgcore.ConversionCancelled):
        imgcore.convert(folder / "a.raw", folder / "new.qcow2", control=control)
    assert control.progress().phase == "cancelled"
    assert contents(folder) == before


def test_a_cancel_during_the_last_sync(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sync ends, and the target gets no name."""
    control = imgcore.Control()
    sync, phases = os.fsync, []

    def cancel(fd: int) -> None:
        phases.append(control.progress().phase)
        control.cancel()
        sync(fd)

    before = contents(folder)
    monkeypatch.setattr(os, "fsync", cancel)
    with pytest.raises(imgcore.ConversionCancelled):
        imgcore.convert(folder / "a.raw", folder / "new.qcow2", control=control)
    assert phases == ["syncing"]
    assert contents(folder) == before


def test_a_cancel_after_the_target_has_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, rename = imgcore.Control(), os.rename

    def cancel(*names: Any, **folders: Any) -> None:
        rename(*names, **folders)
        control.cancel()

    monkeypatch.setattr(os, "rename", cancel)
    result = imgcore.convert(folder / "a.raw", folder / "new.qcow2", control=control)
    assert result.virtual_size == 8 * MIB
    assert control.progress().phase == "done"


def test_what_an_earlier_run_has_done_says_nothing_about_the_rate() -> None:
    control = imgcore.Control()
    with Run.of(None, control, None) as run:
        run.skip(900 * MIB)
        run.report(Progress(900 * MIB, 1000 * MIB, 900 * MIB, 0, 900 * MIB))
        time.sleep(0.01)
        found = control.progress()
        assert (found.done, found.rate, found.eta) == (900 * MIB, 0.0, None)
        run.report(Progress(901 * MIB, 1000 * MIB, 901 * MIB, 0, 901 * MIB))
        time.sleep(0.01)
        found = control.progress()
        assert 0 < found.rate < 101 * MIB / 0.01
        assert found.eta is not None
