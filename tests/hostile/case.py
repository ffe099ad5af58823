"""A case of the hostile set: an image made to harm, and the outcome expected."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import NamedTuple

# In files outside the image's folder; it must never appear in an output or a message.
CANARY = b"canary:2f6c1f7b-may-not-be-read"
SECTOR = 512


class Stage(Enum):
    """Where the damage is, and so which verbs find it."""

    OPEN = "open"  # every verb
    CHAIN = "chain"  # verbs that open the parent: map, measure, convert
    INFO = "info"  # a table that only info reads
    TABLES = "tables"  # a table of the disk: map, measure, convert; check may fail
    DATA = "data"  # a compressed block, or bytes that are missing: convert
    STREAM = "stream"  # content of a compressed disk: convert; others may fail
    CHECK = "check"  # the content is valid: only check reports something
    NONE = "none"


class Case(NamedTuple):
    """One image.

    ``make`` writes it into a new folder and returns its path.  ``error`` and ``word``
    are the exception's class and a part of its message.  ``content`` is the content of
    a disk that can be read; None if it is too large to convert.  ``target`` is the
    format that the image is converted to.
    """

    name: str
    make: Callable[[Path], Path]
    error: str | None
    word: str = ""
    stage: Stage = Stage.OPEN
    content: bytes | None = None
    target: str = "raw"

    def fails(self, verb: str) -> bool:
        """Tell whether a verb must end with the error."""
        return verb in _FAILING[self.stage]

    def may_fail(self, verb: str) -> bool:
        """Tell whether a verb may end with any error of imgcore instead of success."""
        return self.stage is Stage.STREAM or (verb == "check" and self.stage is not Stage.OPEN)


_DISK_VERBS = frozenset({"map", "measure", "convert"})
_FAILING = {
    Stage.OPEN: _DISK_VERBS | {"info", "check"},
    Stage.CHAIN: _DISK_VERBS,
    Stage.INFO: frozenset({"info"}),
    Stage.TABLES: _DISK_VERBS,
    Stage.DATA: frozenset({"convert"}),
    Stage.STREAM: frozenset({"convert"}),
    Stage.CHECK: frozenset[str](),
    Stage.NONE: frozenset[str](),
}


def pattern(nbytes: int, seed: int = 0) -> bytes:
    """Return bytes that differ in each sector."""
    pieces = (b"%08x:%08x " % (seed, n) * 29 for n in range(-(-nbytes // SECTOR)))
    return b"".join(piece.ljust(SECTOR, b".")[:SECTOR] for piece in pieces)[:nbytes]
