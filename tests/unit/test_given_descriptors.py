"""Images and the files that they name, given by open descriptors."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import qemu
from tests.helpers.images import MIB, noise
from tests.helpers.mounts import loop_device
from tests.helpers.vmdk import descriptor

import imgcore
from imgcore.files import given

NBYTES = 2 * MIB
DATA = noise(NBYTES // 2) + bytes(NBYTES // 4) + noise(NBYTES // 4, 5)
CHILD = noise(4096, 6) + DATA[4096:]

# The files of each image: the one that is opened, and those that it names.
IMAGES: dict[str, tuple[str, ...]] = {
    "qcow2": ("disk.qcow2",),
    "compressed qcow2": ("small.qcow2",),
    "qcow2 chain": ("child.qcow2", "disk.qcow2"),
    "vmdk": ("disk.vmdk",),
    "streamOptimized": ("stream.vmdk",),
    "flat vmdk": ("flat.vmdk", "flat-flat.vmdk"),
    "vmdk of three extents": ("split.vmdk", "split-f001.vmdk", "split-f002.vmdk"),
    "vhd": ("disk.vhd",),
    "vhd chain": ("child.vhd", "disk.vhd"),
    "vhdx": ("disk.vhdx",),
    "vhdx chain": ("child.vhdx", "disk.vhdx"),
    "vdi": ("disk.vdi",),
    "vdi chain": ("child.vdi", "disk.vdi"),
    "raw": ("disk.raw",),
}


def write_images(folder: Path) -> None:
    raw, changed = folder / "disk.raw", folder / "changed.raw"
    raw.write_bytes(DATA)
    changed.write_bytes(CHILD)
    imgcore.convert(raw, folder / "small.qcow2", compress=True)
    imgcore.convert(raw, folder / "stream.vmdk", compress=True)
    imgcore.convert(raw, folder / "flat.vmdk", options={"subformat": "monolithicFlat"})
    for format in ("qcow2", "vmdk", "vhd", "vhdx", "vdi"):
        imgcore.convert(raw, folder / f"disk.{format}")
        if format != "vmdk":
            imgcore.convert(
                changed,
                folder / f"child.{format}",
                backing=f"disk.{format}",
                backing_format=format,
            )
    half = NBYTES // 2
    (folder / "split-f001.vmdk").write_bytes(DATA[:half])
    (folder / "split-f002.vmdk").write_bytes(DATA[half:])
    lines = [f'RW {half // 512} FLAT "split-f00{n}.vmdk" 0' for n in (1, 2)]
    lines.append("RW 8 ZERO")
    (folder / "split.vmdk").write_bytes(descriptor("twoGbMaxExtentFlat", *lines))


def content(name: str) -> bytes:
    whole = CHILD if "chain" in name else DATA
    return whole + bytes(4096) if "three" in name else whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    write_images(folder)
    return folder


@pytest.fixture(params=["reopened", "duplicated"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Use both ways to the file of a descriptor; the second needs no rights to it."""
    if request.param == "duplicated":
        monkeypatch.setattr(given, "_reopened", lambda *_: None)
    return str(request.param)


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[..., list[int]]]:
    """Return a function that opens files of the folder, to be closed after the test."""
    numbers: list[int] = []

    def open_files(*names: str, flags: int = os.O_RDONLY) -> list[int]:
        new = [os.open(folder / name, flags) for name in names]
        numbers.extend(new)
        return new

    yield open_files
    for number in numbers:
        os.close(number)


def open_given(name: str, numbers: list[int], **keywords: Any) -> imgcore.Image:
    source, *others = numbers
    files = dict(zip(IMAGES[name][1:], others, strict=True))
    format = name.split()[-1] if name == "raw" else None
    return imgcore.open(source, files=files, format=format, **keywords)


