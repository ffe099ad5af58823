"""What a writer asks of the engine: where blocks go, and in what shape."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Placing(IntEnum):
    """Where a block's data goes (``enum imgc_placing``)."""

    IDENTITY = 0
    APPEND = 1


class ZeroPolicy(IntEnum):
    """What becomes of a block of zeros (``enum imgc_zero_policy``)."""

    SKIP = 0
    EXPLICIT = 1
    STORE = 2


class Prefix(IntEnum):
    """What stands before each compressed block (``enum imgc_prefix``)."""

    NONE = 0
    GRAIN_MARKER = 1


class CodecId(IntEnum):
    """Compression of target blocks (``enum imgc_codec``)."""

    NONE = 0
    DEFLATE = 1
    ZLIB = 2
    ZSTD = 3


class DeflateEngine(IntEnum):
    """Which library deflates, or that a sample decides (``enum imgc_deflate_engine``)."""

    ISAL = 0
    LIBDEFLATE = 1
    SAMPLED = 2


class Codec(NamedTuple):
    """Compression of target blocks (``struct imgc_codec_params``).

    ``window_bits`` is 12 (ISA-L only) to 15; ``engine`` and ``window_bits`` mean nothing to zstd.
    """

    codec: CodecId = CodecId.NONE
    engine: DeflateEngine = DeflateEngine.ISAL
    level: int = 0
    window_bits: int = 15


class Geometry(NamedTuple):
    """What a writer asks of the engine (``struct imgc_geometry``); sizes in bytes.

    With IDENTITY, guest byte ``guest_base`` lies at ``host_base``, and the rest behind it.
    With APPEND, blocks are placed in guest order at the next free offset, STORED ones at
    ``stored_alignment``, COMPRESSED ones at ``compressed_alignment``; after the last placed
    block of each group of ``group_nblocks`` blocks, ``group_gap_nbytes`` stay free, from the
    next multiple of 512 on, for the format's table.  ``stored_prefix_nbytes`` bytes (up to
    1 MiB) of the value ``stored_prefix_byte`` stand directly before the data of each STORED
    block, which is what is aligned and what a placement is about; blocks are not compressed then.
    """

    block_nbytes: int
    guest_nbytes: int
    placing: Placing = Placing.APPEND
    zero_policy: ZeroPolicy = ZeroPolicy.SKIP
    guest_base: int = 0
    host_base: int = 0
    stored_alignment: int = 512
    compressed_alignment: int = 512
    prefix: Prefix = Prefix.NONE
    store_incompressible: bool = False
    codec: Codec = Codec()
    sparse_nbytes: int = 4096
    group_nblocks: int = 0
    group_gap_nbytes: int = 0
    stored_prefix_nbytes: int = 0
    stored_prefix_byte: int = 0xFF

    @property
    def unit_nbytes(self) -> int:
        """Where batches may end: whole blocks, or groups of blocks with a table of their own."""
        return self.block_nbytes * max(self.group_nblocks, 1)
