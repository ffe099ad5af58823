"""The tree of a disk's new state, of leaves that are new and leaves that stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imgcore._core import Hasher
from imgcore.checksums.digest import BLOCK_NBYTES, Digest
from imgcore.checksums.tree import LEAF_NBYTES, PIECE_NBLOCKS, TreeWriter, zero_leaf

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from imgcore.checksums.tree import TreeFile
    from imgcore.files.target_file import TargetFile


class NewTree:
    """Writes a tree in order, and makes the digest of the disk; a `LeafSink`.

    Parameters
    ----------
    file : TargetFile
        Empty.
    algorithm : str
        ``sha256`` or ``blake3``.
    virtual_size : int
        Bytes of the disk.
    old : TreeFile, optional
        The tree of the older state, for `replace`.
    """

    def __init__(
        self, file: TargetFile, algorithm: str, virtual_size: int, old: TreeFile | None = None
    ) -> None:
        self._writer = TreeWriter(file, algorithm, virtual_size)
        self._hasher = Hasher(algorithm)
        self._algorithm = algorithm
        self._nbytes = virtual_size
        self._old = old
        self._zeros = zero_leaf(algorithm) * PIECE_NBLOCKS
        # Bytes of the disk whose leaves are there.
        self._position = 0

    def add(self, leaves: ReadableBuffer) -> None:
        """Take the next leaves."""
        n_blocks = memoryview(leaves).nbytes // LEAF_NBYTES
        nbytes = min(n_blocks * BLOCK_NBYTES, self._nbytes - self._position)
        self._hasher.add_leaves(leaves, nbytes)
        self._writer.add(leaves)
        self._position += nbytes

    def add_zeros(self, n_blocks: int) -> None:
        """Take the leaf of a whole block of zeros, ``n_blocks`` times."""
        while n_blocks:
            n = min(n_blocks, PIECE_NBLOCKS)
            self.add(memoryview(self._zeros)[: n * LEAF_NBYTES])
            n_blocks -= n

    def replace(self, offset: int, length: int, octets: memoryview | None) -> None:
        """Take whole blocks of the disk that have changed; those before it stay.

        ``octets`` is None if they are zeros.
        """
        self._keep(offset)
        end = min(offset + length, self._nbytes)
        if octets is None:
            self.add_zeros((end - offset) // BLOCK_NBYTES)
            if self._position < end:
                self.add(self._hasher.leaf(bytes(end - self._position)))
            return
        for start in range(offset, end, BLOCK_NBYTES):
            stop = min(start + BLOCK_NBYTES, end)
            self.add(self._hasher.leaf(octets[start - offset : stop - offset]))

    def _keep(self, end: int) -> None:
        """Take the leaves of the older state up to an offset."""
        while self._position < end:
            assert self._old is not None
            first = self._position // BLOCK_NBYTES
            n_blocks = -(-(end - self._position) // BLOCK_NBYTES)
            self.add(self._old.read(first, min(n_blocks, PIECE_NBLOCKS)))

    def finish(self) -> Digest:
        """Write the end of the tree; what was not replaced stays."""
        self._keep(self._nbytes)
        digest = Digest(self._hasher.digest(), self._algorithm)
        self._writer.finish(digest)
        return digest
