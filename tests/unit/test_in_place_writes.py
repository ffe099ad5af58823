"""Writes that take the short way: the same results as the long way, and its limits."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest

import imgcore
from imgcore.disk.in_place_writes import InPlaceWrites
from imgcore.disk.write_access import WriteAccess

KIB = 1024
MIB = 1 << 20
PIECE = 4 * KIB


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count writes that took the short way, and those that took the long one."""
    found = {"short": 0, "long": 0}
    overwrite, write = InPlaceWrites.overwrite, WriteAccess.write

    def overwritten(self: InPlaceWrites, offset: Any, data: Any) -> Any:
        nbytes = overwrite(self, offset, data)
        found["short"] += nbytes is not None
        return nbytes

    def written(self: WriteAccess, pieces: Any) -> None:
        found["long"] += 1
        write(self, pieces)

    monkeypatch.setattr(InPlaceWrites, "overwrite", overwritten)
    monkeypatch.setattr(WriteAccess, "write", written)
    return found


def full_image(folder: Path, format: str, nbytes: int = 4 * MIB) -> Path:
    source, target = folder / "source.raw", folder / f"disk.{format}"
    source.write_bytes(os.urandom(nbytes))
    imgcore.convert(source, target, target_format=format)
    return target


FORMATS = ("raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi")


@pytest.mark.parametrize("format", FORMATS)
def test_most_overwrites_take_the_short_way(
    format: str, tmp_path: Path, counts: dict[str, int]
) -> None:
    path = full_image(tmp_path, format)
    content = bytearray((tmp_path / "source.raw").read_bytes())
    chance = random.Random(1)
    with imgcore.open(path, mode="r+") as image:
        for _ in range(200):
            nbytes = chance.choice((1, 511, PIECE, 100 * KIB))
            offset, data = chance.randrange(len(content) - nbytes), chance.randbytes(nbytes)
            assert image.write(offset, data) == nbytes
            content[offset : offset + nbytes] = data
        assert image.read(0, len(content)) == content
    with imgcore.open(path) as image:
        assert image.read(0, len(content)) == content
    assert counts["short"] > 150
    if format != "raw":
        assert imgcore.check(path).problems == []


@pytest.mark.parametrize("format", FORMATS)
def test_threads_write_while_the_image_changes(
    format: str, tmp_path: Path, counts: dict[str, int]
) -> None:
    """Each thread has 4 KiB of each 64 KiB, of which the second half is zeroed."""
    nbytes, n_threads = 4 * MIB, 4
    path = full_image(tmp_path, format, nbytes)
    content = bytearray((tmp_path / "source.raw").read_bytes())
    is_over = threading.Event()
    failures: list[BaseException] = []

    def write(number: int) -> None:
        chance = random.Random(number)
        try:
            while not is_over.is_set():
                offset = chance.randrange(nbytes // (64 * KIB)) * 64 * KIB + number * PIECE
                data = chance.randbytes(PIECE)
                image.write(offset, data)
                content[offset : offset + PIECE] = data
        except BaseException as error:
            failures.append(error)

    with imgcore.open(path, mode="r+") as image:
        threads = [threading.Thread(target=write, args=(i,)) for i in range(n_threads)]
        for thread in threads:
            thread.start()
        chance = random.Random(99)
        for _ in range(15):
            # The other parts of blocks are nobody's.
            offset = chance.randrange(MIB, nbytes) // (64 * KIB) * 64 * KIB + 32 * KIB
            image.zero(offset, 32 * KIB)
            content[offset : offset + 32 * KIB] = bytes(32 * KIB)
            image.flush()
            if format in ("raw", "qcow2"):
                image.resize(image.virtual_size + 64 * KIB)
        is_over.set()
        for thread in threads:
            thread.join()
        assert not failures
        assert image.read(0, nbytes) == content
    with imgcore.open(path) as image:
        assert image.read(0, nbytes) == content
    assert counts["short"] > 0
    if format != "raw":
        assert imgcore.check(path).problems == []


@pytest.mark.parametrize("format", ["qcow2", "vdi", "vmdk", "vhdx"])
def test_what_was_freed_takes_the_long_way(
    format: str, tmp_path: Path, counts: dict[str, int]
) -> None:
    path = full_image(tmp_path, format)
    with imgcore.open(path, mode="r+") as image:
        for _ in range(10):
            image.write(MIB, b"x" * PIECE)
        assert counts["short"] > 0
        image.zero(0, 2 * MIB)
        before = counts["long"]
        image.write(MIB, b"y" * PIECE)
        assert counts["long"] == before + 1
        assert image.read(MIB, 2 * PIECE) == b"y" * PIECE + bytes(PIECE)
        image.flush()
        assert image.read(MIB, 2 * PIECE) == b"y" * PIECE + bytes(PIECE)


def test_a_flush_syncs_what_took_the_short_way(
    tmp_path: Path, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = full_image(tmp_path, "raw")
    n_syncs = 0
    fdatasync = os.fdatasync

    def counted(fd: int) -> None:
        nonlocal n_syncs
        n_syncs += 1
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    with imgcore.open(path, mode="r+") as image:
        image.write(0, b"a")
        image.flush()
        image.flush()
        before, short = n_syncs, counts["short"]
        image.write(0, b"b")
        assert counts["short"] == short + 1
        image.flush()
        assert n_syncs == before + 1
        image.flush()
        assert n_syncs == before + 1


def test_nothing_is_written_after_a_failed_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = full_image(tmp_path, "raw")
    image = imgcore.open(path, mode="r+")
    for _ in range(3):
        image.write(0, b"a")

    def failing(_fd: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", failing)
        with pytest.raises(OSError, match="Input/output"):
            image.flush()
    with pytest.raises(imgcore.ImgcoreError, match="sync has failed"):
        image.write(0, b"b")
    with pytest.raises(imgcore.ImgcoreError, match="sync has failed"):
        image.close()
    assert path.read_bytes()[:1] == b"a"


def test_space_is_used_again_while_reads_overlap(tmp_path: Path) -> None:
    """Some read is always in progress, but none for long."""
    path = full_image(tmp_path, "qcow2")
    is_over = threading.Event()

    def read() -> None:
        buffer = bytearray(2 * MIB)
        while not is_over.is_set():
            image.readinto(0, buffer)

    with imgcore.open(path, mode="r+") as image:
        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(40):
            image.zero(2 * MIB, 2 * MIB)
            image.flush()
            image.write(2 * MIB, b"x" * 2 * MIB)
            image.flush()
        is_over.set()
        for thread in threads:
            thread.join()
    assert path.stat().st_size < 16 * MIB
