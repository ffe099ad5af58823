"""Named compression levels, chosen by measurements on real data (docs/codecs.md)."""

from __future__ import annotations

from typing import Final

from imgcore.engine.geometry import Codec, CodecId, DeflateEngine
from imgcore.errors import OptionError

LEVELS: Final = ("fastest", "fast", "default", "best")
DEFAULT_LEVEL: Final = "default"

_ISAL: Final = DeflateEngine.ISAL
_LIBDEFLATE: Final = DeflateEngine.LIBDEFLATE
_SAMPLED: Final = DeflateEngine.SAMPLED

# (wrapper, window_bits) -> level -> (library, its level).
#
# VMDK uses the zlib wrapper; its default must not be larger than zlib's level 6.
# QCOW2 uses raw DEFLATE; its default with the large window must not be larger than
# zlib's level 6 with the small one, and is much faster: a sample of each cluster
# decides which library compresses it.  libdeflate has the 32 KiB window only.
_SMALL_WINDOW: Final = {
    "fastest": (_ISAL, 0),
    "fast": (_ISAL, 1),
    "default": (_ISAL, 2),
    "best": (_ISAL, 3),
}
_DEFLATE: Final = {
    (CodecId.DEFLATE, 12): _SMALL_WINDOW,
    (CodecId.ZLIB, 12): _SMALL_WINDOW,
    (CodecId.DEFLATE, 15): {
        "fastest": (_ISAL, 1),
        "fast": (_ISAL, 3),
        "default": (_SAMPLED, 1),
        "best": (_LIBDEFLATE, 10),
    },
    (CodecId.ZLIB, 15): {
        "fastest": (_ISAL, 1),
        "fast": (_LIBDEFLATE, 1),
        "default": (_LIBDEFLATE, 5),
        "best": (_LIBDEFLATE, 10),
    },
}

# QEMU compresses with level 3; 2 is a quarter faster for 1.3 to 1.7 % of size.
_ZSTD: Final = {"fastest": -1, "fast": 1, "default": 2, "best": 12}
ZSTD_MIN_LEVEL: Final = -7
ZSTD_MAX_LEVEL: Final = 19


def deflate_codec(level: str, window_bits: int, wrapper: CodecId) -> Codec:
    """Return the codec of a named DEFLATE level.

    Parameters
    ----------
    level : str
        One of ``LEVELS``.
    window_bits : int
        12 (4 KiB) or 15 (32 KiB).
    wrapper : CodecId
        DEFLATE (raw) or ZLIB.

    Raises
    ------
    OptionError
        The level does not exist.
    """
    named = _DEFLATE[wrapper, window_bits]
    if level not in named:
        raise OptionError(f"level {level!r}: allowed are {', '.join(LEVELS)}")
    engine, number = named[level]
    return Codec(wrapper, engine, number, window_bits)


def zstd_codec(level: str) -> Codec:
    """Return the codec of a zstd level: one of ``LEVELS``, or zstd's own number.

    Raises
    ------
    OptionError
        The level does not exist, or the number is outside -7 .. 19.
    """
    number = _ZSTD.get(level)
    if number is None:
        try:
            number = int(level)
        except ValueError:
            number = ZSTD_MAX_LEVEL + 1
    if not ZSTD_MIN_LEVEL <= number <= ZSTD_MAX_LEVEL:
        raise OptionError(
            f"level {level!r}: allowed are {', '.join(LEVELS)} or a number from "
            f"{ZSTD_MIN_LEVEL} to {ZSTD_MAX_LEVEL}"
        )
    return Codec(CodecId.ZSTD, level=number)
