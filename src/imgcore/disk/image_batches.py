"""Cuts the extents of an image, and of a base, into batches for the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from imgcore.disk.overlay import padded, resized
from imgcore.disk.same_ranges import Places
from imgcore.engine.batches import cut_batches, pair_up
from imgcore.engine.extents import Kind, cut_at_ranges, zeroed_at_ranges
from imgcore.engine.geometry import ZeroPolicy
from imgcore.engine.kinds import FLAG_UNREAD
from imgcore.engine.supply import Batch
from imgcore.files.host_file import may_lend_pages

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from imgcore.disk.image import Image
    from imgcore.engine.extents import Extents
    from imgcore.engine.geometry import Geometry
    from imgcore.engine.source_file import SourceFile


def disk_batches(extents: Iterator[Extents], nbytes: int, geometry: Geometry) -> Iterator[Batch]:
    """Yield a disk of ``nbytes`` bytes in batches; see `image_batches`."""
    rows = resized(extents, nbytes, geometry.guest_nbytes)
    return _cut(rows, geometry, skip_empty=geometry.zero_policy is ZeroPolicy.SKIP)


def image_batches(
    image: Image, extents: Iterator[Extents], base: Image | None, geometry: Geometry
) -> Iterator[Batch]:
    """Yield the disk in batches; long empty parts are skipped if none is written.

    Parameters
    ----------
    image : Image
    extents : iterator of ndarray
        Its data extents.
    base : Image, optional
        The target's parent.  Its files are numbered after those of ``image``.
    geometry : Geometry
        The target's.  Its disk may be larger than the image's and then ends in zeros.
        It may also be smaller, by less than a sector.
    """
    disk_end = geometry.guest_nbytes
    if base is None:
        return disk_batches(extents, image.virtual_size, geometry)
    rows = resized(extents, image.virtual_size, disk_end)
    base_end = min(base.virtual_size, disk_end)
    base_rows = padded(base.data_extents(0, base_end), base_end, disk_end)
    places = None if geometry.leaf_nbytes else Places([*image.sources, *base.sources])
    pairs = _over_base(_cut(rows, geometry), _cut(base_rows, geometry), len(image.sources))
    return (pair if places is None else _without_same(pair, places, geometry) for pair in pairs)


def moved(batches: Iterator[Batch], sources: Sequence[SourceFile], end: int) -> Iterator[Batch]:
    """Yield batches; data before ``end`` that a pipe may have as pages is UNREAD.

    Parameters
    ----------
    batches : iterator of Batch
    sources : sequence of SourceFile
        The files that extents refer to by index.
    end : int
        An offset of the disk, a multiple of 512.
    """
    lends = np.array([may_lend_pages(source.file) for source in sources], np.bool_)
    for batch in batches:
        if batch.start >= end or not lends.any():
            yield batch
            continue
        edges = np.array([batch.start], np.uint64), np.array([end], np.uint64)
        rows, is_before = cut_at_ranges(batch.rows, *edges)
        is_data = rows["kind"] == Kind.DATA
        rows["flags"][is_before & is_data & lends[np.where(is_data, rows["file"], 0)]] |= (
            FLAG_UNREAD
        )
        yield batch._replace(rows=rows)


def _cut(rows: Iterator[Extents], geometry: Geometry, skip_empty: bool = False) -> Iterator[Batch]:
    return cut_batches(
        rows,
        unit=geometry.unit_nbytes,
        max_nbytes=geometry.max_batch_nbytes,
        disk_end=geometry.guest_nbytes,
        skip_empty=skip_empty,
    )


def _over_base(own: Iterator[Batch], base: Iterator[Batch], first_file: int) -> Iterator[Batch]:
    """Yield batches with the extents of both sides.

    Both are cut at whole units, so that neither side has more rows than a batch holds.
    """
    pairs = pair_up((batch.rows for batch in own), (batch.rows for batch in base))
    for start, end, rows, base_rows in pairs:
        shifted = base_rows.copy()
        shifted["file"][shifted["kind"] >= Kind.DATA] += np.uint32(first_file)
        yield Batch(start, end, np.ascontiguousarray(rows), shifted)


def _without_same(batch: Batch, places: Places, geometry: Geometry) -> Batch:
    """Return a batch with zeros on both sides for whole blocks that are the same.

    They are stored in one place: by a parent of the image that is the base, or that
    both have.  So they are not read, and left out of the target.
    """
    assert batch.base is not None
    unit = np.uint64(geometry.block_nbytes)
    same = places.compare(batch.rows, batch.base)
    starts = (same.starts + unit - np.uint64(1)) // unit * unit
    ends = np.where(same.ends == batch.end, same.ends, same.ends // unit * unit)
    is_whole = starts < ends
    if not is_whole.any():
        return batch
    return batch._replace(
        rows=zeroed_at_ranges(batch.rows, starts[is_whole], ends[is_whole]),
        base=zeroed_at_ranges(batch.base, starts[is_whole], ends[is_whole]),
    )
