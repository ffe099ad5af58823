"""Turns table entries into extents: the code that all formats use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from imgcore._core import CoreError
from imgcore.engine.extents import EXTENT_DTYPE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore._core import TableFormat
    from imgcore.engine.extents import Extents
    from imgcore.errors import CorruptImageError


def decode_entries(
    table: TableFormat,
    entries: NDArray[Any],
    error: Callable[[int], CorruptImageError],
    *,
    guest_offset: int,
    guest_end: int,
    file_nbytes: int,
    file: int = 0,
) -> Extents:
    """Return the extents that neighbouring entries of a table describe.

    Parameters
    ----------
    table : TableFormat
    entries : ndarray, shape (n,), C-contiguous
        One element for each entry, in the byte order of the file.
    error : callable
        Takes the index of an impossible entry and returns the exception to raise.
    guest_offset, guest_end : int
        Where the first entry's block starts, and where the last one is cut, in bytes.
    file_nbytes : int
        Size of the file; no block may end after it.
    file : int
        Index in ``Reader.sources``.

    Returns
    -------
    ndarray, shape (m,), dtype EXTENT_DTYPE, m <= n
        Gap-free; adjacent rows that continue each other are joined.
    """
    out = np.empty(len(entries), dtype=EXTENT_DTYPE)
    try:
        count = table.decode(
            entries.view(np.uint8),
            out,
            guest_offset=guest_offset,
            guest_end=guest_end,
            file_nbytes=file_nbytes,
            file=file,
        )
    except CoreError as refused:
        raise error(refused.offset) from None
    return out[:count]
