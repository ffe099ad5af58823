"""VHDX, compared with QEMU, dissect and libvhdi: options, kinds and logs to replay."""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import imgcore
from tests.helpers import images, own, qemu, vhdx
from tests.helpers.images import RawImage
from tests.helpers.other_readers import assert_libvhdi_reads
from tests.helpers.vhdx import FULL, MIB, PARTIAL, Vhdx, pattern

RawImages = Callable[[RawImage], Path]


def raw_digest(path: Path) -> tuple[int, str]:
    """Return the size and the SHA-256 of the disk as imgcore reads it."""
    sha = hashlib.sha256()
    with imgcore.open(path) as image:
        for offset in range(0, image.virtual_size, 8 * MIB):
            sha.update(image.read(offset, min(8 * MIB, image.virtual_size - offset)))
        return image.virtual_size, sha.hexdigest()


def dissect_digest(path: Path) -> tuple[int, str]:
    """Return the same as dissect reads it, in a process since it leaves files open."""
    pytest.importorskip("dissect.hypervisor")
    code = (
        "import hashlib, pathlib, sys\n"
        "from dissect.hypervisor.disk.vhdx import VHDX\n"
        "disk = VHDX(pathlib.Path(sys.argv[1])); sha = hashlib.sha256()\n"
        "for offset in range(0, disk.size, 1 << 20):\n"
        "    disk.seek(offset); sha.update(disk.read(min(1 << 20, disk.size - offset)))\n"
        "print(disk.size, sha.hexdigest())\n"
    )
    size, digest = qemu.checked([sys.executable, "-c", code, str(path)]).stdout.split()
    return int(size), digest


