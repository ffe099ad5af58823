"""The digest of a disk's content, over blocks of 64 KiB."""

from __future__ import annotations

from typing import Final, NamedTuple

BLOCK_NBYTES: Final = 64 * 1024


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
