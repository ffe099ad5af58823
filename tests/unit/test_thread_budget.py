"""The threads that all jobs of a process use together."""

from __future__ import annotations

import io
import os
import random
import threading
import time
from pathlib import Path

import pytest
from tests.helpers.images import MIB, noise, text
from tests.helpers.threads import n_tasks

import imgcore
from imgcore.engine import geometry, thread_budget
from imgcore.engine.thread_budget import Lease, Turn, work_for


@pytest.fixture(autouse=True)
def budget(monkeypatch: pytest.MonkeyPatch) -> thread_budget._Budget:
    """A budget of 8 threads, as on 8 CPUs."""
    one = thread_budget._Budget()
    one.default = 8
    monkeypatch.setattr(thread_budget, "_budget", one)
    return one


class Job:
    """A job of its own, without a thread: what it leases belongs to it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.leases: list[Lease] = []

    def lease(self, wanted: int) -> Lease:
        work_for(self.number)
        try:
            self.leases.append(Lease(wanted))
        finally:
            thread_budget._owner.number = None
        return self.leases[-1]


def test_a_job_that_is_alone_gets_all_that_it_asks_for() -> None:
    job = Job(1)
    assert [job.lease(n).n_threads for n in (1, 8, 50)] == [1, 8, 50]


def test_several_jobs_divide_the_threads() -> None:
    first, second, third = (Job(number) for number in (1, 2, 3))
    a = first.lease(8)
    b = second.lease(8)
    # The first one keeps its threads until its next batch.
    assert (a.n_threads, b.n_threads) == (8, 1)
    assert (a.renew(), b.renew()) == (4, 4)
    c = third.lease(8)
    assert c.n_threads == 1
    assert (a.renew(), b.renew(), c.renew()) == (3, 3, 2)
    # What one does not want, the others get.
    d = Job(4).lease(1)
    assert d.n_threads == 1
    b.close()
    assert (a.renew(), c.renew()) == (4, 3)
    c.close()
    assert a.renew() == 7
    d.close()
    assert a.renew() == 8


def test_what_is_dropped_is_given_back(budget: thread_budget._Budget) -> None:
    job, other = Job(1), Job(2)
    job.lease(8)
    assert other.lease(8).n_threads == 1
    job.leases.clear()
    assert other.leases[0].renew() == 8
    with Job(3).lease(4):
        assert len(budget.leases) == 2
    assert len(budget.leases) == 1


def test_a_stated_number_holds_for_a_job_that_is_alone(budget: thread_budget._Budget) -> None:
    imgcore.set_thread_budget(3)
    assert Job(1).lease(8).n_threads == 3
    imgcore.set_thread_budget(None)
    assert Job(1).lease(8).n_threads == 8
    for number in (0, 257, -1):
        with pytest.raises(imgcore.OptionError):
            imgcore.set_thread_budget(number)


def test_a_model(budget: thread_budget._Budget) -> None:
    """Jobs come, go and renew; their sum is bounded, and none is without a thread."""
    chance = random.Random(7)
    jobs = [Job(number) for number in range(1, 20)]
    for _ in range(3000):
        job = chance.choice(jobs)
        if not job.leases:
            job.lease(chance.choice((1, 2, 8, 64)))
        elif chance.random() < 0.3:
            job.leases.pop()
        else:
            job.leases[0].renew()
        running = [one.leases[0] for one in jobs if one.leases]
        parts = [lease.n_threads for lease in running]
        assert all(1 <= lease.n_threads <= lease.wanted for lease in running)
        if len(running) > 1 and max(parts) <= 8:
            # Above the budget there is only the calling thread of each job.
            assert sum(n - 1 for n in parts) <= 8


def test_a_forked_child_starts_anew(budget: thread_budget._Budget) -> None:
    """A lock that another thread has at the fork stays locked in the child."""
    os.register_at_fork(after_in_child=budget.begin_child)
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with budget.lock:
            taken.set()
            done.wait(30)

    lease = Job(1).lease(8)
    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if Job(2).lease(8).n_threads == 8 else 1)
    end = time.monotonic() + 20
    status = 0
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            status = 9
            break
        time.sleep(0.01)
    done.set()
    thread.join()
    assert status == 0
    assert lease.n_threads == 8


# -- the jobs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["o.qcow2", "o.vmdk", "o.raw.gz", "o.raw.zst", "o.tar.gz", "o.raw"]
)
def test_many_conversions_make_few_threads(
    name: str, tmp_path: Path, budget: thread_budget._Budget
) -> None:
    budget.default = 2
    source = tmp_path / "disk.raw"
    source.write_bytes(noise(2 * MIB) + text(6 * MIB))
    profile = "gce" if name.endswith("tar.gz") else None
    options = {"cid": "12345678"} if name.endswith("vmdk") else None
    how = {"profile": profile, "options": options, "sync": False, "threads": 8}
    alone = tmp_path / f"alone-{name}"
    imgcore.convert(source, alone, **how)
    barrier = threading.Barrier(12)
    seen: list[int] = []
    targets = []
    for number in range(12):
        (tmp_path / str(number)).mkdir()
        targets.append(tmp_path / str(number) / alone.name)

    def convert(target: Path) -> None:
        barrier.wait()
        imgcore.convert(source, target, progress=lambda _: seen.append(n_tasks()), **how)

    threads = [threading.Thread(target=convert, args=(target,)) for target in targets]
    before = n_tasks()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # The first one may take all 8 that it asks for.  A second zstd stream has one, too.
    assert max(seen) <= before + 12 + 8 + name.endswith("zst")
    assert all(target.read_bytes() == alone.read_bytes() for target in targets)


@pytest.mark.parametrize("kind", ["pipe", "object"])
def test_many_streams_make_few_threads(
    kind: str, tmp_path: Path, budget: thread_budget._Budget
) -> None:
    """Those that find no thread left read on the calling one."""
    budget.default = 2
    disk = noise(2 * MIB) + text(2 * MIB)
    is_pipe = kind == "pipe"
    seen: list[int] = []
    names = [tmp_path / f"o{number}.qcow2" for number in range(10)]
    pipes = [tmp_path / f"pipe{number}" for number in range(len(names))] if is_pipe else []
    for pipe in pipes:
        os.mkfifo(pipe)
    barrier = threading.Barrier(len(names))

    def convert(number: int) -> None:
        barrier.wait()
        imgcore.convert(
            pipes[number] if is_pipe else io.BytesIO(disk),
            names[number],
            format="raw",
            sync=False,
            progress=lambda _: seen.append(n_tasks()),
        )

    threads = [threading.Thread(target=pipe.write_bytes, args=(disk,)) for pipe in pipes]
    threads += [threading.Thread(target=convert, args=(n,)) for n in range(len(names))]
    before = n_tasks()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(seen) <= before + len(threads) + 4
    for name in names:
        imgcore.convert(name, name.with_suffix(".raw"))
        assert name.with_suffix(".raw").read_bytes() == disk


def test_a_stream_without_a_thread_is_cancelled(
    tmp_path: Path, budget: thread_budget._Budget
) -> None:
    imgcore.set_thread_budget(1)
    other = Lease(1)
    assert other.take_spare()
    os.mkfifo(tmp_path / "pipe")
    control = imgcore.Control()
    threading.Timer(0.2, control.cancel).start()
    with (tmp_path / "pipe").open("r+b", buffering=0) as pipe:
        pipe.write(noise(MIB)[: 48 * 1024])
        with pytest.raises(imgcore.ConversionCancelled):
            imgcore.convert(tmp_path / "pipe", tmp_path / "o.qcow2", format="raw", control=control)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    other.close()


# -- turns -----------------------------------------------------------------------------


def test_turns_are_waited_for(budget: thread_budget._Budget) -> None:
    budget.default = 2
    first, second, third = (Turn(lambda: None) for _ in range(3))
    with first:
        entered = threading.Event()

        def wait() -> None:
            with third:
                entered.set()

        with second:
            thread = threading.Thread(target=wait)
            thread.start()
            # As long as one of the others goes on.
            for _ in range(30):
                first.note()
                assert not entered.wait(0.05)
        assert entered.wait(20)
        thread.join()
    assert not list(budget.turns)


def test_a_turn_is_taken_from_those_that_are_stuck(
    budget: thread_budget._Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may wait for the one that waits for them, in a chain of pipes."""
    monkeypatch.setattr(thread_budget, "_STUCK_SECONDS", 0.2)
    budget.default = 1
    ticks: list[int] = []
    with Turn(lambda: None), Turn(lambda: ticks.append(1)):
        assert ticks


