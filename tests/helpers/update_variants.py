"""The kinds of images that are written in place, for the tests of all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import imgcore
from tests.helpers import qemu, vmdk


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


def vmdk_child(subformat: str, **options: str) -> Callable[[Path, bytes], Path]:
    """Return what makes a child of a VMDK by qemu-img; `imgcore` writes its content."""

    def make(folder: Path, content: bytes) -> Path:
        other = bytearray(content)
        for at in range(0, len(other), 333_333):
            other[at : at + 50_000] = bytes(255 - byte for byte in other[at : at + 50_000])
        raw, parent, target = folder / "source.raw", folder / "base.vmdk", folder / "disk.vmdk"
        raw.write_bytes(other)
        imgcore.convert(raw, parent)
        raw.unlink()
        stated = ",".join(f"{key}={value}" for key, value in options.items())
        stated = f"subformat={subformat}" + (f",{stated}" if stated else "")
        qemu.run("create", "-q", "-f", "vmdk", "-b", parent, "-F", "vmdk", "-o", stated, target)
        with imgcore.open(target, mode="r+") as image:
            for at in range(0, len(other), 333_333):
                image.write(at, content[at : at + 50_000])
        return target

    return make


def vmdk_extents(folder: Path, content: bytes) -> Path:
    """Make a VMDK of two sparse extents and a flat one."""
    third = len(content) // (3 * 65536) * 65536
    pieces = content[:third], content[third : 2 * third], content[2 * third :]
    lines, raw = [], folder / "source.raw"
    for number, piece in enumerate(pieces[:2], 1):
        name = f"disk-s00{number}.vmdk"
        raw.write_bytes(piece)
        imgcore.convert(raw, folder / name)
        lines.append(f'RW {len(piece) // 512} SPARSE "{name}"')
    raw.unlink()
    (folder / "disk-f003.vmdk").write_bytes(bytes(512) + pieces[2])
    lines.append(f'RW {len(pieces[2]) // 512} FLAT "disk-f003.vmdk" 1')
    path = folder / "disk.vmdk"
    path.write_bytes(vmdk.descriptor("twoGbMaxExtentSparse", *lines))
    return path


MIB: Final = 1 << 20


def qcow2_with_snapshot(**options: object) -> Callable[[Path, bytes], Path]:
    """Return what makes an image with an internal snapshot of the same content."""

    def make(folder: Path, content: bytes) -> Path:
        path = converted("qcow2", **options)(folder, content)
        qemu.run("snapshot", "-c", "one", path)
        return path

    return make


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
_VHDX: Final = (
    UpdateVariant("vhdx", converted("vhdx"), "vhdx", SIZES),
    UpdateVariant("vhdx-1M", converted("vhdx", block_size="1M"), "vhdx", SIZES),
    UpdateVariant("vhdx-8M", converted("vhdx", block_size="8M"), "vhdx", SIZES),
    UpdateVariant(
        "vhdx-fixed", converted("vhdx", subformat="fixed", block_size="1M"), "vhdx", SIZES
    ),
    UpdateVariant(
        "vhdx-4096", converted("vhdx", logical_sector_size="4096", block_size="2M"), None, SIZES
    ),
    UpdateVariant("vhdx-differencing", child_of("vhdx"), None, SIZES),
    UpdateVariant("vhdx-differencing-1M", child_of("vhdx", block_size="1M"), None, SIZES),
    UpdateVariant(
        "vhdx-differencing-4096",
        child_of("vhdx", logical_sector_size="4096", block_size="1M"),
        None,
        SIZES,
    ),
)
_QCOW2_SIZES: Final = (MIB, 3 * MIB // 2 + 512, 4 * MIB)
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
    UpdateVariant("qcow2-overlay", child_of("qcow2"), "qcow2", _QCOW2_SIZES),
    UpdateVariant("qcow2-overlay-v2", child_of("qcow2", compat="0.10"), "qcow2"),
    UpdateVariant("qcow2-snapshot", qcow2_with_snapshot(), "qcow2", _QCOW2_SIZES),
    UpdateVariant(
        "qcow2-snapshot-2bit",
        qcow2_with_snapshot(cluster_size=1024, refcount_bits=2),
        "qcow2",
        _QCOW2_SIZES,
    ),
)
_VMDK: Final = (
    UpdateVariant("vmdk-sparse", converted("vmdk"), "vmdk", SIZES),
    UpdateVariant("vmdk-8k", converted("vmdk", grain_size=8192, zeroed_grain=True), "vmdk", SIZES),
    UpdateVariant("vmdk-flat", converted("vmdk", subformat="monolithicFlat"), "vmdk"),
    UpdateVariant("vmdk-child", vmdk_child("monolithicSparse"), "vmdk"),
    UpdateVariant("vmdk-child-zeroed", vmdk_child("monolithicSparse", zeroed_grain="on"), "vmdk"),
    UpdateVariant("vmdk-child-2gb", vmdk_child("twoGbMaxExtentSparse"), "vmdk"),
    UpdateVariant("vmdk-extents", vmdk_extents, "vmdk"),
)
VARIANTS: Final = (
    UpdateVariant("raw", converted("raw"), "raw", (MIB, 3 * MIB // 2, 4 * MIB)),
    *_VMDK,
    *_QCOW2,
    *_VHD,
    *_VHDX,
    *_VDI,
)
