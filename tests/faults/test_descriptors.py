"""A program that was started without stdin, stdout or stderr, as daemons are."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import imgcore
from tests.faults.harness import DISK
from tests.helpers import qemu

CLOSED = [numbers for n in range(1, 4) for numbers in itertools.combinations((0, 1, 2), n)]

VERBS = {
    "convert": "convert --progress=json d.raw new.qcow2",
    "convert-pair": "convert --progress=json -o subformat=vmfs d.raw new.vmdk",
    "convert-stream": "convert --progress=json d.raw new.raw.zst",
    "convert-from-stream": "convert --progress=json d.raw.zst new.vdi",
    "convert-archive": "convert --progress=json --profile gce d.raw new.tar.gz",
    "convert-in-place": "convert --progress=json -n -O raw d.raw there.raw",
    "create": "create new.vhdx 1M",
    "compare": "compare --progress=json -f raw d.raw there.qcow2",
    "diff": "diff --progress=json d.raw there.qcow2",
    "info": "info there.qcow2",
    "map": "map there.qcow2",
    "check": "check there.qcow2",
    "check-repair": "check -r there.qcow2",
    "measure": "measure -O qcow2 d.raw",
    "lint": "lint --profile openstack there.qcow2",
}


def fill(folder: Path) -> None:
    DISK.write(folder / "d.raw")
    imgcore.convert(folder / "d.raw", folder / "there.qcow2")
    imgcore.convert(folder / "d.raw", folder / "d.raw.zst")
    (folder / "there.raw").write_bytes(bytes(3 << 20))


# The programs below report the names of files that have a number below 3.
WATCH = """
import fcntl, os, sys

