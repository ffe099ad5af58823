"""Turns table entries into extents: the code that all formats use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from imgcore._core import CoreError
from imgcore.engine.extents import EXTENT_DTYPE
from imgcore.formats.shared.damage import STRICT, Damage
from imgcore.limits import MIB, SECTOR_NBYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore._core import TableFormat
    from imgcore.engine.extents import Extents
    from imgcore.errors import CorruptImageError
    from imgcore.files.byte_source import ByteSource

# Headers, tables and gaps of an image, besides its blocks.
_PLAUSIBLE_METADATA_NBYTES: Final = 64 * MIB


def decode_entries(
    table: TableFormat,
    entries: NDArray[Any],
    error: Callable[[int], CorruptImageError],
    *,
    guest_offset: int,
    guest_end: int,
    file_nbytes: int,
    file: int = 0,
    damage: Damage = STRICT,
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
    damage : Damage
        If it salvages, an impossible entry becomes a LOST row.  Of a block that starts
        inside the file, only what the file does not have is lost.

    Returns
    -------
    ndarray, shape (m,), dtype EXTENT_DTYPE, m <= n (2n when salvaging)
        Gap-free; adjacent rows that continue each other are joined.
    """
    out = np.empty(len(entries) * (2 if damage.salvages else 1), dtype=EXTENT_DTYPE)
    try:
        count = table.decode(
            entries.view(np.uint8),
            out,
            guest_offset=guest_offset,
            guest_end=guest_end,
            file_nbytes=file_nbytes,
            file=file,
            salvage=damage.salvages,
        )
    except CoreError as refused:
        raise error(refused.offset) from None
    return out[:count]


def last_plausible_sector(file: ByteSource, blocks_nbytes: int) -> int:
    """Return the largest sector number that an undamaged table of an image may have.

    A complete file has hardly more than its blocks, ``blocks_nbytes``; ``file`` may be
    truncated.
    """
    expected = blocks_nbytes + blocks_nbytes // 8 + _PLAUSIBLE_METADATA_NBYTES
    return max(file.nbytes, expected) // SECTOR_NBYTES


def in_damaged_sectors(
    nonsense: NDArray[np.bool_], is_used: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Tell which 32-bit entries are in a sector of the table that was overwritten.

    An entry that is a sector number is plausible by chance if the file is large.  The
    entries beside it are not: a sector with much nonsense is not trusted at all.

    Parameters
    ----------
    nonsense, is_used : ndarray, shape (n,), dtype bool
        Which entries no image of this size has, and which are not absent.  The first
        one starts a sector of the table.
    """
    per_sector = SECTOR_NBYTES // 4
    firsts = np.arange(0, len(nonsense), per_sector)
    if not len(firsts):
        return nonsense
    n_nonsense = np.add.reduceat(nonsense.astype(np.int64), firsts)
    n_used = np.add.reduceat(is_used.astype(np.int64), firsts)
    damaged = (n_nonsense > 1) & (4 * n_nonsense >= n_used)
    return np.repeat(damaged, per_sector)[: len(nonsense)]
