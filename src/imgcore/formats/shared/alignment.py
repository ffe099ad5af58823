"""Rounding places and lengths up."""

from __future__ import annotations


def align_up(nbytes: int, unit: int) -> int:
    """Return the first multiple of ``unit`` from ``nbytes`` on."""
    return -(-nbytes // unit) * unit
