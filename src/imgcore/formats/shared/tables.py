"""Table entries to extents: what all formats do around the table kernel."""

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
    """Return what neighbouring entries of a table describe.

    Parameters
    ----------
    table : TableFormat
    entries : ndarray, shape (n,), C-contiguous
        One element an entry, in the byte order of the file.
    error : callable
        Gets the index of an entry that is not possible, and returns what is raised for it.
    guest_offset, guest_end : int
        Bytes of the disk: where the first entry's block starts, and where the last one is cut.
    file_nbytes : int
        No block may end behind it.
    file : int
        Index in ``Reader.sources``.

    Returns
    -------
    ndarray, shape (m,), dtype EXTENT_DTYPE, m <= n
        Gap-free; neighbours that join are one row.
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
