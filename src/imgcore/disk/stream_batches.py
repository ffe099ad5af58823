"""Feeds the engine from a stream, through two buffers in turn."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore._core import File
from imgcore.disk.overlay import padded
from imgcore.engine.extents import Kind, single
from imgcore.engine.supply import Batch, Supply
from imgcore.errors import OptionError
from imgcore.limits import CHUNK_NBYTES, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from imgcore.engine.geometry import Geometry
    from imgcore.streams.reader import StreamReader

_MAX_UNIT_NBYTES: Final = 64 * MIB


@contextmanager
def stream_supply(reader: StreamReader, geometry: Geometry) -> Iterator[Supply]:
    """Yield a stream in the form that the engine reads; release the buffers afterwards.

    Raises
    ------
    OptionError
        The target's blocks are larger than a buffer may be.
    """
    unit = geometry.unit_nbytes
    if unit > _MAX_UNIT_NBYTES:
        raise OptionError(
            f"a compressed raw source is read in pieces of at most {_MAX_UNIT_NBYTES} "
            f"bytes, but the target needs {unit}: choose smaller blocks",
            path=reader.path,
        )
    nbytes = -(-max(unit, CHUNK_NBYTES) // unit) * unit
    buffers = [np.empty(nbytes, np.uint8) for _ in range(2)]
    files = [File.from_memory(buffer) for buffer in buffers]
    try:
        yield Supply(
            paths=[reader.path] * len(files),
            native_sources=[(file, nbytes, 0, 0) for file in files],
            batches=_batches(reader, buffers, geometry.guest_nbytes),
        )
    finally:
        for file in files:
            file.close()


def _batches(
    reader: StreamReader, buffers: Sequence[NDArray[np.uint8]], disk_end: int
) -> Iterator[Batch]:
    """Yield the disk chunk by chunk; the engine works on one while the next is read."""
    start = turn = 0
    for chunk in reader.read_chunks(len(buffers[0])):
        buffers[turn][: len(chunk)] = np.frombuffer(chunk, np.uint8)
        rows = single(start, len(chunk), Kind.DATA, file=turn)
        end = start + len(chunk)
        if end == reader.virtual_size:
            rows = np.concatenate(list(padded(iter([rows]), end, disk_end)))
            end = disk_end
        yield Batch(start, end, rows)
        start = end
        turn = (turn + 1) % len(buffers)
