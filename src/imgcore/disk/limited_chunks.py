"""The bytes of a disk in order, no faster than a rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.disk.data_ranges import data_parts
from imgcore.limits import CHUNK_NBYTES, KIB, MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imgcore._core import RateLimit
    from imgcore.disk.source import Source

# Small enough that a second at a low rate is not exceeded by much.
_LIMITED_PIECE_NBYTES: Final = 512 * KIB
# A thread that reads has so much of a piece.
_THREAD_NBYTES: Final = 2 * MIB
_MAX_PARTS: Final = 1 << 16


def limited_chunks(
    source: Source,
    limit: RateLimit | None,
    tick: Callable[[], None],
    threads: int,
    start: int = 0,
) -> Iterator[memoryview]:
    """Yield the bytes of a disk in order; what counts for the rate is its data.

    Parameters
    ----------
    source : Source
    limit : RateLimit, optional
        None: the disk is read as fast as possible.
    tick : callable
        Called several times a second while the rate makes this wait.
    threads : int
        How many threads the job has.
    start : int
        Where to begin on the disk.
    """
    nbytes = source.exact_nbytes
    pieces = chunks_between(source, start, nbytes, piece_nbytes(limit, threads))
    if limit is None:
        yield from pieces
        return
    if not source.size_is_known:
        for piece in pieces:
            await_rate(limit, len(piece), tick)
            yield piece
        return
    parts = data_parts(source.data_extents(), nbytes, _MAX_PARTS)
    at = 0
    while at < len(parts) and sum(parts[at]) <= start:
        at += 1
    for piece in pieces:
        end = start + len(piece)
        n_data = 0
        while at < len(parts) and parts[at][0] < end:
            part_start, part_nbytes = parts[at]
            n_data += min(part_start + part_nbytes, end) - max(part_start, start)
            if part_start + part_nbytes > end:
                break
            at += 1
        await_rate(limit, n_data, tick)
        yield piece
        start = end


def chunks_between(source: Source, start: int, end: int, piece_nbytes: int) -> Iterator[memoryview]:
    """Yield the bytes of a range in order; that of a stream ends with the disk."""
    if source.sources:
        yield from source.chunks(start, end - start, piece_nbytes)
        return
    # A stream is read whole.
    for piece in source.chunks(0, end, piece_nbytes):
        skipped = min(start, len(piece))
        start -= skipped
        if skipped < len(piece):
            yield piece[skipped:]


def piece_nbytes(limit: RateLimit | None, threads: int) -> int:
    """Return how many bytes to read at once: few where many jobs have one thread."""
    at_most = CHUNK_NBYTES if limit is None else _LIMITED_PIECE_NBYTES
    return min(threads * _THREAD_NBYTES, at_most)


def await_rate(limit: RateLimit | None, nbytes: int, tick: Callable[[], None]) -> None:
    """Wait until the rate allows so many bytes."""
    while limit is not None and not limit.take(nbytes):
        tick()
