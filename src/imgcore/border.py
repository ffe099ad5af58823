"""The arguments of public functions, in the form that the modules inside take them."""

from __future__ import annotations

import contextlib
import operator
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, TypeAlias

from imgcore.errors import OptionError
from imgcore.sizes import MAX_SIZE

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FilePath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]
"""A file's name.  One that is not UTF-8 is given as bytes, or as `os.fsdecode` returns
it; results always hold the latter."""


def file_name(path: FilePath) -> str:
    """Return a file's name as str; TypeError for anything that is not a name."""
    return os.fsdecode(path)


def source_name(source: FilePath | int) -> str | int:
    """Return the name of an image as str, or the number of a descriptor as int."""
    if isinstance(source, str | bytes | os.PathLike):
        return file_name(source)
    return descriptor(source, "expected str, bytes or os.PathLike object, or an open descriptor")


def descriptor(number: SupportsIndex, wanted: str = "expected an open descriptor") -> int:
    """Return a descriptor as int; TypeError for anything else, also for a bool."""
    if not isinstance(number, bool):
        with contextlib.suppress(TypeError):
            return int(operator.index(number))
    raise TypeError(f"{wanted}, not {number!r}")


class Readable(Protocol):
    """An object that is open for reading bytes, such as a binary file object."""

    def read(self, nbytes: int, /) -> bytes | None:
        """Return the next bytes, at most so many; none at the end.

        ``readinto`` is used instead if the object has it.
        """
        ...


class Writable(Protocol):
    """An object that is open for writing bytes."""

    def write(self, data: bytes, /) -> Any:
        """Take bytes, all of them or as many as it returns."""
        ...


def file_names(paths: FilePath | Sequence[FilePath]) -> tuple[str, ...]:
    """Return the names of one file or of several as str; see `file_name`."""
    if isinstance(paths, Sequence) and not isinstance(paths, str | bytes):
        return tuple(file_name(path) for path in paths)
    return (file_name(paths),)


def integer(value: SupportsIndex, what: str) -> int:
    """Return a number as int, also that of an object such as numpy.uint64.

    ``what`` names the argument in the TypeError for anything else, such as 1.0.
    """
    try:
        return int(operator.index(value))
    except TypeError:
        raise TypeError(f"{what}: an integer is needed, not {value!r}") from None


def byte_count(value: SupportsIndex, what: str) -> int:
    """Return an offset or a size in bytes.

    OptionError if it is negative or larger than any file.
    """
    number = integer(value, what)
    if not 0 <= number <= MAX_SIZE:
        raise OptionError(
            f"{what} is {number}: a number of bytes is not negative, and at most 2^63 - 1"
        )
    return number


def octets_of(data: ReadableBuffer) -> memoryview:
    """Return the bytes of a contiguous buffer of any shape and type.

    TypeError for anything else.
    """
    view = memoryview(data)
    if not view.contiguous:
        raise TypeError(f"a contiguous buffer is needed, not {type(data).__name__}")
    try:
        return view.cast("B")
    except (TypeError, ValueError):
        # An array that is empty, of records, or in Fortran's order.
        return memoryview(view.tobytes("A"))


def request_of(request: tuple[SupportsIndex, ReadableBuffer]) -> tuple[SupportsIndex, Any]:
    """Return an offset and a buffer; TypeError for anything but such a pair."""
    try:
        offset, buffer = request
    except (TypeError, ValueError):
        raise TypeError(
            f"a request is a pair of an offset and a buffer, not {request!r:.99}"
        ) from None
    return offset, buffer


def range_of_disk(
    path: str, nbytes: int, start: SupportsIndex, length: SupportsIndex | None, what: str
) -> tuple[int, int]:
    """Return a range of a disk of ``nbytes`` bytes as two ints.

    It ends with the disk if ``length`` is None.  ``path`` and ``what``, which is what
    the caller calls the start, are for the message of the ValueError if the range is
    not inside the disk.
    """
    first = integer(start, what)
    count = nbytes - first if length is None else integer(length, "length")
    if first < 0 or count < 0 or first + count > nbytes:
        stated = "" if length is None else f", length {count}"
        raise ValueError(
            f"{path}: the range is not inside the disk of {nbytes} bytes: {what} {first}{stated}"
        )
    return first, count
