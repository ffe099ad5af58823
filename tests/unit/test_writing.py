"""Writing in place: what is the same for every format."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers.updates import Model, change_at_random

import imgcore
from imgcore.disk.in_place_writes import InPlaceWrites
from imgcore.files.update_file import UpdateFile

MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(MIB))
    return path


def test_what_was_written_is_read(disk: Path) -> None:
    expected = bytearray(disk.read_bytes())
    with imgcore.open(disk, mode="r+") as image:
        image.write(1000, b"abc")
        image.zero(5000, 70_000)
        expected[1000:1003] = b"abc"
        expected[5000:75_000] = bytes(70_000)
        assert image.read(0, MIB) == expected
    assert disk.read_bytes() == expected


def test_an_image_for_reading_is_not_written(disk: Path) -> None:
    with imgcore.open(disk) as image, pytest.raises(imgcore.ImgcoreError, match="reading only"):
        image.write(0, b"abc")


def test_a_second_writer_is_refused(disk: Path) -> None:
    with imgcore.open(disk, mode="r+"), pytest.raises(imgcore.ImgcoreError, match="in use"):
        imgcore.open(disk, mode="r+")


@pytest.mark.parametrize("name", ["qcow2", "vhd", "vhdx", "vdi"])
def test_a_parent_is_only_read(name: str, tmp_path: Path) -> None:
    base, first, second = (tmp_path / f"{stem}.{name}" for stem in ("base", "first", "second"))
    imgcore.create(base, 4 * MIB)
    for child in (first, second):
        imgcore.create(child, backing=base.name, backing_format=name)
    with imgcore.open(first, mode="r+") as image, imgcore.open(second, mode="r+"):
        image.write(0, b"abc")
    with imgcore.open(base, mode="r+"):
        for mode in ("r", "r+"):
            with pytest.raises(imgcore.ImgcoreError, match="in use by this process") as refused:
                imgcore.open(first, mode=mode)
            assert refused.value.path == str(base)


def test_a_disk_that_shrinks_must_be_meant_to(disk: Path) -> None:
    with imgcore.open(disk, mode="r+") as image:
        with pytest.raises(imgcore.OptionError, match="shrink=True"):
            image.resize(MIB // 2)
        image.resize(MIB // 2, shrink=True)
        image.resize(2 * MIB)
        assert image.read(MIB // 2, 3 * MIB // 2) == bytes(3 * MIB // 2)


@pytest.mark.parametrize("seed", range(4))
def test_random_changes(disk: Path, seed: int) -> None:
    change_at_random(disk, Model(disk.read_bytes()), seed=seed, sizes=(MIB // 2, 2 * MIB))


# -- arguments -------------------------------------------------------------------------


def test_the_mode_is_stated(disk: Path) -> None:
    with imgcore.open(disk) as image:
        assert (image.mode, "r+" in repr(image)) == ("r", False)
    with imgcore.open(disk, mode="r+") as image:
        assert (image.mode, "r+" in repr(image)) == ("r+", True)


def test_buffers_of_any_kind(disk: Path) -> None:
    with imgcore.open(disk, mode="r+") as image:
        array = np.arange(1000, dtype=">u4")
        records = np.zeros(7, dtype=[("a", "<u2"), ("b", "<u8")])
        for data in (b"abc", bytearray(b"abc"), memoryview(b"abc"), array, array[:0], records):
            expected = data.tobytes() if isinstance(data, np.ndarray) else bytes(data)
            assert image.write(700, data) == len(expected)
            assert image.read(700, len(expected)) == expected
        for wrong in ("text", 5, None, array[::2], memoryview(b"abcd")[::2]):
            with pytest.raises(TypeError):
                image.write(0, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("offset", "nbytes"), [(MIB, 1), (-1, 5), (MIB - 4, 5), (2**80, 0)])
def test_nothing_is_written_outside_the_disk(offset: int, nbytes: int, disk: Path) -> None:
    before = disk.read_bytes()
    with imgcore.open(disk, mode="r+") as image:
        for change in (
            lambda: image.write(offset, bytes(nbytes)),
            lambda: image.writev([(0, b"abc"), (offset, bytes(nbytes))]),
            lambda: image.zero(offset, nbytes),
            lambda: image.discard(offset, nbytes),
        ):
            with pytest.raises(ValueError, match="is not inside the disk"):
                change()
    assert disk.read_bytes() == before


@pytest.mark.parametrize("nbytes", [-512, 0, 511, 1 << 63, 1 << 80])
def test_sizes_that_no_disk_has(nbytes: int, disk: Path) -> None:
    with imgcore.open(disk, mode="r+") as image:
        with pytest.raises(imgcore.OptionError):
            image.resize(nbytes, shrink=True)
        assert image.virtual_size == MIB


@pytest.mark.parametrize("format", ["qcow2", "vdi", "vhd", "vhdx", "vmdk"])
@pytest.mark.parametrize("is_dropped", [False, True])
def test_space_freed_by_a_resize_is_given_back(
    is_dropped: bool, format: str, disk: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"disk.{format}"
    imgcore.create(path, 8 * MIB)
    content = disk.read_bytes()
    image = imgcore.open(path, mode="r+")
    for at in range(7, -1, -1):  # the last bytes of the disk are the first in the file
        image.write(at * MIB, content)
    image.resize(MIB, shrink=True)
    if is_dropped:
        with pytest.warns(ResourceWarning):
            del image
    else:
        image.close()
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems
    with imgcore.open(path) as image:
        assert image.read(0, MIB) == content


def test_later_requests_win(disk: Path) -> None:
    expected = bytearray(disk.read_bytes())
    choose = random.Random(3)
    requests = []
    for _ in range(300):
        data = choose.randbytes(choose.randint(0, 9000))
        offset = choose.randint(0, MIB - len(data))
        requests.append((offset, data))
        expected[offset : offset + len(data)] = data
    with imgcore.open(disk, mode="r+") as image:
        assert image.writev(iter(requests)) == sum(len(data) for _, data in requests)
        assert image.read(0, MIB) == expected
        for wrong in ((0,), (0, b"x", 3), 5):
            with pytest.raises(TypeError, match="pair"):
                image.writev([(0, b"abc"), wrong])  # type: ignore[list-item]
    assert disk.read_bytes() == expected


def test_a_closed_image_is_not_written(disk: Path) -> None:
    image = imgcore.open(disk, mode="r+")
    image.close()
    for change in (
        lambda: image.write(0, b"abc"),
        lambda: image.writev([(0, b"abc")]),
        lambda: image.zero(0, 5),
        lambda: image.discard(0, 5),
        image.flush,
        lambda: image.resize(2 * MIB),
        image.refresh,
    ):
        with pytest.raises(ValueError, match="the image is closed"):
            change()


# -- failures --------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, name: str, after: int, error: int) -> None:
    """Let calls of the system fail, ``after`` so many that do not."""
    call, left = getattr(os, name), after

    def fail(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(error, os.strerror(error))
        return call(*arguments)

    monkeypatch.setattr(os, name, fail)


def test_a_full_disk_says_how_far_it_got(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with imgcore.open(disk, mode="r+") as image:
        image.resize(64 * MIB)
        data = random.Random(2).randbytes(40 * MIB)
        failing(monkeypatch, "pwrite", 1, errno.ENOSPC)
        with pytest.raises(OSError, match=rf"written up to its offset {16 * MIB}\)") as caught:
            image.write(MIB, data)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(disk))
        assert image.read(MIB, 15 * MIB) == data[: 15 * MIB]
        monkeypatch.undo()
        image.write(16 * MIB, data[15 * MIB :])
        assert image.read(MIB, 40 * MIB) == data


def test_a_full_disk_says_how_far_overwriting_got(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(disk))

    with imgcore.open(disk, mode="r+") as image:
        image.writev([(0, b"a")])
        monkeypatch.setattr(InPlaceWrites, "overwrite", fail)
        with pytest.raises(OSError, match=r"written up to its offset 7000\)"):
            image.writev([(7000, b"b"), (9000, b"c")])


def test_after_a_failed_sync_nothing_is_written(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = imgcore.open(disk, mode="r+")
    n_open = len(os.listdir("/proc/self/fd"))
    image.write(0, b"abc")
    failing(monkeypatch, "fdatasync", 0, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        image.flush()
    monkeypatch.undo()
    before = disk.read_bytes()
    for change in (lambda: image.write(5, b"x"), lambda: image.zero(0, 9), image.flush):
        with pytest.raises(imgcore.ImgcoreError, match="a sync has failed"):
            change()
    with pytest.raises(imgcore.ImgcoreError, match="a sync has failed"):
        image.close()
    assert disk.read_bytes() == before
    assert image.closed
    assert len(os.listdir("/proc/self/fd")) < n_open
    imgcore.open(disk, mode="r+").close()


# -- signals, threads, processes -------------------------------------------------------


@pytest.fixture
def alarm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGALRM)
    yield
    signal.signal(signal.SIGALRM, before)


def during_a_write(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Call a function in a signal handler, once, in the middle of a write."""
    pwrite = UpdateFile.pwrite

    def interrupted(self: UpdateFile, offset: int, data: Any) -> None:
        monkeypatch.setattr(UpdateFile, "pwrite", pwrite)
        signal.raise_signal(signal.SIGALRM)
        pwrite(self, offset, data)

    signal.signal(signal.SIGALRM, lambda *_: act())
    monkeypatch.setattr(UpdateFile, "pwrite", interrupted)


