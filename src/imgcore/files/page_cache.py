"""What a job leaves of its files in the page cache."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from imgcore.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable


class CacheMode(Enum):
    """How the files of one side of a job use the page cache."""

    KEEP = "keep"
    DROP = "drop"

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


def use_page_cache(files: Iterable[object], mode: CacheMode) -> None:
    """Set the mode of files that are read; streams have no page cache."""
    if mode is CacheMode.KEEP:
        return
    from imgcore.files.host_file import OpenFile

    for file in files:
        if isinstance(file, OpenFile):
            file.use_cache(mode)
