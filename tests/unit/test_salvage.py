"""``convert --salvage`` of images that are cut off, overwritten, or lack a part.

What is not listed as lost equals the disk; what is listed is zeros, and not more than
the damage justifies.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from tests.helpers import images, qemu, vdi, vhd, vhdx, vmdk
from tests.helpers.command import imgcore as imgcore_command
from tests.helpers.qcow2 import create, qemu_io
from tests.helpers.qemu import Variant
from tests.helpers.reading import poke

import imgcore
from imgcore.disk import salvage as disk_salvage
from imgcore.disk.salvage import _overlaps
from imgcore.engine.bad_ranges import BadRange
from imgcore.engine.extents import EXTENT_DTYPE, Kind, lose_ranges
from imgcore.formats.shared.damage import STRICT, Damage

KIB, MIB = 1 << 10, 1 << 20
PAGE, SECTOR = 4096, 512
DISK_NBYTES = 12 * MIB
# Blocks of 1 MiB or less, so that truncated images have several.
SMALL = {"vhdx-dynamic": "block_size=1M", "vhdx-fixed": "block_size=1M"}


def _variant(variant: Variant) -> Variant:
    option = SMALL.get(variant.name)
    others = tuple(item for item in variant.options if not item.startswith("block_size"))
    return variant if option is None else Variant(variant.name, "vhdx", (*others, option))


SPARSE_VARIANTS = [_variant(v) for v in qemu.VARIANTS if v.format != "raw" and "lat" not in v.name]
TABLED = [v for v in SPARSE_VARIANTS if v.name != "vhd-fixed"]


def _disk() -> bytes:
    """A disk with text, noise and holes, and data in its last sector."""
    disk = bytearray(DISK_NBYTES)
    for start, piece in (
        (0, images.noise(MIB)),
        (2 * MIB, images.text(2 * MIB)),
        (5 * MIB + 100 * SECTOR, images.noise(SECTOR, 3)),
        (6 * MIB, images.text(MIB, 7)),
        (9 * MIB, images.noise(2 * MIB, 9)),
        (DISK_NBYTES - SECTOR, images.noise(SECTOR, 4)),
    ):
        disk[start : start + len(piece)] = piece
    return bytes(disk)


@pytest.fixture(scope="module")
def disk() -> bytes:
    return _disk()


@pytest.fixture(scope="module")
def make(disk: bytes, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Variant, str], Path]:
    """Return a maker of images of the disk, by qemu-img or by imgcore."""
    folder = tmp_path_factory.mktemp("salvage")
    (folder / "disk.raw").write_bytes(disk)
    made: dict[tuple[str, str], Path] = {}

    def image(variant: Variant, producer: str) -> Path:
        path = folder / f"{producer}-{variant.name}{variant.suffix}"
        if (variant.name, producer) not in made:
            if producer == "qemu":
                qemu.convert(folder / "disk.raw", path, variant)
            else:
                imgcore.convert(
                    folder / "disk.raw",
                    path,
                    options=[*variant.options, *variant.own_options],
                    compress=variant.compress,
                    sync=False,
                )
            made[variant.name, producer] = path
        return made[variant.name, producer]

    return image


def salvaged(path: Path, **more: object) -> tuple[bytes, tuple[BadRange, ...]]:
    out = path.parent / "salvaged.raw"
    result = imgcore.convert(path, out, salvage=True, sync=False, force=True, **more)  # type: ignore[arg-type]
    return out.read_bytes(), result.bad_ranges


def assert_salvaged(
    got: bytes, lost: Iterable[BadRange], disk: bytes, undetectable: Iterable[tuple[int, int]] = ()
) -> int:
    """Fail unless all that is not listed is right; return the number of bytes lost.

    ``undetectable`` are (guest offset, length) of plain data that was overwritten.
    """
    expected, end, n_lost = bytearray(disk), 0, 0
    for row in lost:
        assert row.guest_offset >= end
        assert row.guest_offset % SECTOR == 0
        end = row.guest_offset + row.length
        assert row.length > 0
        expected[row.guest_offset : end] = bytes(row.length)
        n_lost += row.length
    assert len(got) == len(disk)
    assert end <= len(disk)
    for offset, length in undetectable:
        expected[offset : offset + length] = got[offset : offset + length]
    assert got == expected
    return n_lost


def rows_of(path: Path) -> list[tuple[int, int, int, int, int]]:
    """Return (host offset, host length, guest offset, length, kind) of all extents."""
    names = ("host_offset", "host_length", "guest_offset", "length", "kind")
    with imgcore.open(path) as image:
        return [
            tuple(int(row[name]) for name in names)  # type: ignore[misc]
            for batch in image.extents()
            for row in batch
        ]


# ------------------------------------------------------------------- truncated images


@pytest.mark.parametrize("producer", ["qemu", "imgcore"])
@pytest.mark.parametrize("variant", TABLED, ids=lambda v: v.name)
def test_cut(
    variant: Variant,
    producer: str,
    make: Callable[[Variant, str], Path],
    disk: bytes,
    tmp_path: Path,
) -> None:
    """Of a file cut anywhere, everything is saved whose place is still known."""
    path = make(variant, producer)
    whole, rng = path.read_bytes(), random.Random(images.SEED)
    copy = tmp_path / path.name
    sound, nothing = salvaged(path)
    assert (sound, nothing) == (disk, ())
    stored = [row for row in rows_of(path) if row[4] >= Kind.DATA]
    plain = all(row[4] == Kind.DATA for row in stored)
    tables_end = min(row[0] for row in stored)
    places = {len(whole) - 1, len(whole) - SECTOR, len(whole) * 9 // 10, len(whole) // 2}
    places |= {rng.randrange(len(whole)) for _ in range(4)} | {100, 600, 70_000, 200_000}
    for nbytes in sorted(places, reverse=True):
        copy.write_bytes(whole[:nbytes])
        try:
            got, lost = salvaged(copy)
        except imgcore.ImgcoreError as error:
            assert "\n" not in str(error)
            # Without a header or the metadata that states the size, or if no table is
            # left.  Of the formats, only imgcore's QCOW2 has its tables at the end.
            at_end = variant.format == "qcow2" and producer == "imgcore"
            assert nbytes < tables_end or at_end, error
            continue
        n_lost = assert_salvaged(got, lost, disk)
        # Only what was cut off is lost, apart from the rest of a sector or a block.
        cut = sum(min(row[1], max(0, row[0] + row[1] - nbytes)) for row in stored)
        # Holes of the file are not in the rows of a fixed disk, but are lost with it.
        if plain and nbytes >= tables_end and "fixed" not in variant.name:
            assert n_lost <= cut + SECTOR * len(lost), (nbytes, n_lost, cut)
        if cut > 64 * KIB:
            assert lost


@pytest.mark.parametrize("variant", TABLED, ids=lambda v: v.name)
def test_without_salvage_it_is_refused(
    variant: Variant, make: Callable[[Variant, str], Path], tmp_path: Path
) -> None:
    path = make(variant, "qemu")
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes()[: path.stat().st_size * 9 // 10])
    with pytest.raises(imgcore.CorruptImageError):
        imgcore.convert(copy, tmp_path / "out.raw")
    assert not (tmp_path / "out.raw").exists()


def test_nothing_is_left(tmp_path: Path) -> None:
    """A target of zeros only is not written."""
    path = vdi.make(tmp_path / "a.vdi", [0, 1, 2, 3])
    poke(path, (vdi.MAP_OFFSET, struct.pack("<4I", 7, 8, 9, 10)))
    done = imgcore_command("convert", "--salvage", path, tmp_path / "out.raw")
    assert done.returncode == 1
    assert done.stderr == (
        f"imgcore: {path}: nothing can be salvaged: no part of the disk has a known place\n"
    )
    assert not (tmp_path / "out.raw").exists()


@pytest.mark.parametrize("suffix", ["qcow2", "vhd", "vhdx", "vdi"])
def test_chains_that_are_cut(suffix: str, disk: bytes, tmp_path: Path) -> None:
    """What a child has is saved, whatever its parent has lost, and vice versa."""
    own = bytearray(disk)
    own[3 * MIB : 5 * MIB] = images.noise(2 * MIB, 44)
    own[8 * MIB : 9 * MIB] = bytes(MIB)
    for name, content in (("base", disk), ("child", bytes(own))):
        (tmp_path / f"{name}.raw").write_bytes(content)
        backing = {"backing": f"base.{suffix}", "backing_format": suffix}
        imgcore.convert(
            tmp_path / f"{name}.raw",
            tmp_path / f"{name}.{suffix}",
            **(backing if name == "child" else {}),
        )
    base, child = (tmp_path / f"{name}.{suffix}" for name in ("base", "child"))
    whole = base.read_bytes(), child.read_bytes()
    for n_base, n_child in ((1, 0.75), (0.6, 1), (0.6, 0.75)):
        base.write_bytes(whole[0][: int(len(whole[0]) * n_base)])
        child.write_bytes(whole[1][: int(len(whole[1]) * n_child)])
        try:
            got, lost = salvaged(child)
        except imgcore.CorruptImageError as error:
            # The tables of imgcore's QCOW2 are at its end.
            assert suffix == "qcow2"
            assert n_child < 1
            assert "nothing can be salvaged" in str(error)
            continue
        assert_salvaged(got, lost, bytes(own))
        assert lost or (suffix == "vhdx" and n_child == 1)


def test_several_sources_and_in_place(tmp_path: Path) -> None:
    path = vdi.make(tmp_path / "a.vdi", [0, 1, 2, 3])
    disk = b"".join(vdi.fill(n) for n in range(4))
    poke(path, (vdi.MAP_OFFSET + 4, struct.pack("<I", 77)))
    (tmp_path / "d.raw").write_bytes(disk)
    # What was there before does not stay in a lost range.
    out = tmp_path / "out.raw"
    out.write_bytes(b"\xff" * 12 * MIB)
    sources = [tmp_path / "d.raw", path, tmp_path / "d.raw"]
    result = imgcore.convert(sources, out, salvage=True, in_place=True)
    assert [(row.guest_offset, row.length) for row in result.bad_ranges] == [(5 * MIB, MIB)]
    assert_salvaged(out.read_bytes(), result.bad_ranges, disk * 3)


# ----------------------------------------------------------------- overwritten images


@pytest.mark.parametrize("content", ["noise", "ones"])
@pytest.mark.parametrize("producer", ["qemu", "imgcore"])
@pytest.mark.parametrize("variant", TABLED, ids=lambda v: v.name)
def test_overwritten_pages(
    variant: Variant,
    producer: str,
    content: str,
    make: Callable[[Variant, str], Path],
    disk: bytes,
    tmp_path: Path,
) -> None:
    path = make(variant, producer)
    whole, rng = path.read_bytes(), random.Random(images.SEED)
    rows = rows_of(path)
    tables_end = min(row[0] for row in rows if row[4] >= Kind.DATA)
    if content == "ones" and variant.format in ("vdi", "vhd"):
        pytest.skip("an entry of all ones is a hole")
    copy = tmp_path / path.name
    n_pages = len(whole) // PAGE
    pages = [*range(1, min(n_pages, 9)), n_pages - 1, n_pages - 2]
    pages += [place // PAGE for place in (64 * KIB, 192 * KIB, MIB, 2 * MIB, 3 * MIB)]
    pages += [rng.randrange(n_pages) for _ in range(3)]
    refused = 0
    for page in pages:
        start = page * PAGE
        if start >= tables_end and not any(whole[start : start + PAGE]):
            continue  # a hole of a fixed disk: what is written there is data
        new = rng.randbytes(PAGE) if content == "noise" else b"\xff" * PAGE
        damaged = whole[:start] + new[: max(len(whole) - start, 0)] + whole[start + PAGE :]
        copy.write_bytes(damaged[: len(whole)])
        try:
            got, lost = salvaged(copy)
        except imgcore.ImgcoreError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        # What is stored there, and a whole block if its bitmap or stream was there.
        hit = [row for row in rows if row[0] < start + PAGE and row[0] + row[1] > start]
        plain = [
            (low - row[0] + row[2], min(row[0] + row[1], start + PAGE) - low)
            for row in hit
            if row[4] == Kind.DATA
            for low in [max(row[0], start)]
        ]
        assert_salvaged(got, lost, disk, plain)
    assert refused <= 3


def test_compressed_blocks(make: Callable[[Variant, str], Path], disk: bytes) -> None:
    """Each block that is overwritten is lost, and no other."""
    for variant in (qemu.QCOW2_ZLIB, qemu.QCOW2_ZSTD, qemu.VMDK_STREAM):
        path = make(variant, "imgcore")
        row = next(row for row in rows_of(path) if row[4] > Kind.DATA and row[2] >= 2 * MIB)
        copy = path.with_name(f"block-{path.name}")
        copy.write_bytes(path.read_bytes())
        poke(copy, (row[0] + 20, images.noise(200, 8)))
        got, lost = salvaged(copy)
        assert_salvaged(got, lost, disk)
        assert [(bad.guest_offset, bad.length) for bad in lost] == [(row[2], row[3])]


# -------------------------------------------------------------------- single formats


def _l2_offset(path: Path) -> int:
    raw = path.read_bytes()
    (l1_offset,) = struct.unpack_from(">Q", raw, 40)
    return int(struct.unpack_from(">Q", raw, l1_offset)[0]) & 0x00FFFFFFFFFFFE00


QCOW2_ENTRIES = {
    "reserved-bits": 1 << 60 | 0x50000,
    "unaligned": 0x50200,
    "past-the-end": 1 << 40,
    "zeros-with-reserved-bits": 1 << 57 | 1,
    "compressed-past-the-end": 1 << 62 | 1 << 40,
}


@pytest.mark.parametrize("entry", QCOW2_ENTRIES.values(), ids=QCOW2_ENTRIES)
def test_qcow2_entry(entry: int, tmp_path: Path) -> None:
    """One impossible entry loses one cluster."""
    path = create(tmp_path / "a.qcow2", MIB)
    qemu_io(path, "write -P 7 0 1M")
    poke(path, (_l2_offset(path) + 8 * 3, struct.pack(">Q", entry)))
    got, lost = salvaged(path)
    assert [(row.guest_offset, row.length) for row in lost] == [(3 * 65536, 65536)]
    assert_salvaged(got, lost, b"\7" * MIB)


def test_qcow2_l1_and_refcounts(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "70M", "cluster_size=4k")
    qemu_io(path, "write -P 7 0 70M")
    raw = path.read_bytes()
    (l1_offset, refcounts) = struct.unpack_from(">QQ", raw, 40)
    disk = b"\7" * (70 * MIB)
    reach = 512 * 4 * KIB
    # Refcounts and the flags of an image that was not closed are not needed.
    poke(path, (refcounts, b"\xff" * 4096), (79, b"\3"))
    assert salvaged(path) == (disk, ())
    poke(path, (48, struct.pack(">QI", 1 << 50, 1)), (60, struct.pack(">IQ", 5, 1 << 50)))
    assert salvaged(path) == (disk, ())
    # The 3rd entry of the L1 table, and all from the 20th on.
    poke(path, (l1_offset + 16, struct.pack(">Q", 77)))
    poke(path, (l1_offset + 19 * 8, b"\xff" * 16 * 8))
    got, lost = salvaged(path)
    ranges = [(2 * reach, reach), (19 * reach, 70 * MIB - 19 * reach)]
    assert [(row.guest_offset, row.length) for row in lost] == ranges
    assert_salvaged(got, lost, disk)
    # A table that has fewer entries than the disk needs.
    poke(path, (36, struct.pack(">I", 10)))
    got, lost = salvaged(path)
    assert lost[-1].guest_offset == 10 * reach
    assert_salvaged(got, lost, disk)


def test_clusters_that_two_entries_name(tmp_path: Path) -> None:
    """Nothing tells whose the data is, so it is lost for both, not shown twice."""
    path = create(tmp_path / "a.qcow2", MIB)
    qemu_io(path, *(f"write -P {n + 1} {n * 64}k 64k" for n in range(16)))
    offset = _l2_offset(path)
    entries = path.read_bytes()[offset : offset + 128]
    poke(path, (offset + 8 * 5, entries[8 * 9 : 8 * 10]))
    got, lost = salvaged(path)
    assert [row.guest_offset // 65536 for row in lost] == [5, 9]
    assert all("two parts" in row.reason for row in lost)
    assert_salvaged(got, lost, b"".join(bytes([n + 1]) * 65536 for n in range(16)))


def test_lost_data_hides_the_parent(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", MIB)
    qemu_io(base, "write -P 1 0 1M")
    child = tmp_path / "child.qcow2"
    qemu.run("create", "-f", "qcow2", "-F", "qcow2", "-b", base, child)
    qemu_io(child, "write -P 2 0 256k")
    poke(child, (_l2_offset(child) + 8, struct.pack(">Q", 1 << 60)))
    got, lost = salvaged(child)
    assert [(row.guest_offset, row.length, row.path) for row in lost] == [
        (65536, 65536, str(child))
    ]
    assert_salvaged(got, lost, b"\2" * 256 * KIB + b"\1" * 768 * KIB)
    # The parent's damage is its own.
    poke(base, (_l2_offset(base) + 8 * 10, struct.pack(">Q", 1 << 60)))
    _, lost = salvaged(child)
    assert [(row.guest_offset, row.path) for row in lost][1:] == [(10 * 65536, str(base))]
    # A parent that is missing is not salvaged: most of the disk may be there.
    base.rename(tmp_path / "elsewhere.qcow2")
    with pytest.raises(FileNotFoundError, match="state it with --parent"):
        salvaged(child)
    assert len(salvaged(child, parent=tmp_path / "elsewhere.qcow2")[1]) == 2


def test_vmdk_redundant_tables(make: Callable[[Variant, str], Path], disk: bytes) -> None:
    """One of the two copies of each table is enough, and the directories as well."""
    path = make(qemu.VMDK_SPARSE, "qemu")
    raw = path.read_bytes()
    rgd, gd = struct.unpack_from("<QQ", raw, 48)
    copy = path.with_name("redundant.vmdk")
    tables = [struct.unpack_from("<I", raw, at * SECTOR)[0] for at in (rgd, gd)]
    noise = images.noise(SECTOR, 1)
    for sectors in ((rgd,), (gd,), (tables[0],), (tables[1],), (tables[1], tables[0] + 1)):
        for new in (noise, bytes(SECTOR), b"\xff" * SECTOR):
            copy.write_bytes(raw)
            poke(copy, *((sector * SECTOR, new) for sector in sectors))
            assert salvaged(copy) == (disk, ())
    # Without both, the grains of a sector of entries are lost.
    copy.write_bytes(raw)
    poke(copy, *((table * SECTOR, noise) for table in tables))
    got, lost = salvaged(copy)
    assert lost[0].guest_offset == 0
    assert lost[-1].guest_offset + lost[-1].length <= 128 * 65536
    assert_salvaged(got, lost, disk)


def test_vmdk_descriptor_in_a_damaged_header(
    make: Callable[[Variant, str], Path], disk: bytes
) -> None:
    path = make(qemu.VMDK_SPARSE, "qemu")
    copy = path.with_name("descriptor.vmdk")
    copy.write_bytes(path.read_bytes())
    poke(copy, (SECTOR, b"RW what\n" * 8))
    assert salvaged(copy) == (disk, ())
    # A delta needs its parent.
    poke(copy, (SECTOR, b'parentFileNameHint="a.vmdk"\nRW what\n'))
    with pytest.raises(imgcore.CorruptImageError, match="is not an extent"):
        salvaged(copy)


@pytest.mark.parametrize("producer", ["qemu", "imgcore"])
def test_a_stream_without_its_end(
    producer: str, make: Callable[[Variant, str], Path], disk: bytes, tmp_path: Path
) -> None:
    """The markers of the grains are enough to read what comes before."""
    path = make(qemu.VMDK_STREAM, producer)
    raw = path.read_bytes()
    grains = [row for row in rows_of(path) if row[4] > Kind.DATA]
    last = max(grains)
    copy = tmp_path / "a.vmdk"
    # Only the footer is lost: the directory still tells that there are no more grains.
    if producer == "imgcore":
        copy.write_bytes(raw[: len(raw) - 3 * SECTOR])
        assert salvaged(copy) == (disk, ())
    # All that follows the grains is lost: holes after the last one are not certain.
    header = bytearray(raw[: last[0] + 65536])
    struct.pack_into("<QQ", header, 48, 0, (1 << 64) - 1)
    copy.write_bytes(header[: last[0]])
    got, lost = salvaged(copy)
    assert_salvaged(got, lost, disk)
    ordered = sorted(grains)
    known = ordered[-2][2] + ordered[-2][3]
    assert [(row.guest_offset, row.length) for row in lost] == [(known, DISK_NBYTES - known)]
    # So is one in the middle, with the marker of the next.
    index = len(ordered) // 2
    copy.write_bytes(header[: last[0]])
    poke(copy, (ordered[index][0], images.noise(ordered[index + 1][0] - ordered[index][0] + 20)))
    got, lost = salvaged(copy)
    assert_salvaged(got, lost, disk)
    (first, *_) = lost
    assert first.guest_offset == ordered[index - 1][2] + 65536
    assert first.length == ordered[index + 2][2] - first.guest_offset


def test_a_stream_with_zeros_in_place_of_a_table(
    make: Callable[[Variant, str], Path], disk: bytes, tmp_path: Path
) -> None:
    path = make(qemu.VMDK_STREAM, "imgcore")
    raw = path.read_bytes()
    copy = tmp_path / "a.vmdk"
    at = raw.index(struct.pack("<QII", 4, 0, 1))
    copy.write_bytes(raw[: at + SECTOR] + bytes(4 * SECTOR) + raw[at + 5 * SECTOR :])
    assert salvaged(copy) == (disk, ())


def _split(folder: Path, kind: str, n_files: int = 3) -> tuple[Path, bytes]:
    """Make a disk of several files of 1 MiB."""
    disk, lines = b"", []
    for number in range(n_files):
        piece = images.noise(MIB, number)
        name = f"part{number}.vmdk"
        if kind == "SPARSE":
            grains = {n: piece[n * 65536 : (n + 1) * 65536] for n in range(16)}
            vmdk.hosted(folder / name, MIB // SECTOR, grains)
            lines.append(f'RW {MIB // SECTOR} SPARSE "{name}"')
        else:
            (folder / name).write_bytes(piece)
            lines.append(f'RW {MIB // SECTOR} FLAT "{name}" 0')
        disk += piece
    path = folder / "disk.vmdk"
    path.write_bytes(vmdk.descriptor("custom", *lines))
    return path, disk


@pytest.mark.parametrize("kind", ["FLAT", "SPARSE"])
def test_parts_of_a_vmdk(kind: str, tmp_path: Path) -> None:
    path, disk = _split(tmp_path, kind)
    part = tmp_path / "part1.vmdk"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) - 100 * KIB - 1])
    got, lost = salvaged(path)
    assert [(row.guest_offset, row.length) for row in lost] == [
        (2 * MIB - 100 * KIB - SECTOR, 100 * KIB + SECTOR)
    ]
    assert_salvaged(got, lost, disk)
    damages: list[Callable[[], object]] = [lambda: part.write_bytes(b""), part.unlink]
    if kind == "SPARSE":
        damages.insert(0, lambda: part.write_bytes(images.noise(PAGE) + whole[PAGE:]))
    for damage in damages:
        damage()
        got, lost = salvaged(path)
        assert [(row.guest_offset, row.length) for row in lost] == [(MIB, MIB)]
        assert "its file is missing" in lost[0].reason
        assert_salvaged(got, lost, disk)
        with pytest.raises((imgcore.ImgcoreError, OSError)):
            imgcore.convert(path, tmp_path / "strict.raw")
    for number in (0, 2):
        (tmp_path / f"part{number}.vmdk").unlink()
    with pytest.raises(imgcore.CorruptImageError, match="none of its extents can be read"):
        salvaged(path)


def test_parts_outside_the_folder_are_not_salvaged(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    path.write_bytes(vmdk.descriptor("custom", 'RW 8 FLAT "/etc/passwd" 0', "RW 8 ZERO"))
    with pytest.raises(imgcore.UnsafeReferenceError):
        salvaged(path)


def test_vhd_footers(make: Callable[[Variant, str], Path], disk: bytes) -> None:
    path = make(qemu.VHD_DYNAMIC, "imgcore")
    raw = path.read_bytes()
    copy = path.with_name("footers.vhd")
    # No checksum fits: of the footer, its copy, and the dynamic disk header.
    copy.write_bytes(raw)
    poke(copy, *((at, b"\1\2\3\4") for at in (64, len(raw) - 512 + 64, 512 + 36)))
    with pytest.raises(imgcore.CorruptImageError, match="checksum"):
        imgcore.convert(copy, copy.with_name("strict.raw"))
    assert salvaged(copy) == (disk, ())
    copy.write_bytes(raw[:-512])
    assert salvaged(copy) == (disk, ())
    copy.write_bytes(raw[:-512])
    poke(copy, (0, bytes(512)))
    with pytest.raises(imgcore.WrongFormatError, match="no VHD footer") as error:
        salvaged(copy, format="vhd")
    assert "\n" not in str(error.value)


def test_what_is_left_of_a_fixed_vhd(make: Callable[[Variant, str], Path], disk: bytes) -> None:
    """Its size was in the footer: the advice is to read it as raw."""
    path = make(qemu.VHD_FIXED, "qemu")
    copy = path.with_name("rest.vhd")
    copy.write_bytes(path.read_bytes()[: 5 * MIB])
    done = imgcore_command("convert", "--salvage", "-f", "vhd", copy, copy.with_name("a.raw"))
    assert done.returncode == 1
    assert "-f raw reads what is left of a fixed disk" in done.stderr
    imgcore.convert(copy, copy.with_name("b.raw"), format="raw")
    assert copy.with_name("b.raw").read_bytes() == disk[: 5 * MIB]
    # With its footer, but without a part of its data.
    whole = path.read_bytes()
    copy.write_bytes(whole[: 5 * MIB] + whole[-512:])
    got, lost = salvaged(copy)
    assert [(row.guest_offset, row.length) for row in lost] == [(5 * MIB, DISK_NBYTES - 5 * MIB)]
    assert_salvaged(got, lost, disk)


VHD_ENTRIES = {"zero": 0, "past-the-end": 1 << 31, "in-the-header": 1, "overlaps": 20}


@pytest.mark.parametrize("entry", VHD_ENTRIES.values(), ids=VHD_ENTRIES)
def test_vhd_entry(entry: int, tmp_path: Path) -> None:
    disk = b"".join(bytes([n + 1]) * (2 * MIB) for n in range(4))
    (tmp_path / "d.raw").write_bytes(disk)
    path = tmp_path / "a.vhd"
    imgcore.convert(tmp_path / "d.raw", path)
    (table,) = struct.unpack_from(">Q", path.read_bytes(), 512 + 16)
    poke(path, (table + 8, vhd.be32(entry)))
    got, lost = salvaged(path)
    assert any(row.guest_offset <= 4 * MIB < row.guest_offset + row.length for row in lost)
    assert_salvaged(got, lost, disk)


def test_vdi_map(tmp_path: Path) -> None:
    disk = b"".join(vdi.fill(n) for n in range(4))
    path = vdi.make(tmp_path / "a.vdi", [0, 1, 2, 3])
    poke(path, (vdi.MAP_OFFSET + 4, struct.pack("<I", 77)))
    got, lost = salvaged(path)
    assert [(row.guest_offset, row.length) for row in lost] == [(MIB, MIB)]
    assert_salvaged(got, lost, disk)
    # Zeros in place of a part of the map: these entries name block 0.
    poke(path, (vdi.MAP_OFFSET, struct.pack("<4I", 0, 0, 0, 3)))
    got, lost = salvaged(path)
    assert [(row.guest_offset, row.length) for row in lost] == [(0, 3 * MIB)]
    assert_salvaged(got, lost, disk)


def _vhdx(path: Path, **fields: object) -> tuple[Path, bytes]:
    blocks = {n: (vhdx.FULL, vhdx.pattern(n, MIB)) for n in range(4)}
    made = vhdx.Vhdx(4 * MIB, blocks=blocks, **fields)  # type: ignore[arg-type]
    return made.write(path), made.expected()


def test_vhdx_headers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, disk = _vhdx(tmp_path / "a.vhdx")
    raw = path.read_bytes()
    damages = {
        "identifier": [(0, bytes(8))],
        "headers": [(at + 100, b"x") for at in vhdx.HEADERS],
        "no headers": [(at, bytes(4096)) for at in vhdx.HEADERS],
        "region tables": [(at + 5000, b"x") for at in vhdx.REGION_TABLES],
        "one of each": [(vhdx.HEADERS[0], b"x" * 99), (vhdx.REGION_TABLES[1], b"x" * 99)],
    }
    for name, changes in damages.items():
        path.write_bytes(raw)
        poke(path, *changes)
        if name != "one of each":
            with pytest.raises(imgcore.ImgcoreError):
                imgcore.convert(path, tmp_path / "strict.raw", format="vhdx")
        assert salvaged(path, format="vhdx") == (disk, ()), name
    path.write_bytes(raw)
    poke(path, *((at, bytes(4096)) for at in vhdx.REGION_TABLES))
    with pytest.raises(imgcore.CorruptImageError, match="has no region table"):
        salvaged(path)
    assert "salvaging" in caplog.text


def test_vhdx_log_that_cannot_be_replayed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, disk = _vhdx(tmp_path / "a.vhdx", log_guid=vhdx.guid(0x106), log=b"x" * PAGE)
    with pytest.raises(imgcore.CorruptImageError, match="must be replayed"):
        imgcore.convert(path, tmp_path / "strict.raw")
    assert salvaged(path) == (disk, ())
    assert "its log is not replayed" in caplog.text


def test_vhdx_log_of_a_file_that_was_cut(tmp_path: Path) -> None:
    """What the log says was written, and is gone, does not become zeros."""
    path, disk = _vhdx(tmp_path / "a.vhdx")
    path.write_bytes(path.read_bytes()[: 6 * MIB + 1000])
    got, lost = salvaged(path)
    assert sum(row.length for row in lost) == 2 * MIB - 512
    assert_salvaged(got, lost, disk)


VHDX_ENTRIES = {
    "reserved-state": 4 << 20 | 4,
    "reserved-bits": 5 << 20 | 6 | 8,
    "absent-with-reserved-bits": 8,
    "in-metadata": vhdx.METADATA_OFFSET | 6,
    "past-the-end": 1 << 40 | 6,
    "partial-without-parent": 4 << 20 | 7,
}


@pytest.mark.parametrize("entry", VHDX_ENTRIES.values(), ids=VHDX_ENTRIES)
def test_vhdx_entry(entry: int, tmp_path: Path) -> None:
    path, disk = _vhdx(tmp_path / "a.vhdx")
    poke(path, (vhdx.BAT_OFFSET + 16, struct.pack("<Q", entry)))
    got, lost = salvaged(path)
    assert [(row.guest_offset, row.length) for row in lost] == [(2 * MIB, MIB)]
    assert_salvaged(got, lost, disk)


def test_vhdx_sector_bitmaps(tmp_path: Path) -> None:
    """Without its bitmap, a block that is partly the parent's is lost."""
    base = vhdx.Vhdx(2 * MIB, blocks={0: (vhdx.FULL, vhdx.pattern(1, MIB))})
    base.write(tmp_path / "parent.vhdx")
    child = vhdx.Vhdx(
        2 * MIB,
        blocks={0: (vhdx.PARTIAL, vhdx.pattern(2, MIB)), 1: (vhdx.FULL, vhdx.pattern(3, MIB))},
        own_sectors={0: {1, 2}},
        locator=vhdx.child_locator(),
    )
    path = child.write(tmp_path / "child.vhdx")
    disk = child.expected(base.expected())
    assert salvaged(path) == (disk, ())
    for entry in (0, 1 << 40 | 6, (1 << 64) - 1):
        index = child.bitmap_index(0)
        poke(path, (vhdx.BAT_OFFSET + 8 * index, struct.pack("<Q", entry)))
        got, lost = salvaged(path)
        assert [(row.guest_offset, row.length) for row in lost] == [(0, MIB)]
        assert_salvaged(got, lost, disk)


