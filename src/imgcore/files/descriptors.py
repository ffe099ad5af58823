"""Opens and closes descriptors.

* No file of ours has one of the numbers 0 to 2.  A program that was started without
  stdin, stdout or stderr would otherwise print into an image.
* Errors carry the name of a file, which those of calls on descriptors lack.
* A forked child gives up what the targets of its parent use.  A lock belongs to the
  open file, not to the process: a helper that outlives a killed job would keep the
  job's locks, and what the job left would never be removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FIRST_NUMBER: Final = 3

# Held while a descriptor is opened or closed, so that no child gets one unnoticed.
# Reentrant, because a signal handler may fork.
_forking: Final = threading.RLock()
_given_up_by_children: Final[set[int]] = set()


def open_file(
    path: str, flags: int, mode: int = 0o666, *, folder_fd: int | None = None, name: str = ""
) -> int:
    """Open a file, which programs that are started do not inherit.

    Parameters
    ----------
    path : str
        The file; a relative name starts at ``folder_fd`` if that is given.
    flags, mode : int
        As for `os.open`.
    folder_fd : int, optional
        A folder.
    name : str
        The name in messages; by default ``path``.
    """
    with named_errors(name or path):
        try:
            return above_standard(
                lambda: os.open(path, flags | os.O_CLOEXEC, mode, dir_fd=folder_fd)
            )
        except BlockingIOError as error:
            # A lease; the caller does not wait for its end.
            raise BlockingIOError(error.errno, "Another program has it open") from None


def above_standard(open_it: Callable[[], int]) -> int:
    """Open something whose number is at least 3; ``open_it`` returns its descriptor."""
    with standard_numbers_taken():
        fd = open_it()
    if fd >= _FIRST_NUMBER:
        return fd
    # Another thread has closed one in the meantime.
    try:
        return duplicate(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def standard_numbers_taken() -> Iterator[None]:
    """Occupy the numbers 0 to 2, as far as they are free, in a ``with`` block.

    Not even for a moment may another thread print into a file that is opened there.
    """
    taken: list[int] = []
    try:
        for number in range(_FIRST_NUMBER):
            if not _is_open(number):
                taken.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        yield
    finally:
        for number in taken:
            os.close(number)


def duplicate(fd: int) -> int:
    """Return another descriptor of an open file."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_NUMBER)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError as error:
        if not is_of_system(error):
            raise
        return False
    return True


def is_of_system(error: OSError) -> bool:
    """Tell whether the system raised it, not a signal handler, as in TimeoutError()."""
    return error.errno is not None


@contextlib.contextmanager
def forks_held_back() -> Iterator[None]:
    """Let no other thread fork between `open_file` and `give_up_in_children`."""
    with _forking:
        yield


def give_up_in_children(fd: int) -> None:
    """Have forked children close a descriptor, which `close` closes in this process."""
    _given_up_by_children.add(fd)


def share_fate(fd: int, other: int) -> None:
    """Have forked children close a descriptor if they close ``other``."""
    if other in _given_up_by_children:
        give_up_in_children(fd)


def close(fd: int) -> None:
    """Close a descriptor."""
    with _forking:
        _given_up_by_children.discard(fd)
        os.close(fd)


def _give_up() -> None:
    """Put /dev/null in the place of the parent's files, in a child.

    The numbers stay taken, because objects in the child still have them.
    """
    try:
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        for fd in _given_up_by_children:
            os.dup2(null, fd, inheritable=False)
        os.close(null)
    except OSError:
        for fd in _given_up_by_children:
            os.close(fd)
    finally:
        _given_up_by_children.clear()
        _forking.release()


os.register_at_fork(
    before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_give_up
)


@contextlib.contextmanager
def named_errors(path: str) -> Iterator[None]:
    """Put a file's name into OSErrors, and what can be done about some of them."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise  # as `is_of_system`
        text = error.strerror or os.strerror(error.errno)
        if error.errno == errno.EMFILE:
            text = _too_many_open()
        raise OSError(error.errno, text, path) from error


def _too_many_open() -> str:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = "root may raise it: prlimit --nofile=N COMMAND"
    if soft != hard:
        advice = "resource.setrlimit(resource.RLIMIT_NOFILE, ...) raises it"
    return f"{os.strerror(errno.EMFILE)}: the limit of this process is {soft}; {advice}"
