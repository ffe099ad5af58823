"""streamOptimized disks whose grains come in any order, into every format."""

from __future__ import annotations

import errno
import io
import os
import random
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import vmdk
from tests.helpers.images import MIB, SEED, noise, text
from tests.helpers.mounts import loop_device
from tests.helpers.vmdk import GRAIN, SECTOR

import imgcore
from imgcore.errors import CorruptImageError, ImgcoreError, UnsupportedFeatureError
from imgcore.files.unnamed_file import UnnamedFile
from imgcore.formats.vmdk import streamed

N_GRAINS = 300
# With a short grain at its end.
N_SECTORS = N_GRAINS * GRAIN // SECTOR - 24
NBYTES = N_SECTORS * SECTOR

TARGETS: dict[str, dict[str, Any]] = {
    "raw": {"target_format": "raw"},
    "raw, zeros written": {"target_format": "raw", "sparse": 0},
    "qcow2": {"target_format": "qcow2"},
    "qcow2, small clusters": {"target_format": "qcow2", "options": ["cluster_size=4k"]},
    "qcow2, large clusters": {"target_format": "qcow2", "options": ["cluster_size=2M"]},
    "vmdk": {"target_format": "vmdk", "options": ["subformat=monolithicSparse"]},
    "flat vmdk": {"target_format": "vmdk", "options": ["subformat=monolithicFlat"]},
    "vhd": {"target_format": "vhd", "options": ["subformat=dynamic"]},
    "fixed vhd": {"target_format": "vhd", "options": ["subformat=fixed"]},
    "vhdx": {"target_format": "vhdx", "options": ["block_size=1M"]},
    "vdi": {"target_format": "vdi"},
}


def grain(number: int) -> bytes:
    """Return the content of a grain; some end with zeros, and some are zeros."""
    if number % 17 == 5:
        return bytes(GRAIN)
    content = (text if number % 2 else noise)(GRAIN, SEED + number)
    return content[: GRAIN // 2] + bytes(GRAIN // 2) if number % 7 == 3 else content


def disk(numbers: list[int]) -> bytes:
    content = bytearray(N_GRAINS * GRAIN)
    for number in numbers:
        content[number * GRAIN : (number + 1) * GRAIN] = grain(number)
    return bytes(content[:NBYTES])


def stream(tmp_path: Path, numbers: list[int]) -> bytearray:
    """Return a streamOptimized image with its grains in a given order."""
    contents = {}
    for number in numbers:
        contents[number] = grain(number)
        if number == N_GRAINS - 1:
            contents[number] = contents[number][: NBYTES - number * GRAIN]
    path = vmdk.stream(tmp_path / "made.vmdk", N_SECTORS, contents)
    return bytearray(path.read_bytes())


def shuffled(seed: int = SEED) -> list[int]:
    numbers = [number for number in range(N_GRAINS) if number % 5 != 1]
    random.Random(seed).shuffle(numbers)
    return numbers


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "VMDK_MAX_SORTED_NBYTES", 8 * GRAIN)
    monkeypatch.setattr(streamed, "_LATE_NBYTES", 20 * GRAIN)
    monkeypatch.setattr(streamed, "_LATE_DISK_NBYTES", 16 * GRAIN)


def content_of(path: Path, image_format: str) -> bytes:
    with imgcore.open(path, format=image_format) as image:
        return image.read(0, image.virtual_size)


def data_of(path: Path, image_format: str) -> list[tuple[int, int]]:
    """Return the starts and ends of ranges that have data."""
    found: list[tuple[int, int]] = []
    for each in imgcore.map(path, format=image_format):
        if each.data and found and found[-1][1] == each.start:
            found[-1] = (found[-1][0], each.start + each.length)
        elif each.data:
            found.append((each.start, each.start + each.length))
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_any_order_into_any_target(name: str, tmp_path: Path) -> None:
    keywords, numbers = TARGETS[name], shuffled()
    target, again = tmp_path / "target", tmp_path / "again"
    image, wanted = stream(tmp_path, numbers), disk(numbers)
    result = imgcore.convert(io.BytesIO(image), target, format="vmdk", **keywords)
    target_format = keywords["target_format"]
    assert content_of(target, target_format)[:NBYTES] == wanted
    assert result.bytes_data + result.bytes_zero == result.virtual_size
    if target_format != "raw":
        assert not imgcore.check(target, format=target_format).problems
    # The same is allocated as by grains in order.
    in_order = stream(tmp_path, sorted(numbers))
    imgcore.convert(io.BytesIO(in_order), again, format="vmdk", **keywords)
    assert data_of(target, target_format) == data_of(again, target_format)


