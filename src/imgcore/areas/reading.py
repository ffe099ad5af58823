"""Reads the areas that a file or a caller lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, SupportsIndex, TypeAlias

from imgcore import limits
from imgcore.areas.area import Area
from imgcore.areas.json_text import JsonText, encoding_of
from imgcore.areas.normal import Entry, normal_areas
from imgcore.border import FilePath, file_name, integer
from imgcore.errors import UnsupportedFeatureError, WrongFormatError
from imgcore.files.host_file import HostFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imgcore.files.byte_source import ByteSource

AreaList: TypeAlias = "FilePath | Sequence[Area | tuple[SupportsIndex, SupportsIndex]]"
"""Changed areas: the name of a file that lists them, or `Area` and (offset, length)."""

# VMware's change tracking files; libvmdk knows no more of them.
# Source: libvmdk, "VMWare Virtual Disk Format (VMDK)", "Change tracking file".
_CTK_MAGIC: Final = b"\xa2\x72\x19\xf6"
# The key that comes first tells one JSON from another.
_KNOWN_KEY: Final = re.compile(r'"(start|startoffset|changedarea|description)"\s*:', re.IGNORECASE)
_EMPTY_ARRAY: Final = re.compile(r"\[\s*\]")


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
    try:
        offset, length, is_zero = value if isinstance(value, Area) else (*value, False)
    except (TypeError, ValueError):
        raise TypeError(
            f"areas: an Area or (offset, length) is needed, not {value!r:.60}"
        ) from None
    return Entry(integer(offset, "offset"), integer(length, "length"), is_zero=bool(is_zero))


def _entries(file: ByteSource, virtual_size: int) -> Iterator[Entry]:
    """Return the entries of a file, whose content tells its kind."""
    if file.pread(0, min(len(_CTK_MAGIC), file.nbytes)) == _CTK_MAGIC:
        raise UnsupportedFeatureError(
            "a change tracking file of VMware, whose layout is not public: use the JSON of "
            "QueryChangedDiskAreas",
            path=file.path,
        )
    head = file.pread(0, min(limits.AREAS_MAX_JSON_VALUE_CHARS, file.nbytes))
    text = head.decode(encoding_of(head), "replace").lstrip(" \t\n\r")
    if text.startswith("<"):
        from imgcore.areas.bmap import read_bmap

        return read_bmap(file, virtual_size)
    key = _KNOWN_KEY.search(text) if text.startswith(("[", "{")) else None
    if _EMPTY_ARRAY.match(text) or (key is not None and key[1].lower() == "start"):
        from imgcore.areas.qemu_map import read_map

        return read_map(JsonText(file))
    if key is not None and key[1].lower() == "description":
        from imgcore.areas.nbd_map import read_nbd_map

        return read_nbd_map(JsonText(file))
    if key is not None:
        from imgcore.areas.vmware_json import read_responses

        return read_responses(JsonText(file), virtual_size)
    raise WrongFormatError("not a list of changed areas of a known kind", path=file.path)
