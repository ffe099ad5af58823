"""The sink for Compute Engine: a gzip tar archive with one sparse file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.disk.data_ranges import data_parts
from imgcore.disk.digests import DiskHasher
from imgcore.disk.limited_chunks import await_rate, piece_nbytes
from imgcore.engine.thread_budget import Lease
from imgcore.limits import MAX_TAR_SEGMENTS
from imgcore.platforms.profiles import GCE_MEMBER_NAME
from imgcore.streams.gzip import GzipEncoder
from imgcore.streams.tar import archive_end, sparse_header

if TYPE_CHECKING:
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
        source, nbytes, limit = self._source, self.disk_nbytes, self._options.limit
        parts = data_parts(source.data_extents(), source.virtual_size, MAX_TAR_SEGMENTS)
        header = sparse_header(GCE_MEMBER_NAME, nbytes, parts)
        hasher = DiskHasher(self._options.checksum)
        done = n_read = 0
        with (
            Lease(self._options.threads) as lease,
            GzipEncoder(self._target.main, lease.n_threads) as encoder,
        ):

            def count() -> None:
                tally.count(done, data=n_read, read=n_read, written=encoder.written_nbytes)

            encoder.write(header)
            for offset, length in parts:
                hasher.zeros(offset - done)
                done = offset
                for piece in source.chunks(offset, length, piece_nbytes(limit)):
                    await_rate(limit, len(piece), count)
                    encoder.write(piece)
                    hasher.update(piece)
                    done += len(piece)
                    n_read += len(piece)
                    count()
            encoder.write(archive_end(len(header) + n_read))
            encoder.finish()
            hasher.zeros(nbytes - done)
            done = nbytes
            count()
        self.digest = hasher.digest()
        return ()
