"""A process that changes an image in place, and tells on stdout what it has done.

Its arguments are a path, a seed, a number of changes, and the sizes that the disk may
get.  Each note is a line: ``ready``, then ``begin N`` and ``end N`` for each change.
Once the end of a flush is told, everything before it must survive the process.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence

import imgcore
from tests.faults.update_history import Change, random_changes


def changes_of(seed: int, n_changes: int, nbytes: int, sizes: Sequence[int]) -> list[Change]:
    """Return what the process does to a disk of ``nbytes``."""
    return random_changes(random.Random(seed), n_changes, nbytes, sizes)


def note(*words: object) -> None:
    """Tell something in one call: a killed process leaves no half of a line."""
    os.write(sys.stdout.fileno(), (" ".join(map(str, words)) + "\n").encode())


def main() -> None:
    path, seed, n_changes, *sizes = sys.argv[1:]
    keywords = {"format": "raw"} if path.endswith(".raw") else {}
    image = imgcore.open(path, mode="r+", **keywords)
    nbytes = image.virtual_size
    changes = changes_of(int(seed), int(n_changes), nbytes, [int(size) for size in sizes])
    for change in changes:
        _ = change.data  # which takes a while
    note("ready")
    for number, change in enumerate(changes):
        note("begin", number)
        if change.action == "reopen":
            image.close()
            image = imgcore.open(path, mode="r+", **keywords)
        else:
            change.make(image)
        note("end", number)
    image.close()


if __name__ == "__main__":
    main()