@pytest.mark.parametrize("name", IMAGES)
def test_reading_by_descriptors(name: str, opened: Any, way: str) -> None:
    numbers = opened(*IMAGES[name])
    with open_given(name, numbers) as image:
        assert image.read(0, image.virtual_size) == content(name)
        assert image.path == f"descriptor {numbers[0]}"
        assert set(image.paths) <= {f"descriptor {number}" for number in numbers}
        assert sum(int(rows["length"].sum()) for rows in image.extents()) == image.virtual_size
        assert image.info()["filename"] == image.path
        image.check_unchanged()


@pytest.mark.parametrize("name", IMAGES)
def test_the_callers_descriptors_stay_as_they_are(name: str, opened: Any, way: str) -> None:
    numbers = opened(*IMAGES[name], flags=os.O_RDWR | os.O_NONBLOCK)
    for n, number in enumerate(numbers):
        os.lseek(number, 17 + n, os.SEEK_SET)
        os.set_inheritable(number, True)
    before = [fcntl.fcntl(number, fcntl.F_GETFL) for number in numbers]
    with open_given(name, numbers) as image:
        image.read(0, image.virtual_size)
        list(image.data_extents())
        image.refresh()
        image.read(0, image.virtual_size)
    for n, number in enumerate(numbers):
        assert os.lseek(number, 0, os.SEEK_CUR) == 17 + n
        assert os.get_inheritable(number)
    assert [fcntl.fcntl(number, fcntl.F_GETFL) for number in numbers] == before


@pytest.mark.parametrize("name", IMAGES)
def test_the_caller_may_close_its_own(name: str, folder: Path, way: str) -> None:
    numbers = [os.open(folder / file, os.O_RDONLY) for file in IMAGES[name]]
    image = open_given(name, numbers)
    for number in numbers:
        os.close(number)
    # The numbers get other files, also while the image reads its headers again.
    others = [os.open(os.devnull, os.O_RDONLY) for _ in numbers]
    assert set(others) == set(numbers)
    try:
        assert image.read(0, image.virtual_size) == content(name)
        image.refresh()
        assert image.read(0, image.virtual_size) == content(name)
    finally:
        image.close()
        for number in others:
            os.close(number)


# -- without rights --------------------------------------------------------------------

