"""Finds how much of an image can stay in blocks of a size, and the best size."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from imgcore.formats.shared.staying_blocks import staying_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.formats.api import BlockRule, Survey


class Amounts(NamedTuple):
    """Bytes of an image's data: those that stay in their file, and the others."""

    stay_nbytes: int
    move_nbytes: int


def amounts(survey: Survey, rule: BlockRule | None, virtual_size: int) -> Amounts:
    """Return how much of an image can stay under a format's rule."""
    data_nbytes = int(survey.rows["length"].sum())
    if rule is None:
        return Amounts(data_nbytes, 0)
    runs = staying_blocks(survey, rule, virtual_size)
    nbytes = rule.block_nbytes
    starts, ends = runs.first_block * nbytes, (runs.first_block + runs.n_blocks) * nbytes
    stay = _data_between(survey.rows, starts, ends) + _compressed(survey.rows, rule, virtual_size)
    return Amounts(stay, data_nbytes - stay)


def best_block_size(found: Mapping[int, Amounts], preferred: int | None = None) -> int:
    """Return the block size at which most stays: of several, the largest.

    Parameters
    ----------
    found : mapping of int to Amounts
        The amounts for each block size that the format can have.
    preferred : int, optional
        This one, if no other keeps more.
    """
    most = max(item.stay_nbytes for item in found.values())
    if preferred is not None and preferred in found and found[preferred].stay_nbytes == most:
        return preferred
    return max(size for size, item in found.items() if item.stay_nbytes == most)


def _data_between(rows: Extents, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> int:
    """Return the bytes of rows in ascending ranges of the disk."""
    if not len(rows):
        return 0
    guest, length = rows["guest_offset"].astype(np.int64), rows["length"].astype(np.int64)
    before = np.cumsum(length) - length

    def data_before(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        row = np.maximum(np.searchsorted(guest, offsets, side="right") - 1, 0)
        inside: NDArray[np.int64] = np.clip(offsets - guest[row], 0, length[row])
        return before[row] + inside

    return int((data_before(ends) - data_before(starts)).sum())


def _compressed(rows: Extents, rule: BlockRule, virtual_size: int) -> int:
    """Return the bytes of the disk in compressed blocks that can stay."""
    kinds = np.array(sorted(rule.takes_compressed), dtype=rows["kind"].dtype)
    own = rows[np.isin(rows["kind"], kinds)]
    guest, length = own["guest_offset"].astype(np.int64), own["length"].astype(np.int64)
    is_block = guest % rule.block_nbytes == 0
    is_block &= length == np.minimum(rule.block_nbytes, virtual_size - guest)
    return int(length[is_block].sum())
