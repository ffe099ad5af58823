"""Sparse files packed into few bytes, for the fuzzer and its corpus.

Images of several MiB are mostly zeros.  A packed image is the number of its format, its
size, and the pieces that are not zero: offset, length, bytes.
"""

from __future__ import annotations

import struct
from pathlib import Path

# 0 means "not stated": the format is found by the magic.
FORMATS = (None, "raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi")
MAX_FILE_NBYTES = 1 << 44

_HEAD = struct.Struct("<BQ")
_PIECE = struct.Struct("<QI")
# Shorter runs of zeros stay inside a piece.
_GAP = 2 * _PIECE.size


class Pieces:
    """The bytes of a file that are not zero.

    Attributes
    ----------
    format : str or None
        The format that is stated when the image is opened.
    nbytes : int
        The file's size.
    chunks : list of (offset, bytearray)
        Ascending and disjoint.
    """

    def __init__(self, format: str | None, nbytes: int) -> None:
        self.format = format
        self.nbytes = nbytes
        self.chunks: list[tuple[int, bytearray]] = []

    @classmethod
    def of(cls, content: bytes, format: str | None) -> Pieces:
        """Return the pieces of a whole file."""
        pieces = cls(format, len(content))
        at = 0
        while at < len(content):
            rest = content[at : at + (1 << 16)]
            blank = len(rest) - len(rest.lstrip(b"\0"))
            at += blank
            if blank == len(rest):
                continue
            end = content.find(bytes(_GAP), at)
            end = len(content) if end < 0 else end
            pieces.chunks.append((at, bytearray(content[at:end])))
            at = end
        return pieces

    @classmethod
    def unpack(cls, data: bytes) -> Pieces:
        """Return the pieces of packed bytes; any bytes are valid."""
        data = data.ljust(_HEAD.size, b"\0")
        kind, nbytes = _HEAD.unpack_from(data)
        pieces = cls(FORMATS[kind % len(FORMATS)], min(nbytes, MAX_FILE_NBYTES))
        at = _HEAD.size
        while at + _PIECE.size <= len(data):
            offset, length = _PIECE.unpack_from(data, at)
            at += _PIECE.size
            pieces.write(offset, data[at : at + length])
            at += length
        return pieces

    def pack(self) -> bytes:
        """Return the pieces as bytes."""
        out = [_HEAD.pack(FORMATS.index(self.format), self.nbytes)]
        for offset, chunk in self.chunks:
            out += [_PIECE.pack(offset, len(chunk)), chunk]
        return b"".join(out)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return bytes of the file; zeros between and after pieces."""
        out = bytearray(nbytes)
        for start, chunk in self.chunks:
            low, high = max(start, offset), min(start + len(chunk), offset + nbytes)
            if low < high:
                out[low - offset : high - offset] = chunk[low - start : high - start]
        return bytes(out)

    def write(self, offset: int, data: bytes) -> None:
        """Write bytes; the part outside the file is ignored."""
        data = data[: max(0, self.nbytes - offset)]
        if not data:
            return
        end = offset + len(data)
        touching = [c for c in self.chunks if c[0] <= end and c[0] + len(c[1]) >= offset]
        if touching:
            first, last = touching[0], touching[-1]
            start = min(offset, first[0])
            stop = max(end, last[0] + len(last[1]))
            merged = bytearray(self.read(start, stop - start))
            merged[offset - start : end - start] = data
        else:
            start, merged = offset, bytearray(data)
        self.chunks = [c for c in self.chunks if c not in touching]
        self.chunks.append((start, merged))
        self.chunks.sort(key=lambda chunk: chunk[0])

    def resize(self, nbytes: int) -> None:
        """Change the file's size; bytes after the new end are lost."""
        self.nbytes = max(0, min(nbytes, MAX_FILE_NBYTES))
        self.chunks = [
            (start, chunk[: self.nbytes - start])
            for start, chunk in self.chunks
            if start < self.nbytes
        ]

    def save(self, path: Path) -> None:
        """Write the file, sparse."""
        with open(path, "wb", buffering=0) as file:
            file.truncate(self.nbytes)
            for offset, chunk in self.chunks:
                file.seek(offset)
                file.write(chunk)
