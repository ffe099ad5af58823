"""Zlib streams of records, which may hold anything."""

from __future__ import annotations

import zlib


def inflated(packed: bytes, nbytes: int) -> bytes:
    """Return the ``nbytes`` that a zlib stream holds; ValueError for another one."""
    content = inflated_at_most(packed, nbytes)
    if len(content) != nbytes:
        raise ValueError("the stream has another length")
    return content


def inflated_at_most(packed: bytes, max_nbytes: int) -> bytes:
    """Return what a zlib stream holds; ValueError if it is damaged or too long."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(packed, max_nbytes + 1)
    except zlib.error as error:
        raise ValueError(f"no zlib stream: {error}") from error
    if not stream.eof or stream.unused_data or len(content) > max_nbytes:
        raise ValueError("the stream is longer")
    return content
