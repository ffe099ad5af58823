"""What a job leaves of its files in the page cache."""

from __future__ import annotations

from enum import Enum

from imgcore.errors import OptionError


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