AGENT = """
import json, os, sys
import imgcore

source, files, path, format, expected = json.loads(sys.argv[1])
# All modules are loaded while this process still may.
with imgcore.open(source, files=files, format=format) as image:
    image.read(0, image.virtual_size)
    list(image.data_extents())
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
for name in (path, os.path.dirname(path)):
    try:
        os.stat(name + "/." if name != path else name)
    except PermissionError:
        continue
    raise SystemExit(f"{name} can be reached")
try:
    imgcore.open(path)
except PermissionError:
    pass
with imgcore.open(source, files=files, format=format) as image:
    assert image.read(0, image.virtual_size) == os.pread(expected, 1 << 30, 0)
    assert sum(int(rows["length"].sum()) for rows in image.data_extents()) == image.virtual_size
    image.refresh()
    image.read(0, 512)
print("done")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give up rights")
@pytest.mark.parametrize("name", IMAGES)
def test_a_process_without_rights_to_the_folder(name: str, tmp_path: Path) -> None:
    place = tmp_path / "root only"
    place.mkdir(mode=0o700)
    write_images(place)
    for file in place.iterdir():
        file.chmod(0o600)
    expected = tmp_path / "expected"
    expected.write_bytes(content(name))
    shared = os.open(expected, os.O_RDONLY)
    numbers = [os.open(place / file, os.O_RDONLY) for file in IMAGES[name]]
    try:
        files = dict(zip(IMAGES[name][1:], numbers[1:], strict=True))
        words = [
            numbers[0],
            files,
            str(place / IMAGES[name][0]),
            "raw" if name == "raw" else None,
            shared,
        ]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", AGENT, json.dumps(words)],
            pass_fds=(shared, *numbers),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    finally:
        for number in (shared, *numbers):
            os.close(number)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# -- names -----------------------------------------------------------------------------


def test_the_stated_name_or_its_last_component(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    child = tmp_path / "child.qcow2"
    base = tmp_path / "below" / "base.qcow2"
    imgcore.convert(folder / "disk.raw", base)
    imgcore.create(child, backing="below/base.qcow2", backing_format="qcow2")
    number = os.open(base, os.O_RDONLY)
    base.rename(tmp_path / "elsewhere")
    try:
        for name in ("below/base.qcow2", "base.qcow2"):
            with imgcore.open(child, files={name: number}) as image:
                assert image.read(0, NBYTES) == DATA
        for name in ("elow/base.qcow2", "below", "BASE.qcow2"):
            with pytest.raises((imgcore.OptionError, FileNotFoundError)):
                imgcore.open(child, files={name: number})
    finally:
        os.close(number)


def test_a_given_file_comes_before_that_of_its_name(folder: Path, tmp_path: Path) -> None:
    child, base = tmp_path / "child.qcow2", tmp_path / "base.qcow2"
    imgcore.create(base, NBYTES)
    imgcore.create(child, backing="base.qcow2", backing_format="qcow2")
    number = os.open(folder / "disk.qcow2", os.O_RDONLY)
    try:
        with imgcore.open(child, files={"base.qcow2": number}) as image:
            assert image.read(0, NBYTES) == DATA
    finally:
        os.close(number)
    with imgcore.open(child) as image:
        assert image.read(0, NBYTES) == bytes(NBYTES)


def test_names_that_nothing_asks_for(opened: Any) -> None:
    image, other = opened("disk.qcow2", "disk.vhd")
    with pytest.raises(imgcore.OptionError, match=r"files has 'a', 'b', which no image"):
        imgcore.open(image, files={"a": other, "b": other})
    child, base = opened("child.qcow2", "disk.qcow2")
    with pytest.raises(imgcore.OptionError, match=r"files has 'x', which no image"):
        imgcore.open(child, files={"disk.qcow2": base, "x": other})
    with pytest.raises(imgcore.OptionError, match=r"files has 'disk.qcow2', which no image"):
        imgcore.open(child, files={"disk.qcow2": base}, chain=False)


def test_relative_names_need_files_or_allow(opened: Any, folder: Path, tmp_path: Path) -> None:
    """The working folder is none of the image's, even if it has such a file."""
    for name in ("child.qcow2", "child.vhd", "child.vhdx", "child.vdi", "flat.vmdk"):
        (number,) = opened(name)
        format = name.rpartition(".")[2]
        before = os.getcwd()
        os.chdir(folder)
        try:
            with pytest.raises(imgcore.UnsafeReferenceError, match=r"files=\{.*allow=\[") as error:
                imgcore.open(number, format=format)
        finally:
            os.chdir(before)
        assert "\n" not in str(error.value)
        expected = DATA if name == "flat.vmdk" else CHILD
        with imgcore.open(number, format=format, allow=[tmp_path, folder]) as image:
            assert image.read(0, NBYTES) == expected
            assert str(folder) in image.paths[-1]


def test_the_content_alone_leads_to_no_other_file(opened: Any, folder: Path) -> None:
    """A descriptor has no suffix, so a guest could have written these headers."""
    child, base = opened("child.qcow2", "disk.qcow2")
    with pytest.raises(imgcore.UnsafeReferenceError, match=r"state its format \(-f qcow2\)"):
        imgcore.open(child, allow=[folder])
    with imgcore.open(child, files={"disk.qcow2": base}) as image:
        assert image.read(0, NBYTES) == CHILD


def test_the_format_of_a_raw_disk_is_stated(opened: Any) -> None:
    (number,) = opened("disk.raw")
    with pytest.raises(imgcore.WrongFormatError, match="-f raw"):
        imgcore.open(number)


def test_a_file_twice_in_the_chain(opened: Any) -> None:
    child, again, base = opened("child.qcow2", "child.qcow2", "disk.qcow2")
    with pytest.raises(imgcore.CorruptImageError, match="leads back to descriptor"):
        imgcore.open(child, files={"disk.qcow2": again})
    with imgcore.open(child, files={"disk.qcow2": base}) as image:
        assert len(image.chain) == 2


