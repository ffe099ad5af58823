"""Reads the areas that a file or a caller lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, SupportsIndex, TypeAlias

from imgcore.areas.area import Area
from imgcore.areas.json_text import JsonText
from imgcore.areas.normal import Entry, normal_areas
from imgcore.border import FilePath, file_name, integer
from imgcore.errors import WrongFormatError
from imgcore.files.host_file import HostFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.files.byte_source import ByteSource

AreaList: TypeAlias = "FilePath | Sequence[Area | tuple[SupportsIndex, SupportsIndex]]"
"""Changed areas: the name of a file that lists them, or `Area` and (offset, length)."""

# The key that appears first in each kind of list.
_FIRST_KEY: Final = re.compile(r'"(start)"\s*:')


def read_areas(source: AreaList, virtual_size: int) -> Iterator[Area]:
    """Yield the changed areas that a file or a sequence lists.

    Parameters
    ----------
    source : str, bytes, os.PathLike, or sequence of Area or (offset, length)
        A file is one of those in docs/changes.md; its content tells which.
    virtual_size : int
        Size of the disk in bytes.

    Yields
    ------
    Area
        Ascending, inside the disk and not empty; adjacent ones are joined.

    Raises
    ------
    WrongFormatError
        The file is of no known kind.
    FormatError
        It is damaged, or lists areas that are not sorted, overlap, or are not inside
        the disk.  OptionError for such a sequence.
    LimitExceededError
        It is larger than a named limit.
    OSError
        The file cannot be read.

    Notes
    -----
    The file is read while areas are taken, so that an error may follow correct areas.
    """
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        yield from normal_areas(map(_stated, source), virtual_size)
        return
    with HostFile.open(file_name(source)) as file:
        yield from normal_areas(_entries(file, virtual_size), virtual_size, path=file.path)
        file.check_unchanged()


def _stated(value: Area | tuple[SupportsIndex, SupportsIndex]) -> Entry:
    offset, length, is_zero = value if isinstance(value, Area) else (*value, False)
    return Entry(integer(offset, "offset"), integer(length, "length"), is_zero=bool(is_zero))


def _entries(file: ByteSource, virtual_size: int) -> Iterator[Entry]:
    text = JsonText(file)
    found = text.next_char()
    if found and found in "[{":
        from imgcore.areas.qemu_map import read_map

        return read_map(text)
    raise WrongFormatError("not a list of changed areas", path=file.path)