def test_a_signal_handler_reads_but_does_not_write(
    disk: Path, alarm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = disk.read_bytes()
    found: list[object] = []
    with imgcore.open(disk, mode="r+") as image:

        def act() -> None:
            found.append(image.read(5000, 100))
            for change in (lambda: image.write(5000, b"x"), image.flush, image.refresh):
                try:
                    change()
                except RuntimeError as error:
                    found.append("in the middle of a change" in str(error))

        during_a_write(monkeypatch, act)
        image.write(0, b"abc")
        assert found == [before[5000:5100], True, True, True]
        image.write(5000, b"abc")
        image.flush()


def test_a_signal_handler_closes_it_during_a_write(
    disk: Path, alarm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with imgcore.open(disk, mode="r+") as image:
        during_a_write(monkeypatch, image.close)
        image.write(0, b"abc")
        with pytest.raises(ValueError, match="the image is closed"):
            image.write(0, b"abc")
    assert disk.read_bytes()[:3] == b"abc"
    imgcore.open(disk, mode="r+").close()


def test_a_thread_closes_it_during_a_write(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write ends as if it was open, and closes the files."""
    pwrite, writes, closed = UpdateFile.pwrite, threading.Event(), threading.Event()

    def slow(self: UpdateFile, offset: int, data: Any) -> None:
        writes.set()
        assert closed.wait(60)
        pwrite(self, offset, data)

    monkeypatch.setattr(UpdateFile, "pwrite", slow)
    image = imgcore.open(disk, mode="r+")
    thread = threading.Thread(target=image.write, args=(0, b"abc"))
    thread.start()
    assert writes.wait(60)
    image.close()
    with pytest.raises(imgcore.TargetError, match="in use"):
        imgcore.open(disk, mode="r+")
    closed.set()
    thread.join()
    imgcore.open(disk, mode="r+").close()
    assert disk.read_bytes()[:3] == b"abc"


def test_a_dropped_image_is_flushed_with_a_warning(disk: Path) -> None:
    image = imgcore.open(disk, mode="r+")
    image.write(0, b"abc")
    with pytest.warns(ResourceWarning, match="unclosed <Image"):
        del image
    assert disk.read_bytes()[:3] == b"abc"
    imgcore.open(disk, mode="r+").close()


def test_an_image_in_a_cycle_is_flushed_with_a_warning(disk: Path) -> None:
    image = imgcore.open(disk, mode="r+")
    image.write(0, b"abc")
    cycle: list[object] = [image]
    cycle.append(cycle)
    del image, cycle
    with pytest.warns(ResourceWarning, match="unclosed <Image"):
        gc.collect()
    assert disk.read_bytes()[:3] == b"abc"
    imgcore.open(disk, mode="r+").close()


@pytest.mark.parametrize("has_begun", [False, True])
def test_a_forked_child_leaves_it_alone(has_begun: bool, disk: Path) -> None:
    before = disk.read_bytes()
    with imgcore.open(disk, mode="r+") as image:
        iterator = image.extents()
        if has_begun:
            image.write(0, before[:5])
            image.read(0, 5)
        child = os.fork()
        if not child:
            status = 1
            try:
                for use in (
                    lambda: image.write(0, b"abc"),
                    lambda: image.zero(0, 5),
                    image.flush,
                    lambda: image.read(0, 5),
                    lambda: next(iterator),
                    lambda: image.resize(2 * MIB),
                ):
                    with pytest.raises(imgcore.ImgcoreError, match="belongs to the parent process"):
                        use()
                assert image.closed
                image.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert image.read(0, MIB) == before
        image.write(0, b"abc")
        # It still has its lock.
        with pytest.raises(imgcore.TargetError, match="in use"):
            imgcore.open(disk, mode="r+")
    assert disk.read_bytes()[:3] == b"abc"


def test_a_wrong_range_names_the_image(tmp_path: Path) -> None:
    """Not the file of its first extent, also when that is overwritten."""
    disk = tmp_path / "disk.vmdk"
    imgcore.create(disk, MIB, format="vmdk", options={"subformat": "monolithicFlat"})
    with imgcore.open(disk, mode="r+") as image:
        for _ in range(2):
            for use in (lambda: image.write(MIB, b"abc"), lambda: image.read(MIB, 3)):
                with pytest.raises(ValueError, match=f"^{disk}: "):
                    use()
            for _ in range(9):
                image.write(0, b"abc")


def test_several_threads_write_several_files(tmp_path: Path, monkeypatch: Any) -> None:
    """The requests of one call, over the border between two files."""
    disk = tmp_path / "disk.vmdk"
    imgcore.create(disk, 32 * MIB, format="vmdk", options={"subformat": "monolithicFlat"})
    text = disk.read_text()
    one = next(line for line in text.splitlines() if "FLAT" in line)
    half = one.replace(str(32 * MIB // 512), str(16 * MIB // 512))
    disk.write_text(text.replace(one, f"{half}\n{half.replace('-flat', '-f002')}"))
    (tmp_path / "disk-f002.vmdk").write_bytes(bytes(16 * MIB))
    border, data = 16 * MIB, random.Random(1).randbytes(24 * MIB)
    writers = set()
    pwrite = UpdateFile.pwrite

    def noted(self: UpdateFile, offset: int, octets: Any) -> None:
        writers.add((threading.get_ident(), self.path))
        pwrite(self, offset, octets)

    monkeypatch.setattr(UpdateFile, "pwrite", noted)
    with imgcore.open(disk, mode="r+") as image:
        start = border - 12 * MIB
        requests = [(start + at, data[at : at + MIB]) for at in range(0, len(data), MIB)]
        image.writev(requests, threads=2)
        assert image.read(start, len(data)) == data
        for threads in (0, -1):
            with pytest.raises(imgcore.OptionError, match="threads requested"):
                image.writev([(0, b"abc")], threads=threads)
    of_extents = [(thread, path) for thread, path in writers if path != str(disk)]
    assert len({path for _, path in of_extents}) == 2
    assert len({thread for thread, _ in of_extents}) == 2
