"""The sink for compressed raw disks."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from imgcore.disk.encoded_content import Content, ContentWriter
from imgcore.disk.limited_chunks import limited_chunks
from imgcore.engine.thread_budget import Lease, Turn
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
        self._codec = CODECS[codec]
        self._options = options

    def write(self, tally: Tally) -> tuple[BadRange, ...]:
        """Write the whole disk.  Unreadable data is an error, so no ranges are bad."""
        options, source = self._options, self._source
        nbytes = self.disk_nbytes if source.size_is_known else None
        turn = Turn(tally.repeat)
        with ExitStack() as stack:
            if self._codec.takes_turns:
                stack.enter_context(turn)
            lease = stack.enter_context(Lease(options.threads))
            encoder = stack.enter_context(
                self._codec.encoder(self._target.main, nbytes, lease.n_threads)
            )

            def count() -> None:
                turn.note()
                done = writer.data_nbytes
                tally.count(done, data=done, read=done, written=encoder.written_nbytes)

            content = Content(
                header=b"",
                parts=[(0, _ANY_NBYTES if nbytes is None else nbytes)],
                chunks=lambda start, _: limited_chunks(
                    source, options.limit, count, lease.n_threads, start
                ),
                end=lambda _: b"",
            )
            writer = ContentWriter(
                self._target, content, encoder, options.checksum, options.checkpoints
            )
            tally.skip(writer.kept_nbytes)
            writer.write(count)
            count()
        if nbytes is None:
            self.disk_nbytes = source.exact_nbytes
            tally.total_nbytes = source.virtual_size
        self.digest = writer.digest(self.disk_nbytes)
        return ()
