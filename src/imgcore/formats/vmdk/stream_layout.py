"""The order of grains in a streamOptimized VMDK, and where its file should end."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from imgcore.engine.extents import FLAG_GRAIN_MARKER, Kind
from imgcore.formats.vmdk.header import stream_end
from imgcore.formats.vmdk.layout import GRAIN_MARKER, MARKER, Marker
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.vmdk.header import SparseExtent


class StreamLayout(NamedTuple):
    """The order of grains, and where the file should end.

    Attributes
    ----------
    disorder : int or None
        Guest offset (bytes) of the first grain stored before its predecessor.
    end : int or None
        The end of the end-of-stream marker's sector in bytes, or where it would be if
        the marker is missing.  None if there are no markers to find it with.
    """

    disorder: int | None
    end: int | None


def find_stream_layout(sparse: SparseExtent, batches: Iterable[Extents]) -> StreamLayout:
    """Read the marker of the last grain and the end of the file.

    Parameters
    ----------
    sparse : SparseExtent
        The only extent of a streamOptimized disk.
    batches : iterable of Extents
        The extents of the whole disk, from its grain tables.
    """
    file = sparse.file
    disorder, last = _walk(sparse, batches)
    end = stream_end(file)
    if end is None and sparse.has_markers:
        # The header names the directory; producers differ in what follows the grains.
        start = _grain_end(file, last) if last is not None else sparse.overhead
        end = _end_after_markers(file, start)
    return StreamLayout(disorder, end)


def _walk(sparse: SparseExtent, batches: Iterable[Extents]) -> tuple[int | None, int | None]:
    """Return the first grain out of order, and the offset of the last stored one."""
    prefix = GRAIN_MARKER.size if sparse.has_markers else 0
    disorder: int | None = None
    before, last = -1, -1
    for rows in batches:
        grains = rows[rows["kind"] >= Kind.DATA]
        if not len(grains):
            continue
        # The row of a truncated last grain starts after the marker.
        after_marker = (grains["flags"] & FLAG_GRAIN_MARKER) == 0
        places = grains["host_offset"].astype(np.int64) - np.where(after_marker, prefix, 0)
        wrong = np.flatnonzero(np.diff(places, prepend=before) < 0)
        if wrong.size and disorder is None:
            disorder = int(grains["guest_offset"][wrong[0]])
        before = int(places[-1])
        last = max(last, int(places.max()))
    return disorder, last if last >= 0 else None


def _end_after_markers(file: ByteSource, position: int) -> int | None:
    """Follow the markers of tables, directory and footer to the end of the stream."""
    while position + SECTOR_NBYTES <= file.nbytes:
        n_sectors, size, kind = MARKER.unpack(file.pread(position, MARKER.size))
        if size != 0 or kind > max(Marker):
            return None
        position += SECTOR_NBYTES
        if kind == Marker.EOS:
            return position
        position += n_sectors * SECTOR_NBYTES
    return position + SECTOR_NBYTES


def _grain_end(file: ByteSource, place: int) -> int:
    """Return the end of a compressed grain, in whole sectors."""
    _, nbytes = GRAIN_MARKER.unpack(file.pread(place, GRAIN_MARKER.size))
    return -(-(place + GRAIN_MARKER.size + int(nbytes)) // SECTOR_NBYTES) * SECTOR_NBYTES
