"""Sizes as people write them: ``10G`` in, ``10 GiB`` out."""

from __future__ import annotations

import re
from typing import Final

from imgcore.errors import OptionError

_UNITS: Final = "BKMGTPE"
_SIZE: Final = r"(?ai)(\d+(?:\.\d+)?)\s*(?:([KMGTPE])(?:iB)?|B)?"

# The kernel's offsets are signed 64-bit integers.
MAX_SIZE: Final = (1 << 63) - 1


def parse_size(text: str) -> int:
    """Return the number of bytes that a text states: ``10G``, ``1.5T`` or ``512``.

    Parameters
    ----------
    text : str
        A decimal number, which may have a fraction, and an optional binary unit
        ``K M G T P E`` in either case, which ``iB`` may follow; or a hexadecimal number
        of bytes (``0x200``).

    Returns
    -------
    int
        Bytes; a fraction of a byte is dropped.

    Raises
    ------
    OptionError
        The text is not such a number, or the number exceeds 2**63 - 1.
    """
    stripped = text.strip()
    if stripped.isascii() and stripped.isdigit() and len(stripped) <= 64:
        nbytes = int(stripped)
    elif re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}", stripped):
        nbytes = int(stripped, 16)
    else:
        match = re.fullmatch(_SIZE, stripped) if len(stripped) <= 64 else None
        if match is None:
            raise OptionError(
                f"invalid size {text[:64]!r}: expected a number of bytes, "
                "optionally with K, M, G, T, P or E"
            )
        shift = 10 * _UNITS.index((match[2] or "B").upper())
        whole, _, fraction = match[1].partition(".")
        nbytes = (int(whole + fraction) << shift) // 10 ** len(fraction)
    if nbytes > MAX_SIZE:
        raise OptionError(f"size {text[:64]!r} is too large: at most 2^63 - 1 bytes")
    return nbytes


def format_size(nbytes: int) -> str:
    """Return bytes with three digits in the largest fitting binary unit.

    Parameters
    ----------
    nbytes : int
        Bytes, not negative.

    Returns
    -------
    str
        For example ``512 B``, ``64 KiB`` or ``1.46 TiB``.
    """
    power = 0
    value = float(nbytes)
    # Values from 999.5 would take four digits.
    while value >= 999.5 and power < len(_UNITS) - 1:
        value /= 1024
        power += 1
    unit = "B" if power == 0 else f"{_UNITS[power]}iB"
    return f"{value:.3g} {unit}"
