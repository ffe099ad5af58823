"""Targets that are written once, in order: pipes, sockets, objects with ``write``."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import select
import socket
import stat
import termios
import threading
import time
from contextlib import suppress
from operator import index
from typing import TYPE_CHECKING, Any, Final

from imgcore.errors import ImgcoreError, OptionError, TargetError
from imgcore.files.commit_point import CommitCounter, uninterrupted
from imgcore.files.descriptors import (
    close,
    duplicate,
    forks_held_back,
    give_up_in_children,
    named_errors,
    open_file,
    standard_numbers_taken,
)
from imgcore.files.host_file import OpenFile, system_errors
from imgcore.files.identity import Identity, file_identity, object_identity, refuse_messages
from imgcore.files.target import Target
from imgcore.files.target_file import TargetFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from imgcore._core import File
    from imgcore.files.target_folder import TargetFolder

STDOUT: Final = "-"

# Fewer and longer writes, where the system allows an ordinary user so much.
_PIPE_NBYTES: Final = 1 << 20
_POLL_SECONDS: Final = 0.05
# How soon a reader that takes the last bytes is noticed.
_SOON_SECONDS: Final = 0.002


def is_stream_object(target: Any) -> bool:
    """Tell whether a target is a socket, or has ``write``."""
    return isinstance(target, socket.socket) or hasattr(target, "write")


def is_stream_target(target: Any) -> bool:
    """Tell whether a target is such an object, ``-``, or the name of a pipe."""
    if isinstance(target, str):
        return target == STDOUT or _is_named_pipe(target)
    return is_stream_object(target)


def is_stdout(target: str) -> bool:
    """Tell whether a target is the standard output, by whatever name."""
    if target == STDOUT:
        return True
    with suppress(OSError, ValueError):
        return _is_named_pipe(target) and file_identity(os.stat(target)) == file_identity(
            os.fstat(1)
        )
    return False


def stream_name(target: Any) -> str:
    """Return the name of such a target in messages."""
    if isinstance(target, str):
        return "stdout" if target == STDOUT else target
    if isinstance(target, socket.socket):
        return f"socket {target.fileno()}"
    # The name that an object may have is that of its own format.
    return f"<{type(target).__name__}>"


def _is_named_pipe(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


class StreamTarget(Target):
    """Takes the place of a `Target` for what is written in order; a context manager.

    What was written stays written, whatever happens later.

    Parameters
    ----------
    target : str, socket or object with ``write``
        As `is_stream_target` finds it.  It stays open, and an object is written to by a
        thread of its own.
    waiting : callable
        Called about every 50 ms while nobody takes what is written.  Its exceptions end
        the job.

    Raises
    ------
    TargetError
        It is a terminal, or what is no stream.
    OSError
        It is closed, or cannot be opened.
    """

    def __init__(self, target: Any, *, waiting: Callable[[], None]) -> None:
        self.path: str = stream_name(target)
        self.force = False
        self.sync = True
        self.in_place = False
        self.is_block_device: bool = False
        self.is_committed: bool = False
        self.late_error: OSError | ImgcoreError | None = None
        self._folder: TargetFolder | None = None
        self._protected: dict[Identity | None, str] = {}
        self._waiting = waiting
        self._is_prepared = False
        self._pump: _Pump | None
        self._file: OrderedFile = OrderedFile(self._open(target), self.path, waiting)
        self.identity: Identity | None = self._file.identity
        if self._pump is not None:
            self.identity = _identity_of(target)

    def _open(self, target: Any) -> int:
        """Return a descriptor that the file owns."""
        self._pump = None
        if isinstance(target, str) and target != STDOUT:
            return self._open_pipe(target)
        number = 1 if target == STDOUT else _number_of(target)
        if number is None:
            self._pump = _Pump(target, self.path)
            return self._pump.start()
        with named_errors(self.path):
            return _not_waiting(number)

    def _open_pipe(self, path: str) -> int:
        """Open a pipe by its name; wait until somebody reads it."""
        while True:
            try:
                return open_file(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
            self._waiting()
            time.sleep(_POLL_SECONDS)

    @property
    def main(self) -> OrderedFile:
        """What is written."""
        return self._file

    def companion(self, name: str) -> TargetFile:
        """Raise OptionError: there is one stream."""
        raise OptionError(
            f"a stream is one file, but this image has a second one ({name}): choose another "
            "subformat",
            path=self.path,
        )

    def written(self) -> list[TargetFile]:
        """Return nothing: a stream is no file that could be found again."""
        return []

    def prepare(self) -> None:
        """Write the last zeros, and wait until everything has been taken."""
        self._file.finish()
        if self._pump is not None:
            self._pump.finish(self._file, self._waiting)
        self._is_prepared = True

    def commit(self) -> None:
        """End the stream; see `Target.commit`."""
        if not self._is_prepared:
            self.prepare()
        self.is_committed = True
        CommitCounter.count += 1
        self.conclude()

    def conclude(self) -> None:
        """Close what was opened for it."""
        uninterrupted(self.path, self._file.close)

    def abort(self) -> None:
        """Stop writing."""
        if self._pump is not None:
            self._pump.stop()
        self._file.close()

    def __exit__(self, *error: object) -> None:
        self.abort()
        # The pipe to the thread breaks when the object refuses bytes.
        if self._pump is not None and isinstance(error[1], BrokenPipeError):
            self._pump.raise_error()


class OrderedFile(TargetFile):
    """A stream as a file: offsets of writes ascend, and gaps become zeros.

    Attributes
    ----------
    identity : tuple of two ints, or None
        See `Target.identity`.
    """

    in_order = True

    def __init__(self, fd: int, path: str, waiting: Callable[[], None]) -> None:
        OpenFile.__init__(self, fd, path)
        self.is_block_device: bool = False
        self.reads_as_zeros: bool = True
        self._waiting = waiting
        self._nbytes = 0
        give_up_in_children(fd)
        try:
            self._mode = self.status().st_mode
            self._refuse_mode()
            # A connection is another stream in each direction.
            self.identity: Identity | None = None
            if not stat.S_ISSOCK(self._mode):
                self.identity = file_identity(self.status())
            if stat.S_ISFIFO(self._mode):
                with suppress(OSError):
                    fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_NBYTES)
        except BaseException:
            self.close()
            raise

    def _refuse_mode(self) -> None:
        if os.isatty(self.fd):
            raise TargetError("is a terminal: write to a file, or to a pipe", path=self.path)
        if stat.S_ISBLK(self._mode):
            raise TargetError(
                "is a block device: name it as the target instead, with -n (in_place=True)",
                path=self.path,
            )
        if stat.S_ISDIR(self._mode):
            raise TargetError("is a folder", path=self.path)
        access = fcntl.fcntl(self.fd, fcntl.F_GETFL) & os.O_ACCMODE
        if access == os.O_RDONLY:
            raise TargetError("is open for reading only", path=self.path)
        refuse_messages(self.fd, self.path)
        # The command puts /dev/null in the place of a stdout that is closed.
        if access == os.O_RDWR and stat.S_ISCHR(self._mode):
            raise TargetError("is closed, or a device that is no target", path=self.path)

    @property
    def core(self) -> File:
        """The file for the native engine."""
        with self._in_use():
            if self._core is None:
                from imgcore._core import File

                with named_errors(self.path), system_errors():
                    self._core = File.from_ordered(self.fd)
            return self._core

    @property
    def logical_sector_nbytes(self) -> None:
        """Nothing states them."""
        return None

    @property
    def nbytes(self) -> int:
        """The size so far, or that of the last `truncate`."""
        return self._nbytes

    @property
    def file_size(self) -> int:
        """The same."""
        return self._nbytes

    def pwrite(self, offset: int, data: Any) -> None:
        """Write a whole buffer, which starts where the last one ended or later."""
        with memoryview(data) as view, view.cast("B") as octets, self._in_use():
            with named_errors(self.path), system_errors():
                self.core.write(offset, octets, self._waiting)
            self.note_end(offset + len(octets))

    def write_last(self, data: bytes) -> None:
        """Write the last bytes of the size that `truncate` has set."""
        self.pwrite(self._nbytes - len(data), data)

    def truncate(self, nbytes: int) -> None:
        """State the size: what nobody writes before it becomes zeros in `finish`."""
        self._nbytes = nbytes

    def clear(self, nbytes: int) -> None:
        """Do nothing: a stream is empty at first."""

    def note_end(self, end: int) -> None:
        """Note that everything before ``end`` is written or reads as zeros."""
        self._nbytes = max(self._nbytes, end)

    def zero(self, offset: int, length: int) -> None:
        """Do nothing: what is not written becomes zeros."""
        self.note_end(offset + length)

    def preallocate(self, mode: str, nbytes: int) -> None:
        """Refuse to reserve space."""
        if mode != "off":
            raise OptionError("a stream has no space to preallocate", path=self.path)

    def finish(self) -> None:
        """Write the zeros at the end, and wait until a reader has taken everything."""
        self.pwrite(self._nbytes, b"")
        with self._in_use(), named_errors(self.path):
            if stat.S_ISREG(self._mode):
                os.fsync(self.fd)
            pause = _SOON_SECONDS
            while self._untaken_nbytes():
                poll = select.poll()
                poll.register(self.fd, 0)
                if poll.poll(0) and self._untaken_nbytes():
                    raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
                self._waiting()
                time.sleep(pause)
                pause = min(2 * pause, _POLL_SECONDS)

    def _untaken_nbytes(self) -> int:
        """Return how many bytes wait for a reader, as far as the system can tell."""
        request = None
        if stat.S_ISFIFO(self._mode):
            request = termios.FIONREAD
        elif stat.S_ISSOCK(self._mode):
            request = termios.TIOCOUTQ
        if request is None:
            return 0
        try:
            waiting = fcntl.ioctl(self.fd, request, bytes(4))
        except OSError:
            return 0
        return int.from_bytes(waiting, "little")


def _not_waiting(number: int) -> int:
    """Return another descriptor of what a number is; writes to a pipe never wait.

    Others may use the same open file description, whose flags are left alone.
    """
    if stat.S_ISFIFO(os.fstat(number).st_mode):
        with suppress(OSError):
            return open_file(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK)
    return duplicate(number)


def _number_of(target: Any) -> int | None:
    """Return the descriptor of a pipe or socket that an object writes to as it is."""
    if isinstance(target, socket.socket):
        return target.fileno()
    if type(target) not in (io.FileIO, io.BufferedWriter):
        return None
    with suppress(OSError, ValueError):
        number = int(target.fileno())
        if stat.S_ISFIFO(os.fstat(number).st_mode):
            target.flush()
            return number
    return None


def _identity_of(target: Any) -> Identity | None:
    """Return the identity of what an object writes to; see `OrderedFile`."""
    with suppress(Exception):
        if stat.S_ISSOCK(os.fstat(target.fileno()).st_mode):
            return None
    return object_identity(target)


class _Pump:
    """A thread that writes to an object what it reads from a pipe."""

    def __init__(self, target: Any, path: str) -> None:
        self._target = target
        self._path = path
        self._error: BaseException | None = None
        self._is_stopped = False
        self._thread: threading.Thread | None = None

    def start(self) -> int:
        """Return the end of the pipe that is written to."""
        self._target.write(b"")  # an object for text says so here
        with forks_held_back():
            with standard_numbers_taken():
                reading, writing = os.pipe2(os.O_CLOEXEC)
            give_up_in_children(reading)
            os.set_blocking(writing, False)
        self._thread = threading.Thread(
            target=self._run, args=(reading,), name="imgcore-stream", daemon=True
        )
        try:
            self._thread.start()
        except BaseException:
            close(reading)
            close(writing)
            raise
        return writing

    def _run(self, reading: int) -> None:
        try:
            while data := os.read(reading, _PIPE_NBYTES):
                self._write(data)
        except BaseException as error:
            self._error = error
        finally:
            close(reading)

    def _write(self, data: bytes) -> None:
        while data and not self._is_stopped:
            n = self._target.write(data)
            if n is None and isinstance(self._target, io.RawIOBase):
                time.sleep(_POLL_SECONDS)  # it takes nothing now
                continue
            n = len(data) if n is None else index(n)
            if not 0 <= n <= len(data):
                raise ImgcoreError(
                    f"its write returned {n} for {len(data)} bytes: wrong for a stream",
                    path=self._path,
                )
            data = data[n:]
            if not n:
                time.sleep(_POLL_SECONDS)

    def finish(self, file: OrderedFile, waiting: Callable[[], None]) -> None:
        """Wait until the object has everything."""
        file.close()
        assert self._thread is not None
        while self._thread.is_alive():
            self._thread.join(_POLL_SECONDS)
            waiting()
        self.raise_error()
        flush = getattr(self._target, "flush", None)
        if flush is not None:
            flush()

    def stop(self) -> None:
        """Write no more; a write in progress ends on its own."""
        self._is_stopped = True

    def raise_error(self) -> None:
        """Raise what the object has raised, if anything."""
        if self._thread is not None and self._error is None:
            self._thread.join(_POLL_SECONDS)
        if self._error is not None:
            raise self._error
