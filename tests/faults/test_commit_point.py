"""A job that is interrupted ends in one of two ways, at whatever point that happens.

Either the caller gets the exception, and the old target is there; or the new target is
complete, and the caller gets the result.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest

import imgcore
from imgcore.cli import main
from tests.faults.harness import DISK, OLD_DISK


class Job(NamedTuple):
    """A call of the library, and the same as a command; both write to ``folder``."""

    call: Callable[..., object]
    command: tuple[str, ...]
    target: str
    # What is there before; else the files of an older image are written.
    prepare: Callable[[Path], None] | None = None


def write_leaky(folder: Path) -> None:
    """Write a QCOW2 image in which nothing refers to one cluster any more."""
    path = folder / "d.qcow2"
    imgcore.convert(folder.parent / "new.raw", path, format="raw", threads=1)
    data = bytearray(path.read_bytes())
    mask = (1 << 56) - 512
    (l1,) = struct.unpack_from(">Q", data, 40)
    l2 = struct.unpack_from(">Q", data, l1)[0] & mask
    entry = next(at for at in range(l2, l2 + 65536, 8) if any(data[at : at + 8]))
    data[entry : entry + 8] = bytes(8)
    path.write_bytes(data)


def convert(target: str, **more: Any) -> Callable[..., object]:
    def call(folder: Path, **options: Any) -> object:
        usual = {"format": "raw", "force": True, "threads": 1}
        return imgcore.convert(
            folder.parent / "new.raw", folder / target, **(usual | more | options)
        )

    return call


def words(target: str, *more: str) -> tuple[str, ...]:
    return ("convert", "-f", "raw", "--force", "-m", "1", *more, "../new.raw", target)


VMFS = {"subformat": "vmfs"}
JOBS = {
    "raw": Job(convert("d.raw"), words("d.raw"), "d.raw"),
    "qcow2": Job(convert("d.qcow2"), words("d.qcow2"), "d.qcow2"),
    "pair": Job(convert("d.vmdk", options=VMFS), words("d.vmdk", "-o", "subformat=vmfs"), "d.vmdk"),
    "stream": Job(convert("d.raw.zst"), words("d.raw.zst"), "d.raw.zst"),
    "archive": Job(
        convert("d.tar.gz", profile="gce"), words("d.tar.gz", "--profile", "gce"), "d.tar.gz"
    ),
    "create": Job(
        lambda folder: imgcore.create(folder / "d.vhdx", 1 << 20, force=True),
        ("create", "--force", "d.vhdx", "1M"),
        "d.vhdx",
    ),
    "create-pair": Job(
        lambda folder: imgcore.create(folder / "d.vmdk", 1 << 20, options=VMFS, force=True),
        ("create", "--force", "-o", "subformat=vmfs", "d.vmdk", "1M"),
        "d.vmdk",
    ),
    "repair": Job(
        lambda folder: imgcore.check(folder / "d.qcow2", repair=True),
        ("check", "-r", "d.qcow2"),
        "d.qcow2",
        write_leaky,
    ),
}


def read(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


class Place:
    """A folder with an older image, over which a job writes a newer one."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder = folder / "here"
        self.folder.mkdir()
        self.job = job
        DISK.write(folder / "new.raw")
        OLD_DISK.write(folder / "old.raw")
        self.prepare()
        self.old = read(self.folder)
        self.job.call(self.folder)
        self.new_names = sorted(read(self.folder))

    def prepare(self) -> None:
        for entry in self.folder.iterdir():
            entry.unlink()
        if self.job.prepare is not None:
            self.job.prepare(self.folder)
            return
        for name in {self.job.target, *self.companions()}:
            (self.folder / name).write_bytes(b"old " + name.encode())

    def companions(self) -> list[str]:
        return ["d-flat.vmdk"] if self.job.target == "d.vmdk" else []

    def state(self) -> str:
        """Return "old" or "new"; fail if it is anything else."""
        files = read(self.folder)
        if files == self.old:
            return "old"
        assert sorted(files) == self.new_names, sorted(files)
        assert all(files[name] != self.old.get(name) for name in files), sorted(files)
        return "new"


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    return Place(tmp_path, JOBS[request.param])


