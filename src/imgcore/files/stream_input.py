"""A source that is read once, in order: a pipe, a socket, an object with ``read``."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import select
import socket
import stat
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol

from imgcore.errors import (
    ConversionCancelled,
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    UnsupportedFeatureError,
)
from imgcore.files.closable import Closable
from imgcore.files.descriptors import above_standard, close, duplicate, named_errors, open_file
from imgcore.files.identity import (
    Identity,
    describe_file_type,
    file_identity,
    object_identity,
    refuse_messages,
)
from imgcore.files.streamed_bytes import StreamedBytes
from imgcore.limits import KIB, MAX_AHEAD_NBYTES, MAX_KEPT_NBYTES, MIB

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from imgcore._core import File

STDIN: Final = "-"

_TICK_MS: Final = 50
_PULL_NBYTES: Final = 64 * KIB
# Fewer and longer reads, where the system allows an ordinary user so much.
_PIPE_NBYTES: Final = 1 * MIB
# Of streams whose end is not known yet: the largest size of a file.
_MAX_NBYTES: Final = (1 << 63) - 1


class Origin(Protocol):
    """What the bytes of a stream come from."""

    @property
    def identity(self) -> Identity:
        """Identifies it, as for `ByteSource`."""
        ...

    def readinto(self, view: memoryview, tick: Callable[[], None] | None, /) -> int:
        """Wait for bytes, fill the start of a view; return how many, 0 at the end.

        ``tick`` may be called several times a second meanwhile.
        """
        ...

    @property
    def read_now(self) -> Callable[[memoryview], int | None] | None:
        """Does as `readinto`, but returns None instead of waiting; None: cannot."""
        ...

    def open_core(self, head: bytes, *, open_ended: bool, tail_nbytes: int) -> File | None:
        """Return what the engine reads instead of `readinto`; None if it cannot.

        The parameters are those of `File.from_stream`.
        """
        ...

    def cancel(self) -> bool:
        """End a read that waits, and all later ones, with ConversionCancelled.

        Returns False if a read that waits goes on.
        """
        ...

    def close(self) -> None:
        """Free what it owns; no read is in progress."""
        ...


class StreamInput(StreamedBytes, Closable):
    """Bytes that come once and in order.

    One thread at a time reads; `cancel` may be called by any.

    Parameters
    ----------
    origin : Origin
        `close` closes it.
    path : str
        Its name in messages.
    below : StreamInput, optional
        The stream that the bytes are made from.  This one is closed with it.

    Attributes
    ----------
    position : int
        Offset of the first byte that has not been taken.
    on_wait : callable or None
        Called several times a second while a read waits; it may raise.

    Notes
    -----
    `readinto` and `skip` take bytes.  `peek` and `pread` look at bytes ahead, which
    stay: `MAX_AHEAD_NBYTES` of them at most.  Bytes that were taken are gone, unless
    `keep` was asked for them.

    It has the members of a `ByteSource` other than ``core``, so that readers of headers
    and tables can use it.  Its end is not known before it is read, and ``nbytes`` is
    the largest size of a file until then.
    """

    _what = "stream"

    def __init__(self, origin: Origin, path: str, below: StreamInput | None = None) -> None:
        self.path = path
        self._origin = origin
        self.identity: Identity = origin.identity
        self.position: int = 0
        self.on_wait: Callable[[], None] | None = None
        # Bytes from `position` on, which were read already.
        self._ahead = bytearray()
        # Bytes from the start on that stay, and how many of them there are to be.
        self._kept = bytearray()
        self._to_keep = 0
        self._has_ended = False
        self._above: list[StreamInput] = []
        super().__init__()
        if below is not None:
            below._above.append(self)

    @property
    def end(self) -> int | None:
        """Bytes of the whole stream, None as long as its end was not met."""
        return self.position + len(self._ahead) if self._has_ended else None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole stream, or 2^63 - 1 as long as its end was not met."""
        return _MAX_NBYTES if self.end is None else self.end

    @property
    def core(self) -> File:
        """Not there: the engine gets what was read in memory."""
        raise UnsupportedFeatureError("a stream has no random access", path=self.path)

    # -- bytes that are taken ----------------------------------------------------------

    def readinto(self, buffer: Any) -> int:
        """Take the next bytes: fill a writable buffer, unless the stream ends in it.

        Returns
        -------
        int
            Bytes filled.

        Raises
        ------
        ConversionCancelled
            `cancel` was called.
        OSError
            The system cannot read.
        """
        with memoryview(buffer) as view, view.cast("B") as octets:
            done = min(len(self._ahead), len(octets))
            octets[:done] = memoryview(self._ahead)[:done]
            del self._ahead[:done]
            while done < len(octets) and (n := self._pull(octets[done:])):
                done += n
            self._keep_from(octets[:done])
            self.position += done
            return done

    @property
    def reads_now(self) -> bool:
        """Whether `read_now` can be called: the origin tells what it has."""
        return self._origin.read_now is not None

    def read_now(self, view: memoryview) -> int | None:
        """Take bytes that are there; see `readinto`.

        Returns
        -------
        int or None
            Bytes at the start of the view that were filled, 0 at the end of the stream;
            None if none are there.
        """
        if self._ahead:
            return self.readinto(view[: len(self._ahead)])
        if self._has_ended:
            return 0
        assert self._origin.read_now is not None, "see reads_now"
        with self._in_use(), named_errors(self.path):
            n = self._origin.read_now(view)
        if n is not None:
            self._has_ended = not n
            self._keep_from(view[:n])
            self.position += n
        return n

    def read(self, nbytes: int) -> bytes:
        """Take the next bytes, fewer if the stream ends; see `readinto`."""
        data = bytearray(nbytes)
        del data[self.readinto(data) :]
        return bytes(data)

    def skip(self, nbytes: int) -> None:
        """Take bytes and drop them; CorruptImageError if the stream ends before."""
        buffer = bytearray(min(nbytes, _PIPE_NBYTES))
        left = nbytes
        while left:
            with memoryview(buffer) as view:
                n = self.readinto(view[: min(left, len(buffer))])
            if not n:
                self._refuse_end(self.position + left)
            left -= n

    def require_end(self) -> None:
        """Take the rest, which may be zeros only.

        Raises
        ------
        CorruptImageError
            Something else than zeros follows.
        """
        buffer = bytearray(_PIPE_NBYTES)
        while n := self.readinto(buffer):
            self.require_zeros(buffer[:n])

    def require_zeros(self, taken: bytes | bytearray) -> None:
        """Raise CorruptImageError unless the bytes that were taken last are zeros."""
        rest = taken.lstrip(b"\0")
        if rest:
            at = self.position - len(rest)
            raise CorruptImageError(
                f"the stream goes on after its end, at 0x{at:x}, with other bytes than zeros",
                path=self.path,
                offset=at,
            )

    # -- bytes that are looked at ------------------------------------------------------

    def peek(self, nbytes: int) -> bytes:
        """Return the next bytes, which are not taken; fewer if the stream ends."""
        self._look(nbytes)
        return bytes(memoryview(self._ahead)[:nbytes])

    def pread(self, offset: int, length: int) -> bytes:
        """Return bytes ahead, or bytes that are kept; see `ByteSource.pread`.

        Raises
        ------
        UnsupportedFeatureError
            They have been taken and are gone, or are too far ahead.
        CorruptImageError
            The stream ends before.
        """
        if offset < 0 or length < 0:
            raise ValueError(f"{self.path}: negative offset or length: {offset}, {length}")
        if offset < self.position:
            kept = bytes(memoryview(self._kept)[offset : offset + length])
            if len(kept) == length:
                return kept
            if offset + len(kept) < self.position:
                raise UnsupportedFeatureError(
                    f"a stream is read in order, but bytes at 0x{offset:x} are needed after "
                    f"those before 0x{self.position:x}: save it to a file first",
                    path=self.path,
                    offset=offset,
                )
            return kept + self.pread(offset + len(kept), length - len(kept))
        start = offset - self.position
        self._look(start + length)
        if len(self._ahead) < start + length:
            self._refuse_end(offset + length)
        return bytes(memoryview(self._ahead)[start : start + length])

    def keep(self, nbytes: int) -> None:
        """Have `pread` return the first bytes of the stream also once they are taken.

        Parameters
        ----------
        nbytes : int
            Counted from the stream's start; none of them may be taken and gone already.

        Raises
        ------
        LimitExceededError
            There are too many.
        """
        if nbytes > MAX_KEPT_NBYTES:
            raise LimitExceededError(
                f"the stream's first {nbytes} bytes would have to stay in memory, allowed are "
                f"{MAX_KEPT_NBYTES}: save it to a file first",
                path=self.path,
            )
        if nbytes > self._to_keep:
            if len(self._kept) < self.position:
                raise ValueError(f"{self.path}: the stream's start is gone")
            self._to_keep = nbytes

    # -- bytes that the engine takes ---------------------------------------------------

    def open_core(self, *, open_ended: bool, tail_nbytes: int = 0) -> File | None:
        """Return what the engine reads the stream by, from its first byte on.

        Nothing else reads until `resume` is called, and the caller closes it.  It is
        None if the bytes come from an object, or are decompressed.

        Parameters
        ----------
        open_ended, tail_nbytes
            As for `File.from_stream`.
        """
        assert not self.position, "bytes were taken"
        head = bytes(self._ahead)
        with named_errors(self.path):
            return self._origin.open_core(head, open_ended=open_ended, tail_nbytes=tail_nbytes)

    def resume(self, core: File) -> None:
        """Go on where the engine has stopped; its job has ended."""
        self.position = core.stream_position
        self._ahead[:] = core.stream_rest()
        self._has_ended = core.stream_end is not None

    # -- the origin --------------------------------------------------------------------

    def cancel(self) -> bool:
        """End a read that waits, and all later ones, with ConversionCancelled.

        Returns
        -------
        bool
            False if a read that waits goes on, since it is in an object of the caller.
        """
        return self._origin.cancel()

    def _look(self, nbytes: int) -> None:
        """Read so many bytes ahead of `position`, unless the stream ends."""
        if nbytes > MAX_AHEAD_NBYTES:
            raise UnsupportedFeatureError(
                f"a stream is read in order, but bytes at 0x{self.position + nbytes:x} are "
                f"needed before those at 0x{self.position:x}: save it to a file first",
                path=self.path,
                offset=self.position,
            )
        while len(self._ahead) < nbytes:
            buffer = bytearray(max(min(nbytes - len(self._ahead), _PIPE_NBYTES), _PULL_NBYTES))
            with memoryview(buffer) as view:
                n = self._pull(view)
            if not n:
                return
            self._ahead += memoryview(buffer)[:n]

    def _pull(self, view: memoryview) -> int:
        """Read from the origin, as often as it has something; 0 at the end."""
        if self._has_ended:
            return 0
        with self._in_use(), named_errors(self.path):
            n = self._origin.readinto(view, self.on_wait)
        self._has_ended = not n
        return n

    def _keep_from(self, taken: memoryview) -> None:
        if len(self._kept) == self.position < self._to_keep:
            self._kept += taken[: self._to_keep - self.position]

    def _refuse_end(self, needed: int) -> NoReturn:
        raise CorruptImageError(
            f"the stream ends too early: after {self.end} bytes, but {needed} are needed",
            path=self.path,
            offset=self.end,
        )

    def _free(self) -> None:
        for stream in self._above:
            stream.close()
        self._origin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path!r}>"


