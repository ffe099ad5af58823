"""How far an encoder is, in the journal of a job that can go on.

A checkpoint has a boundary of the encoder, and the CRC-32C of the target up to it.
"""

from __future__ import annotations

import zlib
from contextlib import closing
from typing import TYPE_CHECKING, Final

from imgcore._core import CHECKSUM_NBYTES, crc32c
from imgcore.checksums.digest import BLOCK_NBYTES
from imgcore.engine.inflating import inflated
from imgcore.errors import TargetError
from imgcore.limits import MIB
from imgcore.sizes import MAX_SIZE
from imgcore.streams.encoder import Boundary

if TYPE_CHECKING:
    from typing import Any

    from imgcore.disk.checkpoints import Checkpoints
    from imgcore.disk.data_hasher import DataHasher
    from imgcore.files.target import Target
    from imgcore.streams.encoder import Encoder

_LEVEL: Final = 1
_READ_NBYTES: Final = MIB
_CRC_NBITS: Final = 32


class StreamJournal:
    """Records how far an encoder is, and knows it of earlier runs.

    Parameters
    ----------
    checkpoints : Checkpoints
    target : Target
    header_nbytes : int
        Bytes of the encoder's input that come before data of the disk.

    Attributes
    ----------
    start : int
        Bytes of the encoder's input that are done; 0 without an earlier run.
    """

    def __init__(self, checkpoints: Checkpoints, target: Target, header_nbytes: int) -> None:
        self._checkpoints = checkpoints
        self._target = target
        self._header_nbytes = header_nbytes
        self._saved = Boundary(0, 0, 0, ())
        last = checkpoints.last()
        if last is not None:
            with checkpoints.reading():
                self._saved = _boundary(last.head["end"])
        self.start: int = self._saved.nbytes

    # -- recording ---------------------------------------------------------------------

    def save_if_due(self, encoder: Encoder, hasher: DataHasher) -> None:
        """Save a checkpoint, if it is time; the encoder has got whole units."""
        if not self._checkpoints.is_due(0):
            return
        boundary = encoder.boundary()
        if boundary is None or boundary.nbytes <= self._saved.nbytes:
            encoder.mark()
            return
        n_blocks = self._n_blocks(boundary) - self._n_blocks(self._saved)
        leaves = hasher.take_leaves(n_blocks)
        head = {
            "start": self._saved,
            "end": boundary,
            "leaves": len(leaves) // CHECKSUM_NBYTES,
        }
        self._checkpoints.save(
            self._target, boundary.written_nbytes, head, [zlib.compress(leaves, _LEVEL)]
        )
        self._saved = boundary

    def _n_blocks(self, boundary: Boundary) -> int:
        """Return how many blocks of data are whole at a boundary."""
        return max(boundary.nbytes - self._header_nbytes, 0) // BLOCK_NBYTES

    def finish(self) -> None:
        """Wait for the last checkpoint."""
        self._checkpoints.finish()

    # -- going on ----------------------------------------------------------------------

    def give_leaves(self, hasher: DataHasher) -> None:
        """Give the leaves of the earlier runs to a hasher."""
        n_expected = self._n_blocks(self._saved) if hasher.keeps_leaves else 0
        with self._checkpoints.reading():
            for record in self._checkpoints.saved():
                n = int(record.head["leaves"])
                hasher.add_leaves(memoryview(inflated(record.blob, n * CHECKSUM_NBYTES)))
                n_expected -= n
            if n_expected:
                raise ValueError("other leaves than those of the data")

    def verify(self) -> None:
        """Read what the earlier runs have written, and compare its CRC.

        Raises
        ------
        TargetError
            The target does not hold it any more.
        """
        main = self._target.main
        with closing(main.reopened(main.path)) as file:
            for record in self._checkpoints.to_verify():
                with self._checkpoints.reading():
                    start, end = _boundary(record.head["start"]), _boundary(record.head["end"])
                crc = start.crc
                for at in range(start.written_nbytes, end.written_nbytes, _READ_NBYTES):
                    n = min(_READ_NBYTES, end.written_nbytes - at, max(file.nbytes - at, 0))
                    crc = crc32c(file.pread(at, n), crc)
                if crc != end.crc:
                    raise self._other_content(start.written_nbytes)

    def go_on(self, encoder: Encoder, before: bytearray) -> None:
        """Have an encoder go on, and compare the unit before with the target.

        Parameters
        ----------
        encoder : Encoder
        before : bytearray
            Its input before ``start``.
        """
        with self._checkpoints.reading():
            last = encoder.go_on(self._saved, memoryview(before))
        start = self._saved.written_nbytes - len(last)
        main = self._target.main
        with closing(main.reopened(main.path)) as file:
            if start < 0 or file.pread(start, len(last)) != last:
                raise self._other_content(max(start, 0))

    def require_reached(self, nbytes: int) -> None:
        """Raise ImgcoreError if the encoder's input ends before ``start``."""
        with self._checkpoints.reading():
            if nbytes < self.start:
                raise ValueError("a boundary behind the end")

    def _other_content(self, offset: int) -> TargetError:
        return TargetError(
            f"what was written of it before the break has changed, from {offset:#x} on: start "
            "again (imgcore jobs --remove)",
            path=self._target.path,
        )


def _boundary(row: Any) -> Boundary:
    nbytes, written_nbytes, crc, state = row
    found = Boundary(int(nbytes), int(written_nbytes), int(crc), tuple(map(int, state)))
    if min(found[:3]) < 0 or max(found[:2]) > MAX_SIZE or found.crc.bit_length() > _CRC_NBITS:
        raise ValueError("no boundary")
    return found
