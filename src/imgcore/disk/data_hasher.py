"""The digest of a disk from the data of its parts, which come in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from imgcore._core import CHECKSUM_NBYTES, Hasher
from imgcore.checksums.digest import BLOCK_NBYTES, Digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_NO_PART: Final = (0, 0)


class DataHasher:
    """The digest of a disk that has zeros between its parts.

    Parameters
    ----------
    algorithm : str or None
        Without one, nothing is done.
    parts : sequence of (offset, length)
        Ascending; they start and end with blocks of the checksum, or with the disk.
    keeps_leaves : bool
        Whether `take_leaves` will be called.

    Attributes
    ----------
    keeps_leaves : bool
        As given, but not without an algorithm.
    """

    def __init__(
        self, algorithm: str | None, parts: Sequence[tuple[int, int]], *, keeps_leaves: bool
    ) -> None:
        self._algorithm = algorithm
        self._hasher = None if algorithm is None else Hasher(algorithm)
        self.keeps_leaves: bool = keeps_leaves and algorithm is not None
        self._parts: Iterator[tuple[int, int]] = iter(parts)
        self._left = 0
        self._position = 0
        # The start of a block, and leaves that were not taken yet.
        self._block = bytearray()
        self._leaves = bytearray()

    def update(self, content: Any) -> None:
        """Add the next bytes of the data."""
        if self._hasher is None:
            return
        with memoryview(content) as view:
            if self.keeps_leaves:
                self._update_by_blocks(view)
            else:
                self._in_parts(len(view), lambda at, n: self._update(view[at : at + n]))

    def _update(self, octets: memoryview) -> None:
        assert self._hasher is not None
        self._hasher.update(octets)

    def _update_by_blocks(self, view: memoryview) -> None:
        at = 0
        if self._block:
            at = min(BLOCK_NBYTES - len(self._block), len(view))
            self._block += view[:at]
            if len(self._block) == BLOCK_NBYTES:
                self._add_blocks(memoryview(bytes(self._block)))
                self._block.clear()
        end = len(view) - (len(view) - at) % BLOCK_NBYTES
        self._add_blocks(view[at:end])
        self._block += view[max(end, at) :]

    def _add_blocks(self, view: memoryview) -> None:
        assert self._hasher is not None
        leaf = self._hasher.leaf
        starts = range(0, len(view), BLOCK_NBYTES)
        leaves = b"".join([leaf(view[at : at + BLOCK_NBYTES]) for at in starts])
        self._leaves += leaves
        self.add_leaves(memoryview(leaves))

    def _add_part(self, leaves: memoryview, at: int, nbytes: int) -> None:
        assert self._hasher is not None
        first, n = at // BLOCK_NBYTES, nbytes // BLOCK_NBYTES
        rows = leaves[first * CHECKSUM_NBYTES : (first + n) * CHECKSUM_NBYTES]
        self._hasher.add_leaves(rows, nbytes)

    def _in_parts(self, nbytes: int, add: Callable[[int, int], None]) -> None:
        """Call ``add`` with ranges of ``nbytes`` of data, each inside of one part."""
        at = 0
        while at < nbytes:
            while not self._left:
                offset, self._left = next(self._parts, _NO_PART)
                if not self._left:
                    raise ValueError("data after the last part")
                self._zeros(offset)
            n = min(self._left, nbytes - at)
            add(at, n)
            at += n
            self._left -= n
            self._position += n

    def _zeros(self, end: int) -> None:
        if self._hasher is not None and self._position < end:
            self._hasher.zeros(end - self._position)
            self._position = end

    def add_leaves(self, leaves: memoryview) -> None:
        """Add the next blocks of the data, by their leaves."""
        self._in_parts(
            len(leaves) // CHECKSUM_NBYTES * BLOCK_NBYTES,
            lambda at, nbytes: self._add_part(leaves, at, nbytes),
        )

    def take_leaves(self, n_blocks: int) -> bytes:
        """Return the leaves of the next whole blocks of data, which were added."""
        nbytes = n_blocks * CHECKSUM_NBYTES if self.keeps_leaves else 0
        taken = bytes(self._leaves[:nbytes])
        del self._leaves[:nbytes]
        return taken

    def digest(self, nbytes: int) -> Digest | None:
        """Return the digest of the disk of so many bytes, which all were added."""
        if self._hasher is None or self._algorithm is None:
            return None
        rest = memoryview(bytes(self._block))
        self._in_parts(len(rest), lambda at, n: self._update(rest[at : at + n]))
        self._block.clear()
        self._zeros(nbytes)
        return Digest(self._hasher.digest(), self._algorithm)
