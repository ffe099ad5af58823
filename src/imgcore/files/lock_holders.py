"""Finds the process that holds a lock on a file, to name it in a message."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

# A machine may have any number of open files; their user waits for the message.
MAX_DESCRIPTORS: Final = 50_000


def holder(fd: int, start: int, nbytes: int) -> str:
    """Return who holds a lock on bytes of an open file, in words.

    ``another process`` if the system does not tell: it tells of the caller's own
    processes, or of all to root, and not across containers.
    """
    wanted = os.fstat(fd)
    for pid, number in _descriptors():
        if pid == os.getpid() and number == fd:
            continue
        with contextlib.suppress(OSError):
            if not _has_lock(pid, number, wanted.st_ino, start, start + nbytes):
                continue
            if not os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), wanted):
                continue
            if pid == os.getpid():
                return "this process, which has it open already"
            return f"process {pid} ({_command(pid)})"
    return "another process"


def _descriptors() -> Iterator[tuple[int, int]]:
    """Yield (process, descriptor) of what this process may know of."""
    n_left = MAX_DESCRIPTORS
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            if not name.isdecimal():
                continue
            with contextlib.suppress(OSError):
                for number in os.listdir(f"/proc/{name}/fdinfo"):
                    yield int(name), int(number)
                    n_left -= 1
                    if not n_left:
                        return


def _has_lock(pid: int, number: int, inode: int, start: int, end: int) -> bool:
    """Tell whether a descriptor's open file has a lock on a byte of a range.

    A line of Linux proc_pid_fdinfo(5) is ``lock: 1: OFDLCK ADVISORY READ 7 fe:01:42 100
    103``: kind, mandatory or not, type, process, device and inode, first and last byte.
    """
    with open(f"/proc/{pid}/fdinfo/{number}", encoding="ascii", errors="replace") as lines:
        for line in lines:
            words = line.split()
            if len(words) != 9 or words[0] != "lock:" or words[2] not in ("OFDLCK", "POSIX"):
                continue
            if words[6].rpartition(":")[2] != str(inode):
                continue
            last = end if words[8] == "EOF" else int(words[8])
            if int(words[7]) < end and last >= start:
                return True
    return False


def _command(pid: int) -> str:
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return "".join(c if c.isprintable() else "?" for c in file.read().strip())
