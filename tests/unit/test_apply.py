"""Changes from elsewhere, which are written into an image in bulk."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import imgcore

MIB = 1 << 20
FORMATS = ("raw", "qcow2", "vhd", "vdi", "vmdk", "vhdx")


@pytest.fixture(params=FORMATS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(random.Random(1).randbytes(MIB) + bytes(MIB))
    path = tmp_path / f"disk.{request.param}"
    if path != raw:
        imgcore.convert(raw, path)
    return path


def content(path: Path) -> bytes:
    with imgcore.open(path) as image:
        return image.read(0, image.virtual_size)


def random_changes(expected: bytearray, seed: int, n: int) -> list[tuple[Any, ...]]:
    """Return changes that overlap, and change a model in the same way."""
    choose = random.Random(seed)
    changes: list[tuple[Any, ...]] = []
    for _ in range(n):
        length = choose.randint(0, 20_000)
        offset = choose.randint(0, len(expected) - length)
        if choose.random() < 0.3:
            changes.append((offset, None, length))
            data = bytes(length)
        else:
            data = choose.randbytes(length)
            changes.append((offset, data) if choose.random() < 0.5 else (offset, data, length))
        expected[offset : offset + length] = data
    return changes


def test_later_changes_win(disk: Path) -> None:
    expected = bytearray(content(disk))
    changes = random_changes(expected, 5, 400)
    result = imgcore.apply(disk, iter(changes), flush_every="300k", threads=2)
    assert content(disk) == expected
    zeroed = sum(change[2] for change in changes if change[1] is None)
    written = sum(len(change[1]) for change in changes if change[1] is not None)
    assert result[:-1] == (
        str(disk), disk.suffix[1:], 2 * MIB, len(changes), written, zeroed,
    )  # fmt: skip
    assert disk.suffix == ".raw" or not imgcore.check(disk).corruptions


def test_an_open_image_stays_open(disk: Path) -> None:
    with imgcore.open(disk, mode="r+") as image:
        assert imgcore.apply(image, [(5, b"abc"), (0, None, 1)]).changes == 2
        assert image.read(0, 9)[5:8] == b"abc"
        with pytest.raises(imgcore.OptionError, match="takes no options"):
            imgcore.apply(image, [], format="raw")
    with imgcore.open(disk) as image, pytest.raises(imgcore.ImgcoreError, match="reading only"):
        imgcore.apply(image, [])


def test_a_buffer_that_is_used_again(disk: Path) -> None:
    """Both short changes, which are collected, and long ones."""

    def changes() -> Iterator[tuple[int, bytearray]]:
        for buffer in (bytearray(512), bytearray(MIB)):
            for number in range(2):
                buffer[:] = bytes([number + 1]) * len(buffer)
                yield number * len(buffer), buffer

    imgcore.apply(disk, changes())
    assert content(disk) == b"\1" * MIB + b"\2" * MIB


def test_a_source_that_fails(disk: Path) -> None:
    before = content(disk)

    def changes() -> Iterator[tuple[int, bytes]]:
        yield 0, b"abc"
        yield MIB, b"def"
        raise KeyError("no more")

    with pytest.raises(KeyError) as caught:
        imgcore.apply(disk, changes())
    assert caught.value.__notes__ == [f"{disk}: 2 changes are written and durable"]
    assert content(disk) == b"abc" + before[3:MIB] + b"def" + before[MIB + 3 :]


def test_a_callback_that_fails(disk: Path) -> None:
    def report(_: imgcore.Progress) -> None:
        raise KeyError("no more")

    with pytest.raises(KeyError) as caught:
        imgcore.apply(disk, [(0, b"abc")], progress=report)
    assert caught.value.__notes__ == [f"{disk}: 1 changes are written and durable"]
    assert content(disk)[:3] == b"abc"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ((2 * MIB, b"x"), ValueError, "is not inside the disk"),
        ((-1, None, 1), ValueError, "is not inside the disk"),
        ((0, None, -1), ValueError, "is not inside the disk"),
        ((0, b"abc", 4), ValueError, "the data has 3 bytes"),
        ((0, None), TypeError, "zeros need a length"),
        ((0, "text"), TypeError, "bytes-like"),
        ((0,), TypeError, "a change is"),
        (5, TypeError, "a change is"),
        ((0.5, b"x"), TypeError, "an integer"),
    ],
)
def test_a_change_that_is_not_valid(
    change: Any, error: type[Exception], text: str, tmp_path: Path
) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(2 * MIB))
    with pytest.raises(error, match=text) as caught:
        imgcore.apply(disk, [(0, b"abc"), change, (0, b"xyz")])
    assert caught.value.__notes__ == [f"{disk}: 1 changes are written and durable"]
    assert disk.read_bytes()[:3] == b"abc"


def test_a_full_disk(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(disk)
    pwrite, left = os.pwrite, 40

    def fail(*arguments: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", fail)
    changes = [(at * 5000, b"\xff" * 700) for at in range(400)]
    with pytest.raises(OSError, match="No space left") as caught:
        imgcore.apply(disk, changes, flush_every=5000)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    now = content(disk)
    assert all(a in (b, 255) for a, b in zip(now, before, strict=True))
    imgcore.apply(disk, changes)
    assert all(content(disk)[at : at + 700] == data for at, data in changes)
    assert disk.suffix == ".raw" or not imgcore.check(disk).corruptions


def test_it_flushes_as_often_as_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(64 * MIB))
    sync, n_syncs = os.fdatasync, 0

    def count(fd: int) -> None:
        nonlocal n_syncs
        n_syncs += 1
        sync(fd)

    monkeypatch.setattr(os, "fdatasync", count)
    data = bytes(8 * MIB)
    counts = []
    for flush_every in (None, "32M"):
        n_syncs = 0
        reports: list[imgcore.Progress] = []
        imgcore.apply(
            disk,
            ((at, data) for at in range(0, 64 * MIB, len(data))),
            flush_every=flush_every,
            progress=reports.append,
            rate="4G",
        )
        assert reports[-1] == imgcore.Progress(64 * MIB, 64 * MIB, 64 * MIB, 0, 64 * MIB)
        assert all(report.done == report.total for report in reports)
        counts.append(n_syncs)
    assert counts[1] - counts[0] == 1


def test_options(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(512))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"rate": "1M", "control": imgcore.Control()}, "rate and control"),
        ({"flush_every": 0}, "flush_every is 0"),
        ({"flush_every": "much"}, "much"),
        ({"threads": 0}, "0 threads"),
    ]
    for keywords, text in wrong:
        with pytest.raises(imgcore.OptionError, match=text):
            imgcore.apply(disk, [], **keywords)
    assert imgcore.apply(disk, []).changes == 0
