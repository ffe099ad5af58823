"""The sink for compressed raw disks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.disk.encoded_content import Content, ContentWriter
from imgcore.disk.limited_chunks import limited_chunks
from imgcore.engine.thread_budget import Lease
from imgcore.streams.codecs import CODECS

if TYPE_CHECKING:
    from imgcore.checksums.digest import Digest
    from imgcore.disk.sink_options import SinkOptions
    from imgcore.disk.source import Source
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.progress import Tally
    from imgcore.files.target import Target

# Of a disk whose size is not known yet.
_ANY_NBYTES: Final = 1 << 62


class StreamSink:
    """Writes the bytes of a disk in order, through an encoder; a `Sink`."""

    overwrites: Final = False
    logical_sector_nbytes: Final = None

    def __init__(self, target: Target, source: Source, codec: str, options: SinkOptions) -> None:
        self.digest: Digest | None = None
        self.disk_nbytes: int = source.exact_nbytes
        self._target = target
        self._source = source
        self._encoder = CODECS[codec].encoder
        self._options = options

    def write(self, tally: Tally) -> tuple[BadRange, ...]:
        """Write the whole disk.  Unreadable data is an error, so no ranges are bad."""
        options, source = self._options, self._source
        nbytes = self.disk_nbytes if source.size_is_known else None
        with (
            Lease(options.threads) as lease,
            self._encoder(self._target.main, nbytes, lease.n_threads) as encoder,
        ):

            def count() -> None:
                done = writer.data_nbytes
                tally.count(done, data=done, read=done, written=encoder.written_nbytes)

            content = Content(
                header=b"",
                parts=[(0, _ANY_NBYTES if nbytes is None else nbytes)],
                chunks=lambda start, _: limited_chunks(source, options.limit, count, start),
                end=lambda _: b"",
            )
            writer = ContentWriter(
                self._target, content, encoder, options.checksum, options.checkpoints
            )
            writer.write(count)
            count()
        if nbytes is None:
            self.disk_nbytes = source.exact_nbytes
            tally.total_nbytes = source.virtual_size
        self.digest = writer.digest(self.disk_nbytes)
        return ()
