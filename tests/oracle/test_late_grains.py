"""streamOptimized disks with their grains in any order, against qemu-img."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import imgcore
from tests.helpers import qemu, vmdk
from tests.helpers.dripping import dripping
from tests.helpers.images import MIB, SEED, RawImage, noise, text
from tests.helpers.qemu import Variant

RawImages = Callable[[RawImage], Path]

# Several grain tables, and more grains than wait for each other.
DISK = RawImage(
    "late",
    130 * MIB + 5 * 512,
    lambda: [
        (0, noise(40 * MIB)),
        (51 * MIB + 512, text(MIB)),
        (70 * MIB, noise(40 * MIB)),
        (130 * MIB + 512, text(4 * 512)),
    ],
)
# Text compresses so well that thousands of grains are in a few MiB of the stream.
LONG = RawImage(
    "long-late",
    330 * MIB,
    lambda: [(0, noise(160 * MIB)), (200 * MIB, text(MIB) * 100)],
)
TARGETS = (
    qemu.RAW,
    qemu.QCOW2,
    Variant("qcow2-2m", "qcow2", ("cluster_size=2M",)),
    qemu.VMDK_SPARSE,
    Variant("vmdk-flat", "vmdk", ("subformat=monolithicFlat",)),
    qemu.VHD_DYNAMIC,
    qemu.VHD_FIXED,
    qemu.VDI,
    qemu.VHDX_DYNAMIC,
)


@pytest.mark.parametrize("source", ["imgcore", "qemu"])
@pytest.mark.parametrize("variant", TARGETS, ids=lambda variant: variant.name)
def test_any_order(variant: Variant, source: str, raw_images: RawImages, tmp_path: Path) -> None:
    raw, ordered = raw_images(DISK), tmp_path / "ordered.vmdk"
    if source == "qemu":
        qemu.convert(raw, ordered, qemu.VMDK_STREAM)
    else:
        imgcore.convert(raw, ordered, options=["subformat=streamOptimized"], sync=False)
    shuffled = tmp_path / "shuffled.vmdk"
    shuffled.write_bytes(vmdk.reordered(ordered.read_bytes(), random.Random(SEED).shuffle))
    qemu.assert_same(raw, shuffled, source_format="raw", target_format="vmdk")
    options = [*variant.options, *variant.own_options]
    target, again = tmp_path / "target", tmp_path / "again"
    with dripping(shuffled) as stream:
        imgcore.convert(
            stream, target, format="vmdk", target_format=variant.format, options=options
        )
    imgcore.convert(ordered, again, target_format=variant.format, options=options, sync=False)
    qemu.assert_same(raw, target, source_format="raw", target_format=variant.format)
    if variant.format == "qcow2":
        qemu.assert_check_clean(target)
    assert qemu.data_nbytes(target, variant.format) == qemu.data_nbytes(again, variant.format)


def _last_first(grains: list[tuple[int, bytes]]) -> None:
    grains.insert(0, grains.pop())


def _two_passes(grains: list[tuple[int, bytes]]) -> None:
    grains[:] = grains[::2] + grains[1::2]


@pytest.mark.parametrize("arrange", [_last_first, _two_passes, list.reverse])
def test_order_of_a_long_stream(
    arrange: Callable[[list[tuple[int, bytes]]], None], raw_images: RawImages, tmp_path: Path
) -> None:
    """It is longer than what is in memory."""
    raw, made = raw_images(LONG), tmp_path / "made.vmdk"
    imgcore.convert(raw, made, options=["subformat=streamOptimized"], sync=False)
    made.write_bytes(vmdk.reordered(made.read_bytes(), arrange))
    target = tmp_path / "target.qcow2"
    with dripping(made) as stream:
        imgcore.convert(stream, target, format="vmdk", sync=False)
    qemu.assert_same(raw, target, source_format="raw", target_format="qcow2")
