"""The verb ``compare``: tells whether two images hold the same virtual disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import numpy as np

from imgcore._core import Job
from imgcore.border import FilePath, file_name
from imgcore.disk.image import Image, open_image
from imgcore.disk.open_options import Flags, OpenOptions
from imgcore.disk.overlay import padded
from imgcore.engine.batches import pair_up
from imgcore.engine.extents import Kind
from imgcore.engine.job import chosen_variants, thread_count, translated_errors
from imgcore.engine.progress import Progress
from imgcore.engine.source_file import native_sources

if TYPE_CHECKING:
    from imgcore.engine.extents import Extents


class CompareResult(NamedTuple):
    """The result of `imgcore.compare`.

    Attributes
    ----------
    identical : bool
        The disks read the same.  If one is larger, the rest of it reads as zeros.
    first_difference : int or None
        Byte offset of the first difference in the virtual disk.
    reason : str or None
        Why the disks are not identical, in one line.
    size_a, size_b : int
        Virtual sizes in bytes.
    """

    identical: bool
    first_difference: int | None
    reason: str | None
    size_a: int
    size_b: int


def compare(
    a: FilePath,
    b: FilePath,
    *,
    format_a: str | None = None,
    format_b: str | None = None,
    parent_a: FilePath | Sequence[FilePath] | None = None,
    parent_b: FilePath | Sequence[FilePath] | None = None,
    read_options_a: Mapping[str, Any] | Sequence[str] | None = None,
    read_options_b: Mapping[str, Any] | Sequence[str] | None = None,
    strict: bool = False,
    threads: SupportsIndex | None = None,
    allow: Sequence[FilePath] = (),
    backing_format: str | None = None,
    share: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> CompareResult:
    """Compare the content of two images of any formats.

    The keywords that end in ``_a`` or ``_b`` are ``format``, ``parent`` and
    ``read_options`` of `imgcore.open` for that image.  ``backing_format``, ``allow``
    and ``share`` of `imgcore.open` apply to both images.

    Parameters
    ----------
    a, b : str, bytes or os.PathLike
        The images.
    strict : bool
        Also require the same size and the same allocation.
    threads : int, optional
        Number of worker threads; one per CPU by default.
    progress : callable, optional
        Called with a `Progress` on the calling thread, at most every 50 ms and once at
        the end.

    Returns
    -------
    CompareResult

    Raises
    ------
    OSError, ImgcoreError
        An image cannot be read.
    """
    options_a = OpenOptions.from_keywords(
        format=format_a,
        backing_format=backing_format,
        parent=parent_a,
        read_options=read_options_a,
        allow=allow,
        share=share,
    )
    options_b = OpenOptions.from_keywords(
        format=format_b,
        backing_format=backing_format,
        parent=parent_b,
        read_options=read_options_b,
        allow=allow,
        share=share,
        flags=Flags(format="-F", parent="--parent-b"),
    )
    a, b = file_name(a), file_name(b)
    with open_image(a, options_a) as image_a, open_image(b, options_b) as image_b:
        comparison = _Comparison(image_a, image_b, thread_count(threads), progress)
        return comparison.run(strict)


class _Comparison:
    def __init__(
        self, a: Image, b: Image, threads: int, progress: Callable[[Progress], None] | None
    ) -> None:
        self._a, self._b = a, b
        self._threads = threads
        self._progress = progress
        self._total = max(a.virtual_size, b.virtual_size)

    def run(self, strict: bool) -> CompareResult:
        a, b = self._a, self._b
        if strict and a.virtual_size != b.virtual_size:
            return self._result(None, "Strict mode: Image size mismatch!")
        if strict and (offset := self._first_allocation_difference()) is not None:
            return self._result(offset, f"Strict mode: Offset {offset} block status mismatch!")
        difference = self._first_content_difference() if self._total else None
        if difference is None:
            return self._result(None, None)
        return self._result(difference, f"Content mismatch at offset {difference}!")

    def _result(self, offset: int | None, reason: str | None) -> CompareResult:
        return CompareResult(
            reason is None, offset, reason, self._a.virtual_size, self._b.virtual_size
        )

    def _pairs(
        self, extents: Callable[[Image], Iterator[Extents]]
    ) -> Iterator[tuple[int, int, Extents, Extents]]:
        """Yield the extents of both disks over the same ranges."""
        sides = [
            padded(extents(image), image.virtual_size, self._total) for image in (self._a, self._b)
        ]
        return pair_up(*sides)

    def _first_allocation_difference(self) -> int | None:
        for _, _, rows_a, rows_b in self._pairs(Image.extents):
            offset = first_kind_difference(rows_a, rows_b)
            if offset is not None:
                return offset
        return None

    def _first_content_difference(self) -> int | None:
        a, b = self._a, self._b
        with translated_errors([*a.paths, *b.paths]):
            job = Job(
                sources=[*native_sources(a.sources), *native_sources(b.sources)],
                threads=self._threads,
                variants=chosen_variants(None),
            )
            try:
                for start, end, rows_a, rows_b in self._pairs(Image.data_extents):
                    shifted = rows_b.copy()
                    stored = shifted["kind"] >= Kind.DATA
                    shifted["file"][stored] += np.uint32(len(a.sources))
                    job.start(start, end, np.ascontiguousarray(rows_a), shifted)
                    job.wait(lambda: self._report(job.progress()[0]))
                    if job.first_difference is not None:
                        break
                self._report(self._total)
                return job.first_difference
            finally:
                job.close()

    def _report(self, done: int) -> None:
        if self._progress is not None:
            self._progress(Progress(done, self._total, 0, 0, 0))


def first_kind_difference(a: Extents, b: Extents) -> int | None:
    """Return the first offset at which only one side stores data, or None."""
    starts = np.union1d(a["guest_offset"], b["guest_offset"])
    stored = [
        rows["kind"][np.searchsorted(rows["guest_offset"], starts, side="right") - 1] >= Kind.DATA
        for rows in (a, b)
    ]
    different = np.flatnonzero(stored[0] != stored[1])
    return int(starts[different[0]]) if len(different) else None
