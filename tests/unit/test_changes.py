"""Changed areas, compared with a byte-wise comparison."""

from __future__ import annotations

import gc
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as command
from tests.helpers.images import KIB, MIB, noise

import imgcore
from imgcore._core import checksum_algorithms
from imgcore.disk import differences as differences_module
from imgcore.disk.open_options import OpenOptions
from imgcore.verbs import changes as changes_module

FORMATS: Final = ("raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi")
GRANULARITIES: Final = (512, 4 * KIB, 64 * KIB, 1 * MIB, 64 * MIB, 2048 * MIB)

Areas = list[tuple[int, int, bool]]


def oracle(new: bytes, old: bytes, granularity: int) -> Areas:
    """Compare byte by byte; the shorter disk goes on with zeros."""
    total = max(len(new), len(old))
    sides = [np.frombuffer(data.ljust(total, b"\0"), np.uint8) for data in (new, old)]
    areas: Areas = []
    for start in range(0, total, granularity):
        now, before = (side[start : start + granularity] for side in sides)
        if np.array_equal(now, before):
            continue
        is_zero = not now.any()
        if areas and sum(areas[-1][:2]) == start and areas[-1][2] == is_zero:
            areas[-1] = (areas[-1][0], areas[-1][1] + len(now), is_zero)
        else:
            areas.append((start, len(now), is_zero))
    return areas


def applied(old: bytes, new: bytes, areas: Areas) -> bytes:
    """Return the old disk with the areas of the new one, and of its size."""
    disk = bytearray(old[: len(new)].ljust(len(new), b"\0"))
    for offset, length, is_zero in areas:
        disk[offset : offset + length] = bytes(length) if is_zero else new[offset : offset + length]
    return bytes(disk)


def changed(disk: bytes, rng: random.Random) -> bytes:
    """Return a disk with some ranges written, zeroed, or with one byte changed."""
    data = bytearray(disk)
    for _ in range(rng.randrange(1, 8)):
        start = rng.randrange(len(data))
        length = min(len(data) - start, 1 << rng.randrange(19))
        how = rng.randrange(3)
        if how == 2:
            data[start] ^= 1
        else:
            data[start : start + length] = bytes(length) if how else rng.randbytes(length)
    return bytes(data)


def image_of(disk: bytes, path: Path) -> tuple[Path, bytes]:
    """Write an image; return it and the disk that it holds, whose end is padded."""
    raw = path.with_suffix(".raw")
    raw.write_bytes(disk)
    if path != raw:
        imgcore.convert(raw, path, sync=False)
    with imgcore.open(path) as image:
        return path, image.read(0, image.virtual_size)


def differences(old: Path, new: Path, granularity: int = 64 * KIB) -> Iterator[imgcore.Area]:
    """Yield what ``imgcore diff OLD NEW`` lists."""
    with imgcore.open(new) as image:
        yield from changes_module.differences(image, old, OpenOptions(), granularity=granularity)


def found(areas: Iterator[imgcore.Area]) -> Areas:
    return [tuple(area) for area in areas]


