"""A tiny format without blocks: what it needs of a conversion in place, and no more."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from imgcore.files.in_place import InPlace
from imgcore.files.in_place_job import Job
from imgcore.files.staged_file import Change, StagedFile

SIZE = 1 << 20
FRONT = 1 << 16
OLD = random.Random(1).randbytes(SIZE)


def rewrite(
    path: Path,
    *,
    name: str | None = "disk.new",
    created: Mapping[str, bytes] | None = None,
    removed: Sequence[str] = (),
    commit: bool = True,
) -> Path:
    """Move the front to the end, and write a header and a table."""
    old = path.read_bytes()
    with InPlace(path) as job:
        file = job.start({"to": "new"}, [(0, FRONT)], name=name, created=created, removed=removed)
        file.pwrite(len(old), old[:FRONT])
        file.pwrite(len(old) + FRONT, b"table" * 1000)
        file.pwrite(0, b"header" * 200)
        file.clear_rest(FRONT)
        file.truncate(len(old) + 2 * FRONT)
        assert path.read_bytes()[: len(old)] == old
        if commit:
            job.commit()
    return Path(job.path)


def new_content() -> bytes:
    """Return what `OLD` becomes."""
    table = (b"table" * 1000).ljust(FRONT, b"\0")
    return (b"header" * 200).ljust(FRONT, b"\0") + OLD[FRONT:] + OLD[:FRONT] + table


# What is never reached if a conversion is killed after each record.
_NEXT_STEP = {
    "begin": (StagedFile, "pwrite"),
    "appended": (InPlace, "commit"),
    "armed": (Change, "apply"),
    "done": (Job, "_rename"),
}


def killed_after(record: str, path: Path, job: Callable[[Path], object] = rewrite) -> None:
    """Convert in a process that dies after it has written a record."""
    child = os.fork()
    if child == 0:
        try:
            where, name = _NEXT_STEP[record]
            setattr(where, name, lambda *_args, **_more: os._exit(0))
            job(path)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
