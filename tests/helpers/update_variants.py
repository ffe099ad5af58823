"""The kinds of images that are written in place, for the tests of all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import imgcore
from tests.helpers import qemu


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


def converted(
    format: str, *, compress: bool = False, **options: object
) -> Callable[[Path, bytes], Path]:
    """Return what makes an image by `imgcore.convert`."""

    def make(folder: Path, content: bytes) -> Path:
        source = folder / "source.raw"
        source.write_bytes(content)
        target = folder / f"disk.{format}"
        imgcore.convert(source, target, target_format=format, options=options, compress=compress)
        source.unlink()
        return target

    return make


MIB: Final = 1 << 20


def qcow2_overlay(**options: object) -> Callable[[Path, bytes], Path]:
    """Return what makes an overlay that has each third 24 KiB of its disk."""

    def make(folder: Path, content: bytes) -> Path:
        step = 24 * 1024
        base = bytearray(content)
        for start in range(0, len(content), 3 * step):
            base[start : start + step] = bytes(255 - byte for byte in base[start : start + step])
        (folder / "base.raw").write_bytes(base)
        source = folder / "source.raw"
        source.write_bytes(content)
        target = folder / "disk.qcow2"
        imgcore.convert(
            source,
            target,
            backing=folder / "base.raw",
            backing_format="raw",
            options=options,
        )
        source.unlink()
        return target

    return make


def qcow2_with_snapshot(**options: object) -> Callable[[Path, bytes], Path]:
    """Return what makes an image with an internal snapshot of the same content."""

    def make(folder: Path, content: bytes) -> Path:
        path = converted("qcow2", **options)(folder, content)
        qemu.run("snapshot", "-c", "one", path)
        return path

    return make


_QCOW2_SIZES: Final = (MIB, 3 * MIB // 2 + 512, 4 * MIB, 40 * MIB)
_QCOW2: Final = (
    UpdateVariant("qcow2", converted("qcow2"), "qcow2", _QCOW2_SIZES),
    UpdateVariant("qcow2-v2", converted("qcow2", compat="0.10"), "qcow2", _QCOW2_SIZES),
    UpdateVariant(
        "qcow2-512", converted("qcow2", cluster_size=512, refcount_bits=64), "qcow2", _QCOW2_SIZES
    ),
    UpdateVariant(
        "qcow2-4k", converted("qcow2", cluster_size="4k", refcount_bits=1), "qcow2", _QCOW2_SIZES
    ),
    UpdateVariant("qcow2-2M", converted("qcow2", cluster_size="2M"), "qcow2", _QCOW2_SIZES),
    UpdateVariant(
        "qcow2-compressed",
        converted("qcow2", compress=True, cluster_size="16k"),
        "qcow2",
        _QCOW2_SIZES,
    ),
    UpdateVariant("qcow2-overlay", qcow2_overlay(), "qcow2", _QCOW2_SIZES),
    UpdateVariant("qcow2-overlay-v2", qcow2_overlay(compat="0.10"), "qcow2"),
    UpdateVariant("qcow2-snapshot", qcow2_with_snapshot(), "qcow2", _QCOW2_SIZES),
    UpdateVariant(
        "qcow2-snapshot-2bit",
        qcow2_with_snapshot(cluster_size=1024, refcount_bits=2),
        "qcow2",
        _QCOW2_SIZES,
    ),
)
VARIANTS: Final = (
    UpdateVariant("raw", converted("raw"), "raw", (MIB, 3 * MIB // 2, 4 * MIB)),
    UpdateVariant("vmdk-sparse", converted("vmdk"), "vmdk"),
    UpdateVariant("vmdk-8k", converted("vmdk", grain_size=8192, zeroed_grain=True), "vmdk"),
    UpdateVariant("vmdk-flat", converted("vmdk", subformat="monolithicFlat"), "vmdk"),
    *_QCOW2,
)
