"""Writing to an open image in place: moves the bytes, and asks the format where to.

A write takes these steps: hold the range; let the format place it; store the bytes; let
the tables refer to them.  Nobody reads what is stored before the tables refer to it,
and nothing is durable before `flush`.
"""

from __future__ import annotations

import threading
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, SupportsIndex, cast

from imgcore.border import range_of_disk
from imgcore.disk.in_place_writes import InPlaceWrites
from imgcore.disk.pieces import Group, Piece, batches, grouped, parts_of
from imgcore.disk.range_locks import RangeLocks
from imgcore.engine.job import thread_count
from imgcore.engine.thread_budget import Lease
from imgcore.errors import ImgcoreError
from imgcore.files.descriptors import is_of_system
from imgcore.files.update_file import UpdateFile
from imgcore.formats.api import MakesWay, Overwritable, Rebasable
from imgcore.limits import MIB
from imgcore.streams.helpers import Helpers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from imgcore._core import Uses
    from imgcore.disk.disk_state import DiskState
    from imgcore.formats.api import Place, Updater

# Changes of tables are written without being asked for when they take more memory.
MAX_WAITING_NBYTES: Final = 16 * MIB
# Of 0.1 s each.
_MAX_WAITS: Final = 100
# Threads write so much each, or more.
_MIN_PARALLEL_NBYTES: Final = 4 * MIB
# A place that also needs old bytes of the disk is stored in parts.
_PART_NBYTES: Final = 4 * MIB


class Access(NamedTuple):
    """The state of an image, and what changes its tables."""

    state: DiskState
    updater: Updater


