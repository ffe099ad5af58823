"""Copies areas of an open image into another one that is written in place.

They are read in pieces, of which one is read while the one before it is written.
`copy_extents` takes bytes that an image stores plainly from its file.  Where the file
system makes reflinks, they are not read: the system copies them from file to file.
"""

from __future__ import annotations

from contextlib import closing
from enum import Enum
from itertools import zip_longest
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from imgcore._core import is_zero
from imgcore.disk.pieces import Origin, Piece
from imgcore.engine.extents import Kind, join_neighbours
from imgcore.engine.thread_budget import Lease, work_for
from imgcore.files.host_file import HostFile
from imgcore.files.update_file import UpdateFile
from imgcore.limits import GIB, KIB, MIB
from imgcore.streams.helpers import Helpers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Future

    from imgcore.areas.area import Area
    from imgcore.disk.disk_state import DiskState
    from imgcore.disk.image import Image
    from imgcore.engine.control import Control
    from imgcore.engine.extents import Extents
    from imgcore.files.byte_source import ByteSource

    Range = tuple[int, int]

# One piece is read while the one before it is written.  Both stay in the caches of two
# cores.
_PIECE_NBYTES: Final = MIB
_PIECE_RANGES: Final = 1024
# Zeros take no reading: a piece of them is larger.
_ZEROS_NBYTES: Final = GIB
# Bytes that are not read pass through no cache.  With a rate, pieces are small.
_UNREAD_NBYTES: Final = 16 * MIB
_GRAIN_NBYTES: Final = 64 * KIB


class Copied(NamedTuple):
    """What was done so far, in bytes of the disk.

    Attributes
    ----------
    position : int
        Everything before this offset is done.
    areas : int
        Areas that were begun.
    read, written, zeroed : int
        Bytes read from the source, and written to the target as data or as zeros.
    """

    position: int = 0
    areas: int = 0
    read: int = 0
    written: int = 0
    zeroed: int = 0


class _How(Enum):
    """Where a range is read from: the disk, its file, or nowhere."""

    READ = "read"
    PLAIN = "read from its file"
    UNREAD = "unread"
    ZERO = "zero"


class _Part(NamedTuple):
    """A range of the disk; ``origin`` is where a file has its bytes."""

    offset: int
    length: int
    how: _How
    origin: Origin | None = None


class _Piece(NamedTuple):
    """Ascending ranges (offset, length) that are handled together.

    ``plain`` has them with their places in files, if they are not read from the disk.
    """

    ranges: list[Range]
    how: _How
    n_areas: int
    plain: list[Piece]

    @property
    def nbytes(self) -> int:
        return sum(length for _, length in self.ranges)

    @property
    def end(self) -> int:
        offset, length = self.ranges[-1]
        return offset + length


class _Run(Enum):
    DATA = "data"
    ZERO = "zeros"
    SKIPPED = "zeros that are left out"


def copy_areas(
    source: Image,
    target: Image,
    areas: Iterable[Area],
    *,
    threads: int | None = None,
    report: Callable[[Copied], None] | None = None,
    observe: Callable[[int, int, memoryview | None], None] | None = None,
    control: Control | None = None,
    grain: int = _GRAIN_NBYTES,
    skip_zeros: bool = False,
) -> Copied:
    """Read areas of a disk, and write them to the same places of another.

    Parameters
    ----------
    source, target : Image
        Open; the target for writing.  They may be the same.
    areas : iterable of Area
        Ascending, inside both disks.  Those that are zeros are not read.
    threads : int, optional
        Most threads that read at once; one per CPU by default.
    report : callable, optional
        Called on the calling thread after each piece, and while a rate limits it.
    observe : callable, optional
        Called on the calling thread with each range, in order: its offset, its length,
        and its content until the call returns, or None for zeros.
    control : Control, optional
        Limits the rate of reading.
    grain : int
        Zeros in data are found in blocks of so many bytes, at multiples of them.
    skip_zeros : bool
        Leave out zeros in data that are whole grains, instead of making the target read
        so.

    Returns
    -------
    Copied

    Raises
    ------
    OSError, ImgcoreError
        An image cannot be read or written; the error of a write says how far it got.
    """
    parts = (
        _Part(area.offset, area.length, _How.ZERO if area.is_zero else _How.READ) for area in areas
    )
    copy = _Copy(source, target, threads, grain, skip_zeros=skip_zeros)
    return _run(copy, parts, report, control, observe)


