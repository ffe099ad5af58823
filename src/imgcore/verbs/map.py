"""The verb ``map``: lists where each part of the virtual disk is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, SupportsIndex

from imgcore.border import FilePath, byte_count, file_name
from imgcore.errors import OptionError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from imgcore.disk.image import Image
    from imgcore.disk.open_options import OpenOptions
    from imgcore.engine.extents import Extents

# Image.layer_extents takes whole sectors; map clips its extents to other ranges.
_SECTOR_NBYTES: Final = 512


class StartPastEndError(OptionError):
    """The range to map starts past the end of the disk."""


class MapEntry(NamedTuple):
    """A range of the virtual disk with one state.

    The names are those of ``qemu-img map --output=json``.

    Attributes
    ----------
    start, length : int
        Byte offset in the virtual disk, and number of bytes.
    depth : int
        The layer that the range comes from: 0 is the image, 1 its backing file, and so
        on.
    present : bool
        The layer has an entry for the range.
    zero : bool
        The range is known to be zeros without reading it.
    data : bool
        The range is stored in a file.
    compressed : bool
        The range is stored compressed.
    offset : int or None
        Byte offset in the file, if the range is stored there uncompressed.
    filename : str or None
        The file that stores the range.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None
    filename: str | None


def map(
    path: FilePath,
    *,
    format: str | None = None,
    start: SupportsIndex = 0,
    length: SupportsIndex | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
    share: bool = False,
) -> Iterator[MapEntry]:
    """Yield where each part of the virtual disk is stored, including backing files.

    For the other keywords see `imgcore.open`.

    Parameters
    ----------
    path : str, bytes or os.PathLike
        The image.
    start : int
        Byte offset of the range to map, at most the size of the disk.
    length : int, optional
        Bytes of the range, which is cut at the end of the disk; up to there by default.

    Yields
    ------
    MapEntry
        Ascending and gap-free; adjacent ranges with the same state are one entry.

    Raises
    ------
    ValueError
        ``start`` or ``length`` is negative or too large.
    ImgcoreError, OSError
        As `imgcore.open`, but when the first entry is requested: the image is open from
        then until the last one.

    Notes
    -----
    Extents are held in memory one batch at a time, even for a fragmented image.
    """
    from imgcore.disk.open_options import OpenOptions

    options = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
    )
    first = byte_count(start, "start")
    nbytes = None if length is None else byte_count(length, "length")
    return _map_file(file_name(path), options, first, nbytes)


def _map_file(
    path: str, options: OpenOptions, start: int, length: int | None
) -> Iterator[MapEntry]:
    from imgcore.disk.image import open_image

    with open_image(path, options) as image:
        if start > image.virtual_size:
            raise StartPastEndError(
                f"start is {start}, past the end of the disk ({image.virtual_size} bytes)",
                path=path,
            )
        yield from map_image(image, start, length)


def map_image(image: Image, start: int, length: int | None) -> Iterator[MapEntry]:
    """Yield the entries of a range of an open image, which is cut at the disk's end."""
    end = image.virtual_size if length is None else min(start + length, image.virtual_size)
    if start >= end:
        return
    from imgcore.engine.extents import clip

    first = start - start % _SECTOR_NBYTES
    last = min(end + -end % _SECTOR_NBYTES, image.virtual_size)
    names = [source.file.path for source in image.sources]
    pending: MapEntry | None = None
    for batch, depths in image.layer_extents(first, last - first):
        # The range may start or end inside a sector, and so inside a row.
        low = max(start, int(batch["guest_offset"][0]))
        high = min(end, int(batch["guest_offset"][-1]) + int(batch["length"][-1]))
        for entry in _batch_entries(image, clip(batch, low, high), depths, names):
            if pending is None:
                pending = entry
            elif _joins(pending, entry):
                pending = pending._replace(length=pending.length + entry.length)
            else:
                yield pending
                pending = entry
    if pending is not None:
        yield pending


def _joins(a: MapEntry, b: MapEntry) -> bool:
    if a[2:7] != b[2:7] or (a.offset is None) != (b.offset is None):
        return False
    if a.offset is None:
        return True
    return a.filename == b.filename and a.offset + a.length == b.offset


def _batch_entries(
    image: Image, batch: Extents, depths: NDArray[np.uint16], names: Sequence[str]
) -> Iterator[MapEntry]:
    """Turn extents into entries, joined within the batch."""
    import numpy as np

    from imgcore.engine.extents import Kind

    kind = batch["kind"]
    length = batch["length"]
    plain = kind == Kind.DATA
    compressed = kind > Kind.DATA
    empty = ~(plain | compressed)
    # A hole of a flat file has an offset in the file, as data has.
    in_flat = empty & np.array([layer.is_flat for layer in image.layers])[depths]
    present = (kind != Kind.HOLE) | in_flat
    placed = plain | in_flat
    offset = np.where(in_flat, batch["guest_offset"], batch["host_offset"])
    file = np.where(in_flat, _first_files(image)[depths], batch["file"])

    joins = np.ones(len(batch), dtype=bool)
    joins[0] = False
    for column in (depths, present, empty, compressed, placed):
        joins[1:] &= column[1:] == column[:-1]
    adjacent = (offset[1:] == offset[:-1] + length[:-1]) & (file[1:] == file[:-1])
    joins[1:] &= adjacent | ~placed[1:]
    rows = np.flatnonzero(~joins)
    lengths = np.add.reduceat(length, rows)

    columns = (batch["guest_offset"], depths, present, empty, compressed, placed, offset, file)
    for n_bytes, values in zip(
        lengths.tolist(),
        zip(*(column[rows].tolist() for column in columns), strict=True),
        strict=True,
    ):
        guest_offset, depth, is_present, is_empty, is_packed, is_placed, place, index = values
        yield MapEntry(
            guest_offset,
            n_bytes,
            depth,
            is_present,
            is_empty,
            not is_empty,
            is_packed,
            place if is_placed else None,
            names[index] if is_placed or is_packed else None,
        )


def _first_files(image: Image) -> NDArray[np.uint32]:
    """Return for each layer the index of its first file in ``image.sources``."""
    import numpy as np

    index = {source.file.identity: i for i, source in reversed(list(enumerate(image.sources)))}
    return np.array(
        [
            index.get(layer.sources[0].file.identity, 0) if layer.sources else 0
            for layer in image.layers
        ],
        dtype=np.uint32,
    )
