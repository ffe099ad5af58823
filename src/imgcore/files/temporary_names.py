"""Names of temporaries and backups, and the removal of those of killed processes.

A name consists of a dot, the final name, the process and a random number.  The files
are in the target's folder.

The lock on a temporary alone tells whether a job still writes it.  The process ID says
nothing: it may belong to another container or host, or have been used again since.
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Final

from imgcore.files.descriptors import close, open_file
from imgcore.files.locks import Lock, folder_lock, lock
from imgcore.log import log

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAME_MAX: Final = 255  # bytes in a file name, Linux include/uapi/linux/limits.h
_BACKUP_SUFFIX: Final = "-old"
# Bytes of the final name that fit beside 7 digits of the process and 12 random ones.
_ROOM: Final = _NAME_MAX - len(b"..imgcore-") - 7 - 1 - 12 - len(_BACKUP_SUFFIX)
_TOKEN: Final = r"\d+-[0-9a-f]{12}"
# Groups: final name, token.
_BACKUP: Final = rf"(?s)\.(.+)\.imgcore-({_TOKEN})-old"


def new_token() -> str:
    """Return a text that is unique among processes and files."""
    return f"{os.getpid()}-{os.urandom(6).hex()}"


def temporary_name(name: str, token: str) -> str:
    """Return the name of a temporary for a final name."""
    return _temporary_prefix(name) + token


def backup_name(name: str, token: str) -> str:
    """Return the name of an old file while several are replaced with one token."""
    return f"{_temporary_prefix(name)}{token}{_BACKUP_SUFFIX}"


def partial_name(name: str) -> str:
    """Return the name of a target that outlives its job, until another completes it."""
    return f".{name}.imgcore-partial"


def token_of(temporary: str) -> str:
    """Return the token in the name of a temporary."""
    return temporary.rpartition(".imgcore-")[2]


def _temporary_prefix(name: str) -> str:
    """Return the start of a temporary's name, shortened so that the rest fits."""
    short = os.fsdecode(os.fsencode(name)[:_ROOM])
    return f".{short}.imgcore-"


def remove_stale(folder_fd: int, folder: str, name: str) -> None:
    """Remove temporaries for this name that no job writes any more."""
    prefix = _temporary_prefix(name)
    try:
        names = [entry for entry in os.listdir(folder_fd) if entry.startswith(prefix)]
    except OSError:
        return
    for entry in names:
        if not re.fullmatch(_TOKEN, entry.removeprefix(prefix)):
            continue
        # Unlinked under the lock: a job that has just created the file, and locks it
        # next, then finds the lock taken or the file without a name.
        with contextlib.suppress(OSError), _abandoned(folder_fd, folder, entry) as abandoned:
            if abandoned:
                os.unlink(entry, dir_fd=folder_fd)


@contextlib.contextmanager
def _abandoned(folder_fd: int, folder: str, entry: str) -> Iterator[bool]:
    """Tell whether a temporary's job has ended, and keep it locked if so.

    OSError if it cannot be opened.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        # NFS locks a file only if it is open for writing.
        fd = open_file(entry, flags | os.O_RDWR, folder_fd=folder_fd)
    except PermissionError:
        fd = open_file(entry, flags | os.O_RDONLY, folder_fd=folder_fd)
    try:
        outcome = lock(fd)
        if outcome is Lock.NOT_SUPPORTED:
            log.warning(
                "%s: left by a job that was killed, or still being written: this file "
                "system has no locks to tell; remove it if no job is running",
                os.path.join(folder, entry),
            )
        yield outcome is Lock.TAKEN
    finally:
        close(fd)


def restore_interrupted(folder: str, name: str) -> None:
    """Restore the backups of a process that was killed while it replaced files.

    If one of the files is missing, all backups get their names back, the main file
    last.  Otherwise the replacement was complete, and the backups are removed.
    """
    try:
        entries = [entry for entry in os.listdir(folder) if entry.endswith(_BACKUP_SUFFIX)]
    except OSError:
        return
    matches = [match for entry in entries if (match := re.fullmatch(_BACKUP, entry))]
    own = [match[2] for match in matches if match[0] == backup_name(name, match[2])]
    for token in own:
        with contextlib.suppress(OSError):
            fd = open_file(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                with folder_lock(fd, os.path.join(folder, name)):
                    _restore(fd, folder, name, token)
            finally:
                close(fd)


def _restore(folder_fd: int, folder: str, name: str, token: str) -> None:
    """Undo or complete one replacement; the folder is locked."""
    matches = [re.fullmatch(_BACKUP, entry) for entry in os.listdir(folder_fd)]
    backups = [match for match in matches if match and match[2] == token]
    if not all(_is_trusted(folder_fd, match[0]) for match in backups):
        return
    # A job has its temporaries open until the replacement is complete.  This is for
    # NFS, where the lock on a folder excludes processes of the same host only.
    for match in backups:
        temporary = match[0].removesuffix(_BACKUP_SUFFIX)
        with (
            contextlib.suppress(FileNotFoundError),
            _abandoned(folder_fd, folder, temporary) as abandoned,
        ):
            if not abandoned:
                return
    finals = {match[0]: _final_name(match, name) for match in backups}
    missing = [final is not None and not _exists(folder_fd, final) for final in finals.values()]
    if not any(missing):
        for backup in finals:
            os.unlink(backup, dir_fd=folder_fd)
        return
    if None in finals.values():
        return
    # Names that are missing come last, so that no old file is beside a new one.
    for _, (backup, final) in sorted(zip(missing, finals.items(), strict=True)):
        os.rename(backup, final or "", src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        with contextlib.suppress(OSError):
            os.fsync(folder_fd)
    log.warning("%s: an interrupted replacement has been undone", os.path.join(folder, name))


def _final_name(match: re.Match[str], name: str) -> str | None:
    """Return the final name of a backup, None if it is too long to be known."""
    if match[0] == backup_name(name, match[2]):
        return name
    return match[1] if len(os.fsencode(match[1])) < _ROOM else None


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