def copy_extents(
    source: Image,
    target: Image,
    batches: Iterable[Extents],
    *,
    threads: int | None = None,
    report: Callable[[Copied], None] | None = None,
    control: Control | None = None,
) -> Copied:
    """Copy the extents of a disk to the same places of another; see `copy_areas`.

    Parameters
    ----------
    batches : iterable of ndarray
        Batches of extents of the source, ascending.  Holes are left out.

    Notes
    -----
    Zeros are not looked for in what is stored plainly.
    """
    with source.kept_open() as state:
        parts = _parts(state, target, batches)
        copy = _Copy(source, target, threads, _GRAIN_NBYTES, skip_zeros=False)
        return _run(copy, parts, report, control, None)


def _run(
    copy: _Copy,
    parts: Iterable[_Part],
    report: Callable[[Copied], None] | None,
    control: Control | None,
    observe: Callable[[int, int, memoryview | None], None] | None,
) -> Copied:
    """Copy parts of a disk."""
    done = Copied()
    limit = None if control is None else control.limit

    def unread_nbytes() -> int:
        # The rate may change at any time.
        return _UNREAD_NBYTES if control is None or control.rate is None else _PIECE_NBYTES

    def tell() -> None:
        if report is not None:
            report(done)

    last: tuple[_Piece, Future[Copied]] | None = None
    # With one thread, each piece is read and written in turn.
    with Lease(2) as lease, closing(Helpers(lease.n_threads - 1, "imgcore-copy")) as pool:

        def write(piece: _Piece, contents: list[memoryview]) -> Copied:
            work_for(lease.owner)
            return copy.write(piece, contents)

        # An exception waits for the pieces that are being written.
        for piece in _pieces(parts, unread_nbytes):
            nbytes = 0 if piece.how is _How.ZERO else piece.nbytes
            while limit is not None and not limit.take(nbytes):
                tell()
            contents = copy.read(piece)
            if observe is not None:
                for (offset, length), octets in zip_longest(piece.ranges, contents):
                    observe(offset, length, octets)
            # Given before the last one has ended, so that the thread goes on at once.
            before, last = last, (piece, pool.submit(write, piece, contents))
            if before is not None:
                done = _sum(done, *before)
            tell()
        if last is not None:
            done = _sum(done, *last)
            tell()
    return done


def _sum(done: Copied, piece: _Piece, writing: Future[Copied]) -> Copied:
    """Wait until a piece is written, and return what is done then."""
    one = writing.result()
    return Copied(
        piece.end,
        done.areas + piece.n_areas,
        done.read + one.read,
        done.written + one.written,
        done.zeroed + one.zeroed,
    )


def _parts(state: DiskState, target: Image, batches: Iterable[Extents]) -> Iterator[_Part]:
    """Yield parts of a disk as its extents tell how they are copied."""
    files = [source.file for source in state.sources]
    for batch in batches:
        rows = batch[batch["kind"] != Kind.HOLE]
        # A flag tells that there is more than the data.
        is_plain = (rows["kind"] == Kind.DATA) & (rows["flags"] == 0)
        ways: dict[int, _How] = {}
        for index in np.unique(rows["file"][is_plain]).tolist():
            ways[index] = _way_of(files[index], target)
            if ways[index] is _How.READ:
                is_plain &= rows["file"] != index
        # What must be read is a hole from now on: so it is joined.
        rows["kind"][(rows["kind"] != Kind.ZERO) & ~is_plain] = Kind.HOLE
        for offset, length, at, _, index, kind, _ in join_neighbours(rows).tolist():
            if kind == Kind.DATA:
                file = files[index]
                assert isinstance(file, HostFile)
                yield _Part(offset, length, ways[index], Origin(file, at))
            else:
                yield _Part(offset, length, _How.ZERO if kind == Kind.ZERO else _How.READ)


def _way_of(file: ByteSource, target: Image) -> _How:
    """Return how plain data of a file is copied to those of the target."""
    if not isinstance(file, HostFile):
        return _How.READ
    own_files = target.own_files()
    if all(isinstance(own, UpdateFile) and own.takes_copies_of(file) for own in own_files):
        return _How.UNREAD
    return _How.PLAIN


def _pieces(parts: Iterable[_Part], unread_nbytes: Callable[[], int]) -> Iterator[_Piece]:
    """Yield parts in pieces; long ones are cut at multiples of a size."""
    sizes = {_How.ZERO: lambda: _ZEROS_NBYTES, _How.UNREAD: unread_nbytes}
    ranges: list[Range] = []
    plain: list[Piece] = []
    how, n_areas, nbytes = _How.READ, 0, 0
    for part in parts:
        size_of, is_begun = sizes.get(part.how, lambda: _PIECE_NBYTES), False
        for offset, length in _cut(part, size_of):
            is_full = nbytes + length > size_of() or len(ranges) == _PIECE_RANGES
            if ranges and (is_full or part.how is not how):
                yield _Piece(ranges, how, n_areas, plain)
                ranges, plain, n_areas, nbytes = [], [], 0, 0
            how = part.how
            ranges.append((offset, length))
            if part.origin is not None:
                shift = offset - part.offset
                origin = Origin(part.origin.file, part.origin.offset + shift)
                plain.append(Piece(offset, offset + length, None, origin))
            n_areas, nbytes, is_begun = n_areas + (not is_begun), nbytes + length, True
    if ranges:
        yield _Piece(ranges, how, n_areas, plain)


