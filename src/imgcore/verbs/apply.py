"""The verb ``apply``: writes changes from elsewhere into an existing image."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple, SupportsIndex

from imgcore.border import FilePath, byte_count, integer, octets_of, range_of_disk
from imgcore.disk.image import Image
from imgcore.disk.open_options import OpenOptions
from imgcore.disk.opened import opened_for_update
from imgcore.disk.pieces import Piece, without_overlaps
from imgcore.engine.control import Control, Run
from imgcore.engine.job import thread_count
from imgcore.engine.progress import Progress
from imgcore.errors import ImgcoreError, OptionError
from imgcore.limits import MIB
from imgcore.sizes import parse_size

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# So much is collected, put in order, and written at once.
_BATCH_NBYTES: Final = 16 * MIB
_BATCH_CHANGES: Final = 4096
_REPORT_SECONDS: Final = 0.05


class ApplyResult(NamedTuple):
    """The result of `imgcore.apply`.

    Attributes
    ----------
    target : str
        The image's name.
    target_format : str
        Its format.
    virtual_size : int
        Bytes of its disk.
    changes : int
        Number of changes.
    bytes_written, bytes_zeroed : int
        Bytes of the changes that were data, and of those that were zeros.
    seconds : float
        Duration.
    """

    target: str
    target_format: str
    virtual_size: int
    changes: int
    bytes_written: int
    bytes_zeroed: int
    seconds: float


def apply(
    target: FilePath | int | Image,
    changes: Iterable[
        tuple[SupportsIndex, ReadableBuffer]
        | tuple[SupportsIndex, ReadableBuffer | None, SupportsIndex]
    ],
    *,
    flush_every: SupportsIndex | str | None = None,
    threads: SupportsIndex | None = None,
    progress: Callable[[Progress], None] | None = None,
    rate: SupportsIndex | str | None = None,
    control: Control | None = None,
    format: str | None = None,
    backing_format: str | None = None,
    parent: FilePath | Sequence[FilePath] | None = None,
    read_options: Mapping[str, Any] | Sequence[str] | None = None,
    allow: Sequence[FilePath] = (),
    files: Mapping[str, int] | None = None,
) -> ApplyResult:
    """Write changes of a disk into an existing image, in place.

    ``format``, ``backing_format``, ``parent``, ``read_options``, ``allow`` and
    ``files`` are the keywords of `imgcore.open`.

    Parameters
    ----------
    target : str, bytes, os.PathLike, int or Image
        The image, a descriptor of it, or an image that is open with the mode "r+",
        which stays open and takes no keywords for opening.
    changes : iterable of tuple
        What is written, in any order and at any alignment: ``(offset, data)``, with
        bytes or another contiguous buffer; or ``(offset, None, length)``, for zeros,
        whose space may be given back.  Where they overlap, later ones win.
    flush_every : int or str, optional
        Make what is written durable whenever so many bytes have changed, for example
        ``"256M"``.  In any case all is durable when the call returns.
    threads : int, optional
        Most threads that write at once; one per CPU by default.
    progress : callable, optional
        Called with a `Progress` on the calling thread, at most every 50 ms and once at
        the end.  How much is to come is not known: ``total`` is what is done.
    rate : int or str, optional
        The most bytes of data to write in a second, for example ``"100M"``.
    control : Control, optional
        Steers the run from other threads, and has its rate, in place of ``rate``.

    Returns
    -------
    ApplyResult

    Raises
    ------
    ValueError
        A change is not inside the disk.
    OptionError
        The arguments contradict each other.
    TargetError
        Another process uses the target.
    ImgcoreError, OSError
        The target cannot be opened or written.
    Exception
        What ``changes`` or ``progress`` raises.

    Notes
    -----
    An exception leaves a sound image.  The changes that ``changes`` has yielded before
    it raised are written and durable; so are those before one that is not valid.  A
    note of the exception (``__notes__``) says how many changes are written; after an
    error of the system more of the next ones may be.
    """
    run = Run.of(rate, control, progress)
    every = None if flush_every is None else _flush_every(flush_every)
    n_threads = thread_count(threads)
    options = OpenOptions.from_keywords(
        format=format,
        backing_format=backing_format,
        parent=parent,
        read_options=read_options,
        allow=allow,
        files=files,
    )
    started = time.monotonic()
    with run, opened_for_update(target, options) as image:
        job = _Apply(image, every, n_threads, run)
        job.run(changes)
        return ApplyResult(
            target=image.path,
            target_format=image.format,
            virtual_size=image.virtual_size,
            changes=job.n_done,
            bytes_written=job.written,
            bytes_zeroed=job.zeroed,
            seconds=time.monotonic() - started,
        )


def _flush_every(value: SupportsIndex | str) -> int:
    nbytes = parse_size(value) if isinstance(value, str) else byte_count(value, "flush_every")
    if not nbytes:
        raise OptionError("flush_every is 0: a positive number of bytes is needed")
    return nbytes


class _Apply:
    """One run; ``n_done``, ``written`` and ``zeroed`` say how far it is."""

    def __init__(
        self,
        image: Image,
        flush_every: int | None,
        threads: int,
        run: Run,
    ) -> None:
        self._image = image
        self._flush_every = flush_every
        self._threads = threads
        self._run = run
        self._next_report = -float("inf")
        self._unflushed = 0
        self._batch: list[Piece] = []
        self._batch_nbytes = 0
        self.n_done: int = 0
        self.written: int = 0
        self.zeroed: int = 0

    def run(self, changes: Iterable[Sequence[Any]]) -> None:
        with self._saying_how_far():
            try:
                for change in changes:
                    self._take(_piece_of(self._image, change))
            except BaseException:
                self._write_batch()
                raise
            self._write_batch()
            self._run.phase = "syncing"
            self._image.flush()
            self._run.keep()
            self._report(is_last=True)

    @contextmanager
    def _saying_how_far(self) -> Iterator[None]:
        """Flush before an exception, which gets a note that says what is written."""
        try:
            yield
        except BaseException as error:
            state = "not durable"
            with suppress(OSError, ImgcoreError):
                self._image.flush()
                state = "durable"
            error.add_note(f"{self._image.path}: {self.n_done} changes are written and {state}")
            raise

    def _take(self, piece: Piece) -> None:
        """Put a change into the batch, which is written when it is full."""
        nbytes = piece.nbytes
        if self._batch_nbytes + nbytes > _BATCH_NBYTES or len(self._batch) == _BATCH_CHANGES:
            self._write_batch()
        self._batch.append(piece)
        self._batch_nbytes += nbytes
        if self._batch_nbytes >= _BATCH_NBYTES:
            # A long change, which was not copied.
            self._write_batch()

    def _write_batch(self) -> None:
        batch, self._batch, self._batch_nbytes = self._batch, [], 0
        pieces = without_overlaps(batch)
        data = [(piece.start, piece.octets) for piece in pieces if piece.octets is not None]
        limit = self._run.limit
        while limit is not None and not limit.take(sum(len(octets) for _, octets in data)):
            self._report()
        self._image.writev(data, threads=self._threads)
        for start, end in _zeros(pieces):
            self._image.zero(start, end - start)
        self._count(batch)

    def _count(self, batch: Sequence[Piece]) -> None:
        zeroed = sum(piece.nbytes for piece in batch if piece.octets is None)
        nbytes = sum(piece.nbytes for piece in batch)
        self.n_done += len(batch)
        self.written += nbytes - zeroed
        self.zeroed += zeroed
        self._unflushed += nbytes
        if self._flush_every is not None and self._unflushed >= self._flush_every:
            self._unflushed = 0
            self._image.flush()
        self._report()

    def _report(self, *, is_last: bool = False) -> None:
        now = time.monotonic()
        if now < self._next_report and not is_last:
            return
        self._next_report = now + _REPORT_SECONDS
        done = self.written + self.zeroed
        self._run.report(Progress(done, done, self.written, self.zeroed, self.written))


def _piece_of(image: Image, change: Sequence[Any]) -> Piece:
    """Return a change as a piece that does not depend on the caller's buffer."""
    if not isinstance(change, Sequence) or len(change) not in (2, 3):
        raise TypeError(
            f"a change is (offset, data), or (offset, None, length) for zeros, not {change!r:.99}"
        )
    offset, data = change[0], change[1]
    octets = None if data is None else octets_of(data)
    if len(change) == 3:
        length = integer(change[2], "length")
    elif octets is None:
        raise TypeError(f"zeros need a length, as in (offset, None, length), not {change!r:.99}")
    else:
        length = len(octets)
    if octets is not None and len(octets) != length:
        raise ValueError(f"{image.path}: length is {length}, but the data has {len(octets)} bytes")
    start, nbytes = range_of_disk(image.path, image.virtual_size, offset, length, "offset")
    if octets is not None and not octets.readonly and nbytes <= _BATCH_NBYTES:
        octets = memoryview(bytes(octets))
    return Piece(start, start + nbytes, octets)


def _zeros(pieces: Iterable[Piece]) -> Iterator[tuple[int, int]]:
    """Yield the ranges (start, end) of zeros; neighbours are one."""
    start = end = 0
    for piece in pieces:
        if piece.octets is not None:
            continue
        if piece.start != end:
            if start < end:
                yield start, end
            start = piece.start
        end = piece.end
    if start < end:
        yield start, end
