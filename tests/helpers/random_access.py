"""Disks in every format and chain, and random uses of one that is open.

Each use asks for something at random and fails unless it gets the disk's bytes.
"""

from __future__ import annotations

import array
import io
import mmap
import os
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

import imgcore
from imgcore.engine.kinds import Kind
from tests.helpers import qemu
from tests.helpers.images import KIB, MIB, noise, text

SECTOR: Final = 512
NBYTES: Final = 5 * MIB + 3 * SECTOR

# How each image that stands alone is written.
ALONE: Final[dict[str, dict[str, Any]]] = {
    "disk.raw": {},
    "disk.qcow2": {},
    "tables.qcow2": {"options": {"cluster_size": "512"}},
    "zlib.qcow2": {"compress": True},
    "zstd.qcow2": {"compress": True, "options": {"compression_type": "zstd"}},
    "disk.vmdk": {},
    "stream.vmdk": {"compress": True},
    "flat.vmdk": {"options": {"subformat": "monolithicFlat"}},
    "disk.vhd": {},
    "fixed.vhd": {"options": {"subformat": "fixed"}},
    "disk.vhdx": {"options": {"block_size": "1M"}},
    "fixed.vhdx": {"options": {"subformat": "fixed"}},
    "disk.vdi": {},
}
# The number of layers of each chain, and how its layers are written.
CHAINS: Final[dict[str, tuple[int, dict[str, Any]]]] = {
    "chain.qcow2": (3, {}),
    "packed.qcow2": (3, {"compress": True}),
    "chain.vhd": (2, {}),
    "chain.vhdx": (3, {"options": {"block_size": "1M"}}),
    "chain.vdi": (2, {}),
}
# A raw file may end anywhere; zeros fill up its last sector.
ODD: Final = "odd.raw"
NAMES: Final = (*ALONE, ODD, *CHAINS)


@dataclass(frozen=True)
class Disk:
    """An image, and the bytes that it must read as."""

    path: Path
    content: bytes = field(repr=False)