# -- where streams come from -----------------------------------------------------------


def stdin_stream() -> StreamInput:
    """Return the standard input, from its position on, which others may have moved.

    Raises
    ------
    ImgcoreError
        It is a terminal, or nothing that has content.
    OSError
        It is closed.
    """
    return _from_descriptor(0, "stdin")


def descriptor_stream(number: int, path: str) -> StreamInput:
    """Return what an open descriptor has, which stays open; see `stdin_stream`."""
    return _from_descriptor(number, path)


def named_stream(path: str) -> StreamInput:
    """Open a pipe by its name, without waiting for its other end."""
    fd = open_file(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return _owning(fd, path)


def object_stream(source: Any) -> StreamInput:
    """Return what an object has that is open for reading bytes, or a socket.

    The object stays open; its position is where the last byte was taken, or behind it.
    """
    if isinstance(source, socket.socket):
        return _from_descriptor(source.fileno(), f"socket {source.fileno()}")
    if isinstance(source, io.TextIOBase):
        raise TypeError("a binary file object is needed, this one is for text")
    name = getattr(source, "name", None)
    path = name if isinstance(name, str) and name else f"<{type(source).__name__}>"
    return StreamInput(_Object(source, path), path)


def is_stream_object(source: Any) -> bool:
    """Tell whether `object_stream` takes it: it is a socket, or can be read from."""
    if isinstance(source, socket.socket):
        return True
    readers = ("readinto", "read")
    return not isinstance(source, os.PathLike) and any(hasattr(source, name) for name in readers)


def is_named_pipe(path: str) -> bool:
    """Tell whether a name is that of a pipe (FIFO), also /dev/stdin or /dev/fd/N."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode)


def is_seekable_start(number: int) -> bool:
    """Tell whether a descriptor's file can be read anywhere, and is at its start."""
    try:
        mode = os.fstat(number).st_mode
        if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
            return os.lseek(number, 0, os.SEEK_CUR) == 0
    except OSError:
        pass
    return False


def _from_descriptor(number: int, path: str) -> StreamInput:
    with named_errors(path):
        fd = duplicate(number)
    return _owning(fd, path)


def _owning(fd: int, path: str) -> StreamInput:
    """Return the stream of a descriptor, which is closed with it, and by errors."""
    try:
        mode = os.fstat(fd).st_mode
        if os.isatty(fd):
            raise ImgcoreError("is a terminal, not a pipe or a file", path=path)
        access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        # The command puts /dev/null in the place of a stdin that is closed.
        if stat.S_ISCHR(mode) and access == os.O_RDWR:
            raise ImgcoreError("is closed, or a device that is no source", path=path)
        if stat.S_ISDIR(mode) or stat.S_ISCHR(mode) or not stat.S_IFMT(mode):
            raise ImgcoreError(f"is {describe_file_type(mode)}, not a pipe or a file", path=path)
        if access == os.O_WRONLY:
            raise ImgcoreError("is open for writing only", path=path)
        refuse_messages(fd, path)
        return StreamInput(_Descriptor(fd), path)
    except BaseException:
        close(fd)
        raise


class _Descriptor:
    """A descriptor that this object owns; an `Origin`."""

    def __init__(self, fd: int) -> None:
        status = os.fstat(fd)
        self.identity: Identity = file_identity(status)
        self._fd = fd
        with suppress(OSError):
            if stat.S_ISFIFO(status.st_mode):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_NBYTES)
        self._wake = above_standard(lambda: os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    def readinto(self, view: memoryview, tick: Callable[[], None] | None, /) -> int:
        while True:
            # Files on disks are always ready.
            ready = dict(self._poll.poll(None if tick is None else _TICK_MS))
            if not ready and tick is not None:
                tick()
                continue
            if self._wake in ready:
                raise _cancelled()
            if ready.get(self._fd, 0) & select.POLLNVAL:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            with suppress(BlockingIOError):
                return os.readv(self._fd, [view])

    def read_now(self, view: memoryview) -> int | None:
        ready = dict(self._poll.poll(0))
        if self._fd not in ready or self._wake in ready:
            return None
        try:
            return os.readv(self._fd, [view])
        except BlockingIOError:
            return None

    def open_core(self, head: bytes, *, open_ended: bool, tail_nbytes: int) -> File:
        from imgcore._core import CoreError, File

        try:
            return File.from_stream(self._fd, head, open_ended=open_ended, tail_nbytes=tail_nbytes)
        except CoreError as error:
            raise OSError(error.os_errno, os.strerror(error.os_errno)) from error

    def cancel(self) -> bool:
        with suppress(OSError, ValueError):
            os.eventfd_write(self._wake, 1)
        return True

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        wake, self._wake = self._wake, -1
        for number in (fd, wake):
            if number >= 0:
                close(number)


class _Object:
    """An object of the caller's with ``readinto`` or ``read``; an `Origin`.

    A read that waits inside it cannot be ended.
    """

    read_now = None

    def __init__(self, source: Any, path: str) -> None:
        self._path = path
        self._readinto: Callable[[memoryview], Any] = getattr(source, "readinto", None) or (
            lambda view: self._copied(source.read(len(view)), view)
        )
        self.identity: Identity = object_identity(source)
        self._cancelled = threading.Event()

    def readinto(self, view: memoryview, _tick: Callable[[], None] | None, /) -> int:
        if self._cancelled.is_set():
            raise _cancelled()
        n = self._readinto(view)
        if n is None:
            raise ImgcoreError("has no bytes yet: an object must wait for them", path=self._path)
        if not isinstance(n, int) or not 0 <= n <= len(view):
            raise ImgcoreError(f"its read returned {n!r}: wrong for a stream", path=self._path)
        return n

    def _copied(self, data: Any, view: memoryview) -> int | None:
        if data is None:
            return None
        if isinstance(data, str):
            raise TypeError(f"{self._path}: a binary file object is needed, its read returns str")
        with memoryview(data) as octets:
            if octets.nbytes <= len(view):
                view[: octets.nbytes] = octets
            return octets.nbytes

    def open_core(self, head: bytes, *, open_ended: bool, tail_nbytes: int) -> None:
        return None

    def cancel(self) -> bool:
        self._cancelled.set()
        return False

    def close(self) -> None:
        """Do nothing: the object is the caller's."""


def _cancelled() -> ConversionCancelled:
    return ConversionCancelled("cancelled while it waited for a stream")
