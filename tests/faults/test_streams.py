"""Every call on a stream fails once: one line and exit code 1, or the whole image."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.images import noise

MIB = 1 << 20
SHIM = Path(__file__).with_name("stream_shim.c")
FORMATS = {
    "raw": [],
    "raw.zst": [],
    "raw.gz": [],
    "qcow2": [],
    "vmdk": ["-o", "subformat=streamOptimized,cid=12345678"],
    "vhd": ["-o", "subformat=fixed,uuid=6f9619ff-8b86-d011-b42d-00c04fc964ff"],
}


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("shim") / "stream_shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True)
    return library


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        file.write(noise(MIB))
        file.seek(3 * MIB)
        file.write(noise(4096))
        file.truncate(4 * MIB)
    return path


def run(format: str, disk: Path, shim: Path, fault: str) -> subprocess.CompletedProcess[bytes]:
    words = ["convert", "-q", "-O", format, *FORMATS[format], str(disk), "-"]
    return subprocess.run(
        [sys.executable, "-m", "imgcore", *words],
        env=os.environ | {"LD_PRELOAD": str(shim), "STREAM_FAULT": fault},
        capture_output=True,
        timeout=60,
    )


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO, errno.ENOSPC], ids=errno.errorcode.get)
@pytest.mark.parametrize("format", FORMATS)
def test_every_write_fails(format: str, code: int, disk: Path, shim: Path) -> None:
    whole = run(format, disk, shim, "0 0")
    assert whole.returncode == 0, whole.stderr
    for nth in range(1, 1000):
        done = run(format, disk, shim, f"{nth} {code}")
        if done.returncode == 0:
            assert done.stdout == whole.stdout
            break
        assert done.returncode == 1
        lines = done.stderr.decode().splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("imgcore: stdout: "), lines
        assert os.strerror(code) in lines[0], lines
        # What was written before the fault is the start of the image.
        assert whole.stdout.startswith(done.stdout)
        assert len(done.stdout) < len(whole.stdout)
    assert nth > 2


@pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN], ids=errno.errorcode.get)
@pytest.mark.parametrize("format", FORMATS)
def test_every_write_is_interrupted(format: str, code: int, disk: Path, shim: Path) -> None:
    """Such writes are repeated, and the image is whole."""
    whole = run(format, disk, shim, "0 0")
    for nth in (1, 2, 3, 5):
        done = run(format, disk, shim, f"{nth} {code}")
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == whole.stdout


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("format", ["raw", "vhd", "qcow2"])
def test_moves_fail(format: str, code: int, tmp_path: Path, shim: Path) -> None:
    """Data that cannot be moved into a pipe is written; the write has the error."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(noise(20 * MIB))
    whole = run(format, disk, shim, "0 0")
    assert whole.returncode == 0, whole.stderr
    for nth in (2, 3, 5):
        once = run(format, disk, shim, f"{nth} {code}")
        assert (once.returncode, once.stderr) == (0, b"")
        assert once.stdout == whole.stdout
        done = run(format, disk, shim, f"{nth} {code} all")
        assert done.returncode == 1
        assert done.stderr.decode().startswith("imgcore: stdout: ")
        assert os.strerror(code) in done.stderr.decode()
        assert whole.stdout.startswith(done.stdout)
        assert len(done.stdout) < len(whole.stdout)


def run_from(disk: Path, target: Path, shim: Path, fault: str) -> subprocess.CompletedProcess[str]:
    """Convert a raw disk from a pipe."""
    words = ["convert", "-q", "--force", "-f", "raw", "-", str(target)]
    return subprocess.run(
        f"cat {disk} | LD_PRELOAD={shim} STREAM_READ_FAULT='{fault}' "
        f"{sys.executable} -m imgcore {' '.join(words)}",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("code", [errno.EIO, errno.ECONNRESET], ids=errno.errorcode.get)
@pytest.mark.parametrize("format", ["raw", "qcow2", "raw.zst"])
def test_every_read_fails(format: str, code: int, disk: Path, shim: Path, tmp_path: Path) -> None:
    target = tmp_path / f"target.{format}"
    target.write_bytes(b"old")
    for nth in (1, 2, 3, 5):
        done = run_from(disk, target, shim, f"{nth} {code}")
        assert done.returncode == 1
        lines = done.stderr.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("imgcore: stdin: "), lines
        assert os.strerror(code) in lines[0], lines
        assert target.read_bytes() == b"old"
        assert sorted(os.listdir(tmp_path)) == [disk.name, target.name]


@pytest.mark.parametrize("code", [errno.EINTR, errno.EAGAIN], ids=errno.errorcode.get)
def test_every_read_is_interrupted(code: int, disk: Path, shim: Path, tmp_path: Path) -> None:
    target = tmp_path / "target.raw"
    for nth in (1, 2, 3, 5):
        done = run_from(disk, target, shim, f"{nth} {code}")
        assert (done.returncode, done.stderr) == (0, "")
        assert target.read_bytes() == disk.read_bytes()
