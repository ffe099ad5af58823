"""What a disk gets by a write: pieces of it, cut and grouped as its format needs."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from imgcore.files.host_file import HostFile

# So much is placed at once, and is not referred to if it cannot be stored.
_BATCH_NBYTES: Final = 16 * MIB
_BATCH_PIECES: Final = 1024

_start: Final = attrgetter("start")
_end: Final = attrgetter("end")


class Origin(NamedTuple):
    """Bytes of a file from ``offset`` on, which need not pass through memory."""

    file: HostFile
    offset: int


class Piece(NamedTuple):
    """A range of the disk, and its new content: bytes, or else those of ``origin``.

    It becomes zeros if both are None.
    """

    start: int
    end: int
    octets: memoryview | None
    origin: Origin | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def part(self, start: int, end: int) -> Piece:
        """Return what it has of a range that it meets."""
        start, end = max(start, self.start), min(end, self.end)
        octets, origin = self.octets, self.origin
        if octets is not None and (start, end) != (self.start, self.end):
            octets = octets[start - self.start : end - self.start]
        if origin is not None:
            origin = Origin(origin.file, origin.offset + start - self.start)
        return Piece(start, end, octets, origin)


class Group(NamedTuple):
    """Whole granules of a disk, and the pieces that they get, ascending."""

    start: int
    end: int
    pieces: Sequence[Piece]

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def covers(self, start: int, length: int) -> bool:
        """Tell whether the pieces have a whole range."""
        pieces = self.between(start, start + length)
        return sum(piece.end - piece.start for piece in pieces) == length

    def between(self, start: int, end: int) -> Sequence[Piece]:
        """Return the pieces of a range, cut to it."""
        if start <= self.start and end >= self.end:
            return self.pieces
        first = bisect_right(self.pieces, start, key=_end)
        last = bisect_left(self.pieces, end, key=_start)
        return [piece.part(start, end) for piece in self.pieces[first:last]]

    def complete(
        self, start: int, content: bytearray, read_into: Callable[[int, memoryview], object]
    ) -> None:
        """Fill zeros with new content from ``start`` on, and old bytes around it."""
        at, end = start, start + len(content)
        with memoryview(content) as view:
            for piece in self.between(start, end):
                if at < piece.start:
                    read_into(at, view[at - start : piece.start - start])
                part = view[piece.start - start : piece.end - start]
                if piece.octets is not None:
                    part[:] = piece.octets
                elif piece.origin is not None:
                    piece.origin.file.pread_into(piece.origin.offset, part)
                at = piece.end
            if at < end:
                read_into(at, view[at - start :])


def batches(pieces: Iterable[Piece], granule_nbytes: int) -> Iterator[Sequence[Piece]]:
    """Yield ascending pieces in batches, which take a bounded time and memory each."""
    unit = max(_BATCH_NBYTES, granule_nbytes)
    batch: list[Piece] = []
    nbytes = 0
    for piece in pieces:
        start = piece.start
        while start < piece.end:
            part = piece.part(start, start - start % unit + unit)
            start, part_nbytes = part.end, part.end - part.start
            if batch and (nbytes + part_nbytes > unit or len(batch) == _BATCH_PIECES):
                yield batch
                batch, nbytes = [], 0
            batch.append(part)
            nbytes += part_nbytes
    if batch:
        yield batch


def grouped(pieces: Sequence[Piece], granule_nbytes: int, disk_nbytes: int) -> Iterator[Group]:
    """Yield ascending pieces in groups: those that touch, by their granules."""
    first = 0
    start = end = -1
    for index, piece in enumerate(pieces):
        start_of_piece = piece.start - piece.start % granule_nbytes
        if start_of_piece > end:
            if index:
                yield Group(start, min(end, disk_nbytes), pieces[first:index])
            first, start = index, start_of_piece
        end = piece.end + -piece.end % granule_nbytes
    yield Group(start, min(end, disk_nbytes), pieces[first:])


def parts_of(pieces: Sequence[Piece], n: int) -> Iterator[Sequence[Piece]]:
    """Yield ascending pieces in up to ``n`` parts of about as many bytes each."""
    nbytes = -(-sum(piece.nbytes for piece in pieces) // n)
    part: list[Piece] = []
    left = nbytes
    for piece in pieces:
        start = piece.start
        while start < piece.end:
            part.append(piece.part(start, start + left))
            start += part[-1].nbytes
            left -= part[-1].nbytes
            if not left:
                yield part
                part, left = [], nbytes
    if part:
        yield part


def without_overlaps(pieces: Sequence[Piece]) -> Sequence[Piece]:
    """Return pieces in ascending order; where they overlap, later ones win."""
    ascending = sorted(pieces, key=_start)
    if all(a.end <= b.start for a, b in pairwise(ascending)):
        return ascending
    found: list[Piece] = []
    for piece in reversed(pieces):
        first, last = (
            bisect_right(found, piece.start, key=_end),
            bisect_left(found, piece.end, key=_start),
        )
        parts, at = [], piece.start
        for other in found[first:last]:
            if at < other.start:
                parts.append(piece.part(at, other.start))
            parts.append(other)
            at = other.end
        if at < piece.end:
            parts.append(piece.part(at, piece.end))
        found[first:last] = parts
    return found
