"""Random access to an open image: what the engine asks for while it reads.

The engine reads short ranges on the calling thread, by tables of extents that it keeps.
It asks here for a table that it does not have.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final, NoReturn, SupportsIndex

from imgcore._core import CoreError, Disk
from imgcore.border import integer, range_of_disk
from imgcore.engine.job import chosen_variants, thread_count, translated_errors
from imgcore.engine.source_file import native_sources
from imgcore.engine.thread_budget import Lease
from imgcore.errors import ImgcoreError
from imgcore.files.descriptors import is_of_system
from imgcore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imgcore._core import Uses
    from imgcore.disk.disk_state import DiskState
    from imgcore.engine.extents import Extents
    from imgcore.engine.source_file import SourceFile
    from imgcore.formats.api import Reader

# A table covers so many blocks, within bounds: it takes about as long to make for one
# block as for these.  But where there are sector bitmaps, a row may be one sector.
_TABLE_BLOCKS: Final = 512
_MIN_SPAN_NBYTES: Final = 16 * MIB
_MAX_SPAN_NBYTES: Final = 128 * MIB
# Of a disk that one file stores unchanged: all of it is one row.
_FLAT_SPAN_NBYTES: Final = 1 << 63


class DiskOfState(Disk):
    """A disk of the engine, whose errors name the files of an open image.

    Parameters
    ----------
    state : DiskState
        Stays open while this object exists and its ``uses`` are not closed.
    sources : sequence of SourceFile
        Those that extents refer to.
    **settings
        The other parameters of `imgcore._core.Disk`.
    """

    def __init__(self, state: DiskState, sources: Sequence[SourceFile], **settings: Any) -> None:
        self._state = state
        super().__init__(native_sources(sources), virtual_size=state.virtual_size, **settings)

    def range(self, offset: SupportsIndex, length: SupportsIndex) -> tuple[int, int]:
        """Return a range as two ints; ValueError if it is not inside the disk."""
        nbytes = integer(length, "length")
        return range_of_disk(self._state.path, self._state.virtual_size, offset, nbytes, "offset")

    def explain(self, error: Exception) -> NoReturn:
        """Raise an error: one of the engine's with the name of its file."""
        try:
            with translated_errors(self._state.paths):
                raise error
        finally:
            # Its traceback has this call, which would keep it, files and buffer.
            del error


class RandomAccess(DiskOfState):
    """Reads ranges of an image.

    Parameters
    ----------
    state : DiskState
        As for `DiskOfState`.
    cache_nbytes : int
        Bytes of tables and decompressed blocks to keep.
    uses : Uses
        Those of the image.
    """

    def __init__(self, state: DiskState, *, cache_nbytes: int, uses: Uses) -> None:
        self._n_threads = 0
        super().__init__(
            state,
            state.sources,
            span=span_nbytes(state.layers),
            cache=cache_nbytes,
            uses=uses,
            lock=threading.RLock(),
            variants=chosen_variants(None),
        )

    def rows(self, start: int, end: int) -> Extents:
        """Return the extents of ``[start, end)``."""
        import numpy as np

        from imgcore.engine.extents import join_neighbours

        reader = self._state.layers[0]
        if reader.is_flat:
            return _flat_rows(end, reader.sources[0].file.nbytes)
        return join_neighbours(np.concatenate(list(self._state.extents(start, end - start))))

    def is_damage(self, error: Exception) -> bool:
        """Tell whether it is the image's or the system's, not a signal handler's."""
        if isinstance(error, OSError):
            return is_of_system(error)
        return isinstance(error, ImgcoreError | CoreError)

    def threads(self, threads: SupportsIndex | None) -> int:
        """Return how many threads to use: by default one for each CPU.

        They are counted once, since that takes longer than a read.
        """
        if threads is not None:
            return thread_count(threads)
        self._n_threads = self._n_threads or thread_count(None)
        return self._n_threads

    def lease(self, threads: int) -> Lease:
        """Return the lease of a long read on so many threads."""
        return Lease(threads)


def span_nbytes(layers: Sequence[Reader]) -> int:
    """Return how much of the disk a table covers: a power of two."""
    if layers[0].is_flat:
        return _FLAT_SPAN_NBYTES
    blocks = min(layer.block_nbytes for layer in layers) * _TABLE_BLOCKS
    return 1 << (max(_MIN_SPAN_NBYTES, min(blocks, _MAX_SPAN_NBYTES)).bit_length() - 1)


def _flat_rows(end: int, held_nbytes: int) -> Extents:
    """Return the rows of a disk that its only file stores byte for byte.

    Holes of the file are data here: it takes longer to find them than to read them.
    """
    import numpy as np

    from imgcore.engine.extents import Kind, single

    if held_nbytes >= end:
        return single(0, end, Kind.DATA)
    if not held_nbytes:
        return single(0, end, Kind.HOLE)
    rest = single(held_nbytes, end - held_nbytes, Kind.HOLE)
    return np.concatenate((single(0, held_nbytes, Kind.DATA), rest))
