"""How many threads work, and what happens where the system makes none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.helpers import images
from tests.helpers.images import MIB
from tests.helpers.threads import n_tasks

import imgcore
from imgcore.engine import cpus
from imgcore.engine.job import thread_count
from imgcore.streams import helpers

# -- the default number ----------------------------------------------------------------

# What /proc/self/cgroup says, files below the mount point, CPUs of affinity, result.
GROUPS: dict[str, tuple[str, dict[str, str], int, int]] = {
    "nothing": ("", {}, 8, 8),
    "no quota": ("0::/a\n", {"a/cpu.max": "max 100000\n"}, 8, 8),
    "a quota": ("0::/a\n", {"a/cpu.max": "200000 100000\n"}, 8, 2),
    "rounded up": ("0::/a\n", {"a/cpu.max": "250000 100000\n"}, 8, 3),
    "less than one CPU": ("0::/a\n", {"a/cpu.max": "1000 100000\n"}, 8, 1),
    "more than there are": ("0::/a\n", {"a/cpu.max": "900000 100000\n"}, 4, 4),
    "another period": ("0::/a\n", {"a/cpu.max": "20000 10000\n"}, 8, 2),
    "the root of a namespace": ("0::/\n", {"cpu.max": "300000 100000\n"}, 8, 3),
    "outside of a namespace": ("0::/../b\n", {"cpu.max": "300000 100000\n"}, 8, 3),
    "a path that is not mounted": ("0::/docker/x\n", {"cpu.max": "300000 100000\n"}, 8, 3),
    "nested, inside": (
        "0::/a/b/c\n",
        {"a/cpu.max": "400000 100000\n", "a/b/c/cpu.max": "200000 100000\n"},
        8,
        2,
    ),
    "nested, outside": (
        "0::/a/b/c\n",
        {"a/cpu.max": "200000 100000\n", "a/b/c/cpu.max": "max 100000\n"},
        8,
        2,
    ),
    "version 1": (
        "4:cpu,cpuacct:/a\n0::/x\n",
        {"cpu/a/cpu.cfs_quota_us": "150000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
        8,
        2,
    ),
    "version 1, both names": (
        "4:cpu,cpuacct:/a\n",
        {"cpu,cpuacct/a/cpu.cfs_quota_us": "100000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
        8,
        1,
    ),
    "version 1 without a quota": (
        "4:cpu:/a\n",
        {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
        8,
        8,
    ),
    "version 1, nested": (
        "4:cpu:/a/b\n",
        {
            "cpu/a/cpu.cfs_quota_us": "200000\n",
            "cpu/a/cpu.cfs_period_us": "100000\n",
            "cpu/a/b/cpu.cfs_quota_us": "-1\n",
            "cpu/a/b/cpu.cfs_period_us": "100000\n",
        },
        8,
        2,
    ),
    "both versions": ("2:memory:/m\n0::/a\n", {"unified/a/cpu.max": "300000 100000"}, 8, 3),
    "not of the CPU": ("4:cpuset:/a\n", {"cpuset/a/cpu.cfs_quota_us": "100000"}, 8, 8),
    "garbage": ("no\n::::\n0::/a\nx:cpu\n\n", {"a/cpu.max": "many few\n", "cpu.max": "1"}, 8, 8),
    "no period": ("0::/a\n", {"a/cpu.max": "100000 0\n"}, 8, 8),
    "a huge number": ("0::/a\n", {"a/cpu.max": "9" * 5000 + " 100000\n"}, 8, 8),
    "other digits": ("0::/a\n", {"a/cpu.max": "\u00b2\u00b2 \u0665\n"}, 8, 8),
    "out of the mount": ("0::/../../../a\n", {"a/cpu.max": "100000 100000\n"}, 8, 1),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_default_respects_affinity_and_quota(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, files, n_affine, expected = GROUPS[name]
    mount = tmp_path / "cgroup"
    mount.mkdir()
    for path, content in files.items():
        (mount / path).parent.mkdir(parents=True, exist_ok=True)
        (mount / path).write_text(content)
    of_process = tmp_path / "of_process"
    of_process.write_text(text)
    monkeypatch.setattr(cpus, "_GROUPS_OF_PROCESS", str(of_process))
    monkeypatch.setattr(cpus, "_GROUPS", str(mount))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(n_affine)))
    assert cpus.available_cpus() == expected
    assert thread_count(None) == expected
    assert thread_count(7) == 7


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "_GROUPS_OF_PROCESS", str(tmp_path))
    monkeypatch.setattr(cpus, "_GROUPS", str(tmp_path / "absent"))
    assert cpus.available_cpus() == len(os.sched_getaffinity(0))


# -- one worker ------------------------------------------------------------------------


# About a second for the images below, so a job waits for many pieces of 50 ms.
SLOW = {"level": "best"}


def test_one_worker_is_the_calling_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, target = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(images.text(16 * MIB))
    before, seen = n_tasks(), set[int]()
    ticks: list[int] = []

    def look(progress: imgcore.Progress) -> None:
        seen.add(n_tasks())
        ticks.append(progress.done)

    imgcore.convert(raw, target, compress=True, rate="32M", threads=1, progress=look)
    assert imgcore.compare(raw, target, threads=1, progress=look).identical
    assert seen == {before}
    # The work is cut into pieces, so that signals and the callback get their turns.
    assert len(set(ticks)) > 2


@pytest.mark.parametrize(
    ("name", "profile", "n_more"),
    [("disk.raw.gz", None, 0), ("disk.tar.gz", "gce", 0), ("disk.raw.zst", None, 1)],
)
def test_one_worker_makes_a_stream(
    name: str, profile: str | None, n_more: int, tmp_path: Path
) -> None:
    """The library for zstd needs a thread: its blocks would be others without."""
    raw = tmp_path / "disk.raw"
    raw.write_bytes(images.text(16 * MIB))
    before, seen = n_tasks(), set[int]()

    def look(_: imgcore.Progress) -> None:
        seen.add(n_tasks())

    target = tmp_path / name
    imgcore.convert(raw, target, profile=profile, threads=1, progress=look)
    assert seen and max(seen) <= before + n_more
    imgcore.convert(raw, tmp_path / f"2{name}", profile=profile, threads=2)
    assert target.read_bytes() == (tmp_path / f"2{name}").read_bytes()


def test_a_job_of_one_worker_can_be_cancelled(tmp_path: Path) -> None:
    raw, target = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(images.text(16 * MIB))

    class StopError(Exception):
        pass

    def stop(progress: imgcore.Progress) -> None:
        if 0 < progress.done < progress.total:
            raise StopError

    with pytest.raises(StopError):
        imgcore.convert(raw, target, compress=True, options=SLOW, threads=1, progress=stop)
    assert not target.exists()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_job_that_waits_for_its_rate_can_be_cancelled(threads: int, tmp_path: Path) -> None:
    """The calling thread comes back from a window that must wait for days."""
    raw, target = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    raw.write_bytes(images.text(MIB))
    ticks = []

    class StopError(Exception):
        pass

    def stop(progress: imgcore.Progress) -> None:
        ticks.append(progress.done)
        if len(ticks) == 3:
            raise StopError

    with pytest.raises(StopError):
        imgcore.convert(raw, target, rate=1, threads=threads, progress=stop)
    assert ticks == [0, 0, 0]
    assert not target.exists()
    # A rate that is raised meanwhile lets it go on.
    control = imgcore.Control(rate=1)

    def hurry(_: imgcore.Progress) -> None:
        control.rate = None

    imgcore.convert(raw, target, control=control, threads=threads, progress=hurry)
    assert imgcore.compare(raw, target).identical


# -- no threads ------------------------------------------------------------------------

SCRIPT = """
    import os, resource, sys, threading
    import imgcore, imgcore.streams.gzip, imgcore.streams.zstd, imgcore.streams.tar

    # Imports what the verbs import, and notes what they write where threads exist.
    data = open("disk.raw", "rb").read()
    names = ["disk.qcow2", "disk.vmdk", "disk.vhd", "disk.vhdx", "disk.vdi",
             "disk.raw.gz", "disk.raw.zst", "copy.raw"]
    def run(prefix):
        for threads in (None, 1, 4):
            for name in names:
                imgcore.convert("disk.raw", prefix + name, threads=threads, force=True, sync=False)
            imgcore.convert("disk.raw", prefix + "z.qcow2", compress=True, force=True, sync=False)
            for name in (*names, "z.qcow2"):
                stream = name.endswith((".gz", ".zst"))
                if stream:
                    back = prefix + "back.raw"
                    imgcore.convert(prefix + name, back, threads=threads, force=True, sync=False)
                    name = "back.raw"
                assert imgcore.compare("disk.raw", prefix + name, threads=threads).identical
                with imgcore.open(prefix + name) as image:
                    assert image.read(0, len(data)) == data
                    assert image.read(100, 3_000_000) == data[100:3_000_100]
                    buffer = bytearray(len(data))
                    image.readinto(0, buffer, threads=threads)
                    assert buffer == data
        imgcore.convert("disk.raw", prefix + "gce.tar.gz", profile="gce", force=True, sync=False)
    run("before-")

    if os.geteuid() == 0:
        os.setgid(54321)
        os.setuid(54321)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    try:
        threading.Thread(target=int).start()
    except RuntimeError:
        pass
    else:
        sys.exit("threads can be made here")
    run("after-")
    for name in (*names, "z.qcow2", "gce.tar.gz"):
        if name.endswith((".vhd", ".vhdx", ".vdi", ".vmdk", ".zst")):
            continue  # they have random IDs, or other blocks without a thread
        assert open("before-" + name, "rb").read() == open("after-" + name, "rb").read(), name
    print("done")
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that any user may write to."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


