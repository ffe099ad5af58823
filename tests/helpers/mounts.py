"""Loop devices and file systems on a test's file; each skips if it is not available."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# Program, options, and the program's Debian package.
_MAKERS = {
    "ext4": ("mkfs.ext4", ("-q", "-F", "-m", "0", "-O", "^has_journal"), "e2fsprogs"),
    "ext4-journal": ("mkfs.ext4", ("-q", "-F", "-m", "0"), "e2fsprogs"),
    "xfs": ("mkfs.xfs", ("-q", "-m", "reflink=1"), "xfsprogs"),
    "btrfs": ("mkfs.btrfs", ("-q", "-m", "single"), "btrfs-progs"),
}


@contextmanager
def loop_device(path: Path, *, sector_nbytes: int = 512, read_only: bool = False) -> Iterator[str]:
    """Give the name of a loop device over a file, or skip with the reason."""
    if os.geteuid() != 0 or shutil.which("losetup") is None:
        pytest.skip("needs root and losetup")
    command = ["losetup", "--sector-size", str(sector_nbytes), "--find", "--show", str(path)]
    if read_only:
        command.append("--read-only")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no loop device: {done.stderr.strip()}")
    try:
        yield done.stdout.strip()
    finally:
        subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


@contextmanager
def mounted(device: str | Path, folder: Path, *options: str) -> Iterator[Path]:
    """Mount something, or skip with the reason."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if shutil.which("mount") is None:
        pytest.skip("mount is not installed")
    folder.mkdir()
    command = ["mount", *options, str(device), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"mounting is not possible here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def make_file_system(kind: str, image: Path, nbytes: int) -> Path:
    """Create a file system in a sparse file, or skip."""
    name, options, package = _MAKERS[kind]
    program = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if program is None:
        pytest.skip(f"{name} is not installed (Debian: {package})")
    with open(image, "wb") as file:
        file.truncate(nbytes)
    subprocess.run([program, *options, str(image)], check=True, stdout=subprocess.DEVNULL)
    return image


def leave_free(folder: Path, nbytes: int) -> None:
    """Fill the file system with ballast until about ``nbytes`` are free."""
    ballast = folder / "ballast"
    ballast.unlink(missing_ok=True)
    os.sync()
    status = os.statvfs(folder)
    size = status.f_bavail * status.f_frsize - nbytes
    if size > 0:
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)


def fill_up(folder: Path) -> None:
    """Write until the file system takes nothing more."""
    leave_free(folder, 0)
    with contextlib.suppress(OSError), open(folder / "more", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
