"""QCOW2 without the native engine: a small stand-in, and images made by QEMU."""

from __future__ import annotations

import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from imgcore.engine.extents import PLACEMENT_DTYPE, BlockState, Kind
from imgcore.engine.geometry import CodecId, Geometry, Placing, ZeroPolicy
from imgcore.files.target import Target
from imgcore.files.target_file import TargetFile
from imgcore.formats.api import BackingReference, WriteRequest
from imgcore.formats.option_texts import parse_options
from imgcore.formats.options import FormatOptions
from imgcore.formats.qcow2.driver import DRIVER
from imgcore.formats.qcow2.reader import Qcow2Reader
from tests.helpers import qemu
from tests.helpers.reading import extent_rows, open_file


def open_qcow2(path: Path) -> Qcow2Reader:
    """Open a single QCOW2 layer."""
    return open_file(path, Qcow2Reader)


def create(path: Path, size: int | str, *options: str, backing: Path | None = None) -> Path:
    """Make an empty image with qemu-img."""
    arguments = ["-b", backing.name, "-F", "raw"] if backing else []
    if options:
        arguments += ["-o", ",".join(options)]
    qemu.run("create", "-q", "-f", "qcow2", *arguments, path, str(size))
    return path


def qemu_io(path: Path, *commands: str, check: bool = True) -> None:
    """Run qemu-io commands on an image; without ``check`` they may fail."""
    program = qemu.find_program("qemu-io")
    if program is None:
        pytest.skip("qemu-io is not installed (Debian: qemu-utils)")
    arguments = [part for command in commands for part in ("-c", command)]
    subprocess.run([program, *arguments, path], check=check, capture_output=True)


@dataclass(frozen=True)
class Structure:
    """The header's facts and refcounts of an image, read without imgcore.

    ``refcounts`` has the clusters that have one; ``own`` are the clusters of the
    refcount table and blocks.
    """

    version: int
    cluster_size: int
    l1_offset: int
    l1_entries: int
    table_offset: int
    blocks: list[int]
    refcount_bits: int
    refcounts: dict[int, int]
    own: set[int]


