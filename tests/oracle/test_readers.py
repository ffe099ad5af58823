"""Readers that share nothing with QEMU: dissect.hypervisor, and VirtualBox where installed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import images, own, qemu
from tests.helpers.images import RawImage
from tests.helpers.qemu import Variant

RawImages = Callable[[RawImage], Path]

VMDK_VARIANTS = (qemu.VMDK_SPARSE, qemu.VMDK_STREAM, qemu.VMDK_FLAT)
IMAGES = (images.SPARSE, images.DENSE, images.EMPTY)
each_image = pytest.mark.parametrize("image", IMAGES, ids=lambda i: i.name)


# In a process of its own: the library leaves files open, which is an error in this one.
DISSECT = """
import hashlib, pathlib, sys
from dissect.hypervisor.disk.{module} import {name}
disk = {name}({argument})
stream = disk.open() if hasattr(disk, "open") else disk
print(stream.size, hashlib.sha256(stream.read(stream.size)).hexdigest())
"""


def assert_dissect_reads(raw: Path, ours: Path, module: str, name: str, argument: str) -> None:
    pytest.importorskip("dissect.hypervisor")
    code = DISSECT.format(module=module, name=name, argument=argument)
    done = qemu.checked([sys.executable, "-c", code, str(ours)])
    assert done.stdout.split() == [str(raw.stat().st_size), images.sha256(raw)]


@each_image
@pytest.mark.parametrize("variant", [qemu.QCOW2, qemu.QCOW2_ZLIB], ids=lambda v: v.name)
def test_dissect_reads_qcow2(
    variant: Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    """It inflates with a 4 KiB window, the one that QEMU writes with."""
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


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize(
    "image", [*IMAGES, images.ODD, images.FRAGMENTED, images.FAR], ids=lambda i: i.name
)
@pytest.mark.parametrize("variant", VMDK_VARIANTS, ids=lambda v: v.name)
def test_virtualbox_reads_vmdk(
    variant: Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    program = qemu.require_vbox_img()
    raw, ours = raw_images(image), tmp_path / "ours.vmdk"
    own.convert(raw, ours, variant)
    back = tmp_path / "back.raw"
    words = ["convert", "--srcformat", "VMDK", "--dstformat", "RAW"]
    qemu.checked([program, *words, "--srcfilename", str(ours), "--dstfilename", str(back)])
    qemu.assert_same(raw, back, source_format="raw", target_format="raw")


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize("image", [*IMAGES, images.FRAGMENTED], ids=lambda i: i.name)
@pytest.mark.parametrize("kind", ["Standard", "Stream"])
def test_imgcore_reads_what_virtualbox_wrote(
    kind: str, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    program = qemu.require_vbox_img()
    raw = tmp_path / "copy.raw"
    shutil.copyfile(raw_images(image), raw)
    theirs = tmp_path / "theirs.vmdk"
    words = ["convert", "--srcformat", "RAW", "--dstformat", "VMDK", "--variant", kind]
    qemu.checked([program, *words, "--srcfilename", str(raw), "--dstfilename", str(theirs)])
    back = tmp_path / "back.raw"
    own.convert(theirs, back, qemu.RAW, source_format="vmdk")
    assert images.sha256(back) == images.sha256(raw)
