"""Tar archives in the old GNU format with one sparse file, for Google Compute Engine.

Python's tarfile makes the fields that all headers have, but cannot write sparse files.
Source: GNU tar manual, "Storing Sparse Files", "Old GNU Format"; its src/tar.h.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from typing import Final, NamedTuple

BLOCK_NBYTES: Final = 512
# GNU tar fills archives up to a multiple of 20 blocks.
RECORD_NBYTES: Final = 20 * BLOCK_NBYTES

# Fields of `struct oldgnu_header`, which follow those of every header.
_NAME: Final = slice(0, 100)
_SIZE: Final = slice(124, 136)
_CHECKSUM: Final = slice(148, 156)
_TYPE: Final = 156
_MAGIC: Final = slice(257, 265)
_SPARSE_OFFSET: Final = 386
_IS_EXTENDED: Final = 482
_REAL_SIZE: Final = slice(483, 495)
_N_SPARSE_IN_HEADER: Final = 4
# `struct sparse_header`: 21 entries, and whether another header follows.
_N_SPARSE_IN_EXTENSION: Final = 21
_EXTENSION_MORE: Final = 504
_NUMBER_NBYTES: Final = 12
_MAX_OCTAL: Final = 8**11 - 1

GNU_MAGIC: Final = b"ustar  \0"
_SPARSE_TYPE: Final = b"S"


def sparse_header(name: str, nbytes: int, segments: Sequence[tuple[int, int]]) -> bytes:
    """Return the header blocks of a sparse file, without an owner and a time.

    Parameters
    ----------
    name : str
        The file's name, at most 100 ASCII characters.
    nbytes : int
        The file's size, holes included.
    segments : sequence of (offset, length)
        The ranges with data, ascending, in bytes: multiples of 512, inside the file.
        Their data follows the header.
    """
    entries = list(segments)
    if not entries or sum(entries[-1]) < nbytes:
        entries.append((nbytes, 0))  # the file ends in a hole
    info = tarfile.TarInfo(name)
    info.size = sum(length for _, length in segments)
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    packed = [_number(offset) + _number(length) for offset, length in entries]
    first = b"".join(packed[:_N_SPARSE_IN_HEADER])
    header[_SPARSE_OFFSET : _SPARSE_OFFSET + len(first)] = first
    header[_IS_EXTENDED] = len(packed) > _N_SPARSE_IN_HEADER
    header[_REAL_SIZE] = _number(nbytes)
    header[_CHECKSUM] = b" " * 8
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header) + _extensions(packed[_N_SPARSE_IN_HEADER:])


def archive_end(n_before: int) -> bytes:
    """Return the end of an archive of ``n_before`` bytes: two zero blocks, padding."""
    end = n_before + 2 * BLOCK_NBYTES
    return bytes(-(-end // RECORD_NBYTES) * RECORD_NBYTES - n_before)


def _extensions(packed: Sequence[bytes]) -> bytes:
    blocks = []
    for first in range(0, len(packed), _N_SPARSE_IN_EXTENSION):
        last = first + _N_SPARSE_IN_EXTENSION
        block = b"".join(packed[first:last]).ljust(_EXTENSION_MORE, b"\0")
        blocks.append((block + bytes([last < len(packed)])).ljust(BLOCK_NBYTES, b"\0"))
    return b"".join(blocks)


def _number(value: int) -> bytes:
    """Return a number in octal digits, or in base 256 if it has too many of them."""
    if value <= _MAX_OCTAL:
        return b"%011o\0" % value
    return b"\x80" + value.to_bytes(_NUMBER_NBYTES - 1, "big")


class Member(NamedTuple):
    """Fields of an archive's first header; ``nbytes`` is the file's size with holes."""

    name: str
    nbytes: int
    is_old_gnu: bool
    is_sparse: bool


def parse_header(block: bytes) -> Member | None:
    """Return the fields of a header block of 512 bytes, None if it is not a header."""
    try:
        stated = _parse_number(block[_CHECKSUM])
        cleared = block[: _CHECKSUM.start] + b" " * 8 + block[_CHECKSUM.stop :]
        if len(block) != BLOCK_NBYTES or stated != sum(cleared):
            return None
        is_old_gnu = block[_MAGIC] == GNU_MAGIC
        is_sparse = is_old_gnu and block[_TYPE : _TYPE + 1] == _SPARSE_TYPE
        nbytes = _parse_number(block[_REAL_SIZE if is_sparse else _SIZE])
    except ValueError:
        return None
    name = block[_NAME].split(b"\0")[0].decode("utf-8", "surrogateescape")
    return Member(name, nbytes, is_old_gnu, is_sparse)


def _parse_number(field: bytes) -> int:
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)
