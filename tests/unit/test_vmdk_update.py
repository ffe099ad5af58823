"""Writing to VMDK in place: headers, descriptors, missing tables, refusals."""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers import qemu, vmdk
from tests.helpers.vmdk import GRAIN, SECTOR, hosted

import imgcore
from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    OptionError,
    TargetError,
    UnsupportedFeatureError,
)
from imgcore.formats.api import BackingReference, Rebasable, Updater

MIB = 1 << 20
N_SECTORS = 4 * GRAIN // SECTOR
UNCLEAN = 72


def noise(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def make(folder: Path, nbytes: int = 2 * MIB, **options: object) -> Path:
    """Make a VMDK whose first half is data."""
    raw, path = folder / "source.raw", folder / "disk.vmdk"
    raw.write_bytes(noise(nbytes // 2).ljust(nbytes, b"\0"))
    imgcore.convert(raw, path, options=options)
    raw.unlink()
    return path


def make_child(folder: Path, **options: str) -> Path:
    parent, child = make(folder).rename(folder / "base.vmdk"), folder / "child.vmdk"
    stated = [f"-o{key}={value}" for key, value in options.items()]
    qemu.run("create", "-q", "-f", "vmdk", "-b", parent, "-F", "vmdk", *stated, child)
    return child


def content_of(path: Path) -> bytes:
    """Return the disk as qemu-img reads it."""
    copy = path.with_suffix(".copy")
    qemu.run("convert", "-f", "vmdk", "-O", "raw", path, copy)
    content = copy.read_bytes()
    copy.unlink()
    return content


def text_of(path: Path) -> bytes:
    """Return the descriptor."""
    raw = path.read_bytes()
    if raw.startswith(b"KDMV"):
        offset, nsectors = struct.unpack_from("<QQ", raw, 28)
        raw = raw[offset * SECTOR : (offset + nsectors) * SECTOR]
    return raw.split(b"\0")[0]


def cid_of(path: Path) -> bytes:
    match = re.search(rb"^CID=([0-9a-f]+)$", text_of(path), re.MULTILINE)
    assert match
    return match[1]


def require_sound(path: Path, content: bytes) -> None:
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems
    qemu.run("check", "-f", "vmdk", path)
    assert content_of(path) == content


# -- the content ID, and the mark of an unclean shutdown -------------------------------


@pytest.mark.parametrize("subformat", ["monolithicSparse", "monolithicFlat"])
def test_the_content_id_changes_once_a_session(tmp_path: Path, subformat: str) -> None:
    path = make(tmp_path, subformat=subformat)
    old = text_of(path)
    with imgcore.open(path, mode="r+") as image:
        image.flush()
    assert text_of(path) == old
    with imgcore.open(path, mode="r+") as image:
        image.write(0, b"1")
        during = cid_of(path)
        image.write(MIB, b"2")
        image.flush()
        assert image.reader.identities == {"content ID": during.decode()}
    new = text_of(path)
    assert cid_of(path) == during != re.search(rb"^CID=(.*)$", old, re.MULTILINE)[1]  # type: ignore[index]
    assert b"longContentID" in new and new.split(b'longContentID = "')[1][24:32] == during
    # Nothing else is different.
    assert [a for a, b in zip(old.split(b"\n"), new.split(b"\n"), strict=True) if a != b] == [
        line for line in old.split(b"\n") if line.startswith((b"CID=", b"ddb.longContentID"))
    ]


def test_a_short_content_id_stays_short(tmp_path: Path) -> None:
    """qemu-img writes content IDs without leading zeros."""
    path = make(tmp_path)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"CID=" + cid_of(path), b"CID=abc\n\n\n\n\n", 1))
    with imgcore.open(path, mode="r+") as image:
        image.write(0, b"1")
    assert len(cid_of(path)) == 3
    assert cid_of(path) != b"abc"


def test_a_child_of_a_changed_parent_is_refused(tmp_path: Path) -> None:
    child = make_child(tmp_path)
    with imgcore.open(tmp_path / "base.vmdk", mode="r+") as image:
        image.write(0, b"1")
    with pytest.raises(CorruptImageError, match="content ID"):
        imgcore.open(child)


def test_the_extent_is_marked_while_it_is_written_to(tmp_path: Path) -> None:
    path = make(tmp_path)
    with imgcore.open(path, mode="r+") as image:
        assert path.read_bytes()[UNCLEAN] == 0
        image.discard(0, 1)
        assert path.read_bytes()[UNCLEAN] == 1
    assert path.read_bytes()[UNCLEAN] == 0


# -- tables ----------------------------------------------------------------------------


def without_tables(folder: Path, directories: tuple[int, ...]) -> Path:
    """Make an image whose directories lack the table."""
    path = hosted(folder / "disk.vmdk", N_SECTORS, {})
    raw = bytearray(path.read_bytes())
    for sector in directories:
        vmdk.put(raw, sector, struct.pack("<I", 0))
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("directories", [(21, 26), (21,), (26,)])
def test_missing_tables_are_made(tmp_path: Path, directories: tuple[int, ...]) -> None:
    path = without_tables(tmp_path, directories)
    data = noise(GRAIN)
    with imgcore.open(path, mode="r+") as image:
        image.write(GRAIN + 5, data)
        assert image.read(GRAIN + 5, GRAIN) == data
        image.flush()
        image.write(0, data[:7])
    disk = bytearray(4 * GRAIN)
    disk[GRAIN + 5 : 2 * GRAIN + 5] = data
    disk[:7] = data[:7]
    require_sound(path, bytes(disk))


def test_zeroed_tables_stay_zeros(tmp_path: Path) -> None:
    """An entry of 1 in the directory: all grains of the table are zeros."""
    path = hosted(tmp_path / "disk.vmdk", N_SECTORS, {}, version=2, flags=7)
    raw = bytearray(path.read_bytes())
    for sector in (21, 26):
        vmdk.put(raw, sector, struct.pack("<I", 1))
    path.write_bytes(raw)
    with imgcore.open(path, mode="r+") as image:
        image.write(0, b"1")
    table = struct.unpack_from("<I", path.read_bytes(), 26 * SECTOR)[0]
    assert struct.unpack_from("<4I", path.read_bytes(), table * SECTOR)[1:] == (1, 1, 1)
    assert imgcore.check(path).corruptions == 0


def test_a_stale_redundant_table_is_a_leak(tmp_path: Path) -> None:
    path = hosted(tmp_path / "disk.vmdk", N_SECTORS, {0: noise(GRAIN)})
    raw = bytearray(path.read_bytes())
    vmdk.put(raw, 22, struct.pack("<I", 0))
    path.write_bytes(raw)
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 1), report.problems
    # Whoever writes to an image that was not closed cleanly makes its tables equal.
    raw[UNCLEAN] = 1
    path.write_bytes(raw)
    with imgcore.open(path, mode="r+") as image:
        image.write(GRAIN, b"2")
    require_sound(path, noise(GRAIN) + b"2".ljust(3 * GRAIN, b"\0"))


