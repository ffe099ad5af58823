"""The verb ``compare``: tells whether two images hold the same virtual disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import numpy as np

from imgcore._core import Job
from imgcore.border import FilePath, file_name
from imgcore.checksums.differences import tree_differences
from imgcore.checksums.tree import TreeFile, is_tree
from imgcore.disk.digests import DigestedDisk
from imgcore.disk.image import Image, open_image
from imgcore.disk.image_names import local_image
from imgcore.disk.open_options import Flags, OpenOptions
from imgcore.disk.overlay import padded
from imgcore.disk.source import open_source
from imgcore.engine.batches import pair_up
from imgcore.engine.control import Run
from imgcore.engine.extents import Kind
from imgcore.engine.job import chosen_variants, thread_count, translated_errors
from imgcore.engine.progress import Tally
from imgcore.engine.source_file import native_sources
from imgcore.engine.thread_budget import Lease
from imgcore.errors import OptionError
from imgcore.files.host_file import HostFile

if TYPE_CHECKING:
    from imgcore.areas.area import Area
    from imgcore.engine.control import Control
    from imgcore.engine.extents import Extents
    from imgcore.engine.progress import Progress


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
    control: Control | None = None,
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
    control : Control, optional
        Steers the comparison from other threads.  Its rate is about each disk's data.

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
    n_threads, run = thread_count(threads), Run(control, progress)
    with run, open_image(a, options_a) as image_a, open_image(b, options_b) as image_b:
        return _Comparison(image_a, image_b, n_threads, run).result(strict)


def compare_trees(
    a: FilePath,
    b: FilePath,
    *,
    format: str | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    threads: SupportsIndex | None = None,
    allow: Sequence[FilePath] = (),
    share: bool = False,
    progress: Callable[[Progress], None] | None = None,
    control: Control | None = None,
) -> Iterator[Area]:
    """Yield the areas in which two states of a disk differ, by their checksum trees.

    ``format``, ``backing_format``, ``parent``, ``read_options``, ``allow`` and
    ``share`` are the keywords of `imgcore.open` for the image.

    Parameters
    ----------
    a, b : str, bytes or os.PathLike
        Two trees, which `imgcore.checksum` has written, the older one first; or a tree
        and an image, in any order.
    threads : int, optional
        Number of worker threads that read the image; one per CPU by default.
    progress : callable, optional
        Called with a `Progress` on the calling thread, at most every 50 ms while an
        image is read, and once at the end.
    control : Control, optional
        Steers the comparison from other threads.

    Yields
    ------
    Area
        Ascending and joined.  They consist of whole blocks of 64 KiB, but for the
        disk's end.  ``is_zero``: the image, or the newer tree, has zeros there.

    Raises
    ------
    OptionError
        None of the two is a tree; or sizes of the disks or algorithms differ.
    ImgcoreError, OSError
        A tree is damaged, or a file cannot be read; raised when the first area is
        requested.
    """
    opening = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        share=share,
    )
    run = Run(control, progress)
    return _tree_areas(file_name(a), file_name(b), opening, thread_count(threads), run)


def _tree_areas(
    a: str,
    b: str,
    opening: OpenOptions,
    threads: int,
    run: Run,
) -> Iterator[Area]:
    with run, ExitStack() as stack:
        old, new = (_opened_tree(path, opening, stack) for path in (a, b))
        if old is not None and new is not None:
            old.refuse_other(b, new.digest.algorithm, new.virtual_size)
            yield from tree_differences(old, new)
            tally = Tally(new.virtual_size, run.report)
        else:
            tree, path = (new, a) if old is None else (old, b)
            if tree is None:
                raise OptionError(f"neither it nor {b} is a checksum tree", path=a)
            disk = DigestedDisk.of_source(stack.enter_context(open_source(path, opening)))
            tally = Tally(disk.nbytes, run.report_done)
            yield from disk.changed_since(
                tree,
                threads=threads,
                limit=run.limit,
                report=lambda done, _: tally.position(done),
            )
            disk.check_unchanged()
        tally.finish()


def _opened_tree(path: str, opening: OpenOptions, stack: ExitStack) -> TreeFile | None:
    """Open a checksum tree, which ``stack`` closes; None if it is another file."""
    file = HostFile.open(local_image(path, opening)[0], share=opening.share)
    if not is_tree(file):
        file.close()
        return None
    return stack.enter_context(TreeFile(file))


class _Comparison:
    def __init__(self, a: Image, b: Image, threads: int, run: Run) -> None:
        self._a, self._b = a, b
        self._threads = threads
        self._limit = run.limit
        self._total = max(a.virtual_size, b.virtual_size)
        self._tally = Tally(self._total, run.report_done)

    def result(self, strict: bool) -> CompareResult:
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
            self._tally.position(0)
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
                batch_threads=Lease(self._threads).renew,
                variants=chosen_variants(None),
                rate_limit=self._limit,
            )
            try:
                for start, end, rows_a, rows_b in self._pairs(Image.data_extents):
                    shifted = rows_b.copy()
                    stored = shifted["kind"] >= Kind.DATA
                    shifted["file"][stored] += np.uint32(len(a.sources))
                    job.start(start, end, np.ascontiguousarray(rows_a), shifted)
                    job.wait(lambda: self._tally.position(job.progress()[0]))
                    if job.first_difference is not None:
                        break
                self._tally.finish()
                return job.first_difference
            finally:
                job.close()


def first_kind_difference(a: Extents, b: Extents) -> int | None:
    """Return the first offset at which only one side stores data, or None."""
    starts = np.union1d(a["guest_offset"], b["guest_offset"])
    stored = [
        rows["kind"][np.searchsorted(rows["guest_offset"], starts, side="right") - 1] >= Kind.DATA
        for rows in (a, b)
    ]
    different = np.flatnonzero(stored[0] != stored[1])
    return int(starts[different[0]]) if len(different) else None
