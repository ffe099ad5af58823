"""Hostile raw disks, compressed streams, files of two formats, and special files."""

from __future__ import annotations

import gzip
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from tests.helpers import vhd
from tests.hostile import qcow2
from tests.hostile.case import Case, Stage, pattern

SIZE = 16 * 512
BOMB_NBYTES = 128 << 20


def _put(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return make


def _made(name: str, make: Callable[[Path], object]) -> Callable[[Path], Path]:
    def put(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return put


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(path.name)
    finally:
        os.chdir(here)


def _link_loop(path: Path) -> None:
    path.symlink_to("other.img")
    (path.parent / "other.img").symlink_to(path.name)


def cases() -> Iterator[Case]:
    """Yield the cases; check reports of every raw disk that it has no tables."""
    yield from _files()
    yield from _streams()


def _files() -> Iterator[Case]:
    no_suffix = _put("disk", pattern(SIZE))
    # info alone answers.
    yield Case("raw-no-suffix", no_suffix, "WrongFormatError", "use -f raw", stage=Stage.TABLES)
    for name, file, error, word in (
        ("is-vhdx", _put("disk.img", b"vhdxfile" + bytes(504)), "CorruptImageError", ""),
        ("is-luks", _put("disk", b"LUKS\xba\xbe" + bytes(506)), "UnsupportedFeatureError", "luks"),
        (
            "is-dmg",
            _put("disk", bytes(512) + b"koly".ljust(512, b"\0")),
            "UnsupportedFeatureError",
            "dmg",
        ),
        (
            "two-formats",
            _put("disk", qcow2.build() + vhd.footer(SIZE, vhd.FIXED)),
            "WrongFormatError",
            "more than one",
        ),
        ("folder", _made("disk.raw", os.mkdir), "ImgcoreError", "folder"),
        ("socket", _made("disk.raw", _socket), "ImgcoreError", "socket"),
        (
            "device-zero",
            _made("disk.raw", lambda path: path.symlink_to("/dev/zero")),
            "ImgcoreError",
            "character device",
        ),
        (
            "link-to-nothing",
            _made("disk.raw", lambda path: path.symlink_to("gone")),
            "FileNotFoundError",
            "",
        ),
        ("link-loop", _made("disk.raw", _link_loop), "OSError", ""),
    ):
        yield Case(f"raw-{name}", file, error, word)

    # info answers, because only headers are read.
    make = _put("disk.raw", qcow2.build())
    yield Case("raw-is-qcow2", make, "WrongFormatError", "magic of qcow2", Stage.CHAIN)
    for name in ("disk.img", "disk", "disk.example.com"):
        make = _put(name, qcow2.build({}, data=b"", extensions=_RAW, backing=b"base.raw"))
        yield Case(
            f"raw-{name}-names-a-file", make, "UnsafeReferenceError", "-f qcow2", Stage.CHAIN
        )


# The extension that states the backing file's format.
_RAW = qcow2.extension(0xE2792ACA, 3, b"raw\0\0\0\0\0")


def _streams() -> Iterator[Case]:
    text = pattern(SIZE)
    packed = gzip.compress(text, mtime=0)
    frame = zstandard.compress(text)
    # A frame header with a window of 2^41 bytes, and one that claims 1 PiB of content.
    window = b"\x28\xb5\x2f\xfd\x00\xf8" + struct.pack("<I", 512 << 3 | 1)[:3] + bytes(512)
    claim = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 50) + b"\x01\x00\x00"
    for name, suffix, content, error, word in (
        ("gz-cut", ".gz", packed[:-20], "CorruptImageError", ""),
        ("gz-checksum", ".gz", packed[:-8] + bytes(8), "CorruptImageError", ""),
        ("gz-garbage", ".gz", packed[:10] + b"\xff" * 500, "CorruptImageError", ""),
        ("gz-holds-qcow2", ".gz", gzip.compress(qcow2.build()), "WrongFormatError", "qcow2"),
        ("zst-cut", ".zst", frame[:-10], "CorruptImageError", ""),
        ("zst-garbage", ".zst", frame[:8] + b"\xff" * 100, "CorruptImageError", ""),
        ("zst-window", ".zst", window, "LimitExceededError", ""),
        ("zst-claim", ".zst", claim, "CorruptImageError", ""),
        ("zst-holds-qcow2", ".zst", zstandard.compress(qcow2.build()), "WrongFormatError", "qcow2"),
    ):
        make = _put(f"disk.raw{suffix}", content)
        yield Case(f"raw-{name}", make, error, word, Stage.STREAM)
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    content = bomb.compress(bytes(BOMB_NBYTES)) + bomb.flush()
    # Only zeros, so all holes, but larger than any file that this process may write.
    yield Case("raw-gz-bomb", _put("disk.raw.gz", content), "OSError", "", Stage.STREAM)
