"""What a case of the hostile set is: an image made to harm, and what has to come of it."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import NamedTuple

# Stands in files outside the image's folder; never in an output or a message.
CANARY = b"canary:2f6c1f7b-may-not-be-read"
SECTOR = 512


class Stage(Enum):
    """Where the trouble is, and so which verbs meet it."""

    OPEN = "open"  # every verb
    CHAIN = "chain"  # verbs that open the parent: map, measure, convert
    INFO = "info"  # a table that only info reads
    TABLES = "tables"  # a table of the disk: map, measure, convert; check at its discretion
    DATA = "data"  # a compressed block, or bytes that are missing: convert
    STREAM = "stream"  # content of a compressed disk: convert, others at their discretion
    CHECK = "check"  # the content is what it is: only check has something to say
    NONE = "none"


class Case(NamedTuple):
    """One image.

    ``make`` writes it into a folder of its own and returns its path; ``error`` and ``word`` are the
    exception's class and a part of its message.  ``content`` is what the disk reads as where it can
    be read; None if that is too large to convert.  ``target`` is the format it is converted to.
    """

    name: str
    make: Callable[[Path], Path]
    error: str | None
    word: str = ""
    stage: Stage = Stage.OPEN
    content: bytes | None = None
    target: str = "raw"

    def fails(self, verb: str) -> bool:
        """Tell whether a verb has to end with the error."""
        return verb in _FAILING[self.stage]

    def may_fail(self, verb: str) -> bool:
        """Tell whether a verb may end with any error of imgcore's instead of success."""
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
    """Return bytes that differ from sector to sector."""
    pieces = (b"%08x:%08x " % (seed, n) * 29 for n in range(-(-nbytes // SECTOR)))
    return b"".join(piece.ljust(SECTOR, b".")[:SECTOR] for piece in pieces)[:nbytes]
