"""Damages images, opens readers, and lists extents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from imgcore.files.host_file import HostFile
from imgcore.formats.api import Reader

_Reader = TypeVar("_Reader", bound=Reader)


def open_file(path: Path, read: Callable[[HostFile], _Reader]) -> _Reader:
    """Return the reader of a file; an error closes the file."""
    file = HostFile.open(path)
    try:
        return read(file)
    except BaseException:
        file.close()
        raise


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
