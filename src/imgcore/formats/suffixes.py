"""The format that the suffix of a file's name states.

``.img``, an unknown suffix and none at all state no format, and neither does the name
of a block device.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from imgcore.formats.registry import DRIVERS
from imgcore.streams.names import CODEC_OF_SUFFIX

_NO_STATEMENT: Final = frozenset({".img"})
_OTHERS: Final = {
    **CODEC_OF_SUFFIX,
    ".tgz": "gzip",
    ".xz": "xz",
    ".tar": "tar",
    ".ova": "ova",
    ".zip": "zip",
    ".qed": "qed",
    ".dmg": "dmg",
}
_FORMATS: Final = {
    suffix: entry.name
    for entry in DRIVERS
    for suffix in entry.suffixes
    if suffix not in _NO_STATEMENT
} | _OTHERS


def stated_format(path: str | os.PathLike[str]) -> str | None:
    """Return the format that a name states; imgcore may not know it."""
    found = _FORMATS.get(os.path.splitext(os.fspath(path))[1].lower())
    return None if found is None or _is_block_device(path) else found


def suffix_of(format: str) -> str:
    """Return the usual suffix of a format."""
    return next((suffix for suffix, name in _FORMATS.items() if name == format), f".{format}")


def _is_block_device(path: str | os.PathLike[str]) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False
