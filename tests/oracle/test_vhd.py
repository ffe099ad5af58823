"""VHD images of imgcore, qemu-img and VirtualBox, each read by the other programs."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import imgcore
from tests.helpers import images, own, qemu
from tests.helpers.images import MIB, RawImage
from tests.helpers.other_readers import assert_dissect_reads, assert_libvhdi_reads

RawImages = Callable[[RawImage], Path]

IMAGES = (images.SPARSE, images.DENSE, images.EMPTY, images.ODD, images.TINY)
VARIANTS = (
    qemu.VHD_DYNAMIC,
    qemu.VHD_FIXED,
    qemu.VHD_DYNAMIC.with_options("block_size=512k"),
    qemu.VHD_DYNAMIC.with_options("batmap=on"),
)
each_image = pytest.mark.parametrize("image", IMAGES, ids=lambda i: i.name)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)


def sha256_of(path: Path) -> str:
    sha = hashlib.sha256()
    with imgcore.open(str(path)) as image:
        for offset in range(0, image.virtual_size, MIB):
            sha.update(image.read(offset, min(MIB, image.virtual_size - offset)))
    return sha.hexdigest()


@each_image
@each_variant
def test_qemu_takes_the_exact_size(
    variant: qemu.Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    raw, ours = raw_images(image), tmp_path / "ours.vhd"
    own.convert(raw, ours, variant)
    assert qemu.info(ours, "vhd")["virtual-size"] == image.virtual_size
    qemu.assert_same(raw, ours, source_format="raw", target_format="vhd")


@pytest.mark.parametrize("image", [images.SPARSE, images.ODD, images.TINY], ids=lambda i: i.name)
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
def test_size_rounded_as_qemu_rounds_it(
    subformat: str, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    """Without force_size, qemu-img rounds sizes up to those that a geometry has."""
    raw, ours, theirs = raw_images(image), tmp_path / "ours.vhd", tmp_path / "theirs.vhd"
    options = (f"subformat={subformat}",)
    qemu.convert(raw, theirs, qemu.Variant("vhd", "vhd", options))
    own.convert(raw, ours, qemu.Variant("vhd", "vhd", (*options, "size=chs")))
    sizes = {qemu.info(path, "vhd")["virtual-size"] for path in (ours, theirs)}
    assert sizes == {imgcore.info(str(path))["virtual-size"] for path in (ours, theirs)}
    assert len(sizes) == 1
    qemu.assert_same(ours, theirs, source_format="vhd", target_format="vhd")
    assert sha256_of(ours) == sha256_of(theirs)


@each_image
@each_variant
def test_dissect_reads(
    variant: qemu.Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    raw, ours = raw_images(image), tmp_path / "ours.vhd"
    own.convert(raw, ours, variant)
    assert_dissect_reads(raw, ours, "vhd", "VHD", "open(sys.argv[1], 'rb')")


@each_image
@each_variant
def test_libvhdi_reads(
    variant: qemu.Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    raw, ours = raw_images(image), tmp_path / "ours.vhd"
    own.convert(raw, ours, variant)
    assert_libvhdi_reads(raw, ours)


def test_libvhdi_reads_a_differencing_disk(raw_images: RawImages, tmp_path: Path) -> None:
    old = raw_images(images.DENSE)
    own.convert(old, tmp_path / "base.vhd", qemu.VHD_DYNAMIC)
    content = bytearray(old.read_bytes())
    content[5:9] = b"mine"
    content[3 * MIB : 4 * MIB] = bytes(MIB)
    changed = tmp_path / "changed.raw"
    changed.write_bytes(content)
    top = tmp_path / "top.vhd"
    imgcore.convert(
        str(changed), str(top), format="raw", backing="base.vhd", backing_format="vhd", sync=False
    )
    assert sha256_of(top) == images.sha256(changed)
    assert_libvhdi_reads(changed, top, tmp_path / "base.vhd")


@pytest.mark.slow
@pytest.mark.peers
@each_image
@each_variant
def test_virtualbox_reads(
    variant: qemu.Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    program = qemu.require_vbox_img()
    raw, ours, back = raw_images(image), tmp_path / "ours.vhd", tmp_path / "back.raw"
    own.convert(raw, ours, variant)
    words = ["convert", "--srcformat", "VHD", "--dstformat", "RAW"]
    qemu.checked([program, *words, "--srcfilename", str(ours), "--dstfilename", str(back)])
    assert back.stat().st_size == image.virtual_size
    qemu.assert_same(raw, back, source_format="raw", target_format="raw")


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize(
    "image", [*IMAGES[:-1], images.FRAGMENTED, images.SMALL_FRAGMENTS], ids=lambda i: i.name
)
@pytest.mark.parametrize("kind", ["Standard", "Fixed"])
def test_imgcore_reads_what_virtualbox_wrote(
    kind: str, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    """Its sector bitmaps mark only the written sectors."""
    program = qemu.require_vbox_img()
    raw, theirs = tmp_path / "copy.raw", tmp_path / "theirs.vhd"
    shutil.copyfile(raw_images(image), raw)
    words = ["convert", "--srcformat", "RAW", "--dstformat", "VHD", "--variant", kind]
    qemu.checked([program, *words, "--srcfilename", str(raw), "--dstfilename", str(theirs)])
    with imgcore.open(str(theirs)) as opened:
        assert opened.virtual_size == image.virtual_size
    assert sha256_of(theirs) == images.sha256(raw)
    assert imgcore.check(str(theirs)).ok
