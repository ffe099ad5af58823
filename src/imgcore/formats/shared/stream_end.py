"""Errors about the end of an image that comes in order."""

from __future__ import annotations

from imgcore.errors import CorruptImageError


def goes_on(path: str, end: int) -> CorruptImageError:
    """Return the error for a stream whose last nonzero byte ends at ``end``."""
    return CorruptImageError(
        f"the stream goes on after the image's end, at {end - 1:#x}, with other bytes than zeros",
        path=path,
        offset=end - 1,
    )


def ends_early(path: str, end: int, needed: int) -> CorruptImageError:
    """Return the error for a stream of ``end`` bytes of which more are needed."""
    return CorruptImageError(
        f"the stream ends too early: after {end} bytes, but {needed} are needed",
        path=path,
        offset=end,
    )
