"""Writing to an open image in place: moves the bytes, and asks the format where to.

A write takes these steps: hold the range; let the format place it; store the bytes; let
the tables refer to them.  Nobody reads what is stored before the tables refer to it,
and nothing is durable before `flush`.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, NamedTuple, cast

from imgcore.disk.range_locks import RangeLocks
from imgcore.limits import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from imgcore.disk.disk_state import DiskState
    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.api import Place, Updater

# Changes of tables are written without being asked for when they take more memory.
MAX_WAITING_NBYTES: Final = 16 * MIB
# Zeros that have to be written are placed in pieces.
_ZEROS_NBYTES: Final = 64 * MIB


class _Content(NamedTuple):
    """What a range of the disk gets; ``octets`` is None for zeros."""

    start: int
    end: int
    octets: memoryview | None

    def part(self, start: int, end: int) -> bytes | memoryview:
        if self.octets is None:
            return bytes(end - start)
        return self.octets[start - self.start : end - self.start]


class WriteAccess:
    """Changes an image in place.

    Parameters
    ----------
    state : DiskState
        Its files stay open while this object is used.
    updater : Updater
    read : callable
        Returns bytes of the disk as it is: ``read(offset, length)``.
    forget : callable
        Called after each change of the tables.
    is_unread : callable
        Tells whether no read is in progress.
    """

    def __init__(
        self,
        state: DiskState,
        updater: Updater,
        *,
        read: Callable[[int, int], bytes],
        forget: Callable[[], None],
        is_unread: Callable[[], bool],
    ) -> None:
        self._state = state
        self._updater = updater
        self._read = read
        self._forget = forget
        self._is_unread = is_unread
        self._ranges = RangeLocks()
        # Of the updater.  Reentrant: a signal handler may use the image.
        self._tables = threading.RLock()
        self._has_begun = False

    def write(self, start: int, octets: memoryview) -> None:
        """Write bytes to a range of the disk."""
        if len(octets):
            self._change(_Content(start, start + len(octets), octets))

    def zero(self, start: int, length: int, *, unmap: bool) -> None:
        """Make a range of the disk read as zeros."""
        if not length:
            return
        end = start + length
        with self._ranges.held(*self._granules(start, end)), self._tables:
            self._begin()
            rest = self._updater.zero(start, length, unmap=unmap)
            self._forget()
        for first, nbytes in rest:
            for at in range(first, first + nbytes, _ZEROS_NBYTES):
                stop = min(at + _ZEROS_NBYTES, first + nbytes)
                self._change(_Content(at, stop, None))
        self._relieve()

    def discard(self, start: int, length: int) -> None:
        """Let the image free what it has of a range, which is not needed any more."""
        with self._ranges.held(*self._granules(start, start + length)), self._tables:
            self._begin()
            self._updater.discard(start, length)
            self._forget()
        self._relieve()

    def flush(self) -> None:
        """Make durable what was written before."""
        with self._ranges.all_held(), self._tables:
            if self._has_begun:
                self._updater.flush(is_unread=self._is_unread())

    def restructure(self, change: Callable[[Updater], None]) -> None:
        """Change more than content, such as the size; the image is opened anew then."""
        with self._ranges.all_held(), self._tables:
            self._begin()
            change(self._updater)
            self._updater.flush(is_unread=False)

    def finish(self) -> None:
        """Flush, and leave the image as one that nobody writes to."""
        with self._ranges.all_held(), self._tables:
            if self._has_begun:
                self._updater.flush(is_unread=False)
                self._updater.finish()
                self._updater.flush(is_unread=False)
                self._has_begun = False

    # -- one change --------------------------------------------------------------------

    def _begin(self) -> None:
        if not self._has_begun:
            self._updater.begin()
            self._updater.flush(is_unread=False)
            self._has_begun = True
            # From now on, no hole of a file is taken for zeros of the disk.
            self._forget()

    def _granules(self, start: int, end: int) -> tuple[int, int]:
        """Return the range widened to whole granules, as far as the disk goes."""
        nbytes = self._updater.granule_nbytes
        return start - start % nbytes, min(end + -end % nbytes, self._state.virtual_size)

    def _change(self, content: _Content) -> None:
        first, last = self._granules(content.start, content.end)
        with self._ranges.held(first, last):
            with self._tables:
                self._begin()
                places = self._updater.place(first, last - first)
            new = [place for place in places if place.is_new]
            try:
                for place in places:
                    self._store(place, content)
            except BaseException:
                with self._tables:
                    self._updater.give_up(new)
                raise
            if new:
                with self._tables:
                    self._updater.refer(new)
                    self._forget()
        self._relieve()

    def _store(self, place: Place, content: _Content) -> None:
        """Store in a place what the content has of it, and old bytes around that."""
        end = place.guest_offset + place.length
        start, stop = max(place.guest_offset, content.start), min(end, content.end)
        shift = place.host_offset - place.guest_offset
        file = self._file(place)
        if place.needs_all and place.guest_offset < start:
            old = self._read(place.guest_offset, start - place.guest_offset)
            file.pwrite(place.host_offset, old)
        if start < stop:
            if content.octets is None:
                file.zero(start + shift, stop - start)
            else:
                file.pwrite(start + shift, content.part(start, stop))
        if place.needs_all and stop < end:
            file.pwrite(stop + shift, self._read(stop, end - stop))

    def _file(self, place: Place) -> UpdateFile:
        return cast("UpdateFile", self._state.sources[place.file].file)

    def _relieve(self) -> None:
        """Write changes of tables that take too much memory."""
        if sum(file.waiting_nbytes for file in self._files()) > MAX_WAITING_NBYTES:
            self.flush()

    def _files(self) -> Sequence[UpdateFile]:
        from imgcore.files.update_file import UpdateFile

        own = self._state.layers[0].sources
        return [source.file for source in own if isinstance(source.file, UpdateFile)]