def states(seed: int, n: int) -> list[bytes]:
    """Return the bytes of a disk at ``n`` times; the last has all changes."""
    rng = random.Random(seed)
    disk = bytearray(NBYTES)
    found = []
    for number in range(n):
        for _ in range(24):
            length = rng.choice((SECTOR, 4 * KIB, 24 * KIB, 64 * KIB, 300 * KIB))
            at = rng.randrange(NBYTES // SECTOR) * SECTOR
            length = min(length, NBYTES - at)
            make = rng.choice((noise, text, text, lambda nbytes, _: bytes(nbytes)))
            disk[at : at + length] = make(length, rng.randrange(1 << 30))
        # A byte of each disk and each state at both ends.
        disk[0] = disk[-1] = seed + number + 1
        found.append(bytes(disk))
    return found


def write_disks(folder: Path, seed: int = 1, names: Collection[str] = NAMES) -> dict[str, Disk]:
    """Write the disk as each image; return them by their names."""
    times = states(seed, 3)
    disks = {}
    raw = folder / "disk.raw"
    raw.write_bytes(times[-1])
    for name, keywords in ALONE.items():
        if name not in names:
            continue
        if name != raw.name:
            imgcore.convert(raw, folder / name, sync=False, **keywords)
        disks[name] = Disk(folder / name, times[-1])
    (folder / ODD).write_bytes(times[-1] + noise(77))
    disks[ODD] = Disk(folder / ODD, times[-1] + noise(77) + bytes(SECTOR - 77))
    state = folder / "state.raw"
    for name, (n_layers, keywords) in CHAINS.items():
        if name not in names:
            continue
        stem, suffix = os.path.splitext(name)
        backing: dict[str, Any] = {}
        for depth in reversed(range(n_layers)):
            state.write_bytes(times[-1 - depth])
            path = folder / (f"{stem}-{depth}{suffix}" if depth else name)
            imgcore.convert(state, path, sync=False, **keywords, **backing)
            backing = {"backing": path.name, "backing_format": suffix[1:]}
            state.unlink()
        disks[name] = Disk(folder / name, times[-1])
    return disks


def vmdk_chain(folder: Path, seed: int = 1) -> Disk:
    """Write a VMDK with a parent, which only qemu-img does."""
    before, after = states(seed, 2)
    base, path, state = (folder / name for name in ("base.vmdk", "child.vmdk", "vmdk.raw"))
    state.write_bytes(before)
    qemu.run("convert", "-f", "raw", "-O", "vmdk", state, base)
    state.write_bytes(after)
    words = ("convert", "-f", "raw", "-O", "vmdk", "-B", base, "-F", "vmdk")
    qemu.run(*words, state, path)
    state.unlink()
    return Disk(path, after)


def same(found: Any, expected: Any, *where: object) -> None:
    """Fail unless the bytes are equal, and say where they first differ."""
    found, expected = bytes(found), bytes(expected)
    if found != expected:
        pairs = enumerate(zip(found, expected, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(found), len(expected)))
        raise AssertionError(
            f"{where}: {len(found)} bytes, expected {len(expected)}; first differ at {at}"
        )


def some_range(rng: random.Random, nbytes: int, most: int = 2 * MIB) -> tuple[int, int]:
    """Return a range of the disk: short and long ones, of which many meet edges."""
    unit = rng.choice((1, SECTOR, 4 * KIB, 64 * KIB, MIB))
    near = rng.choice((-513, -512, -3, -1, 0, 0, 0, 1, 2, 511, 512, 4096))
    offset = max(0, min(rng.randrange(nbytes // unit + 1) * unit + near, nbytes))
    limit = rng.choice((1, 100, SECTOR, 4 * KIB, 4 * KIB, 70 * KIB, 70 * KIB, most))
    length = limit if rng.random() < 0.4 else rng.randrange(limit + 1)
    return offset, min(length, nbytes - offset)


def read(image: imgcore.Image, content: bytes, rng: random.Random) -> None:
    offset, length = some_range(rng, len(content))
    same(image.read(offset, length), content[offset : offset + length], "read", offset, length)


def _part(rng: random.Random, length: int) -> tuple[Any, Callable[[], bytes]]:
    """Return a part of a larger buffer, whose other bytes must not change."""
    before = rng.choice((0, 1, 3, 7, 8, 511, 512))
    whole = bytearray(b"\xa5" * (before + length + 9))

    def taken() -> bytes:
        same(whole[:before], b"\xa5" * before, "before the buffer")
        same(whole[before + length :], b"\xa5" * 9, "after the buffer")
        return bytes(whole[before : before + length])

    return memoryview(whole)[before : before + length], taken


def _numbers(rng: random.Random, length: int) -> tuple[Any, Callable[[], bytes]]:
    kind = rng.choice((np.uint8, np.uint16, np.float64))
    size = np.dtype(kind).itemsize
    numbers = np.full(length // size, 7, kind)
    return numbers, numbers.tobytes


def _matrix(rng: random.Random, length: int) -> tuple[Any, Callable[[], bytes]]:
    matrix = np.full((length // 12, 3), 7, np.uint32)
    return matrix, matrix.tobytes


def _array(rng: random.Random, length: int) -> tuple[Any, Callable[[], bytes]]:
    numbers = array.array("H", bytes(length // 2 * 2))
    return numbers, numbers.tobytes


def _mapping(rng: random.Random, length: int) -> tuple[Any, Callable[[], bytes]]:
    if not length:
        return bytearray(), bytes
    mapping = mmap.mmap(-1, length)
    return mapping, lambda: mapping[:]


BUFFERS: Final = (_part, _part, _numbers, _matrix, _array, _mapping)


def readinto(image: imgcore.Image, content: bytes, rng: random.Random) -> None:
    offset, length = some_range(rng, len(content))
    buffer, taken = rng.choice(BUFFERS)(rng, length)
    length = memoryview(buffer).nbytes
    answer = image.readinto(offset, buffer)
    assert answer == length, (answer, length)
    same(taken(), content[offset : offset + length], "readinto", offset, length)


def readv(image: imgcore.Image, content: bytes, rng: random.Random) -> None:
    requests, check = [], []
    for _ in range(rng.choice((0, 1, 2, 30))):
        offset, length = some_range(rng, len(content), 100 * KIB)
        buffer, taken = rng.choice(BUFFERS)(rng, length)
        requests.append((offset, buffer))
        check.append((offset, memoryview(buffer).nbytes, taken))
    image.readv(requests, threads=rng.choice((None, None, 1, 2, 5)))
    for offset, length, taken in check:
        same(taken(), content[offset : offset + length], "readv", offset, length)


def as_file(image: imgcore.Image, content: bytes, rng: random.Random) -> None:
    """Does to the file what it does to a file in memory."""
    start, length = some_range(rng, len(content)) if rng.random() < 0.7 else (0, len(content))
    whole = (start, length) == (0, len(content))
    file = image.as_file() if whole else image.as_file(start=start, length=length)
    model = io.BytesIO(content[start : start + length])
    with file:
        assert (file.readable(), file.seekable(), file.writable()) == (True, True, False)
        for _ in range(rng.randrange(12)):
            _seek(file, model, rng)
            count = rng.choice((0, 1, 100, 4096, 70_000, 70_000, MIB))
            if rng.random() < 0.5:
                same(file.read(count), model.read(count), "file", start, length, count)
            else:
                ours, theirs = bytearray(count), bytearray(count)
                n_read = file.readinto(ours)
                assert n_read == model.readinto(theirs), (start, length, count)
                same(ours, theirs, "file", start, length, count)
            assert file.tell() == model.tell()
        if rng.random() < 0.3:
            _seek(file, model, rng)
            same(file.read(), model.read(), "the rest of the file", start, length)
    assert file.closed


def _seek(file: io.RawIOBase, model: io.BytesIO, rng: random.Random) -> None:
    """Move both to the same place, or nowhere."""
    nbytes = len(model.getbuffer())
    match rng.randrange(4):
        case 0:
            to = rng.randrange(nbytes + 2)
            assert file.seek(to) == model.seek(to)
        case 1:
            by = rng.randrange(-model.tell(), 1 + nbytes)
            to = model.tell() + by
            assert file.seek(by, os.SEEK_CUR) == model.seek(to)
        case 2:
            by = -rng.randrange(nbytes + 1)
            assert file.seek(by, os.SEEK_END) == model.seek(by, os.SEEK_END)


def _sectors(rng: random.Random, nbytes: int) -> tuple[int, int]:
    """Return a range that `Image.extents` takes."""
    start = rng.randrange(nbytes // SECTOR) * SECTOR
    end = min(start + rng.randrange(3000) * SECTOR, nbytes)
    return (start, nbytes - start) if rng.random() < 0.2 else (start, end - start)


def _rows(batches: Iterator[Any], start: int, length: int) -> Iterator[Any]:
    """Yield the rows of a range, which must be free of gaps."""
    at = start
    for batch in batches:
        for row in batch:
            assert int(row["guest_offset"]) == at
            at += int(row["length"])
            yield row
    assert at == start + length, (start, length, at)


def extents(image: imgcore.Image, content: bytes, rng: random.Random) -> None:
    """Extents are where the bytes are."""
    start, length = _sectors(rng, len(content))
    for row in _rows(image.extents(start, length), start, length):
        at, nbytes = int(row["guest_offset"]), int(row["length"])
        expected = content[at : at + nbytes]
        if row["kind"] in (Kind.HOLE, Kind.ZERO):
            same(bytes(nbytes), expected, "extents", at, nbytes)
        elif row["kind"] == Kind.DATA:
            with open(image.paths[int(row["file"])], "rb") as file:
                file.seek(int(row["host_offset"]))
                found = file.read(nbytes)
            end = b"" if at + nbytes < len(content) else expected[len(found) :]
            assert not any(end)
            same(found + end, expected, "extents", at, nbytes)


def layers(image: imgcore.Image, content: bytes, rng: random.Random) -> None:
    """The first layer that states something about a sector is what the chain says."""
    start, length = _sectors(rng, len(content))
    n_sectors = -(-length // SECTOR)
    whole = _kinds(image.extents(start, length), start, length, n_sectors)
    stacked = np.full(n_sectors, Kind.HOLE)
    for depth in range(len(image.layers)):
        of_layer = _kinds(image.extents(start, length, layer=depth), start, length, n_sectors)
        stacked = np.where(stacked == Kind.HOLE, of_layer, stacked)
    assert np.array_equal(stacked, whole), (start, length)


def _kinds(batches: Iterator[Any], start: int, length: int, n_sectors: int) -> Any:
    """Return the kind of each sector of a range."""
    kinds = np.full(n_sectors, -1)
    for row in _rows(batches, start, length):
        first = (int(row["guest_offset"]) - start) // SECTOR
        kinds[first : first - (-int(row["length"]) // SECTOR)] = row["kind"]
    return kinds


USES: Final[dict[str, Callable[[imgcore.Image, bytes, random.Random], None]]] = {
    "read": read,
    "readinto": readinto,
    "readv": readv,
    "as_file": as_file,
    "extents": extents,
    "layers": layers,
}


def use_at_random(image: imgcore.Image, content: bytes, seed: int, n_uses: int) -> None:
    """Make random uses of an image, most of them short reads."""
    rng = random.Random(seed)
    names = [*USES, "read", "readinto", "readinto", "readinto"]
    for _ in range(n_uses):
        USES[rng.choice(names)](image, content, rng)
