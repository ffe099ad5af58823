"""An image that is closed or dropped while something uses it."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers.images import MIB, noise

import imgcore
from imgcore.disk.random_access import RandomAccess
from imgcore.files.host_file import HostFile
from imgcore.files.target_file import TargetFile
from imgcore.streams.reader import StreamReader

NBYTES = 2 * MIB

# The name of each image, and how it is written: alone, or over the image of its format.
ALONE: dict[str, dict[str, Any]] = {
    "disk.raw": {},
    "disk.qcow2": {},
    "small.qcow2": {"compress": True},
    "disk.vmdk": {},
    "stream.vmdk": {"compress": True},
    "flat.vmdk": {"options": {"subformat": "monolithicFlat"}},
    "disk.vhd": {},
    "fixed.vhd": {"options": {"subformat": "fixed"}},
    "disk.vhdx": {},
    "disk.vdi": {},
}
CHILDREN = ("child.qcow2", "child.vhd", "child.vhdx", "child.vdi")
IMAGES = (*ALONE, *CHILDREN)


def write_images(folder: Path, seed: int) -> None:
    """Write one disk, with data, zeros and holes, as each of the images."""
    data = bytearray(noise(NBYTES, seed))
    data[MIB // 2 : MIB] = bytes(MIB // 2)
    raw = folder / "disk.raw"
    raw.write_bytes(data)
    changed = folder / "changed.raw"
    data[:4096] = noise(4096, seed + 1)
    changed.write_bytes(data)
    for name, keywords in ALONE.items():
        if name != raw.name:
            imgcore.convert(raw, folder / name, **keywords)
    for name in CHILDREN:
        base = f"disk{Path(name).suffix}"
        imgcore.convert(changed, folder / name, backing=base, backing_format=Path(name).suffix[1:])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two folders with images of the same names and different content."""
    ours, others = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("others")
    write_images(ours, 1)
    write_images(others, 7)
    return ours, others


