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


def child_of(format: str, **options: object) -> Callable[[Path, bytes], Path]:
    """Return what makes a child whose parent has other bytes in some places."""

    def make(folder: Path, content: bytes) -> Path:
        other = bytearray(content)
        for at in range(0, len(other), 333_333):
            other[at : at + 50_000] = bytes(255 - byte for byte in other[at : at + 50_000])
        parent, target = folder / f"base.{format}", folder / f"disk.{format}"
        raw = folder / "source.raw"
        raw.write_bytes(other)
        imgcore.convert(raw, parent, target_format=format, options=options)
        raw.write_bytes(content)
        imgcore.convert(
            raw,
            target,
            target_format=format,
            options=options,
            backing=parent,
            backing_format=format,
        )
        raw.unlink()
        return target

    return make


MIB: Final = 1 << 20
SIZES: Final = (MIB, 3 * MIB // 2, 4 * MIB)
_VHD: Final = (
    UpdateVariant("vhd-fixed", converted("vhd", subformat="fixed"), "vpc", SIZES),
    UpdateVariant("vhd-dynamic", converted("vhd", block_size="512k"), "vpc", SIZES),
    UpdateVariant("vhd-dynamic-2m", converted("vhd"), "vpc", SIZES),
    UpdateVariant("vhd-batmap", converted("vhd", batmap=True, block_size="512k"), "vpc", SIZES),
    UpdateVariant("vhd-differencing", child_of("vhd", block_size="512k"), None),
    UpdateVariant("vhd-differencing-2m", child_of("vhd"), None),
)
_VDI: Final = (
    UpdateVariant("vdi-dynamic", converted("vdi"), "vdi", SIZES),
    UpdateVariant("vdi-128k", converted("vdi", block_size="128k"), None, SIZES),
    UpdateVariant("vdi-fixed", converted("vdi", subformat="fixed"), "vdi", SIZES),
    UpdateVariant("vdi-differencing", child_of("vdi", block_size="128k"), None),
)
_QCOW2: Final = (
    UpdateVariant("qcow2", converted("qcow2"), "qcow2"),
    UpdateVariant("qcow2-v2", converted("qcow2", compat="0.10"), "qcow2"),
    UpdateVariant("qcow2-512", converted("qcow2", cluster_size=512, refcount_bits=64), "qcow2"),
    UpdateVariant("qcow2-4k", converted("qcow2", cluster_size="4k", refcount_bits=1), "qcow2"),
    UpdateVariant("qcow2-2M", converted("qcow2", cluster_size="2M"), "qcow2"),
)
VARIANTS: Final = (
    UpdateVariant("raw", converted("raw"), "raw", (MIB, 3 * MIB // 2, 4 * MIB)),
    UpdateVariant("vmdk-sparse", converted("vmdk"), "vmdk"),
    UpdateVariant("vmdk-8k", converted("vmdk", grain_size=8192, zeroed_grain=True), "vmdk"),
    UpdateVariant("vmdk-flat", converted("vmdk", subformat="monolithicFlat"), "vmdk"),
    *_QCOW2,
    *_VHD,
    *_VDI,
)