@pytest.mark.parametrize(
    "order",
    [
        [*range(1, N_GRAINS), 0],
        [N_GRAINS - 1, *range(N_GRAINS - 1)],
        list(range(N_GRAINS))[::-1],
        [*range(0, N_GRAINS, 2), *range(1, N_GRAINS, 2)],
        [N_GRAINS - 1, 0],
    ],
    ids=["first last", "last first", "descending", "two passes", "two"],
)
def test_orders(order: list[int], tmp_path: Path) -> None:
    target = tmp_path / "target.qcow2"
    imgcore.convert(io.BytesIO(stream(tmp_path, order)), target, format="vmdk", sync=False)
    assert content_of(target, "qcow2") == disk(order)


def test_a_grain_that_waits_for_the_whole_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits must not be where the window has forgotten the stream."""
    monkeypatch.setattr(streamed, "STREAM_BEHIND_NBYTES", 40 * GRAIN)
    order = [N_GRAINS - 1, *range(N_GRAINS - 1)]
    target = tmp_path / "target.raw"
    imgcore.convert(io.BytesIO(stream(tmp_path, order)), target, format="vmdk", sync=False)
    assert target.read_bytes() == disk(order)


def test_over_an_old_file(tmp_path: Path) -> None:
    numbers, target = shuffled(), tmp_path / "target.raw"
    rest = noise(MIB)
    target.write_bytes(noise(NBYTES) + rest)
    result = imgcore.convert(
        io.BytesIO(stream(tmp_path, numbers)),
        target,
        format="vmdk",
        target_format="raw",
        in_place=True,
        verify=True,
    )
    assert target.read_bytes() == disk(numbers) + rest
    assert result.verified


@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")
@pytest.mark.parametrize("name", ["raw", "qcow2", "qcow2, large clusters", "vhdx"])
def test_over_a_block_device(name: str, tmp_path: Path) -> None:
    """Its old bytes do not show where blocks are stored in part."""
    numbers, backing, raw = shuffled(), tmp_path / "device", tmp_path / "back.raw"
    backing.write_bytes(noise(64 * MIB))
    target_format = TARGETS[name]["target_format"]
    with loop_device(backing) as device:
        imgcore.convert(
            io.BytesIO(stream(tmp_path, numbers)),
            device,
            format="vmdk",
            in_place=True,
            verify=True,
            **TARGETS[name],
        )
        imgcore.convert(device, raw, format=target_format)
    assert raw.read_bytes()[:NBYTES] == disk(numbers)


@pytest.mark.parametrize("name", ["raw", "qcow2", "flat vmdk", "vhdx"])
def test_digest(name: str, tmp_path: Path) -> None:
    numbers, raw = shuffled(), tmp_path / "wanted.raw"
    raw.write_bytes(disk(numbers))
    result = imgcore.convert(
        io.BytesIO(stream(tmp_path, numbers)),
        tmp_path / "target",
        format="vmdk",
        checksum="sha256",
        verify=True,
        **TARGETS[name],
    )
    assert result.checksum == imgcore.checksum(raw, format="raw")


def test_progress_never_decreases(tmp_path: Path) -> None:
    seen: list[imgcore.Progress] = []
    imgcore.convert(
        io.BytesIO(stream(tmp_path, shuffled())),
        tmp_path / "target.qcow2",
        format="vmdk",
        progress=seen.append,
        sync=False,
    )
    for before, after in pairwise(seen):
        assert before.done <= after.done <= NBYTES
        assert before.data <= after.data
        assert before.written <= after.written
    assert seen[-1].done == seen[-1].total == NBYTES


@pytest.mark.parametrize(
    "keywords",
    [
        {"target_format": "vmdk", "options": ["subformat=streamOptimized"]},
        {"target_format": "qcow2", "compress": True},
        {"target_format": "raw.gz"},
    ],
)
def test_targets_that_are_not_written_in_place(keywords: dict[str, Any], tmp_path: Path) -> None:
    target = tmp_path / "target"
    if keywords["target_format"] == "raw.gz":
        target, keywords = tmp_path / "target.raw.gz", {}
    with pytest.raises(UnsupportedFeatureError, match="comes long after.*to a file first"):
        imgcore.convert(io.BytesIO(stream(tmp_path, shuffled())), target, format="vmdk", **keywords)
    assert not target.exists()
    with pytest.raises(UnsupportedFeatureError, match="comes long after.*to a file first"):
        imgcore.convert(
            io.BytesIO(stream(tmp_path, shuffled())),
            io.BytesIO(),
            format="vmdk",
            target_format="raw",
        )


def _twice(image: bytearray) -> None:
    """Let the last grain of the stream be the first once more."""
    first = struct.unpack_from("<Q", image, 128 * SECTOR)
    last = shuffled()[-1]
    at = image.rindex(struct.pack("<Q", last * GRAIN // SECTOR))
    struct.pack_into("<Q", image, at, *first)


def _break_data(image: bytearray) -> None:
    number = next(n for n in reversed(shuffled()) if not n % 2 and n % 17 != 5)
    at = image.rindex(struct.pack("<Q", number * GRAIN // SECTOR))
    image[at + 3000 : at + 3010] = bytes(10)


DAMAGE: dict[str, tuple[Callable[[bytearray], object], str]] = {
    "a grain twice": (_twice, "comes twice"),
    "no end-of-stream marker": (
        lambda image: image.__delitem__(slice(-SECTOR, None)),
        "ends too early",
    ),
    "end within a grain": (
        lambda image: image.__delitem__(slice(len(image) * 3 // 4, None)),
        "ends too early",
    ),
    "damaged data": (_break_data, "does not decompress"),
    "another table": (
        lambda image: image.__setitem__(
            slice(image.rindex(vmdk.marker(4, 1)) + SECTOR, None),
            bytes([1]) + image[image.rindex(vmdk.marker(4, 1)) + SECTOR + 1 :],
        ),
        "contradicts the grains",
    ),
    "other bytes behind": (lambda image: image.extend(bytes(MIB) + b"\1"), "goes on after"),
}


@pytest.mark.parametrize("target_format", ["raw", "qcow2"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_leaves_no_target(name: str, target_format: str, tmp_path: Path) -> None:
    image = stream(tmp_path, shuffled())
    change, message = DAMAGE[name]
    change(image)
    folder = tmp_path / "new"
    folder.mkdir()
    with pytest.raises(CorruptImageError, match=message) as caught:
        imgcore.convert(
            io.BytesIO(image), folder / "target", format="vmdk", target_format=target_format
        )
    assert "\n" not in str(caught.value)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", ["raw", "qcow2", "vhdx", "vdi"])
@pytest.mark.parametrize("nth", [0, 7])
def test_faults_leave_no_target(
    name: str, nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second phase fails."""
    calls = 0
    pwrite = UnnamedFile.pwrite

    def failing(self: UnnamedFile, offset: int, data: object) -> None:
        nonlocal calls
        calls += 1
        if calls > nth:
            raise OSError(errno.ENOSPC, "No space left on device", self.path)
        pwrite(self, offset, data)

    monkeypatch.setattr(UnnamedFile, "pwrite", failing)
    folder = tmp_path / "new"
    folder.mkdir()
    with pytest.raises((OSError, ImgcoreError)):
        imgcore.convert(
            io.BytesIO(stream(tmp_path, shuffled())),
            folder / "target",
            format="vmdk",
            **TARGETS[name],
        )
    assert calls > nth
    assert not list(folder.iterdir())


def test_cancel_while_late_grains_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control, pwrite = imgcore.Control(), UnnamedFile.pwrite

    def cancelling(self: UnnamedFile, offset: int, data: object) -> None:
        control.cancel()
        pwrite(self, offset, data)

    monkeypatch.setattr(UnnamedFile, "pwrite", cancelling)
    with pytest.raises(imgcore.ConversionCancelled):
        imgcore.convert(
            io.BytesIO(stream(tmp_path, shuffled())),
            tmp_path / "target.qcow2",
            format="vmdk",
            control=control,
        )
    assert not (tmp_path / "target.qcow2").exists()