def descriptors() -> dict[str, str]:
    """Return what each open descriptor of this process refers to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    return found


def extents(image: imgcore.Image) -> list[Any]:
    return [batch.tolist() for batch in image.extents()]


def data_extents(image: imgcore.Image) -> list[Any]:
    return [batch.tolist() for batch in image.data_extents()]


def layers(image: imgcore.Image) -> list[Any]:
    return [(rows.tolist(), depths.tolist()) for rows, depths in image.layer_extents()]


def readinto(image: imgcore.Image) -> bytes:
    buffer = bytearray(image.virtual_size)
    image.readinto(0, buffer)
    return bytes(buffer)


USES: dict[str, Callable[[imgcore.Image], Any]] = {
    "read": lambda image: image.read(0, image.virtual_size),
    "a part": lambda image: image.read(4000, 100_001),
    "readinto": readinto,
    "extents": extents,
    "data_extents": data_extents,
    "layer_extents": layers,
    "info": lambda image: image.info(),
    "check_unchanged": lambda image: image.check_unchanged(),
    "logical_sector_nbytes": lambda image: image.logical_sector_nbytes,
}
AT_THE_CALL: dict[str, Callable[[imgcore.Image], Any]] = {
    "nothing": lambda image: image.read(0, 0),
    "into nothing": lambda image: image.readinto(0, bytearray()),
    "extents": lambda image: image.extents(),
    "no extents": lambda image: image.extents(0, 0),
    "data_extents": lambda image: image.data_extents(),
    "layer_extents": lambda image: image.layer_extents(),
    "with": lambda image: image.__enter__(),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_closed_image_says_so_at_once(name: str, folders: tuple[Path, Path]) -> None:
    image = imgcore.open(folders[0] / name)
    image.close()
    image.close()
    for use in (*USES.values(), *AT_THE_CALL.values()):
        with pytest.raises(ValueError, match="the image is closed"):
            use(image)
    assert name in repr(image)
    assert image.virtual_size == NBYTES


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("iterator", ["extents", "data_extents", "layer_extents"])
def test_a_half_consumed_iterator_never_reads_another_file(
    iterator: str, name: str, folders: tuple[Path, Path]
) -> None:
    ours, others = folders
    for n_taken in (0, 1):
        image = imgcore.open(ours / name)
        batches = getattr(image, iterator)()
        for _ in range(n_taken):
            next(batches)
        threading.Thread(target=image.close).start()
        while image.files[0].fd != -1:
            pass
        # Its descriptors' numbers belong to other images now.
        with imgcore.open(others / name), imgcore.open(others / name):
            with pytest.raises(ValueError, match="the image is closed"):
                next(batches)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", IMAGES)
def test_a_use_that_another_thread_overtakes_with_close(
    name: str, use: str, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call that may touch a file closes the image first and takes its numbers."""
    ours, others = folders
    with imgcore.open(ours / name) as image:
        expected = USES[use](image)
    image = imgcore.open(ours / name)
    taken: list[imgcore.Image] = []

    def close() -> None:
        image.close()
        taken.extend(imgcore.open(others / name) for _ in range(3))

    def overtaken(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if not taken:
                closer = threading.Thread(target=close)
                closer.start()
                closer.join()
            return function(*arguments)

        return call

    for reader in image.layers:
        for method in ("info", "extents"):
            monkeypatch.setattr(reader, method, overtaken(getattr(reader, method)))
    monkeypatch.setattr(RandomAccess, "rows", overtaken(RandomAccess.rows))
    for file in image.files:
        monkeypatch.setattr(file, "check_unchanged", overtaken(file.check_unchanged))
    try:
        assert USES[use](image) == expected
    except ValueError as error:
        # A step of an iterator was complete before the next one found it closed.
        assert use in ("extents", "data_extents", "layer_extents")
        assert "the image is closed" in str(error)
    assert taken or use == "logical_sector_nbytes"
    image.close()
    for other in taken:
        other.close()
    assert all(file.fd == -1 for file in image.files)


@pytest.mark.parametrize("name", ["disk.raw", "flat.vmdk", "child.qcow2", "child.vhdx"])
def test_many_threads_and_one_that_closes(name: str, folders: tuple[Path, Path]) -> None:
    ours, others = folders
    with imgcore.open(ours / name) as image:
        expected = {use: USES[use](image) for use in USES}
    for _ in range(10):
        image = imgcore.open(ours / name)
        failures: list[Any] = []
        started = threading.Barrier(len(USES) + 1)

        def work(
            use: str,
            image: imgcore.Image = image,
            started: threading.Barrier = started,
            failures: list[Any] = failures,
        ) -> None:
            started.wait()
            try:
                deadline = time.monotonic() + 10
                while time.monotonic() < deadline:
                    if USES[use](image) != expected[use]:
                        failures.append(use)
                failures.append(f"{use} still works")
            except ValueError as error:
                if "is closed" not in str(error):
                    failures.append(error)
            except BaseException as error:
                failures.append(error)

        workers = [threading.Thread(target=work, args=(use,)) for use in USES]
        for worker in workers:
            worker.start()
        started.wait()
        image.close()
        taken = [imgcore.open(others / name) for _ in range(3)]
        for worker in workers:
            worker.join()
        for other in taken:
            other.close()
        assert failures == []
        assert all(file.fd == -1 for file in image.files)


def test_a_closed_file_says_so(tmp_path: Path) -> None:
    """Whoever holds a file of an image does not need the image's own guard."""
    path = tmp_path / "file"
    path.write_bytes(bytes(1024))
    file = HostFile.open(path)
    file.close()
    uses: list[Callable[[], Any]] = [
        lambda: file.pread(0, 512),
        lambda: file.pread_into(0, bytearray(512)),
        lambda: file.next_data(0),
        lambda: file.allocated_nbytes,
        lambda: file.n_links,
        lambda: file.attribute("user.x"),
        lambda: file.core,
        file.check_unchanged,
    ]
    for use in uses:
        with pytest.raises(ValueError, match="the file is closed"):
            use()


def test_a_file_that_is_closed_in_the_middle_of_a_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    path.write_bytes(b"a" * 1024)
    other.write_bytes(b"b" * 1024)
    file = HostFile.open(path)
    pread, taken = os.pread, []

    def close_first(fd: int, nbytes: int, offset: int) -> bytes:
        closer = threading.Thread(target=file.close)
        closer.start()
        closer.join()
        taken.append(other.open("rb"))
        return pread(fd, nbytes, offset)

    monkeypatch.setattr(os, "pread", close_first)
    assert file.pread(0, 1024) == b"a" * 1024
    assert file.fd == -1
    taken[0].close()


def drop(held: list[Any]) -> None:
    held.clear()
    gc.collect()


@pytest.mark.parametrize("take", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_owner_of_descriptors_has_no_copy(
    take: Callable[[Any], Any], folders: tuple[Path, Path]
) -> None:
    """A copy that is dropped would close the files of the original."""
    with imgcore.open(folders[0] / "child.qcow2") as image:
        for owner in (image, *image.files):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                take(owner)
        assert image.read(0, 512)


# -- dropped without close -------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGES)
def test_a_dropped_image_is_closed_with_a_warning(name: str, folders: tuple[Path, Path]) -> None:
    before = descriptors()
    held = [imgcore.open(folders[0] / name)]
    held[0].read(0, 4096)
    with pytest.warns(ResourceWarning, match=f"unclosed <Image .*{name}") as warned:
        drop(held)
    assert len(warned) == 1
    assert descriptors() == before


def test_an_image_that_is_open_at_the_end_of_the_process(folders: tuple[Path, Path]) -> None:
    script = f"""
import imgcore
image = imgcore.open({str(folders[0] / "child.qcow2")!r})
image.read(0, 4096)
image.itself = image
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closes", [True, False])
def test_a_use_that_an_exception_has_cut_off(closes: bool, folders: tuple[Path, Path]) -> None:
    """A signal handler may raise between the beginning of a use and its block."""
    before = descriptors()
    held = [imgcore.open(folders[0] / "child.qcow2")]
    held[0].read(0, 4096)
    for owner in (held[0], *held[0].files):
        owner._begin_use("cut off")
    del owner
    if closes:
        held[0].close()
    with warnings.catch_warnings():
        warnings.simplefilter("error" if closes else "ignore")
        drop(held)
    assert descriptors() == before


@pytest.mark.parametrize("iterator", ["extents", "data_extents", "layer_extents"])
def test_an_iterator_keeps_its_image(iterator: str, folders: tuple[Path, Path]) -> None:
    before = descriptors()
    held = [getattr(imgcore.open(folders[0] / "child.qcow2"), iterator)()]
    assert len(next(held[0]))
    assert descriptors() != before
    with pytest.warns(ResourceWarning, match="unclosed <Image"):
        drop(held)
    assert descriptors() == before


def test_a_dropped_map_closes_its_image(folders: tuple[Path, Path]) -> None:
    before = descriptors()
    entries = imgcore.map(folders[0] / "child.qcow2")
    next(entries)
    assert descriptors() != before
    del entries
    gc.collect()
    assert descriptors() == before


def test_a_dropped_image_in_a_cycle(folders: tuple[Path, Path]) -> None:
    before = descriptors()
    holder: dict[str, Any] = {"image": imgcore.open(folders[0] / "flat.vmdk")}
    holder["self"] = holder
    del holder
    with pytest.warns(ResourceWarning, match="unclosed"):
        gc.collect()
    assert descriptors() == before


def test_warnings_as_errors_do_not_keep_it_open(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()
    image = imgcore.open(folders[0] / "disk.raw")
    raised: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda args: raised.append(args.exc_type))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del image
        gc.collect()
    assert raised == [ResourceWarning]
    assert descriptors() == before


@pytest.mark.parametrize("kind", [HostFile, TargetFile, StreamReader])
def test_other_owners_of_descriptors(kind: type, tmp_path: Path) -> None:
    raw, path = tmp_path / "disk.raw", tmp_path / "disk.raw.gz"
    raw.write_bytes(bytes(MIB))
    imgcore.convert(raw, path)
    before = descriptors()
    held: list[Any] = []
    if kind is TargetFile:
        held.append(TargetFile(os.open(path, os.O_RDWR), str(path)))
    else:
        held.append(kind.open(path))  # type: ignore[attr-defined]
    with pytest.warns(ResourceWarning, match=r"unclosed .*disk\.raw\.gz"):
        drop(held)
    assert descriptors() == before


def half_opened(folder: Path, images: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield images that cannot be opened, at every stage of opening them."""
    for name in IMAGES:
        shutil.copy(images / name, folder / name)
    shutil.copy(images / "flat-flat.vmdk", folder / "flat-flat.vmdk")
    for name in ALONE:
        if name == "disk.raw":
            continue
        whole = (folder / name).read_bytes()
        for nbytes in (0, 511, 600, 4096, 70_000):
            path = folder / f"cut-{nbytes}-{name}"
            path.write_bytes(whole[:nbytes])
            yield path, {}
            yield path, {"format": path.suffix[1:]}
        yield folder / name, {"parent": folder / "disk.raw"}
        yield folder / name, {"read_options": {"none": "such"}}
        yield folder / name, {"allow": [folder / "absent"]}
    for name in CHILDREN:
        yield folder / name, {"parent": folder / "disk.raw"}
        yield folder / name, {"parent": folder / "absent"}
        yield folder / name, {"parent": folder / name}
    os.truncate(folder / "flat-flat.vmdk", 512)
    yield folder / "flat.vmdk", {}
    os.unlink(folder / "flat-flat.vmdk")
    yield folder / "flat.vmdk", {}
    for name in CHILDREN:
        parent = folder / f"disk{Path(name).suffix}"
        os.truncate(parent, 600)
        yield folder / name, {}
        os.unlink(parent)
        yield folder / name, {}


def test_an_image_whose_opening_fails_leaks_nothing(
    tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    before, n_failed = descriptors(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for path, keywords in half_opened(tmp_path, folders[0]):
            try:
                imgcore.open(path, **keywords).close()
            except (imgcore.ImgcoreError, OSError):
                n_failed += 1
            gc.collect(0)
            assert descriptors() == before, (path, keywords)
    assert n_failed > 80


def test_a_relative_name_in_a_folder_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(512))
    monkeypatch.chdir(tmp_path)
    before = descriptors()

    def gone() -> str:
        raise FileNotFoundError("the current folder is gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "getcwd", gone)
        with pytest.raises(FileNotFoundError):
            imgcore.open("disk.raw")
        with pytest.raises(FileNotFoundError):
            HostFile.open("disk.raw")
    assert descriptors() == before


def test_a_read_that_fails_keeps_no_buffer(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Its memory comes back with the exception, without garbage collection."""
    path = shutil.copy(folders[0] / "small.qcow2", tmp_path)
    buffer = np.zeros(4096, np.uint8)
    n_references = sys.getrefcount(buffer)
    with imgcore.open(path, share=True) as image:
        os.truncate(path, 512)
        gc.disable()
        try:
            for read in (
                lambda: image.readinto(0, buffer),
                lambda: image.readv([(0, buffer)]),
                lambda: image.readinto(-1, buffer),
                lambda: image.readv([(0, buffer), (0, b"")]),
            ):
                with contextlib.suppress(imgcore.ImgcoreError, ValueError, BufferError):
                    read()
                    raise AssertionError("it does not fail")
                assert sys.getrefcount(buffer) == n_references
        finally:
            gc.enable()
