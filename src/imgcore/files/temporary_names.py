"""Names of temporaries and backups, and the removal of those of killed processes.

A name consists of a dot, the final name, the process and a random number.  The files
are in the target's folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from typing import Final

from imgcore.files.locks import folder_lock
from imgcore.log import log

_NAME_MAX: Final = 255  # bytes in a file name, Linux include/uapi/linux/limits.h
_BACKUP_SUFFIX: Final = "-old"
# Bytes of the final name that fit beside 7 digits of the process and 12 random ones.
_ROOM: Final = _NAME_MAX - len(b"..imgcore-") - 7 - 1 - 12 - len(_BACKUP_SUFFIX)
# Groups: final name, token.
_BACKUP: Final = re.compile(r"\.(.+)\.imgcore-(\d+-[0-9a-f]{12})-old", re.DOTALL)


def new_token() -> str:
    """Return a text that is unique among processes and files."""
    return f"{os.getpid()}-{os.urandom(6).hex()}"


def temporary_name(name: str, token: str) -> str:
    """Return the name of a temporary for a final name."""
    return _temporary_prefix(name) + token


def backup_name(name: str, token: str) -> str:
    """Return the name of an old file while several are replaced with one token."""
    return f"{_temporary_prefix(name)}{token}{_BACKUP_SUFFIX}"


def _temporary_prefix(name: str) -> str:
    """Return the start of a temporary's name, shortened so that the rest fits."""
    short = os.fsdecode(os.fsencode(name)[:_ROOM])
    return f".{short}.imgcore-"


def remove_stale(folder_fd: int, name: str) -> None:
    """Remove temporaries for this name whose process ended without removing them.

    The process number alone is not enough, because other hosts and containers may use
    the folder.  Temporaries that are being written are locked as well.
    """
    pattern = re.compile(re.escape(_temporary_prefix(name)) + r"(\d+)-[0-9a-f]{12}")
    try:
        names = [entry for entry in os.listdir(folder_fd) if entry.startswith(".")]
    except OSError:
        return
    for entry in names:
        match = pattern.fullmatch(entry)
        if match is None or _is_alive(int(match[1])):
            continue
        with contextlib.suppress(OSError):
            flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(entry, flags, dir_fd=folder_fd)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry, dir_fd=folder_fd)
            finally:
                os.close(fd)


def restore_interrupted(folder: str, name: str) -> None:
    """Restore the backups of a process that was killed while it replaced files.

    If the main file is missing, the backups get their names back, the main file last.
    If it exists, the replacement was complete, and the backups are removed.
    """
    try:
        entries = [entry for entry in os.listdir(folder) if entry.endswith(_BACKUP_SUFFIX)]
    except OSError:
        return
    matches = [match for entry in entries if (match := _BACKUP.fullmatch(entry))]
    own = [match[2] for match in matches if match[0] == backup_name(name, match[2])]
    for token in own:
        if _is_alive(int(token.partition("-")[0])):
            continue
        with contextlib.suppress(OSError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                with folder_lock(fd, os.path.join(folder, name)):
                    _restore(fd, folder, name, token)
            finally:
                os.close(fd)


def _restore(folder_fd: int, folder: str, name: str, token: str) -> None:
    """Undo or complete one replacement; the folder is locked."""
    matches = [_BACKUP.fullmatch(entry) for entry in os.listdir(folder_fd)]
    backups = [match for match in matches if match and match[2] == token]
    main = backup_name(name, token)
    if not all(_is_trusted(folder_fd, match[0]) for match in backups):
        return
    if _exists(folder_fd, name):
        for match in backups:
            os.unlink(match[0], dir_fd=folder_fd)
        return
    if any(len(os.fsencode(match[1])) >= _ROOM for match in backups):
        return  # the full name of a shortened one is not known
    for match in sorted(backups, key=lambda match: match[0] == main):
        os.rename(match[0], match[1], src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        with contextlib.suppress(OSError):
            os.fsync(folder_fd)
    log.warning("%s: an interrupted replacement has been undone", os.path.join(folder, name))


def _is_trusted(folder_fd: int, entry: str) -> bool:
    """Tell whether a file belongs to us or to the folder's owner."""
    owner = os.stat(entry, dir_fd=folder_fd, follow_symlinks=False).st_uid
    return owner in (os.geteuid(), os.fstat(folder_fd).st_uid)


def _exists(folder_fd: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
