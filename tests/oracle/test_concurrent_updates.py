"""Several threads that change and read one image at once, in every format."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import pytest

import imgcore
from imgcore.disk.random_access import RandomAccess
from imgcore.disk.write_access import WriteAccess
from tests.helpers.update_variants import MIB, VARIANTS, UpdateVariant
from tests.helpers.updates import Model, some_content

KIB = 1024
NBYTES = 2 * MIB
N_THREADS = 4


class Region:
    """A range of the disk that one thread changes, and its model.

    Regions are not aligned, so two of them have parts of one block.
    """

    def __init__(self, image: imgcore.Image, start: int, content: bytes, seed: int) -> None:
        self.image = image
        self.start = start
        self.model = Model(content)
        self.choose = random.Random(seed)

    def change(self) -> None:
        choose, image = self.choose, self.image
        size = len(self.model.content)
        nbytes = choose.randint(1, choose.choice((512, 4 * KIB, 70 * KIB)))
        offset = choose.randint(0, size - nbytes)
        at = self.start + offset
        action = choose.random()
        if action < 0.40:
            data = choose.randbytes(nbytes)
            image.write(at, data)
            self.model.write(offset, data)
        elif action < 0.55:
            pieces = [(choose.randint(0, nbytes - 1), choose.randbytes(1000)) for _ in range(9)]
            pieces = [(a, data[: nbytes - a]) for a, data in pieces]
            image.writev([(at + a, data) for a, data in pieces], threads=2)
            for a, data in pieces:
                self.model.write(offset + a, data)
        elif action < 0.70:
            image.zero(at, nbytes, unmap=choose.random() < 0.7)
            self.model.write(offset, bytes(nbytes))
        elif action < 0.78:
            image.discard(at, nbytes)
            self.model.discard(offset, nbytes)
        elif action < 0.83:
            image.flush()
        elif action < 0.85:
            image.refresh()
        self.model.check(offset, image.read(at, nbytes))


class Crowd:
    """Threads, the first of whose exceptions ends them all."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.ended = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, turn: Callable[[], object], n: int | None) -> None:
        """Let a thread take ``n`` turns, or as many as the others need."""

        def work() -> None:
            try:
                taken = 0
                while not self.errors and not self.ended.is_set() and taken != n:
                    turn()
                    taken += 1
            except BaseException as error:
                self.errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self, n: int) -> None:
        """Wait for the first ``n`` threads, and end the others."""
        for thread in self._threads[:n]:
            thread.join(300)
        self.ended.set()
        for thread in self._threads[n:]:
            thread.join(300)
        assert not any(thread.is_alive() for thread in self._threads)
        if self.errors:
            raise self.errors[0]


