"""One disk has one digest: over formats, layouts, programs and numbers of threads."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import imgcore
from imgcore.files.target import Target
from tests.helpers import blkhash, images, qemu, reflinks
from tests.helpers.images import RawImage
from tests.helpers.mounts import loop_device
from tests.helpers.qemu import VARIANTS, Variant

RawImages = Callable[[RawImage], Path]

# Every format with one disk, and every disk in formats with tables and with streams.
PAIRS = dict.fromkeys(
    [
        *((variant, images.SPARSE) for variant in VARIANTS),
        *(
            (variant, image)
            for variant in (qemu.QCOW2_ZLIB, qemu.VHDX_DYNAMIC)
            for image in images.RAW_IMAGES
            if image.virtual_size < images.GIB
        ),
    ]
)
each_pair = pytest.mark.parametrize(
    ("variant", "image"),
    [pytest.param(*pair, id=f"{pair[0].name}-{pair[1].name}") for pair in PAIRS],
)


@each_pair
def test_every_format_has_the_same_digest(
    variant: Variant, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    raw = raw_images(image)
    expected = blkhash.digest(raw.read_bytes())
    ours, theirs = tmp_path / f"ours{variant.suffix}", tmp_path / f"theirs{variant.suffix}"
    result = imgcore.convert(
        raw,
        ours,
        format="raw",
        target_format=variant.format,
        options=[*variant.options, *variant.own_options],
        compress=variant.compress,
        verify=True,
    )
    assert result.verified
    assert result.checksum is not None
    assert result.checksum.hexdigest == expected
    qemu.convert(raw, theirs, variant)
    for path in (raw, ours, theirs):
        format = "raw" if path == raw else variant.format
        for threads in (1, 3):
            assert imgcore.checksum(path, format=format, threads=threads).hexdigest == expected
    back = imgcore.convert(
        theirs, tmp_path / "back.raw", format=variant.format, checksum="sha256", sync=False
    )
    assert back.checksum == result.checksum


@pytest.mark.parametrize("reflink", ["auto", "always"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (qemu.RAW, qemu.RAW),
        (qemu.RAW, qemu.QCOW2),
        (qemu.QCOW2, qemu.RAW),
        (qemu.VHDX_DYNAMIC, qemu.QCOW2),
        (qemu.VHD_DYNAMIC, qemu.VDI),
    ],
    ids=lambda v: v.name,
)
def test_shared_blocks_count(source: Variant, target: Variant, reflink: str, here: Path) -> None:
    """By ranges, and in a clone of the whole file, of which nothing else is read."""
    raw, path = reflinks.make_source(here, source)
    out = here / f"out{target.suffix}"
    result = reflinks.convert(path, out, target, reflink=reflink, verify=True, sync=True)
    assert result.bytes_shared > 0 or reflink == "auto"
    assert result.checksum is not None
    assert result.checksum.hexdigest == blkhash.digest(raw.read_bytes())


@pytest.mark.parametrize("variant", [qemu.RAW, qemu.QCOW2, qemu.VHD_DYNAMIC], ids=lambda v: v.name)
def test_a_block_device_is_read_back(
    variant: Variant, raw_images: RawImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a device that is larger than the disk, and noticed if it is wrong."""
    raw = raw_images(images.SPARSE)
    with open(tmp_path / "device", "wb") as file:
        file.truncate(2 * images.SPARSE.virtual_size)
    with loop_device(tmp_path / "device") as device:
        keywords = {"target_format": variant.format, "in_place": True, "verify": True}
        result = imgcore.convert(raw, device, **keywords)
        assert result.checksum is not None
        assert result.checksum.hexdigest == blkhash.digest(raw.read_bytes())
        prepare = Target.prepare

        def damage(self: Target) -> None:
            prepare(self)
            content = (tmp_path / "device").read_bytes()
            start = images.SPARSE.pieces()[0][1][:512]
            with open(tmp_path / "device", "r+b") as file:
                file.seek(content.index(start))
                file.write(bytes(512))

        monkeypatch.setattr(Target, "prepare", damage)
        with pytest.raises(imgcore.ChecksumError):
            imgcore.convert(raw, device, **keywords)


@pytest.mark.parametrize("disk", [*blkhash.VECTORS, b"A" * 512 * 1025], ids=len)
def test_nbdcopy_has_the_same_digest(tmp_path: Path, disk: bytes) -> None:
    """Of whole sectors: NBD has no others."""
    programs = [qemu.find_program(name) for name in ("nbdcopy", "qemu-nbd")]
    if None in programs:
        pytest.skip("nbdcopy or qemu-nbd is not installed (set IMGCORE_PEERS)")
    nbdcopy, qemu_nbd = map(str, programs)
    if len(disk) % 512 or not disk:
        pytest.skip("not whole sectors")
    raw = tmp_path / "disk.raw"
    raw.write_bytes(disk)
    server = ["[", qemu_nbd, "-r", "-f", "raw", str(raw), "]"]
    done = subprocess.run(
        [nbdcopy, "--blkhash=sha256/64k", "--", *server, "null:"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unrecognized option" in done.stderr:
        pytest.skip("nbdcopy is older than --blkhash (libnbd 1.22)")
    assert done.stdout.split() == [imgcore.checksum(raw).hexdigest]
