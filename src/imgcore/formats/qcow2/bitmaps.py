"""QCOW2: the ranges that a persistent bitmap marks as changed.

Source: QEMU docs/interop/qcow2.rst, "Bitmaps".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore import limits
from imgcore.errors import (
    CorruptImageError,
    LimitExceededError,
    OptionError,
    UnsupportedFeatureError,
)
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.header import Bitmap, check_range, read_bitmaps
from imgcore.formats.qcow2.tables import iter_l1

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.qcow2.header import Qcow2Header

# Bits that are examined together: 64 KiB of the file.
_PIECE_BITS: Final = 1 << 19


def dirty_ranges(file: ByteSource, header: Qcow2Header, name: str) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of the ranges that a bitmap marks, in bytes.

    See `imgcore.formats.api.HasBitmaps`.
    """
    bitmap = _find(file, header, name)
    _check(file, header, bitmap)
    granularity = 1 << bitmap.granularity_bits
    for first, last in _joined(_runs(file, header, bitmap)):
        start = first * granularity
        yield start, min(last * granularity, header.virtual_size) - start


def _find(file: ByteSource, header: Qcow2Header, name: str) -> Bitmap:
    if layout.EXTENSION_BITMAPS in header.extensions:
        _check_extension(file, header)
    bitmaps = read_bitmaps(file, header)
    found = [bitmap for bitmap in bitmaps if bitmap.name == name]
    if len(found) > 1:
        raise CorruptImageError(f"{len(found)} bitmaps are named {name!r}", path=file.path)
    if not found:
        names = ", ".join(repr(bitmap.name) for bitmap in bitmaps)
        has = f"the image has {names}" if names else "the image has no bitmaps"
        raise OptionError(f"no bitmap {name!r}: {has}", path=file.path)
    return found[0]


def _check_extension(file: ByteSource, header: Qcow2Header) -> None:
    if not header.autoclear & layout.AUTOCLEAR_BITMAPS:
        raise UnsupportedFeatureError(
            "the bitmaps are stale: a program that does not keep them wrote to the image",
            path=file.path,
        )
    reserved = header.extensions[layout.EXTENSION_BITMAPS][4:8]
    if any(reserved):
        raise UnsupportedFeatureError(
            f"the reserved field of the bitmaps extension is 0x{reserved.hex()}, allowed is 0",
            path=file.path,
        )


def _check(file: ByteSource, header: Qcow2Header, bitmap: Bitmap) -> None:
    """Raise unless the bitmap is valid, and its table inside the file."""
    unusable = _why_unusable(bitmap)
    if unusable is not None:
        raise UnsupportedFeatureError(f"bitmap {bitmap.name!r} {unusable}", path=file.path)
    low = limits.QCOW2_MIN_BITMAP_GRANULARITY_BITS
    high = limits.QCOW2_MAX_BITMAP_GRANULARITY_BITS
    if not low <= bitmap.granularity_bits <= high:
        raise LimitExceededError(
            f"bitmap {bitmap.name!r} has a granularity of 2^{bitmap.granularity_bits} bytes, "
            f"allowed 2^{low} to 2^{high}",
            path=file.path,
        )
    nbytes = -(-_n_bits(header, bitmap) // 8)
    if nbytes > limits.QCOW2_MAX_BITMAP_NBYTES:
        raise LimitExceededError(
            f"bitmap {bitmap.name!r} takes {nbytes} bytes, allowed up to "
            f"{limits.QCOW2_MAX_BITMAP_NBYTES}",
            path=file.path,
        )
    needed = -(-nbytes // header.cluster_size)
    if bitmap.table_entries != needed:
        raise CorruptImageError(
            f"bitmap {bitmap.name!r} has {bitmap.table_entries} clusters, a disk of "
            f"{header.virtual_size} bytes needs {needed}",
            path=file.path,
        )
    table_nbytes = needed * layout.ENTRY_NBYTES
    check_range(file, header, f"table of bitmap {bitmap.name!r}", bitmap.table_offset, table_nbytes)


def _why_unusable(bitmap: Bitmap) -> str | None:
    if bitmap.flags & layout.BITMAP_IN_USE:
        return "is in use: a program has it open, or did not close it, and it may lack changes"
    if bitmap.flags & layout.BITMAP_FLAGS_RESERVED:
        return f"has unknown flags ({bitmap.flags:#x})"
    if bitmap.kind != layout.BITMAP_TYPE_DIRTY_TRACKING:
        return f"is of the unknown type {bitmap.kind}"
    if bitmap.extra_nbytes and not bitmap.flags & layout.BITMAP_EXTRA_DATA_COMPATIBLE:
        return "has extra data that a reader must know"
    return None


def _n_bits(header: Qcow2Header, bitmap: Bitmap) -> int:
    return -(-header.virtual_size >> bitmap.granularity_bits)


def _runs(file: ByteSource, header: Qcow2Header, bitmap: Bitmap) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of runs of set bits, which may touch each other."""
    n_bits, per_cluster = _n_bits(header, bitmap), header.cluster_size * 8
    for index, entries in iter_l1(file, bitmap.table_offset, 0, bitmap.table_entries):
        for number, entry in enumerate(entries.tolist(), index):
            start = number * per_cluster
            end = min(start + per_cluster, n_bits)
            if _has_data(file, header, bitmap, number, entry):
                for first in range(start, end, _PIECE_BITS):
                    count = min(_PIECE_BITS, end - first)
                    data = file.pread(entry + (first - start) // 8, -(-count // 8))
                    yield from _runs_of_ones(data, first, count)
            elif entry & layout.BITMAP_ALL_ONES:
                yield start, end


def _has_data(
    file: ByteSource, header: Qcow2Header, bitmap: Bitmap, number: int, entry: int
) -> bool:
    """Tell whether an entry of the table has a cluster; raise if it is invalid."""
    offset = entry & layout.BITMAP_OFFSET_MASK
    if entry & layout.BITMAP_RESERVED or (offset and entry & layout.BITMAP_ALL_ONES):
        raise CorruptImageError(
            f"bitmap {bitmap.name!r}: entry {number} of its table has reserved bits set "
            f"({entry:#x})",
            path=file.path,
            offset=bitmap.table_offset + number * layout.ENTRY_NBYTES,
        )
    if offset:
        used_nbytes = min(header.cluster_size, -(-_n_bits(header, bitmap) // 8))
        what = f"cluster {number} of bitmap {bitmap.name!r}"
        check_range(file, header, what, offset, used_nbytes)
    return offset != 0


def _runs_of_ones(data: bytes, first: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield the runs of set bits; the lowest bit of ``data`` is bit ``first``."""
    bits = np.zeros(count + 2, np.int8)
    bits[1:-1] = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little", count=count)
    # Runs start and end in turn.
    changes = (np.flatnonzero(np.diff(bits)) + first).tolist()
    return zip(changes[::2], changes[1::2], strict=True)


def _joined(runs: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Join runs that touch each other."""
    start = end = 0
    for first, last in runs:
        if first > end:
            if start < end:
                yield start, end
            start = first
        end = last
    if start < end:
        yield start, end
