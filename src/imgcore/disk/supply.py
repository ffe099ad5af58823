"""Where a conversion's batches come from: an image with its chain, or a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from imgcore._core import File
from imgcore.disk.overlay import padded
from imgcore.engine.batches import Batch, cut_batches, pair_up
from imgcore.engine.extents import Kind, single
from imgcore.engine.geometry import ZeroPolicy
from imgcore.engine.sources import native_sources
from imgcore.errors import OptionError
from imgcore.limits import MIB

if TYPE_CHECKING:
    from imgcore.disk.image import Image
    from imgcore.engine.extents import Extents
    from imgcore.engine.geometry import Geometry
    from imgcore.streams.source import StreamSource

# A batch covers at most this many target blocks: 2^17 placements are 2 MiB.
_MAX_BATCH_BLOCKS = 1 << 17

# A stream is taken in pieces of at least this size; two of them are held here.
STREAM_CHUNK_NBYTES = 16 * MIB
_MAX_STREAM_UNIT_NBYTES = 64 * MIB


class Supply(Protocol):
    """Batches for the engine, and the files that their extents refer to."""

    paths: list[str]

    def native_sources(self) -> list[tuple[File, int, int, int]]:
        """Return the job's sources: file, size, guest base, block size."""
        ...

    def batches(self) -> Iterator[Batch]:
        """Yield the disk in pieces; the one before the last stays valid."""
        ...

    def close(self) -> None:
        """Free what the batches needed."""
        ...


def _unit_nbytes(geometry: Geometry) -> int:
    """Where batches may end: whole blocks, or groups of blocks with a table of their own."""
    return geometry.block_nbytes * max(geometry.group_nblocks, 1)


class ImageSupply:
    """An open image; ``base`` is what the target's backing file will be."""

    def __init__(self, image: Image, base: Image | None, geometry: Geometry) -> None:
        self._image = image
        self._base = base
        self._geometry = geometry
        self._disk_end = geometry.guest_nbytes
        self._sources = [*image.sources, *(base.sources if base is not None else ())]
        self.paths = [source.file.path for source in self._sources]

    def native_sources(self) -> list[tuple[File, int, int, int]]:
        """Return the files of the image, then those of the base."""
        return native_sources(self._sources)

    def batches(self) -> Iterator[Batch]:
        """Yield the disk, without long empty parts if nothing is written there."""
        skip_empty = self._base is None and self._geometry.zero_policy is ZeroPolicy.SKIP
        # The target may be larger than the source: zeros follow.
        extents = padded(self._image.data_extents(), self._image.virtual_size, self._disk_end)
        own = self._cut(extents, skip_empty)
        return own if self._base is None else self._over_base(own, self._base)

    def _cut(self, extents: Iterator[Extents], skip_empty: bool = False) -> Iterator[Batch]:
        block_nbytes, unit = self._geometry.block_nbytes, _unit_nbytes(self._geometry)
        return cut_batches(
            extents,
            unit=unit,
            max_nbytes=max(unit, _MAX_BATCH_BLOCKS * block_nbytes // unit * unit),
            disk_end=self._disk_end,
            skip_empty=skip_empty,
        )

    def _over_base(self, own: Iterator[Batch], base: Image) -> Iterator[Batch]:
        """Yield batches with both sides' extents; behind the base's end there are zeros.

        Both are cut at whole units, so that neither side's rows exceed a batch's.
        """
        disk_end = self._disk_end
        base_end = min(base.virtual_size, disk_end)
        below = self._cut(padded(base.data_extents(0, base_end), base_end, disk_end))
        for start, end, rows, base_rows in pair_up(
            (batch.rows for batch in own), (batch.rows for batch in below)
        ):
            shifted = base_rows.copy()
            shifted["file"][shifted["kind"] >= Kind.DATA] += np.uint32(len(self._image.sources))
            yield Batch(start, end, np.ascontiguousarray(rows), shifted)

    def close(self) -> None:
        """Do nothing: the images are their opener's."""


class StreamSupply:
    """A compressed raw disk: read once, in order, through two buffers in turn."""

    def __init__(self, stream: StreamSource, geometry: Geometry) -> None:
        unit = _unit_nbytes(geometry)
        if unit > _MAX_STREAM_UNIT_NBYTES:
            raise OptionError(
                f"a compressed raw source is held in pieces of {_MAX_STREAM_UNIT_NBYTES} bytes at "
                f"most, the target asks for {unit}: give it smaller blocks",
                path=stream.path,
            )
        self._stream = stream
        self._disk_end = geometry.guest_nbytes
        self._chunk_nbytes = -(-max(unit, STREAM_CHUNK_NBYTES) // unit) * unit
        self._buffers = [np.empty(self._chunk_nbytes, np.uint8) for _ in range(2)]
        self._files = [File.from_memory(buffer) for buffer in self._buffers]
        self.paths = [stream.path] * 2

    def native_sources(self) -> list[tuple[File, int, int, int]]:
        """Return the two buffers."""
        return [(file, self._chunk_nbytes, 0, 0) for file in self._files]

    def batches(self) -> Iterator[Batch]:
        """Yield the disk chunk by chunk; the engine works on one while the next is read."""
        start = turn = 0
        for chunk in self._stream.read_chunks(self._chunk_nbytes):
            self._buffers[turn][: len(chunk)] = np.frombuffer(chunk, np.uint8)
            rows = single(start, len(chunk), Kind.DATA, file=turn)
            end = start + len(chunk)
            if end == self._stream.virtual_size:
                rows = np.concatenate(list(padded(iter([rows]), end, self._disk_end)))
                end = self._disk_end
            yield Batch(start, end, rows)
            start = end
            turn ^= 1

    def close(self) -> None:
        """Release the buffers."""
        for file in self._files:
            file.close()


def read_in_order(image: Image) -> Iterator[memoryview]:
    """Yield the bytes of a virtual disk from its start to its end; each valid until the next."""
    buffer = memoryview(bytearray(min(STREAM_CHUNK_NBYTES, image.virtual_size)))
    for offset in range(0, image.virtual_size, STREAM_CHUNK_NBYTES):
        piece = buffer[: min(len(buffer), image.virtual_size - offset)]
        image.readinto(offset, piece)
        yield piece
