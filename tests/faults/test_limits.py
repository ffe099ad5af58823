"""Verbs that write in place meet real limits: the size of a file, and a full disk.

Both also cut a write short before the next one fails.  The command says in one line
what stopped it, the images stay sound, and the same command then succeeds.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import imgcore
from tests.helpers.chains import FORMATS, MIB, chain, child, content_of, disks
from tests.helpers.mounts import leave_free, make_file_system, mounted

DISK_NBYTES = 3 * MIB
STEPS = 3
# What ext4 needs for the file that fills it.
_BALLAST_TABLES_NBYTES = 64 * 1024
SCRIPT = """
import sys, imgcore
path, source, format = sys.argv[1:]
data = open(source, "rb").read()
try:
    imgcore.apply(path, ((at, data[at:at + 65536]) for at in range(0, len(data), 65536)),
                  flush_every="256k", format=format)
except OSError as error:
    sys.exit(f"imgcore: {error.filename}: {error.strerror}")
"""


class Disks(NamedTuple):
    """What the overlay, its base, and another disk have."""

    base: bytes
    top: bytes
    other: bytes


class Place(NamedTuple):
    """A folder with a base, an overlay if the format has any, and another disk beside.

    Attributes
    ----------
    folder, base, top, other : Path
    disks : Disks
    """

    folder: Path
    base: Path
    top: Path
    other: Path
    disks: Disks


class Verb(NamedTuple):
    """A command, and what must be true after it has failed, and after it is done."""

    words: Callable[[Place], list[str | Path]]
    failed: Callable[[Place], None]
    done: Callable[[Place], None]
    formats: tuple[str, ...] = FORMATS


def is_old_or_new(place: Place) -> None:
    """Fail unless each sector of the base is as it was, or as the other disk has it."""
    found, old, new = (
        np.frombuffer(content, np.uint8).reshape(-1, 512)
        for content in (content_of(place.base), place.disks.base, place.disks.other)
    )
    is_right = (found == old).all(axis=1) | (found == new).all(axis=1)
    assert is_right.all(), f"the sectors {np.flatnonzero(~is_right)[:9]} are neither"


def is_other(place: Place) -> None:
    assert content_of(place.base) == place.disks.other


def reads_as_before(place: Place) -> None:
    if (place.folder / f"{place.top.name}.imgcore-commit").exists():
        # The base has changed, and the link to it has not: the same command mends that.
        return
    assert content_of(place.top) == place.disks.top


def is_merged(place: Place) -> None:
    reads_as_before(place)
    assert content_of(place.base) == place.disks.top


def is_not_resized(place: Place) -> None:
    assert content_of(place.base) == place.disks.base


def is_resized(place: Place) -> None:
    with imgcore.open(place.base) as image:
        assert image.virtual_size > DISK_NBYTES
        assert image.read(0, DISK_NBYTES) == place.disks.base


def has_snapshots(place: Place, *names: str) -> None:
    is_not_resized(place)
    assert [snapshot.name for snapshot in imgcore.snapshots(place.base)] == [*names]


IMGCORE = [sys.executable, "-m", "imgcore"]
EVERY = ("raw", *FORMATS)
VERBS = {
    "apply": Verb(
        lambda p: [sys.executable, "-c", SCRIPT, p.base, p.other, p.base.suffix[1:]],
        is_old_or_new,
        is_other,
        EVERY,
    ),
    "sync": Verb(
        lambda p: [*IMGCORE, "sync", "-f", "raw", "-F", p.base.suffix[1:], p.other, p.base],
        is_old_or_new,
        is_other,
        EVERY,
    ),
    "commit": Verb(lambda p: [*IMGCORE, "commit", "-q", p.top], reads_as_before, is_merged),
    "flatten": Verb(lambda p: [*IMGCORE, "flatten", "-q", p.top], reads_as_before, reads_as_before),
    "rebase": Verb(
        lambda p: [*IMGCORE, "rebase", "-q", "-b", "", p.top],
        reads_as_before,
        reads_as_before,
        ("qcow2",),
    ),
    "resize": Verb(
        lambda p: [*IMGCORE, "resize", "-f", p.base.suffix[1:], p.base, "+700G"],
        is_not_resized,
        is_resized,
        EVERY,
    ),
    "snapshot": Verb(
        lambda p: [*IMGCORE, "snapshot", "-c", "new", p.base],
        partial(has_snapshots),
        lambda p: has_snapshots(p, "new"),
        ("qcow2",),
    ),
}


class Limited:
    """A folder in which commands run out of space."""

    def __init__(self, folder: Path, *, by_size: bool) -> None:
        self.folder = folder
        self._by_size = by_size

    def used(self) -> int:
        if self._by_size:
            return max(path.stat().st_size for path in self.folder.iterdir())
        return sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())

    def run(self, words: list[str | Path], free: int | None) -> subprocess.CompletedProcess[str]:
        """Run a command for which only so much is free."""
        limit = resource.RLIM_INFINITY
        if self._by_size and free is not None:
            limit = self.used() + free
        elif free is not None:
            leave_free(self.folder.parent, max(free, _BALLAST_TABLES_NBYTES))
        try:
            return subprocess.run(
                [*map(str, words)],
                capture_output=True,
                text=True,
                check=False,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            )
        finally:
            (self.folder.parent / "ballast").unlink(missing_ok=True)


@contextmanager
def room(kind: str, tmp_path: Path) -> Iterator[Limited]:
    folder = tmp_path / "room"
    if kind == "file size":
        folder.mkdir()
        yield made(folder, by_size=True)
    elif kind == "tmpfs":
        with mounted("tmpfs", folder, "-t", "tmpfs", "-o", "size=64m"):
            yield made(folder, by_size=False)
    else:
        image = make_file_system(kind, tmp_path / "file system", 64 * MIB)
        with mounted(image, folder, "-o", "loop"):
            yield made(folder, by_size=False)


def made(folder: Path, *, by_size: bool) -> Limited:
    (folder / "images").mkdir()
    return Limited(folder / "images", by_size=by_size)


def prepared(tmp_path: Path, name: str) -> Place:
    """Write the images that are copied into the folder for each run."""
    folder = tmp_path / "prepared"
    folder.mkdir()
    contents = Disks(*disks(7, 3, DISK_NBYTES))
    if name == "raw":
        base = top = child(folder / "0.raw", contents.base, None)
    else:
        base, top = chain(folder, (name, name), contents[:2])
    other = tmp_path / "other.raw"
    other.write_bytes(contents.other)
    return Place(folder, base, top, other, contents)


def copied(original: Place, folder: Path) -> Place:
    for path in folder.iterdir():
        path.unlink()
    for path in original.folder.iterdir():
        subprocess.run(["cp", "--sparse=always", path, folder], check=True)
    base, top = (folder / path.name for path in (original.base, original.top))
    return original._replace(folder=folder, base=base, top=top)


def require_sound(place: Place) -> None:
    for path in {place.base, place.top}:
        if path.suffix != ".raw":
            report = imgcore.check(path)
            assert not report.corruptions, report.problems
    if place.base.suffix == ".qcow2":
        done = subprocess.run(
            ["qemu-img", "check", "-q", place.base], capture_output=True, text=True, check=False
        )
        assert done.returncode in (0, 3), done.stderr


def errors_of(answer: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines of an answer that are no warnings."""
    lines = answer.stderr.splitlines()
    return [line for line in lines if not line.startswith("imgcore: warning: ")]


