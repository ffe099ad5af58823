"""Checksum trees: the file, and what differs between two of them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers import blkhash

from imgcore import (
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore._core import checksum_algorithms
from imgcore.areas.area import Area
from imgcore.checksums import tree as tree_module
from imgcore.checksums.differences import TreeDifferences, tree_differences
from imgcore.checksums.digest import Digest
from imgcore.checksums.tree import TreeFile, TreeWriter, is_tree, tree_nbytes, zero_leaf
from imgcore.files.host_file import HostFile
from imgcore.files.target import Target
from imgcore.limits import MAX_VIRTUAL_NBYTES

BLOCK = blkhash.BLOCK
DISKS = [b"", b"A", bytes(BLOCK), b"A" * BLOCK + bytes(2 * BLOCK) + b"B" * 5]


@pytest.fixture(params=[1, 2, 1 << 15])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Read and write pieces of so many leaves."""
    n_blocks = int(request.param)
    monkeypatch.setattr("imgcore.checksums.tree.PIECE_NBLOCKS", n_blocks)
    monkeypatch.setattr("imgcore.checksums.differences.PIECE_NBLOCKS", n_blocks)
    return n_blocks


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


class TestFile:
    @pytest.mark.parametrize("disk", DISKS)
    def test_is_written_as_documented(self, tmp_path: Path, piece: int, disk: bytes) -> None:
        digest = Digest(bytes.fromhex(blkhash.digest(disk)), "sha256")
        path = tmp_path / "a.tree"
        with Target(path) as target:
            writer = TreeWriter(target.main, "sha256", len(disk))
            leaves = blkhash.leaves(disk)
            n_whole = len(disk) // BLOCK
            for number, leaf in enumerate(leaves):
                block = disk[number * BLOCK : (number + 1) * BLOCK]
                if number < n_whole and not any(block):
                    writer.add_zeros(1)
                else:
                    writer.add(leaf)
            writer.finish(digest)
            target.commit()
        assert path.read_bytes() == blkhash.tree(disk)
        assert path.stat().st_size == tree_nbytes(len(disk))

    @pytest.mark.parametrize("disk", DISKS)
    def test_is_read(self, tmp_path: Path, piece: int, disk: bytes) -> None:
        with TreeFile.open(saved(tmp_path / "a.tree", blkhash.tree(disk))) as tree:
            assert tree.virtual_size == len(disk)
            assert tree.digest.hexdigest == blkhash.digest(disk)
            assert b"".join(tree.leaves()) == b"".join(blkhash.leaves(disk))

    def test_many_zeros(self, tmp_path: Path, piece: int) -> None:
        path = tmp_path / "a.tree"
        with Target(path) as target:
            writer = TreeWriter(target.main, "sha256", 7 * BLOCK)
            writer.add_zeros(7)
            writer.finish(Digest(bytes.fromhex(blkhash.digest(bytes(7 * BLOCK))), "sha256"))
            target.commit()
        assert path.read_bytes() == blkhash.tree(bytes(7 * BLOCK))

    def test_a_missing_leaf_is_a_defect(self, tmp_path: Path) -> None:
        with Target(tmp_path / "a.tree") as target:
            writer = TreeWriter(target.main, "sha256", 2 * BLOCK)
            writer.add_zeros(1)
            with pytest.raises(AssertionError, match="one leaf for each block"):
                writer.finish(Digest(bytes(32), "sha256"))

    def test_the_leaf_of_zeros(self) -> None:
        assert zero_leaf("sha256") == blkhash.leaves(bytes(BLOCK))[0]


def with_own_digest(content: bytearray) -> bytes:
    import hashlib

    content[-32:] = hashlib.sha256(content[:-32]).digest()
    return bytes(content)


def poked(offset: int, new: bytes) -> Callable[[bytes], bytes]:
    """Return a change of a tree, which then has the right own digest."""

    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[offset : offset + len(new)] = new
        return with_own_digest(changed)

    return change


def flipped(offset: int) -> Callable[[bytes], bytes]:
    """Return a change of one bit, after which the own digest is wrong."""

    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        changed[offset] ^= 1
        return bytes(changed)

    return change


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


