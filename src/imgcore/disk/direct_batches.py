"""Has the engine read a disk in a stream itself, from the descriptor.

NumPy is not imported; see `imgcore.disk.flat_batches`.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from imgcore._core import extent_table
from imgcore.engine.kinds import ExtentRow, Kind
from imgcore.engine.supply import Batch, Supply
from imgcore.errors import CorruptImageError
from imgcore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore._core import File
    from imgcore.engine.geometry import Geometry
    from imgcore.streams.once import OnceReader

# Guest bytes of a batch, if the target's blocks allow it: no bytes are held for it, but
# the workers begin together and end together.
_BATCH_NBYTES: Final = 128 * MIB


@contextmanager
def direct_supply(reader: OnceReader, core: File, geometry: Geometry) -> Iterator[Supply]:
    """Yield a stream as a file that the engine reads in order, and close it afterwards.

    Parameters
    ----------
    reader : OnceReader
    core : File
        That of `OnceReader.open_core`.
    geometry : Geometry
        The target's.

    Raises
    ------
    CorruptImageError
        The stream is shorter than was stated, or goes on with other bytes than zeros.
    """
    try:
        yield Supply(
            paths=[reader.path],
            native_sources=[(core, geometry.guest_nbytes, 0, 0)],
            batches=_batches(reader.nbytes, geometry),
            find_end=partial(reader.find_end, core),
        )
        reader.finish(core)
    except CorruptImageError:
        reader.refuse_short(core)
        raise
    finally:
        core.close()


def _batches(nbytes: int | None, geometry: Geometry) -> Iterator[Batch]:
    """Yield the batches of a disk; if its size is not known, until nobody asks."""
    unit, disk_end = geometry.unit_nbytes, geometry.guest_nbytes
    step = min(geometry.max_batch_nbytes, max(unit, _BATCH_NBYTES // unit * unit))
    held = disk_end if nbytes is None else min(nbytes, disk_end)
    for start in range(0, disk_end, step):
        end = min(start + step, disk_end)
        edge = min(max(start, held), end)
        rows: list[ExtentRow] = []
        if start < edge:
            rows.append((start, edge - start, start, edge - start, 0, Kind.DATA, 0))
        if edge < end:
            rows.append((edge, end - edge, 0, 0, 0, Kind.ZERO, 0))
        yield Batch(start, end, extent_table(rows))