every_job = pytest.mark.parametrize("place", JOBS, indirect=True)


class Interruption:
    """Raises at the n-th point at which Python would run a signal's handler.

    These are the entries of functions and the returns from C.  The points are counted
    once a call of ``function`` has begun.
    """

    def __init__(self, nth: int, error: type[BaseException], function: str) -> None:
        self.left, self.error, self.function = nth, error, function
        self.is_armed = False

    def profile(self, frame: FrameType, event: str, _argument: object) -> None:
        if event == "call" and frame.f_code.co_qualname == self.function:
            self.is_armed = True
        if self.is_armed and event in ("call", "c_return") and self.left:
            self.left -= 1
            if not self.left:
                raise self.error("too late")


class Stop(Exception):
    """What a handler of the caller's raises, for example that of an alarm."""


@every_job
# An interrupt just after a file is opened leaves it to its finalizer, and Python drops
# one that comes in a finalizer.
@pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt,
        pytest.param(Stop, marks=pytest.mark.slow),
        pytest.param(TimeoutError, marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_at_every_point(place: Place, error: type[BaseException]) -> None:
    seen = set()
    for nth in range(1, 5000):
        place.prepare()
        interruption = Interruption(nth, error, "Target.commit")
        sys.setprofile(interruption.profile)
        try:
            place.job.call(place.folder)
            ended = "new"
        except error:
            ended = "old"
        finally:
            sys.setprofile(None)
        assert place.state() == ended, f"point {nth}"
        seen.add(ended)
        if interruption.left:
            break
    gc.collect()
    assert seen == {"old", "new"}
    assert nth > 20


@every_job
def test_the_last_progress_call_may_cancel(place: Place) -> None:
    """It comes before the commit point, and no other call follows it."""
    if "convert" not in place.job.command:
        pytest.skip("reports no progress")
    target = place.folder / place.job.target
    seen: list[tuple[bool, bytes]] = []

    def look(progress: imgcore.Progress) -> None:
        seen.append((progress.done == progress.total, target.read_bytes()))

    def cancel(progress: imgcore.Progress) -> None:
        if progress.done == progress.total:
            raise Stop

    place.prepare()
    place.job.call(place.folder, progress=look)
    assert place.state() == "new"
    assert seen[-1][0]
    assert {content for _, content in seen} == {place.old[place.job.target]}
    place.prepare()
    with pytest.raises(Stop):
        place.job.call(place.folder, progress=cancel)
    assert place.state() == "old"


def run_in_child(place: Place, nth: int, number: int, report: Path) -> int:
    """Run the command, send it a signal at a point, and return its exit code."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)
    try:
        os.chdir(place.folder)
        sys.stdout, sys.stderr = open(os.devnull, "w"), report.open("w")  # noqa: SIM115
        sys.argv = ["imgcore", *place.job.command]

        def send(frame: FrameType, event: str, argument: object) -> None:
            try:
                interruption.profile(frame, event, argument)
            except Stop:
                os.kill(os.getpid(), number)

        interruption = Interruption(nth, Stop, "Target.commit")
        logging.getLogger("imgcore").handlers.clear()
        sys.setprofile(send)
        main.run()
    except BaseException:
        sys.setprofile(None)
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(99)


@pytest.mark.parametrize(
    ("place", "step"),
    [
        ("pair", 9),
        ("repair", 9),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in JOBS),
    ],
    indirect=["place"],
)
def test_a_signal_to_the_command_at_every_point(place: Place, step: int, tmp_path: Path) -> None:
    """Exit code 0 and the new target, or that of the signal and the old one."""
    seen = []
    report = tmp_path / "report"
    # The last ones come when the process has ended.
    for nth in range(1, 300, step):
        place.prepare()
        code = run_in_child(place, nth, signal.SIGTERM, report)
        text = report.read_text()
        assert code in (0, 143), (nth, code, text)
        assert place.state() == ("old" if code else "new"), (nth, text)
        assert ("ended by" in text) == (code != 0), (nth, text)
        assert "Traceback" not in text
        seen.append(code)
    assert set(seen) == {0, 143}
    assert seen == sorted(seen, reverse=True), "from one point on, all are complete"
