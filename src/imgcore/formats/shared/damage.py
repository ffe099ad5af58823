"""Decides about damage in an image: an error, or what is lost when salvaging.

A reader reports each problem to its `Damage` and reads its tables through it.  Without
salvage, every problem is raised.  With it, the reader goes on: a problem of the headers
becomes a warning, and guest ranges whose place is not known become LOST extents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol

from imgcore.log import log
from imgcore.text import one_line

if TYPE_CHECKING:
    from imgcore.errors import ImgcoreError

# The least that can be unreadable, as in native/engine/source.c.
_PIECE_NBYTES: Final = 4096


class TableFile(Protocol):
    """A file that has tables: a `ByteSource`, or one with its log replayed."""

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        ...

    def pread(self, offset: int, length: int) -> bytes:
        """Return exactly ``length`` bytes; see `ByteSource.pread`."""
        ...


class Damage:
    """How one image's reader deals with damage.

    Parameters
    ----------
    salvages : bool
        Whether to go on after damage.
    """

    def __init__(self, *, salvages: bool) -> None:
        self.salvages = salvages

    def report(self, error: ImgcoreError) -> None:
        """Raise an error, or warn of it when salvaging."""
        if not self.salvages:
            raise error
        path = "" if error.path is None else f"{one_line(error.path)}: "
        log.warning("%s%s; salvaging what is there", path, error.reason)

    def read_table(self, file: TableFile, offset: int, nbytes: int, impossible: bytes) -> Any:
        """Return part of a table.

        Parameters
        ----------
        file : TableFile
        offset, nbytes : int
            Host range in bytes, in whole entries.
        impossible : bytes
            A table entry that is never valid.  When salvaging, it takes the place of
            each entry that the file does not have or that cannot be read.

        Returns
        -------
        bytes-like
            ``nbytes`` bytes.

        Raises
        ------
        CorruptImageError, OSError
            Only without salvage: the range cannot be read, or not all of it is in the
            file.
        """
        if not self.salvages:
            return file.pread(offset, nbytes)
        table = bytearray(impossible * -(-nbytes // len(impossible)))[:nbytes]
        held_nbytes = max(0, min(nbytes, file.nbytes - offset))
        _fill(file, offset, memoryview(table)[: held_nbytes - held_nbytes % len(impossible)])
        return table


def _fill(file: TableFile, offset: int, view: memoryview) -> None:
    """Read what can be read; leave the pieces that cannot."""
    if not len(view):
        return
    try:
        view[:] = file.pread(offset, len(view))
    except OSError:
        if len(view) <= _PIECE_NBYTES:
            return
        # The first half ends where a piece of the file ends.
        middle = offset + len(view) // 2
        middle -= middle % _PIECE_NBYTES
        half = middle - offset if middle > offset else _PIECE_NBYTES - offset % _PIECE_NBYTES
        _fill(file, offset, view[:half])
        _fill(file, offset + half, view[half:])


STRICT: Final = Damage(salvages=False)
SALVAGING: Final = Damage(salvages=True)
