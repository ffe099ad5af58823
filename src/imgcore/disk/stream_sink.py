"""The sink for compressed raw disks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.disk.limited_chunks import limited_chunks
from imgcore.streams.codecs import CODECS

if TYPE_CHECKING:
    from imgcore._core import RateLimit
    from imgcore.disk.source import Source
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.progress import Tally
    from imgcore.files.target import Target


class StreamSink:
    """Writes the bytes of a disk in order, through an encoder; a `Sink`."""

    overwrites: Final = False
    logical_sector_nbytes: Final = None

    def __init__(
        self, target: Target, source: Source, codec: str, threads: int, limit: RateLimit | None
    ) -> None:
        self._target = target
        self._source = source
        self._encoder = CODECS[codec].encoder
        self._threads = threads
        self._limit = limit

    def write(self, tally: Tally) -> tuple[BadRange, ...]:
        """Write the whole disk.  Unreadable data is an error, so no ranges are bad."""
        nbytes, done = self._source.exact_nbytes, 0
        with self._encoder(self._target.main, nbytes, self._threads) as encoder:

            def count() -> None:
                tally.count(done, data=done, read=done, written=encoder.written_nbytes)

            for chunk in limited_chunks(self._source, self._limit, count):
                encoder.write(chunk)
                done += len(chunk)
                count()
            encoder.finish()
            count()
        return ()
