"""The suffixes of raw disks, plain and compressed."""

from __future__ import annotations

import os
from typing import Final

RAW_SUFFIXES: Final = (".raw", ".img", ".dd", ".bin")
# The suffix that follows a raw disk's, and the codec it stands for.
CODEC_OF_SUFFIX: Final = {".zst": "zstd", ".gz": "gzip"}
# The same as stated formats, where there is no name to have a suffix.  Only streams are
# read as xz.
CODEC_OF_FORMAT: Final = {"raw.zst": "zstd", "raw.gz": "gzip", "raw.xz": "xz"}


def stream_suffix(path: str) -> str | None:
    """Return ``.zst`` or ``.gz`` for the name of a compressed raw disk, else None."""
    stem, suffix = os.path.splitext(path.lower())
    if suffix in CODEC_OF_SUFFIX and os.path.splitext(stem)[1] in RAW_SUFFIXES:
        return suffix
    return None
