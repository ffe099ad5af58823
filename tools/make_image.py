"""Makes a raw ext4 image from installed files, without mounting.

    tools/make_image.py TARGET MEBIBYTES [FOLDER...]

The order of the files depends on their names only, so a machine always makes the same
content.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

DEFAULT_FOLDERS = ("/usr/lib", "/usr/share", "/usr/bin", "/usr/include")
# (share of the image for files, bytes for each inode).  The rest is for ext4's journal,
# inode tables, bitmaps and directories, which take a larger share of a small image, or
# with many small files.  If a row does not fit, the next is tried.
ATTEMPTS = ((0.91, 16384), (0.8, 16384), (0.6, 16384), (0.6, 4096))
MAX_FILE_NBYTES = 64 << 20


def regular_files(folders: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Yield (path, size in bytes) of plain files, without following links."""
    for top in folders:
        for folder, _, names in os.walk(top):
            for name in names:
                path = os.path.join(folder, name)
                status = os.lstat(path)
                if stat.S_ISREG(status.st_mode) and 0 < status.st_size <= MAX_FILE_NBYTES:
                    yield path, status.st_size


def choose(folders: Sequence[str], budget: int) -> list[str]:
    """Return files that fill ``budget`` bytes, in the order of their names' hashes."""
    found = sorted(
        regular_files(folders), key=lambda row: hashlib.sha256(os.fsencode(row[0])).digest()
    )
    chosen: list[str] = []
    for path, nbytes in found:
        rounded = -(-nbytes // 4096) * 4096
        if rounded <= budget:
            budget -= rounded
            chosen.append(path)
    return chosen


def stage(paths: Sequence[str], folder: Path) -> None:
    """Copy files under ``folder``, keeping their paths."""
    for path in paths:
        target = folder / path.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(path, target)
        except PermissionError:
            continue


def make_image(target: Path, virtual_size: int, folders: Sequence[str] = DEFAULT_FOLDERS) -> None:
    """Write an ext4 file system of ``virtual_size`` bytes with installed files."""
    program = shutil.which("mke2fs", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if program is None:
        raise SystemExit("make_image: mke2fs was not found: install e2fsprogs")
    for share, inode_nbytes in ATTEMPTS:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".stage-") as name:
            stage(choose(folders, int(virtual_size * share)), Path(name))
            target.unlink(missing_ok=True)
            options = ["-q", "-F", "-t", "ext4", "-m", "0"]
            options += ["-i", str(inode_nbytes), "-d", name]
            words = [program, *options, str(target), f"{virtual_size // 1024}k"]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
    target.unlink(missing_ok=True)
    raise SystemExit(f"make_image: {done.stderr.strip() or 'mke2fs failed'}")


def main() -> None:
    """Run the command line."""
    if len(sys.argv) < 3:
        raise SystemExit("usage: make_image.py TARGET MEBIBYTES [FOLDER...]")
    target, mebibytes, *folders = sys.argv[1:]
    make_image(Path(target), int(mebibytes) << 20, folders or DEFAULT_FOLDERS)


if __name__ == "__main__":
    main()
