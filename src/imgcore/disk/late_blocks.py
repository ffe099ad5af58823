"""Writes the blocks of a stream that come after others that follow them on the disk.

They are decompressed by the engine, and written in place into the target, which is
complete otherwise but has no name yet.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from imgcore._core import File, Job
from imgcore.disk.digests import DigestedDisk
from imgcore.disk.pieces import Piece
from imgcore.disk.streamed_chunks import plain_geometry
from imgcore.disk.unnamed_image import open_unnamed
from imgcore.engine.job import translated_errors
from imgcore.engine.thread_budget import Lease

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from imgcore.checksums.digest import Digest
    from imgcore.disk.image import Image
    from imgcore.disk.late_batches import LateBatch, MayBeLate
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.engine.progress import Tally
    from imgcore.files.target import Target

# Zeros of this size are not written, if the target describes them at all.
_MIN_ZEROS_NBYTES: Final = 4096


class _Decoding:
    """A batch that the engine decompresses into memory."""

    def __init__(self, batch: LateBatch, path: str, options: SinkOptions) -> None:
        self._paths = [path] * len(batch.files)
        rows, block_nbytes = batch.rows.copy(), batch.block_nbytes
        # The engine is given a disk that has these blocks alone.
        self.starts: NDArray[Any] = rows["guest_offset"].astype(np.int64)
        self.nbytes: int = (len(rows) - 1) * block_nbytes + int(rows["length"][-1])
        rows["guest_offset"] = np.arange(len(rows)) * block_nbytes
        self.block_nbytes: int = block_nbytes
        self.content: NDArray[np.uint8] = np.empty(self.nbytes, np.uint8)
        self._file = File.from_memory(self.content, writable=True)
        self.job: Job = Job(
            sources=batch.files,
            geometry=plain_geometry(self.nbytes),
            target=self._file,
            threads=options.threads,
            batch_threads=Lease(options.threads).renew,
            variants=dict(options.variants),
            rate_limit=options.limit,
        )
        try:
            with translated_errors(self._paths):
                self.job.start(0, self.nbytes, rows)
        except BaseException:
            self.close()
            raise

    def wait(self, tick: Callable[[], None]) -> None:
        """Wait for the engine; errors name the stream."""
        with translated_errors(self._paths):
            self.job.wait(tick)

    def close(self) -> None:
        """Stop the engine, if it still works."""
        self.job.close()
        self._file.close()

    def pieces(self, unit: int) -> list[Piece]:
        """Return what is not zeros, in units of so many bytes."""
        unit = min(unit, self.block_nbytes)
        n_units = -(-self.block_nbytes // unit)
        places = self.starts[:, np.newaxis] + np.arange(n_units) * unit
        places = places.ravel()[: -(-self.nbytes // unit)]
        firsts = np.arange(len(places)) * unit
        # A disk has whole sectors.
        words = self.content.view(np.uint64)
        used = np.flatnonzero(np.bitwise_or.reduceat(words, firsts // words.itemsize))
        if not len(used):
            return []
        goes_on = (np.diff(used) == 1) & (np.diff(places[used]) == unit)
        edges = np.flatnonzero(np.concatenate([[True], ~goes_on, [True]]))
        pieces = []
        view = self.content.data
        for first, last in zip(edges[:-1].tolist(), (edges[1:] - 1).tolist(), strict=True):
            at = int(used[first]) * unit
            octets = view[at : min((int(used[last]) + 1) * unit, self.nbytes)]
            start = int(places[used[first]])
            pieces.append(Piece(start, start + len(octets), octets))
        return pieces


def write_late(
    source: MayBeLate, target: Target, options: SinkOptions, disk_nbytes: int, tally: Tally
) -> Digest | None:
    """Write the blocks that are left of a source into its target.

    Parameters
    ----------
    source : MayBeLate
        Which has late blocks.
    target : Target
        A complete image that has no name yet, or is written in place.
    options : SinkOptions
        How it was written.
    disk_nbytes : int
        Bytes of its disk.
    tally : Tally
        That of what was written before.

    Returns
    -------
    Digest or None
        That of the whole disk, if it was asked for: the target is read for it.

    Notes
    -----
    Memory: two batches of decompressed blocks, and changes of tables that wait (see
    `imgcore.disk.write_access`).
    """
    digest = None
    with open_unnamed(target, options.format) as image:
        _write(source, target, image, options, tally)
        image.flush()
        if options.checksum is not None:
            digest = _digest(image, disk_nbytes, options, tally)
    _note_changed(target)
    return digest


def _note_changed(target: Target) -> None:
    """Let the page cache forget what the image has read and written, if it has to."""
    for file in target.written():
        file.note_changed()


def _digest(image: Image, nbytes: int, options: SinkOptions, tally: Tally) -> Digest:
    assert options.checksum is not None, "see the caller"
    with image.kept_open() as state:
        disk = DigestedDisk.of_state(state)
        # A file that is written in place may be longer.
        return disk._replace(nbytes=min(disk.nbytes, nbytes)).digest(
            options.checksum,
            threads=options.threads,
            variants=options.variants,
            limit=options.pauses,
            report=lambda *_: tally.repeat(),
        )


def _write(
    source: MayBeLate, target: Target, image: Image, options: SinkOptions, tally: Tally
) -> None:
    unit = max(_MIN_ZEROS_NBYTES, image.block_size)
    decodings: list[_Decoding] = []

    def store(decoding: _Decoding) -> None:
        pieces = decoding.pieces(unit)
        if pieces:
            image.write_pieces(pieces)
            _note_changed(target)
        n_written = sum(piece.nbytes for piece in pieces)
        tally.count(
            # What was a hole before is done once already.
            min(tally.done_nbytes + decoding.nbytes, tally.total_nbytes),
            data=tally.data_nbytes + n_written,
            read=tally.read_nbytes + decoding.job.progress()[3],
            written=tally.written_nbytes + n_written,
        )

    try:
        for batch in source.late_batches():
            for decoding in decodings:
                decoding.wait(tally.repeat)
            # The engine works while the batch before is written.
            decodings.append(_Decoding(batch, source.path, options))
            if len(decodings) > 1:
                with closing(decodings.pop(0)) as decoding:
                    store(decoding)
        for decoding in decodings:
            decoding.wait(tally.repeat)
            store(decoding)
    finally:
        for decoding in decodings:
            decoding.close()
