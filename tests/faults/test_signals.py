"""Signals end a job without a trace, or ask how far it is."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import imgcore
from tests.faults.harness import DISK

# The command, stopped where it reads or writes its first image, until it gets a line.
COMMAND = """
import os, signal, sys

for number in sys.argv.pop(1).split(","):
    if number:
        signal.signal(int(number), signal.SIG_IGN)

from imgcore.files.host_file import HostFile
from imgcore.files.target_file import TargetFile

def stopping(method):
    def call(*arguments):
        global is_stopped
        if not is_stopped:
            is_stopped = True
            os.write(1, b"stopped\\n")
            sys.stdin.readline()
        return method(*arguments)
    return call

is_stopped = False
if sys.argv[1] in ("create", "convert"):
    TargetFile.truncate = stopping(TargetFile.truncate)
    TargetFile.pwrite = stopping(TargetFile.pwrite)
else:
    HostFile.pread = stopping(HostFile.pread)

from imgcore.__main__ import run
run()
"""

VERBS = {
    "convert": "convert d.qcow2 new.qcow2",
    "convert-pair": "convert --force -o subformat=vmfs d.qcow2 d.vmdk",
    "convert-stream": "convert d.qcow2 new.raw.zst",
    "convert-archive": "convert --profile gce d.qcow2 new.tar.gz",
    "create": "create new.vhdx 1M",
    "info": "info d.qcow2",
    "map": "map d.qcow2",
    "compare": "compare d.qcow2 d.vmdk",
    "check": "check d.qcow2",
    "measure": "measure -O vdi d.qcow2",
    "lint": "lint --profile openstack d.qcow2",
}

ENDING = [
    *("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGABRT", "SIGUSR2", "SIGALRM", "SIGVTALRM"),
    *("SIGPROF", "SIGIO", "SIGPWR", "SIGSTKFLT", "SIGXCPU", "SIGRTMIN", "SIGRTMAX"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    DISK.write(tmp_path / "d.raw")
    imgcore.convert(tmp_path / "d.raw", tmp_path / "d.qcow2")
    imgcore.convert(tmp_path / "d.raw", tmp_path / "d.vmdk", options={"subformat": "vmfs"})
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@contextmanager
def stopped(folder: Path, verb: str, ignored: str = "") -> Iterator[subprocess.Popen[str]]:
    """Give the command, stopped in the middle of its work."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, ignored, *VERBS[verb].split()],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "stopped\n"
        try:
            yield job
        finally:
            job.kill()


@pytest.mark.parametrize("name", ENDING)
@pytest.mark.parametrize("verb", ["convert", "convert-pair"])
def test_a_signal_ends_a_job(folder: Path, verb: str, name: str) -> None:
    before = files(folder)
    number = getattr(signal, name)
    with stopped(folder, verb) as job:
        assert len(files(folder)) > len(before)
        job.send_signal(number)
        _, errors = job.communicate(timeout=30)
    assert (job.returncode, files(folder)) == (128 + number, before)
    line = f"imgcore: ended by {name}\n".replace("SIGRTMAX", "SIGRTMIN+30")
    assert errors == line.replace("SIGIO", signal.SIGIO.name)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_ends(folder: Path, verb: str) -> None:
    before = files(folder)
    with stopped(folder, verb) as job:
        job.send_signal(signal.SIGQUIT)
        _, errors = job.communicate(timeout=30)
    assert (job.returncode, errors) == (131, "imgcore: ended by SIGQUIT\n")
    assert files(folder) == before


@pytest.mark.parametrize("verb", VERBS)
def test_usr1_asks_how_far_it_is(folder: Path, verb: str) -> None:
    """It prints one line each time, and the verb goes on."""
    with stopped(folder, verb) as job:
        lines = []
        assert job.stderr is not None
        for _ in range(3):
            job.send_signal(signal.SIGUSR1)
            lines.append(job.stderr.readline())
        _, errors = job.communicate("\n", timeout=60)
    assert job.returncode == 0, errors
    for line in lines:
        assert line.startswith("imgcore: "), lines
        assert line.endswith("\n")
        has_progress = verb not in ("info", "create", "map", "lint")
        assert ("running for" not in line) == has_progress, line
    assert "ended" not in errors


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2"])
def test_ignored_signals_stay_ignored(folder: Path, name: str) -> None:
    """As nohup and shells start programs."""
    number = getattr(signal, name)
    with stopped(folder, "convert", ignored=str(int(number))) as job:
        job.send_signal(number)
        _, errors = job.communicate("\n", timeout=60)
    assert (job.returncode, errors) == (0, "")
    assert "new.qcow2" in files(folder)


def test_the_library_handles_no_signal(folder: Path) -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    seen = []

    def look(_: object) -> None:
        seen.append({number: signal.getsignal(number) for number in signal.valid_signals()})

    imgcore.convert(folder / "d.qcow2", folder / "new.vhd", progress=look)
    assert seen
    assert all(handlers == before for handlers in seen)
