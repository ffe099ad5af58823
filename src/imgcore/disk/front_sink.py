"""The sink for images whose tables precede all data: of streams, and on request.

What the tables say must be known before the data is written.  So blocks are stored
where the source's tables and the holes of its files have data, zeros included; of a
compressed image, a first pass learns which blocks there are and how long they are.  The
writer is rehearsed with them, and what it writes to the front is kept in memory, a
window of it at a time.
"""

from __future__ import annotations

import copy
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from imgcore._core import Places
from imgcore.disk.block_table import BlockTable
from imgcore.disk.image_sink import COPIED_NBYTES, ImageSink
from imgcore.engine.geometry import CodecId, Placing
from imgcore.errors import ImgcoreError, OptionError, UnsupportedFeatureError
from imgcore.files.rehearsal import CountingFile, Rehearsal, WindowFile
from imgcore.formats.api import NeedsBlocks
from imgcore.limits import MIB
from imgcore.log import log

if TYPE_CHECKING:
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.disk.source import Source
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.extents import Placements
    from imgcore.engine.geometry import Geometry
    from imgcore.engine.progress import Tally
    from imgcore.files.target import Target
    from imgcore.formats.api import Writer, WriteRequest

# The most bytes of the front that are in memory.
_WINDOW_NBYTES: Final = 64 * MIB
# The number of the first pass, as a part of a job that can go on after a break.
_LEARNING: Final = 1


class FrontSink(ImageSink):
    """Writes an image from its start to its end; a `Sink`."""

    def __init__(
        self, target: Target, source: Source, request: WriteRequest[Any], options: SinkOptions
    ) -> None:
        """Refuse what needs another order."""
        if not source.sources:
            raise UnsupportedFeatureError(
                "the tables of the target come first, but a stream shows its data only when it is "
                "read: save the source to a file first",
                path=source.path,
            )
        super().__init__(target, source, None, request, options)
        for flag, is_given in {
            "-B": request.backing is not None,
            "-n": target.in_place,
            "--salvage": options.salvage,
            "--reflink": options.reflink.is_required,
        }.items():
            if is_given:
                raise OptionError(f"tables in front do not go with {flag}", path=target.path)
        if not self._writer.first_offset:
            raise OptionError(
                "a stream is one file, but an image of this subformat has two", path=target.path
            )
        if options.in_order and self._writer.needs_own_blocks:
            raise OptionError("a stream has no space to preallocate", path=target.path)
        geometry = self._writer.geometry
        self._copied_start = 0
        self._appends = geometry.placing is Placing.APPEND
        self._is_compressed = geometry.codec.codec is not CodecId.NONE

    def write(self, tally: Tally) -> tuple[BadRange, ...]:
        """Write the front, the data, and what follows it."""
        blocks = self._find_blocks(tally)
        writer = self._writer
        if isinstance(writer, NeedsBlocks):
            writer.know_blocks(blocks.chunks(), self._data_nbytes(blocks))
        file = self.target.main
        front_nbytes = writer.first_offset
        start = 0
        while True:
            window = self._rehearse(blocks, start, min(_WINDOW_NBYTES, front_nbytes - start))
            file.pwrite(start, window.content)
            start += len(window.content)
            if start >= front_nbytes:
                break
        stream = self._leaf_stream()
        if self.request.virtual_size:
            self._stores_data = self._appends and not self._is_compressed
            self._copied_start = blocks.start_of_last(COPIED_NBYTES)
            checked: Any = _Expecting(writer, blocks, self.source.path) if self._appends else writer
            journal = self._journal(self.target, stream)
            end, _ = self._move(checked, file, tally, stream, journal)
            if self._appends:
                checked.check_end(end)
        for offset, data in window.behind:
            file.pwrite(offset, data)
        file.truncate(window.nbytes)
        self._take_digest(stream)
        return ()

    def _moved_end(self, geometry: Geometry) -> int:
        """Return where the data that is copied begins; see `ImageSink`."""
        return self._copied_start if self._stores_data else super()._moved_end(geometry)

    def _find_blocks(self, tally: Tally) -> BlockTable:
        """Return which blocks have a place; a compressed disk is read for that."""
        geometry = self._writer.geometry
        if not self._appends:
            return BlockTable(geometry)
        if not self._is_compressed:
            return BlockTable.of_data(geometry, self.source.data_extents())
        log.warning(
            "%s: tables in front of compressed data take two passes, and twice the time",
            self.target.path,
        )
        blocks = BlockTable(geometry)
        learner: Any = _Learning(geometry, blocks)
        if self.request.virtual_size:
            with closing(CountingFile(self.target.path)) as nowhere:
                stream = journal = None
                if self.options.checkpoints is not None:
                    # Its name becomes durable: a journal without it is worth nothing.
                    self.target.datasync()
                    stream = self._leaf_stream()
                    journal = self._journal(None, stream, _LEARNING)
                first = tally.first_of_two()
                tally.enter("measuring")
                self._move(learner, nowhere, first, stream, journal)
                tally.go_on_from(first)
                tally.enter("working")
        return blocks

    def _data_nbytes(self, blocks: BlockTable) -> int:
        geometry = self._writer.geometry
        start = geometry.stored_alignment
        places = Places(geometry, start)
        for first_block, rows in blocks.chunks():
            places.give(first_block, rows)
        return places.next_offset - start

    def _rehearse(self, blocks: BlockTable, start: int, nbytes: int) -> WindowFile:
        """Return what the writer writes to a part of the front, and behind it."""
        # A writer draws random identities when it is made, and works once.
        writer = copy.deepcopy(self._writer)
        front_nbytes = writer.first_offset
        with closing(WindowFile(self.target.path, start, nbytes, front_nbytes)) as window:
            writer.begin(Rehearsal(self.target, window))
            next_offset = front_nbytes
            if self._appends:
                places = Places(writer.geometry, front_nbytes)
                for first_block, rows in blocks.chunks():
                    places.give(first_block, rows)
                    places.next_offset = writer.place(first_block, rows, places.next_offset)
                next_offset = places.next_offset
            writer.finish(next_offset)
            return window


class _Expecting:
    """Takes the place of a writer whose tables are written: checks that they are true.

    Parameters
    ----------
    writer : Writer
    blocks : BlockTable
    path : str
        The source's name.
    """

    def __init__(self, writer: Writer, blocks: BlockTable, path: str) -> None:
        self.geometry: Geometry = writer.geometry
        self.first_offset: int = writer.first_offset
        self._blocks = blocks
        self._path = path
        self._places = Places(self.geometry, self.first_offset)
        self._end = Places(self.geometry, self.first_offset)
        for first_block, rows in blocks.chunks():
            self._end.give(first_block, rows)

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Compare placements with those that the tables have."""
        expected = self._blocks.placements(first_block, len(placements))
        self._places.give(first_block, expected)
        if not np.array_equal(expected, placements):
            self._refuse()
        return next_offset

    def check_end(self, end: int) -> None:
        """Raise if blocks are missing."""
        if end != self._end.next_offset:
            self._refuse()

    def _refuse(self) -> None:
        raise ImgcoreError(
            "changed while it was read (its allocated blocks): the result cannot be trusted",
            path=self._path,
        )


class _Learning:
    """Takes the place of a writer, and learns which blocks there are."""

    def __init__(self, geometry: Geometry, blocks: BlockTable) -> None:
        self.geometry = geometry
        self.first_offset: int = geometry.stored_alignment
        self._blocks = blocks

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Note which blocks have a place."""
        self._blocks.add(first_block, placements)
        return next_offset