# -- comparisons -----------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("sizes", [(3 * MIB, 3 * MIB), (3 * MIB, 1777 * 512), (99 * 512, 2 * MIB)])
def test_two_images(format: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    rng = random.Random(f"{format}{sizes}")
    disk = changed(changed(bytes(sizes[0]), rng), rng)
    other = changed(disk[: sizes[1]].ljust(sizes[1], b"\0"), rng)
    a, old = image_of(disk, tmp_path / f"a.{rng.choice(FORMATS)}")
    b, new = image_of(other, tmp_path / f"b.{format}")
    for granularity in GRANULARITIES:
        areas = found(imgcore.changes(b, since=a, granularity=granularity))
        assert areas == oracle(new, old[: len(new)], granularity)
        assert applied(old, new, areas) == new
        assert found(differences(a, b, granularity=granularity)) == oracle(new, old, granularity)


@given(
    disk=st.lists(st.sampled_from([b"\0", b"a", b"b"]), min_size=1, max_size=70),
    other=st.lists(st.sampled_from([b"\0", b"a", b"b"]), min_size=1, max_size=70),
    odd=st.integers(0, 511),
    bits=st.integers(9, 16),
)
@settings(max_examples=60, deadline=None)
def test_random_sectors(disk: list[bytes], other: list[bytes], odd: int, bits: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        a, old = image_of(b"".join(s * 512 for s in disk)[odd:], Path(folder, "a.raw"))
        b, new = image_of(b"".join(s * 512 for s in other), Path(folder, "b.raw"))
        areas = found(imgcore.changes(b, since=a, granularity=1 << bits))
        assert areas == oracle(new, old[: len(new)], 1 << bits)


def test_the_areas_do_not_depend_on_threads(tmp_path: Path) -> None:
    disk = noise(8 * MIB)
    a, _ = image_of(disk, tmp_path / "a.qcow2")
    b, _ = image_of(changed(disk, random.Random(1)), tmp_path / "b.vmdk")
    runs = [found(imgcore.changes(b, since=a, granularity=512, threads=n)) for n in (1, 2, 7)]
    assert runs[0]
    assert runs[1:] == runs[:1] * 2


class Reads:
    """Counts the jobs that a comparison starts, and the bytes that they read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n_batches = self.n_bytes = 0
        reads = self

        class CountingJob(differences_module.Job):
            def start(self, *rows: Any, **others: Any) -> None:
                reads.n_batches += 1
                super().start(*rows, **others)

            def close(self) -> None:
                reads.n_bytes += self.progress()[3]
                super().close()

        monkeypatch.setattr(differences_module, "Job", CountingJob)


def test_what_is_stored_nowhere_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    for name in ("a.qcow2", "b.vhdx"):
        imgcore.create(tmp_path / name, 64 << 40, sync=False)
    b = tmp_path / "b.vhdx"
    assert found(imgcore.changes(b, since=tmp_path / "a.qcow2", granularity=512)) == []
    assert reads.n_batches == 0


def test_what_is_in_the_same_place_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two images on one base: plain, and compressed."""
    reads = Reads(monkeypatch)
    raw = tmp_path / "base.raw"
    raw.write_bytes(noise(4 * MIB))
    for compress in (False, True):
        base = tmp_path / f"base-{compress}.qcow2"
        imgcore.convert(raw, base, compress=compress, sync=False)
        names = [tmp_path / f"{name}-{compress}.qcow2" for name in "ab"]
        for number, path in enumerate(names):
            data = bytearray(raw.read_bytes())
            data[MIB] ^= number
            data[2 * MIB : 2 * MIB + 64 * KIB] = bytes(64 * KIB)
            disk = tmp_path / "disk.raw"
            disk.write_bytes(data)
            imgcore.convert(disk, path, backing=base, backing_format="qcow2", sync=False)
        reads.n_bytes = 0
        assert found(imgcore.changes(names[1], since=names[0])) == [(MIB, 64 * KIB, False)]
        assert 0 < reads.n_bytes < 3 * 64 * KIB
        # A block with zeros that are new and data that is not read.
        base_areas = found(differences(base, names[0], granularity=MIB))
        assert base_areas == [(2 * MIB, MIB, False)]
        assert found(differences(base, names[0])) == [(2 * MIB, 64 * KIB, True)]


def test_one_file_at_two_places(tmp_path: Path) -> None:
    """Two disks in parts of one file, which overlap."""
    data = noise(3 * MIB)
    (tmp_path / "all.bin").write_bytes(data)
    for name, start in (("a", 0), ("b", MIB), ("c", 0)):
        (tmp_path / f"{name}.vmdk").write_text(
            "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\n"
            f'createType="monolithicFlat"\nRW 4096 FLAT "all.bin" {start // 512}\n'
        )
    a, b, c = (tmp_path / f"{name}.vmdk" for name in "abc")
    assert found(imgcore.changes(b, since=a)) == [(0, 2 * MIB, False)]
    assert found(imgcore.changes(c, since=a)) == []


def test_scattered_data_takes_several_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(differences_module, "_MAX_BATCH_BLOCKS", 8)
    reads = Reads(monkeypatch)
    nbytes = 3 * MIB + 512
    disk = bytearray(nbytes)
    for start in (0, 9000, MIB - 1, MIB, 2 * MIB + 700, nbytes - 1):
        disk[start] = 1
    other = bytearray(disk)
    other[9000] = 0
    other[nbytes - 1] = 2
    a, _ = image_of(bytes(disk), tmp_path / "a.raw")
    b, _ = image_of(bytes(other), tmp_path / "b.raw")
    for granularity in (512, 64 * KIB):
        areas = found(imgcore.changes(b, since=a, granularity=granularity))
        assert areas == oracle(bytes(other), bytes(disk), granularity)
    assert reads.n_batches > 4


# -- chains ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give chains of three images, and the disk that each of them holds."""
    folder = tmp_path_factory.mktemp("chains")
    rng = random.Random(3)
    disk = bytearray(noise(8 * MIB))
    for number in range(3):
        (folder / f"{number}.raw").write_bytes(disk)
        for format in ("qcow2", "vhd", "vhdx", "vdi"):
            backing = f"{number - 1}.{format}" if number else None
            imgcore.convert(
                folder / f"{number}.raw",
                folder / f"{number}.{format}",
                backing=backing,
                backing_format=format if backing else None,
                sync=False,
            )
        start = (2 + 2 * number) * MIB
        disk[start : start + MIB] = bytes(MIB)
        disk[: 70 * KIB] = rng.randbytes(70 * KIB)
    return folder


@pytest.mark.parametrize("format", ["qcow2", "vhd", "vhdx", "vdi"])
@pytest.mark.parametrize("since", [0, 1, 2])
def test_layers_above(
    format: str, since: int, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    old, new = ((chain / f"{number}.raw").read_bytes() for number in (since, 2))
    top = chain / f"2.{format}"
    for granularity in GRANULARITIES:
        areas = found(
            imgcore.changes(top, since=chain / f"{since}.{format}", granularity=granularity)
        )
        assert applied(old, new, areas) == new
        assert applied(old, new, oracle(new, old, granularity)) == new
        assert bool(areas) == (since < 2)
    assert reads.n_batches == 0
    areas = found(imgcore.changes(top, since=chain / f"{since}.{format}"))
    # VHD has no blocks of zeros, but those that it stores are holes of the file.
    assert any(is_zero for _, _, is_zero in areas) == (since < 2)
    assert sum(length for _, length, _ in areas) < 8 * MIB


def test_a_layer_by_its_descriptor_or_another_name(chain: Path, tmp_path: Path) -> None:
    top, base = chain / "2.qcow2", chain / "0.qcow2"
    expected = found(imgcore.changes(top, since=base))
    link = tmp_path / "link.qcow2"
    link.symlink_to(base)
    assert found(imgcore.changes(top, since=link)) == expected
    descriptor = os.open(base, os.O_RDONLY)
    try:
        assert found(imgcore.changes(top, since=descriptor)) == expected
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == 0
    finally:
        os.close(descriptor)
    with imgcore.open(top) as image:
        assert found(imgcore.changes(image, since=base)) == expected
        assert image.read(0, 1)
    # The chain is not asked for.
    alone = found(imgcore.changes(top, since=base, chain=False))
    with imgcore.open(top, chain=False) as image:
        new = image.read(0, image.virtual_size)
    assert alone == oracle(new, (chain / "0.raw").read_bytes(), 64 * KIB)


def test_a_layer_that_is_read_in_another_way(chain: Path, tmp_path: Path) -> None:
    """What the caller states about the older image decides what it is."""
    top, middle, base = chain / "2.qcow2", chain / "1.qcow2", chain / "0.qcow2"
    new = (chain / "2.raw").read_bytes()
    by_tables = found(imgcore.changes(top, since=middle))
    for same in ({"format_since": "qcow2"}, {"parent_since": base}):
        assert found(imgcore.changes(top, since=middle, **same)) == by_tables
    without_backing = {"driver": "qcow2", "file.filename": str(middle), "backing": None}
    with pytest.raises(imgcore.UnsupportedFeatureError, match="leaves out its backing file"):
        found(imgcore.changes(top, since="json:" + json.dumps(without_backing)))
    old = middle.read_bytes()
    areas = found(imgcore.changes(top, since=middle, format_since="raw"))
    assert areas == oracle(new, old + bytes(-len(old) % 512), 64 * KIB)
    other = tmp_path / "other.qcow2"
    imgcore.create(other, len(new), format="qcow2")
    with imgcore.open(middle, parent=other) as image:
        old = image.read(0, image.virtual_size)
    assert found(imgcore.changes(top, since=middle, parent_since=other)) == oracle(
        new, old, 64 * KIB
    )


# -- lists of areas --------------------------------------------------------------------


def test_listed_areas(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.write(noise(128 * KIB))
        file.truncate(MIB)
    areas = [(1, 1), (4096, 70 * KIB), (512 * KIB, MIB - 512 * KIB)]
    image = tmp_path / "disk.qcow2"
    imgcore.convert(path, image, sync=False)
    assert found(imgcore.changes(image, areas=areas)) == [
        (0, 128 * KIB, False),
        (512 * KIB, 512 * KIB, True),
    ]
    assert found(imgcore.changes(image, areas=areas, granularity=4096)) == [
        (0, 76 * KIB, False),
        (512 * KIB, 512 * KIB, True),
    ]
    assert found(imgcore.changes(image, areas=areas, granularity="1M")) == [(0, MIB, False)]
    assert found(imgcore.changes(image, areas=[])) == []
    with pytest.raises(imgcore.OptionError, match="outside the disk"):
        found(imgcore.changes(image, areas=[(0, MIB + 512)]))


# -- checksum trees --------------------------------------------------------------------


@pytest.mark.parametrize("format", ["raw", "qcow2", "vhdx"])
@pytest.mark.parametrize("algorithm", ["sha256", "blake3"])
def test_a_tree(format: str, algorithm: str, tmp_path: Path) -> None:
    if algorithm not in checksum_algorithms():
        pytest.skip(f"{algorithm} is not in this build")
    rng = random.Random(f"{format}{algorithm}")
    disk = changed(changed(bytes(5 * MIB), rng), rng)
    tree = tmp_path / "disk.tree"
    a, old = image_of(disk, tmp_path / f"a.{format}")
    imgcore.checksum(a, algorithm=algorithm, tree=tree)
    b, new = image_of(changed(disk, rng), tmp_path / f"b.{format}")
    for granularity in (64 * KIB, MIB):
        areas = found(imgcore.changes(b, tree=tree, granularity=granularity))
        assert applied(old, new, areas) == new
        expected = oracle(new, old, granularity)
        if granularity == 64 * KIB:
            assert areas == expected
        assert sum(area[1] for area in areas) == sum(area[1] for area in expected)
    # The checksums are of 64 KiB.
    assert found(imgcore.changes(b, tree=tree, granularity=512)) == oracle(new, old, 64 * KIB)
    assert found(imgcore.changes(a, tree=tree)) == []
    done = command("diff", "--json", "--tree", tree, b)
    assert done.returncode == 1
    assert len(json.loads(done.stdout)) == len(oracle(new, old, 64 * KIB))


def test_a_tree_that_does_not_suit(tmp_path: Path) -> None:
    a, _ = image_of(noise(MIB), tmp_path / "a.raw")
    b, _ = image_of(noise(2 * MIB), tmp_path / "b.raw")
    tree = tmp_path / "a.tree"
    imgcore.checksum(a, tree=tree)
    with pytest.raises(imgcore.OptionError, match="is of a disk of 1048576 bytes"):
        found(imgcore.changes(b, tree=tree))
    data = bytearray(tree.read_bytes())
    data[100] ^= 1
    tree.write_bytes(data)
    with pytest.raises(imgcore.CorruptImageError, match="damaged"):
        found(imgcore.changes(a, tree=tree))
    with pytest.raises(imgcore.WrongFormatError, match="not a checksum tree"):
        found(imgcore.changes(a, tree=a))


# -- the interface ---------------------------------------------------------------------


def test_exactly_one_state_is_given(tmp_path: Path) -> None:
    path, _ = image_of(b"x", tmp_path / "a.raw")
    for states in ({}, {"since": path, "bitmap": "b"}, {"areas": [], "tree": path}):
        with pytest.raises(imgcore.OptionError, match="exactly one"):
            imgcore.changes(path, **states)  # type: ignore[arg-type]
    for granularity in (0, 511, 513, "3k", 1 << 32, -512):
        with pytest.raises(imgcore.OptionError, match="granularity"):
            imgcore.changes(path, since=path, granularity=granularity)
    with pytest.raises(imgcore.OptionError, match="no bitmap 'b': raw images have none"):
        found(imgcore.changes(path, bitmap="b"))
    with imgcore.open(path) as image, pytest.raises(imgcore.OptionError, match="an open image"):
        imgcore.changes(image, since=path, format="raw")
    with pytest.raises(FileNotFoundError):
        found(imgcore.changes(path, since=tmp_path / "gone.raw"))


def test_closing_the_image_ends_the_areas(tmp_path: Path) -> None:
    disk = bytearray(MIB)
    disk[0] = disk[MIB - 1] = 1
    a, _ = image_of(bytes(MIB), tmp_path / "a.raw")
    b, _ = image_of(bytes(disk), tmp_path / "b.raw")
    image = imgcore.open(b)
    areas = imgcore.changes(image, since=a)
    assert next(areas).offset == 0
    image.close()
    with pytest.raises(ValueError, match="closed"):
        next(areas)
    with pytest.raises(ValueError, match="closed"):
        next(imgcore.changes(image, since=a))


def test_a_refreshed_image_goes_on_as_it_was(tmp_path: Path) -> None:
    rng = random.Random(8)
    old = changed(bytes(4 * MIB), rng)
    a, _ = image_of(old, tmp_path / "a.raw")
    b, new = image_of(changed(changed(old, rng), rng), tmp_path / "b.qcow2")
    with imgcore.open(b) as image:
        areas = imgcore.changes(image, since=a, granularity=512)
        taken = [next(areas)]
        image.refresh()
        gc.collect()
        taken += areas
    assert found(iter(taken)) == oracle(new, old, 512)


def test_dropped_areas_close_their_images(tmp_path: Path) -> None:
    a, _ = image_of(bytes(MIB), tmp_path / "a.raw")
    b, _ = image_of(noise(MIB), tmp_path / "b.raw")
    before = sorted(os.listdir("/proc/self/fd"))
    areas = imgcore.changes(b, since=a)
    next(areas)
    del areas
    gc.collect()
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("which", ["new", "old"])
def test_an_image_that_changes_is_an_error(which: str, tmp_path: Path) -> None:
    a, _ = image_of(bytes(MIB), tmp_path / "old.raw")
    b, _ = image_of(noise(MIB), tmp_path / "new.raw")
    areas = imgcore.changes(b, since=a)
    next(areas)
    os.utime(tmp_path / f"{which}.raw", ns=(1, 1))
    with pytest.raises(imgcore.ImgcoreError, match=rf"{which}\.raw: changed while"):
        next(areas)


def test_progress(tmp_path: Path) -> None:
    a, _ = image_of(bytes(MIB), tmp_path / "a.raw")
    b, _ = image_of(noise(MIB), tmp_path / "b.raw")
    states: list[imgcore.Progress] = []
    assert found(imgcore.changes(b, since=a, progress=states.append))
    assert (states[-1].done, states[-1].total) == (MIB, MIB)
    assert sorted(state.done for state in states) == [state.done for state in states]

    def stop(state: imgcore.Progress) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        found(imgcore.changes(b, since=a, progress=stop))


# -- the command -----------------------------------------------------------------------


def test_diff(tmp_path: Path) -> None:
    disk = bytearray(noise(MIB))
    image_of(bytes(disk), tmp_path / "a.raw")
    disk[70000] ^= 1
    disk[512 * KIB : 640 * KIB] = bytes(128 * KIB)
    image_of(bytes(disk), tmp_path / "b.qcow2")
    same = command("diff", "a.raw", "a.raw", cwd=tmp_path)
    assert (same.returncode, same.stdout, same.stderr) == (0, "", "")
    for words in (("a.raw", "b.qcow2"), ("--since", "a.raw", "b.qcow2")):
        done = command("diff", *words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (1, "")
        assert done.stdout == (
            "Offset          Length          Content\n"
            "0x10000         0x10000         data\n"
            "0x80000         0x20000         zeros\n"
        )
        done = command("diff", "-q", *words, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
        done = command("diff", "--json", "--granularity=512", *words, cwd=tmp_path)
        assert done.returncode == 1
        assert json.loads(done.stdout) == [
            {"start": 69632 + 0, "length": 512, "data": True, "zero": False},
            {"start": 512 * KIB, "length": 128 * KIB, "data": False, "zero": True},
        ]
    done = command("diff", "--json", "a.raw", "a.raw", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "[]\n")
    done = command("diff", "--bmap", "a.raw", "b.qcow2", cwd=tmp_path)
    assert done.returncode == 1
    (tmp_path / "areas.bmap").write_text(done.stdout)
    done = command("diff", "--json", "--areas", "areas.bmap", "b.qcow2", cwd=tmp_path)
    assert [area["start"] for area in json.loads(done.stdout)] == [64 * KIB, 512 * KIB]
    (tmp_path / "areas.json").write_text(
        '[{"start": 0, "length": 512, "data": true, "zero": false}]'
    )
    done = command("diff", "--json", "--areas", "areas.json", "b.qcow2", cwd=tmp_path)
    assert json.loads(done.stdout)[0]["length"] == 64 * KIB


def test_diff_of_disks_of_other_sizes_says_what_compare_says(tmp_path: Path) -> None:
    for name, disk in {
        "short": b"a" * 512,
        "zeros": (b"a" * 512).ljust(MIB, b"\0"),
        "long": b"a" * MIB,
    }.items():
        image_of(disk, tmp_path / f"{name}.raw")
    for a, b in (("short", "zeros"), ("zeros", "short"), ("short", "long"), ("long", "short")):
        names = f"{a}.raw", f"{b}.raw"
        compared = command("compare", "-q", *names, cwd=tmp_path)
        done = command("diff", "--json", *names, cwd=tmp_path)
        assert done.returncode == compared.returncode
        if a == "long":
            assert json.loads(done.stdout)[-1]["zero"]


def test_diff_without_sense(tmp_path: Path) -> None:
    image_of(noise(MIB), tmp_path / "a.raw")
    for words in (
        ("a.raw",),
        ("--since", "a.raw", "a.raw", "a.raw"),
        ("--since", "a.raw", "--tree", "t", "a.raw"),
        ("--areas", "x", "-F", "raw", "a.raw"),
        ("--granularity=5", "a.raw", "a.raw"),
        ("--json", "--bmap", "a.raw", "a.raw"),
        ("--progress=qemu", "a.raw", "a.raw"),
    ):
        assert_one_line_error(command("diff", *words, cwd=tmp_path), code=2)
    assert_one_line_error(command("diff", "a.raw", "gone.raw", cwd=tmp_path), "gone.raw", code=2)
