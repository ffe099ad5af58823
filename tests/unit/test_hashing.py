"""Checksums: the hasher, and the leaves that jobs make, against a plain definition."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.images import noise, text

from imgcore import _core
from imgcore._core import CHECKSUM_BLOCK_NBYTES as BLOCK
from imgcore._core import CHECKSUM_NBYTES, CoreError, Hasher
from imgcore.disk.open_options import OpenOptions
from imgcore.disk.source import open_source
from imgcore.engine import geometry as geometry_module
from imgcore.engine.extents import PLACEMENT_DTYPE, Kind, single
from imgcore.engine.geometry import Codec, CodecId, Geometry, Placing, ZeroPolicy
from imgcore.engine.hashing import LeafStream, digest_disk, digest_geometry, require_algorithm
from imgcore.engine.kinds import FLAG_UNREAD
from imgcore.errors import OptionError

MIB = 1 << 20

VECTORS = [
    (b"", "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc"),
    (b"A", "60fb4e2bdf7dfc32f8230836f7453a77e665e4a1d3cc117944e0296d40b7800c"),
    (bytes(BLOCK), "8ab067ab7939a3d4f40cbb118956c07c06aeae2d075d6e0a2ebbb94bd42832af"),
    (bytes(BLOCK + 1), "43702a4ffbe4bdb5c0cf900dd2a899fdd2536b78559f8b55cf0ed7fe1e8195b5"),
    (bytes(MIB), "3dd455346755274ce76f1c555df5e05c1cdd8da4b1c70ab7c2a6b09f51bb5ce0"),
    (
        b"A" * BLOCK + bytes(BLOCK) + b"B" * (BLOCK // 2),
        "c36703dbf20c51247b8af34524a6aa4218450b3db44c9a08bddfce190e28ce93",
    ),
]

# By the definition, with the hashes of the reference implementation.
BLAKE3_VECTORS = [
    "71e0a99173564931c0b8acc52d2685a8e39c64dc52e3d02390fdac2a12b155cb",
    "e545980b0c7bf3de8127683bbf1d7eeeacd0c4c9a08246d9a4635b5cf2e186aa",
    "4e3224cc37d31ec9900a2a0fd7c63de16804c12c4a81e2bd0b6443d139df976f",
    "bdf825590125efe97d176cd7862f2fa96877cc1a3119775d4c58993aa8c5ffcf",
    "d03e86e18cee8417648bc1d04244f720b027fadde75bb523597dde510e486333",
    "0293775d9e5e77821520a1bfaca2317bb05b12b340a67688e3ae22f2f5111206",
]


def leaves_of(content: bytes, block_nbytes: int = BLOCK) -> list[bytes]:
    blocks = (content[at : at + block_nbytes] for at in range(0, len(content), block_nbytes))
    return [hashlib.sha256(block).digest() for block in blocks]


def digest_of(content: bytes, block_nbytes: int = BLOCK) -> bytes:
    """Return the checksum as it is defined."""
    leaves = b"".join(leaves_of(content, block_nbytes))
    return hashlib.sha256(leaves + len(content).to_bytes(8, "little")).digest()


# -- the hasher ------------------------------------------------------------------------


@pytest.mark.parametrize(("content", "expected"), VECTORS)
def test_vectors(content: bytes, expected: str) -> None:
    hasher = Hasher()
    hasher.update(content)
    assert hasher.digest().hex() == expected
    assert digest_of(content).hex() == expected


@pytest.mark.skipif("blake3" not in _core.checksum_algorithms(), reason="blake3 is not built")
def test_blake3_vectors() -> None:
    for (content, _), expected in zip(VECTORS, BLAKE3_VECTORS, strict=True):
        hasher = Hasher("blake3")
        hasher.update(content)
        assert hasher.digest().hex() == expected


PARTS = st.lists(
    st.tuples(st.sampled_from(("data", "zero bytes", "zeros", "leaves")), st.integers(0, 5000)),
    max_size=12,
)


@given(parts=PARTS, seed=st.integers(0, 1 << 32))
@settings(max_examples=200, deadline=None)
def test_parts_give_the_digest_of_the_whole(parts: list[tuple[str, int]], seed: int) -> None:
    """Data, zeros as data, zeros as a length, and leaves, at any offset in a block."""
    hasher, content = Hasher("sha256", 512), b""
    rng = random.Random(seed)
    for kind, nbytes in parts:
        if kind == "leaves":
            nbytes -= nbytes % 512
            if len(content) % 512:
                continue
        piece = rng.randbytes(nbytes) if kind in ("data", "leaves") else bytes(nbytes)
        if kind == "zeros":
            hasher.zeros(nbytes)
        elif kind == "leaves":
            hasher.add_leaves(b"".join(leaves_of(piece, 512)), nbytes)
        else:
            hasher.update(piece)
        content += piece
        assert hasher.digest() == digest_of(content, 512)


def test_the_leaf_of_a_short_block_ends_the_disk() -> None:
    hasher = Hasher()
    hasher.add_leaves(hasher.leaf(b"A"), 1)
    assert hasher.digest().hex() == VECTORS[1][1]
    hasher.update(b"")
    hasher.zeros(0)
    for add in (
        lambda: hasher.update(b"x"),
        lambda: hasher.zeros(1),
        lambda: hasher.add_leaves(bytes(CHECKSUM_NBYTES), BLOCK),
    ):
        with pytest.raises(CoreError, match="INVALID_ARGUMENT"):
            add()
    assert hasher.digest().hex() == VECTORS[1][1]


def test_leaves_start_with_a_block() -> None:
    hasher = Hasher()
    hasher.update(b"A")
    with pytest.raises(CoreError, match="INVALID_ARGUMENT"):
        hasher.add_leaves(bytes(CHECKSUM_NBYTES), BLOCK)
    with pytest.raises(ValueError, match="31 bytes of leaves for 1 blocks"):
        hasher.add_leaves(bytes(31), BLOCK)
    assert hasher.digest().hex() == VECTORS[1][1]


@pytest.mark.parametrize("block_nbytes", [0, 256, 1000, 32 * MIB])
def test_block_sizes_that_are_not_allowed(block_nbytes: int) -> None:
    with pytest.raises(CoreError, match="INVALID_ARGUMENT"):
        Hasher("sha256", block_nbytes)


def test_algorithms() -> None:
    assert "sha256" in _core.checksum_algorithms()
    require_algorithm("sha256")
    with pytest.raises(OptionError, match="no checksum algorithm 'md5': choose one of sha256"):
        require_algorithm("md5")
    with pytest.raises(ValueError, match="no checksum algorithm 'md5'"):
        Hasher("md5")
    if "blake3" not in _core.checksum_algorithms():
        with pytest.raises(OptionError, match="'blake3' is not in this build"):
            require_algorithm("blake3")
        with pytest.raises(RuntimeError, match="'blake3' is not in this build"):
            Hasher("blake3")


# -- jobs ------------------------------------------------------------------------------


def content_of(nbytes: int) -> bytes:
    """Return blocks of data, of zeros, of both, and a short last one."""
    content = bytearray(noise(nbytes))
    content[3 * BLOCK : 5 * BLOCK] = bytes(2 * BLOCK)
    content[6 * BLOCK + 5000 : 7 * BLOCK] = bytes(BLOCK - 5000)
    content[8 * BLOCK : 9 * BLOCK - 1] = bytes(BLOCK - 1)
    content[20 * BLOCK : 30 * BLOCK] = text(10 * BLOCK)
    return bytes(content)


NBYTES = 40 * BLOCK + 12345
CONTENT = content_of(NBYTES)
EXPECTED = b"".join(leaves_of(CONTENT))

PLAIN = Geometry(512, NBYTES, stored_alignment=512)
GEOMETRIES = {
    "identity": PLAIN._replace(placing=Placing.IDENTITY),
    "identity, old bytes": PLAIN._replace(placing=Placing.IDENTITY).over_old_bytes,
    "identity, stored": PLAIN._replace(placing=Placing.IDENTITY, zero_policy=ZeroPolicy.STORE),
    "small blocks": PLAIN,
    "large blocks": PLAIN._replace(block_nbytes=MIB),
    "blocks larger than a window": PLAIN._replace(block_nbytes=32 * MIB),
    "old bytes": PLAIN._replace(block_nbytes=MIB).over_old_bytes,
    "explicit": PLAIN._replace(block_nbytes=BLOCK, zero_policy=ZeroPolicy.EXPLICIT),
    "zlib": PLAIN._replace(block_nbytes=BLOCK, codec=Codec(CodecId.ZLIB)),
    "zstd, 4 KiB": PLAIN._replace(
        block_nbytes=4096, codec=Codec(CodecId.ZSTD, level=1), store_incompressible=True,
        compressed_alignment=1,
    ),
    "2 MiB": PLAIN._replace(block_nbytes=2 * MIB, codec=Codec(CodecId.DEFLATE)),
}  # fmt: skip


def rows_of(content: bytes) -> np.ndarray:
    """Return rows that leave out some of the zeros, at sectors within blocks."""
    at = [0, 3 * BLOCK, 4 * BLOCK, 6 * BLOCK + 8192, 7 * BLOCK, len(content)]
    kinds = [Kind.DATA, Kind.HOLE, Kind.DATA, Kind.ZERO, Kind.DATA]
    parts = [
        single(start, end - start, kind, host_offset=start if kind is Kind.DATA else 0)
        for start, end, kind in zip(at, at[1:], kinds, strict=False)
    ]
    return np.concatenate(parts)


def leaves_from(job: _core.Job, rows: np.ndarray, geometry: Geometry | None) -> bytes:
    leaves = bytearray(b"\xee" * len(EXPECTED))
    placements = None
    if geometry is not None and geometry.placing is Placing.APPEND:
        placements = np.zeros(-(-NBYTES // geometry.block_nbytes), PLACEMENT_DTYPE)
    job.run(0, NBYTES, rows, placements=placements, leaves=leaves)
    job.close()
    return bytes(leaves)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("window_nbytes", [0, 4096, BLOCK, MIB])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_conversion_makes_the_leaves(name: str, window_nbytes: int, threads: int) -> None:
    """For every geometry, window and number of threads; the target is as without."""
    geometry, targets = GEOMETRIES[name], []
    for checksum in ("sha256", None):
        target = bytearray(NBYTES + geometry.block_nbytes)
        job = _core.Job(
            sources=[(_core.File.from_memory(CONTENT), NBYTES, 0, 0)],
            geometry=geometry,
            target=_core.File.from_memory(target, writable=True),
            threads=threads,
            window_nbytes=window_nbytes,
            checksum=checksum,
        )
        if checksum:
            assert leaves_from(job, rows_of(CONTENT), geometry) == EXPECTED
        else:
            placements = None
            if geometry.placing is Placing.APPEND:
                placements = np.zeros(-(-NBYTES // geometry.block_nbytes), PLACEMENT_DTYPE)
            job.run(0, NBYTES, rows_of(CONTENT), placements=placements)
            job.close()
        targets.append(target)
    assert targets[0] == targets[1]


class Leaves:
    """A sink that keeps all leaves."""

    def __init__(self) -> None:
        self.leaves: list[bytes] = []
        self.n_runs: int = 0

    def add(self, leaves: memoryview) -> None:
        for at in range(0, len(leaves), CHECKSUM_NBYTES):
            self.leaves.append(bytes(leaves[at : at + CHECKSUM_NBYTES]))

    def add_zeros(self, n_blocks: int) -> None:
        self.n_runs += 1
        self.leaves.extend([hashlib.sha256(bytes(BLOCK)).digest()] * n_blocks)


def digest_raw(path: Path, sink: Leaves | None = None) -> bytes:
    with open_source(path, OpenOptions(format="raw")) as source:
        nbytes = source.exact_nbytes
        with source.supply(digest_geometry(nbytes), None) as supply:
            return digest_disk(supply, nbytes, "sha256", threads=2, variants={}, sink=sink)


def test_gaps_and_the_end_are_zeros() -> None:
    """The sink gets long runs of zeros as such, and the leaf of a short block."""
    content = bytes(7 * BLOCK) + noise(2 * BLOCK) + bytes(4 * BLOCK + 100)
    sink = Leaves()
    stream = LeafStream("sha256", sink)
    leaves = stream.leaves(7 * BLOCK, 9 * BLOCK)
    leaves[:] = b"".join(leaves_of(content)[7:9])
    stream.add(7 * BLOCK, 9 * BLOCK, leaves)
    assert stream.finish(len(content)) == digest_of(content)
    assert sink.leaves == leaves_of(content)
    assert sink.n_runs == 2


def test_batches_bound_the_memory_of_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flat disk is cut as well; batches start and end with whole blocks."""
    monkeypatch.setattr(geometry_module, "_MAX_BATCH_BLOCKS", 3)
    path = tmp_path / "a.raw"
    path.write_bytes(CONTENT)
    with path.open("r+b") as file:
        file.seek(100 * BLOCK)
        file.truncate(120 * BLOCK + 7)
    content = path.read_bytes()
    with open_source(path, OpenOptions(format="raw")) as source:
        with source.supply(digest_geometry(len(content)), None) as supply:
            spans = [(batch.start, batch.end) for batch in supply.batches]
    assert max(end - start for start, end in spans) == 3 * BLOCK
    assert all(start % BLOCK == 0 for start, _ in spans)
    sink = Leaves()
    assert digest_raw(path, sink) == digest_of(content)
    assert sink.leaves == leaves_of(content)


