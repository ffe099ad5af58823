"""The verbs that change a chain of images in place, as they are called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Images(NamedTuple):
    """A chain of two images, another disk, and what the disk is."""

    base: Path
    top: Path
    other: Path
    content: bytes


Call = Callable[[Images], dict[str, Any]]
CALLS: dict[str, Call] = {
    "commit": lambda made: {"image": made.top},
    "rebase": lambda made: {
        "image": made.top,
        "backing": made.other.name,
        "backing_format": made.other.suffix[1:],
    },
    "flatten": lambda made: {"image": made.top},
    "sync": lambda made: {"image": made.other, "target": made.base},
}
