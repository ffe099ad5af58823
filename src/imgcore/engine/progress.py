"""The progress of a job."""

from __future__ import annotations

from typing import NamedTuple


class Progress(NamedTuple):
    """The progress of a job in bytes of the virtual disk (``written``: of the target).

    The values never decrease.
    """

    done: int
    total: int
    data: int
    zero: int
    written: int
