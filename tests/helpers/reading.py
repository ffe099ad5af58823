"""Damages images, opens readers, and lists extents."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from imgcore.files.host_file import HostFile
from imgcore.formats.api import Reader

_Reader = TypeVar("_Reader", bound=Reader)


# What the running test has opened; tests/conftest.py closes it.
_opened: list[HostFile | Reader] = []


def open_file(path: Path, read: Callable[[HostFile], _Reader]) -> _Reader:
    """Return the reader of a file, which is closed when the test ends.

    Other programs may write to the file meanwhile.
    """
    file = HostFile.open(path, share=True)
    _opened.append(file)
    reader = read(file)
    _opened.append(reader)
    return reader


def close_opened() -> None:
    """Close all readers that `open_file` has returned, and their files."""
    while _opened:
        _opened.pop().close()


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