report = os.open("../report", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
report = fcntl.fcntl(report, fcntl.F_DUPFD, 10)
closed = [int(number) for number in sys.argv.pop(1)]
for number in {0, 1, 2} & {report, *closed}:
    os.close(number)
os.closerange(3, 10)

def look(frame, event, argument):
    # After each call of a C function in imgcore; Python itself opens modules.
    if event == "c_return" and (frame is None or "/imgcore/" in frame.f_code.co_filename):
        for number in closed:
            try:
                name = os.readlink(f"/proc/self/fd/{number}")
            except OSError:
                continue
            if name != "/dev/null" and ".py" not in name and ".so" not in name:
                os.write(report, f"{number}: {name}\\n".encode())
"""

COMMAND = f"""{WATCH}
from imgcore.__main__ import run
sys.setprofile(look)
run()
"""


def run_without(closed: tuple[int, ...], script: str, *words: str, cwd: Path) -> tuple[int, str]:
    """Run a program without some standard descriptors; return code and report."""
    numbers = "".join(map(str, closed))
    command = [sys.executable, "-W", "ignore", "-c", script, numbers, *words]
    code = subprocess.run(command, cwd=cwd, check=False, timeout=120).returncode
    return code, (cwd.parent / "report").read_text()


@pytest.mark.parametrize("verb", VERBS)
def test_the_command(verb: str, tmp_path: Path) -> None:
    """What is printed does not get into a file, whatever is closed."""
    folder = tmp_path / "here"
    folder.mkdir()
    fill(folder)
    before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    for closed in CLOSED:
        assert run_without(closed, COMMAND, *VERBS[verb].split(), cwd=folder) == (0, ""), closed
        for path in sorted(folder.iterdir()):
            if path.name in before and (path.suffix, verb) != (".raw", "convert-in-place"):
                assert path.read_bytes() == before[path.name], (closed, path)
            elif path.suffix != ".gz":
                assert same_disk(path), (closed, path)
        for path in folder.glob("new*"):
            path.unlink()


def same_disk(path: Path) -> bool:
    if path.name.endswith("-flat.vmdk"):
        return path.read_bytes() == (path.parent / "d.raw").read_bytes()
    if path.suffix == ".zst":
        plain = path.with_name("plain.raw")
        imgcore.convert(path, plain, force=True)
        return same_disk(plain)
    if path.name == "new.vhdx":
        return bool(qemu.info(path, "vhdx")["virtual-size"] == 1 << 20)
    return imgcore.compare(path.parent / "d.raw", path, format_a="raw").identical


LIBRARY = f"""{WATCH}
import imgcore
import imgcore.verbs.convert, imgcore.disk.image_sink, imgcore.streams.reader

def progress(_):
    look(None, "c_return", None)

sys.setprofile(look)
for kernels in (dict(), dict(io="uring")):
    for target in ("d.qcow2", "d.vdi", "d.raw.gz", "d.raw"):
        options = dict(force=True, progress=progress, kernels=kernels)
        imgcore.convert("../d.raw", target, **options)
    imgcore.convert("../d.raw", "d.vmdk", options=["subformat=vmfs"], force=True)
    imgcore.convert("d.vmdk", "d.qcow2", **options)
    imgcore.convert("../d.raw", "d.raw", in_place=True, progress=progress)
    imgcore.convert("d.raw.gz", "d.vhdx", **options)
    imgcore.create("c.vhd", 1 << 20, force=True)
    imgcore.create("o.qcow2", backing="d.qcow2", backing_format="qcow2", force=True)
    for image in ("d.vmdk", "o.qcow2", "d.vhdx"):
        imgcore.info(image)
        imgcore.check(image)
        imgcore.map(image)
        imgcore.lint(image, profile="openstack")
        imgcore.measure(image, target_format="vdi")
        with imgcore.open(image) as opened:
            opened.read(0, 1 << 20)
    imgcore.check("o.qcow2", repair=True)
    imgcore.compare("d.qcow2", "d.vmdk", progress=progress)
"""


@pytest.mark.parametrize(
    "closed", [(0, 1, 2), *(pytest.param((n,), marks=pytest.mark.slow) for n in range(3))]
)
def test_the_library(closed: tuple[int, ...], tmp_path: Path) -> None:
    """None of our files has a number below 3, at any moment."""
    folder = tmp_path / "here"
    folder.mkdir()
    DISK.write(tmp_path / "d.raw")
    assert run_without(closed, LIBRARY, cwd=folder) == (0, "")


def test_a_full_stdout_is_named(tmp_path: Path) -> None:
    """A target that has its name is complete all the same, and the line says so."""
    fill(tmp_path)
    for words, more in (("info there.qcow2", ""), ("convert --json d.raw new.vdi", "; the ta")):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "imgcore", *words.split()],
                cwd=tmp_path,
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 1
        assert done.stderr.startswith(f"imgcore: stdout: No space left on device{more}")
        assert done.stderr.count("\n") == 1
    assert same_disk(tmp_path / "new.vdi")


N_EXTENTS = 300


@pytest.mark.parametrize("verb", ["info", "map", "check", "convert", "measure -O raw", "lint"])
def test_many_extents(verb: str, tmp_path: Path) -> None:
    """The soft limit is raised; an error about the hard one says what to do."""
    if shutil.which("prlimit") is None:
        pytest.skip("prlimit is not installed (Debian: util-linux)")
    lines = ["# Disk DescriptorFile", "version=1", "CID=1a2b3c4d", "parentCID=ffffffff"]
    lines.append('createType="twoGbMaxExtentFlat"')
    for number in range(N_EXTENTS):
        (tmp_path / f"d-f{number:03}.vmdk").write_bytes(bytes([number % 255 + 1]) * 4096)
        lines.append(f'RW 8 FLAT "d-f{number:03}.vmdk" 0')
    (tmp_path / "d.vmdk").write_text("\n".join(lines) + "\n")
    words = [*verb.split(), "d.vmdk", *(["new.qcow2", "--force"] if verb == "convert" else [])]
    words += ["--profile", "esxi"] if verb == "lint" else []

    def run(limit: str) -> subprocess.CompletedProcess[str]:
        command = ["prlimit", f"--nofile={limit}", sys.executable, "-m", "imgcore", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    expected = 1 if verb == "lint" else 0
    assert run("64:4096").returncode == expected
    for limit in (64, N_EXTENTS, N_EXTENTS + 3):
        done = run(f"{limit}:{limit}")
        assert done.returncode == (2 if verb == "lint" else 1), done.stderr
        assert done.stderr.count("\n") == 1
        said = f"Too many open files: the limit of this process is {limit}; root may raise it: "
        assert said in done.stderr
        assert "vmdk: " in done.stderr
    (advice,) = re.findall(r"root may raise it: (prlimit --nofile=)N COMMAND", done.stderr)
    assert advice == "prlimit --nofile="
    if os.geteuid() == 0:
        assert run("4096").returncode == expected


def test_the_library_leaves_the_limit(tmp_path: Path) -> None:
    """It names the call that raises the soft limit."""
    script = """if True:
        import resource, sys
        import imgcore
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, hard))
        try:
            images = [imgcore.open("there.qcow2") for _ in range(60)]
        except OSError as error:
            assert error.filename == "there.qcow2", error
            assert "resource.setrlimit(resource.RLIMIT_NOFILE, ...) raises it" in str(error)
        else:
            sys.exit("no error")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (40, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        images = [imgcore.open("there.qcow2") for _ in range(60)]
    """
    fill(tmp_path)
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, check=True)