@pytest.mark.parametrize("n_turns", [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_many_threads(variant: UpdateVariant, n_turns: int, tmp_path: Path) -> None:
    """Each thread finds in its region what it has written, whatever the others do."""
    content = some_content(11, NBYTES)
    path = variant.make(tmp_path, content)
    bounds = [0, *(NBYTES * n // N_THREADS + 777 for n in range(1, N_THREADS)), NBYTES]
    crowd = Crowd()
    with imgcore.open(path, mode="r+") as image:
        regions = [
            Region(image, a, content[a:b], seed) for seed, (a, b) in enumerate(pairwise(bounds))
        ]
        for region in regions:
            crowd.start(region.change, n_turns)
        buffer = np.empty(NBYTES, np.uint8)
        file = image.as_file()
        crowd.start(lambda: image.readinto(0, buffer, threads=2), None)
        crowd.start(lambda: (file.seek(0), file.readall()), None)
        crowd.start(lambda: list(image.data_extents()), None)
        crowd.start(lambda: imgcore.checksum(image, threads=1), None)
        crowd.join(len(regions))
        for region in regions:
            region.model.check(0, image.read(region.start, len(region.model.content)))
    if variant.name != "raw":
        report = imgcore.check(path)
        assert not report.corruptions, report.problems
        # Grains that were freed during a read and a refresh are no longer known.
        assert not report.leaks or variant.name.startswith("vmdk"), report.problems
    with imgcore.open(path) as image:
        for region in regions:
            region.model.check(0, image.read(region.start, len(region.model.content)))


# Those that free whole blocks; others punch holes into them.
OPTIONS: dict[str, dict[str, str]] = {"qcow2": {}, "vhdx": {"block_size": "1M"}, "vmdk": {}}


def host_offsets(image: imgcore.Image) -> set[int]:
    """Return where the blocks of data are."""
    rows = np.concatenate(list(image.extents()))
    rows = rows[rows["kind"] == imgcore.Kind.DATA]
    found: set[int] = set()
    for row in rows:
        first = int(row["host_offset"])
        found.update(range(first, first + int(row["length"]), image.block_size))
    return found


@contextmanager
def three_blocks(path: Path, format: str) -> Iterator[tuple[imgcore.Image, Callable[..., None]]]:
    """Give a new image that has the blocks 0, 2 and 4, and what writes further ones."""
    imgcore.create(path, 16 * MIB, format=format, options=OPTIONS[format])
    with imgcore.open(path, mode="r+", format=format) as image:

        def write(*blocks: int) -> None:
            size = image.block_size
            image.writev([(block * size, b"x" * size) for block in blocks])

        write(0, 2, 4)
        image.flush()
        yield image, write


@pytest.mark.parametrize("freed", [2, 4])
@pytest.mark.parametrize("change", ["refresh", "two refreshes", "resize"])
@pytest.mark.parametrize("reading", ["an iterator", "nothing"])
@pytest.mark.parametrize("format", OPTIONS)
def test_an_image_opened_anew_keeps_freed_blocks(
    format: str, reading: str, change: str, freed: int, tmp_path: Path
) -> None:
    """What began before the image was opened anew still reads what was freed then.

    Block 4 is the last one of the file.
    """
    with three_blocks(tmp_path / "disk", format) as (image, write):
        size = image.block_size
        before = host_offsets(image)
        iterator = image.extents() if reading == "an iterator" else None
        image.discard(freed * size, size)
        image.flush()
        if change == "resize":
            image.resize(32 * MIB)
        else:
            image.refresh()
        kept = before - host_offsets(image)
        if change == "two refreshes":
            image.write(0, b"x")
            image.refresh()
        assert len(kept) == 1
        write(1, 3)
        image.flush()
        write(5)
        assert kept.isdisjoint(host_offsets(image)) == (reading != "nothing")
        if reading != "nothing":
            assert image.sources[0].file.pread(min(kept), size) == b"x" * size
        del iterator
        image.flush()
        write(9)
        assert kept <= host_offsets(image)
    assert not imgcore.check(tmp_path / "disk", format=format).problems


@pytest.mark.parametrize("format", [*OPTIONS, "vdi", "vhd"])
def test_an_iterator_finds_blocks_that_are_newer_than_its_image(
    format: str, tmp_path: Path
) -> None:
    """It reads tables that change after the image was opened anew."""
    imgcore.create(tmp_path / "disk", 16 * MIB, format=format, options=OPTIONS.get(format, {}))
    with imgcore.open(tmp_path / "disk", mode="r+", format=format) as image:
        image.write(0, b"x")
        image.flush()
        iterator = image.data_extents()
        image.refresh()
        for start in range(0, 16 * MIB, MIB):
            image.write(start, b"y" * MIB)
        image.flush()
        rows = np.concatenate(list(iterator))
        assert int(rows["length"].sum()) == 16 * MIB


@pytest.mark.parametrize("reading", ["a read", "an iterator", "nothing"])
@pytest.mark.parametrize("format", OPTIONS)
def test_reads_keep_freed_blocks(
    format: str, reading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is freed during a read is not used again before it ends."""
    with three_blocks(tmp_path / "disk", format) as (image, write):
        size = image.block_size
        before = host_offsets(image)
        begun, goes_on = threading.Event(), threading.Event()
        verify = RandomAccess.range

        def slow(self: RandomAccess, offset: SupportsIndex, length: SupportsIndex) -> Any:
            begun.set()
            assert goes_on.wait(60)
            return verify(self, offset, length)

        thread = threading.Thread(target=image.read, args=(0, 512))
        iterator = image.extents() if reading == "an iterator" else None
        if reading == "a read":
            monkeypatch.setattr(RandomAccess, "range", slow)
            thread.start()
            assert begun.wait(60)
        image.discard(2 * size, size)
        image.flush()
        kept = before - host_offsets(image)
        assert len(kept) == 1
        write(1, 3)
        image.flush()
        assert kept.isdisjoint(host_offsets(image)) == (reading != "nothing")
        goes_on.set()
        if reading == "a read":
            thread.join()
        del iterator
        image.flush()
        write(5, 6)
        assert kept <= host_offsets(image)


RESIZED = ["qcow2", "vdi", "vhd", "vhdx", "vmdk"]


@pytest.mark.parametrize("format", RESIZED)
def test_a_resize_in_the_middle_of_a_read(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that knows where the data was finds it there, or holds the resize up."""
    content = some_content(5, 4 * MIB)
    imgcore.create(tmp_path / "disk", 4 * MIB, format=format)
    begun, goes_on = threading.Event(), threading.Event()
    rows, await_reads = RandomAccess.rows, WriteAccess._await_reads

    def slow(self: RandomAccess, start: int, end: int) -> Any:
        found = rows(self, start, end)
        begun.set()
        assert goes_on.wait(60)
        return found

    def noted(self: WriteAccess) -> None:
        goes_on.set()
        await_reads(self)

    with imgcore.open(tmp_path / "disk", mode="r+", format=format) as image:
        image.write(0, content)
        image.flush()
        found: list[bytes] = []
        reading = threading.Thread(target=lambda: found.append(image.read(0, len(content))))
        with monkeypatch.context() as patched:
            patched.setattr(RandomAccess, "rows", slow)
            reading.start()
            assert begun.wait(60)
            patched.setattr(WriteAccess, "_await_reads", noted)
            image.resize(1 << 40)
            goes_on.set()
            reading.join(60)
        assert found == [content]
        assert image.read(0, len(content)) == content
    with imgcore.open(tmp_path / "disk", format=format) as image:
        assert image.read(0, len(content)) == content
    assert not imgcore.check(tmp_path / "disk", format=format).corruptions


@pytest.mark.parametrize("size", [1 << 40, MIB], ids=["grows", "shrinks"])
@pytest.mark.parametrize("format", RESIZED)
def test_reads_between_the_steps_of_a_resize(
    format: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk reads the same at every sync, by tables that are known already."""
    content = some_content(6, 4 * MIB)
    imgcore.create(tmp_path / "disk", 4 * MIB, format=format)
    sync = os.fdatasync
    with imgcore.open(tmp_path / "disk", mode="r+", format=format) as image:
        image.write(0, content)
        image.flush()
        assert image.read(0, MIB) == content[:MIB]
        n_reads = 0

        def verified(fd: int) -> None:
            nonlocal n_reads
            sync(fd)
            assert image.read(0, MIB) == content[:MIB]
            n_reads += 1

        with monkeypatch.context() as patched:
            patched.setattr(os, "fdatasync", verified)
            image.resize(size, shrink=True)
        assert n_reads > 1
