"""Areas in normal form: checked, joined, and rounded to blocks.

In normal form, areas are inside the disk and not empty, they ascend without overlaps,
and adjacent areas differ in `Area.is_zero`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from imgcore import limits
from imgcore.areas.area import Area
from imgcore.errors import FormatError, ImgcoreError, OptionError
from imgcore.sizes import MAX_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


class Entry(NamedTuple):
    """An entry of a list of areas, as a file or a caller states it.

    Attributes
    ----------
    offset, length : int
        Bytes; nothing is verified.
    is_zero : bool
        See `Area`.
    is_changed : bool
        Some lists have entries for the unchanged rest of the disk, too.
    """

    offset: int
    length: int
    is_zero: bool = False
    is_changed: bool = True


def normal_areas(
    entries: Iterable[Entry], virtual_size: int, *, path: str | None = None
) -> Iterator[Area]:
    """Yield the changed areas of a list in normal form.

    Parameters
    ----------
    entries : iterable of Entry
    virtual_size : int
        Size of the disk in bytes.
    path : str, optional
        The file that the list is from, for messages.

    Raises
    ------
    FormatError
        An entry is empty, outside the disk, or does not start at or after the end of
        the one before it.  OptionError if there is no ``path``.

    Notes
    -----
    Entries need not be aligned to sectors, because disks need not.
    """
    return joined(
        Area(entry.offset, entry.length, entry.is_zero)
        for entry in _checked(entries, virtual_size, path)
        if entry.is_changed
    )


def _checked(entries: Iterable[Entry], virtual_size: int, path: str | None) -> Iterator[Entry]:
    last = Entry(0, 0)
    for number, entry in enumerate(entries, 1):
        problem = _problem(entry, last, virtual_size)
        if problem is not None:
            raise bad_areas(f"entry {number} of the areas {problem}", path)
        yield entry
        last = entry


def _problem(entry: Entry, last: Entry, virtual_size: int) -> str | None:
    offset, length = entry.offset, entry.length
    if max(abs(offset), abs(length)) > MAX_SIZE:
        return "has an offset or a length that exceeds 2^63 - 1"
    if offset < 0:
        return f"starts at {offset}, before the start of the disk"
    if length <= 0:
        return f"at {offset} has a length of {length}, allowed is at least 1"
    if offset + length > virtual_size:
        return (
            f"is from {offset} to {offset + length}, outside the disk of {virtual_size} bytes: "
            "is it of another disk?"
        )
    if offset < last.offset:
        return f"starts at {offset}, before the entry in front of it ({last.offset}): not sorted"
    if offset < last.offset + last.length:
        return f"starts at {offset}, inside the entry in front of it: they overlap"
    return None


def bad_areas(message: str, path: str | None) -> ImgcoreError:
    """Return the error about a list of areas: from a file, or from the caller."""
    return OptionError(message) if path is None else FormatError(message, path=path)


def joined(areas: Iterable[Area]) -> Iterator[Area]:
    """Yield ascending areas, with adjacent ones of the same kind joined."""
    last: Area | None = None
    for area in areas:
        if last is None:
            last = area
        elif last.offset + last.length == area.offset and last.is_zero == area.is_zero:
            last = last._replace(length=last.length + area.length)
        else:
            yield last
            last = area
    if last is not None:
        yield last


def check_granularity(granularity: int) -> None:
    """Raise OptionError unless areas can be rounded to blocks of this size."""
    low, high = limits.AREAS_MIN_GRANULARITY, limits.AREAS_MAX_GRANULARITY
    if not low <= granularity <= high or granularity & (granularity - 1):
        raise OptionError(
            f"granularity is {granularity}: allowed are powers of two from {low} to {high}"
        )


def rounded(areas: Iterable[Area], granularity: int, virtual_size: int) -> Iterator[Area]:
    """Yield areas in normal form, rounded outwards to whole blocks of the disk.

    Parameters
    ----------
    areas : iterable of Area
        In normal form.
    granularity : int
        Bytes of a block; see `check_granularity`.  The last one may be shorter.
    virtual_size : int
        Size of the disk in bytes.

    Notes
    -----
    A block is zero only if an area that is zero covers all of it.
    """
    return joined(_without_overlaps(_blocks_of(areas, granularity, virtual_size)))


def _blocks_of(areas: Iterable[Area], granularity: int, virtual_size: int) -> Iterator[Area]:
    """Yield whole blocks; one that two areas touch comes twice, and is not zero."""
    mask = granularity - 1
    for area in areas:
        end = area.offset + area.length
        low, high = area.offset & ~mask, min((end + mask) & ~mask, virtual_size)
        # The blocks that the area covers.
        first = (area.offset + mask) & ~mask
        last = end if end == virtual_size else end & ~mask
        if not area.is_zero or first >= last:
            yield Area(low, high - low, is_zero=False)
            continue
        if low < first:
            yield Area(low, first - low, is_zero=False)
        yield Area(first, last - first, is_zero=True)
        if last < high:
            yield Area(last, high - last, is_zero=False)


def _without_overlaps(areas: Iterable[Area]) -> Iterator[Area]:
    done = 0
    for area in areas:
        start, end = max(area.offset, done), area.offset + area.length
        if start < end:
            yield area._replace(offset=start, length=end - start)
            done = end