def test_a_vmdk_chain(folder: Path, tmp_path: Path) -> None:
    qemu.require_qemu_img()
    base, child = tmp_path / "base.vmdk", tmp_path / "child.vmdk"
    imgcore.convert(folder / "disk.raw", base)
    qemu.run("create", "-q", "-f", "vmdk", "-b", base, "-F", "vmdk", child)
    numbers = [os.open(path, os.O_RDONLY) for path in (child, base)]
    try:
        with imgcore.open(numbers[0], files={"base.vmdk": numbers[1]}) as image:
            assert image.read(0, NBYTES) == DATA
            assert image.paths == [f"descriptor {number}" for number in numbers]
    finally:
        for number in numbers:
            os.close(number)


def test_a_parent_of_another_content(folder: Path, opened: Any) -> None:
    child, other = opened("child.vhd", "disk.qcow2")
    with pytest.raises(imgcore.WrongFormatError, match="descriptor"):
        imgcore.open(child, files={"disk.vhd": other})


def test_a_block_device(folder: Path, tmp_path: Path, way: str) -> None:
    path = tmp_path / "disk"
    path.write_bytes(DATA)
    with loop_device(path) as device:
        number = os.open(device, os.O_RDONLY)
        try:
            os.lseek(number, 5, os.SEEK_SET)
            with imgcore.open(number) as image:
                assert image.read(0, NBYTES) == DATA
                list(image.data_extents())
                image.refresh()
                image.check_unchanged()
            assert os.lseek(number, 0, os.SEEK_CUR) == 5
        finally:
            os.close(number)


# -- what is refused -------------------------------------------------------------------


def closed(_: Path) -> tuple[int, ...]:
    number = os.open(os.devnull, os.O_RDONLY)
    os.close(number)
    return (number,)


def a_socket(_: Path) -> tuple[int, ...]:
    return tuple(one.detach() for one in socket.socketpair())


REFUSED: dict[str, tuple[Callable[[Path], tuple[int, ...]], type[Exception], str]] = {
    "closed": (closed, OSError, "No file is open under this number"),
    "negative": (lambda _: (-1,), OSError, "has a number from 0 to"),
    "huge": (lambda _: (1 << 40,), OSError, "has a number from 0 to"),
    "for writing": (
        lambda path: (os.open(path, os.O_WRONLY),),
        imgcore.ImgcoreError,
        "is open for writing only",
    ),
    "O_PATH": (
        lambda path: (os.open(path, os.O_PATH),),
        imgcore.ImgcoreError,
        "was opened with O_PATH",
    ),
    "pipe": (lambda _: os.pipe(), imgcore.ImgcoreError, "is a pipe, not a regular file"),
    "socket": (a_socket, imgcore.ImgcoreError, "is a socket, not a regular file"),
    "eventfd": (lambda _: (os.eventfd(0),), imgcore.ImgcoreError, "is no file with content"),
    "folder": (
        lambda path: (os.open(path.parent, os.O_RDONLY),),
        imgcore.ImgcoreError,
        "is a folder, not a regular file",
    ),
    "terminal": (lambda _: pty.openpty(), imgcore.ImgcoreError, "is a character device"),
    "null": (
        lambda _: (os.open(os.devnull, os.O_RDWR),),
        imgcore.ImgcoreError,
        "is a character device",
    ),
}


@pytest.mark.parametrize("as_parent", [False, True], ids=["image", "parent"])
@pytest.mark.parametrize("kind", REFUSED)
def test_descriptors_that_are_refused(kind: str, as_parent: bool, folder: Path) -> None:
    make, error_type, text = REFUSED[kind]
    numbers = make(folder / "disk.qcow2")
    before = len(os.listdir("/proc/self/fd"))
    try:
        with pytest.raises(error_type, match=re.escape(text)) as caught:
            if as_parent:
                imgcore.open(folder / "child.qcow2", files={"disk.qcow2": numbers[0]})
            else:
                imgcore.open(numbers[0])
        assert f"descriptor {numbers[0]}" in str(caught.value)
        assert "\n" not in str(caught.value)
        if isinstance(caught.value, OSError):
            assert caught.value.errno == errno.EBADF
        assert len(os.listdir("/proc/self/fd")) == before
    finally:
        for number in numbers:
            if kind not in ("closed", "negative", "huge"):
                os.close(number)


