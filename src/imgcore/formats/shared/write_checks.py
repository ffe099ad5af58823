"""Checks of a request for a new image that several formats make."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imgcore.engine.geometry import ZeroPolicy
from imgcore.errors import OptionError
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from imgcore.formats.api import WriteRequest


def refuse_compression(request: WriteRequest[Any], name: str) -> None:
    """Raise OptionError for ``-c``; ``name`` is the format's name in the message."""
    if request.compress:
        raise OptionError(f"{name} cannot be compressed (-c)")


def refuse_idle(idle: Mapping[str, bool], subformat: str) -> None:
    """Raise OptionError for an option that would have no effect.

    Parameters
    ----------
    idle : mapping of str to bool
        Whether each option that only some subformats have is given without effect.
    subformat : str
        The subformat that is written.
    """
    for name, is_idle in idle.items():
        if is_idle:
            raise OptionError(f"option {name} does not go with subformat={subformat}")


def check_virtual_size(virtual_size: int, at_most: int | None = None) -> None:
    """Raise OptionError unless a size is whole sectors and at most ``at_most``."""
    if virtual_size % SECTOR_NBYTES or virtual_size < 0:
        raise OptionError(f"virtual size {virtual_size} is not a multiple of {SECTOR_NBYTES}")
    if at_most is not None and virtual_size > at_most:
        raise OptionError(f"virtual size {virtual_size} is too large: at most {at_most} bytes")


def refuse_empty_disk(virtual_size: int, name: str) -> None:
    """Raise OptionError for a disk of 0 bytes, which readers of a format reject.

    ``name`` is the format's name in the message.
    """
    if virtual_size == 0:
        raise OptionError(
            f"no program reads a {name} of 0 bytes: at least {SECTOR_NBYTES} are needed, or "
            "another format (qcow2 and raw may be empty)"
        )


def check_block_size(name: str, nbytes: int, low: int, high: int, note: str = "") -> None:
    """Raise OptionError unless option ``name`` is a power of two in [low, high]."""
    if nbytes & (nbytes - 1) or not low <= nbytes <= high:
        raise OptionError(f"{name} is {nbytes}, allowed: powers of two from {low} to {high}{note}")


def parse_uuid(name: str, text: str, *, allow_null: bool = False) -> UUID:
    """Return the UUID in option ``name``; OptionError if it is invalid or all zeros."""
    from uuid import UUID

    expected = "32 hexadecimal digits are needed"
    try:
        value = UUID(text)
    except ValueError:
        raise OptionError(f"{name} is {text[:60]!r}: {expected}") from None
    if not (value.int or allow_null):
        raise OptionError(f"{name} is {text[:60]!r}: {expected}, not all of them zero")
    return value


def zero_policy(
    sparse_nbytes: int, *, has_parent: bool, can_hide_parent: bool = True
) -> ZeroPolicy:
    """Return how a new image represents blocks of zeros.

    Parameters
    ----------
    sparse_nbytes : int
        ``-S``: 0 stores zeros too.
    has_parent : bool
        If so, a block that is left out reads as the parent's.
    can_hide_parent : bool
        Whether a table entry can mark zeros that hide the parent; if not, zeros are
        stored.
    """
    if sparse_nbytes == 0:
        return ZeroPolicy.STORE
    if not has_parent:
        return ZeroPolicy.SKIP
    return ZeroPolicy.EXPLICIT if can_hide_parent else ZeroPolicy.STORE
