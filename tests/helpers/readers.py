"""Damage for images, and what a reader says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from imgcore.formats.api import Reader


def poke(path: Path, *changes: tuple[int, bytes]) -> Path:
    """Write bytes into a file."""
    with open(path, "r+b") as file:
        for offset, data in changes:
            file.seek(offset)
            file.write(data)
    return path


def extent_rows(reader: Reader, start: int = 0, length: int | None = None) -> list[Any]:
    """Return all rows of a range as tuples."""
    length = reader.virtual_size - start if length is None else length
    return [row for batch in reader.extents(start, length) for row in batch.tolist()]
