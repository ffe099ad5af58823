"""Conversion by reflinks: range by range, or of the whole file at once.

The whole file is cloned by one call, and rewritten in the clone.  Blocks keep their
place in the file then, so that it makes no difference whether their places in source
and target fit each other.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from imgcore.disk.digests import DigestedDisk
from imgcore.disk.image_sink import ImageSink
from imgcore.disk.image_source import ImageSource
from imgcore.engine.reflinks import ReflinkCount
from imgcore.errors import LimitExceededError, OptionError, UnsupportedFeatureError
from imgcore.files.host_file import HostFile
from imgcore.files.reflinks import reflink_whole
from imgcore.files.staged_file import StagedFile
from imgcore.formats.api import Described
from imgcore.limits import KIB
from imgcore.rewriting.block_size import fitting_director
from imgcore.rewriting.moving import Workers
from imgcore.rewriting.refusals import refuse_damaged, refuse_layout

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imgcore.checksums.digest import Digest
    from imgcore.disk.sink import Sink
    from imgcore.disk.source import Source
    from imgcore.engine.bad_ranges import BadRange
    from imgcore.engine.progress import Tally
    from imgcore.engine.reflinks import ReflinkRule
    from imgcore.files.target import Target
    from imgcore.formats.api import Driver, WriteRequest
    from imgcore.rewriting.director import Director

# A call of the system takes as long as copying so many bytes.
_CALL_NBYTES: Final = 64 * KIB
# The usual block of a file system.
_MIN_UNUSED_NBYTES: Final = 4 * KIB


class Clone:
    """The conversion of an image in a clone of its file.

    Parameters
    ----------
    source : HostFile
        The image's only file with data.
    director : Director
    trust_blocks : bool
        Whether compressed blocks that stay were not decompressed.
    """

    def __init__(self, source: HostFile, director: Director, *, trust_blocks: bool) -> None:
        self._source, self._director = source, director
        self._trusts = trust_blocks

    @classmethod
    def of(
        cls, source: Source, driver: Driver, request: WriteRequest[Any], *, trust_blocks: bool
    ) -> Clone | None:
        """Return the conversion; None if the target can only be made range by range.

        Raises
        ------
        CorruptImageError
            A compressed block, which the target would take over, is damaged.  With
            ``trust_blocks`` they are not decompressed.
        """
        image = source.image if isinstance(source, ImageSource) else None
        if image is None or len(image.chain) > 1 or image.virtual_size != request.virtual_size:
            return None
        try:
            refuse_layout(image, driver)
            director = fitting_director(image, driver, request, trust_blocks=trust_blocks)
        except (UnsupportedFeatureError, OptionError, LimitExceededError):
            return None
        file = image.sources[0].file
        if director.rewriter.rule is None or isinstance(director.rewriter, Described):
            return None
        if not isinstance(file, HostFile):
            return None
        return cls(file, director, trust_blocks=trust_blocks)

    def measure(self) -> ReflinkCount:
        """Return what is reflinked, and what moves and so is copied."""
        director = self._director
        n_calls = 1 + len(self._unused(np.zeros((0, 2), dtype=np.int64)))
        return ReflinkCount(self._reflinked_nbytes, director.moved_nbytes, 0, n_calls)

    @property
    def _reflinked_nbytes(self) -> int:
        """Bytes of the file that both images have."""
        reused_nbytes, packed_nbytes = self._director.reused
        return self._director.stayed_nbytes - reused_nbytes + packed_nbytes

    def write(self, target: Target, tally: Tally, workers: Workers) -> None:
        """Clone the file and rewrite the clone.

        What the new image does not use of the old file is freed, so that the target
        has nothing of the source but its disk.
        """
        director, file = self._director, target.main
        reflink_whole(self._source, file)
        with closing(StagedFile(file, director.append_offset, director.overwrites)) as staged:
            director.write(staged, tally, workers)
            staged.apply()
            written = [(offset, len(data)) for offset, data in staged.change.pieces]
        for start, end in self._unused(np.array(written, dtype=np.int64).reshape(-1, 2)).tolist():
            if start < file.nbytes:
                file.zero(start, min(end, file.nbytes) - start)
        reused_nbytes, packed_nbytes = director.reused
        tally.count(
            tally.total_nbytes,
            data=director.stayed_nbytes + director.moved_nbytes,
            read=tally.read_nbytes + (0 if self._trusts else packed_nbytes),
            written=tally.written_nbytes,
            reflinked=self._reflinked_nbytes,
            reused=reused_nbytes,
            trusted=reused_nbytes if self._trusts else 0,
        )

    def _unused(self, written: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the (start, end) of what the new image does not use of the old file.

        ``written`` has offset and length of what is overwritten.  Ranges shorter than a
        block of the file system are left out: padding, or a VHD's sector bitmap.
        """
        start, end = self._director.stayed_ranges
        old_end = [self._director.survey.file_nbytes]
        # Where as many ranges have ended as have started, there is a gap.
        until = np.sort(np.concatenate((start, written[:, 0], old_end)))
        from_ = np.sort(np.concatenate(([0], end, written.sum(axis=1))))
        is_unused = until - from_ >= _MIN_UNUSED_NBYTES
        return np.stack((from_[is_unused], until[is_unused]), axis=1)


