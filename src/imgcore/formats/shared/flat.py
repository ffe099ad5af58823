"""Disks that lie in a host file as they are: raw, flat extents, fixed images.

NumPy is imported only once a disk is planned, so that ``info`` starts fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.engine.geometry import Geometry, Placing, ZeroPolicy
from imgcore.limits import KIB, MAX_BATCH_ROWS, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource

# Blocks of the target: whole ones of zeros are skipped, in others zeros of -S bytes are.
_MIN_BLOCK_NBYTES: Final = 64 * KIB
_MAX_BLOCK_NBYTES: Final = 2 * MIB


def plan_flat(
    file: ByteSource, file_offset: int, start: int, stop: int, guest_base: int, file_index: int
) -> Iterator[Extents]:
    """Yield batches for guest range [start, stop) of a flat extent.

    Parameters
    ----------
    file : ByteSource
        Where the extent is.
    file_offset, guest_base : int
        Bytes: where the extent's first byte lies in the file, and on the disk.
    start, stop : int
        Bytes of the disk, ``start < stop``, inside the extent.
    file_index : int
        Of the file in the reader's sources.

    Notes
    -----
    Holes of the host's file are explicit zeros: a flat extent hides its parent everywhere.
    """
    import numpy as np

    from imgcore.engine.extents import EXTENT_DTYPE, Kind

    rows: list[tuple[int, int, int, int, int, int, int]] = []
    shift = file_offset - guest_base
    position = start
    while position < stop:
        data_start, data_end = file.next_data(position + shift)
        if data_start >= data_end:
            data_start = data_end = stop + shift
        data_start = min(max(data_start - shift, position), stop)
        data_end = min(max(data_end - shift, data_start), stop)
        if position < data_start:
            rows.append((position, data_start - position, 0, 0, 0, int(Kind.ZERO), 0))
        if data_start < data_end:
            length = data_end - data_start
            rows.append(
                (data_start, length, data_start + shift, length, file_index, int(Kind.DATA), 0)
            )
        position = data_end
        if len(rows) >= MAX_BATCH_ROWS - 1:
            yield np.array(rows, dtype=EXTENT_DTYPE)
            rows.clear()
    if rows:
        yield np.array(rows, dtype=EXTENT_DTYPE)


def flat_geometry(guest_nbytes: int, sparse_nbytes: int, *, host_base: int = 0) -> Geometry:
    """Return the geometry of a new file in which every guest byte has its place.

    Parameters
    ----------
    guest_nbytes : int
        Bytes of the disk.
    sparse_nbytes : int
        Bytes: ``-S``; 0 writes zeros too.
    host_base : int
        Where guest byte 0 lies in the file.
    """
    # A block of zeros is skipped whole, so it must not be smaller than -S.
    wanted = 1 << max(sparse_nbytes - 1, 0).bit_length()
    return Geometry(
        block_nbytes=min(max(wanted, _MIN_BLOCK_NBYTES), _MAX_BLOCK_NBYTES),
        guest_nbytes=guest_nbytes,
        placing=Placing.IDENTITY,
        zero_policy=ZeroPolicy.SKIP if sparse_nbytes else ZeroPolicy.STORE,
        host_base=host_base,
        sparse_nbytes=sparse_nbytes,
    )
