"""The latest bytes of an image that comes in order, as a file and for the engine."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from imgcore._core import File
from imgcore.engine.extents import FLAG_GRAIN_MARKER, Kind, split
from imgcore.errors import LimitExceededError, UnsupportedFeatureError
from imgcore.files.streamed_bytes import StreamedBytes
from imgcore.formats.magic import TAIL_NBYTES
from imgcore.formats.shared.stream_end import ends_early
from imgcore.limits import (
    MAX_KEPT_NBYTES,
    MIB,
    MIN_STREAM_SEGMENTS,
    STREAM_BEHIND_NBYTES,
    STREAM_SEGMENT_NBYTES,
    TIB,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.engine.extents import Extents
    from imgcore.files.identity import Identity
    from imgcore.files.stream_input import StreamInput

# The marker before a grain: its sector, and the bytes that follow, 64 and 32 bits.
_MARKER_NBYTES: Final = 12
# Before each segment: the start of a compressed block that ends in it.
_ROOM_NBYTES: Final = 3 * MIB
BUFFER_NBYTES: Final = _ROOM_NBYTES + STREAM_SEGMENT_NBYTES
_PULL_NBYTES: Final = 1 * MIB
# Of all segments, those that blocks in use may be in.
_N_BEHIND: Final = 8
# Segments that are filled while the engine works, if their bytes are there.
_N_AHEAD: Final = 2
# How long to wait before it is looked whether more bytes are there, or more room.
_EMPTY_MS: Final = 1
_FULL_MS: Final = 50
# Of streams whose end is not known yet: as large as the files of any format.
_MAX_NBYTES: Final = 128 * TIB
# The batches that the engine may still read while another is made.
_N_BATCHES: Final = 2


class TooFarAheadError(UnsupportedFeatureError):
    """Bytes are needed so early that those before them would have to be kept."""


class _Rest(NamedTuple):
    """What follows the last bytes of a stream that were used.

    Attributes
    ----------
    end : int
        Where its last byte is that is not zero; 0 if there is none.
    tail : bytes
        The bytes before ``end``.
    last : bytes
        The bytes before the end of the stream.
    """

    end: int = 0
    tail: bytes = b""
    last: bytes = b""

    def after(self, offset: int, piece: bytes) -> _Rest:
        """Return this together with the bytes that follow."""
        content = piece.rstrip(b"\0")
        last = (self.last + piece)[-TAIL_NBYTES:]
        if not content:
            return self._replace(last=last)
        return _Rest(offset + len(content), (self.last + content)[-TAIL_NBYTES:], last)


class StreamedWindow(StreamedBytes):
    """Keeps the latest bytes of a stream, and those before the disk's first block.

    It has the members of a `ByteSource` other than ``core``: readers of headers and
    tables use it.  The engine reads guest bytes in ``files``, from extents that `place`
    has returned.

    Parameters
    ----------
    stream : StreamInput
        No bytes of it were taken yet.  The caller closes it.
    tail_nbytes : int
        So many bytes at the end are a copy of those at the start.  Until the end was
        read, the copy is what a reader gets.

    Notes
    -----
    The stream is read into segments, which are used in turn.
    What `read_ahead` has read counts only once it is needed: what can be read does not
    depend on when bytes came.

    Memory: `MIN_STREAM_SEGMENTS` + 2 segments, of `STREAM_SEGMENT_NBYTES` each and
    more for targets with large blocks, and up to `MAX_KEPT_NBYTES` of tables.
    One thread at a time uses it.
    """

    def __init__(self, stream: StreamInput, tail_nbytes: int = 0) -> None:
        self.path: str = stream.path
        self.identity: Identity = stream.identity
        self._stream = stream
        self._tail_nbytes = tail_nbytes
        self._buffers: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
        self.files: list[File] = []
        # The first byte of each segment's room that has content.
        self._room_starts: list[int] = []
        self._end = 0
        self._has_ended = False
        # Where what was read ahead ends, whether the stream ended there, and the
        # buffers of its segments that do not count yet.
        self._ahead_end = 0
        self._met_end = False
        self._ahead: dict[int, int] = {}
        # Bytes at the start that stay, None until the first block is known.
        self._front: bytes | None = None
        # The end of what was read of the file, or placed.
        self.used_end: int = 0
        # The end of the blocks that were placed last.
        self._placed_end = 0
        # The buffer of each segment, the oldest first, how many there may be, and the
        # buffers that are free; the segments of the latest batches.
        self._index_of: dict[int, int] = {}
        self._n_segments = 0
        self._free: list[int] = []
        self._in_use: deque[set[int]] = deque(maxlen=_N_BATCHES)
        # The segment of the last compressed block that was placed.  Writers of QCOW2
        # put the next one behind it, however many plain clusters come between them.
        self._packed = -1
        self.enlarge(MIN_STREAM_SEGMENTS)

    # -- a file for readers ------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the whole stream, or 128 TiB as long as its end was not met."""
        return self._end if self._has_ended else _MAX_NBYTES

    @property
    def core(self) -> File:
        """Not there: `files` have what was read."""
        raise UnsupportedFeatureError("a stream has no random access", path=self.path)

    def pread(self, offset: int, length: int) -> bytes:
        """Return bytes that are kept, or that come next; see `ByteSource.pread`.

        Raises
        ------
        UnsupportedFeatureError
            They are gone, or too far ahead.
        CorruptImageError
            The stream ends before.
        """
        if offset < 0 or length < 0:
            raise ValueError(f"{self.path}: negative offset or length: {offset}, {length}")
        end = offset + length
        if self._tail_nbytes and not self._has_ended and end > _MAX_NBYTES - self._tail_nbytes:
            return self._tail(offset, length)
        if self._front is not None and end <= len(self._front):
            return self._front[offset:end]
        self._require(end)
        self.used_end = max(self.used_end, end)
        parts = []
        while offset < end:
            number, start = divmod(offset, STREAM_SEGMENT_NBYTES)
            self._refuse_gone(number, offset)
            parts.append(self._segment(number)[start : start + end - offset])
            offset += len(parts[-1])
        return b"".join(parts)

    def look(self, offset: int, nbytes: int) -> memoryview:
        """Return bytes that come next, which count as not used; see `LooksAhead`."""
        number, start = divmod(offset, STREAM_SEGMENT_NBYTES)
        end = min(offset + nbytes, (number + 1) * STREAM_SEGMENT_NBYTES)
        if end - self._placed_end <= self._ahead_nbytes:
            self._fill(end)
        if number not in self._index_of:
            return memoryview(b"")
        return self._segment(number)[start : max(min(end, self._end) - offset + start, start)]

    def close(self) -> None:
        """Do nothing: readers close their file, but `release` ends the engine's use."""

    def enlarge(self, n_segments: int) -> None:
        """Have at least so many segments: before the engine is given `files`."""
        self._n_segments = max(n_segments, self._n_segments)
        for index in range(len(self._buffers), self._n_segments + _N_AHEAD):
            buffer = np.empty(BUFFER_NBYTES, np.uint8)
            self._buffers.append(buffer)
            self.files.append(File.from_memory(buffer))
            self._room_starts.append(_ROOM_NBYTES)
            self._free.append(index)

    def release(self) -> None:
        """Free the memory; the engine must no longer use `files`."""
        for file in self.files:
            file.close()
        self._buffers.clear()

    # -- blocks for the engine ---------------------------------------------------------

    def place(self, rows: Extents, n_sources: int) -> Extents:
        """Return a batch of extents that refer to `files` instead of the image.

        Parameters
        ----------
        rows : ndarray, shape (n,), dtype EXTENT_DTYPE
            Gap-free.
        n_sources : int
            Files that ``rows`` refer to: all stand for the stream.  File ``k`` of the
            segment ``s`` becomes ``s * n_sources + k``.

        Raises
        ------
        CorruptImageError
            The stream ends before.
        UnsupportedFeatureError
            The blocks are too far from the order of the disk.
        """
        is_stored = rows["kind"] >= Kind.DATA
        if not is_stored.any():
            self._in_use.append(set())
            return rows
        stored = rows[is_stored]
        first = int(stored["host_offset"].min())
        last = int((stored["host_offset"] + stored["host_length"]).max())
        self._keep_front(first)
        self._refuse_span(self._first_beside_packed(stored), last)
        self._skip(first)
        self._fill(last)
        rows = self._cut_at_segments(rows)
        is_stored = rows["kind"] >= Kind.DATA
        self._refuse_end(rows, is_stored)
        stored = rows[is_stored]
        starts = stored["host_offset"].astype(np.int64)
        ends = starts + stored["host_length"].astype(np.int64)
        numbers = (ends - 1) // STREAM_SEGMENT_NBYTES
        used, at = np.unique(numbers, return_index=True)
        for number, index in zip(used.tolist(), at.tolist(), strict=True):
            self._refuse_gone(number, int(starts[index]))
        for index in np.flatnonzero(starts < numbers * STREAM_SEGMENT_NBYTES).tolist():
            self._prepend(int(numbers[index]), int(starts[index]))
        rows["host_offset"][is_stored] = starts - numbers * STREAM_SEGMENT_NBYTES + _ROOM_NBYTES
        indices = np.array([self._index_of[number] for number in used.tolist()])
        files = indices[np.searchsorted(used, numbers)] * n_sources + stored["file"]
        rows["file"][is_stored] = files
        self._in_use.append(set(used.tolist()))
        packed = np.flatnonzero(stored["kind"] > Kind.DATA)
        if len(packed):
            self._packed = int(numbers[packed[-1]])
        self._placed_end = max(self._placed_end, last)
        self.used_end = max(self.used_end, self._end_of_blocks(stored, starts, ends))
        return rows

    def _end_of_blocks(self, stored: Extents, starts: NDArray[Any], ends: NDArray[Any]) -> int:
        """Return where the last block ends; tables only bound what a marker states."""
        last = int(starts.argmax())
        if not stored["flags"][last] & FLAG_GRAIN_MARKER:
            return int(ends.max())
        used_end, start = self.used_end, int(starts[last])
        marker = self.pread(start, min(_MARKER_NBYTES, int(ends[last]) - start))
        self.used_end = used_end
        return min(start + len(marker) + int.from_bytes(marker[8:], "little"), int(ends[last]))

    def _first_beside_packed(self, stored: Extents) -> int:
        """Return the first byte of rows, without compressed ones that are kept."""
        numbers = stored["host_offset"] // np.uint64(STREAM_SEGMENT_NBYTES)
        others = stored[(stored["kind"] == Kind.DATA) | (numbers != self._packed)]
        return int((others if len(others) else stored)["host_offset"].min())

    def _cut_at_segments(self, rows: Extents) -> Extents:
        """Return a copy in which no DATA row has bytes of two segments."""
        plain = rows["kind"] == Kind.DATA
        low, high = rows["host_offset"], rows["host_offset"] + rows["length"]
        segment = np.uint64(STREAM_SEGMENT_NBYTES)
        crossing = plain & (low // segment != (high - np.uint64(1)) // segment)
        if not crossing.any():
            return rows.copy()
        cuts = [rows["guest_offset"]]
        for row in rows[crossing]:
            at, guest = int(row["host_offset"]), int(row["guest_offset"])
            edges = np.arange(
                at - at % STREAM_SEGMENT_NBYTES + STREAM_SEGMENT_NBYTES,
                at + int(row["length"]),
                STREAM_SEGMENT_NBYTES,
                dtype=np.uint64,
            )
            cuts.append(edges - np.uint64(at) + np.uint64(guest))
        return split(rows, np.unique(np.concatenate(cuts)))

    def _refuse_end(self, rows: Extents, is_stored: Any) -> None:
        """Raise if the stream ends in a block; cut bounds of compressed ones."""
        if not self._has_ended:
            return
        end = np.uint64(self._end)
        ends = rows["host_offset"] + rows["host_length"]
        over = is_stored & (ends > end)
        lost = over & ((rows["kind"] == Kind.DATA) | (rows["host_offset"] >= end))
        if lost.any():
            raise ends_early(self.path, self._end, int(ends[lost].max()))
        rows["host_length"][over] = end - rows["host_offset"][over]

    def _prepend(self, number: int, start: int) -> None:
        """Copy the end of the segment before into the room of one."""
        edge = number * STREAM_SEGMENT_NBYTES
        at = start - edge + _ROOM_NBYTES
        if at < 0:
            raise LimitExceededError(
                f"a compressed block has {edge - start} bytes or more, allowed are {_ROOM_NBYTES}",
                path=self.path,
                offset=start,
            )
        index = self._index_of[number]
        until = self._room_starts[index]
        if at < until:
            self._refuse_gone(number - 1, start)
            before = self._segment(number - 1)
            low = start - edge + STREAM_SEGMENT_NBYTES
            self._buffers[index].data[at:until] = before[low : low + until - at]
            self._room_starts[index] = at

    # -- the stream --------------------------------------------------------------------

    def drain(self) -> tuple[int, bytes]:
        """Read the rest of the stream; then nothing but the start can be read.

        Returns
        -------
        tuple of (int, bytes)
            The end of the last byte that is not zero, of those that were not used yet;
            0 if there is none.  The bytes before it.
        """
        rest = _Rest()
        at = min(self.used_end, self._end)
        self._index_of |= self._ahead
        self._ahead.clear()
        self._end, self._has_ended = self._ahead_end, self._met_end
        while at < self._end:
            number, start = divmod(at, STREAM_SEGMENT_NBYTES)
            self._refuse_gone(number, at)
            piece = self._segment(number)[start : self._end - at + start]
            rest = rest.after(at, bytes(piece))
            at += len(piece)
        buffer = bytearray(_PULL_NBYTES)
        while not self._has_ended:
            n = self._stream.readinto(buffer)
            rest = rest.after(self._end, bytes(buffer[:n]))
            self._end += n
            self._has_ended = n < len(buffer)
        self._ahead_end, self._met_end = self._end, True
        # The engine may still read the segments.
        self._index_of.clear()
        return rest.end, rest.tail

    @property
    def _ahead_nbytes(self) -> int:
        return (self._n_segments - _N_BEHIND) * STREAM_SEGMENT_NBYTES

    def _tail(self, offset: int, length: int) -> bytes:
        """Return bytes at the start in place of their copy at the end."""
        start = offset - (_MAX_NBYTES - self._tail_nbytes)
        if start < 0:
            return bytes(-start) + self.pread(0, length + start)
        return self.pread(start, length)

    def _keep_front(self, nbytes: int) -> None:
        """Keep what comes before the first block."""
        if self._front is not None:
            return
        if nbytes > MAX_KEPT_NBYTES:
            raise LimitExceededError(
                f"{nbytes} bytes come before the first block of the disk, and would stay in "
                f"memory; allowed are {MAX_KEPT_NBYTES}: save it to a file first",
                path=self.path,
            )
        used_end, self._front = self.used_end, self.pread(0, nbytes)
        self.used_end = used_end

    def _require(self, end: int) -> None:
        """Read up to an offset; raise if the stream ends before, or if that is far."""
        if end > self._end:
            if not self._has_ended and end - self._placed_end > self._ahead_nbytes:
                raise TooFarAheadError(
                    f"a stream is read in order, but bytes at {end - 1:#x} are needed before "
                    f"those at {self._placed_end:#x}: save it to a file first",
                    path=self.path,
                    offset=self._placed_end,
                )
            self._fill(end)
            if end > self._end:
                raise ends_early(self.path, self._end, end)

    def _refuse_span(self, first: int, last: int) -> None:
        """Raise if blocks that are close on the disk do not fit in the segments."""
        n_segments = last // STREAM_SEGMENT_NBYTES - first // STREAM_SEGMENT_NBYTES + 1
        if n_segments > self._n_segments:
            raise UnsupportedFeatureError(
                f"a stream is read in order, but blocks at {first:#x} and at {last:#x} are close "
                "on the disk: save it to a file first",
                path=self.path,
                offset=first,
            )

    def _refuse_gone(self, number: int, offset: int) -> None:
        if number not in self._index_of:
            raise UnsupportedFeatureError(
                f"a stream is read in order, but bytes at {offset:#x} are needed after those "
                f"at {self._end - 1:#x}: save it to a file first",
                path=self.path,
                offset=offset,
            )

    def _fill(self, end: int) -> None:
        """Read up to an offset, unless the stream ends."""
        while self._end < end and not self._has_ended:
            number, start = divmod(self._end, STREAM_SEGMENT_NBYTES)
            if number not in self._index_of:
                self._make_room()
                index = self._ahead.pop(number, None)
                self._index_of[number] = self._new_segment() if index is None else index
            stop = min(start + max(end - self._end, _PULL_NBYTES), STREAM_SEGMENT_NBYTES)
            self._read(self._segment(number)[start:stop])

    def _read(self, view: memoryview) -> None:
        """Fill what comes next in a segment; what was read ahead is there already."""
        n = min(self._ahead_end - self._end, len(view))
        if n < len(view) and not self._met_end:
            n += self._stream.readinto(view[n:])
            self._ahead_end, self._met_end = self._end + n, n < len(view)
        self._end += n
        self._has_ended = n < len(view)

    @property
    def can_read_ahead(self) -> bool:
        """Whether the stream tells if bytes are there."""
        return self._stream.reads_now

    def read_ahead(self) -> int:
        """Read bytes that come next, if they and a free segment are there.

        Returns
        -------
        int
            Milliseconds until it is worth to call this again.
        """
        number, start = divmod(self._ahead_end, STREAM_SEGMENT_NBYTES)
        if self._met_end or (number not in self._index_of and not self._may_add(number)):
            return _FULL_MS
        index = self._index_of.get(number, self._ahead.get(number, -1))
        stop = min(start + _PULL_NBYTES, STREAM_SEGMENT_NBYTES)
        view = self._buffers[index].data[_ROOM_NBYTES + start : _ROOM_NBYTES + stop]
        n = self._stream.read_now(view)
        if n is None:
            return _EMPTY_MS
        self._ahead_end += n
        self._met_end = n == 0
        return 0 if n == len(view) else _EMPTY_MS

    def _may_add(self, number: int) -> bool:
        """Have a segment ahead; False if there are enough."""
        if number not in self._ahead:
            if len(self._ahead) == _N_AHEAD:
                return False
            self._ahead[number] = self._new_segment()
        return True

    def _skip(self, until: int) -> None:
        """Read up to the segment of an offset, and keep nothing of a long gap."""
        target = until - until % STREAM_SEGMENT_NBYTES
        if target - self._end > self._ahead_nbytes:
            # Segments that are kept are complete.
            self._fill(self._end + -self._end % STREAM_SEGMENT_NBYTES)
            self._free += self._ahead.values()
            self._ahead.clear()
            self._stream.skip(target - self._ahead_end)
            self._end = self._ahead_end = target

    def _new_segment(self) -> int:
        """Take a free buffer: if possible, one that is in memory and caches already."""
        index = self._free.pop()
        self._room_starts[index] = _ROOM_NBYTES
        return index

    def _make_room(self) -> None:
        """Free the buffer of the oldest segment, if that is far behind or is needed.

        That of `_packed` stays.
        """
        used = set[int]().union(*self._in_use)
        others = [number for number in self._index_of if number != self._packed]
        oldest = next((number for number in others if number not in used), -1)
        is_far = 0 < (oldest + 1) * STREAM_SEGMENT_NBYTES < self._placed_end - STREAM_BEHIND_NBYTES
        if len(self._index_of) < self._n_segments and not is_far:
            return
        if not is_far and oldest != others[0]:
            raise UnsupportedFeatureError(
                f"a stream is read in order, but blocks at {others[0] * STREAM_SEGMENT_NBYTES:#x} "
                f"and at {self._end:#x} are close on the disk: save it to a file first",
                path=self.path,
                offset=self._end,
            )
        self._free.append(self._index_of.pop(oldest))

    def _segment(self, number: int) -> memoryview:
        return self._buffers[self._index_of[number]].data[_ROOM_NBYTES:]
