"""Writes tables that are mostly zeros, so that the zeros take no space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.files.target_file import TargetFile

# Pieces of this size that hold only zeros stay holes.
_HOLE_NBYTES: Final = 4096


def write_with_holes(file: TargetFile, offset: int, table: NDArray[np.uint64]) -> None:
    """Write a table into a hole of a file; long runs of zeros stay holes.

    Parameters
    ----------
    file : TargetFile
    offset : int
        Host offset in bytes.
    table : ndarray, dtype uint64, C-contiguous
        In the byte order of the file.
    """
    octets = table.view(np.uint8)
    whole = octets.size // _HOLE_NBYTES
    pieces = octets[: whole * _HOLE_NBYTES].view(np.uint64).reshape(whole, _HOLE_NBYTES // 8)
    used = np.append(pieces.any(axis=1), octets.size > whole * _HOLE_NBYTES)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], used, [False])))).tolist()
    for first, last in zip(edges[::2], edges[1::2], strict=True):
        file.pwrite(
            offset + first * _HOLE_NBYTES, octets[first * _HOLE_NBYTES : last * _HOLE_NBYTES]
        )
