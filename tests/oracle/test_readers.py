"""Readers independent of QEMU: dissect.hypervisor, and VirtualBox if installed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import imgcore
from tests.helpers import images, own, qemu
from tests.helpers.images import RawImage
from tests.helpers.other_readers import assert_dissect_reads
from tests.helpers.qemu import Variant

RawImages = Callable[[RawImage], Path]

VDI_VARIANTS = (qemu.VDI, qemu.VDI_FIXED, qemu.VDI.with_options("block_size=128k"))
VMDK_VARIANTS = (qemu.VMDK_SPARSE, qemu.VMDK_STREAM, qemu.VMDK_FLAT)
IMAGES = (images.SPARSE, images.DENSE, images.EMPTY)
each_image = pytest.mark.parametrize("image", IMAGES, ids=lambda i: i.name)


@each_image
@pytest.mark.parametrize("variant", [qemu.QCOW2, qemu.QCOW2_ZLIB], ids=lambda v: v.name)
def test_dissect_reads_qcow2(
    variant: Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    """It inflates with a 4 KiB window, as QEMU writes it."""
    raw, ours = raw_images(image), tmp_path / "ours.qcow2"
    own.convert(raw, ours, variant)
    assert_dissect_reads(raw, ours, "qcow2", "QCow2", "open(sys.argv[1], 'rb')")


@each_image
@pytest.mark.parametrize("variant", VMDK_VARIANTS, ids=lambda v: v.name)
def test_dissect_reads_vmdk(
    variant: Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    raw, ours = raw_images(image), tmp_path / "ours.vmdk"
    own.convert(raw, ours, variant)
    assert_dissect_reads(raw, ours, "vmdk", "VMDK", "pathlib.Path(sys.argv[1])")


@each_image
@pytest.mark.parametrize("variant", VDI_VARIANTS, ids=lambda v: v.name)
def test_dissect_reads_vdi(
    variant: Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    raw, ours = raw_images(image), tmp_path / "ours.vdi"
    own.convert(raw, ours, variant)
    assert_dissect_reads(raw, ours, "vdi", "VDI", "pathlib.Path(sys.argv[1])")


def test_dissect_reads_a_differencing_vdi(raw_images: RawImages, tmp_path: Path) -> None:
    """Some blocks are changed, some became zeros, and some are in the parent only."""
    raw = raw_images(images.DENSE)
    own.convert(raw, tmp_path / "base.vdi", qemu.VDI)
    changed = tmp_path / "changed.raw"
    data = bytearray(raw.read_bytes())
    data[2 << 20 : 3 << 20] = bytes(1 << 20)
    data[(4 << 20) + 700 : (4 << 20) + 704] = b"word"
    changed.write_bytes(data)
    child = tmp_path / "child.vdi"
    imgcore.convert(changed, child, format="raw", backing="base.vdi", backing_format="vdi")
    result = imgcore.check(child)
    assert result.ok
    assert result.allocated_clusters == 1
    argument = "open(sys.argv[1], 'rb'), VDI(open('base.vdi', 'rb')).open()"
    assert_dissect_reads(changed, child, "vdi", "VDI", argument)
    assert imgcore.compare(changed, child, format_a="raw").identical


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize(
    "image", [*IMAGES, images.ODD, images.FRAGMENTED, images.FAR], ids=lambda i: i.name
)
@pytest.mark.parametrize("variant", [*VMDK_VARIANTS, *VDI_VARIANTS], ids=lambda v: v.name)
def test_virtualbox_reads(
    variant: Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    program = qemu.require_vbox_img()
    raw, ours = raw_images(image), tmp_path / f"ours{variant.suffix}"
    own.convert(raw, ours, variant)
    back = tmp_path / "back.raw"
    words = ["convert", "--srcformat", variant.format.upper(), "--dstformat", "RAW"]
    qemu.checked([program, *words, "--srcfilename", str(ours), "--dstfilename", str(back)])
    qemu.assert_same(raw, back, source_format="raw", target_format="raw")


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize("image", [*IMAGES, images.FRAGMENTED], ids=lambda i: i.name)
@pytest.mark.parametrize(
    ("image_format", "kind"),
    [("vmdk", "Standard"), ("vmdk", "Stream"), ("vdi", "Standard"), ("vdi", "Fixed")],
)
def test_imgcore_reads_what_virtualbox_wrote(
    image_format: str, kind: str, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    program = qemu.require_vbox_img()
    raw = tmp_path / "copy.raw"
    shutil.copyfile(raw_images(image), raw)
    theirs = tmp_path / f"theirs.{image_format}"
    words = ["convert", "--srcformat", "RAW", "--dstformat", image_format.upper()]
    words += ["--variant", kind]
    qemu.checked([program, *words, "--srcfilename", str(raw), "--dstfilename", str(theirs)])
    back = tmp_path / "back.raw"
    own.convert(theirs, back, qemu.RAW, source_format=image_format)
    assert images.sha256(back) == images.sha256(raw)
    assert imgcore.check(theirs).ok
