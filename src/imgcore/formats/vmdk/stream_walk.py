"""Follows the markers of a streamOptimized VMDK, from its first grain on.

Each compressed grain follows a marker with its place on the disk and its size, so the
stream can be read without its tables.

Nothing here imports NumPy.

Source: Virtual Disk Format 5.0, "Stream-Optimized Compressed Sparse Extents".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore.formats.shared.alignment import align_up
from imgcore.formats.shared.damage import SALVAGING
from imgcore.formats.vmdk.layout import GRAIN_MARKER, MARKER, MAX_COMPRESSED_GRAINS, Marker
from imgcore.limits import MIB, SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.vmdk.layout import SparseHeader

_PIECE_NBYTES: Final = 1 * MIB
# A marker, and the two bytes of a zlib header after a grain's.
_HEAD_NBYTES: Final = 16


class Item(NamedTuple):
    """A grain or another marker of a stream.

    Attributes
    ----------
    offset : int
        Host offset of the marker in bytes.
    lba : int
        A grain's place on the disk in sectors; -1 for other markers.
    kind : Marker or None
        What the marker is about, None for a grain.
    is_after_damage : bool
        Whether bytes before it, after the last item, are no part of a stream.
    end : int
        Host offset where the next marker should be.
    """

    offset: int
    lba: int
    kind: Marker | None
    is_after_damage: bool
    end: int


def walk(file: ByteSource, header: SparseHeader, *, resumes: bool = False) -> Iterator[Item]:
    """Yield the items of a stream in the order of the file.

    Parameters
    ----------
    file : ByteSource
    header : SparseHeader
        The header at the start of the file, which need not be verified.
    resumes : bool
        Whether to search for the next grain after something that is no marker or cannot
        be read; otherwise the walk ends there.

    Notes
    -----
    The walk ends with the end-of-stream marker, unless it resumes.  Complexity: one
    small read for each item, or of every byte that is searched.
    """
    position = header.overhead * SECTOR_NBYTES
    is_after_damage = False
    # The last grain's bytes may end the file, within a sector.
    while position + GRAIN_MARKER.size < file.nbytes:
        item = _item_at(file, header, position, resumes=resumes)
        if item is not None and item.end > file.nbytes and item.kind is not None:
            item = None
        if item is not None:
            yield item._replace(is_after_damage=is_after_damage)
            position = item.end
        # Zeros in place of a grain look like the end of the stream.
        is_after_damage = item is None or item.kind is Marker.EOS
        if is_after_damage:
            if not resumes:
                return
            position = _next_grain(file, header, position + SECTOR_NBYTES * (item is None))


def end_of_stream(file: ByteSource, header: SparseHeader) -> int | None:
    """Return where the end-of-stream marker starts, None if it is missing.

    A footer must precede it.
    """
    last: Item | None = None
    for item in walk(file, header):
        if item.kind is Marker.EOS:
            is_after_footer = last is not None and last.kind is Marker.FOOTER
            return item.offset if is_after_footer else None
        last = item
    return None


def _item_at(
    file: ByteSource, header: SparseHeader, position: int, *, resumes: bool
) -> Item | None:
    try:
        raw = file.pread(position, min(_HEAD_NBYTES, file.nbytes - position))
    except OSError:
        if not resumes:
            raise
        return None
    return _parse(raw, header, position)


def _parse(raw: bytes, header: SparseHeader, position: int) -> Item | None:
    """Return the item whose first bytes are given, None if there is none."""
    lba, nbytes = GRAIN_MARKER.unpack_from(raw)
    if nbytes:
        if not _is_grain(raw, header, lba, nbytes):
            return None
        end = position + GRAIN_MARKER.size + nbytes
        return Item(position, lba, None, False, align_up(end, SECTOR_NBYTES))
    if len(raw) < MARKER.size:
        return None
    n_sectors, _, kind = MARKER.unpack_from(raw)
    if kind > max(Marker) or (kind == Marker.EOS and n_sectors):
        return None
    end = position + SECTOR_NBYTES * (1 + n_sectors)
    return Item(position, -1, Marker(kind), False, end)


def _is_grain(raw: bytes, header: SparseHeader, lba: int, nbytes: int) -> bool:
    grain = header.grain_size
    # RFC 1950: deflate, and a check of the header's two bytes.
    cmf, flags = raw[12:14] if len(raw) >= 14 else (0, 0)
    return (
        # Not if the header states no size of grains.
        0 < nbytes <= MAX_COMPRESSED_GRAINS * grain * SECTOR_NBYTES
        and lba % grain == 0
        and lba < header.capacity
        and cmf & 0xF == 8
        and (cmf << 8 | flags) % 31 == 0
    )


def _next_grain(file: ByteSource, header: SparseHeader, position: int) -> int:
    """Return the place of the next grain, directory or footer, or the file's end."""
    while position < file.nbytes:
        data_start, data_end = file.next_data(position)
        if data_start >= data_end:
            break
        position = max(position, data_start - data_start % SECTOR_NBYTES)
        nbytes = min(_PIECE_NBYTES, file.nbytes - position)
        piece = bytes(SALVAGING.read_table(file, position, nbytes, b"\0"))
        if piece.count(0) < nbytes:
            for at in range(0, nbytes - GRAIN_MARKER.size, SECTOR_NBYTES):
                item = _parse(piece[at : at + _HEAD_NBYTES], header, position + at)
                if item is not None and item.kind not in (Marker.GT, Marker.EOS):
                    return position + at
        position += _PIECE_NBYTES
    return file.nbytes
