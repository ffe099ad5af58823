"""Which jobs are still alive: those that hold their locks, whatever process IDs say.

Jobs are killed in containers, where the next one has the same process ID, and while a
child that was forked meanwhile lives on.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import imgcore
from tests.faults.harness import DISK

# A job that stops in the middle: while it writes, or between the renames of a pair.
# It says so, and waits for a line.
JOB = """
import os, sys
import imgcore

place, target = sys.argv[1:3]
rename = os.rename
n_renames = 0

def stop(*_):
    print(os.getpid(), flush=True)
    sys.stdin.readline()

def rename_then_stop(*arguments, **keywords):
    global n_renames
    rename(*arguments, **keywords)
    n_renames += 1
    if n_renames == int(place):
        stop()

progress = stop if place == "writing" else None
if progress is None:
    os.rename = rename_then_stop
options = ["subformat=vmfs"] if target.endswith(".vmdk") else []
imgcore.convert("../d.raw", target, options=options, force=True, progress=progress)
"""

IN_CONTAINER = ("unshare", "--pid", "--fork", "--kill-child", "--mount")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    DISK.write(tmp_path / "d.raw")
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


@pytest.fixture
def container() -> tuple[str, ...]:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare (Debian: util-linux)")
    done = subprocess.run([*IN_CONTAINER, "true"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no new namespaces here: {done.stderr.strip()}")
    return IN_CONTAINER


@contextmanager
def stopped_job(
    folder: Path, place: str, target: str, *, script: str = JOB, within: tuple[str, ...] = ()
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Give a job that has stopped, and its own process ID; kill it at the end."""
    command = [*within, sys.executable, "-c", script, place, target]
    with subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        line = job.stdout.readline()
        assert line, "the job ended before it stopped"
        try:
            yield job, int(line)
        finally:
            job.kill()
            if within:
                # What runs in the container is killed too, but a little later.
                job.stdout.read()


