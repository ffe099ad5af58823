"""The sink for Compute Engine: a gzip tar archive with one sparse file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.disk.data_ranges import data_parts
from imgcore.disk.encoded_content import Content, ContentWriter
from imgcore.disk.limited_chunks import await_rate, chunks_between, piece_nbytes
from imgcore.engine.thread_budget import Lease
from imgcore.limits import MAX_TAR_SEGMENTS
from imgcore.platforms.profiles import GCE_MEMBER_NAME
from imgcore.streams.gzip import GzipEncoder
from imgcore.streams.tar import archive_end, sparse_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.checksums.digest import Digest
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.disk.source import Source
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.progress import Tally
    from imgcore.files.target import Target


class ArchiveSink:
    """Writes the parts of a disk that hold data into the archive; a `Sink`."""

    overwrites: Final = False
    logical_sector_nbytes: Final = None

    def __init__(
        self, target: Target, source: Source, virtual_size: int, options: SinkOptions
    ) -> None:
        self.digest: Digest | None = None
        self.disk_nbytes: int = virtual_size
        self._target = target
        self._source = source
        self._options = options

    def write(self, tally: Tally) -> tuple[BadRange, ...]:
        """Write the whole disk.  Unreadable data is an error, so no ranges are bad."""
        source, limit = self._source, self._options.limit
        parts = data_parts(source.data_extents(), source.virtual_size, MAX_TAR_SEGMENTS)
        with (
            Lease(self._options.threads) as lease,
            GzipEncoder(self._target.main, lease.n_threads) as encoder,
        ):

            def count() -> None:
                tally.count(
                    writer.done_nbytes,
                    data=writer.data_nbytes,
                    read=writer.data_nbytes,
                    written=encoder.written_nbytes,
                )

            def chunks(start: int, length: int) -> Iterator[memoryview]:
                nbytes = piece_nbytes(limit, lease.n_threads)
                for piece in chunks_between(source, start, start + length, nbytes):
                    await_rate(limit, len(piece), count)
                    yield piece

            header = sparse_header(GCE_MEMBER_NAME, self.disk_nbytes, parts)
            content = Content(header, parts, chunks, archive_end)
            writer = ContentWriter(
                self._target,
                content,
                encoder,
                self._options.checksum,
                self._options.checkpoints,
            )
            tally.skip(writer.kept_nbytes)
            writer.write(count)
            writer.done_nbytes = self.disk_nbytes
            count()
        self.digest = writer.digest(self.disk_nbytes)
        return ()