@pytest.mark.parametrize(
    ("block_nbytes", "group_nblocks", "unit", "most"),
    [
        (4096, 0, BLOCK, 8 << 30 >> 4),
        (BLOCK, 0, BLOCK, 8 << 30),
        (MIB, 0, MIB, 8 << 30),
        (BLOCK, 512, 512 * BLOCK, 8 << 30),
        (4096, 3, 3 * BLOCK, (8 << 30 >> 4) // (3 * BLOCK) * (3 * BLOCK)),
        (512, 1, BLOCK, 64 * MIB),
    ],
)
def test_units_have_whole_leaves(
    block_nbytes: int, group_nblocks: int, unit: int, most: int
) -> None:
    geometry = Geometry(block_nbytes, MIB, group_nblocks=group_nblocks, leaf_nbytes=BLOCK)
    assert geometry.unit_nbytes == unit
    assert geometry.max_batch_nbytes == most


def test_trusted_and_unread_data_is_hashed() -> None:
    """A flag of a row, or trust, leaves nothing out of a checksum."""
    rows = rows_of(CONTENT)
    rows["flags"][rows["kind"] == Kind.DATA] = FLAG_UNREAD
    geometry = GEOMETRIES["identity"]
    job = _core.Job(
        sources=[(_core.File.from_memory(CONTENT), NBYTES, 0, 0)],
        geometry=geometry,
        target=_core.File.null(),
        reflink=True,
        trust_blocks=True,
        checksum="sha256",
    )
    assert leaves_from(job, rows, geometry) == EXPECTED


def test_leaves_must_fit_the_batch() -> None:
    job = _core.Job(sources=[], checksum="sha256")
    rows = single(0, MIB, Kind.HOLE)
    for n_leaves in (0, 15, 17):
        with pytest.raises(CoreError, match="leaves: INVALID_ARGUMENT"):
            job.start(0, MIB, rows, leaves=bytearray(n_leaves * CHECKSUM_NBYTES))
    with pytest.raises(ValueError, match="33 bytes are no leaves"):
        job.start(0, MIB, rows, leaves=bytearray(33))
    job.close()
