"""Numbers and paths that callers give to public functions."""

from __future__ import annotations

import inspect
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pytest
from tests.helpers.images import MIB, noise

import imgcore
from imgcore.formats.options import Option
from imgcore.formats.registry import DRIVERS, get_driver

NBYTES = 1 * MIB


class Index:
    """An int by its ``__index__`` only."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __index__(self) -> int:
        return self._value


class BytesPath:
    """A path-like object for bytes, which pathlib does not have."""

    def __init__(self, name: bytes) -> None:
        self._name = name

    def __fspath__(self) -> bytes:
        return self._name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("border")
    raw = folder / "disk.raw"
    raw.write_bytes(noise(NBYTES))
    imgcore.convert(raw, folder / "disk.qcow2")
    (folder / "small.raw").write_bytes(noise(4096))
    return folder


@pytest.fixture
def image(folder: Path) -> Iterator[imgcore.Image]:
    with imgcore.open(folder / "disk.qcow2") as image:
        yield image


# -- numbers ---------------------------------------------------------------------------


def readinto(image: imgcore.Image, offset: Any, threads: Any = 1) -> bytes:
    buffer = bytearray(512)
    image.readinto(offset, buffer, threads=threads)
    return bytes(buffer)


def readv(image: imgcore.Image, threads: Any) -> bytes:
    buffer = bytearray(512)
    image.readv([(512, buffer)], threads=threads)
    return bytes(buffer)


def opened(folder: Path, cache: Any) -> str:
    with imgcore.open(folder / "disk.qcow2", cache=cache) as image:
        return image.format


def rows(batches: Iterator[Any]) -> list[Any]:
    return [batch.tolist() for batch in batches]


def convert(folder: Path, source: str = "disk.raw", **keywords: Any) -> bytes:
    target = folder / "out.qcow2"
    imgcore.convert(folder / source, target, force=True, sync=False, **keywords)
    return target.read_bytes()


def create(folder: Path, virtual_size: Any) -> Any:
    return imgcore.create(folder / "new.qcow2", virtual_size, force=True, sync=False)


def compare(folder: Path, threads: Any) -> Any:
    return imgcore.compare(folder / "disk.raw", folder / "disk.qcow2", threads=threads)


def verify(folder: Path, threads: Any) -> object:
    receipt = folder / "receipt.json"
    imgcore.convert(folder / "disk.raw", folder / "of_receipt.raw", receipt=receipt, force=True)
    return imgcore.verify(receipt, threads=threads)


def compare_trees(folder: Path, threads: Any) -> Any:
    imgcore.checksum(folder / "disk.raw", tree=folder / "disk.tree")
    return list(imgcore.compare_trees(folder / "disk.tree", folder / "disk.qcow2", threads=threads))


def changes(image: imgcore.Image, folder: Path, **keywords: Any) -> Any:
    return list(imgcore.changes(image, since=folder / "small.raw", **keywords))


def updated(folder: Path, change: Callable[[imgcore.Image], object]) -> bytes:
    path = folder / "update.raw"
    shutil.copyfile(folder / "small.raw", path)
    with imgcore.open(path, mode="r+") as image:
        change(image)
    return path.read_bytes()


def applied(folder: Path, **keywords: Any) -> bytes:
    return updated(folder, lambda image: imgcore.apply(image, [(0, b"x" * 512)], **keywords))


def resized(folder: Path, size: Any) -> bytes:
    path = folder / "update.raw"
    shutil.copyfile(folder / "small.raw", path)
    imgcore.resize(path, size, shrink=True)
    return path.read_bytes()


def synced(folder: Path, **keywords: Any) -> bytes:
    path = folder / "update.raw"
    path.write_bytes(bytes((folder / "small.raw").stat().st_size))
    imgcore.sync(folder / "small.raw", path, **keywords)
    return path.read_bytes()


def chained(folder: Path, verb: Callable[..., object], **keywords: Any) -> bytes:
    """Call a verb for an overlay that has one sector."""
    base, top, options = folder / "base.qcow2", folder / "top.qcow2", {"cluster_size": 512}
    imgcore.convert(folder / "small.raw", base, options=options, force=True, sync=False)
    imgcore.create(top, backing=base, backing_format="qcow2", options=options, force=True)
    with imgcore.open(top, mode="r+") as image:
        image.write(0, b"x" * 512)
    verb(top, **keywords)
    with imgcore.open(top) as image:
        return image.read(0, image.virtual_size)


def snapshot(folder: Path, created_ns: Any) -> Any:
    path = folder / "update.qcow2"
    shutil.copyfile(folder / "disk.qcow2", path)
    return imgcore.create_snapshot(path, "one", created_ns=created_ns)


def rebased(folder: Path, **keywords: Any) -> bytes:
    base = folder / "base.qcow2"
    return chained(folder, imgcore.rebase, backing=base, backing_format="qcow2", **keywords)


Call = Callable[[imgcore.Image, Path, Any], Any]


def budget(threads: Any) -> None:
    try:
        imgcore.set_thread_budget(threads)
    finally:
        imgcore.set_thread_budget(None)


def convert_stream(folder: Path, size: SupportsIndex) -> object:
    disk = io.BytesIO(bytes(1024))
    imgcore.convert(disk, folder / "sized.qcow2", format="raw", size=size, force=True)
    return imgcore.info(folder / "sized.qcow2")["virtual-size"]


# Every number that a public function takes, and a value that it allows.
NUMBERS: dict[tuple[str, str], tuple[int, Call]] = {
    ("Image.read", "offset"): (512, lambda image, _, n: image.read(n, 100)),
    ("Image.read", "length"): (512, lambda image, _, n: image.read(512, n)),
    ("Image.readinto", "offset"): (512, lambda image, _, n: readinto(image, n)),
    ("Image.readinto", "threads"): (1, lambda image, _, n: readinto(image, 0, threads=n)),
    ("Image.extents", "start"): (512, lambda image, _, n: rows(image.extents(n, 512))),
    ("Image.extents", "length"): (512, lambda image, _, n: rows(image.extents(512, n))),
    ("Image.data_extents", "start"): (512, lambda image, _, n: rows(image.data_extents(n))),
    ("Image.data_extents", "length"): (512, lambda image, _, n: rows(image.data_extents(0, n))),
    ("Image.layer_extents", "start"): (
        512,
        lambda image, _, n: [rows.tolist() for rows, _ in image.layer_extents(n)],
    ),
    ("Image.layer_extents", "length"): (
        512,
        lambda image, _, n: [rows.tolist() for rows, _ in image.layer_extents(512, n)],
    ),
    ("Image.extents", "layer"): (0, lambda image, _, n: rows(image.extents(layer=n))),
    ("Image.readv", "threads"): (1, lambda image, _, n: readv(image, n)),
    ("Image.as_file", "start"): (512, lambda image, _, n: image.as_file(start=n).read()),
    ("Image.as_file", "length"): (512, lambda image, _, n: image.as_file(length=n).read()),
    ("open", "cache"): (0, lambda _, folder, n: opened(folder, n)),
    ("map", "start"): (512, lambda _, folder, n: list(imgcore.map(folder / "disk.qcow2", start=n))),
    ("map", "length"): (512, lambda _, folder, n: list(imgcore.map(folder / "disk.raw", length=n))),
    ("convert", "sparse"): (1024, lambda _, folder, n: convert(folder, sparse=n)),
    ("convert", "size"): (1024, lambda _, folder, n: convert_stream(folder, n)),
    ("convert", "threads"): (1, lambda _, folder, n: convert(folder, threads=n)),
    ("compare", "threads"): (1, lambda _, folder, n: compare(folder, n)),
    ("checksum", "threads"): (
        1,
        lambda image, _, n: imgcore.checksum(image, threads=n),
    ),
    ("verify", "threads"): (1, lambda _, folder, n: verify(folder, n)),
    ("changes", "threads"): (1, lambda image, folder, n: changes(image, folder, threads=n)),
    ("changes", "granularity"): (
        1024,
        lambda image, folder, n: changes(image, folder, granularity=n),
    ),
    ("compare_trees", "threads"): (1, lambda _, folder, n: compare_trees(folder, n)),
    ("convert", "rate"): (60_000, lambda _, folder, n: convert(folder, "small.raw", rate=n)),
    ("create", "virtual_size"): (1024, lambda _, folder, n: create(folder, n)),
    ("measure", "size"): (1024, lambda _, folder, n: imgcore.measure(size=n)),
    ("Image.write", "offset"): (
        512,
        lambda _, folder, n: updated(folder, lambda image: image.write(n, b"x")),
    ),
    ("Image.writev", "threads"): (
        1,
        lambda _, folder, n: updated(folder, lambda image: image.writev([(0, b"x")], threads=n)),
    ),
    ("Image.zero", "offset"): (
        512,
        lambda _, folder, n: updated(folder, lambda image: image.zero(n, 9)),
    ),
    ("Image.zero", "length"): (
        512,
        lambda _, folder, n: updated(folder, lambda image: image.zero(0, n)),
    ),
    ("Image.discard", "offset"): (
        512,
        lambda _, folder, n: updated(folder, lambda image: image.discard(n, 9)),
    ),
    ("Image.discard", "length"): (
        512,
        lambda _, folder, n: updated(folder, lambda image: image.discard(0, n)),
    ),
    ("Image.resize", "virtual_size"): (
        1024,
        lambda _, folder, n: updated(folder, lambda image: image.resize(n, shrink=True)),
    ),
    ("apply", "flush_every"): (512, lambda _, folder, n: applied(folder, flush_every=n)),
    ("apply", "rate"): (60_000, lambda _, folder, n: applied(folder, rate=n)),
    ("apply", "threads"): (1, lambda _, folder, n: applied(folder, threads=n)),
    ("commit", "rate"): (60_000, lambda _, folder, n: chained(folder, imgcore.commit, rate=n)),
    ("commit", "threads"): (1, lambda _, folder, n: chained(folder, imgcore.commit, threads=n)),
    ("create_snapshot", "created_ns"): (1000, lambda _, folder, n: snapshot(folder, n)),
    ("flatten", "rate"): (60_000, lambda _, folder, n: chained(folder, imgcore.flatten, rate=n)),
    ("flatten", "threads"): (1, lambda _, folder, n: chained(folder, imgcore.flatten, threads=n)),
    ("rebase", "rate"): (60_000, lambda _, folder, n: rebased(folder, rate=n)),
    ("rebase", "threads"): (1, lambda _, folder, n: rebased(folder, threads=n)),
    ("resize", "size"): (1024, lambda _, folder, n: resized(folder, n)),
    ("set_thread_budget", "threads"): (1, lambda _, __, n: budget(n)),
    ("sync", "rate"): (60_000, lambda _, folder, n: synced(folder, rate=n)),
    ("sync", "threads"): (1, lambda _, folder, n: synced(folder, threads=n)),
}
IDS = [" ".join(names) for names in NUMBERS]


# Parameters that may be a descriptor.
DESCRIBED = ("source", "image", "since", "target")


def test_every_number_is_tried() -> None:
    """A number is annotated so that type checkers allow NumPy's integers."""
    functions = {name: getattr(imgcore, name) for name in imgcore.__all__}
    functions |= {
        f"Image.{name}": value
        for name, value in vars(imgcore.Image).items()
        if not name.startswith("_")
    }
    found = set()
    for name, function in functions.items():
        if inspect.isfunction(function):
            for parameter in inspect.signature(function).parameters.values():
                words = str(parameter.annotation).replace(" ", "").split("|")
                # A descriptor is no number to calculate with.
                assert "int" not in words or parameter.name in DESCRIBED, (name, parameter)
                if "SupportsIndex" in words:
                    found.add((name, parameter.name))
    assert found == set(NUMBERS)


