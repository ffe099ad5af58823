"""The names of files that are being written or replaced, and what a killed process leaves.

All of them start with a dot and the final name, so that they lie beside the target, and hold
the process and a random number.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from typing import TYPE_CHECKING, Final

from imgcore.files.locks import folder_lock
from imgcore.log import log

if TYPE_CHECKING:
    pass

_NAME_MAX: Final = 255  # bytes in a file name, Linux include/uapi/linux/limits.h
_BACKUP_SUFFIX: Final = "-old"
# Bytes of the final name that fit beside the rest: 7 digits of the process, 12 random ones.
_ROOM: Final = _NAME_MAX - len(b"..imgcore-") - 7 - 1 - 12 - len(_BACKUP_SUFFIX)
# Final name, and token.
_BACKUP: Final = re.compile(r"\.(.+)\.imgcore-(\d+-[0-9a-f]{12})-old", re.DOTALL)


def new_token() -> str:
    """Return what no other process, and no other file of this one, has in its names."""
    return f"{os.getpid()}-{os.urandom(6).hex()}"


def temporary_name(name: str, token: str) -> str:
    """Return the name of a temporary for a final name."""
    return _temporary_prefix(name) + token


def backup_name(name: str, token: str) -> str:
    """Return where a file is kept while several are replaced; they have one token."""
    return f"{_temporary_prefix(name)}{token}{_BACKUP_SUFFIX}"


def _temporary_prefix(name: str) -> str:
    """Return the start of the temporaries' names, short enough for what follows it."""
    short = os.fsdecode(os.fsencode(name)[:_ROOM])
    return f".{short}.imgcore-"


def remove_stale(folder_fd: int, name: str) -> None:
    """Remove temporaries for this name whose process has ended without removing them.

    The process number alone would mislead (other hosts, other containers); a temporary that
    is being written is locked as well.
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
    """Put back what a process took out of the way and did not live to replace.

    Several files are replaced with the old ones set aside.  If the main one is missing, the
    old ones are put back, the main one last; if it is there, the replacement was complete.
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
    """Undo, or end, one replacement; the folder is locked."""
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
        return  # a name that was cut short cannot be given back
    for match in sorted(backups, key=lambda match: match[0] == main):
        os.rename(match[0], match[1], src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        with contextlib.suppress(OSError):
            os.fsync(folder_fd)
    log.warning(
        "%s: a replacement that was interrupted has been undone", os.path.join(folder, name)
    )


def _is_trusted(folder_fd: int, entry: str) -> bool:
    """Tell whether a file was put there by us, or by the folder's owner, who may do anything."""
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
