"""What a job leaves of its files in the page cache, and how it goes past it."""

from __future__ import annotations

from enum import Enum
from typing import Final

from imgcore.errors import OptionError

_MEMINFO: Final = "/proc/meminfo"

# Linux include/uapi/linux/magic.h
_TMPFS_MAGIC: Final = 0x01021994
_RAMFS_MAGIC: Final = 0x858458F6
_DIRECT_MAGICS: Final = (
    0xEF53,  # ext2, ext3, ext4
    0x58465342,  # XFS
    0x9123683E,  # Btrfs
)

# A job keeps its files in memory if they take less than this part of what is available.
_KEPT_PART: Final = 16


class CacheMode(Enum):
    """How the files of one side of a job use the page cache.

    ``DIRECT`` drops what goes through it, as ``DROP`` does.
    """

    KEEP = "keep"
    DROP = "drop"
    DIRECT = "direct"
    AUTO = "auto"

    @classmethod
    def from_keyword(cls, value: str, name: str) -> CacheMode:
        """Return the mode; OptionError for another word.

        ``name`` is the keyword, for the message.
        """
        try:
            return cls(value)
        except ValueError:
            allowed = ", ".join(mode.value for mode in cls)
            raise OptionError(f"{name} is {value!r}, allowed: {allowed}") from None

    def for_file(self, magic: int | None, job_nbytes: int) -> CacheMode:
        """Return what the mode comes to for a file, which is not ``AUTO``.

        Parameters
        ----------
        magic : int or None
            The type of the file system.
        job_nbytes : int
            What the job reads, about.

        Notes
        -----
        Files that are only in memory have nothing to drop, and no cache to go past.
        The rule of ``AUTO`` follows from the figures in benchmarks/BENCHMARKING.md.
        """
        if magic in (_TMPFS_MAGIC, _RAMFS_MAGIC):
            return CacheMode.KEEP
        if self is not CacheMode.AUTO:
            return self
        if job_nbytes < free_memory_nbytes() // _KEPT_PART:
            return CacheMode.KEEP
        return CacheMode.DIRECT if magic in _DIRECT_MAGICS else CacheMode.DROP


def free_memory_nbytes() -> int:
    """Return how much memory the system could use for files; 0 if it does not tell."""
    try:
        with open(_MEMINFO, "rb") as file:
            for line in file:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0