def read_structure(path: Path) -> Structure:
    """Read an image's refcounts; the refcount table must be sound."""
    raw = path.read_bytes()

    def number(offset: int, nbytes: int) -> int:
        return int.from_bytes(raw[offset : offset + nbytes], "big")

    version, size = number(4, 4), 1 << number(20, 4)
    bits = 1 << number(96, 4) if version == 3 else 16
    table, n_clusters = number(48, 8), number(56, 4)
    blocks = [number(table + 8 * index, 8) for index in range(n_clusters * size // 8)]
    own = {table // size + index for index in range(n_clusters)}
    own |= {block // size for block in blocks if block}
    per_block = size * 8 // bits
    counts = {}
    for index, block in enumerate(blocks):
        if not block:
            continue
        first = index * per_block
        for cluster in range(first, min(first + per_block, -(-len(raw) // size))):
            at = (cluster - first) * bits
            if bits >= 8:
                count = number(block + at // 8, bits // 8)
            else:
                count = raw[block + at // 8] >> at % 8 & ((1 << bits) - 1)
            if count:
                counts[cluster] = count
    return Structure(version, size, number(40, 8), number(36, 4), table, blocks, bits, counts, own)


def merged(rows: list[Any]) -> list[tuple[int, int, str, int | None]]:
    """Return rows as (start, length, kind, offset of plain data), neighbours joined."""
    names = {Kind.HOLE: "hole", Kind.ZERO: "zero", Kind.DATA: "data"}
    return _joined(
        [
            (row[0], row[1], names.get(row[5], "packed"), row[2] if row[5] == 2 else None)
            for row in rows
        ]
    )


def qemu_map(path: Path) -> list[tuple[int, int, str, int | None]]:
    """Return ``qemu-img map`` of a single layer in the form of `merged`."""
    rows: list[tuple[int, int, str, int | None]] = []
    for entry in qemu.map_entries(path, "qcow2"):
        what = "data"
        if not entry["data"]:
            # Before QEMU 8.2 only a missing "present" tells a hole from zeros.
            what = "zero" if entry["present"] else "hole"
        elif entry.get("compressed") or "offset" not in entry:
            what = "packed"
        place = entry["offset"] if what == "data" else None
        rows.append((entry["start"], entry["length"], what, place))
    return _joined(rows)


def _joined(
    rows: list[tuple[int, int, str, int | None]],
) -> list[tuple[int, int, str, int | None]]:
    out: list[tuple[int, int, str, int | None]] = []
    for start, length, what, place in rows:
        if out and out[-1][2] == what:
            last_start, last_length, _, last_place = out[-1]
            if place is None or last_place is None or last_place + last_length == place:
                out[-1] = (last_start, last_length + length, what, last_place)
                continue
        out.append((start, length, what, place))
    return out


def read_guest(path: Path) -> bytes:
    """Return the content of one layer, decompressed by Python codecs."""
    reader = open_qcow2(path)
    host = path.read_bytes()
    content = bytearray(reader.virtual_size)
    for guest, length, offset, nbytes, _, kind, _ in extent_rows(reader):
        if kind == Kind.DATA:
            content[guest : guest + length] = host[offset : offset + length]
        elif kind in (Kind.DEFLATE, Kind.ZSTD):
            raw = host[offset : offset + nbytes]
            if kind == Kind.DEFLATE:
                block = zlib.decompressobj(-15).decompress(raw)
            else:
                block = zstandard.ZstdDecompressor().decompressobj().decompress(raw)
            skip = guest % reader.block_nbytes
            content[guest : guest + length] = block[skip : skip + length]
    reader.close()
    return bytes(content)


def request(
    virtual_size: int,
    options: Mapping[str, Any] | None = None,
    *,
    compress: bool = False,
    backing: BackingReference | None = None,
    sparse_nbytes: int = 4096,
) -> WriteRequest[FormatOptions]:
    """Return a request for a writer; options not given have their defaults."""
    parsed = parse_options(DRIVER, options)
    return WriteRequest(virtual_size, parsed, compress, backing, sparse_nbytes)


@dataclass
class StandIn:
    """Places blocks by a geometry as the engine does, one at a time."""

    geometry: Geometry
    file: TargetFile
    next_offset: int
    absent: set[int] = field(default_factory=set)

    def place(self, index: int, block: bytes) -> tuple[int, int, int]:
        """Write one block; return its placement."""
        geometry = self.geometry
        if index in self.absent:
            return (0, 0, BlockState.ABSENT)
        if geometry.zero_policy is not ZeroPolicy.STORE and not any(block):
            explicit = geometry.zero_policy is ZeroPolicy.EXPLICIT
            return (0, 0, BlockState.ZERO if explicit else BlockState.ABSENT)
        if geometry.placing is Placing.IDENTITY:
            self.file.pwrite(geometry.host_base + index * geometry.block_nbytes, block)
            return (0, 0, BlockState.ABSENT)
        state, data = BlockState.STORED, block
        packed = self._compress(block.ljust(geometry.block_nbytes, b"\0"))
        if packed is not None and len(packed) < geometry.block_nbytes:
            state, data = BlockState.COMPRESSED, packed
        unit = (
            geometry.stored_alignment
            if state is BlockState.STORED
            else geometry.compressed_alignment
        )
        offset = -(-self.next_offset // unit) * unit
        self.file.pwrite(offset, data)
        self.next_offset = offset + len(data)
        return (offset, len(data), state)

    def _compress(self, block: bytes) -> bytes | None:
        codec = self.geometry.codec
        if codec.codec is CodecId.NONE:
            return None
        if codec.codec is CodecId.ZSTD:
            return zstandard.ZstdCompressor(level=1).compress(block)
        deflate = zlib.compressobj(1, zlib.DEFLATED, -codec.window_bits)
        return deflate.compress(block) + deflate.flush()


def write_image(
    path: Path,
    content: bytes,
    wanted: WriteRequest[Any],
    *,
    batch: int = 1000,
    absent: set[int] | None = None,
) -> Path:
    """Write an image of ``content`` with the stand-in, ``batch`` blocks per call."""
    writer = DRIVER.writer(wanted)
    with Target(path, sync=False) as target:
        file = writer.begin(target)
        engine = StandIn(writer.geometry, file, writer.first_offset, absent or set())
        size = writer.geometry.block_nbytes
        n_blocks = -(-len(content) // size)
        for first in range(0, n_blocks, batch):
            rows = [
                engine.place(index, content[index * size : (index + 1) * size])
                for index in range(first, min(first + batch, n_blocks))
            ]
            placements = np.array(rows, dtype=PLACEMENT_DTYPE)
            engine.next_offset = writer.place(first, placements, engine.next_offset)
        writer.finish(engine.next_offset)
        target.commit()
    return path


def put_second_cluster(image: Path, where: str, flags: int = 1 << 63) -> None:
    """Let the second cluster of a disk be somewhere else in its file.

    ``where`` is "another cluster" (the first), "the L1 table", "the L2 table" or "the
    refcount table"; ``flags`` are those of its entry.
    """
    with image.open("r+b") as file:

        def number(offset: int) -> int:
            file.seek(offset)
            return int.from_bytes(file.read(8), "big") & ~(1 << 63)

        def put(offset: int, place: int) -> None:
            file.seek(offset)
            file.write((place | flags).to_bytes(8, "big"))

        l1, refcounts = number(40), number(48)
        l2 = number(l1)
        first = number(l2)
        places = {"the L1 table": l1, "the L2 table": l2, "the refcount table": refcounts}
        if where == "another cluster":
            put(l2, first)
        put(l2 + 8, places.get(where, first))
