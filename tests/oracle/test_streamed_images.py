"""Images that come in order, against what qemu-img and VirtualBox have written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import imgcore
from imgcore.disk import streamed_window
from tests.helpers import images, own, qemu
from tests.helpers.dripping import dripping, piped
from tests.helpers.images import MIB, RawImage, noise, text
from tests.helpers.qemu import Variant
from tests.helpers.samples import SHARED, unpacked_samples

RawImages = Callable[[RawImage], Path]

# More than the window of the latest bytes, with holes, zeros, and text that compresses.
LONG = RawImage(
    "long",
    200 * MIB + 5 * 512,
    lambda: [
        (0, noise(70 * MIB)),
        (81 * MIB + 512, text(MIB)),
        (100 * MIB, noise(95 * MIB)),
        (200 * MIB + 512, text(4 * 512)),
    ],
)
SMALL_CLUSTERS = Variant("qcow2-4k", "qcow2", ("cluster_size=4k",))
LARGE_CLUSTERS = Variant("qcow2-2m", "qcow2", ("cluster_size=2M",))
METADATA = Variant("qcow2-metadata", "qcow2", ("preallocation=metadata",))
# Fixed VHDs and flat files start with the disk; their streams are tested elsewhere.
WRITTEN_IN_ORDER = (
    qemu.QCOW2,
    SMALL_CLUSTERS,
    LARGE_CLUSTERS,
    qemu.QCOW2_ZLIB,
    qemu.QCOW2_ZSTD,
    qemu.VMDK_SPARSE,
    qemu.VMDK_STREAM,
    qemu.VHD_DYNAMIC,
    qemu.VDI,
    qemu.VHDX_DYNAMIC,
)
TARGETS = (
    qemu.RAW,
    qemu.QCOW2,
    qemu.QCOW2_ZSTD,
    qemu.VMDK_SPARSE,
    qemu.VMDK_STREAM,
    qemu.VHD_DYNAMIC,
    qemu.VHD_FIXED,
    qemu.VDI,
    qemu.VHDX_DYNAMIC,
)


def convert(source: Path, target: Path, variant: Variant, source_format: str) -> None:
    """Convert a file that comes in pieces of random sizes."""
    with dripping(source) as stream:
        imgcore.convert(
            stream,
            target,
            format=source_format,
            target_format=variant.format,
            options=[*variant.options, *variant.own_options],
            compress=variant.compress,
            sync=False,
        )


def assert_streams(raw: Path, image: Path, image_format: str, back: Path) -> None:
    convert(image, back, qemu.RAW, image_format)
    qemu.assert_same(raw, back, source_format="raw", target_format="raw")


@pytest.mark.parametrize("image", [images.SPARSE, images.ODD], ids=lambda each: each.name)
@pytest.mark.parametrize("variant", [*WRITTEN_IN_ORDER, METADATA], ids=lambda each: each.name)
def test_what_qemu_img_wrote(
    variant: Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    raw, theirs = raw_images(image), tmp_path / f"theirs{variant.suffix}"
    qemu.convert(raw, theirs, variant)
    assert_streams(raw, theirs, variant.format, tmp_path / "back.raw")


@pytest.mark.parametrize("nbytes", [1, 512, 60000])
@pytest.mark.parametrize("variant", WRITTEN_IN_ORDER, ids=lambda each: each.name)
def test_other_bytes_after_what_qemu_img_wrote(
    variant: Variant, nbytes: int, raw_images: RawImages, tmp_path: Path
) -> None:
    """They are an error, also where tables only bound the end of the last block."""
    theirs, target = tmp_path / f"theirs{variant.suffix}", tmp_path / "target.raw"
    qemu.convert(raw_images(images.SPARSE), theirs, variant)
    with theirs.open("ab") as file:
        file.write(b"\xa5" * nbytes)
    with pytest.raises(imgcore.CorruptImageError, match="goes on after|without a footer"):
        convert(theirs, target, qemu.RAW, variant.format)
    assert not target.exists()


@pytest.mark.parametrize("image", [images.SPARSE, images.ODD], ids=lambda each: each.name)
@pytest.mark.parametrize("variant", WRITTEN_IN_ORDER, ids=lambda each: each.name)
def test_what_imgcore_wrote(
    variant: Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    raw, ours = raw_images(image), tmp_path / f"ours{variant.suffix}"
    own.convert(raw, ours, variant)
    assert_streams(raw, ours, variant.format, tmp_path / "back.raw")


@pytest.mark.slow
@pytest.mark.parametrize("variant", WRITTEN_IN_ORDER, ids=lambda each: each.name)
@pytest.mark.parametrize("writer", [qemu.convert, own.convert], ids=["qemu", "imgcore"])
def test_images_longer_than_the_window(
    writer: Callable[[Path, Path, Variant], None],
    variant: Variant,
    raw_images: RawImages,
    tmp_path: Path,
) -> None:
    raw, image = raw_images(LONG), tmp_path / f"image{variant.suffix}"
    writer(raw, image, variant)
    if writer is own.convert and variant.format == "qcow2":
        # Its L1 table follows the data.
        with pytest.raises(imgcore.UnsupportedFeatureError, match="save it to a file first"):
            assert_streams(raw, image, variant.format, tmp_path / "back.raw")
        return
    assert_streams(raw, image, variant.format, tmp_path / "back.raw")


@pytest.mark.slow
@pytest.mark.parametrize("cluster_size", ["4k", "32k"])
@pytest.mark.parametrize("compress", [False, True])
def test_clusters_far_behind_their_table(
    compress: bool,
    cluster_size: str,
    raw_images: RawImages,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A window that is shorter than the clusters of one L2 table.
    monkeypatch.setattr(streamed_window, "STREAM_SEGMENT_NBYTES", MIB)
    monkeypatch.setattr(streamed_window, "MIN_STREAM_SEGMENTS", 56)
    raw, image = raw_images(LONG), tmp_path / "image.qcow2"
    variant = qemu.QCOW2_ZLIB if compress else qemu.QCOW2
    qemu.convert(raw, image, variant.with_options(f"cluster_size={cluster_size}"))
    assert_streams(raw, image, "qcow2", tmp_path / "back.raw")


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.parametrize("image", [images.SPARSE, images.ODD], ids=lambda each: each.name)
@pytest.mark.parametrize(
    ("image_format", "kind"),
    [("vmdk", "Standard"), ("vmdk", "Stream"), ("vdi", "Standard"), ("vhd", "Standard")],
)
def test_what_virtualbox_wrote(
    image_format: str, kind: str, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    program = qemu.require_vbox_img()
    raw, theirs = raw_images(image), tmp_path / f"theirs.{image_format}"
    words = ["convert", "--srcformat", "RAW", "--dstformat", image_format.upper()]
    words += ["--variant", kind]
    qemu.checked([program, *words, "--srcfilename", str(raw), "--dstfilename", str(theirs)])
    assert_streams(raw, theirs, image_format, tmp_path / "back.raw")


@pytest.mark.parametrize("source", WRITTEN_IN_ORDER, ids=lambda each: f"from-{each.name}")
@pytest.mark.parametrize("target", TARGETS, ids=lambda each: f"to-{each.name}")
def test_every_pair_gives_the_bytes_of_a_conversion_from_a_file(
    source: Variant, target: Variant, raw_images: RawImages, tmp_path: Path
) -> None:
    image = tmp_path / f"image{source.suffix}"
    qemu.convert(raw_images(images.SPARSE), image, source)
    piped_to, expected = tmp_path / f"piped{target.suffix}", tmp_path / f"file{target.suffix}"
    own.convert(image, expected, target, source_format=source.format)
    convert(image, piped_to, target, source.format)
    qemu.assert_same(expected, piped_to, source_format=target.format, target_format=target.format)
    if target.format != "vmdk":  # it names its extent by its file
        assert images.sha256(piped_to) == images.sha256(expected)


@pytest.mark.parametrize("target", ["disk.raw", "disk.qcow2", "disk.raw.zst", "disk.vhdx"])
def test_the_command_reads_a_pipe(target: str, raw_images: RawImages, tmp_path: Path) -> None:
    raw, image = raw_images(images.ODD), tmp_path / "image.vmdk"
    qemu.convert(raw, image, qemu.VMDK_STREAM)
    with piped(image) as stdin:
        done = subprocess.run(
            [sys.executable, "-m", "imgcore", "convert", "-f", "vmdk", "-", tmp_path / target],
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 0, done.stderr
    if target.endswith(".zst"):
        imgcore.convert(tmp_path / target, tmp_path / "disk.raw")
        target = "disk.raw"
    kind = target.rpartition(".")[2]
    qemu.assert_same(raw, tmp_path / target, source_format="raw", target_format=kind)


def _samples() -> list[dict[str, Any]]:
    manifest = SHARED / "manifest.json"
    rows = json.loads(manifest.read_text()) if manifest.exists() else []
    return [row for row in rows if "streamOptimized" in (row.get("variant") or "")]


@pytest.mark.parametrize("entry", _samples(), ids=lambda entry: entry["path"])
def test_stream_optimized_samples(entry: dict[str, Any], tmp_path: Path) -> None:
    source, back = unpacked_samples() / entry["path"], tmp_path / "back.raw"
    if entry["role"].startswith("negative"):
        with pytest.raises(imgcore.ImgcoreError):
            convert(source, back, qemu.RAW, "vmdk")
        assert not back.exists()
        return
    convert(source, back, qemu.RAW, "vmdk")
    assert back.stat().st_size == entry["virtual_size"]
    # What is read of the file is compared with the manifest by test_samples.
    assert imgcore.compare(source, back, format_a="vmdk", format_b="raw").identical
