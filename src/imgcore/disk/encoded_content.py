"""The data of a disk, given to an encoder: of compressed raw disks and of archives.

A job that goes on after a break begins at a boundary of the encoder.  The unit before
it is read and encoded once more, and compared with what the target has: so the encoder,
the source and the target are those of the earlier run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore.checksums.digest import BLOCK_NBYTES
from imgcore.disk.data_hasher import DataHasher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from imgcore.checksums.digest import Digest
    from imgcore.disk.checkpoints import Checkpoints
    from imgcore.disk.stream_journal import StreamJournal
    from imgcore.files.target import Target
    from imgcore.streams.encoder import Encoder

# An encoder that is not recorded takes pieces of any size.
_ANY_NBYTES: Final = 1 << 62


class Content(NamedTuple):
    """What an encoder gets: a header, parts of a disk, and an end.

    Attributes
    ----------
    header : bytes
    parts : sequence of (offset, length)
        Of the disk, ascending; they start and end with blocks of the checksum, or with
        the disk.
    chunks : callable
        Yields the bytes of a range of a part in order; each piece is valid until the
        next.
    end : callable
        Takes the number of bytes so far, and returns what follows them.
    """

    header: bytes
    parts: Sequence[tuple[int, int]]
    chunks: Callable[[int, int], Iterator[memoryview]]
    end: Callable[[int], bytes]

    def pieces(self, position: int) -> Iterator[tuple[int, memoryview]]:
        """Yield pieces from a position on, each with the place on the disk after it."""
        at = len(self.header)
        if position < at:
            yield 0, memoryview(self.header)[position:]
        for offset, length in self.parts:
            skipped = max(position - at, 0)
            at += length
            if skipped < length:
                done = offset + skipped
                for piece in self.chunks(done, length - skipped):
                    done += len(piece)
                    yield done, piece


class ContentWriter:
    """Writes a content to a target, through an encoder.

    Parameters
    ----------
    target : Target
    content : Content
    encoder : Encoder
        Of the target's main file.
    algorithm : str, optional
        Of the disk's digest.
    checkpoints : Checkpoints, optional
        Where the job's progress is recorded.

    Attributes
    ----------
    done_nbytes : int
        Where it is on the disk.
    data_nbytes : int
        Bytes of the disk that were written so far.
    kept_nbytes : int
        Of these, bytes that an earlier run has written.
    """

    def __init__(
        self,
        target: Target,
        content: Content,
        encoder: Encoder,
        algorithm: str | None,
        checkpoints: Checkpoints | None,
    ) -> None:
        self._content = content
        self._encoder = encoder
        self._hasher = DataHasher(algorithm, content.parts, keeps_leaves=checkpoints is not None)
        self._journal: StreamJournal | None = None
        # The positions from which the encoder, and the digest, are given anything.
        self._start = self._hash_from = 0
        if checkpoints is not None:
            from imgcore.disk.stream_journal import StreamJournal

            self._journal = StreamJournal(checkpoints, target, len(content.header))
            self._start = self._journal.start
        self.done_nbytes: int = 0
        self.data_nbytes: int = 0
        self.kept_nbytes: int = max(self._start - len(content.header), 0)

    def write(self, report: Callable[[], None]) -> None:
        """Write all of it; ``report`` is called after each piece."""
        at, before = self._begin()
        unit = _ANY_NBYTES if self._journal is None else self._encoder.unit_nbytes
        header_nbytes = len(self._content.header)
        for done, piece in self._content.pieces(at):
            left = piece
            while left:
                octets = left[: unit - at % unit]
                left = left[len(octets) :]
                if at >= header_nbytes:
                    self._hasher.update(octets[max(self._hash_from - at, 0) :])
                if at < self._start:
                    before += octets
                else:
                    self._encoder.write(octets)
                at += len(octets)
                self.data_nbytes = max(at - header_nbytes, 0)
                if self._journal is not None and at % unit == 0:
                    if at > self._start:
                        self._journal.save_if_due(self._encoder, self._hasher)
                    elif at == self._start:
                        self._journal.go_on(self._encoder, before)
                        before.clear()
            self.done_nbytes = done
            if at >= self._start:
                report()
        if self._journal is not None:
            self._journal.require_reached(at)
        self._encoder.write(self._content.end(at))
        self._encoder.finish()
        if self._journal is not None:
            self._journal.finish()

    def _begin(self) -> tuple[int, bytearray]:
        """Return where the content is read from, and room for what comes before."""
        if self._journal is None or not self._start:
            return 0, bytearray()
        self._journal.verify()
        header_nbytes = len(self._content.header)
        n_data = max(self._start - header_nbytes, 0)
        self._journal.give_leaves(self._hasher)
        self._hash_from = header_nbytes + n_data - n_data % BLOCK_NBYTES
        return max(self._start - self._encoder.lead_nbytes, 0), bytearray()

    def digest(self, nbytes: int) -> Digest | None:
        """Return the digest of the disk of so many bytes, if it was asked for."""
        return self._hasher.digest(nbytes)
