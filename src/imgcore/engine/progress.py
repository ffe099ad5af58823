"""How far a job is."""

from __future__ import annotations

from typing import NamedTuple


class Progress(NamedTuple):
    """How far a job is, in bytes of the virtual disk (``written``: of the target file).

    No value ever decreases.
    """

    done: int
    total: int
    data: int
    zero: int
    written: int