def cheapest_way(
    source: Source,
    driver: Driver,
    request: WriteRequest[Any],
    rule: ReflinkRule,
    *,
    trust_blocks: bool,
) -> tuple[Clone | None, ReflinkCount]:
    """Return how to convert by reflinks, and what that reflinks and copies.

    ``trust_blocks`` is as for `Clone.of`.

    Returns
    -------
    Clone or None
        None is range by range.
    ReflinkCount
    """
    for layer in source.layers:
        refuse_damaged(layer.reader, layer.file.path)
    by_ranges = rule.measure(source.data_extents(rule))
    clone = None
    if rule.has_reflinks:
        clone = Clone.of(source, driver, request, trust_blocks=trust_blocks)
    if clone is not None:
        at_once = clone.measure()
        if _cost(at_once) < _cost(by_ranges):
            return clone, at_once
    return None, by_ranges


def _cost(count: ReflinkCount) -> int:
    return count.copied + count.n_calls * _CALL_NBYTES


def reflinking_sink(sink: Sink) -> ReflinkSink:
    """Return what writes the image of ``sink`` by the best way."""
    assert isinstance(sink, ImageSink), "others refuse reflinks"
    return ReflinkSink(sink)


class ReflinkSink:
    """Writes an image by whichever way costs less; a `Sink`.

    Parameters
    ----------
    sink : ImageSink
        Writes it range by range.
    """

    overwrites: bool = False

    def __init__(self, sink: ImageSink) -> None:
        self._sink = sink
        self.digest: Digest | None = None

    @property
    def disk_nbytes(self) -> int:
        """Bytes of the target's disk."""
        return self._sink.disk_nbytes

    @property
    def logical_sector_nbytes(self) -> int | None:
        """What the format states."""
        return self._sink.logical_sector_nbytes

    def write(self, tally: Tally) -> tuple[BadRange, ...]:
        """Write the image, or raise before that if too much would be copied."""
        sink = self._sink
        clone, count = cheapest_way(
            sink.source,
            sink.driver,
            sink.request,
            sink.reflink_rule,
            trust_blocks=sink.options.trust_blocks,
        )
        sink.options.reflink.refuse_copies(count, sink.source.path)
        if clone is None:
            bad_ranges = sink.write(tally)
            self.digest = sink.digest
            return bad_ranges
        options = sink.options
        if options.checksum is not None:
            self.digest = self._source_digest(options.checksum, tally.before_start())
        workers = Workers(options.threads, options.variants, options.limit)
        clone.write(sink.target, tally, workers)
        return ()

    def _source_digest(self, algorithm: str, tally: Tally) -> Digest:
        """Return the digest of the source's disk, which the clone will have.

        Nothing else reads the blocks that stay where they are.
        """
        sink, options = self._sink, self._sink.options
        disk = DigestedDisk.of_source(sink.source)._replace(nbytes=sink.disk_nbytes)
        return disk.digest(
            algorithm,
            threads=options.threads,
            variants=options.variants,
            limit=options.limit,
            report=lambda _, data: tally.count(0, data=0, read=data, written=0),
        )
