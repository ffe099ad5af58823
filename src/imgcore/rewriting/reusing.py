"""Finds the compressed blocks of an image that a table of another format can name.

A block may stay where it is although its wrapper is another one: an entry then points
behind a grain's marker and zlib's header, with a length that leaves out the checksum.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore._core import File, Job
from imgcore.engine.batches import cut_batches
from imgcore.engine.extents import FLAG_GRAIN_MARKER, PLACEMENT_DTYPE, BlockState, Kind
from imgcore.engine.geometry import Codec, CodecId, DeflateEngine, Geometry, Reuse
from imgcore.engine.job import chosen_variants, thread_count, translated_errors
from imgcore.engine.source_file import native_sources
from imgcore.engine.thread_budget import Lease
from imgcore.rewriting.layout import with_wrappers
from imgcore.rewriting.moving import gap_free, in_pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.disk.image import Image
    from imgcore.engine.extents import Extents, Placements
    from imgcore.formats.api import Survey

_BATCH_BLOCKS: Final = 1 << 16
_MARKER_NBYTES: Final = 12
_ZLIB_HEADER_NBYTES: Final = 2
# Only the codec counts: nothing is compressed.
_CODECS: Final = {
    Kind.DEFLATE: Codec(CodecId.DEFLATE, DeflateEngine.LIBDEFLATE, 1),
    Kind.ZSTD: Codec(CodecId.ZSTD, level=1),
}


def verify_blocks(
    image: Image, survey: Survey, taken: frozenset[Kind], *, trust_blocks: bool
) -> Survey:
    """Verify the compressed blocks that may stay, and find out where exactly they are.

    Parameters
    ----------
    image : Image
    survey : Survey
        That of the image; its rows are used up.
    taken : frozenset of Kind
        One kind of compressed blocks that the target can refer to; or none.
    trust_blocks : bool
        Do not decompress blocks whose length is stated.

    Returns
    -------
    Survey
        Blocks that may stay are of that kind.  Blocks of zeros are left out.

    Raises
    ------
    CorruptImageError
        A block is damaged.
    """
    if survey.is_verified:
        return survey
    rows = survey.rows
    for kind in taken:
        which = _candidates(image, rows, with_wrappers(frozenset((kind,))))
        if len(which):
            found = _try_blocks(image, rows[which], _CODECS[kind], trust_blocks=trust_blocks)
            stay = which[found["state"] == BlockState.COMPRESSED]
            _unwrap(rows, stay, kind)
            rows["host_length"][stay] = found["length"][found["state"] == BlockState.COMPRESSED]
            rows = np.delete(rows, which[found["state"] == BlockState.ABSENT])
    return survey._replace(rows=rows, is_verified=True)


def _candidates(image: Image, rows: Extents, kinds: frozenset[Kind]) -> NDArray[np.intp]:
    """Return which rows are whole compressed blocks of the image's file."""
    size = image.sources[0].block_nbytes
    may_stay = np.isin(rows["kind"], list(kinds)) & (rows["file"] == 0)
    if size:
        may_stay &= (rows["length"] == size) & (rows["guest_offset"] % np.uint64(size) == 0)
    return np.flatnonzero(may_stay)


def _unwrap(rows: Extents, which: NDArray[np.intp], kind: Kind) -> None:
    """Make blocks ones of ``kind``: their wrapper is no part of them any more."""
    wrapped = which[rows["kind"][which] != kind]
    marked = wrapped[rows["flags"][wrapped] & FLAG_GRAIN_MARKER != 0]
    rows["host_offset"][marked] += np.uint64(_MARKER_NBYTES)
    rows["host_offset"][wrapped] += np.uint64(_ZLIB_HEADER_NBYTES)
    rows["kind"][wrapped] = kind
    rows["flags"][wrapped] = 0


def _try_blocks(image: Image, rows: Extents, codec: Codec, *, trust_blocks: bool) -> Placements:
    """Return a placement for each row, of a target that is not kept.

    COMPRESSED is a block that can be reused, with its length; ABSENT is one of zeros.
    """
    size, disk_end = image.sources[0].block_nbytes, image.virtual_size
    blocks = (rows["guest_offset"] // np.uint64(size)).astype(np.int64)
    found = np.zeros(len(rows), dtype=PLACEMENT_DTYPE)
    geometry = Geometry(
        size, disk_end, compressed_alignment=1, codec=codec, reuse=Reuse.ONLY, sparse_nbytes=0
    )
    batches = cut_batches(
        gap_free(in_pieces(rows), disk_end),
        unit=size,
        max_nbytes=_BATCH_BLOCKS * size,
        disk_end=disk_end,
        skip_empty=True,
    )
    with translated_errors(image.paths):
        job = Job(
            sources=native_sources(image.sources),
            geometry=geometry,
            target=File.null(),
            threads=thread_count(None),
            batch_threads=Lease(thread_count(None)).renew,
            variants=chosen_variants(None),
            trust_blocks=trust_blocks,
        )
        with closing(job):
            for batch in batches:
                n_blocks = -(-(batch.end - batch.start) // size)
                placements = np.zeros(n_blocks, PLACEMENT_DTYPE)
                job.run(batch.start, batch.end, batch.rows, None, placements)
                first = batch.start // size
                low, high = np.searchsorted(blocks, (first, first + n_blocks))
                found[low:high] = placements[blocks[low:high] - first]
    return found
