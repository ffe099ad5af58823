"""Where the grains of a streamOptimized VMDK lie, and where its file should end."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from imgcore.files.host_file import HostFile
    from imgcore.formats.vmdk.header import SparseExtent
    from imgcore.formats.vmdk.reader import VmdkReader


class StreamLayout(NamedTuple):
    """``disorder`` is the guest offset (bytes) of a grain that lies before the one before it.

    ``end`` (bytes) is behind the sector of the end-of-stream marker, or where that would end if
    the file does not hold it; None if the grains have no markers that lead to it.
    """

    disorder: int | None
    end: int | None


def stream_layout(file: HostFile, reader: VmdkReader) -> StreamLayout:
    """Read all grain tables, the marker of the last grain and the end of the file.

    Parameters
    ----------
    file : HostFile
        The image.
    reader : VmdkReader
        Of a streamOptimized disk, which has one extent.
    """
    from imgcore.formats.vmdk.header import stream_end

    sparse = reader.disk_extents[0].sparse
    assert sparse is not None
    disorder, last = _walk(reader, sparse)
    end = stream_end(file)
    if end is None and sparse.has_markers:
        # The header names the directory; what follows the grains differs from program to program.
        start = _grain_end(file, last) if last is not None else sparse.overhead
        end = _end_behind_markers(file, start)
    return StreamLayout(disorder, end)


def _walk(reader: VmdkReader, sparse: SparseExtent) -> tuple[int | None, int | None]:
    """Return the first grain out of order, and where the last one's marker or data is."""
    import numpy as np

    from imgcore.engine.extents import FLAG_GRAIN_MARKER, Kind
    from imgcore.formats.vmdk.layout import GRAIN_MARKER

    prefix = GRAIN_MARKER.size if sparse.has_markers else 0
    disorder: int | None = None
    before, last = -1, -1
    for rows in reader.extents(0, reader.virtual_size):
        grains = rows[rows["kind"] >= Kind.DATA]
        if not len(grains):
            continue
        # A last grain that is stored cut has its row behind the marker.
        behind = (grains["flags"] & FLAG_GRAIN_MARKER) == 0
        places = grains["host_offset"].astype(np.int64) - np.where(behind, prefix, 0)
        wrong = np.flatnonzero(np.diff(places, prepend=before) < 0)
        if wrong.size and disorder is None:
            disorder = int(grains["guest_offset"][wrong[0]])
        before = int(places[-1])
        last = max(last, int(places.max()))
    return disorder, last if last >= 0 else None


def _end_behind_markers(file: HostFile, position: int) -> int | None:
    """Follow the markers of tables, directory and footer to the end of the stream."""
    from imgcore.formats.vmdk.layout import MARKER, Marker

    while position + SECTOR_NBYTES <= file.nbytes:
        n_sectors, size, kind = MARKER.unpack(file.pread(position, MARKER.size))
        if size != 0 or kind > max(Marker):
            return None
        position += SECTOR_NBYTES
        if kind == Marker.EOS:
            return position
        position += n_sectors * SECTOR_NBYTES
    return position + SECTOR_NBYTES


def _grain_end(file: HostFile, place: int) -> int:
    """Return the end of a compressed grain, in whole sectors."""
    from imgcore.formats.vmdk.layout import GRAIN_MARKER

    _, nbytes = GRAIN_MARKER.unpack(file.pread(place, GRAIN_MARKER.size))
    return -(-(place + GRAIN_MARKER.size + int(nbytes)) // SECTOR_NBYTES) * SECTOR_NBYTES