def test_leaked_grains_are_given_back(tmp_path: Path) -> None:
    """Between others, and at the file's end."""
    path = hosted(tmp_path / "disk.vmdk", N_SECTORS, {n: noise(GRAIN, n) for n in range(4)})
    raw = bytearray(path.read_bytes())
    for table in (22, 27):
        for grain in (1, 3):
            struct.pack_into("<I", raw, table * SECTOR + 4 * grain, 0)
    path.write_bytes(raw)
    assert imgcore.check(path).leaks == 2
    with imgcore.open(path, mode="r+") as image:
        image.write(0, b"1")
    disk = b"1" + noise(GRAIN, 0)[1:] + bytes(GRAIN) + noise(GRAIN, 2) + bytes(GRAIN)
    require_sound(path, disk)


def test_freed_grains_are_given_back_and_used_again(tmp_path: Path) -> None:
    path = make(tmp_path)
    nbytes = path.stat().st_size
    with imgcore.open(path, mode="r+") as image:
        image.discard(0, MIB // 2)
        image.flush()
        image.write(MIB + MIB // 2, noise(MIB // 2, 1))
        image.flush()
    assert path.stat().st_size == nbytes
    data = noise(MIB)[MIB // 2 :]
    require_sound(path, bytes(MIB // 2) + data + bytes(MIB // 2) + noise(MIB // 2, 1))
    with imgcore.open(path, mode="r+") as image:
        image.zero(0, 2 * MIB)
    assert path.stat().st_size < 10 * GRAIN
    require_sound(path, bytes(2 * MIB))


@pytest.mark.parametrize("zeroed", ["on", "off"])
def test_zeros_hide_the_parent(tmp_path: Path, zeroed: str) -> None:
    child = make_child(tmp_path, zeroed_grain=zeroed)
    with imgcore.open(child, mode="r+") as image:
        image.write(5 * GRAIN, b"x" * GRAIN)
        image.zero(3 * GRAIN + 100, 4 * GRAIN)
        image.discard(5 * GRAIN, GRAIN)
    base = noise(MIB).ljust(2 * MIB, b"\0")
    content = bytearray(base)
    content[3 * GRAIN + 100 : 7 * GRAIN + 100] = bytes(4 * GRAIN)
    require_sound(child, bytes(content))


# -- size ------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(200 * MIB,), (300 * MIB, 700 * MIB, 5000 * MIB), (3 * MIB,)])
@pytest.mark.parametrize("grain_size", [8192, 65536])
def test_growing(tmp_path: Path, sizes: tuple[int, ...], grain_size: int) -> None:
    """Also where the directory moves: it has 128 entries of 4 or 32 MiB in a sector."""
    path = make(tmp_path, 2 * MIB - SECTOR, grain_size=grain_size)
    content = {0: noise(MIB - SECTOR // 2)}
    for size in sizes:
        with imgcore.open(path, mode="r+") as image:
            image.resize(size)
            assert image.virtual_size == size
            content[size - 1000] = noise(1000, size)
            image.write(size - 1000, content[size - 1000])
        report = imgcore.check(path)
        assert (report.corruptions, report.leaks) == (0, 0), report.problems
        qemu.run("check", "-f", "vmdk", path)
        assert qemu.info(path, "vmdk")["virtual-size"] == size
    other = tmp_path / "other.raw"
    with other.open("wb") as file:
        for offset, data in content.items():
            file.seek(offset)
            file.write(data)
    qemu.run("compare", "-f", "vmdk", "-F", "raw", path, other)
    assert b'ddb.geometry.cylinders = "' in text_of(path)


def test_what_shrinking_cuts_off_does_not_come_back(tmp_path: Path) -> None:
    path = make(tmp_path, 2 * MIB)
    with imgcore.open(path, mode="r+") as image:
        image.resize(GRAIN + SECTOR, shrink=True)
        image.resize(2 * MIB)
        assert image.read(0, 2 * MIB) == noise(MIB)[: GRAIN + SECTOR].ljust(2 * MIB, b"\0")
    require_sound(path, noise(MIB)[: GRAIN + SECTOR].ljust(2 * MIB, b"\0"))
    assert path.stat().st_size < 8 * GRAIN


def test_qemu_reads_what_has_no_grains(tmp_path: Path) -> None:
    path = tmp_path / "disk.vmdk"
    imgcore.create(path, 513 * MIB)
    with imgcore.open(path, mode="r+") as image:
        image.resize(513 * MIB - SECTOR, shrink=True)
    qemu.run("check", "-f", "vmdk", path)
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems


@pytest.mark.parametrize("size", [MIB, 3 * MIB])
def test_a_flat_disk_changes_its_size(tmp_path: Path, size: int) -> None:
    path = make(tmp_path, subformat="monolithicFlat")
    path.chmod(0o640)
    with imgcore.open(path, mode="r+") as image:
        image.resize(size, shrink=True)
        image.write(size - 3, b"end")
    assert path.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "disk-flat.vmdk").stat().st_size == size
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["disk-flat.vmdk", "disk.vmdk"]
    assert content_of(path) == noise(MIB).ljust(3 * MIB, b"\0")[: size - 3] + b"end"


def test_an_image_without_a_name_keeps_its_flat_size(tmp_path: Path) -> None:
    path = make(tmp_path, subformat="monolithicFlat")
    with path.open("r+b") as file:
        number = file.fileno()
        image = imgcore.open(number, mode="r+", format="vmdk", allow=[tmp_path])
        with image, pytest.raises(TargetError, match="given by its descriptor"):
            image.resize(MIB, shrink=True)
    assert content_of(path) == noise(MIB).ljust(2 * MIB, b"\0")


def test_a_child_keeps_its_size(tmp_path: Path) -> None:
    with (
        imgcore.open(make_child(tmp_path), mode="r+") as image,
        pytest.raises(OptionError, match="parent"),
    ):
        image.resize(4 * MIB)


def test_a_descriptor_that_is_away_comes_home(tmp_path: Path) -> None:
    """A change of the header was interrupted: QEMU reads the descriptor in sector 1."""
    path = make(tmp_path)
    raw = bytearray(path.read_bytes())
    text = raw[SECTOR : 21 * SECTOR]
    struct.pack_into("<Q", raw, 28, len(raw) // SECTOR)
    raw[SECTOR : SECTOR + 30] = b"#" * 30
    path.write_bytes(raw + text)
    with imgcore.open(path, mode="r+") as image:
        content = image.read(0, 2 * MIB)
        image.write(0, b"1")
        assert struct.unpack_from("<Q", path.read_bytes(), 28) == (1,)
    assert cid_of(path) != re.search(rb"CID=(\w+)", bytes(text))[1]  # type: ignore[index]
    require_sound(path, b"1" + content[1:])


# -- the parent ------------------------------------------------------------------------


def set_backing(reference: BackingReference | None) -> Callable[[Updater], None]:
    def change(updater: Updater) -> None:
        assert isinstance(updater, Rebasable)
        updater.set_backing(reference)

    return change


@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse"])
def test_another_parent(tmp_path: Path, subformat: str) -> None:
    child = make_child(tmp_path, subformat=subformat)
    other = tmp_path / "another parent with a longer name.vmdk"
    (tmp_path / "base.vmdk").rename(other)
    with imgcore.open(child, mode="r+", parent=[other]) as image:
        image.write(100, b"child")
        identities = image.layers[1].identities
        image.flush()
    with imgcore.open(child, mode="r+", parent=[other]) as image:
        image.restructure(set_backing(BackingReference(other.name, "vmdk", identities)))
        assert image.read(100, 5) == b"child"
    content = bytearray(noise(MIB).ljust(2 * MIB, b"\0"))
    content[100:105] = b"child"
    require_sound(child, bytes(content))
    assert imgcore.info(child)["backing-filename"] == other.name


def test_no_parent(tmp_path: Path) -> None:
    child = make_child(tmp_path)
    content = noise(MIB).ljust(2 * MIB, b"\0")
    with imgcore.open(child, mode="r+") as image:
        image.write(0, content[:MIB])
        image.restructure(set_backing(None))
    (tmp_path / "base.vmdk").unlink()
    require_sound(child, content)
    assert b"parentCID=ffffffff" in text_of(child)


def test_dropped_grains_are_the_parents(tmp_path: Path) -> None:
    child = make_child(tmp_path)
    with imgcore.open(child, mode="r+") as image:
        image.write(0, b"x" * (3 * GRAIN))

        def change(updater: Updater) -> None:
            assert isinstance(updater, Rebasable)
            updater.drop(GRAIN, GRAIN)

        image.restructure(change)
        # The next change gives back what was dropped.
        image.flush()
        image.zero(2 * MIB - 1, 1)
    content = bytearray(noise(MIB).ljust(2 * MIB, b"\0"))
    content[:GRAIN] = content[2 * GRAIN : 3 * GRAIN] = b"x" * GRAIN
    require_sound(child, bytes(content))


def test_a_grain_is_not_completed_without_the_parent(tmp_path: Path) -> None:
    child = make_child(tmp_path)
    with imgcore.open(child, mode="r+", chain=False) as image:
        with pytest.raises(ImgcoreError, match="without its parent"):
            image.write(5, b"1")
        image.write(3 * GRAIN, b"2" * GRAIN)
    content = bytearray(noise(MIB).ljust(2 * MIB, b"\0"))
    content[3 * GRAIN : 4 * GRAIN] = b"2" * GRAIN
    require_sound(child, bytes(content))


# -- refusals --------------------------------------------------------------------------


def refused(path: Path, kind: type[ImgcoreError], word: str) -> None:
    before = {entry: entry.read_bytes() for entry in path.parent.iterdir()}
    with pytest.raises(kind, match=word):
        imgcore.open(path, mode="r+")
    assert {entry: entry.read_bytes() for entry in path.parent.iterdir()} == before


def test_compressed_grains_are_refused(tmp_path: Path) -> None:
    refused(make(tmp_path, subformat="streamOptimized"), UnsupportedFeatureError, "compressed")


@pytest.mark.parametrize(
    ("lines", "kind", "word"),
    [
        (['RW 128 FLAT "f" 0', "RW 128 ZERO"], UnsupportedFeatureError, "ZERO"),
        (['RDONLY 128 FLAT "f" 0'], UnsupportedFeatureError, "RDONLY"),
        (['RW 128 FLAT "f" 0', 'RW 64 FLAT "f" 127'], CorruptImageError, "same file"),
        (['RW 128 SPARSE "s"', 'RW 128 SPARSE "s"'], CorruptImageError, "same file"),
        (['RW 64 FLAT "f" 0', 'RW 128 SPARSE "s"'], UnsupportedFeatureError, "multiple of"),
    ],
)
def test_odd_extents_are_refused(
    tmp_path: Path, lines: list[str], kind: type[ImgcoreError], word: str
) -> None:
    (tmp_path / "f").write_bytes(bytes(256 * SECTOR))
    hosted(tmp_path / "s", 128, {})
    path = tmp_path / "disk.vmdk"
    path.write_bytes(vmdk.descriptor("custom", *lines))
    refused(path, kind, word)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (27 * SECTOR, 0x100000),  # a grain past the end
        (27 * SECTOR, 2),  # in the descriptor
        (27 * SECTOR, 22),  # in a table
        (27 * SECTOR + 4, 129),  # across another grain
        (27 * SECTOR + 4, 128),  # the same grain
        (26 * SECTOR, 1),  # a table in the descriptor
        (26 * SECTOR, 128),  # a table in a grain
        (26 * SECTOR, 0x100000),  # a table past the end
        (21 * SECTOR, 26),  # a redundant table in the directory
        (21 * SECTOR, 27),  # both tables at one place
        (56, 21),  # both directories at one place
        (56, 128),  # a directory in a grain
        (56, 0x100000),  # a directory past the end: the other one is read
        (28, 128),  # the descriptor in a grain
    ],
)
def test_overlaps_are_refused(tmp_path: Path, offset: int, value: int) -> None:
    grain = vmdk.descriptor("monolithicSparse", f'RW {N_SECTORS} SPARSE "x"').ljust(GRAIN, b"\0")
    path = hosted(tmp_path / "disk.vmdk", N_SECTORS, {0: grain, 3: noise(GRAIN)})
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, offset, value)
    path.write_bytes(raw)
    refused(path, CorruptImageError, ".")


def test_a_large_disk_is_discarded_as_a_whole(tmp_path: Path) -> None:
    """Every part of it has a table."""
    path = tmp_path / "disk.vmdk"
    imgcore.create(path, 1 << 44)
    data = noise(GRAIN)
    with imgcore.open(path, mode="r+") as image:
        image.write(1 << 43, data)
        image.write((1 << 44) - GRAIN, data)
        image.flush()
        image.discard(0, (1 << 44) - GRAIN)
        image.flush()
        assert image.read(1 << 43, GRAIN) == bytes(GRAIN)
        image.zero((1 << 44) - (1 << 40), 1 << 40)
        assert image.read((1 << 44) - GRAIN, GRAIN) == bytes(GRAIN)
    report = imgcore.check(path)
    assert (report.allocated_clusters, report.leaks, report.corruptions) == (0, 0, 0)
