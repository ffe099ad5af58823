"""Every pair of formats, compared with qemu-img: content, tables and allocation."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import imgcore
from tests.helpers import images, own, qemu
from tests.helpers.images import RawImage
from tests.helpers.qemu import VARIANTS, Variant

RawImages = Callable[[RawImage], Path]

each_source = pytest.mark.parametrize("source", VARIANTS, ids=lambda v: f"from-{v.name}")
each_target = pytest.mark.parametrize("target", VARIANTS, ids=lambda v: f"to-{v.name}")
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
each_image = pytest.mark.parametrize("image", images.RAW_IMAGES, ids=lambda i: i.name)

# A file system may allocate more than was requested.  Compressed data may take 12 %
# more, the price of the 4 KiB window.
DISK_SLACK_NBYTES = 256 * 1024
COMPRESSED_SHARE = 1.12
# The formats that qemu-img can check.
CHECKED_FORMATS = ("qcow2", "vdi", "vhdx")


def assert_good_target(raw: Path, ours: Path, theirs: Path, variant: Variant) -> None:
    """Content is equal, tables are clean, allocation is at most that of qemu-img."""
    qemu.assert_same(raw, ours, source_format="raw", target_format=variant.format)
    if variant.format in CHECKED_FORMATS:
        qemu.assert_check_clean(ours, variant.format)
        assert imgcore.check(str(ours), format=variant.format).ok
    assert qemu.data_nbytes(ours, variant.format) <= qemu.data_nbytes(theirs, variant.format)
    allowed = qemu.disk_nbytes(theirs) * (COMPRESSED_SHARE if _is_compressed(variant) else 1)
    assert qemu.disk_nbytes(ours) <= allowed + DISK_SLACK_NBYTES


def _is_compressed(variant: Variant) -> bool:
    return variant.compress or variant is qemu.VMDK_STREAM


@each_source
@each_target
def test_every_pair(
    source: Variant, target: Variant, raw_images: RawImages, tmp_path: Path
) -> None:
    raw = raw_images(images.SPARSE)
    given = raw
    if source is not qemu.RAW:
        given = tmp_path / f"source{source.suffix}"
        qemu.convert(raw, given, source)
    theirs = tmp_path / f"theirs{target.suffix}"
    qemu.convert(given, theirs, target, source_format=source.format)
    ours = tmp_path / f"ours{target.suffix}"
    result = own.convert(given, ours, target, source_format=source.format)
    assert result.virtual_size == images.SPARSE.virtual_size
    assert_good_target(raw, ours, theirs, target)


@each_variant
@each_image
def test_qemu_reads_what_imgcore_wrote(
    variant: Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    raw = raw_images(image)
    ours, theirs = tmp_path / f"ours{variant.suffix}", tmp_path / f"theirs{variant.suffix}"
    own.convert(raw, ours, variant)
    qemu.convert(raw, theirs, variant)
    assert_good_target(raw, ours, theirs, variant)
    assert qemu.info(ours, variant.format)["virtual-size"] == image.virtual_size


@each_variant
@each_image
def test_imgcore_reads_what_qemu_wrote(
    variant: Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    raw = raw_images(image)
    theirs = tmp_path / f"theirs{variant.suffix}"
    qemu.convert(raw, theirs, variant)
    back = tmp_path / "back.raw"
    own.convert(theirs, back, qemu.RAW, source_format=variant.format)
    assert back.stat().st_size == image.virtual_size
    qemu.assert_same(raw, back, source_format="raw", target_format="raw")
    assert qemu.disk_nbytes(back) <= qemu.disk_nbytes(raw) + DISK_SLACK_NBYTES
    assert imgcore.compare(str(raw), str(theirs), format_a="raw", format_b=variant.format).identical
    assert_random_reads(theirs, raw, variant.format)


def assert_random_reads(path: Path, raw: Path, image_format: str, n_reads: int = 60) -> None:
    """Compare reads of random, unaligned ranges with the raw content."""
    rng = random.Random(images.SEED)
    with imgcore.open(str(path), format=image_format) as image, open(raw, "rb") as plain:
        nbytes = image.virtual_size
        assert nbytes == raw.stat().st_size
        ranges = [(0, min(nbytes, 1 << 20)), (max(0, nbytes - 70_000), min(nbytes, 70_000))]
        for _ in range(n_reads):
            offset = rng.randrange(nbytes)
            ranges.append(
                (offset, min(nbytes - offset, rng.choice((1, 511, 4096, 65537, 200_001))))
            )
        for offset, length in ranges:
            plain.seek(offset)
            assert image.read(offset, length) == plain.read(length), (offset, length)


QCOW2_OPTIONS = (
    *(f"cluster_size={size}" for size in ("512", "1k", "4k", "64k", "256k", "2M")),
    "compat=0.10",
    "lazy_refcounts=on",
)
READ_ONLY_OPTIONS = ("refcount_bits=1", "refcount_bits=64", "extended_l2=on,cluster_size=128k")


def _qcow2_variants(options: tuple[str, ...]) -> list[Variant]:
    kinds = (qemu.QCOW2, qemu.QCOW2_ZLIB, qemu.QCOW2_ZSTD)
    return [
        kind.with_options(option)
        for option in options
        for kind in kinds
        if not (option == "compat=0.10" and kind is qemu.QCOW2_ZSTD)
    ]


@pytest.mark.parametrize("image", [images.SPARSE, images.ODD, images.TINY], ids=lambda i: i.name)
@pytest.mark.parametrize("variant", _qcow2_variants(QCOW2_OPTIONS), ids=lambda v: v.name)
def test_qcow2_options(
    variant: Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    """Each tool reads the images of the other, for options that both have."""
    raw = raw_images(image)
    theirs, ours = tmp_path / "theirs.qcow2", tmp_path / "ours.qcow2"
    qemu.convert(raw, theirs, variant)
    assert_random_reads(theirs, raw, "qcow2", 20)
    if "lazy_refcounts=on" in variant.options:
        return  # imgcore always writes complete refcounts
    own.convert(raw, ours, variant)
    assert_good_target(raw, ours, theirs, variant)


@pytest.mark.parametrize("variant", _qcow2_variants(READ_ONLY_OPTIONS[:2]), ids=lambda v: v.name)
def test_qcow2_is_read_with(variant: Variant, raw_images: RawImages, tmp_path: Path) -> None:
    raw = raw_images(images.SPARSE)
    theirs = tmp_path / "theirs.qcow2"
    qemu.convert(raw, theirs, variant)
    assert_random_reads(theirs, raw, "qcow2", 20)


@pytest.mark.parametrize("mode", ["off", "metadata", "falloc", "full"])
def test_qcow2_preallocation(mode: str, raw_images: RawImages, tmp_path: Path) -> None:
    raw = raw_images(images.SPARSE)
    theirs, ours = tmp_path / "theirs.qcow2", tmp_path / "ours.qcow2"
    variant = qemu.QCOW2.with_options(f"preallocation={mode}")
    qemu.convert(raw, theirs, variant)
    assert_random_reads(theirs, raw, "qcow2", 10)
    own.convert(raw, ours, variant)
    qemu.assert_same(raw, ours, source_format="raw", target_format="qcow2")
    report = qemu.assert_check_clean(ours)
    if mode != "off":
        assert report["allocated-clusters"] == report["total-clusters"]
    if mode in ("falloc", "full"):
        assert qemu.disk_nbytes(ours) >= images.SPARSE.virtual_size


@pytest.mark.parametrize("size", ["64k", "1M"])
def test_vmdk_large_disk_size_is_kept(size: str, tmp_path: Path) -> None:
    """A size that is not a multiple of the grain is preserved exactly."""
    raw = tmp_path / "odd.raw"
    nbytes = {"64k": 65536 + 512, "1M": (1 << 20) + 7 * 512}[size]
    raw.write_bytes(images.text(nbytes))
    for variant in (qemu.VMDK_SPARSE, qemu.VMDK_STREAM, qemu.VMDK_FLAT):
        target = tmp_path / f"{variant.name}.vmdk"
        own.convert(raw, target, variant)
        with imgcore.open(str(target)) as image:
            assert image.virtual_size == nbytes
        assert qemu.info(target, "vmdk")["virtual-size"] == nbytes


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_qcow2_zero_clusters_and_backing(
    compat: str, raw_images: RawImages, tmp_path: Path
) -> None:
    """Zero clusters hide the backing file, holes do not; zeros follow its end."""
    qemu_io = qemu.find_program("qemu-io")
    if qemu_io is None:
        pytest.skip("qemu-io is not installed")
    base = tmp_path / "base.qcow2"
    qemu.convert(raw_images(images.DENSE), base, qemu.QCOW2_ZLIB)
    top = tmp_path / "top.qcow2"
    backing = f"compat={compat}"
    qemu.run("create", "-f", "qcow2", "-o", backing, "-b", base, "-F", "qcow2", top, "9M")
    commands = ["write -z 1M 512k", "write -P 7 2M 100k", "discard 3M 256k", "write -P 9 8M 64k"]
    words = [word for command in commands for word in ("-c", command)]
    qemu.checked([qemu_io, "-f", "qcow2", *words, str(top)])
    flat = tmp_path / "flat.raw"
    qemu.run("convert", "-f", "qcow2", "-O", "raw", top, flat)
    assert_random_reads(top, flat, "qcow2")
    for variant in (qemu.RAW, qemu.QCOW2, qemu.VMDK_STREAM):
        ours = tmp_path / f"ours-{variant.name}{variant.suffix}"
        own.convert(top, ours, variant, source_format="qcow2")
        qemu.assert_same(flat, ours, source_format="raw", target_format=variant.format)


def test_convert_onto_a_backing_file(raw_images: RawImages, tmp_path: Path) -> None:
    """-B omits blocks that read the same in the backing file."""
    base = tmp_path / "base.qcow2"
    own.convert(raw_images(images.DENSE), base, qemu.QCOW2)
    changed = tmp_path / "changed.raw"
    data = bytearray(raw_images(images.DENSE).read_bytes())
    data[1 << 20 : (1 << 20) + 9] = b"different"
    data[3 << 20 : (3 << 20) + 131072] = bytes(131072)
    changed.write_bytes(data)
    top = tmp_path / "top.qcow2"
    imgcore.convert(
        str(changed), str(top), format="raw", backing="base.qcow2", backing_format="qcow2"
    )
    qemu.assert_same(changed, top, source_format="raw", target_format="qcow2")
    report = qemu.assert_check_clean(top)
    assert report["allocated-clusters"] <= 3
    assert_random_reads(top, changed, "qcow2")


@pytest.mark.parametrize("image", [images.DENSE, images.SPARSE], ids=lambda i: i.name)
@each_variant
def test_same_bytes_with_any_number_of_threads(
    variant: Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    raw = raw_images(image)
    digests = set()
    for threads in (1, 2, 8):
        folder = tmp_path / str(threads)
        folder.mkdir()
        own.convert(raw, folder / f"out{variant.suffix}", variant, threads=threads)
        files = sorted(folder.iterdir())
        digests.add(tuple((file.name, images.sha256(file)) for file in files))
    assert len(digests) == 1


@pytest.mark.parametrize(
    "options",
    [
        (qemu.QCOW2_ZLIB, "window=32k"),
        *((qemu.VMDK_STREAM, f"level={level}") for level in ("fastest", "fast", "default", "best")),
        *((qemu.QCOW2_ZLIB, f"level={level}") for level in ("fastest", "best")),
        (qemu.QCOW2_ZSTD, "level=best"),
    ],
    ids=lambda pair: f"{pair[0].name}-{pair[1]}",
)
def test_levels_and_windows(
    options: tuple[Variant, str], raw_images: RawImages, tmp_path: Path
) -> None:
    variant, option = options
    raw = raw_images(images.DENSE)
    ours = tmp_path / f"ours{variant.suffix}"
    own.convert(raw, ours, variant, options=(option,))
    qemu.assert_same(raw, ours, source_format="raw", target_format=variant.format)
    assert_random_reads(ours, raw, variant.format, 20)


@pytest.mark.parametrize(
    # QEMU cannot map VHDX: it reports the whole disk as data.
    "variant",
    [variant for variant in VARIANTS if variant.format != "vhdx"],
    ids=lambda v: v.name,
)
def test_map_agrees(variant: Variant, raw_images: RawImages, tmp_path: Path) -> None:
    """imgcore and qemu-img map the same ranges as data."""
    raw = raw_images(images.SPARSE)
    path = tmp_path / f"theirs{variant.suffix}"
    qemu.convert(raw, path, variant)
    # qemu-img reports holes of a flat extent as data that is zero, imgcore as no data.
    theirs = _data_ranges(
        (row["start"], row["length"], row["data"] and not row["zero"])
        for row in qemu.map_entries(path, variant.format)
    )
    ours = _data_ranges(
        (entry.start, entry.length, entry.data and not entry.zero)
        for entry in imgcore.map(str(path), format=variant.format)
    )
    assert ours == theirs


def _data_ranges(rows: object) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, length, data in rows:  # type: ignore[attr-defined]
        if not data:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], start + length)
        else:
            joined.append((start, start + length))
    return joined
