"""The digest of a disk's content, over blocks of 64 KiB."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from imgcore.errors import ImgcoreError

BLOCK_NBYTES: Final = 64 * 1024
ALGORITHMS: Final = ("sha256", "blake3")


class Digest(NamedTuple):
    """The checksum of a virtual disk's content.

    It does not depend on the format, the allocation or the number of threads.

    Attributes
    ----------
    digest : bytes
        32 bytes.
    algorithm : str
        ``sha256`` or ``blake3``.
    block_size : int
        Bytes of the blocks whose checksums it is made of.
    """

    digest: bytes
    algorithm: str
    block_size: int = BLOCK_NBYTES

    @property
    def hexdigest(self) -> str:
        """The digest in hexadecimal, as `blksum` prints it."""
        return self.digest.hex()

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "algorithm": self.algorithm,
            "block_size": self.block_size,
            "digest": self.hexdigest,
        }


class ChecksumError(ImgcoreError):
    """A disk does not read as its checksums say.

    Attributes
    ----------
    found : Digest
        The digest of what was read.
    first_difference : int or None
        Offset of the first block of the disk that differs, if a tree tells it.
    """

    def __init__(
        self, message: str, *, path: str, found: Digest, first_difference: int | None = None
    ) -> None:
        super().__init__(message, path=path)
        self.found: Digest = found
        self.first_difference: int | None = first_difference
