"""The values in the columns of extents and placements; needs no NumPy."""

from __future__ import annotations

from enum import IntEnum
from typing import Final, TypeAlias

ExtentRow: TypeAlias = tuple[int, int, int, int, int, int, int]
"""The columns of one extent, in the order of `imgcore.engine.extents.EXTENT_DTYPE`."""


class Kind(IntEnum):
    """How an extent is stored (``enum imgc_extent_kind``).

    Attributes
    ----------
    HOLE
        Not stored in the image: the range reads as the backing file, without one as
        zeros.  Of a chain, only what no layer stores is a HOLE.
    ZERO
        Zeros, stored nowhere; they hide a backing file.
    DATA
        Stored as it is, at ``host_offset``.
    DEFLATE, ZLIB, ZSTD
        Part of one compressed block, which starts at ``host_offset`` and has
        ``host_length`` bytes there.
    """

    HOLE = 0
    ZERO = 1
    DATA = 2
    DEFLATE = 3
    ZLIB = 4
    ZSTD = 5
    # Only when salvaging: not known where.  `imgcore.disk.salvage` makes it ZERO.
    LOST = 6


class BlockState(IntEnum):
    """How a target block was written (``enum imgc_block_state``)."""

    ABSENT = 0
    ZERO = 1
    STORED = 2
    COMPRESSED = 3


# A VMDK grain marker precedes the stored block (IMGC_EXTENT_GRAIN_MARKER).
FLAG_GRAIN_MARKER: Final = 1
# DATA is reflinked without being read (IMGC_EXTENT_UNREAD).
FLAG_UNREAD: Final = 2

# ``flags`` of a LOST extent: its table is damaged (0), or its file is missing or short.
FLAG_NO_FILE: Final = 1
