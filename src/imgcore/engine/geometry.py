"""The geometry of a target: how the engine places and stores its blocks."""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Final, NamedTuple

# A batch has at most this many blocks or leaves: 2^17 placements are 2 MiB.
_MAX_BATCH_BLOCKS: Final = 1 << 17


class Placing(IntEnum):
    """Where a block's data goes (``enum imgc_placing``)."""

    IDENTITY = 0
    APPEND = 1


class ZeroPolicy(IntEnum):
    """How a block of zeros is written (``enum imgc_zero_policy``)."""

    SKIP = 0
    EXPLICIT = 1
    STORE = 2


class Prefix(IntEnum):
    """What precedes each compressed block (``enum imgc_prefix``)."""

    NONE = 0
    GRAIN_MARKER = 1


class Reuse(IntEnum):
    """What becomes of blocks that a source stores compressed (``enum imgc_reuse``).

    REUSE takes those over that need another wrapper at most, and compresses the others;
    ONLY stores the others plain.
    """

    NONE = 0
    REUSE = 1
    ONLY = 2


class CodecId(IntEnum):
    """Compression of target blocks (``enum imgc_codec``)."""

    NONE = 0
    DEFLATE = 1
    ZLIB = 2
    ZSTD = 3


class DeflateEngine(IntEnum):
    """Which library deflates; SAMPLED: chosen for each block by a sample.

    ``enum imgc_deflate_engine``.
    """

    ISAL = 0
    LIBDEFLATE = 1
    SAMPLED = 2


class Codec(NamedTuple):
    """Compression of target blocks (``struct imgc_codec_params``).

    ``window_bits`` is 12 (ISA-L only) to 15.  zstd ignores ``engine`` and
    ``window_bits``.
    """

    codec: CodecId = CodecId.NONE
    engine: DeflateEngine = DeflateEngine.ISAL
    level: int = 0
    window_bits: int = 15


class Geometry(NamedTuple):
    """How the engine places and stores a target's blocks (``struct imgc_geometry``).

    Sizes are in bytes.

    With IDENTITY, guest byte ``guest_base`` is at ``host_base``, and the others follow.

    With APPEND, blocks are placed in guest order at the next free offset: STORED ones
    at multiples of ``stored_alignment``, COMPRESSED ones at multiples of
    ``compressed_alignment``.  After the last placed block of each group of
    ``group_nblocks`` blocks, ``group_gap_nbytes`` from the next multiple of 512 stay
    free for the format's table.

    ``stored_prefix_nbytes`` (up to 1 MiB) of the value ``stored_prefix_byte`` directly
    precede the data of each STORED block.  Alignment and placement refer to the data,
    not to the prefix.  A geometry with such a prefix has no codec.

    ``clears_blocks`` is for a target that has old bytes where blocks will be: what of a
    STORED block is not written is zeroed.  ``sparse_nbytes`` is 0 then.

    ``reuse`` is for a geometry with a codec.

    With ``packs_in_order`` the offsets of blocks ascend.  Otherwise, where STORED and
    COMPRESSED blocks mix, one of the latter may fill up what is free before a STORED
    block.

    ``leaf_nbytes`` is not for the engine: if it is not 0, batches also start at
    multiples of it, and each leaf of a checksum is in one of them.

    ``is_ordered`` is not for the engine either: a batch has one group then, whose table
    is written before the next group.  Nor is ``moved_end``: data before this offset of
    the disk may go into a pipe as pages of its files.  Nor is ``step_nbytes``: batches
    end at its multiples, where a writer may put tables between the data, so that their
    places do not depend on other ends of batches.
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
    clears_blocks: bool = False
    reuse: Reuse = Reuse.NONE
    packs_in_order: bool = False
    leaf_nbytes: int = 0
    is_ordered: bool = False
    moved_end: int = 0
    step_nbytes: int = 0

    @property
    def over_old_bytes(self) -> Geometry:
        """The same for a target that keeps old bytes where nothing is written."""
        if self.placing is Placing.APPEND:
            return self._replace(sparse_nbytes=0, clears_blocks=True)
        if self.zero_policy is ZeroPolicy.SKIP:
            return self._replace(sparse_nbytes=0, zero_policy=ZeroPolicy.EXPLICIT)
        return self

    @property
    def unit_nbytes(self) -> int:
        """The unit of a batch: a block, or a group of blocks that has its own table.

        It has whole leaves as well.
        """
        group_nbytes = self.block_nbytes * max(self.group_nblocks, 1)
        return math.lcm(group_nbytes, self.leaf_nbytes or 1)

    @property
    def max_batch_nbytes(self) -> int:
        """The most bytes of a batch: whole units.  It bounds placements and leaves."""
        unit = self.unit_nbytes
        if self.is_ordered and self.group_nblocks:
            return unit
        smallest = min(self.block_nbytes, self.leaf_nbytes or self.block_nbytes)
        return max(unit, _MAX_BATCH_BLOCKS * smallest // unit * unit)
