"""Rounds offsets and lengths up."""

from __future__ import annotations


def align_up(nbytes: int, unit: int) -> int:
    """Return ``nbytes``, rounded up to a multiple of ``unit``."""
    return -(-nbytes // unit) * unit
