"""Stand-ins for large images: the tables of 1 TiB with 100 GiB of data, in a few MiB.

The tables say what those of a real image would.  The file has holes where the data
would be, and a few sectors, the *marks*, that tell whether a block is in its place.
A raw disk has no tables, so its data is one piece, reflinked: it needs XFS or Btrfs.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from imgcore.engine.extents import PLACEMENT_DTYPE, BlockState
from imgcore.files.target import Target
from imgcore.formats.api import WriteRequest
from imgcore.formats.option_texts import parse_options
from imgcore.formats.registry import get_driver
from tests.helpers import images, qemu
from tests.helpers.images import GIB, KIB, MIB

TIB: Final = 1024 * GIB
N_MARKS: Final = 64
_FICLONERANGE: Final = 0x4020940D
_SECTOR: Final = 512


class Mark(NamedTuple):
    """A sector of the disk that is filled with one byte."""

    guest_offset: int
    byte: int


class _Recipe(NamedTuple):
    format: str
    piece_nbytes: int
    shuffled: bool = False
    block_nbytes: int = 0
    virtual_size: int = TIB
    data_nbytes: int = 100 * GIB


class StandIn(_Recipe):
    """The recipe of an image: how large its pieces are, and how they lie in the file.

    A piece is contiguous on the disk and in the file.  Pieces lie in the disk's order,
    or are shuffled.  ``block_nbytes`` is the format's block, cluster or grain.
    """

    @property
    def name(self) -> str:
        """The recipe in a file name or a test's name."""
        block = f"{self.block_nbytes // KIB}k-" if self.block_nbytes else ""
        order = "shuffled" if self.shuffled else "in-order"
        return f"{self.format}-{block}{self.piece_nbytes // KIB}k-{order}"

    @property
    def n_pieces(self) -> int:
        """The number of pieces with data."""
        return self.data_nbytes // self.piece_nbytes

    @cached_property
    def guest_pieces(self) -> NDArray[np.int64]:
        """The numbers of the pieces of the disk that have data, ascending.

        The disk's first and last piece are among them.
        """
        rng = np.random.default_rng(images.SEED)
        last = self.virtual_size // self.piece_nbytes - 1
        chosen = rng.choice(last - 1, self.n_pieces - 2, replace=False) + 1
        return np.sort(np.concatenate(([0, last], chosen))).astype(np.int64)

    @cached_property
    def file_pieces(self) -> NDArray[np.int64]:
        """For each of `guest_pieces`, its number among the pieces in the file."""
        order = np.arange(self.n_pieces, dtype=np.int64)
        return np.random.default_rng(images.SEED + 1).permutation(order) if self.shuffled else order

    def marks(self) -> list[Mark]:
        """Return sectors with data: the disk's first and last one, and random ones."""
        rng = np.random.default_rng(images.SEED + 2)
        pieces = rng.choice(self.guest_pieces, N_MARKS - 2, replace=False) * self.piece_nbytes
        sectors = rng.integers(1, self.piece_nbytes // _SECTOR - 1, N_MARKS - 2) * _SECTOR
        offsets = [0, *(pieces + sectors).tolist(), self.virtual_size - _SECTOR]
        return [Mark(offset, index + 1) for index, offset in enumerate(offsets)]

    def host_offset(self, guest_offset: int, first_offset: int) -> int:
        """Return where a byte is, if the first piece is at ``first_offset``."""
        piece, within = divmod(guest_offset, self.piece_nbytes)
        index = int(np.searchsorted(self.guest_pieces, piece))
        return first_offset + int(self.file_pieces[index]) * self.piece_nbytes + within

    def batches(
        self, first_offset: int, n_at_once: int = 1 << 17
    ) -> Iterator[tuple[int, NDArray[np.void]]]:
        """Yield batches of placements, with the number of their first block."""
        per_piece = self.piece_nbytes // self.block_nbytes
        n_blocks = self.virtual_size // self.block_nbytes
        for first in range(0, n_blocks, n_at_once):
            blocks = np.arange(first, min(first + n_at_once, n_blocks), dtype=np.int64)
            rows = np.zeros(len(blocks), dtype=PLACEMENT_DTYPE)
            index = np.searchsorted(self.guest_pieces, blocks // per_piece)
            has_data = self.guest_pieces[index] == blocks // per_piece
            places = self.file_pieces[index] * self.piece_nbytes
            places += first_offset + blocks % per_piece * self.block_nbytes
            rows["host_offset"][has_data] = places[has_data]
            rows["length"][has_data] = self.block_nbytes
            rows["state"][has_data] = BlockState.STORED
            yield first, rows

    def make(self, path: Path) -> Path:
        """Write the image with its marks."""
        if self.format == "raw":
            _write_raw(self, path)
            first_offset = 0
        elif self.format == "qcow2":
            first_offset = _write_qcow2(self, path)
        else:
            first_offset = _write_by_writer(self, path)
        with open(path, "r+b") as file:
            for mark in self.marks():
                at = mark.guest_offset
                at = at if self.format == "raw" else self.host_offset(at, first_offset)
                file.seek(at)
                file.write(bytes([mark.byte]) * _SECTOR)
        return path


STAND_INS: Final = (
    StandIn("raw", 32 * MIB),
    *(
        StandIn("qcow2", piece, shuffled, block)
        for block, piece in ((64 * KIB, 64 * KIB), (64 * KIB, MIB), (MIB, MIB), (2 * MIB, 32 * MIB))
        for shuffled in (False, True)
    ),
    *(
        StandIn("vmdk", piece, shuffled, 64 * KIB)
        for piece in (64 * KIB, MIB, 32 * MIB)
        for shuffled in (False, True)
    ),
    *(
        StandIn("vhdx", piece, shuffled, block)
        for block, piece in ((MIB, MIB), (32 * MIB, 32 * MIB))
        for shuffled in (False, True)
    ),
    *(
        StandIn("vdi", piece, shuffled, MIB)
        for piece in (MIB, 32 * MIB)
        for shuffled in (False, True)
    ),
)

_BLOCK_OPTION: Final = {"vmdk": "grain_size", "vhdx": "block_size", "vdi": "block_size"}


def _write_by_writer(stand_in: StandIn, path: Path) -> int:
    """Let imgcore's writer make the tables; return where the first piece is."""
    driver = get_driver(stand_in.format)
    options = parse_options(driver, {_BLOCK_OPTION[stand_in.format]: stand_in.block_nbytes})
    request = WriteRequest(stand_in.virtual_size, options, target_name=path.name)
    writer = driver.writer(request)
    with Target(path, sync=False) as target:
        writer.begin(target)
        end = writer.first_offset + stand_in.data_nbytes
        for first, rows in stand_in.batches(writer.first_offset):
            if rows["state"].any():
                writer.place(first, rows, end)
        writer.finish(end)
        target.commit()
    return writer.first_offset


def _write_qcow2(stand_in: StandIn, path: Path) -> int:
    """Write header, L1, data, L2, refcount blocks and refcount table, in this order."""
    size = stand_in.block_nbytes
    per_table = size // 8
    n_tables = -(-stand_in.virtual_size // (size * per_table))
    l1_clusters = -(-n_tables * 8 // size)
    first_offset = (1 + l1_clusters) * size
    l2_offset = first_offset + stand_in.data_nbytes
    with open(path, "w+b") as file:
        l1 = np.zeros(l1_clusters * per_table, dtype=">u8")
        file.seek(l2_offset)
        end = l2_offset
        copied = np.uint64(1 << 63)
        for first, rows in stand_in.batches(first_offset, max(per_table, 1 << 17)):
            entries = rows["host_offset"] | np.where(rows["state"] != 0, copied, np.uint64(0))
            tables = np.zeros(-(-len(rows) // per_table) * per_table, dtype=">u8")
            tables[: len(rows)] = entries
            used = np.flatnonzero(tables.reshape(-1, per_table).any(axis=1))
            places = end + np.arange(len(used), dtype=np.int64) * size
            l1[first // per_table + used] = places.astype(np.uint64) | copied
            file.write(tables.reshape(-1, per_table)[used].tobytes())
            end += len(used) * size
        _write_refcounts(file.fileno(), end // size, size)
        os.pwrite(file.fileno(), l1.tobytes(), size)
        n_blocks, n_table = _refcount_clusters(end // size, size)
        header = struct.pack(
            ">4sIQIIQIIQQIIQQQQII",
            b"QFI\xfb",
            3,
            0,
            0,
            size.bit_length() - 1,
            stand_in.virtual_size,
            0,
            n_tables,
            size,
            end + n_blocks * size,
            n_table,
            0,
            0,
            0,
            0,
            0,
            4,
            104,
        )
        os.pwrite(file.fileno(), header, 0)
    return first_offset


def _refcount_clusters(n_used: int, size: int) -> tuple[int, int]:
    """Return how many clusters of refcount blocks and of the table are needed."""
    n_blocks = n_table = 0
    while True:
        needed = -(-(n_used + n_blocks + n_table) // (size // 2))
        if needed == n_blocks and n_table:
            return n_blocks, n_table
        n_blocks, n_table = needed, -(-needed * 8 // size)


def _write_refcounts(fd: int, n_used: int, size: int) -> None:
    """Write a refcount of 1 for every cluster, after ``n_used`` of them."""
    n_blocks, n_table = _refcount_clusters(n_used, size)
    counts = np.zeros(n_blocks * size // 2, dtype=">u2")
    counts[: n_used + n_blocks + n_table] = 1
    table = np.zeros(n_table * size // 8, dtype=">u8")
    table[:n_blocks] = n_used * size + np.arange(n_blocks, dtype=np.int64) * size
    os.pwrite(fd, counts.tobytes() + table.tobytes(), n_used * size)


def _write_raw(stand_in: StandIn, path: Path) -> None:
    """Reflink one piece of noise to the place of each piece, or skip."""
    piece = path.with_suffix(".piece")
    piece.write_bytes(images.noise(stand_in.piece_nbytes))
    with open(piece, "rb") as source, open(path, "wb") as file:
        file.truncate(stand_in.virtual_size)
        for number in stand_in.guest_pieces.tolist():
            at = number * stand_in.piece_nbytes
            where = struct.pack("qQQQ", source.fileno(), 0, stand_in.piece_nbytes, at)
            try:
                fcntl.ioctl(file, _FICLONERANGE, where)
            except OSError as error:
                pytest.skip(f"a raw disk of this size needs reflinks: {error.strerror}")
    piece.unlink()


def assert_marks(path: Path, image_format: str, marks: list[Mark]) -> None:
    """Fail unless QEMU reads every mark."""
    program = qemu.find_program("qemu-io")
    if program is None:
        pytest.skip("qemu-io is not installed (Debian: qemu-utils)")
    command = [program, "-r", "-f", image_format]
    for mark in marks:
        command += ["-c", f"read -P {mark.byte} {mark.guest_offset} {_SECTOR}"]
    done = qemu.checked([*command, str(path)])
    assert "verification failed" not in done.stdout, done.stdout
    assert done.stdout.count(f"read {_SECTOR}/{_SECTOR} bytes") == len(marks), done.stdout
