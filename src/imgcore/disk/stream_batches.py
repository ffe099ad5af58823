"""Feeds the engine from a stream, through a few buffers in turn."""

from __future__ import annotations

from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from imgcore._core import File
from imgcore.disk.overlay import padded
from imgcore.engine.extents import Kind, single
from imgcore.engine.supply import Batch, Supply
from imgcore.errors import OptionError
from imgcore.limits import MIB
from imgcore.streams.feeder import MIN_BUFFERS
from imgcore.streams.once import too_long

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence

    from numpy.typing import NDArray

    from imgcore.engine.geometry import Geometry

_MAX_UNIT_NBYTES: Final = 64 * MIB
_CHUNK_NBYTES: Final = 2 * MIB


class Reader(Protocol):
    """A disk that is read in order."""

    @property
    def path(self) -> str:
        """The file's name."""
        ...

    @property
    def nbytes(self) -> int | None:
        """Bytes of the disk; None as long as they are not known."""
        ...

    def fill(self, buffers: Sequence[memoryview]) -> Generator[tuple[int, int], None, None]:
        """Fill buffers with the disk's content in order; see `feeder.filled`.

        Once a buffer is not full, ``nbytes`` is known.
        """
        ...


@contextmanager
def stream_supply(reader: Reader, geometry: Geometry) -> Iterator[Supply]:
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
    nbytes = -(-max(unit, _CHUNK_NBYTES) // unit) * unit
    buffers = [np.empty(nbytes, np.uint8) for _ in range(MIN_BUFFERS)]
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
    reader: Reader, buffers: Sequence[NDArray[np.uint8]], disk_end: int
) -> Iterator[Batch]:
    """Yield the disk chunk by chunk; the engine works on one while others are read."""
    is_known = reader.nbytes is not None
    start = 0
    with closing(reader.fill([buffer.data for buffer in buffers])) as chunks:
        for number, n in chunks:
            rows = single(start, n, Kind.DATA, file=number)
            end = start + n
            if end > disk_end:
                raise too_long(disk_end, reader.path)
            if end == reader.nbytes and is_known:
                rows = np.concatenate(list(padded(iter([rows]), end, disk_end)))
                end = disk_end
            yield Batch(start, end, rows, ends_disk=end == reader.nbytes and not is_known)
            start = end