class WriteAccess:
    """Changes an image in place.

    Parameters
    ----------
    access : Access
        The files stay open while this object is used.
    read_into : callable
        Fills a buffer with bytes of the disk as it is: ``read_into(offset, buffer)``.
    forget : callable
        Called after each change of the tables of a range: ``forget(start, end)``.
    is_unread : callable
        Tells whether all reads have ended that began before ``forget`` was called last.
    is_current : callable
        Tells whether a state is that of the image.
    reads : Uses
        The image's reads.

    Attributes
    ----------
    in_place : InPlaceWrites or None
        Overwrites what it can, which is no change of tables and needs no lock.
    """

    in_place: InPlaceWrites | None = None

    def __init__(
        self,
        access: Access,
        *,
        read_into: Callable[[int, memoryview], object],
        forget: Callable[[int, int], None],
        is_unread: Callable[[], bool],
        is_current: Callable[[DiskState], bool],
        reads: Uses,
    ) -> None:
        self._read_into = read_into
        self._forget = forget
        self._is_unread = is_unread
        self._is_current = is_current
        self._reads = reads
        self._ranges = RangeLocks()
        # Of the updater.
        self._tables = threading.Lock()
        # Whether space may be left that was freed before it was opened anew: reads in
        # progress might have used it.
        self._is_untidy = False
        self._has_ever_begun = False
        self._renew(access)

    def _renew(self, access: Access) -> None:
        own = [source.file for source in access.state.layers[0].sources]
        waiting = [file for file in own if isinstance(file, UpdateFile)]
        self._state, self._updater = access
        # By their indexes in ``sources``: the image's own come first.
        self._files = cast("list[UpdateFile]", own)
        self._waiting = waiting
        self._has_begun = False
        self.in_place = None
        # Whether tables may be known that have changed since.
        self._is_stale = False

    @property
    def updater(self) -> Updater:
        """What changes the tables."""
        return self._updater

    # -- changes -----------------------------------------------------------------------

    def begin(self) -> None:
        """Make durable that the image is being changed."""

        def work() -> None:
            with self._tables:
                self._begin()

        self._ranges.holding_all(work)

    def overwrite(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Write bytes where they are, and return what `write` is needed for."""
        in_place = self.in_place
        if in_place is None:
            return pieces
        rest: list[Piece] = []
        for piece in pieces:
            try:
                if in_place.overwrite(piece.start, piece.octets) is None:
                    rest.append(piece)
            except OSError:
                with _stating_offset(piece.start):
                    raise
        return rest

    def write_in_parallel(self, pieces: Sequence[Piece], threads: SupportsIndex | None) -> None:
        """Write as `write` does, on several threads if that is faster.

        It is for several files and for devices: one thread at a time writes to a file.
        """
        n = sum(piece.nbytes for piece in pieces) // _MIN_PARALLEL_NBYTES
        if n > 1 and (len(self._waiting) > 1 or self._waiting[0].is_block_device):
            n = min(n, thread_count(threads))
        else:
            n = 1
        if n == 1:
            self.write(pieces)
            return
        # An exception waits for all threads; that of the lowest range is raised.
        with Lease(n) as lease, closing(_helpers(lease)) as pool:
            for future in [pool.submit(self.write, part) for part in parts_of(pieces, n)]:
                future.result()

    def write(self, pieces: Sequence[Piece]) -> None:
        """Write bytes to ranges of the disk, which ascend and do not overlap."""
        for batch in batches(pieces, self._updater.granule_nbytes):
            with _stating_offset(batch[0].start):
                self._holding(batch[0].start, batch[-1].end, partial(self._write, batch))
        self._relieve()

    def zero(self, start: int, length: int, *, unmap: bool) -> None:
        """Make a range of the disk read as zeros."""
        if length:
            work = partial(self._zero, start, length, unmap=unmap)
            self._holding(start, start + length, work)
            self._relieve()

    def _zero(self, start: int, length: int, *, unmap: bool) -> None:
        with self._tables:
            self._begin()
            with self._changed_tables(start, start + length):
                rest = self._updater.zero(start, length, unmap=unmap)
        pieces = [Piece(first, first + nbytes, None) for first, nbytes in rest]
        for batch in batches(pieces, self._updater.granule_nbytes):
            with _stating_offset(batch[0].start):
                self._write(batch)

    def discard(self, start: int, length: int) -> None:
        """Let the image free what it has of a range, which is not needed any more."""
        self._free(start, length, lambda updater: updater.discard(start, length))

    def drop(self, start: int, length: int) -> None:
        """Let the image free what it has of a range, which its parent has then."""

        def free(updater: Updater) -> None:
            assert isinstance(updater, Rebasable)
            updater.drop(start, length)

        self._free(start, length, free)

    def _free(self, start: int, length: int, free: Callable[[Updater], None]) -> None:
        def work() -> None:
            with self._tables:
                self._begin()
                with self._changed_tables(start, start + length):
                    free(self._updater)

        if length:
            self._holding(start, start + length, work)
            self._relieve()

    def flush(self) -> None:
        """Make durable what was written before."""

        def work() -> None:
            if self._has_begun:
                with self._tables:
                    self._flush()

        self._ranges.holding_all(work)

    # -- the image as a whole ----------------------------------------------------------

    def restructure(self, change: Callable[[Updater], None], reopen: Callable[[], Access]) -> None:
        """Change more than content; then open the image anew.

        It is also opened anew if the change fails in the middle.
        """
        self._ranges.holding_all(lambda: self._restructure(change, reopen))

    def resize(self, virtual_size: int, reopen: Callable[[], Access]) -> None:
        """Change the size of the disk; then open the image anew."""

        def work() -> None:
            self._stop_overwriting()
            if virtual_size > self._state.virtual_size:
                self._write_end()
            self._restructure(change, reopen)

        def change(updater: Updater) -> None:
            if isinstance(updater, MakesWay) and updater.make_way(virtual_size):
                self._forget_all()
                self._await_reads()
            updater.resize(virtual_size)

        self._ranges.holding_all(work)

    def _restructure(self, change: Callable[[Updater], None], reopen: Callable[[], Access]) -> None:
        with self._tables:
            self._begin()
        self._stop_overwriting()
        try:
            with self._tables:
                change(self._updater)
        except BaseException:
            # What fails once more fails for the same reason, and tells less of it.
            with suppress(Exception):
                self._reopen(reopen)
            raise
        self._reopen(reopen)

    def _write_end(self) -> None:
        """Write the granule again that the disk ends in, which may be compressed."""
        end = self._state.virtual_size
        start = end - end % self._updater.granule_nbytes
        if start == end:
            return
        content = bytearray(end - start)
        self._read_old(start, memoryview(content))
        if any(content):
            self._write([Piece(start, end, memoryview(content))])
        else:
            self._zero(start, end - start, unmap=True)

    def refresh(self, reopen: Callable[[], Access]) -> None:
        """Open the image anew, between changes."""
        self._ranges.holding_all(lambda: self._reopen(reopen))

    def _stop_overwriting(self) -> None:
        """Let no thread write any more that does not hold its range."""
        if self.in_place is not None:
            self.in_place.stop_writing()

    def _reopen(self, reopen: Callable[[], Access]) -> None:
        self._stop_overwriting()
        with self._tables:
            if self._has_begun:
                # Reads may begin at any time: nothing is moved or used again.
                self._updater.flush(is_unread=False)
                self._finish()
                self._forget_all()
                self._is_untidy = True
            is_untidy, self._is_untidy = self._is_untidy, False
            self._renew(reopen())
            self._is_untidy = is_untidy

    def finish(self) -> None:
        """Flush, and leave the image as one that nobody writes to.

        Nobody reads it any more.
        """

        def work() -> None:
            self._stop_overwriting()
            with self._tables:
                if self._is_untidy and not self._has_begun:
                    self._begin_changes()
                if self._has_begun:
                    self._updater.flush(is_unread=True)
                    self._finish()

        self._ranges.holding_all(work)

    def _finish(self) -> None:
        self._updater.finish()
        self._updater.flush(is_unread=False)
        self._has_begun = False

    def _flush(self) -> None:
        if self._is_stale:
            self._forget_all()
        self._updater.flush(is_unread=self._is_unread())

    def _relieve(self) -> None:
        """Write changes of tables that take too much memory."""
        for file in self._waiting:
            if file.waiting_nbytes > MAX_WAITING_NBYTES:
                self.flush()
                return

    # -- one change --------------------------------------------------------------------

    def _holding(self, start: int, end: int, work: Callable[[], None]) -> None:
        """Do the work while the granules of a range are held."""

        def inside() -> None:
            # The disk may have become smaller meanwhile.
            state = self._state
            range_of_disk(state.path, state.virtual_size, start, end - start, "offset")
            work()

        self._ranges.holding(*self._granules(start, end), inside)

    def _read_old(self, start: int, view: memoryview) -> None:
        """Read bytes of the disk that stay; raise if they may be the parent's.

        The image alone reads them as zeros, which would hide the parent's for good.
        """
        state = self._state
        if len(state.layers) == 1 and state.layers[0].backing is not None:
            raise ImgcoreError(
                f"was opened without its parent, and needs its bytes at {start} beside what is "
                "written",
                path=state.path,
            )
        self._read_into(start, view)

    def _begin(self) -> None:
        if self._has_begun:
            return
        if not self._is_current(self._state):
            raise ImgcoreError(
                "an exception has interrupted its refresh, which has to be repeated",
                path=self._state.path,
            )
        self._await_reads()
        self._begin_changes()
        # From now on, no hole of a file is taken for zeros of the disk.
        self._forget_all()
        if isinstance(self._updater, Overwritable):
            self.in_place = InPlaceWrites(
                self._state, self._updater, uses=self._reads, lock=self._tables
            )

    def _await_reads(self) -> None:
        """Wait for reads from before the last change of the image as a whole.

        What was freed since they began is free space now.
        """
        for _ in range(_MAX_WAITS):
            if self._reads.soon_over():
                return
        raise ImgcoreError(
            "a read that began before the image was changed as a whole does not end",
            path=self._state.path,
        )

    def _begin_changes(self) -> None:
        self._updater.begin(again=self._has_ever_begun)
        if self._has_ever_begun and not self._is_unread():
            # Some of them have known the image since before it was opened anew.
            self._updater.withhold()
        self._updater.flush(is_unread=False)
        self._has_begun = self._has_ever_begun = True

    @contextmanager
    def _changed_tables(self, start: int, end: int) -> Iterator[None]:
        """Forget the tables of a range, which a ``with`` block changes.

        Those of what may be overwritten are forgotten before: none is made meanwhile,
        as that needs the lock of the tables, too.
        """
        first, last = self._granules(start, end)
        was_stale, self._is_stale = self._is_stale, True
        if self.in_place is not None:
            self.in_place.forget(first, last)
        try:
            yield
        finally:
            self._forget(first, last)
            self._is_stale = was_stale

    def _forget_all(self) -> None:
        self._forget(0, self._state.virtual_size)
        self._is_stale = False

    def _granules(self, start: int, end: int) -> tuple[int, int]:
        """Return a range widened to whole granules, as far as the disk goes."""
        nbytes = self._updater.granule_nbytes
        return start - start % nbytes, min(end + -end % nbytes, self._state.virtual_size)

    def _write(self, pieces: Sequence[Piece]) -> None:
        """Write pieces of the disk, which are held."""
        disk_nbytes = self._state.virtual_size
        placed: list[tuple[Group, list[Place]]] = []
        try:
            with self._tables:
                self._begin()
                for group in grouped(pieces, self._updater.granule_nbytes, disk_nbytes):
                    placed.append((group, self._updater.place(group.start, group.nbytes)))
            for store in _in_order(placed):
                self._store(*store)
        except BaseException:
            with self._tables:
                self._updater.give_up(_new_places(placed))
            raise
        new = _new_places(placed)
        if new:
            with self._tables, self._changed_tables(pieces[0].start, pieces[-1].end):
                self._updater.refer(new)
        elif self.in_place is not None:
            self.in_place.note(pieces[0].start)

    def _store(self, group: Group, place: Place) -> None:
        """Store the pieces of a place, and old bytes around them if it needs all."""
        file, shift = self._files[place.file], place.host_offset - place.guest_offset
        start, end = place.guest_offset, place.guest_offset + place.length
        if place.needs_all:
            for at in range(start, end, _PART_NBYTES):
                content = bytearray(min(_PART_NBYTES, end - at))
                group.complete(at, content, self._read_old)
                file.pwrite(at + shift, content)
            return
        for piece in group.between(start, end):
            if piece.octets is not None:
                file.pwrite(piece.start + shift, piece.octets)
            elif piece.origin is not None:
                file.copy(*piece.origin, piece.start + shift, piece.nbytes)
            else:
                file.zero(piece.start + shift, piece.nbytes)


def _new_places(placed: Sequence[tuple[Group, list[Place]]]) -> list[Place]:
    return [place for _, places in placed for place in places if place.is_new]


def _in_order(placed: Sequence[tuple[Group, list[Place]]]) -> list[tuple[Group, Place]]:
    """Return places in the order of their files; those that go on are joined."""
    stores: list[tuple[Group, Place]] = []
    for group, places in placed:
        run: Place | None = None
        for place in places:
            needs_all = place.needs_all and not group.covers(place.guest_offset, place.length)
            if run is not None and not needs_all and _goes_on(run, place):
                run = run._replace(length=run.length + place.length)
                continue
            if run is not None:
                stores.append((group, run))
            run = place._replace(needs_all=needs_all)
        if run is not None:
            stores.append((group, run))
    if len(stores) > 1:
        stores.sort(key=lambda store: (store[1].file, store[1].host_offset))
    return stores


def _goes_on(run: Place, place: Place) -> bool:
    return (
        not run.needs_all
        and place.file == run.file
        and place.host_offset == run.host_offset + run.length
    )


@contextmanager
def _stating_offset(offset: int) -> Iterator[None]:
    """Say in errors of the system how far the disk is written."""
    try:
        yield
    except OSError as error:
        if not is_of_system(error):
            raise
        text = f"{error.strerror} (the disk is written up to its offset {offset})"
        raise OSError(error.errno, text, error.filename) from error


def _helpers(lease: Lease) -> Helpers:
    # One alone would only take the place of the calling thread.
    return Helpers(lease.n_threads if lease.n_threads > 1 else 0, "imgcore-write")
