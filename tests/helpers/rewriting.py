"""Drive a format's `Rewriter` on a copy of an image, without a journal."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import imgcore
from imgcore.engine.extents import (
    EXTENT_DTYPE,
    PLACEMENT_DTYPE,
    BlockState,
    Extents,
    Kind,
    join_neighbours,
)
from imgcore.files.target_file import TargetFile
from imgcore.formats.api import BlockRule, Described, Rewriter, Survey, WriteRequest
from imgcore.formats.option_texts import parse_options
from imgcore.formats.registry import get_driver
from imgcore.formats.shared.alignment import align_up

if TYPE_CHECKING:
    from imgcore.engine.extents import Placements

FLAT_FRONT_NBYTES = 1 << 20
BATCH_BLOCKS = 1 << 14

Order = Callable[[list[int]], list[int]]


class Staged(TargetFile):
    """Keeps back what a rewriter writes before the old end, as the product does."""

    def __init__(
        self, path: Path, append_offset: int, overwrites: Sequence[tuple[int, int]]
    ) -> None:
        super().__init__(os.open(path, os.O_RDWR), str(path))
        self.append_offset = append_offset
        self.overwrites = overwrites
        self.kept: list[tuple[int, bytes]] = []
        self.final_nbytes: int | None = None

    def pwrite(self, offset: int, data: Any) -> None:
        """Write past the old end; keep back what is before it."""
        if offset >= self.append_offset:
            super().pwrite(offset, data)
            return
        octets = memoryview(data).tobytes()
        end = offset + len(octets)
        assert any(low <= offset and end <= low + n for low, n in self.overwrites), (offset, end)
        self.kept.append((offset, octets))

    def truncate(self, nbytes: int) -> None:
        """Note the final size."""
        self.final_nbytes = nbytes

    def commit(self, front_nbytes: int) -> None:
        """Write what was kept back, and zero the rest of the front."""
        front = bytearray(front_nbytes)
        os.ftruncate(self.fd, self.nbytes if self.final_nbytes is None else self.final_nbytes)
        for offset, octets in self.kept:
            inside = octets[: max(0, front_nbytes - offset)]
            front[offset : offset + len(inside)] = inside
            TargetFile.pwrite(self, offset, octets)
        if front:
            TargetFile.pwrite(self, 0, front)


def survey(image: imgcore.Image) -> Survey:
    """Return the survey of an image in one file."""
    (source,) = image.sources
    parts = [rows[rows["kind"] >= Kind.DATA] for rows in image.extents(0, image.virtual_size)]
    rows = np.concatenate(parts) if parts else np.zeros(0, EXTENT_DTYPE)
    guest, host = rows["guest_offset"], rows["host_offset"]
    is_flat = image.format in ("raw", "vhd", "vmdk") and bool((guest == host).all())
    return Survey(source.file.nbytes, is_flat, join_neighbours(rows))


def _stays(found: Survey, rule: BlockRule, start: int, end: int, rows: Extents) -> int | None:
    """Return where a block may stay, given the rows that touch it."""
    if found.is_flat:
        host, is_whole = start, start >= FLAT_FRONT_NBYTES
    else:
        first = rows[0]
        host = int(first["host_offset"]) + start - int(first["guest_offset"])
        is_whole = (
            len(rows) == 1
            and first["kind"] == Kind.DATA
            and int(first["guest_offset"]) <= start
            and int(first["guest_offset"]) + int(first["length"]) >= end
        )
    fits = host % rule.alignment == rule.phase and host >= rule.first_offset
    return host if is_whole and fits and host + end - start <= rule.end_offset else None


def rewrite(
    path: Path,
    target_format: str,
    options: Mapping[str, Any] | Sequence[str] = (),
    *,
    source_format: str | None = None,
    target_name: str = "",
    order: Order | None = None,
) -> dict[str, Any]:
    """Turn an image into another format where it is; return what stayed and moved.

    ``order`` chooses the order in which moved blocks follow each other in the file.
    """
    driver = get_driver(target_format)
    with imgcore.open(str(path), format=source_format) as image:
        found = survey(image)
        request = WriteRequest(
            image.virtual_size, parse_options(driver, options), target_name=target_name or path.name
        )
        rewriter = driver.rewriter(request, found)
        data_path = Path(image.sources[0].file.path)
        result = _rewrite(image, data_path, found, rewriter, order)
    if data_path != path:
        path.unlink()
    if isinstance(rewriter, Described):
        data_path.rename(path.parent / rewriter.data_name)
        (path.parent / request.target_name).write_bytes(rewriter.description)
    return result


def _rewrite(
    image: imgcore.Image, path: Path, found: Survey, rewriter: Rewriter, order: Order | None
) -> dict[str, Any]:
    rule = rewriter.rule
    size = image.virtual_size
    append_offset = max(found.file_nbytes, size if found.is_flat else 0)
    if rule is not None:
        append_offset = align_up(append_offset, rule.block_nbytes)
    file = Staged(path, append_offset, rewriter.overwrites)
    next_offset = rewriter.begin(file, append_offset)
    n_stayed = n_moved = 0
    if rule is not None:
        n = -(-size // rule.block_nbytes)
        placements = np.zeros(n, dtype=PLACEMENT_DTYPE)
        moved = []
        for block, rows in _touching(found.rows, rule.block_nbytes, size):
            start = block * rule.block_nbytes
            end = min(start + rule.block_nbytes, size)
            host = _stays(found, rule, start, end, rows)
            placements[block] = (host or 0, rule.block_nbytes, BlockState.STORED)
            if host is None:
                moved.append(block)
        for block in order(moved) if order else moved:
            next_offset += (rule.phase - next_offset) % rule.alignment
            start = block * rule.block_nbytes
            octets = image.read(start, min(rule.block_nbytes, size - start))
            file.pwrite(next_offset, octets.ljust(rule.block_nbytes, b"\0"))
            placements["host_offset"][block] = next_offset
            next_offset += rule.block_nbytes
        n_moved = len(moved)
        n_stayed = int(np.count_nonzero(placements["state"])) - n_moved
        next_offset = place_all(rewriter, placements, next_offset)
    rewriter.finish(next_offset)
    front = 0 if rule is None else rule.first_offset
    file.commit(max(front, FLAT_FRONT_NBYTES) if found.is_flat and rule else front)
    file.close()
    return {"stayed": n_stayed, "moved": n_moved, "kept": file.kept}


def place_all(rewriter: Rewriter, placements: Placements, next_offset: int) -> int:
    """Hand over all placements in batches."""
    for first in range(0, len(placements), BATCH_BLOCKS):
        batch = placements[first : first + BATCH_BLOCKS]
        next_offset = rewriter.place(first, batch, next_offset)
    return next_offset


def _touching(rows: Extents, block_nbytes: int, size: int) -> list[tuple[int, Extents]]:
    """Return (number of a block, rows that touch it)."""
    found: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        first = int(row["guest_offset"]) // block_nbytes
        last = (int(row["guest_offset"]) + int(row["length"]) - 1) // block_nbytes
        for block in range(first, last + 1):
            found.setdefault(block, []).append(index)
    return [(block, rows[indices]) for block, indices in sorted(found.items())]


def shuffled(seed: int = 1) -> Order:
    """Return an order that is random, but the same each time."""

    def order(blocks: list[int]) -> list[int]:
        random.Random(seed).shuffle(blocks)
        return blocks

    return order