def test_direct_reads_need_a_description_of_our_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        number = os.open(folder / "disk.qcow2", os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("no O_DIRECT on this file system")
    try:
        with imgcore.open(number) as image:
            assert image.read(1, 5) == DATA[1:6]
        monkeypatch.setattr(given, "_reopened", lambda *_: None)
        with pytest.raises(imgcore.ImgcoreError, match="is open with O_DIRECT"):
            imgcore.open(number)
    finally:
        os.close(number)


@pytest.mark.parametrize("number", [True, False, 1.0, None, [3]])
def test_what_is_no_descriptor(number: Any, folder: Path) -> None:
    with pytest.raises(TypeError, match="open descriptor, not"):
        imgcore.open(number)
    with pytest.raises(TypeError, match="open descriptor, not"):
        imgcore.open(folder / "child.qcow2", files={"disk.qcow2": number})


@pytest.mark.parametrize("files", [[3], "disk.qcow2", {3: 4}])
def test_what_is_no_mapping_of_names(files: Any, folder: Path) -> None:
    with pytest.raises(TypeError):
        imgcore.open(folder / "child.qcow2", files=files)


def test_something_else_on_proc(folder: Path, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the name in /proc leads to is used only if it is the same file."""
    (number,) = opened("disk.qcow2")
    open_file = given.open_file
    monkeypatch.setattr(given, "open_file", lambda _, flags: open_file(os.devnull, flags))
    with imgcore.open(number) as image:
        assert image.read(0, NBYTES) == DATA


def test_a_number_that_has_another_file_by_now(folder: Path, tmp_path: Path) -> None:
    """A refreshed image does not use what the caller gave for a file that it closed."""
    path = tmp_path / "child.qcow2"
    child = (folder / "child.qcow2").read_bytes()
    path.write_bytes(child)
    number = os.open(folder / "disk.qcow2", os.O_RDONLY)
    try:
        with imgcore.open(path, files={"disk.qcow2": number}, share=True) as image:
            # Another process merges the image with its parent, and undoes that.
            imgcore.convert(folder / "changed.raw", tmp_path / "alone.qcow2")
            with path.open("r+b") as file:
                file.write((tmp_path / "alone.qcow2").read_bytes())
            image.refresh()
            assert len(image.chain) == 1
            with path.open("r+b") as file:
                file.write(child)
            with pytest.raises(FileNotFoundError, match="disk.qcow2"):
                image.refresh()
            assert len(image.chain) == 1
    finally:
        os.close(number)


def test_two_extents_of_one_last_component(folder: Path, tmp_path: Path) -> None:
    half = NBYTES // 2
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "x.vmdk").write_bytes(DATA[:half])
    (tmp_path / "b" / "x.vmdk").write_bytes(DATA[half:])
    lines = [f'RW {half // 512} FLAT "{name}/x.vmdk" 0' for name in ("a", "b")]
    (tmp_path / "disk.vmdk").write_bytes(descriptor("twoGbMaxExtentFlat", *lines))
    names = ["disk.vmdk", "a/x.vmdk", "b/x.vmdk"]
    disk, first, second = (os.open(tmp_path / name, os.O_RDONLY) for name in names)
    try:
        with imgcore.open(disk, files={"a/x.vmdk": first, "b/x.vmdk": second}) as image:
            assert image.read(0, NBYTES) == DATA
        with pytest.raises(imgcore.OptionError, match=r"'x.vmdk', which may be 'a/x.*whole names"):
            imgcore.open(disk, files={"x.vmdk": first})
        with pytest.raises(imgcore.OptionError, match=r"files has 'x.vmdk', which no image"):
            imgcore.open(disk, files={"a/x.vmdk": first, "b/x.vmdk": second, "x.vmdk": first})
    finally:
        for number in (disk, first, second):
            os.close(number)