def test_no_verb_needs_a_thread(open_folder: Path) -> None:
    """The kernel refuses every thread, as in a full cgroup of pids."""
    raw = open_folder / "disk.raw"
    raw.write_bytes(images.text(3 * MIB) + bytes(2 * MIB) + images.noise(3 * MIB))
    raw.chmod(0o666)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        cwd=open_folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if "threads can be made here" in done.stderr:
        pytest.skip("the limit of processes does not bind here")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    warned = {line.partition(": ")[2] for line in done.stderr.splitlines()}
    assert warned == {
        "no thread can be made: the stream differs from one made with threads, its content does not"
    }


@pytest.mark.parametrize("n_made", [0, 1, 2, 3])
def test_helpers_with_fewer_threads_than_wanted(
    n_made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, made = threading.Thread.start, []

    def refused(thread: threading.Thread) -> None:
        if len(made) == n_made:
            raise RuntimeError("can't start new thread")
        made.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    pool = helpers.Helpers(3, "helper")
    assert len(made) == n_made
    futures = [pool.submit(pow, n, 2) for n in range(20)]
    assert [future.result() for future in futures] == [n * n for n in range(20)]
    failed = pool.submit(os.stat, "/absent/file")
    with pytest.raises(FileNotFoundError) as caught:
        failed.result()
    assert caught.value.errno == errno.ENOENT
    pool.close()
    assert not any(thread.is_alive() for thread in made)


@pytest.mark.parametrize("n_made", [0, 1, 3])
def test_streams_with_fewer_threads_than_wanted(
    n_made: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gzip is written and read the same with any number of threads."""
    raw = tmp_path / "disk.raw"
    raw.write_bytes(images.text(5 * MIB))
    imgcore.convert(raw, tmp_path / "expected.raw.gz", threads=4)
    start, made = threading.Thread.start, []

    def refused(thread: threading.Thread) -> None:
        if len(made) == n_made:
            raise RuntimeError("can't start new thread")
        made.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    imgcore.convert(raw, tmp_path / "disk.raw.gz", threads=4)
    made.clear()
    imgcore.convert(tmp_path / "disk.raw.gz", tmp_path / "back.raw", threads=4)
    assert (tmp_path / "disk.raw.gz").read_bytes() == (tmp_path / "expected.raw.gz").read_bytes()
    assert (tmp_path / "back.raw").read_bytes() == raw.read_bytes()