def test_a_job_that_waits_for_its_turn_is_cancelled(
    tmp_path: Path, budget: thread_budget._Budget
) -> None:
    budget.default = 1
    (tmp_path / "disk.raw").write_bytes(bytes(MIB))
    control = imgcore.Control()
    with Turn(lambda: None) as turn:
        timer = threading.Timer(0.3, control.cancel)
        timer.start()

        def note(_: imgcore.Progress) -> None:
            turn.note()

        with pytest.raises(imgcore.ConversionCancelled):
            imgcore.convert(
                tmp_path / "disk.raw", tmp_path / "o.raw.zst", control=control, progress=note
            )
        timer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["disk.raw"]


def test_a_conversion_gets_threads_when_others_end(
    tmp_path: Path, budget: thread_budget._Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With batches of 4 MiB, it need not be a large one."""
    monkeypatch.setattr(geometry, "_MAX_BATCH_BLOCKS", 64)
    source, target = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    source.write_bytes(text(48 * MIB))
    other = Job(1).lease(8)
    seen: list[int] = []

    def look(progress: imgcore.Progress) -> None:
        seen.append(n_tasks())
        if progress.done:
            other.close()

    before = n_tasks()
    imgcore.convert(source, target, threads=4, progress=look, sync=False, rate="64M")
    assert imgcore.compare(source, target).identical
    assert seen[0] == before
    assert max(seen) == before + 4
