"""The sink for compressed raw disks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.disk.digests import DiskHasher
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
        done, options = 0, self._options
        nbytes = self.disk_nbytes if self._source.size_is_known else None
        hasher = DiskHasher(options.checksum)
        with (
            Lease(options.threads) as lease,
            self._encoder(self._target.main, nbytes, lease.n_threads) as encoder,
        ):

            def count() -> None:
                tally.count(done, data=done, read=done, written=encoder.written_nbytes)

            for chunk in limited_chunks(self._source, options.limit, count):
                encoder.write(chunk)
                hasher.update(chunk)
                done += len(chunk)
                count()
            encoder.finish()
            count()
        self.digest = hasher.digest()
        if nbytes is None:
            self.disk_nbytes = self._source.exact_nbytes
            tally.total_nbytes = self._source.virtual_size
        return ()