def files(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


def convert_again(folder: Path, target: str, *, within: tuple[str, ...] = ()) -> None:
    options = ("-o", "subformat=vmfs") if target.endswith(".vmdk") else ()
    command = [*within, sys.executable, "-m", "imgcore", "convert", "--force", *options]
    subprocess.run([*command, "../d.raw", target], cwd=folder, check=True)


TARGETS = {"d.qcow2": ["d.qcow2"], "d.vmdk": ["d-flat.vmdk", "d.vmdk"]}


@pytest.mark.parametrize("target", TARGETS)
def test_killed_in_a_container(folder: Path, container: tuple[str, ...], target: str) -> None:
    """The next container's job has the same process ID."""
    with stopped_job(folder, "writing", target, within=container) as (_, pid):
        assert pid == 1
        left = set(files(folder))
        # It is alive, which no process ID tells here.
        convert_again(folder, target, within=container)
        assert set(files(folder)) == left | set(TARGETS[target])
    convert_again(folder, target, within=container)
    assert sorted(files(folder)) == TARGETS[target]


@pytest.mark.parametrize("place", ["1", "2", "3"])
def test_a_pair_half_swapped_in_a_container(
    folder: Path, container: tuple[str, ...], place: str
) -> None:
    """The old pair is put back by a job that has the process ID of the killed one."""
    convert_again(folder, "d.vmdk")
    (folder / "d-flat.vmdk").write_bytes(b"old")
    old = files(folder)
    with stopped_job(folder, place, "d.vmdk", within=container) as (_, pid):
        assert pid == 1
        assert "d.vmdk" not in files(folder)
    # Without --force, it finds the old pair in its place.
    command = [*container, sys.executable, "-m", "imgcore", "convert"]
    words = ["-o", "subformat=vmfs", "../d.raw", "d.vmdk"]
    done = subprocess.run(
        [*command, *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "an interrupted replacement has been undone" in done.stderr
    assert "exists already" in done.stderr
    now = files(folder)
    assert {name: now[name] for name in old} == old
    convert_again(folder, "d.vmdk", within=container)
    assert sorted(files(folder)) == TARGETS["d.vmdk"]


FORKS = {
    "fork": """
child = os.fork()
if not child:
    for number in (0, 1, 2):
        os.close(number)
    time.sleep(600)
    os._exit(0)
""",
    "multiprocessing": """
import multiprocessing
context = multiprocessing.get_context("fork")
helper = context.Process(target=time.sleep, args=(600,))
helper.start()
child = helper.pid
""",
    "subprocess": """
import subprocess
child = subprocess.Popen(
    ["sleep", "600"],
    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    close_fds=False,
).pid
""",
    "thread": """
def fork():
    global child
    child = os.fork()
    if not child:
        for number in (0, 1, 2):
            os.close(number)
        time.sleep(600)
        os._exit(0)
thread = threading.Thread(target=fork)
thread.start()
thread.join()
""",
}

# As above, but a child is forked where the job stops, and how it ends is read.
FORKING_JOB = """
import threading, time
def fork_here():
    global child
    {fork}
    return child

ending = None

def stop_forked():
    global ending
    if ending is None:
        print(fork_here(), flush=True)
        ending = sys.stdin.readline().strip()
        if ending == "fail":
            raise RuntimeError("as the test wants")
"""


def forking(fork: str) -> str:
    indented = fork.strip().replace("\n", "\n    ")
    return JOB.replace("def stop(*_):", "def former_stop(*_):").replace(
        "def rename_then_stop",
        FORKING_JOB.format(fork=indented)
        + "\ndef stop(*_):\n    stop_forked()\n\ndef rename_then_stop",
    )


@pytest.mark.parametrize("ending", ["done", "fail", "killed"])
@pytest.mark.parametrize("how", FORKS)
@pytest.mark.parametrize(
    ("place", "target"), [("writing", "d.qcow2"), ("writing", "d.vmdk"), ("2", "d.vmdk")]
)
def test_a_forked_child_lives_on(
    folder: Path, how: str, ending: str, place: str, target: str
) -> None:
    """It does not hold the locks of the job, so what a killed one left is removed."""
    if place == "2":
        convert_again(folder, target)
    before = files(folder)
    script = forking(FORKS[how])
    with stopped_job(folder, place, target, script=script) as (job, child):
        try:
            if ending != "killed":
                assert job.stdin is not None
                job.stdin.write(f"{ending}\n")
                job.stdin.flush()
                # multiprocessing would wait for its child at the end.
                if how == "multiprocessing":
                    wait_until_renamed(folder, before, ending)
                else:
                    assert (job.wait(60) == 0) == (ending == "done")
                assert (files(folder) == before) == (ending == "fail")
                assert not [name for name in files(folder) if name.startswith(".")]
            job.kill()
            job.wait()
            os.kill(child, 0)
            convert_again(folder, target)
        finally:
            os.kill(child, signal.SIGKILL)
    assert not [name for name in files(folder) if name.startswith(".")]


def wait_until_renamed(folder: Path, before: dict[str, bytes], ending: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            now = files(folder)
        except FileNotFoundError:
            continue  # renamed or removed while they are read
        is_clean = not [name for name in now if name.startswith(".")]
        if is_clean and (now == before) == (ending == "fail"):
            return
        time.sleep(0.05)
    raise AssertionError("the job does not end")


def test_a_child_cannot_harm_its_parents_target(folder: Path) -> None:
    """A child that unwinds through the parent's job removes and changes nothing."""
    parent = os.getpid()

    def fork(_: object) -> None:
        nonlocal child
        if child is None:
            child = os.fork()
            if not child:
                raise SystemExit

    child: int | None = None
    target = folder / "d.qcow2"
    try:
        imgcore.convert(folder.parent / "d.raw", target, progress=fork)
    finally:
        if os.getpid() != parent:
            os._exit(0)
    assert child is not None
    os.waitpid(child, 0)
    assert sorted(files(folder)) == ["d.qcow2"]
    assert imgcore.compare(folder.parent / "d.raw", target).identical
