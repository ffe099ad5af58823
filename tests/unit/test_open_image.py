"""The open image: one layer, many ranges, as a file of Python, read again."""

from __future__ import annotations

import copy
import gc
import gzip
import io
import os
import pickle
import random
import resource
import shutil
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers.images import MIB, noise

import imgcore
from imgcore.disk.image import open_image
from imgcore.disk.open_options import OpenOptions
from imgcore.limits import DEFAULT_CACHE_NBYTES, MAX_CACHE_NBYTES

NBYTES = 2 * MIB
BASE = noise(NBYTES // 2) + bytes(NBYTES // 2)
OWN = noise(70_000, 4)
AT = 2500 * 512
TOP = BASE[:AT] + OWN + BASE[AT + len(OWN) :]
FORMATS = ("qcow2", "vhd", "vhdx", "vdi")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("open")
    (folder / "base.raw").write_bytes(BASE)
    (folder / "top.raw").write_bytes(TOP)
    for format in FORMATS:
        # Blocks that are far smaller than the disk.
        size = {"qcow2": "cluster_size=64k", "vhdx": "block_size=1M"}.get(format, "block_size=512k")
        imgcore.convert(folder / "base.raw", folder / f"base.{format}", options=[size])
        imgcore.convert(
            folder / "top.raw",
            folder / f"top.{format}",
            backing=f"base.{format}",
            backing_format=format,
            options=[size],
        )
    return folder


@pytest.fixture(params=FORMATS)
def image(request: pytest.FixtureRequest, folder: Path) -> Iterator[imgcore.Image]:
    with imgcore.open(folder / f"top.{request.param}") as image:
        yield image


# -- one layer -------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_alone(format: str, folder: Path, tmp_path: Path) -> None:
    """The parent is not opened, and need not exist."""
    shutil.copy(folder / f"top.{format}", tmp_path / f"top.{format}")
    with imgcore.open(tmp_path / f"top.{format}", chain=False) as image:
        assert (len(image.chain), image.virtual_size) == (1, NBYTES)
        found = image.read(0, NBYTES)
        stated = bytearray(NBYTES)
        for rows in image.extents():
            for row in rows[rows["kind"] != imgcore.Kind.HOLE]:
                start, end = int(row["guest_offset"]), int(row["guest_offset"] + row["length"])
                stated[start:end] = TOP[start:end]
        assert found == stated
        assert found[AT : AT + len(OWN)] == OWN
        # The first blocks are as in the parent, so the layer does not state them.
        assert found != TOP


def test_a_layer_alone_has_no_stated_parent(folder: Path) -> None:
    with pytest.raises(imgcore.OptionError, match="opened without its chain"):
        imgcore.open(folder / "top.qcow2", chain=False, parent=folder / "base.qcow2")


def test_the_format_of_a_layer_alone_is_found_as_ever(folder: Path, tmp_path: Path) -> None:
    """Descriptions are lenient; reading is not."""
    path = tmp_path / "disk.raw"
    shutil.copy(folder / "top.qcow2", path)
    with pytest.raises(imgcore.WrongFormatError, match="named like a raw disk"):
        imgcore.open(path, chain=False)


def kinds(image: imgcore.Image, *arguments: int, **keywords: Any) -> list[tuple[int, ...]]:
    fields = ["guest_offset", "length", "file", "kind"]
    batches = image.extents(*arguments, **keywords)
    return [tuple(int(row[field]) for field in fields) for rows in batches for row in rows]


def test_the_extents_of_each_layer(image: imgcore.Image) -> None:
    """Merged, the layers' own extents are those of the disk."""
    merged = bytearray(NBYTES)
    for depth in reversed(range(len(image.chain))):
        at = 0
        for start, length, file, kind in kinds(image, layer=depth):
            assert start == at
            at += length
            if kind >= imgcore.Kind.DATA:
                assert image.first_files[depth] <= file
                assert image.chain[depth].file is image.sources[file].file or depth == 0
            if kind != imgcore.Kind.HOLE:
                merged[start : start + length] = [depth + 1] * length
        assert at == NBYTES
    expected = bytearray(NBYTES)
    for rows, depths in image.layer_extents():
        for row, depth in zip(rows, depths, strict=True):
            if row["kind"] != imgcore.Kind.HOLE:
                start, length = int(row["guest_offset"]), int(row["length"])
                expected[start : start + length] = [int(depth) + 1] * length
    assert merged == expected
    assert list(image.extents(512, 0, layer=1)) == []


def test_layers_that_are_not_there(image: imgcore.Image) -> None:
    for layer in (-1, 2, 2**70, np.int64(-1)):
        with pytest.raises(ValueError, match=rf"layer is {int(layer)}, but its chain has 2"):
            image.extents(layer=layer)
    with pytest.raises(TypeError, match="layer: an integer"):
        image.extents(layer="0")  # type: ignore[arg-type]


def test_a_backing_file_that_is_shorter(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "base.qcow2", tmp_path)
    imgcore.create(tmp_path / "top.qcow2", 3 * NBYTES, backing="base.qcow2", backing_format="qcow2")
    hole = int(imgcore.Kind.HOLE)
    with imgcore.open(tmp_path / "top.qcow2") as image:
        rows = kinds(image, layer=1)
        assert rows[-1] == (NBYTES, 2 * NBYTES, 0, hole)
        assert kinds(image, NBYTES - 512, 1024, layer=1)[-1] == (NBYTES, 512, 0, hole)
        assert kinds(image, 2 * NBYTES, 512, layer=1) == [(2 * NBYTES, 512, 0, hole)]
        assert {row[3] for row in kinds(image, layer=0)} == {hole}
        assert sum(row[1] for row in rows) == 3 * NBYTES


# -- many ranges -----------------------------------------------------------------------


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_many_ranges_in_any_order(image: imgcore.Image, threads: int | None) -> None:
    choose = random.Random(7)
    ranges = [(choose.randrange(NBYTES - 5000), choose.randrange(5000)) for _ in range(100)]
    buffers = [bytearray(length) for _, length in ranges]
    image.readv(
        ((start, buffer) for (start, _), buffer in zip(ranges, buffers, strict=True)),
        threads=threads,
    )
    assert [TOP[start : start + length] for start, length in ranges] == buffers
    array = np.zeros((4, 256), np.uint16)
    image.readv([(np.uint64(AT), array), [0, memoryview(buffers[0])]], threads=threads)
    assert array.tobytes() == TOP[AT : AT + 2048]
    image.readv([])


BAD_REQUESTS: list[tuple[Any, type[Exception], str]] = [
    ((NBYTES, bytearray(1)), ValueError, "is not inside the disk"),
    ((-1, bytearray(1)), ValueError, "is not inside the disk"),
    ((2**80, bytearray(0)), ValueError, "is not inside the disk"),
    ((0.0, bytearray(1)), TypeError, "offset: an integer"),
    ((0, b"x"), BufferError, "writ"),
    ((0, memoryview(bytearray(9))[::2]), TypeError, "contiguous"),
    ((0, "text"), TypeError, "bytes-like"),
    ((0,), TypeError, "pair"),
    ((0, bytearray(1), 3), TypeError, "pair"),
    (5, TypeError, "pair"),
]


@pytest.mark.parametrize(("request_", "error", "text"), BAD_REQUESTS)
def test_requests_are_verified_first(
    request_: Any, error: type[Exception], text: str, image: imgcore.Image
) -> None:
    good = bytearray(512)
    with pytest.raises(error, match=text):
        image.readv([(AT, good), request_])
    assert good == bytes(512)
    good.extend(b"x")  # no buffer is held any more


def test_a_generator_of_requests_that_fails(image: imgcore.Image) -> None:
    good = bytearray(512)

    def requests() -> Iterator[tuple[int, bytearray]]:
        yield AT, good
        raise KeyError("no more")

    with pytest.raises(KeyError):
        image.readv(requests())
    assert good == bytes(512)
    good.extend(b"x")


@pytest.mark.parametrize("threads", [0, -1, 257])
def test_threads_of_readv(threads: int, image: imgcore.Image) -> None:
    with pytest.raises(imgcore.OptionError, match=f"{threads} threads requested"):
        image.readv([(0, bytearray(1))], threads=threads)


def test_readinto_returns_its_bytes(image: imgcore.Image) -> None:
    assert image.readinto(AT, bytearray(1000)) == 1000
    assert image.readinto(0, np.zeros(100, np.uint32)) == 400
    assert image.readinto(NBYTES, bytearray()) == 0
    with pytest.raises(BufferError, match="writ"):
        image.readinto(0, b"x" * 512)  # type: ignore[arg-type]


# -- as a file -------------------------------------------------------------------------


def test_as_file_against_a_file_of_python(image: imgcore.Image) -> None:
    choose = random.Random(11)
    for start, length in ((0, None), (AT - 5, None), (700, 100_001), (NBYTES, None), (9, 0)):
        expected = io.BytesIO(TOP[start:] if length is None else TOP[start : start + length])
        with image.as_file(start=start, length=length) as file:
            assert file.readable() and file.seekable() and not file.writable()
            for _ in range(200):
                n, whence = choose.randrange(-50_000, 200_000), choose.randrange(3)
                what = choose.choice(["seek", "read", "readinto", "tell", "readline"])
                if what == "seek":
                    try:
                        wanted: Any = expected.seek(n if whence else abs(n), whence)
                    except ValueError:
                        wanted = None
                    if wanted is None or wanted != expected.tell() or wanted < 0:
                        continue
                    base = (0, expected.tell(), len(expected.getvalue()))[whence]
                    del base
                    assert file.seek(wanted) == wanted
                elif what == "readinto":
                    ours, theirs = bytearray(3000), bytearray(3000)
                    assert file.readinto(ours) == expected.readinto(theirs)
                    assert ours == theirs
                elif what == "tell":
                    assert file.tell() == expected.tell()
                elif what == "read":
                    assert file.read(abs(n) % 9000) == expected.read(abs(n) % 9000)
                else:
                    assert file.readline(40) == expected.readline(40)
            assert file.seek(-min(5, len(expected.getvalue())), os.SEEK_END) >= 0
            assert file.seek(3, os.SEEK_CUR) == file.tell()
            file.seek(0)
            assert file.read() == expected.getvalue()
            assert file.read() == b""
            assert file.seek(10**12) == 10**12
            assert file.read(5) == b""
            for wrong in ((-1, 0), (-(10**13), 1), (0, 3), (0.5, 0)):
                with pytest.raises((ValueError, TypeError)):
                    file.seek(*wrong)  # type: ignore[arg-type]
            with pytest.raises(io.UnsupportedOperation):
                file.write(b"x")
            with pytest.raises(io.UnsupportedOperation):
                file.fileno()
    assert not image.closed
    assert image.read(AT, 5) == OWN[:5]


def test_as_file_below_other_readers(tmp_path: Path) -> None:
    """Archives on a disk, at a place that is no sector."""
    (tmp_path / "hello.txt").write_text("hello")
    blobs = {}
    for name, mode in (("a.tar", "w"), ("b.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as tar:  # type: ignore[call-overload]
            tar.add(tmp_path / "hello.txt", "hello.txt")
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as made:
        made.writestr("hello.txt", "hello")
    blobs = {name: (tmp_path / name).read_bytes() for name in ("a.tar", "b.tar.gz", "c.zip")}
    disk, places = bytearray(777), {}
    for name, blob in blobs.items():
        places[name] = (len(disk), len(blob))
        disk += blob + bytes(333)
    (tmp_path / "disk.raw").write_bytes(disk + bytes(-len(disk) % 512))
    imgcore.convert(tmp_path / "disk.raw", tmp_path / "disk.vmdk", compress=True)
    with imgcore.open(tmp_path / "disk.vmdk") as image:
        for name in ("a.tar", "b.tar.gz"):
            start, length = places[name]
            with (
                image.as_file(start=start, length=length) as raw,
                io.BufferedReader(raw) as file,
                tarfile.open(fileobj=file) as tar,
            ):
                member = tar.extractfile("hello.txt")
                assert member is not None
                assert member.read() == b"hello"
        start, length = places["b.tar.gz"]
        with gzip.open(image.as_file(start=start, length=length)) as unpacked:  # type: ignore[call-overload]
            assert len(unpacked.read()) % 512 == 0
        start, length = places["c.zip"]
        with (
            image.as_file(start=start, length=length) as raw,
            zipfile.ZipFile(raw) as archive,  # type: ignore[arg-type]
        ):
            assert archive.read("hello.txt") == b"hello"
        assert not image.closed


@pytest.mark.parametrize("shape", [0, (0, 4), (4, 0, 2)])
def test_as_file_fills_an_empty_array(shape: Any, image: imgcore.Image) -> None:
    file = image.as_file()
    assert file.readinto(np.empty(shape, np.uint8)) == 0
    assert file.tell() == 0


def test_as_file_of_an_image_that_is_closed(folder: Path) -> None:
    image = imgcore.open(folder / "top.vhdx")
    file, buffered = image.as_file(), io.BufferedReader(image.as_file())
    assert file.read(5) == TOP[:5]
    image.close()
    for use in (lambda: file.read(5), file.readall, file.tell, lambda: file.seek(0), buffered.read):
        with pytest.raises(ValueError, match="the image is closed"):
            use()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
    with pytest.raises(ValueError, match="the image is closed"):
        image.as_file()


def test_as_file_is_no_owner(image: imgcore.Image) -> None:
    file = image.as_file()
    for take in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            take(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del file
        gc.collect()
    assert image.read(0, 5) == TOP[:5]
    for wrong in ({"start": NBYTES + 1}, {"length": NBYTES + 1}, {"start": 1, "length": NBYTES}):
        with pytest.raises(ValueError, match="is not inside the disk"):
            image.as_file(**wrong)  # type: ignore[arg-type]


# -- read again ------------------------------------------------------------------------


def grow(path: Path, data: bytes) -> None:
    """Write another image over the same file, as a program does that has it open."""
    other = path.with_name(f"other-{path.name}")
    (path.parent / "data.raw").write_bytes(data)
    imgcore.convert(path.parent / "data.raw", other, force=True)
    with path.open("r+b") as file:
        new = other.read_bytes()
        file.write(new)
        file.truncate(len(new))


@pytest.mark.parametrize("format", [*FORMATS, "vmdk", "raw"])
def test_an_image_that_grows(format: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / f"disk.{format}"
    imgcore.convert(folder / "base.raw", path)
    before = len(os.listdir("/proc/self/fd"))
    with imgcore.open(path, share=True) as image:
        assert image.read(0, NBYTES) == BASE
        opened = len(os.listdir("/proc/self/fd"))
        file, iterator = image.as_file(), image.extents()
        stated = int(next(iterator)["length"].sum())
        old_sources = image.sources
        data = noise(NBYTES, 8) + BASE
        grow(path, data)
        image.refresh()
        assert image.virtual_size == 2 * NBYTES
        assert image.sources is not old_sources
        assert image.read(0, 2 * NBYTES) == data
        assert file.seek(0, os.SEEK_END) == 2 * NBYTES
        # What has begun ends with the state that it began with.
        assert stated + sum(int(rows["length"].sum()) for rows in iterator) == NBYTES
        del iterator
        assert len(os.listdir("/proc/self/fd")) == opened
        grow(path, data[:512])
        image.refresh()
        assert (image.virtual_size, image.read(0, 512)) == (512, data[:512])
        assert file.read(5) == b""
        for _ in range(20):
            image.refresh()
        assert len(os.listdir("/proc/self/fd")) == opened
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_refresh_keeps_the_files(folder: Path, tmp_path: Path) -> None:
    """Another file of the same name is another image."""
    path = tmp_path / "disk.qcow2"
    imgcore.convert(folder / "base.raw", path)
    with imgcore.open(path, share=True) as image:
        imgcore.convert(folder / "top.raw", path, force=True)
        image.refresh()
        assert image.read(0, NBYTES) == BASE


@pytest.mark.parametrize("format", FORMATS)
def test_a_refresh_after_the_parent_has_no_name(format: str, folder: Path, tmp_path: Path) -> None:
    for name in (f"base.{format}", f"top.{format}"):
        shutil.copy(folder / name, tmp_path)
    with imgcore.open(tmp_path / f"top.{format}", share=True) as image:
        (tmp_path / f"base.{format}").unlink()
        image.refresh()
        assert image.read(0, NBYTES) == TOP


@pytest.mark.parametrize("share", [True, False])
def test_a_refresh_in_another_working_folder(
    share: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here, there):
        (place / "bases").mkdir(parents=True)
        imgcore.create(place / "bases/base.qcow2", NBYTES)
    shutil.copy(folder / "base.qcow2", here / "bases")
    monkeypatch.chdir(here)
    base = Path("bases/base.qcow2").absolute()
    for name, backing in (("child.qcow2", "bases/base.qcow2"), ("far.qcow2", base)):
        imgcore.create(name, backing=backing, backing_format="qcow2")
    shutil.copy("child.qcow2", there)
    for name in ("child.qcow2", "far.qcow2"):
        monkeypatch.chdir(here)
        with imgcore.open(name, allow=["bases"], share=share) as image:
            assert image.read(0, NBYTES) == BASE
            monkeypatch.chdir(there)
            (there / "bases").rename(tmp_path / "gone")
            image.refresh()
            (tmp_path / "gone").rename(there / "bases")
            image.refresh()
            assert image.read(0, NBYTES) == BASE


def test_a_refresh_that_fails(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    imgcore.convert(folder / "base.raw", path)
    with imgcore.open(path, share=True) as image:
        old, opened = image.sources, len(os.listdir("/proc/self/fd"))
        with path.open("r+b") as file:
            file.write(b"XXXX")
        with pytest.raises(imgcore.WrongFormatError):
            image.refresh()
        assert image.sources is old
        assert image.read(0, NBYTES) == BASE
        assert len(os.listdir("/proc/self/fd")) == opened
        with path.open("r+b") as file:
            file.write(b"QFI\xfb")
        image.refresh()
        assert image.read(0, NBYTES) == BASE
    with pytest.raises(ValueError, match="the image is closed"):
        image.refresh()


def test_a_refresh_without_share(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    imgcore.convert(folder / "base.raw", path)
    with imgcore.open(path) as image:
        image.refresh()
        assert image.read(0, NBYTES) == BASE
        os.utime(path, (1, 1))
        with pytest.raises(imgcore.ImgcoreError, match="changed while it was read"):
            image.refresh()
        assert image.read(0, NBYTES) == BASE


def test_a_refresh_finds_a_new_parent(folder: Path, tmp_path: Path) -> None:
    """The image is rebased while it is open."""
    for name in ("base.qcow2", "top.qcow2"):
        shutil.copy(folder / name, tmp_path)
    with imgcore.open(tmp_path / "top.qcow2", share=True) as image:
        assert len(image.chain) == 2
        imgcore.convert(tmp_path / "top.qcow2", tmp_path / "alone.qcow2")
        with (tmp_path / "top.qcow2").open("r+b") as file:
            file.write((tmp_path / "alone.qcow2").read_bytes())
            file.truncate()
        image.refresh()
        assert (len(image.chain), image.read(0, NBYTES)) == (1, TOP)
        whole = (folder / "top.qcow2").read_bytes()
        with (tmp_path / "top.qcow2").open("r+b") as file:
            file.write(whole)
            file.truncate()
        image.refresh()
        assert (len(image.chain), image.read(0, NBYTES)) == (2, TOP)


def test_closing_ends_what_began_before_a_refresh(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    image = imgcore.open(folder / "top.qcow2")
    iterator = image.extents()
    next(iterator)
    image.refresh()
    image.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="the image is closed"):
        next(iterator)


def test_many_threads_and_one_that_refreshes(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "disk.vhdx"
    imgcore.convert(folder / "base.raw", path)
    failures: list[BaseException] = []
    ended = threading.Event()
    with imgcore.open(path, share=True) as image:

        def work(seed: int) -> None:
            choose = random.Random(seed)
            try:
                while not ended.is_set():
                    start = choose.randrange(NBYTES - 4096)
                    assert image.read(start, 4096) == BASE[start : start + 4096]
                    assert sum(int(rows["length"].sum()) for rows in image.extents()) == NBYTES
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for worker in workers:
            worker.start()
        for _ in range(60):
            image.refresh()
        ended.set()
        for worker in workers:
            worker.join()
    assert failures == []


# -- keywords --------------------------------------------------------------------------


def test_closed(folder: Path) -> None:
    image = imgcore.open(folder / "top.vdi")
    assert not image.closed
    image.close()
    assert image.closed


@pytest.mark.parametrize("mode", ["w", "rb", "", None, 5])
def test_modes(mode: Any, folder: Path) -> None:
    with pytest.raises(
        imgcore.OptionError, match="'r' opens for reading, 'r\\+' for writing as well"
    ):
        imgcore.open(folder / "top.qcow2", mode=mode)


def test_the_size_of_the_cache(folder: Path) -> None:
    path = folder / "top.qcow2"
    for cache in (0, 1, "0", "1M", MAX_CACHE_NBYTES, np.uint64(5)):
        with imgcore.open(path, cache=cache) as image:
            assert image.read(0, NBYTES) == TOP
    for wrong in (-1, MAX_CACHE_NBYTES + 1, "1E", "many", 2**64):
        with pytest.raises(imgcore.OptionError):
            imgcore.open(path, cache=wrong)
    for none in (1.5, None, b"1M"):
        with pytest.raises(TypeError, match="cache: an integer is needed"):
            imgcore.open(path, cache=none)  # type: ignore[arg-type]
    assert OpenOptions.from_keywords(cache="32M").cache_nbytes == DEFAULT_CACHE_NBYTES
    with open_image(path, OpenOptions()) as image:
        assert image.read(AT, 512) == OWN[:512]


# -- opened and closed -----------------------------------------------------------------


def resident_nbytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("n", [300, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("by", ["name", "descriptor"])
def test_opening_and_closing_leaves_nothing(by: str, n: int, folder: Path) -> None:
    numbers = [os.open(folder / f"{name}.qcow2", os.O_RDONLY) for name in ("top", "base")]

    def once() -> None:
        source: Any = folder / "top.qcow2" if by == "name" else numbers[0]
        files = None if by == "name" else {"base.qcow2": numbers[1]}
        with imgcore.open(source, files=files, format="qcow2") as image:
            buffer = bytearray(4096)
            image.readinto(AT, buffer)
            image.readv([(0, buffer)])
            next(image.extents())
            image.refresh()

    try:
        for _ in range(100):
            once()
        gc.collect()
        before = len(os.listdir("/proc/self/fd")), resident_nbytes()
        for _ in range(n):
            once()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before[0]
        # A megabyte at most for the allocator's own habits: 300 leaked images of 4 KiB.
        assert resident_nbytes() - before[1] <= MIB
    finally:
        for number in numbers:
            os.close(number)