@pytest.mark.parametrize(("suffix", "program"), [("gz", "gzip"), ("zst", "zstd")])
def test_streams(suffix: str, program: str, tmp_path: Path) -> None:
    """A stream ends where it is damaged; the advice saves what comes before."""
    disk = images.noise(4 * MIB)
    (tmp_path / "d.raw").write_bytes(disk)
    packed = tmp_path / f"d.raw.{suffix}"
    imgcore.convert(tmp_path / "d.raw", packed)
    packed.write_bytes(packed.read_bytes()[: 3 * MIB])
    done = imgcore_command("convert", "--salvage", packed, tmp_path / "a.qcow2")
    assert done.returncode != 0
    advice = f"({program} -dc FILE > disk.raw writes what comes before the damage)"
    assert advice in done.stderr
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    command = advice.strip("()").split(" writes")[0].replace("FILE", str(packed))
    subprocess.run(command, shell=True, check=False, cwd=tmp_path, capture_output=True)
    part = tmp_path / "disk.raw"
    os.truncate(part, part.stat().st_size // SECTOR * SECTOR)
    imgcore.convert(part, tmp_path / "a.qcow2")
    with imgcore.open(tmp_path / "a.qcow2") as image:
        assert image.virtual_size > 2 * MIB
        assert image.read(0, image.virtual_size) == disk[: image.virtual_size]


# ------------------------------------------------------------------ reports and limits


def test_report_of_the_command(tmp_path: Path) -> None:
    path = vdi.make(tmp_path / "a.vdi", [0, 1, 2, 3])
    poke(path, (vdi.MAP_OFFSET + 4, struct.pack("<I", 77)))
    done = imgcore_command("convert", "--json", "--salvage", path, tmp_path / "a.raw")
    assert done.returncode == 3
    assert f"lost: {MIB} bytes of the disk at 0x100000 (its place is unknown" in done.stderr
    (row,) = json.loads(done.stdout)["bad_ranges"]
    assert (row["guest_offset"], row["length"], row["path"]) == (MIB, MIB, str(path))


def test_every_target(tmp_path: Path) -> None:
    path = vdi.make(tmp_path / "a.vdi", [0, 1, 2, 3])
    poke(path, (vdi.MAP_OFFSET + 4, struct.pack("<I", 77)))
    expected = salvaged(path)[0]
    for name in ("b.raw", "b.qcow2", "b.vmdk", "b.vhd", "b.vhdx", "b.vdi"):
        result = imgcore.convert(path, tmp_path / name, salvage=True)
        assert len(result.bad_ranges) == 1
        with imgcore.open(tmp_path / name) as image:
            assert image.read(0, 4 * MIB) == expected


def test_the_number_of_ranges_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = vdi.make(tmp_path / "a.vdi", [0, 77, 1, 78, 2, 79, 80, 3])
    monkeypatch.setattr(disk_salvage, "MAX_BAD_RANGES", 3)
    assert [row.length for row in salvaged(path)[1]] == [MIB, MIB, 2 * MIB]
    monkeypatch.setattr(disk_salvage, "MAX_BAD_RANGES", 2)
    with pytest.raises(imgcore.LimitExceededError, match="more than 2 separate ranges"):
        salvaged(path)
    monkeypatch.setattr(disk_salvage, "SALVAGE_MAX_ROWS", 1)
    monkeypatch.setattr(disk_salvage, "MAX_BAD_RANGES", 3)
    assert len(salvaged(path)[1]) == 3


def test_data_without_a_table_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A table of zeros is one of holes, but the refcounts know that data is missing."""
    path = create(tmp_path / "a.qcow2", MIB)
    qemu_io(path, "write -P 7 0 1M")
    poke(path, (_l2_offset(path), bytes(8 * 16)))
    with caplog.at_level(logging.WARNING, "imgcore"):
        salvaged(path)
    assert "no table refers to 16 allocation units" in caplog.text


def test_damage_of_a_read(tmp_path: Path) -> None:
    """Of an unreadable table, the pieces around the bad one are read."""

    class Bad:
        nbytes = 10 * PAGE + 5
        content = images.noise(10 * PAGE + 5)

        def pread(self, offset: int, length: int) -> bytes:
            if offset < 4 * PAGE + 100 and offset + length > 4 * PAGE:
                raise OSError(5, "bad")
            return self.content[offset : offset + length]

    file = Bad()
    expected = bytearray(file.content[12 : 12 + 10 * PAGE])
    expected[4 * PAGE - 12 : 5 * PAGE - 12] = b"abcd" * (PAGE // 4)
    expected[10 * PAGE - 12 :] = b"abcd" * 3
    expected[10 * PAGE - 12 :] = b"abcdabcdabcd"[:12]
    got = Damage(salvages=True).read_table(file, 12, 10 * PAGE, b"abcd")
    assert got[: 10 * PAGE - 16] == expected[: 10 * PAGE - 16]
    assert len(got) == 10 * PAGE
    with pytest.raises(OSError, match="bad"):
        STRICT.read_table(file, 12, 10 * PAGE, b"abcd")


# ----------------------------------------------------------------------------- helpers


def test_overlaps() -> None:
    import numpy as np

    def overlaps(*ranges: tuple[int, int]) -> list[tuple[int, int]]:
        starts, ends = _overlaps([np.array(ranges, dtype=np.uint64).T])
        return list(zip(starts.tolist(), ends.tolist(), strict=True))

    assert overlaps((0, 10), (10, 20), (30, 40)) == []
    assert overlaps((0, 10), (5, 20)) == [(5, 10)]
    assert overlaps((0, 100), (10, 20), (15, 30), (90, 110)) == [(10, 30), (90, 100)]
    assert overlaps((50, 60), (0, 100), (50, 60)) == [(50, 60)]


def test_lose_ranges() -> None:
    import numpy as np

    rows = np.array(
        [
            (0, 4096, 100, 4096, 1, Kind.DATA, 0),
            (4096, 4096, 0, 0, 0, Kind.HOLE, 0),
            (8192, 4096, 9000, 4096, 2, Kind.DATA, 0),
        ],
        dtype=EXTENT_DTYPE,
    )

    def lost(*ranges: tuple[int, int], file: int | None = None) -> list[tuple[int, int]]:
        starts, ends = np.array(ranges, dtype=np.uint64).reshape(-1, 2).T.copy()
        found = lose_ranges(rows, starts, ends, file=file)
        assert int(found["length"].sum()) == 3 * 4096
        which = found["kind"] == Kind.LOST
        offsets, lengths = (found[name][which].tolist() for name in ("guest_offset", "length"))
        return list(zip(offsets, lengths, strict=True))

    assert lost() == []
    assert lost((512, 1024), (3584, 8704)) == [(512, 512), (3584, 512), (4096, 4096), (8192, 512)]
    # Host ranges: whole sectors of the guest that they touch.
    assert lost((100, 101), file=1) == [(0, 512)]
    assert lost((700, 1300), file=1) == [(512, 1024)]
    assert lost((0, 1 << 40), file=2) == [(8192, 4096)]
    assert lost((0, 1 << 40), file=3) == []
