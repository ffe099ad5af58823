"""Uses each checksum tree that a fuzzer makes, and checks the outcome."""

from __future__ import annotations

import hashlib
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from imgcore.areas.area import Area
from imgcore.checksums.differences import tree_differences
from imgcore.checksums.tree import TreeFile, TreeWriter
from imgcore.files.target import Target
from tests.fuzz.exercise import Finding, attempt
from tests.helpers import blkhash

_HEADER_NBYTES = 32
_LEAF_NBYTES = 32


class TreeFolder:
    """A folder in which trees are used one after the other."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        self._path = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))

    def close(self) -> None:
        """Remove everything."""
        shutil.rmtree(self._path)

    def use(self, data: bytes) -> str:
        """Use one tree, as it is and with right digests; see `Place.use`."""
        path = self._path / "tree"
        path.write_bytes(data)
        attempt(_read, path, None)
        path.write_bytes(with_digests(data))
        return attempt(_read, path, None)


def with_digests(data: bytes) -> bytes:
    """Correct both digests, without which a fuzzer gets no further."""
    body, trailer_nbytes = data[: -2 * _LEAF_NBYTES], 2 * _LEAF_NBYTES
    if len(data) < _HEADER_NBYTES + trailer_nbytes:
        return data
    (nbytes,) = struct.unpack_from("<Q", data, _HEADER_NBYTES - 8)
    whole = body[_HEADER_NBYTES:] + struct.pack("<Q", nbytes)
    before = body + hashlib.sha256(whole).digest()
    return before + hashlib.sha256(before).digest()


def _read(path: str, _: str | None) -> None:
    with TreeFile.open(path) as tree:
        leaves = b"".join(tree.leaves())
        if len(leaves) != tree.n_blocks * _LEAF_NBYTES:
            raise Finding("a tree that has not one leaf for each block")
        if list(tree_differences(tree, tree)):
            raise Finding("a tree that differs from itself")
        content = Path(path).read_bytes()
        with Target(f"{path}.copy", force=True, sync=False) as target:
            writer = TreeWriter(target.main, tree.digest.algorithm, tree.virtual_size)
            writer.add(leaves)
            writer.finish(tree.digest)
            target.commit()
        if Path(f"{path}.copy").read_bytes() != content:
            raise Finding("a tree that is not written as it was read")
        other = bytearray(content)
        for offset in range(_HEADER_NBYTES, len(content) - 2 * _LEAF_NBYTES, _LEAF_NBYTES):
            other[offset] ^= 1
        Path(f"{path}.copy").write_bytes(with_digests(bytes(other)))
        if tree.digest.algorithm != "sha256":
            return
        with TreeFile.open(f"{path}.copy") as changed:
            _require_all(list(tree_differences(changed, tree)), tree.virtual_size)


def _require_all(areas: list[Area], nbytes: int) -> None:
    position = 0
    for area in areas:
        if area.offset != position or area.length <= 0:
            raise Finding("areas that are not ascending")
        position += area.length
    if position != nbytes:
        raise Finding("a block that differs is not among the areas")


def seeds() -> Iterator[tuple[str, bytes]]:
    """Yield small trees."""
    block = b"x" * blkhash.BLOCK
    for name, disk in {
        "empty": b"",
        "byte": b"A",
        "block": block,
        "zeros": bytes(3 * blkhash.BLOCK),
        "short-end": block + bytes(2 * blkhash.BLOCK) + b"B" * 5,
    }.items():
        yield name, blkhash.tree(disk)
    blake3 = bytearray(blkhash.tree(block))
    blake3[12] = 2
    yield "blake3", bytes(blake3)
    yield "magic", b"IMGCTREE"
