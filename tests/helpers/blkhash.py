"""blkhash by its definition, with hashlib: slow, and shares no code with imgcore."""

from __future__ import annotations

import hashlib
import struct

BLOCK = 64 * 1024

# Disks, and the digests that blkhash states for them.
VECTORS = {
    b"": "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc",
    b"A": "60fb4e2bdf7dfc32f8230836f7453a77e665e4a1d3cc117944e0296d40b7800c",
    bytes(BLOCK): "8ab067ab7939a3d4f40cbb118956c07c06aeae2d075d6e0a2ebbb94bd42832af",
    bytes(BLOCK + 1): "43702a4ffbe4bdb5c0cf900dd2a899fdd2536b78559f8b55cf0ed7fe1e8195b5",
    bytes(16 * BLOCK): "3dd455346755274ce76f1c555df5e05c1cdd8da4b1c70ab7c2a6b09f51bb5ce0",
    b"A" * BLOCK + bytes(BLOCK) + b"B" * (BLOCK // 2): (
        "c36703dbf20c51247b8af34524a6aa4218450b3db44c9a08bddfce190e28ce93"
    ),
}


def leaves(content: bytes) -> list[bytes]:
    """Return the SHA-256 of each block of a disk."""
    return [
        hashlib.sha256(content[start : start + BLOCK]).digest()
        for start in range(0, len(content), BLOCK)
    ]


def digest(content: bytes) -> str:
    """Return the digest of a disk, in hexadecimal."""
    whole = b"".join(leaves(content)) + struct.pack("<Q", len(content))
    return hashlib.sha256(whole).hexdigest()


def tree(content: bytes) -> bytes:
    """Return the tree of a disk."""
    parts = [
        b"IMGCTREE",
        struct.pack("<IIIIQ", 1, 1, BLOCK, 0, len(content)),
        *leaves(content),
        bytes.fromhex(digest(content)),
    ]
    before = b"".join(parts)
    return before + hashlib.sha256(before).digest()
