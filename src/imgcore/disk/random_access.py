"""Random access to an open image: what the engine asks for while it reads.

The engine reads short ranges on the calling thread, by tables of extents that it keeps.
It asks here for a table that it does not have.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Final, NoReturn, SupportsIndex

from imgcore._core import Disk
from imgcore.border import range_of_disk
from imgcore.engine.job import chosen_variants, thread_count
from imgcore.engine.source_file import native_sources
from imgcore.files.closable import refuse_closed
from imgcore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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


class RandomAccess(Disk):
    """Reads ranges of an image, which keeps it open while they are read.

    It is a use of the image that lasts until it is closed and no read is in progress.

    Parameters
    ----------
    path : str
        The image, for messages.
    layers, sources, first_files
        Those of the image.
    cache_nbytes : int
        Bytes of tables and decompressed blocks to keep.
    end_use : callable
        A method of the image: ends the use.
    """

    def __init__(
        self,
        path: str,
        layers: Sequence[Reader],
        sources: Sequence[SourceFile],
        first_files: Sequence[int],
        *,
        cache_nbytes: int,
        end_use: Callable[[], None],
    ) -> None:
        # The image holds this object, and whoever reads holds the image.
        self._end_use = weakref.WeakMethod(end_use)
        self._path = path
        self._virtual_size = layers[0].virtual_size
        self._layers = layers
        self._first_files = first_files
        self._n_threads = 0
        super().__init__(
            native_sources(sources),
            virtual_size=self._virtual_size,
            span=_span_nbytes(layers),
            cache=cache_nbytes,
            lock=threading.RLock(),
            variants=chosen_variants(None),
        )

    def rows(self, start: int, end: int) -> Extents:
        """Return the extents of ``[start, end)``."""
        import numpy as np

        from imgcore.disk.overlay import chain_extents
        from imgcore.engine.extents import join_neighbours

        reader = self._layers[0]
        if reader.is_flat:
            return _flat_rows(end, reader.sources[0].file.nbytes)
        batches = chain_extents(self._layers, self._first_files, start, end - start)
        return join_neighbours(np.concatenate([rows for rows, _ in batches]))

    def range(self, offset: SupportsIndex, length: SupportsIndex) -> tuple[int, int]:
        """Return a range as two ints; ValueError if it is not inside the disk."""
        return range_of_disk(self._path, self._virtual_size, offset, length, "offset")

    def threads(self, threads: SupportsIndex | None) -> int:
        """Return how many threads to use: by default one for each CPU.

        They are counted once, since that takes longer than a read.
        """
        if threads is not None:
            return thread_count(threads)
        self._n_threads = self._n_threads or thread_count(None)
        return self._n_threads

    def closed(self) -> NoReturn:
        """Raise ValueError: the image is closed."""
        refuse_closed(self._path, "image")

    def idle(self) -> None:
        """End the use of the image."""
        end_use = self._end_use()
        assert end_use is not None, "whoever reads an image holds it"
        end_use()


def _span_nbytes(layers: Sequence[Reader]) -> int:
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