def _cut(part: _Part, size_of: Callable[[], int]) -> Iterator[Range]:
    start, end = part.offset, part.offset + part.length
    while start < end:
        size = size_of()
        stop = min(end, start - start % size + size)
        yield start, stop - start
        start = stop


class _Copy:
    """Reads pieces on one thread, and writes them on another."""

    def __init__(
        self, source: Image, target: Image, threads: int | None, grain: int, *, skip_zeros: bool
    ) -> None:
        self._source, self._target = source, target
        self._threads = threads
        self._grain = grain
        self._skip_zeros = skip_zeros
        # While one is written, the other is filled.
        self._buffers = [bytearray(), bytearray()]
        self._has_failed = False

    def read(self, piece: _Piece) -> list[memoryview]:
        """Return the content of the ranges of a piece, valid until the next but one."""
        if piece.how in (_How.ZERO, _How.UNREAD):
            return []
        buffer = self._buffers.pop(0)
        if not buffer:
            buffer = bytearray(_PIECE_NBYTES)
        self._buffers.append(buffer)
        contents: list[memoryview] = []
        at = 0
        for _, length in piece.ranges:
            contents.append(memoryview(buffer)[at : at + length])
            at += length
        if piece.how is _How.PLAIN:
            for plain, octets in zip(piece.plain, contents, strict=True):
                assert plain.origin is not None
                plain.origin.file.pread_into(plain.origin.offset, octets)
        else:
            offsets = (offset for offset, _ in piece.ranges)
            self._source.readv(zip(offsets, contents, strict=True), threads=self._threads)
        return contents

    def write(self, piece: _Piece, contents: list[memoryview]) -> Copied:
        """Write a piece, but none after one that could not be written."""
        if self._has_failed:
            return Copied()
        try:
            return self._write(piece, contents)
        except BaseException:
            self._has_failed = True
            raise

    def _write(self, piece: _Piece, contents: list[memoryview]) -> Copied:
        if piece.how is _How.ZERO:
            for offset, length in piece.ranges:
                self._target.zero(offset, length)
            return Copied(zeroed=piece.nbytes)
        if piece.how is _How.UNREAD:
            self._target.write_pieces(piece.plain)
            return Copied(read=piece.nbytes, written=piece.nbytes)
        if piece.how is _How.PLAIN:
            offsets = (offset for offset, _ in piece.ranges)
            pairs = zip(offsets, contents, strict=True)
            written = self._target.writev(pairs, threads=self._threads)
            return Copied(read=piece.nbytes, written=written)
        data: list[tuple[int, memoryview]] = []
        zeroed = 0
        for (start, _), octets in zip(piece.ranges, contents, strict=True):
            for offset, length, kind in self._runs(start, octets):
                if kind is _Run.DATA:
                    first = offset - start
                    data.append((offset, octets[first : first + length]))
                elif kind is _Run.ZERO:
                    zeroed += length
                    self._target.zero(offset, length)
        written = self._target.writev(data, threads=self._threads)
        return Copied(read=piece.nbytes, written=written, zeroed=zeroed)

    def _runs(self, start: int, octets: memoryview) -> Iterator[tuple[int, int, _Run]]:
        """Yield (offset, length, kind) of runs of grains of the same kind."""
        run_start, run_kind = start, _Run.SKIPPED
        at, end = start, start + len(octets)
        while at < end:
            stop = min(end, at - at % self._grain + self._grain)
            kind = self._kind(at, stop, octets[at - start : stop - start])
            if kind is not run_kind:
                if run_start < at:
                    yield run_start, at - run_start, run_kind
                run_start, run_kind = at, kind
            at = stop
        if run_start < end:
            yield run_start, end - run_start, run_kind

    def _kind(self, start: int, end: int, octets: memoryview) -> _Run:
        if not is_zero(octets):
            return _Run.DATA
        is_last = end == self._target.virtual_size
        is_whole = start % self._grain == 0 and (end % self._grain == 0 or is_last)
        return _Run.SKIPPED if self._skip_zeros and is_whole else _Run.ZERO