@pytest.mark.parametrize(
    "image", [images.SPARSE, images.ODD_TAIL, images.EMPTY], ids=lambda i: i.name
)
@pytest.mark.parametrize(
    "options",
    [
        "block_size=1M",
        "block_size=64M",
        "block_size=256M",
        "log_size=4M",
        "log_size=1G",
        "block_state_zero=off",
        "block_state_zero=off,subformat=fixed",
        "subformat=fixed,block_size=2M",
    ],
)
def test_what_qemu_writes(
    options: str, image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    raw, theirs = raw_images(image), tmp_path / "theirs.vhdx"
    qemu.run("convert", "-f", "raw", "-O", "vhdx", "-o", options, raw, theirs)
    assert raw_digest(theirs) == (image.virtual_size, images.sha256(raw))
    assert imgcore.check(theirs).ok
    assert imgcore.check(theirs, repair=True).repairs == []


@pytest.mark.parametrize("image", [images.SPARSE, images.DENSE, images.EMPTY], ids=lambda i: i.name)
@pytest.mark.parametrize(
    "options",
    [
        ("block_size=1M",),
        ("block_size=32M",),
        ("block_size=256M",),
        ("subformat=fixed", "block_size=4M"),
        ("logical_sector_size=4096", "block_size=1M"),
        ("physical_sector_size=512",),
    ],
    ids=lambda options: ",".join(options),
)
def test_what_imgcore_writes(
    options: tuple[str, ...], image: RawImage, raw_images: RawImages, tmp_path: Path
) -> None:
    raw, ours = raw_images(image), tmp_path / "ours.vhdx"
    own.convert(raw, ours, qemu.Variant("vhdx", "vhdx", options))
    expected = (image.virtual_size, images.sha256(raw))
    assert dissect_digest(ours) == expected
    if find_spec("pyvhdi"):
        assert_libvhdi_reads(raw, ours)
    if "logical_sector_size=4096" not in options:  # QEMU supports only 512
        qemu.assert_same(raw, ours, source_format="raw", target_format="vhdx")
        qemu.assert_check_clean(ours, "vhdx")


@pytest.mark.parametrize("block_size", ["1M", "2M", "4M"])
def test_others_read_our_differencing_disks(
    block_size: str, raw_images: RawImages, tmp_path: Path
) -> None:
    raw = raw_images(images.SPARSE)
    own.convert(raw, tmp_path / "base.vhdx", qemu.VHDX_DYNAMIC)
    data = bytearray(raw.read_bytes())
    data[65536:65600] = bytes(64)
    data[23 * MIB : 23 * MIB + 9000] = images.noise(9000)
    changed = tmp_path / "changed.raw"
    changed.write_bytes(data)
    top = tmp_path / "top.vhdx"
    imgcore.convert(
        changed,
        top,
        backing="base.vhdx",
        backing_format="vhdx",
        options=[f"block_size={block_size}"],
        sync=False,
    )
    expected = (len(data), images.sha256(changed))
    assert raw_digest(top) == expected
    assert dissect_digest(top) == expected
    if find_spec("pyvhdi"):
        assert_libvhdi_reads(changed, top, tmp_path / "base.vhdx")
    assert imgcore.check(top).allocated_clusters < 4


@pytest.mark.parametrize("logical", [512, 4096])
def test_dissect_agrees_on_sector_bitmaps(logical: int, tmp_path: Path) -> None:
    """The tests, imgcore and dissect agree on the content of a chain."""
    parent = Vhdx(
        6 * MIB, logical=logical, blocks={n: (FULL, pattern(100 + n, MIB)) for n in range(4)}
    )
    parent.write(tmp_path / "parent.vhdx")
    n = MIB // logical
    child = Vhdx(
        6 * MIB,
        logical=logical,
        locator=vhdx.child_locator(),
        blocks={b: (PARTIAL, pattern(b, MIB)) for b in (0, 2, 4)},
        own_sectors={0: set(range(0, n, 3)), 2: set(range(n // 3, n)), 4: {0, 7, 8, n - 1}},
    )
    child.write(tmp_path / "child.vhdx")
    expected = child.expected(parent.expected())
    digest = (len(expected), hashlib.sha256(expected).hexdigest())
    assert raw_digest(tmp_path / "child.vhdx") == digest
    assert dissect_digest(tmp_path / "child.vhdx") == digest


GUID = vhdx.guid(0x106)
SECTOR = 4096
PAYLOAD = {n: (FULL, pattern(n, MIB)) for n in range(4)}


def bat(*entries: int) -> bytes:
    """Return the first sector of the BAT."""
    return struct.pack(f"<{len(entries)}Q", *entries).ljust(SECTOR, b"\0")


def entry(sequence: int, tail: int, *writes: vhdx.Write) -> bytes:
    return vhdx.log_entry(
        sequence, tail, list(writes), log_guid=GUID, flushed=8 * MIB, last=8 * MIB
    )


B = vhdx.BAT_OFFSET
ALL = bat(7 * MIB | 6, 6 * MIB | 6, 5 * MIB | 6, 4 * MIB | 6)
SOME = bat(7 * MIB | 6, 2, 5 * MIB | 6)
OTHER = bat(2, 6 * MIB | 6, 0, 4 * MIB | 6)
# Entries, and their offset in the log.  QEMU 11 differs for entries before the tail,
# for descriptors in several sectors, and for an older entry directly after a newer one.
LOGS: dict[str, tuple[list[bytes], int]] = {
    "one": ([entry(1, 0, (B, ALL))], 0),
    "three": ([entry(n, 0, (B, data)) for n, data in ((5, ALL), (6, SOME), (7, OTHER))], 0),
    "zeros": ([entry(1, 0, (B, ALL)), entry(2, 0, (B, SECTOR))], 0),
    "zeros-and-data": ([entry(1, 0, (B, 2 * SECTOR), (B, OTHER))], 0),
    "torn": ([entry(1, 0, (B, SOME)), entry(2, 0, (B, ALL))[:-512] + bytes(512)], 0),
    "around-the-end": (
        [entry(n, vhdx.LOG_NBYTES - 3 * SECTOR, (B, data)) for n, data in ((1, SOME), (2, OTHER))],
        vhdx.LOG_NBYTES - 3 * SECTOR,
    ),
    "a-sector-of-descriptors": (
        [entry(1, 0, *((B + n * SECTOR, SECTOR) for n in range(1, 120)), (B, ALL))],
        0,
    ),
}


@pytest.mark.parametrize(("entries", "at"), LOGS.values(), ids=LOGS)
def test_qemu_replays_a_log_as_imgcore_does(entries: list[bytes], at: int, tmp_path: Path) -> None:
    """imgcore reads the disk that QEMU reads after it has replayed the log."""
    ring = bytearray(vhdx.LOG_NBYTES)
    for offset, byte in enumerate(b"".join(entries), at):
        ring[offset % len(ring)] = byte
    disk = Vhdx(4 * MIB, blocks=PAYLOAD, log_guid=GUID, log=bytes(ring))
    path = disk.write(tmp_path / "dirty.vhdx")
    with open(path, "r+b") as file:
        file.seek(B)
        file.write(bytes(SECTOR))
    before = path.read_bytes()
    assert imgcore.info(path)["dirty-flag"] is True
    ours = raw_digest(path)
    assert path.read_bytes() == before
    qemu.run("check", "-q", "-f", "vhdx", "-r", "all", path)
    qemu.run("convert", "-f", "vhdx", "-O", "raw", path, tmp_path / "theirs.raw")
    assert ours == (4 * MIB, images.sha256(tmp_path / "theirs.raw"))
    assert imgcore.info(path)["dirty-flag"] is False
    assert raw_digest(path) == ours