@pytest.mark.parametrize("kind", [np.uint64, np.int64, np.uint16, Index])
@pytest.mark.parametrize("names", NUMBERS, ids=IDS)
def test_integers_of_all_kinds(
    names: tuple[str, str], kind: Callable[[int], Any], image: imgcore.Image, folder: Path
) -> None:
    number, call = NUMBERS[names]
    assert call(image, folder, kind(number)) == call(image, folder, number)


def test_the_numbers_of_extents_are_taken_back(image: imgcore.Image, folder: Path) -> None:
    data = (folder / "disk.raw").read_bytes()
    for batch in image.extents():
        for row in batch:
            start, length = row["guest_offset"], row["length"]
            end = int(start) + int(length)
            assert image.read(start, length) == data[int(start) : end]
            assert int(next(image.extents(start, length))["guest_offset"][0]) == int(start)
            entry = next(imgcore.map(folder / "disk.qcow2", start=start, length=length))
            assert entry.start == int(start)


def test_a_bool_is_an_integer(image: imgcore.Image, folder: Path) -> None:
    assert image.read(False, True) == image.read(0, 1)
    assert compare(folder, True).identical


@pytest.mark.parametrize("number", [-1, -(2**70), np.int64(-512), 2**63, np.uint64(2**63), 2**200])
@pytest.mark.parametrize("names", NUMBERS, ids=IDS)
def test_numbers_out_of_range(
    names: tuple[str, str], number: Any, image: imgcore.Image, folder: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        NUMBERS[names][1](image, folder, number)
    assert str(int(number)) in str(caught.value)


@pytest.mark.parametrize("number", [1.0, np.float64(512), 512.5, "512", b"512", [512], 1 + 0j])
@pytest.mark.parametrize("names", NUMBERS, ids=IDS)
def test_what_is_no_integer(
    names: tuple[str, str], number: Any, image: imgcore.Image, folder: Path
) -> None:
    takes_words = ("sparse", "rate", "cache", "granularity", "flush_every")
    takes_sizes = (("resize", "size"), ("convert", "size"))
    if (names[1] in takes_words or names in takes_sizes) and number == "512":
        return  # a size in words is allowed there
    with pytest.raises(TypeError, match="an integer is needed, not"):
        NUMBERS[names][1](image, folder, number)


@pytest.mark.parametrize("names", NUMBERS, ids=IDS)
def test_none_is_a_default_only(names: tuple[str, str], image: imgcore.Image, folder: Path) -> None:
    """None is taken where the signature says so; a read states its length."""
    if names[0] == "set_thread_budget":
        return  # None is its own value: the budget that is made of the CPUs
    function = imgcore.Image if names[0].startswith("Image.") else imgcore
    parameters = inspect.signature(getattr(function, names[0].split(".")[-1])).parameters
    if parameters[names[1]].default is not None:
        with pytest.raises(TypeError, match=f"{names[1]}: an integer is needed, not None"):
            NUMBERS[names][1](image, folder, None)


def test_messages_name_the_argument(image: imgcore.Image) -> None:
    with pytest.raises(TypeError, match="^offset: an integer"):
        image.read("0", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"disk of {NBYTES} bytes: offset -1, length 1$"):
        image.read(-1, 1)
    with pytest.raises(ValueError, match=f"disk of {NBYTES} bytes: start {2**63}$"):
        image.extents(2**63)


@pytest.mark.parametrize("start", [NBYTES + 1, 2**62])
def test_starts_past_the_end(start: int, image: imgcore.Image, folder: Path) -> None:
    with pytest.raises(ValueError, match="past the end of the disk"):
        next(imgcore.map(folder / "disk.qcow2", start=start))
    for call in (image.extents, image.data_extents, image.layer_extents):
        with pytest.raises(ValueError, match="is not inside the disk"):
            call(start)  # type: ignore[operator]
    with pytest.raises(ValueError, match="is not inside the disk"):
        image.read(start, 0)
    assert list(imgcore.map(folder / "disk.qcow2", start=NBYTES)) == []
    assert list(image.extents(NBYTES)) == []
    assert image.read(NBYTES, 0) == b""


def test_a_length_is_refused_before_memory_is_taken(image: imgcore.Image) -> None:
    with pytest.raises(ValueError, match="is not inside the disk"):
        image.read(0, 2**62)


OPTIONS = [
    (entry.name, key, option)
    for entry in DRIVERS
    for key, option in get_driver(entry.name).options.declared.items()
    if option.values in ("size", "int")
]


@pytest.mark.parametrize(
    ("name", "key", "option"), OPTIONS, ids=[f"{name} {key}" for name, key, _ in OPTIONS]
)
def test_numbers_of_options(name: str, key: str, option: Option, tmp_path: Path) -> None:
    path = tmp_path / f"disk.{name}"

    def attempt(value: Any) -> Any:
        return imgcore.create(
            path, NBYTES, format=name, options={key: value}, force=True, sync=False
        )

    for value in (-1, np.int64(-1), 2**63, 2**70):
        with pytest.raises(ValueError):
            attempt(value)
    for value in (1.0, np.float64(1)):
        with pytest.raises(TypeError):
            attempt(value)
    good = option.default if option.default is not None else 1
    for kind in (np.uint64, Index):
        try:
            expected = attempt(int(good))
        except imgcore.ImgcoreError as error:
            with pytest.raises(type(error)):
                attempt(kind(good))
        else:
            assert attempt(kind(good)).options == expected.options


# -- paths -----------------------------------------------------------------------------

KINDS: dict[str, Callable[[bytes], Any]] = {
    "str": os.fsdecode,
    "bytes": bytes,
    "PathLike": lambda name: Path(os.fsdecode(name)),
    "PathLike of bytes": BytesPath,
}
ODD = b"gr\xfc\xff\xdf"  # not UTF-8


@pytest.fixture(params=KINDS)
def named(request: pytest.FixtureRequest) -> Callable[[bytes], Any]:
    return KINDS[request.param]


@pytest.fixture
def odd(folder: Path, tmp_path: Path) -> bytes:
    """Return a folder whose name and files are not UTF-8."""
    path = os.path.join(os.fsencode(tmp_path), ODD)
    os.mkdir(path)
    shutil.copy(folder / "disk.raw", os.path.join(path, ODD + b".raw"))
    return path


@pytest.mark.parametrize("suffix", ["raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi"])
def test_names_that_are_not_utf_8(suffix: str, odd: bytes, named: Callable[[bytes], Any]) -> None:
    source = os.path.join(odd, ODD + b".raw")
    target = os.path.join(odd, b"new" + ODD + b"." + suffix.encode())
    done = imgcore.convert(named(source), named(target))
    assert (done.source, done.target) == (os.fsdecode(source), os.fsdecode(target))
    assert os.path.exists(target)
    assert imgcore.compare(named(source), named(target)).identical
    assert imgcore.info(named(target))["filename"] == os.fsdecode(target)
    assert {entry.filename for entry in imgcore.map(named(target))} == {os.fsdecode(target)}
    assert imgcore.measure(named(target)).required == NBYTES
    assert imgcore.lint(named(target), profile="openstack").filename == os.fsdecode(target)
    with imgcore.open(named(target)) as image:
        assert image.path == os.fsdecode(target)
        assert image.read(0, 512) == noise(NBYTES)[:512]
    if suffix != "raw":
        assert imgcore.check(named(target)).ok
        assert suffix == "vmdk" or imgcore.check(named(target), repair=True).ok
    created = imgcore.create(named(target), NBYTES, force=True)
    assert created.path == os.fsdecode(target)
    packed = os.path.join(odd, ODD + b".raw.gz")
    assert imgcore.convert(named(source), named(packed)).target == os.fsdecode(packed)
    assert imgcore.info(named(packed))["filename"] == os.fsdecode(packed)
    assert imgcore.measure(named(packed)).required == NBYTES


# A VHD and a VHDX store their parent's name as Unicode.
@pytest.mark.parametrize(
    ("suffix", "name"), [("qcow2", ODD), ("vhd", b"base"), ("vhdx", b"base"), ("vdi", ODD)]
)
def test_parents_by_names_that_are_not_utf_8(
    suffix: str, name: bytes, odd: bytes, named: Callable[[bytes], Any]
) -> None:
    raw = os.path.join(odd, ODD + b".raw")
    format = suffix
    base = name + b"." + suffix.encode()
    whole = os.path.join(odd, base)
    child = os.path.join(odd, b"child" + ODD + b"." + suffix.encode())
    imgcore.convert(raw, whole)
    done = imgcore.create(named(child), backing=named(base), backing_format=format)
    assert done.backing == os.fsdecode(base)
    assert imgcore.compare(named(child), named(raw)).identical
    imgcore.convert(
        named(raw), named(child), backing=named(base), backing_format=format, force=True
    )
    assert imgcore.compare(named(child), named(raw)).identical
    # The parent moves to a folder that is not the image's.
    other = os.path.join(os.path.dirname(odd), b"other" + ODD)
    os.mkdir(other)
    moved = os.path.join(other, base)
    os.rename(whole, moved)
    parent, allow = named(moved), [named(other), named(odd)]
    with imgcore.open(named(child), parent=parent, allow=allow) as image:
        assert image.read(0, NBYTES) == noise(NBYTES)
    assert imgcore.compare(
        named(child), named(child), parent_a=parent, parent_b=parent, allow=allow
    ).identical
    assert len(imgcore.info(named(child), chain=True, parent=parent, allow=allow)) == 2
    assert list(imgcore.map(named(child), parent=parent, allow=allow))
    assert imgcore.measure(named(child), parent=parent, allow=allow).required == NBYTES
    assert imgcore.check(named(child), parent=parent, allow=allow).ok
    imgcore.lint(named(child), profile="openstack", parent=parent, allow=allow)
    out = os.path.join(odd, b"out.raw")
    imgcore.convert(named(child), named(out), parent=parent, allow=allow)
    assert imgcore.compare(named(raw), named(out)).identical


def test_an_extent_in_an_allowed_folder(
    tmp_path: Path, folder: Path, named: Callable[[bytes], Any]
) -> None:
    """``allow`` is needed here: the gate opens the file in another folder."""
    far = os.path.join(os.fsencode(tmp_path), ODD)
    os.mkdir(far)
    near = tmp_path / "near"
    near.mkdir()
    child = near / "child.qcow2"
    shutil.copy(folder / "disk.qcow2", os.path.join(far, b"base.qcow2"))
    base = os.path.join(far, b"base.qcow2")
    imgcore.create(child, backing=named(base), backing_format="qcow2")
    with pytest.raises(imgcore.UnsafeReferenceError):
        imgcore.open(child)
    with imgcore.open(child, allow=[named(far)]) as image:
        assert image.read(0, 512) == noise(NBYTES)[:512]


@pytest.mark.parametrize("lone", ["/", b"/", Path("/"), BytesPath(b"/")])
def test_a_lone_folder_is_not_a_sequence(lone: Any, folder: Path) -> None:
    with pytest.raises(imgcore.OptionError, match="a sequence of folders"):
        imgcore.open(folder / "disk.qcow2", allow=lone)


@pytest.mark.parametrize("empty", ["", b"", BytesPath(b"")])
def test_an_allowed_folder_has_a_name(
    empty: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unset variable (``--allow "$DIR"``) does not allow the working folder."""
    (folder / "below").mkdir(exist_ok=True)
    child = folder / "below" / "child.qcow2"
    imgcore.create(
        child, backing="../disk.qcow2", backing_format="qcow2", allow=[folder], force=True
    )
    monkeypatch.chdir(folder)
    with pytest.raises(imgcore.OptionError, match=r"is empty; \. is the working folder"):
        imgcore.open(child, allow=[empty])
    imgcore.open(child, allow=["."]).close()


@pytest.mark.parametrize("path", [5, None, 1.5, {b"x"}, bytearray(b"x")])
def test_what_is_no_path(path: Any, folder: Path) -> None:
    good = folder / "disk.raw"
    calls: list[Callable[[], Any]] = [
        lambda: imgcore.open(path if path != 5 else True),
        lambda: imgcore.info(path),
        lambda: imgcore.map(path),
        lambda: imgcore.check(path),
        lambda: imgcore.lint(path, profile="aws"),
        lambda: imgcore.compare(path, good),
        lambda: imgcore.compare(good, path),
        lambda: imgcore.convert(path, folder / "x.raw"),
        lambda: imgcore.convert(good, path),
        lambda: imgcore.create(path, 512),
        lambda: imgcore.open(good, allow=[path]),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="expected str, bytes or os.PathLike object"):
            call()
