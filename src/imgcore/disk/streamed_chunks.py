"""Decodes the batches of an image that comes in order into plain bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from imgcore._core import File, Job
from imgcore.engine.geometry import Geometry, Placing, ZeroPolicy
from imgcore.engine.job import thread_count, translated_errors
from imgcore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.engine.supply import Supply


def plain_geometry(nbytes: int) -> Geometry:
    """Return the geometry of a disk of which every byte is written."""
    return Geometry(
        MIB, nbytes, placing=Placing.IDENTITY, zero_policy=ZeroPolicy.STORE, sparse_nbytes=0
    )


def decoded(supply: Supply, geometry: Geometry, piece_nbytes: int) -> Iterator[memoryview]:
    """Yield the bytes of batches in order; each piece is valid until the next.

    Parameters
    ----------
    supply : Supply
        Its batches leave no gaps.
    geometry : Geometry
        The one of `plain_geometry` that the supply was made for.
    piece_nbytes : int
        The most bytes of a piece.
    """
    with translated_errors(supply.paths):
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
