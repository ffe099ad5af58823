"""Raw: the options of a new disk."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Option

OPTIONS: Final = (
    Option(
        "preallocation",
        "choice",
        "off",
        "reserve the whole file: by the file system (falloc), by writing zeros (full)",
        ("off", "falloc", "full"),
    ),
)