KINDS = ("file size", "tmpfs", "ext4")
CASES = [
    pytest.param(
        verb,
        name,
        kind,
        marks=() if name == "qcow2" and kind != "ext4" else pytest.mark.slow,
        id=f"{verb}-{name}-{kind}",
    )
    for verb in VERBS
    for name in VERBS[verb].formats
    for kind in KINDS
]


@pytest.mark.parametrize(("verb", "name", "kind"), CASES)
def test_it_can_be_done_again(verb: str, name: str, kind: str, tmp_path: Path) -> None:
    words, failed, done, _ = VERBS[verb]
    with room(kind, tmp_path) as limited:
        original = prepared(tmp_path, name)
        place = copied(original, limited.folder)
        before = limited.used()
        answer = limited.run(words(place), None)
        assert answer.returncode == 0, answer.stderr
        done(place)
        need = max(limited.used() - before, 0)
        for step in range(STEPS):
            place = copied(original, limited.folder)
            answer = limited.run(words(place), need * step // STEPS)
            where = f"{step}/{STEPS} of {need}: {answer}"
            if answer.returncode:
                (line,) = errors_of(answer)
                reason = "File too large" if kind == "file size" else "No space left on device"
                assert answer.returncode == 1, where
                assert line.startswith("imgcore: "), where
                assert reason in line, where
                require_sound(place)
                failed(place)
                answer = limited.run(words(place), None)
                assert answer.returncode == 0, (where, answer)
            require_sound(place)
            done(place)
