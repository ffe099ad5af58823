"""What the engine is given of a disk: its files, and batches of extents."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imgcore._core import File
    from imgcore.engine.extents import Extents


class Batch(NamedTuple):
    """One piece of the disk: a guest range in bytes, and the extents that cover it.

    ``rows`` may be a table made by `imgcore._core.extent_table`, for a flat source.
    ``base`` has the extents of the target's parent in the range, None without one.
    ``ends_disk`` is set if the disk's size was not known before this batch, the last.
    """

    start: int
    end: int
    rows: Extents
    base: Extents | None = None
    ends_disk: bool = False


class Supply(NamedTuple):
    """A disk as the engine reads it: files, and batches of extents.

    ``native_sources`` are the files that extents refer to by index (file, size, guest
    base, block size); ``paths`` are their names.  A batch stays valid until the second
    batch after it is taken.

    ``find_end``, if it is there, is called when a disk of unknown size has been read as
    far as it goes: the source's size is known then, or it raises.

    ``meanwhile``, if it is there, prepares for the next batches while the engine works
    on one; see `Job.wait`.
    """

    paths: list[str]
    native_sources: list[tuple[File, int, int, int]]
    batches: Iterator[Batch]
    find_end: Callable[[], None] | None = None
    meanwhile: Callable[[], int] | None = None
