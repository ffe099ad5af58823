"""The kinds of images that are written in place, for the tests of all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import imgcore


class UpdateVariant(NamedTuple):
    """A kind of image.

    Attributes
    ----------
    name : str
        For example ``vhdx-differencing``.
    make : callable
        ``make(folder, content)`` writes an image of that content into an empty folder,
        its parents included, and returns its path.  Some of it is not allocated.
    qemu_format : str or None
        What qemu-img calls the format; None if it does not read the image.
    sizes : tuple of int
        Sizes in bytes that it may be resized to; empty if it cannot be.
    """

    name: str
    make: Callable[[Path, bytes], Path]
    qemu_format: str | None
    sizes: tuple[int, ...] = ()


def converted(format: str, **options: object) -> Callable[[Path, bytes], Path]:
    """Return what makes an image by `imgcore.convert`."""

    def make(folder: Path, content: bytes) -> Path:
        source = folder / "source.raw"
        source.write_bytes(content)
        target = folder / f"disk.{format}"
        imgcore.convert(source, target, target_format=format, options=options)
        source.unlink()
        return target

    return make


def child(format: str, **options: object) -> Callable[[Path, bytes], Path]:
    """Return what makes a child of an image that has some of its content."""

    def make(folder: Path, content: bytes) -> Path:
        old = bytearray(content)
        for at in range(0, len(old), 300_000):
            old[at : at + 70_000] = b"parent's".ljust(70_000, b"p")[: len(old) - at]
        source = folder / "source.raw"
        source.write_bytes(old)
        parent = folder / f"parent.{format}"
        imgcore.convert(source, parent, target_format=format)
        source.write_bytes(content)
        target = folder / f"disk.{format}"
        imgcore.convert(
            source,
            target,
            target_format=format,
            backing=parent,
            backing_format=format,
            options=options,
        )
        source.unlink()
        return target

    return make


MIB: Final = 1 << 20
SIZES: Final = (MIB, 3 * MIB // 2, 4 * MIB)
VHDX: Final = (
    UpdateVariant("vhdx", converted("vhdx"), "vhdx", SIZES),
    UpdateVariant("vhdx-1M", converted("vhdx", block_size="1M"), "vhdx", SIZES),
    UpdateVariant("vhdx-8M", converted("vhdx", block_size="8M"), "vhdx", SIZES),
    UpdateVariant("vhdx-fixed", converted("vhdx", subformat="fixed"), "vhdx", SIZES),
    UpdateVariant("vhdx-4096", converted("vhdx", logical_sector_size="4096"), None, SIZES),
    UpdateVariant("vhdx-child", child("vhdx"), None, SIZES),
    UpdateVariant("vhdx-child-1M", child("vhdx", block_size="1M"), None, SIZES),
)
VARIANTS: Final = (
    UpdateVariant("raw", converted("raw"), "raw", SIZES),
    *VHDX,
)
