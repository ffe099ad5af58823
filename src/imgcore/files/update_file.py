"""A file that is written in place; changes of its tables wait until they are flushed.

Guest data goes to the file at once, to places that no table refers to yet or that hold
the same bytes of the disk.  Changes of tables wait in memory, and are read as if they
were in the file.  They belong to steps: all changes of a step are durable before the
first one of the next step is written.  So no table refers to what a crash may lose.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet

from imgcore.errors import ImgcoreError, TargetError
from imgcore.files.descriptors import (
    close,
    duplicate,
    forks_held_back,
    give_up_in_children,
    is_of_system,
    named_errors,
    open_file,
)
from imgcore.files.given import given_name, open_given
from imgcore.files.host_file import HostFile
from imgcore.files.identity import refuse_type
from imgcore.files.locks import ImageLock
from imgcore.files.retry import WRITE_ERRORS, retrying
from imgcore.files.space import punch, zero_in_place
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from imgcore.files.identity import Identity

UPDATE_FLAGS: Final = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
# Zeros are written in pieces where the system has no call for them.
_ZEROS_NBYTES: Final = 1 << 20
# Bytes that are copied at once: by the system, and through memory.
_COPY_NBYTES: Final = 16 << 20
_BUFFER_NBYTES: Final = 1 << 20

_WRITE_BITS: Final = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


def open_writable(path: str, mode: int) -> int:
    """Open a file, whose ``st_mode`` is given, to write to it in place.

    OSError if the system cannot open it, or a block device is in use or mounted;
    TargetError if it is immutable.
    """
    try:
        # O_EXCL: the kernel refuses to open a block device that is mounted.
        return open_file(path, UPDATE_FLAGS | (os.O_EXCL if stat.S_ISBLK(mode) else 0))
    except OSError as error:
        if error.errno == errno.EBUSY:
            text = "The block device is in use or mounted"
            raise OSError(errno.EBUSY, text, path) from error
        if error.errno == errno.EPERM:
            text = f"is immutable or append-only; chattr -i -a {path} permits writing to it"
            raise TargetError(text, path=path) from None
        raise


class Step(IntEnum):
    """When a changed table becomes durable; a format uses those that it needs.

    Attributes
    ----------
    NEW
        Tables that nothing refers to yet, and counts that grow: durable together with
        the guest data.
    ALLOCATION
        What must be true before a reference is: a directory of the counts, a footer at
        the new end of the file.
    REFERENCE
        Entries that refer to data and tables of the steps before.
    """

    NEW = 0
    ALLOCATION = 1
    REFERENCE = 2


class UpdateFile(HostFile):
    """A file of the host that is open for reading and for writing in place.

    It is locked as QEMU locks an image that it writes to.  Reads see the changes that
    wait.  Any number of threads may use it.

    Attributes
    ----------
    nbytes : int
        The size now.
    """

    nbytes: int

    def __init__(
        self,
        fd: int,
        path: str,
        *,
        device: bool = True,
        is_named: bool = True,
        is_ours: bool = True,
    ) -> None:
        self._changing = threading.RLock()
        # The changed sectors of each step, by their numbers.
        self._steps: dict[Step, dict[int, bytearray]] = {}
        self._failure: OSError | None = None
        # Files whose bytes the system does not copy to this one.
        self._not_copied: set[Identity] = set()
        self._is_unsynced = False
        self._has_changed = False
        # This one, and those that `again` made of it: one file, one size.
        self._same: WeakSet[UpdateFile] = WeakSet((self,))
        # Others cannot write to it: it is locked.
        super().__init__(fd, path, share=True, device=device, is_named=is_named, is_ours=is_ours)
        try:
            give_up_in_children(fd)
        except BaseException:
            self.close()
            raise

    # -- opening -----------------------------------------------------------------------

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, share: bool = False) -> Self:
        """Open a file that the caller names, and lock it; raises as `HostFile.open`.

        TargetError if it is in use, immutable, or read-only.
        """
        name = os.fspath(path)
        mode = os.stat(name).st_mode
        refuse_type(mode, name)
        with forks_held_back():
            file = cls(open_writable(name, mode), name)
        return file.locked()

    @classmethod
    def given(cls, number: int, *, share: bool = False) -> Self:
        """Open the file of a descriptor that the caller has; raises as `open`.

        If the system lets this process not open it anew, the lock is one of the
        caller's open file, and ends when this object is closed.
        """
        with forks_held_back():
            fd, is_ours = open_given(number, UPDATE_FLAGS)
            file = cls(fd, given_name(number), is_named=False, is_ours=is_ours)
        return file.locked()

    def locked(self) -> Self:
        """Lock the file, and return this object; an error closes it.

        TargetError if it is in use, or its owner lets nobody write to it: root could.
        """
        try:
            is_read_only = not self._status.st_mode & _WRITE_BITS
            if is_read_only and self.folder is not None and not self.is_block_device:
                raise TargetError("is read-only; chmod u+w permits writing to it", path=self.path)
            if self.is_block_device:
                from imgcore.files.block_devices import refuse_read_only

                refuse_read_only(self.fd, self.path)
            self._image_lock = ImageLock.for_writing(self.fd, self.path)
        except BaseException:
            self.close()
            raise
        return self

    def again(self) -> Self:
        """Return the same file once more, with the same lock; nothing may wait."""
        with forks_held_back(), self._in_use(), named_errors(self.path):
            fd = duplicate(self.fd)
            file = type(self)(fd, self.path, is_named=False, is_ours=self._is_ours)
        file._absolute_path = self._absolute_path
        # Who reads through the old object goes on, and finds tables that have changed.
        file._same = self._same
        file._same.add(file)
        self._lend_lock(file)
        return file

    # -- reading -----------------------------------------------------------------------

    def pread(self, offset: int, length: int) -> bytes:
        """Return bytes of the file as it will be; see `ByteSource.pread`."""
        if not self._steps:
            return super().pread(offset, length)
        self._check_range(offset, length)
        content = bytearray(length)
        self.pread_into(offset, content)
        return bytes(content)

    def pread_into(self, offset: int, buffer: Any) -> None:
        """Fill a buffer with bytes of the file as it will be."""
        with self._changing:
            super().pread_into(offset, buffer)
            if self._steps:
                with memoryview(buffer) as view, view.cast("B") as octets:
                    self._overlay(offset, octets)

    def _overlay(self, offset: int, octets: memoryview) -> None:
        end = offset + len(octets)
        first, last = offset // SECTOR_NBYTES, -(-end // SECTOR_NBYTES)
        for sectors in self._steps.values():
            numbers = (
                (n for n in range(first, last) if n in sectors)
                if last - first < len(sectors)
                else (n for n in sectors if first <= n < last)
            )
            for number in numbers:
                start = number * SECTOR_NBYTES
                a, b = max(start, offset), min(start + SECTOR_NBYTES, end)
                octets[a - offset : b - offset] = sectors[number][a - start : b - start]

    def next_data(self, position: int) -> tuple[int, int]:
        """Return the next data; see `ByteSource.next_data`.

        Holes are known only until the file changes: tables that wait are not in the
        file, and not every file system tells holes from data that it has yet to write.
        """
        return (position, self.nbytes) if self._has_changed else super().next_data(position)

    # -- guest data, and the size ------------------------------------------------------

    def pwrite(self, offset: int, data: Any) -> None:
        """Write bytes at once: guest data, or what no table refers to yet.

        OSError with the file's name; the range then has old or new bytes.
        """
        with memoryview(data) as view, view.cast("B") as octets, self._in_use():
            self._require_sound()
            self.note_written()
            with named_errors(self.path):
                done = 0
                while done < len(octets):
                    rest, at = octets[done:], offset + done
                    done += retrying(partial(os.pwrite, self.fd, rest, at), WRITE_ERRORS)
            # A sync that another thread has begun meanwhile may not have seen it.
            self._is_unsynced = True
            self._note_end(offset + len(octets))

    def takes_copies_of(self, source: HostFile) -> bool:
        """Tell whether the system copies between the two files without their bytes.

        Other copies are faster through memory, where one thread reads and one writes.
        """
        from imgcore.files.reflinks import takes_reflinks

        if source.identity in self._not_copied:
            return False
        with self._in_use(), source._in_use():
            if takes_reflinks(source, self):
                return True
        self._not_copied.add(source.identity)
        return False

    def copy(self, source: HostFile, source_offset: int, offset: int, length: int) -> None:
        """Write bytes of another file at once; raises as `pwrite`, and for the source.

        The system shares blocks between the files if it can.  What it refuses to copy
        passes through memory, which tells the file that has failed.
        """
        done = 0
        with self._in_use(), source._in_use():
            self._require_sound()
            self.note_written()
            while done < length and source.identity not in self._not_copied:
                nbytes = min(length - done, _COPY_NBYTES)
                at, to = source_offset + done, offset + done
                try:
                    copied = os.copy_file_range(source.fd, self.fd, nbytes, at, to)
                except OSError:
                    copied = 0
                if not copied:
                    self._not_copied.add(source.identity)
                done += copied
            # See `pwrite`.
            self._is_unsynced = True
            self._note_end(offset + done)
        buffer = memoryview(bytearray(min(length - done, _BUFFER_NBYTES)))
        for at in range(done, length, _BUFFER_NBYTES):
            part = buffer[: length - at]
            source.pread_into(source_offset + at, part)
            self.pwrite(offset + at, part)

    def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeros at once, by the cheapest way that works."""
        from imgcore._core import CoreError

        with self._in_use(), named_errors(self.path):
            self._require_sound()
            self.note_written()
            try:
                self.core.zero(offset, length)
            except CoreError as error:
                raise OSError(error.os_errno or errno.ENOSPC, "") from error
            self._note_end(offset + length)

    def zero_in_place(self, offset: int, length: int) -> None:
        """Make a range read as zeros at once, and keep its space."""
        with self._in_use(), named_errors(self.path):
            self._require_sound()
            self.note_written()
            if zero_in_place(self.fd, offset, length):
                return
        zeros = bytes(min(length, _ZEROS_NBYTES))
        for at in range(offset, offset + length, _ZEROS_NBYTES):
            self.pwrite(at, memoryview(zeros)[: offset + length - at])

    def punch(self, offset: int, length: int) -> bool:
        """Give back the space of a range, which then reads as zeros.

        False if the file or device cannot do that: its bytes stay.
        """
        with self._in_use(), named_errors(self.path):
            self._require_sound()
            self.note_written()
            return punch(self.fd, offset, length)

    def grow(self, nbytes: int) -> None:
        """Make the file at least so long; what is new reads as zeros.

        OSError (ENOSPC) for a block device that is shorter.
        """
        with self._changing, self._in_use(), named_errors(self.path):
            if nbytes <= self.nbytes:
                return
            self._require_sound()
            if self.is_block_device:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(self.fd, nbytes)
            self.note_written()
            self._note_end(nbytes)

    def cut(self, nbytes: int) -> None:
        """Make the file so short at once: nothing durable refers to what is behind.

        A block device stays as it is.
        """
        with self._changing, self._in_use(), named_errors(self.path):
            self._require_sound()
            if not self.is_block_device and nbytes < self.nbytes:
                os.ftruncate(self.fd, nbytes)
                self.note_written()
                self.nbytes = nbytes

    def replace(self, content: bytes) -> None:
        """Put a new file of that content in the place of this one, for a small file.

        A crash leaves the old one or the new one.  Nothing may wait.

        TargetError if the file was given without a name, or has another one by now.
        """
        from imgcore.files.exchange import new_version, sync_folder_of

        name = self._absolute_path
        if name is None:
            raise TargetError(
                "was given by its descriptor: without its name, it cannot be replaced",
                path=self.path,
            )
        with self._changing, self._in_use(), named_errors(self.path):
            self._require_sound()
            fd = new_version(self.fd, name, self.path, content)
            core, self._core = self._core, None
            if core is not None:
                core.close()
            try:
                os.dup2(fd, self.fd, inheritable=False)
            finally:
                close(fd)
            self._examine(device=False)
            self._has_changed = True
            sync_folder_of(name)

    def _note_end(self, end: int) -> None:
        with self._changing:
            if end > self.nbytes:
                for file in self._same:
                    file.nbytes = max(file.nbytes, end)

    # -- tables ------------------------------------------------------------------------

    def put(self, offset: int, data: bytes | bytearray | memoryview, step: Step) -> None:
        """Change bytes of a table, to be written by `write_steps`.

        Whoever changes several tables puts them in an order that is sound after each
        call.  A sector that already waits in another step makes all of them be written
        first.  What lies past the end of the file makes it longer.
        """
        with self._changing:
            self._require_sound()
            self._has_changed = True
            end = offset + len(data)
            first, last = offset // SECTOR_NBYTES, -(-end // SECTOR_NBYTES)
            others = [sectors for other, sectors in self._steps.items() if other != step]
            if any(n in sectors for sectors in others for n in range(first, last)):
                self.write_steps()
            if end > self.nbytes:
                self.grow(end)
            sectors = self._steps.setdefault(step, {})
            for number in range(first, last):
                start = number * SECTOR_NBYTES
                a, b = max(start, offset), min(start + SECTOR_NBYTES, end)
                sector = sectors.get(number)
                if sector is None:
                    sector = sectors[number] = self._sector(start, whole=b - a == SECTOR_NBYTES)
                sector[a - start : b - start] = data[a - offset : b - offset]

    def _sector(self, start: int, *, whole: bool) -> bytearray:
        nbytes = min(SECTOR_NBYTES, self.nbytes - start)
        return bytearray(nbytes) if whole else bytearray(super().pread(start, nbytes))

    @property
    def waiting_nbytes(self) -> int:
        """Bytes of changed sectors that wait."""
        return sum(len(sectors) for sectors in self._steps.values()) * SECTOR_NBYTES

    def waiting(self, step: Step) -> Iterator[tuple[int, bytes]]:
        """Yield the changes of a step: host offsets, ascending, and whole sectors."""
        sectors = self._steps.get(step, {})
        run: list[bytearray] = []
        start = 0
        for number in sorted(sectors):
            if run and number * SECTOR_NBYTES != start + len(run) * SECTOR_NBYTES:
                yield start, b"".join(run)
                run = []
            if not run:
                start = number * SECTOR_NBYTES
            run.append(sectors[number])
        if run:
            yield start, b"".join(run)

    def write_steps(self) -> None:
        """Make everything durable that was written or put, step by step.

        OSError if the system fails.  What could not be written still waits, so that it
        can be tried again; but after a failed sync the file refuses all writes.
        """
        with self._changing:
            if Step.NEW not in self._steps:
                # Else guest data becomes durable with the first step.
                self.sync()
            for step in sorted(self._steps):
                self.write_step(step)

    def write_step(self, step: Step) -> None:
        """Write the changes of one step, and make them durable."""
        with self._changing:
            for offset, data in self.waiting(step):
                self.pwrite(offset, data)
            self.sync()
            self.forget_step(step)

    def forget_step(self, step: Step) -> None:
        """Forget changes of a step, which are in the file by now."""
        self._steps.pop(step, None)

    def sync(self) -> None:
        """Make what was written durable; nothing happens if nothing was.

        A failure is final: the kernel may have dropped the data.
        """
        # Whoever finds nothing to sync must not return before another thread's sync.
        with self._changing, self._in_use():
            self._require_sound()
            # What is written from now on is for the next sync.
            if self._core is not None and self._core.take_written():
                self._is_unsynced = True
            if not self._is_unsynced:
                return
            self._is_unsynced = False
            try:
                with named_errors(self.path):
                    os.fdatasync(self.fd)
            except BaseException as error:
                self._is_unsynced = True
                if isinstance(error, OSError) and is_of_system(error):
                    self._failure = error
                    self.core.refuse_writes()
                raise

    def note_written(self) -> None:
        """Note that the file is written to, perhaps by the engine."""
        self._is_unsynced = self._has_changed = True

    def _require_sound(self) -> None:
        if self._failure is not None:
            raise ImgcoreError(
                f"is not written to any more, because a sync has failed: {self._failure.strerror}",
                path=self.path,
            )
