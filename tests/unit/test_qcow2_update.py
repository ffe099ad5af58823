"""Writing to QCOW2 images in place: what the tests of all formats do not see."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import pytest
from tests.helpers import qcow2, qemu
from tests.helpers.command import imgcore as imgcore_command
from tests.helpers.reading import poke

import imgcore
from imgcore.files.update_file import UpdateFile
from imgcore.formats.api import BackingReference, Rebasable
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.free_runs import FreeRuns
from imgcore.formats.qcow2.reader import Qcow2Reader
from imgcore.formats.qcow2.updater import Qcow2Updater, updater_for

KIB = 1024
MIB = 1024 * KIB
CLUSTER = 64 * KIB


def made(path: Path, content: bytes, *options: str) -> Path:
    """Make an image of that content with qemu-img."""
    raw = path.with_suffix(".source")
    raw.write_bytes(content)
    words = ["-o", ",".join(options)] if options else []
    qemu.run("convert", "-f", "raw", "-O", "qcow2", *words, raw, path)
    raw.unlink()
    return path


def read_by_qemu(path: Path) -> bytes:
    copy = path.with_suffix(".copy")
    qemu.run("convert", "-O", "raw", path, copy)
    return copy.read_bytes()


def noise(nbytes: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def l2_entry(path: Path, cluster: int) -> tuple[int, int]:
    """Return the entry of a cluster of the disk, and its host offset."""
    structure = qcow2.read_structure(path)
    raw = path.read_bytes()
    per_table = structure.cluster_size // 8
    at = structure.l1_offset + cluster // per_table * 8
    table = int.from_bytes(raw[at : at + 8], "big") & layout.OFFSET_MASK
    at = table + cluster % per_table * 8
    return int.from_bytes(raw[at : at + 8], "big"), at


def check(path: Path) -> None:
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems
    qemu.run("check", "-f", "qcow2", path)


@contextmanager
def updating(path: Path, *, parent_nbytes: int | None = None) -> Iterator[Qcow2Updater]:
    """Give the updater of an image that nothing else uses."""
    with UpdateFile.open(path) as file:
        updater = updater_for(Qcow2Reader(file), parent_nbytes)
        updater.begin(again=False)
        yield updater


# -- space -----------------------------------------------------------------------------


def test_zeros_free_their_clusters_or_keep_them(tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", noise(4 * CLUSTER))
    before = l2_entry(path, 1)[0] & layout.OFFSET_MASK
    with imgcore.open(path, mode="r+") as image:
        image.zero(0, CLUSTER, unmap=True)
        image.zero(CLUSTER, CLUSTER, unmap=False)
        image.discard(2 * CLUSTER, CLUSTER)
    assert l2_entry(path, 0)[0] == layout.ZERO_FLAG
    assert l2_entry(path, 1)[0] == before | layout.COPIED | layout.ZERO_FLAG
    assert l2_entry(path, 2)[0] == 0
    check(path)
    with imgcore.open(path, mode="r+") as image:
        # The cluster that was kept is written as a whole.
        image.write(CLUSTER + 5 * KIB, b"x" * KIB)
    assert l2_entry(path, 1)[0] == before | layout.COPIED
    expected = bytes(CLUSTER + 5 * KIB) + b"x" * KIB + bytes(2 * CLUSTER - 6 * KIB)
    assert qcow2.read_guest(path)[: 3 * CLUSTER] == expected
    check(path)


def test_freed_space_is_punched_and_used_again(tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", noise(64 * CLUSTER))
    with imgcore.open(path, mode="r+") as image:
        image.discard(8 * CLUSTER, 16 * CLUSTER)
        image.flush()
        assert path.stat().st_blocks * 512 < 54 * CLUSTER
        nbytes = path.stat().st_size
        image.write(8 * CLUSTER, noise(16 * CLUSTER, 2))
        image.flush()
    assert path.stat().st_size <= nbytes
    check(path)


def test_a_closed_image_is_tight(tmp_path: Path) -> None:
    path = qcow2.create(tmp_path / "a.qcow2", 64 * MIB)
    with imgcore.open(path, mode="r+") as image:
        image.write(0, noise(3 * CLUSTER))
    by_qemu = made(tmp_path / "b.qcow2", noise(3 * CLUSTER) + bytes(64 * MIB - 3 * CLUSTER))
    assert path.stat().st_size <= by_qemu.stat().st_size
    with imgcore.open(path, mode="r+") as image:
        image.discard(2 * CLUSTER, CLUSTER)
    assert path.stat().st_size <= by_qemu.stat().st_size - CLUSTER
    check(path)


def test_neighbours_of_the_disk_are_neighbours_in_the_file(tmp_path: Path) -> None:
    path = qcow2.create(tmp_path / "a.qcow2", 64 * MIB)
    with imgcore.open(path, mode="r+") as image:
        for at in range(0, 4 * MIB, CLUSTER):
            image.write(at, noise(CLUSTER))
        rows = [row for row in image.extents() if True]
    data = [row for batch in rows for row in batch if row["kind"] == 2]
    assert len(data) == 1


@pytest.mark.parametrize("bits", ["1", "2", "8", "16", "32", "64"])
def test_refcount_tables_grow_and_move(bits: str, tmp_path: Path) -> None:
    options = ("cluster_size=512", f"refcount_bits={bits}")
    path = qcow2.create(tmp_path / "a.qcow2", 48 * MIB, *options)
    before = qcow2.read_structure(path).table_offset
    content = noise(20 * MIB)
    with imgcore.open(path, mode="r+") as image:
        for at in range(0, len(content), 3 * MIB):
            image.write(at, content[at : at + 3 * MIB])
        image.discard(MIB, MIB)
    after = qcow2.read_structure(path).table_offset
    # 512 bytes of a table have 64 blocks of 512 bytes.
    assert (after != before) == (64 * 4096 // int(bits) * 512 < 20 * MIB)
    check(path)
    found = qcow2.read_guest(path)
    assert found[:MIB] == content[:MIB]
    assert found[2 * MIB : 20 * MIB] == content[2 * MIB :]


def test_free_runs() -> None:
    runs, model = FreeRuns(), set[int]()
    chance = random.Random(1)
    for _ in range(3000):
        start = chance.randrange(100)
        end = start + chance.randint(1, 9)
        if chance.random() < 0.5:
            runs.add(start, end)
            model.update(range(start, end))
        else:
            runs.remove(start, end)
            model.difference_update(range(start, end))
        n = 0
        while start + n in model:
            n += 1
        assert runs.n_from(start) == n
        wanted = chance.randint(1, 5)
        fits = (at for at in range(110) if model.issuperset(range(at, at + wanted)))
        assert runs.first_of(wanted) == next(fits, None)


# -- what shares clusters --------------------------------------------------------------


@pytest.mark.parametrize("cluster_size", [512, 4096, CLUSTER])
def test_snapshots_keep_their_content(cluster_size: int, tmp_path: Path) -> None:
    old, new = noise(2 * MIB), bytearray(noise(2 * MIB))
    path = made(tmp_path / "a.qcow2", old, f"cluster_size={cluster_size}")
    qemu.run("snapshot", "-c", "one", path)
    chance = random.Random(2)
    with imgcore.open(path, mode="r+") as image:
        for seed in range(40):
            at, nbytes = chance.randrange(2 * MIB - 9000), chance.randint(1, 9000)
            new[at : at + nbytes] = noise(nbytes, seed)
            image.write(at, noise(nbytes, seed))
        image.zero(MIB, 200_000, unmap=False)
        new[MIB : MIB + 200_000] = bytes(200_000)
        image.write(MIB + 777, b"in a cluster that was shared")
        new[MIB + 777 : MIB + 805] = b"in a cluster that was shared"
    check(path)
    assert qcow2.read_guest(path) == bytes(new)
    copy = tmp_path / "one.raw"
    qemu.run("convert", "-l", "one", "-O", "raw", path, copy)
    assert copy.read_bytes() == old
    qemu.run("snapshot", "-d", "one", path)
    check(path)
    assert qcow2.read_guest(path) == bytes(new)


def test_compressed_clusters_share_host_clusters(tmp_path: Path) -> None:
    content = b"".join(bytes([number]) * CLUSTER for number in range(1, 17))
    raw, path = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes(content)
    imgcore.convert(raw, path, compress=True)
    with imgcore.open(path, mode="r+") as image:
        image.write(3 * CLUSTER + 100, b"plain")
    expected = bytearray(content)
    expected[3 * CLUSTER + 100 : 3 * CLUSTER + 105] = b"plain"
    assert qcow2.read_guest(path) == bytes(expected)
    check(path)
    with imgcore.open(path, mode="r+") as image:
        image.discard(0, len(content))
    check(path)


# -- marks in the header ---------------------------------------------------------------


def bitmap_flags(path: Path) -> dict[str, list[str]]:
    done = qemu.run("info", "--output=json", path)
    bitmaps = json.loads(done.stdout)["format-specific"]["data"]["bitmaps"]
    return {bitmap["name"]: bitmap["flags"] for bitmap in bitmaps}


def test_enabled_bitmaps_become_stale(tmp_path: Path) -> None:
    path = qcow2.create(tmp_path / "a.qcow2", 8 * MIB)
    qemu.run("bitmap", "--add", path, "on")
    qemu.run("bitmap", "--add", "--disable", path, "off")
    with imgcore.open(path, mode="r+"):
        pass
    assert bitmap_flags(path) == {"on": ["auto"], "off": []}
    with imgcore.open(path, mode="r+") as image:
        image.write(MIB, b"x")
    assert bitmap_flags(path) == {"on": ["in-use", "auto"], "off": []}
    check(path)
    with pytest.raises(imgcore.UnsupportedFeatureError, match="'on' is in use"):
        list(imgcore.changes(path, bitmap="on"))
    assert list(imgcore.changes(path, bitmap="off")) == []
    with (
        imgcore.open(path, mode="r+") as image,
        pytest.raises(imgcore.OptionError, match="with a bitmap \\('off'\\)"),
    ):
        image.resize(16 * MIB)
    qemu.run("bitmap", "--remove", path, "off")
    with imgcore.open(path, mode="r+") as image:
        image.resize(16 * MIB)
    check(path)


def test_unknown_autoclear_features_are_cleared(tmp_path: Path) -> None:
    path = qcow2.create(tmp_path / "a.qcow2", 8 * MIB)
    poke(path, (layout.AUTOCLEAR_FIELD_OFFSET, struct.pack(">Q", 1 << 40)))
    with imgcore.open(path, mode="r+") as image:
        assert path.read_bytes()[88:96] == struct.pack(">Q", 1 << 40)
        image.write(0, b"x")
    assert path.read_bytes()[88:96] == bytes(8)


@pytest.mark.parametrize("bit", [layout.INCOMPATIBLE_DIRTY, layout.INCOMPATIBLE_CORRUPT])
def test_a_marked_image_is_refused_until_it_is_repaired(bit: int, tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", noise(MIB))
    poke(path, (layout.INCOMPATIBLE_FIELD_OFFSET, struct.pack(">Q", bit)))
    with pytest.raises(imgcore.UnsupportedFeatureError, match="imgcore check -r all repairs it"):
        imgcore.open(path, mode="r+")
    assert imgcore_command("check", "-r", "all", path).returncode == 0
    with imgcore.open(path, mode="r+") as image:
        image.write(0, b"x")
    check(path)


def test_lazy_refcounts_are_kept_right(tmp_path: Path) -> None:
    path = qcow2.create(tmp_path / "a.qcow2", 8 * MIB, "lazy_refcounts=on")
    with imgcore.open(path, mode="r+") as image:
        image.write(MIB, noise(MIB))
        image.flush()
        copy = tmp_path / "copy.qcow2"
        copy.write_bytes(path.read_bytes())
        check(copy)
    check(path)


# -- hostile images --------------------------------------------------------------------

PLACES: dict[str, Callable[[qcow2.Structure], int]] = {
    "the header": lambda structure: 0,
    "the L1 table": lambda structure: structure.l1_offset,
    "the refcount table": lambda structure: structure.table_offset,
    "a refcount block": lambda structure: structure.blocks[0],
}


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    "flags", [layout.COPIED, 0, layout.COPIED | layout.ZERO_FLAG, layout.COMPRESSED]
)
@pytest.mark.parametrize("change", ["write", "zero", "discard"])
def test_guest_data_never_goes_to_tables(
    where: str, flags: int, change: str, tmp_path: Path
) -> None:
    path = made(tmp_path / "a.qcow2", noise(4 * CLUSTER))
    offset = PLACES[where](qcow2.read_structure(path))
    if not offset and not flags & layout.COMPRESSED and (change != "write" or not flags):
        return  # no cluster
    poke(path, (l2_entry(path, 1)[1], struct.pack(">Q", offset | flags)))
    before = path.read_bytes()
    with imgcore.open(path, mode="r+") as image:
        with pytest.raises(imgcore.CorruptImageError):
            if change == "write":
                image.write(CLUSTER + 100, b"x" * 1000)
            elif change == "zero":
                image.zero(CLUSTER, CLUSTER)
            else:
                image.discard(CLUSTER, CLUSTER)
        image.write(0, noise(CLUSTER))
    assert path.read_bytes() == before


def test_an_l2_table_is_not_guest_data(tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", noise(4 * CLUSTER))
    _, at = l2_entry(path, 0)
    poke(path, (at, struct.pack(">Q", (at - at % CLUSTER) | layout.COPIED)))
    with (
        imgcore.open(path, mode="r+") as image,
        pytest.raises(imgcore.CorruptImageError, match="guest data is said to be there"),
    ):
        image.write(0, b"x")


def test_a_cluster_without_a_refcount_is_not_written_to(tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", noise(4 * CLUSTER))
    structure = qcow2.read_structure(path)
    cluster = (l2_entry(path, 1)[0] & layout.OFFSET_MASK) // CLUSTER
    poke(path, (structure.blocks[0] + 2 * cluster, b"\0\0"))
    with (
        imgcore.open(path, mode="r+") as image,
        pytest.raises(imgcore.CorruptImageError, match="check -r all corrects them"),
    ):
        image.write(CLUSTER, b"x")
    assert imgcore_command("check", "-r", "all", path).returncode == 0
    with imgcore.open(path, mode="r+") as image:
        image.write(CLUSTER, b"x")
    check(path)


def test_an_l2_table_without_a_refcount_is_not_written_to(tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", noise(4 * CLUSTER))
    _, at = l2_entry(path, 1)
    poke(path, (qcow2.read_structure(path).blocks[0] + 2 * (at // CLUSTER), b"\0\0"))
    with (
        imgcore.open(path, mode="r+") as image,
        pytest.raises(imgcore.CorruptImageError, match="has a refcount of 0"),
    ):
        image.discard(0, CLUSTER)
    assert imgcore_command("check", "-r", "all", path).returncode == 0
    with imgcore.open(path, mode="r+") as image:
        image.discard(0, CLUSTER)
    check(path)


def test_a_table_without_a_refcount_is_not_overwritten(tmp_path: Path) -> None:
    """The space seems to be free, and is the first that is."""
    path = qcow2.create(tmp_path / "a.qcow2", 8 * MIB)
    structure = qcow2.read_structure(path)
    poke(path, (structure.blocks[0], bytes(2 * 3)))
    before = path.read_bytes()
    with (
        imgcore.open(path, mode="r+") as image,
        pytest.raises(imgcore.CorruptImageError, match="its refcount is 0"),
    ):
        image.write(0, b"x")
    assert path.read_bytes() == before


def test_clusters_that_are_used_twice_are_copied(tmp_path: Path) -> None:
    """Refcounts of 2 without a snapshot are unusual, but right."""
    path = made(tmp_path / "a.qcow2", noise(4 * CLUSTER))
    entry, _ = l2_entry(path, 1)
    shared = entry & layout.OFFSET_MASK
    for cluster in (1, 2):
        poke(path, (l2_entry(path, cluster)[1], struct.pack(">Q", shared)))
    counts = qcow2.read_structure(path).blocks[0]
    poke(path, (counts + 2 * (shared // CLUSTER), b"\0\2"))
    content = bytearray(qcow2.read_guest(path))
    with imgcore.open(path, mode="r+") as image:
        image.write(CLUSTER + 5, b"only here")
    content[CLUSTER + 5 : CLUSTER + 14] = b"only here"
    assert qcow2.read_guest(path) == bytes(content)
    assert qcow2.read_structure(path).refcounts[shared // CLUSTER] == 1


@pytest.mark.parametrize("what", ["L1", "refcount table"])
def test_tables_that_overlap_are_refused(what: str, tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", noise(4 * CLUSTER))
    structure = qcow2.read_structure(path)
    if what == "L1":
        poke(path, (structure.l1_offset, struct.pack(">Q", structure.blocks[0] | layout.COPIED)))
    else:
        poke(path, (structure.table_offset, struct.pack(">Q", structure.l1_offset)))
    with pytest.raises(imgcore.CorruptImageError, match="holds two tables"):
        imgcore.open(path, mode="r+")


@pytest.mark.parametrize(
    "entry", [CLUSTER // 2, 1 << 50, 1 << 57, layout.COPIED, layout.COPIED | 0x200]
)
def test_impossible_entries_are_refused(entry: int, tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", noise(4 * CLUSTER))
    poke(path, (l2_entry(path, 1)[1], struct.pack(">Q", entry)))
    with imgcore.open(path, mode="r+") as image, pytest.raises(imgcore.CorruptImageError):
        image.write(CLUSTER, noise(CLUSTER))


# -- sizes -----------------------------------------------------------------------------


def test_an_overlay_that_grows_hides_its_longer_parent(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(noise(8 * MIB))
    path = qcow2.create(tmp_path / "a.qcow2", 2 * MIB + 512, backing=base)
    with imgcore.open(path, mode="r+", allow=[tmp_path]) as image:
        image.resize(6 * MIB)
        assert image.read(0, 6 * MIB) == noise(8 * MIB)[: 2 * MIB + 512].ljust(6 * MIB, b"\0")
    assert read_by_qemu(path) == noise(8 * MIB)[: 2 * MIB + 512].ljust(6 * MIB, b"\0")
    check(path)


def test_an_overlay_that_grows_beyond_its_parent_gets_no_tables(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(noise(MIB))
    for version in ("0.10", "1.1"):
        path = tmp_path / f"{version}.qcow2"
        qcow2.create(path, MIB, f"compat={version}", backing=base)
        with imgcore.open(path, mode="r+") as image:
            image.resize(1 << 40)
            assert image.read(MIB // 2, MIB) == noise(MIB)[MIB // 2 :].ljust(MIB, b"\0")
        assert path.stat().st_size < MIB
        check(path)


def test_version_2_does_not_show_more_of_its_parent(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(noise(2 * MIB))
    path = qcow2.create(tmp_path / "a.qcow2", MIB, "compat=0.10", backing=base)
    with (
        imgcore.open(path, mode="r+") as image,
        pytest.raises(imgcore.OptionError, match="do not grow over a backing file"),
    ):
        image.resize(2 * MIB)


def test_what_was_cut_off_never_comes_back(tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", noise(2 * MIB))
    with imgcore.open(path, mode="r+") as image:
        image.resize(MIB + 512, shrink=True)
        assert image.virtual_size == MIB + 512
        image.resize(3 * MIB)
        image.resize(600 * MIB)
    expected = noise(2 * MIB)[: MIB + 512].ljust(3 * MIB, b"\0")
    assert qcow2.read_guest(path)[: 3 * MIB] == expected
    check(path)


def test_a_crash_after_the_size_shrank_leaves_no_old_data(tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", noise(2 * MIB))
    # The header is durable before clusters are freed.
    poke(path, (layout.VIRTUAL_SIZE_FIELD[0], struct.pack(">Q", MIB)))
    check(path)
    with imgcore.open(path, mode="r+") as image:
        image.resize(2 * MIB)
    assert qcow2.read_guest(path) == noise(2 * MIB)[:MIB].ljust(2 * MIB, b"\0")
    check(path)


def test_shrinking_frees_whole_tables(tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", noise(4 * MIB), "cluster_size=4k")
    qemu.run("snapshot", "-c", "one", path)
    with imgcore.open(path, mode="r+") as image:
        image.resize(MIB, shrink=True)
    check(path)
    qemu.run("snapshot", "-d", "one", path)
    check(path)
    with imgcore.open(path, mode="r+") as image:
        image.write(0, b"x")
        image.resize(512 * KIB, shrink=True)
    assert path.stat().st_blocks * 512 < MIB


def test_version_2_with_snapshots_is_not_resized(tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", noise(MIB), "compat=0.10")
    qemu.run("snapshot", "-c", "one", path)
    with (
        imgcore.open(path, mode="r+") as image,
        pytest.raises(imgcore.OptionError, match="of version 2 with internal snapshots"),
    ):
        image.resize(2 * MIB)


def test_a_size_that_the_l1_table_cannot_have(tmp_path: Path) -> None:
    path = qcow2.create(tmp_path / "a.qcow2", MIB, "cluster_size=512")
    with (
        imgcore.open(path, mode="r+") as image,
        pytest.raises(imgcore.OptionError, match="clusters of 512 bytes are too small"),
    ):
        image.resize(1 << 40)
    check(path)


# -- the backing file ------------------------------------------------------------------


def backing_of(path: Path) -> tuple[str | None, str | None]:
    info = json.loads(qemu.run("info", "--output=json", "-U", path).stdout)
    return info.get("backing-filename"), info.get("backing-filename-format")


def put_backing(path: Path, name: str | None, format: str | None) -> None:
    reference = None if name is None else BackingReference(name, format)
    with updating(path) as updater:
        cast("Rebasable", updater).set_backing(reference)
        updater.flush(is_unread=False)
        updater.finish()


NAMES = ("b.raw", "x" * 900, None, "deep/er/" + "y" * 200, "c.raw")


@pytest.mark.parametrize("version", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", [512, 2048, 4096, CLUSTER])
def test_backing_files_change(cluster_size: int, version: str, tmp_path: Path) -> None:
    path = qcow2.create(
        tmp_path / "a.qcow2", MIB, f"cluster_size={cluster_size}", f"compat={version}"
    )
    for name in NAMES:
        for format in ("raw", "qcow2", None) if name else (None,):
            is_too_long = name is not None and len(name) > cluster_size - 200
            if is_too_long or (cluster_size < 4096 and name is not None and len(name) > 500):
                continue
            put_backing(path, name, format)
            assert backing_of(path) == (name, format)
            with imgcore.open(path, chain=False) as image:
                assert (image.reader.backing and image.reader.backing.name) == name
    put_backing(path, None, None)
    check(path)


def test_a_name_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    path = qcow2.create(tmp_path / "a.qcow2", MIB, "cluster_size=512")
    put_backing(path, "b.raw", "raw")
    before = path.read_bytes()
    with pytest.raises(imgcore.OptionError, match="no room"):
        put_backing(path, "x" * 400, "raw")
    assert path.read_bytes() == before


@pytest.mark.parametrize("cluster_size", [2048, CLUSTER])
def test_the_header_is_never_torn(cluster_size: int, tmp_path: Path) -> None:
    """At each cut of the writes, in sectors, it names the old parent or the new one."""
    path = qcow2.create(tmp_path / "a.qcow2", MIB, f"cluster_size={cluster_size}")
    names: list[tuple[str | None, str | None]] = [
        ("b" * 300, "raw"),
        ("c" * 350, "qcow2"),
        (None, None),
        ("d.raw", None),
        ("e" * 310, "raw"),
    ]
    chance = random.Random(1)
    old: tuple[str | None, str | None] = (None, None)
    for name, format in names:
        before = path.read_bytes()
        writes = recorded_steps(partial(put_backing, path, name, format))
        after = path.read_bytes()
        assert writes
        for n_steps in range(len(writes)):
            sectors = [number for step in writes[:n_steps] for number in step]
            for _ in range(8):
                torn = bytearray(before)
                some = [number for number in writes[n_steps] if chance.random() < 0.5]
                for number in [*sectors, *some]:
                    part = slice(number * 512, number * 512 + 512)
                    torn[part] = after[part]
                cut = tmp_path / "cut.qcow2"
                cut.write_bytes(torn)
                assert backing_of(cut) in (old, (name, format))
                with imgcore.open(cut, chain=False) as image:
                    backing = image.reader.backing
                    found = (None, None) if backing is None else (backing.name, backing.format)
                    assert found in (old, (name, format))
        old = (name, format)


def recorded_steps(change: Callable[[], None]) -> list[list[int]]:
    """Return the sectors that each step of a change writes to the header."""
    steps: list[list[int]] = []
    write_step = UpdateFile.write_step

    def recording(file: UpdateFile, step: object) -> None:
        ranges = list(file.waiting(step))  # type: ignore[arg-type]
        steps.append(
            [number for at, data in ranges for number in range(at // 512, (at + len(data)) // 512)]
        )
        write_step(file, step)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UpdateFile, "write_step", recording)
        change()
    return [step for step in steps if step]


def test_drop_leaves_clusters_to_the_parent(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(noise(MIB))
    path = qcow2.create(tmp_path / "a.qcow2", MIB, backing=base)
    with imgcore.open(path, mode="r+") as image:
        image.write(0, bytes(MIB))
        image.zero(CLUSTER, CLUSTER)
    with updating(path, parent_nbytes=MIB) as updater:
        updater.drop(0, MIB)
        updater.flush(is_unread=True)
        updater.finish()
        updater.flush(is_unread=False)
    assert read_by_qemu(path) == noise(MIB)
    check(path)
    assert os.stat(path).st_blocks * 512 < MIB // 2
