"""Targets that are written in order, through a compressor: raw disks, Compute Engine's archive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

import numpy as np

from imgcore.disk.supply import STREAM_CHUNK_NBYTES, read_in_order
from imgcore.engine.extents import Kind
from imgcore.limits import KIB, MAX_TAR_SEGMENTS
from imgcore.platforms.profiles import GCE_MEMBER_NAME
from imgcore.streams.gzip import GzipSink
from imgcore.streams.tar import archive_end, sparse_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.disk.image import Image
    from imgcore.files.target_file import TargetFile
    from imgcore.streams.source import StreamSource

    # How many bytes of the disk are done, how many of these were read, and how many were written.
    Report = Callable[[int, int, int], None]
    Segments = NDArray[np.int64]

# Data of an archive's sparse file is cut at multiples of this, and of more where it lies scattered.
_MIN_GRANULE_NBYTES: Final = 64 * KIB

_REPORT_SECONDS: Final = 0.05


class DiskInOrder:
    """A source read from its start to its end; just one of the two is not None."""

    def __init__(self, image: Image | None, stream: StreamSource | None) -> None:
        self._image = image
        self._stream = stream

    def chunks(self) -> Iterator[memoryview]:
        """Yield all bytes, each piece valid until the next is asked for."""
        if self._stream is not None:
            return self._stream.read_chunks(STREAM_CHUNK_NBYTES)
        assert self._image is not None
        return read_in_order(self._image)

    def segments(self) -> list[tuple[int, int]]:
        """Return (offset, length) of the parts in which anything may be stored, ascending.

        Notes
        -----
        The tables are read once; no more than MAX_TAR_SEGMENTS parts come out, so that
        scattered data counts with the holes between it.  A stream is one part.
        """
        if self._stream is not None:
            nbytes = self._stream.virtual_size
            return [(0, nbytes)] if nbytes else []
        assert self._image is not None
        found = _Segments()
        for rows in self._image.data_extents():
            data = rows[rows["kind"] >= Kind.DATA]
            found.add(data["guest_offset"].astype(np.int64), data["length"].astype(np.int64))
        return found.clipped(self._image.virtual_size)

    def read(self, offset: int, length: int) -> Iterator[memoryview]:
        """Yield a part of the disk; of a stream, the whole."""
        if self._stream is not None:
            return self._stream.read_chunks(STREAM_CHUNK_NBYTES)
        return self._read_image(offset, length)

    def _read_image(self, offset: int, length: int) -> Iterator[memoryview]:
        assert self._image is not None
        buffer = memoryview(bytearray(min(STREAM_CHUNK_NBYTES, length)))
        for start in range(offset, offset + length, STREAM_CHUNK_NBYTES):
            piece = buffer[: min(len(buffer), offset + length - start)]
            self._image.readinto(start, piece)
            yield piece


class _Segments:
    """Ranges in units of a granule, which doubles when there are too many of them."""

    def __init__(self) -> None:
        self._granule = _MIN_GRANULE_NBYTES
        self._ranges: Segments = np.empty((0, 2), dtype=np.int64)

    def add(self, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        ends = offsets + lengths
        new = np.stack((offsets // self._granule, -(-ends // self._granule)), axis=1)
        self._ranges = _joined(np.concatenate((self._ranges, new)))
        while len(self._ranges) > MAX_TAR_SEGMENTS:
            self._granule *= 2
            self._ranges[:, 0] //= 2
            self._ranges[:, 1] = -(-self._ranges[:, 1] // 2)
            self._ranges = _joined(self._ranges)

    def clipped(self, end: int) -> list[tuple[int, int]]:
        ranges = np.minimum(self._ranges * self._granule, end)
        return [(first, last - first) for first, last in ranges.tolist()]


def _joined(ranges: Segments) -> Segments:
    """Join ascending ranges that touch or overlap their neighbours."""
    if not len(ranges):
        return ranges
    is_first = np.concatenate(([True], ranges[1:, 0] > ranges[:-1, 1]))
    is_last = np.concatenate((is_first[1:], [True]))
    return np.stack((ranges[is_first, 0], ranges[is_last, 1]), axis=1)


def rate_limited(report: Report, end: int) -> Report:
    """Return a report that is made at most every 50 ms, as the engine's, and at the end."""
    next_time = -float("inf")

    def limited(done: int, n_read: int, n_written: int) -> None:
        nonlocal next_time
        now = time.monotonic()
        if done == end or now >= next_time:
            next_time = now + _REPORT_SECONDS
            report(done, n_read, n_written)

    return limited


def write_zstd(
    disk: DiskInOrder, target: TargetFile, virtual_size: int, threads: int, report: Report
) -> None:
    """Write ``.raw.zst``: one frame with the disk's size and a checksum."""
    from imgcore.streams.zstd import ZstdSink

    sink = ZstdSink(target, virtual_size, threads=threads)
    done = 0
    for chunk in disk.chunks():
        sink.write(chunk)
        done += len(chunk)
        report(done, done, sink.written_nbytes)
    sink.finish()
    report(done, done, sink.written_nbytes)


def write_gzip(disk: DiskInOrder, target: TargetFile, threads: int, report: Report) -> None:
    """Write ``.raw.gz``: one member."""
    done = 0
    with GzipSink(target, threads) as sink:
        for chunk in disk.chunks():
            sink.write(chunk)
            done += len(chunk)
            report(done, done, sink.written_nbytes)
        sink.finish()
    report(done, done, sink.written_nbytes)


def write_gce_tar(
    disk: DiskInOrder, target: TargetFile, virtual_size: int, threads: int, report: Report
) -> None:
    """Write a gzip tar with one sparse file of ``virtual_size`` bytes.

    Parameters
    ----------
    disk : DiskInOrder
        May be smaller than ``virtual_size``: behind its end there are zeros.
    """
    segments = disk.segments()
    header = sparse_header(GCE_MEMBER_NAME, virtual_size, segments)
    n_read = 0
    with GzipSink(target, threads) as sink:
        sink.write(header)
        for offset, length in segments:
            done = offset
            for piece in disk.read(offset, length):
                sink.write(piece)
                done += len(piece)
                n_read += len(piece)
                report(done, n_read, sink.written_nbytes)
        sink.write(archive_end(len(header) + n_read))
        sink.finish()
    report(virtual_size, n_read, sink.written_nbytes)
