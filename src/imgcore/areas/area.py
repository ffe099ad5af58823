"""A changed area of a disk."""

from __future__ import annotations

from typing import NamedTuple


class Area(NamedTuple):
    """A range of the virtual disk that has changed, or may have.

    Attributes
    ----------
    offset, length : int
        Bytes.
    is_zero : bool
        The range reads as zeros now, so its content need not be copied.
    """

    offset: int
    length: int
    is_zero: bool
