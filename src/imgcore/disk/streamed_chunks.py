"""Decodes the extents of an image that comes in order into plain bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from imgcore._core import File, Job
from imgcore.engine.geometry import Geometry, Placing, ZeroPolicy
from imgcore.engine.job import thread_count, translated_errors
from imgcore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.disk.streamed_source import StreamedSource


def decoded(source: StreamedSource, nbytes: int, piece_nbytes: int) -> Iterator[memoryview]:
    """Yield the bytes of the whole disk in order; each piece is valid until the next.

    Parameters
    ----------
    source : StreamedSource
    nbytes : int
        Bytes of the disk.
    piece_nbytes : int
        The most bytes of a piece.
    """
    block = min(piece_nbytes, 1 * MIB)
    # Each batch becomes plain bytes; the disk's holes are batches, too.
    geometry = Geometry(
        block, nbytes, placing=Placing.IDENTITY, zero_policy=ZeroPolicy.STORE, sparse_nbytes=0
    )
    with source.supply(geometry, None) as supply, translated_errors(supply.paths):
        for batch in supply.batches:
            buffer = np.empty(batch.end - batch.start, np.uint8)
            target = File.from_memory(buffer, writable=True)
            job = Job(
                sources=supply.native_sources,
                geometry=geometry._replace(guest_base=batch.start),
                target=target,
                threads=thread_count(None),
            )
            try:
                job.run(batch.start, batch.end, batch.rows)
            finally:
                job.close()
                target.close()
            for at in range(0, len(buffer), piece_nbytes):
                yield buffer.data[at : at + piece_nbytes]
