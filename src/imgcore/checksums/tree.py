"""Tree files: the checksum of each block of a disk, and the digest that they make.

docs/checksums.md has the layout.  A tree has 32 bytes for each 64 KiB of the disk, so
that it is read and written in pieces.
"""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore.checksums.digest import BLOCK_NBYTES, Digest
from imgcore.errors import (
    CorruptImageError,
    LimitExceededError,
    OptionError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.files.host_file import HostFile
from imgcore.limits import MAX_VIRTUAL_NBYTES

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from typing import Self

    from _typeshed import ReadableBuffer

    from imgcore.files.byte_source import ByteSource
    from imgcore.files.target_file import TargetFile

LEAF_NBYTES: Final = 32
# Leaves that are read at once: 1 MiB of them are 2 GiB of the disk.
PIECE_NBLOCKS: Final = 1 << 15

_MAGIC: Final = b"IMGCTREE"
_VERSION: Final = 1
# Magic, version, algorithm, block size, zero, virtual size.
_HEADER: Final = struct.Struct("<8sIIIIQ")
# The disk's digest, and the SHA-256 of everything before it.
_TRAILER_NBYTES: Final = 2 * LEAF_NBYTES
_NUMBERS: Final = {"sha256": 1, "blake3": 2}
_NAMES: Final = {number: name for name, number in _NUMBERS.items()}


class _Header(NamedTuple):
    algorithm: str
    virtual_size: int

    @property
    def n_blocks(self) -> int:
        return -(-self.virtual_size // BLOCK_NBYTES)

    @property
    def file_nbytes(self) -> int:
        return _HEADER.size + self.n_blocks * LEAF_NBYTES + _TRAILER_NBYTES

    def pack(self) -> bytes:
        number = _NUMBERS[self.algorithm]
        return _HEADER.pack(_MAGIC, _VERSION, number, BLOCK_NBYTES, 0, self.virtual_size)

    @classmethod
    def of(cls, file: ByteSource) -> Self:
        """Read and verify the header, and that the file's size suits it."""
        path = file.path
        if not is_tree(file):
            raise WrongFormatError(
                f"is not a checksum tree: it lacks the magic {_MAGIC.decode()}", path=path
            )
        if file.nbytes < _HEADER.size:
            raise CorruptImageError(
                f"the checksum tree is truncated: {file.nbytes} bytes, "
                f"and its header has {_HEADER.size}",
                path=path,
            )
        _, version, number, block_nbytes, reserved, nbytes = _HEADER.unpack(
            file.pread(0, _HEADER.size)
        )
        if version != _VERSION:
            raise UnsupportedFeatureError(
                f"the checksum tree has version {version}: {_VERSION} is read", path=path
            )
        if number not in _NAMES:
            known = ", ".join(f"{n} ({name})" for n, name in _NAMES.items())
            raise UnsupportedFeatureError(
                f"the checksum tree has the algorithm {number}: {known} are known", path=path
            )
        if block_nbytes != BLOCK_NBYTES:
            raise UnsupportedFeatureError(
                f"the checksum tree has blocks of {block_nbytes} bytes: {BLOCK_NBYTES} are read",
                path=path,
            )
        if reserved:
            raise CorruptImageError(
                f"a reserved field of the checksum tree is 0x{reserved:x}: it must be 0",
                path=path,
                offset=20,
            )
        if nbytes > MAX_VIRTUAL_NBYTES:
            raise LimitExceededError(
                f"the checksum tree is of a disk of {nbytes} bytes: "
                f"at most {MAX_VIRTUAL_NBYTES} are allowed",
                path=path,
            )
        header = cls(_NAMES[number], nbytes)
        if file.nbytes != header.file_nbytes:
            what = "truncated" if file.nbytes < header.file_nbytes else "too long"
            raise CorruptImageError(
                f"the checksum tree is {what}: {file.nbytes} bytes, and that of a disk of "
                f"{nbytes} bytes has {header.file_nbytes}",
                path=path,
            )
        return header


def tree_nbytes(virtual_size: int) -> int:
    """Return the size of the tree of a disk."""
    return _Header("", virtual_size).file_nbytes


def zero_leaf(algorithm: str) -> bytes:
    """Return the leaf of a whole block of zeros."""
    from imgcore._core import Hasher

    return Hasher(algorithm).leaf(bytes(BLOCK_NBYTES))


def is_tree(file: ByteSource) -> bool:
    """Tell whether an open file begins as a checksum tree does."""
    return file.nbytes >= len(_MAGIC) and file.pread(0, len(_MAGIC)) == _MAGIC


class TreeFile:
    """A checksum tree that is open for reading; a context manager.

    Attributes
    ----------
    file : HostFile
    path : str
    digest : Digest
        The disk's digest.
    virtual_size : int
        Bytes of the disk, those of an incomplete last sector included.
    n_blocks : int
        Blocks of the disk; the last one may be short.
    """

    def __init__(self, file: HostFile) -> None:
        """Take over an open file and verify all of it; an error closes it."""
        self.file: HostFile = file
        self.path: str = file.path
        try:
            header = _Header.of(file)
            self.virtual_size: int = header.virtual_size
            self.n_blocks: int = header.n_blocks
            self.digest: Digest = self._verified(header)
        except BaseException:
            file.close()
            raise

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a tree and verify its size and its digests, for which it is read once.

        Raises
        ------
        WrongFormatError
            It is not a tree.
        CorruptImageError
            It is truncated, too long or damaged.
        UnsupportedFeatureError, LimitExceededError
            Version, algorithm, block size or size of the disk are not supported.
        OSError
            The system cannot open or read the file.
        """
        return cls(HostFile.open(path))

    def _verified(self, header: _Header) -> Digest:
        """Return the disk's digest; CorruptImageError if a digest is wrong."""
        from imgcore._core import Hasher, checksum_algorithms

        if header.algorithm not in checksum_algorithms():
            raise UnsupportedFeatureError(
                f"the checksum tree has {header.algorithm}, which is not in this build of imgcore",
                path=self.path,
            )
        hasher, own = Hasher(header.algorithm), hashlib.sha256(header.pack())
        left = self.virtual_size
        for leaves in self.leaves():
            own.update(leaves)
            nbytes = min(left, len(leaves) // LEAF_NBYTES * BLOCK_NBYTES)
            hasher.add_leaves(leaves, nbytes)
            left -= nbytes
        stated, stated_own = self._trailer(header)
        own.update(stated)
        if own.digest() != stated_own:
            raise CorruptImageError(
                "the checksum tree is damaged: its content does not have the digest at its end",
                path=self.path,
            )
        if hasher.digest() != stated:
            raise CorruptImageError(
                "the checksum tree states a digest of the disk that its leaves do not make",
                path=self.path,
            )
        return Digest(stated, header.algorithm)

    def _trailer(self, header: _Header) -> tuple[bytes, bytes]:
        trailer = self.file.pread(header.file_nbytes - _TRAILER_NBYTES, _TRAILER_NBYTES)
        return trailer[:LEAF_NBYTES], trailer[LEAF_NBYTES:]

    def read(self, first_block: int, n_blocks: int) -> bytes:
        """Return the leaves of some blocks of the disk."""
        assert 0 <= first_block <= first_block + n_blocks <= self.n_blocks
        return self.file.pread(_HEADER.size + first_block * LEAF_NBYTES, n_blocks * LEAF_NBYTES)

    def leaves(self) -> Iterator[bytes]:
        """Yield all leaves in order, `PIECE_NBLOCKS` at a time."""
        for first in range(0, self.n_blocks, PIECE_NBLOCKS):
            yield self.read(first, min(PIECE_NBLOCKS, self.n_blocks - first))

    def refuse_other(self, path: str, algorithm: str, virtual_size: int) -> None:
        """Raise OptionError if the tree cannot be compared with what ``path`` names."""
        if self.digest.algorithm != algorithm:
            raise OptionError(
                f"the checksum tree has {self.digest.algorithm}, and {path} {algorithm}",
                path=self.path,
            )
        if self.virtual_size != virtual_size:
            raise OptionError(
                f"the checksum tree is of a disk of {self.virtual_size} bytes, and {path} "
                f"has {virtual_size}",
                path=self.path,
            )

    def check_unchanged(self) -> None:
        """Raise ImgcoreError if the file has changed since it was opened."""
        self.file.check_unchanged()

    def close(self) -> None:
        """Close the file; more than once is allowed."""
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TreeWriter:
    """Writes a checksum tree from its first leaf to its last; a `LeafSink`.

    Parameters
    ----------
    file : TargetFile
        Empty.
    algorithm : str
        ``sha256`` or ``blake3``.
    virtual_size : int
        Bytes of the disk.
    """

    def __init__(self, file: TargetFile, algorithm: str, virtual_size: int) -> None:
        self._file = file
        self._header = _Header(algorithm, virtual_size)
        self._zeros = zero_leaf(algorithm) * PIECE_NBLOCKS
        self._own = hashlib.sha256()
        self._offset = 0
        self._append(self._header.pack())

    def add(self, leaves: ReadableBuffer) -> None:
        """Write the next leaves."""
        self._append(leaves)

    def add_zeros(self, n_blocks: int) -> None:
        """Write the leaves of blocks of zeros."""
        for first in range(0, n_blocks, PIECE_NBLOCKS):
            n = min(PIECE_NBLOCKS, n_blocks - first)
            self._append(memoryview(self._zeros)[: n * LEAF_NBYTES])

    def finish(self, digest: Digest) -> None:
        """Write the disk's digest and the tree's own; all leaves have been added."""
        self._append(digest.digest)
        self._append(self._own.digest())
        assert self._offset == self._header.file_nbytes, "a tree has one leaf for each block"

    def _append(self, data: ReadableBuffer) -> None:
        self._own.update(data)
        self._file.pwrite(self._offset, data)
        self._offset += memoryview(data).nbytes