DAMAGED = {
    "empty": (lambda _: b"", WrongFormatError, "lacks the magic IMGCTREE"),
    "magic": (flipped(0), WrongFormatError, "lacks the magic IMGCTREE"),
    "magic only": (lambda _: b"IMGCTREE", CorruptImageError, "truncated: 8 bytes"),
    "header cut": (lambda tree: tree[:31], CorruptImageError, "truncated: 31 bytes"),
    "version": (poked(8, u32(2)), UnsupportedFeatureError, "has version 2: 1 is read"),
    "algorithm": (poked(12, u32(9)), UnsupportedFeatureError, "the algorithm 9: 1 (sha256), 2"),
    "block": (poked(16, u32(4096)), UnsupportedFeatureError, "blocks of 4096 bytes: 65536"),
    "reserved": (
        poked(20, u32(7)),
        CorruptImageError,
        "reserved field of the checksum tree is 0x7",
    ),
    "limit": (
        poked(24, struct.pack("<Q", MAX_VIRTUAL_NBYTES + 1)),
        LimitExceededError,
        f"disk of {MAX_VIRTUAL_NBYTES + 1} bytes: at most {MAX_VIRTUAL_NBYTES}",
    ),
    "at the limit": (
        poked(24, struct.pack("<Q", MAX_VIRTUAL_NBYTES)),
        CorruptImageError,
        "truncated: 224 bytes, and that of a disk of",
    ),
    "truncated": (lambda tree: tree[:-1], CorruptImageError, "truncated: 223 bytes"),
    "longer": (lambda tree: tree + b"x", CorruptImageError, "too long: 225 bytes"),
    "another size": (
        poked(24, struct.pack("<Q", 3 * BLOCK + 6)),
        CorruptImageError,
        "a digest of the disk that its leaves do not make",
    ),
    "leaf": (flipped(40), CorruptImageError, "does not have the digest at its end"),
    "leaf and own digest": (
        poked(40, b"\0"),
        CorruptImageError,
        "a digest of the disk that its leaves do not make",
    ),
    "digest": (
        poked(-64, bytes(32)),
        CorruptImageError,
        "a digest of the disk that its leaves do not make",
    ),
    "own digest": (flipped(-1), CorruptImageError, "does not have the digest at its end"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged(tmp_path: Path, name: str) -> None:
    change, kind, words = DAMAGED[name]
    path = saved(tmp_path / "a.tree", change(blkhash.tree(DISKS[3])))
    with pytest.raises(kind) as raised:
        TreeFile.open(path)
    assert words in str(raised.value)
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_an_algorithm_that_is_not_built(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.tree", poked(12, u32(2))(blkhash.tree(DISKS[3])))
    if "blake3" in checksum_algorithms():
        with pytest.raises(CorruptImageError, match="that its leaves do not make"):
            TreeFile.open(path)
    else:
        with pytest.raises(UnsupportedFeatureError, match="not in this build"):
            TreeFile.open(path)


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    content = blkhash.tree(DISKS[3])
    for offset in range(len(content)):
        with pytest.raises(ImgcoreError):
            TreeFile.open(saved(tmp_path / "a.tree", flipped(offset)(content)))


def test_a_claim_allocates_nothing(tmp_path: Path) -> None:
    """A sparse file of the right size for 1 TiB is read in pieces, and fails."""
    path = tmp_path / "a.tree"
    path.write_bytes(blkhash.tree(b"")[:24] + struct.pack("<Q", 1 << 40))
    with open(path, "r+b") as file:
        file.truncate(tree_nbytes(1 << 40))
    import tracemalloc

    tracemalloc.start()
    try:
        with pytest.raises(CorruptImageError, match="does not have the digest"):
            TreeFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_is_tree(tmp_path: Path) -> None:
    for content, expected in ((blkhash.tree(b"A"), True), (b"IMGCTRE", False), (b"", False)):
        with HostFile.open(saved(tmp_path / "a", content)) as file:
            assert is_tree(file) is expected


class TestDifferences:
    @staticmethod
    def expected(old: bytes, new: bytes) -> list[Area]:
        """Compare block by block, and join."""
        found: list[Area] = []
        for start in range(0, len(new), BLOCK):
            before, after = old[start : start + BLOCK], new[start : start + BLOCK]
            if before == after:
                continue
            area = Area(start, len(after), after == bytes(BLOCK))
            last = found[-1] if found else None
            if last and last.offset + last.length == start and last.is_zero == area.is_zero:
                found[-1] = last._replace(length=last.length + area.length)
            else:
                found.append(area)
        return found

    @pytest.mark.parametrize("seed", range(20))
    def test_random(self, tmp_path: Path, piece: int, seed: int) -> None:
        rng = random.Random(seed)
        kinds = (bytes(BLOCK), b"a" * BLOCK, b"b" * BLOCK)
        tail = rng.choice((0, 1, 513))
        old, new = (
            b"".join(rng.choices(kinds, (4, 1, 1), k=12)) + bytes([rng.randrange(2)]) * tail
            for _ in range(2)
        )
        if rng.random() < 0.5:
            new = old[: 7 * BLOCK] + new[7 * BLOCK :]
        files = [
            saved(tmp_path / name, blkhash.tree(disk)) for name, disk in (("a", old), ("b", new))
        ]
        with TreeFile.open(files[0]) as a, TreeFile.open(files[1]) as b:
            assert list(tree_differences(a, b)) == self.expected(old, new)
            assert list(tree_differences(a, a)) == []

    def test_zeros_are_compared_without_leaves(self, tmp_path: Path, piece: int) -> None:
        old = bytes(3 * BLOCK) + b"a" * (2 * BLOCK) + bytes(2 * BLOCK)
        found: list[Area] = []
        with TreeFile.open(saved(tmp_path / "a", blkhash.tree(old))) as tree:
            differences = TreeDifferences(tree, found.append)
            differences.add_zeros(7)
            differences.finish()
        assert found == [Area(3 * BLOCK, 2 * BLOCK, True)]


def test_pieces_are_small() -> None:
    assert tree_module.PIECE_NBLOCKS * tree_module.LEAF_NBYTES <= 1 << 20
