"""Ranges of QCOW2's persistent bitmaps, against qemu-nbd and on damaged images."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers import qemu
from tests.helpers.qcow2 import create, open_qcow2, qemu_io
from tests.helpers.reading import poke

from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    OptionError,
    UnsupportedFeatureError,
)
from imgcore.formats.api import HasBitmaps
from imgcore.formats.qcow2 import layout

MIB = 1 << 20


def areas(path: Path, name: str = "b0") -> list[tuple[int, int]]:
    reader = open_qcow2(path)
    assert isinstance(reader, HasBitmaps)
    return list(reader.bitmap_areas(name))


def areas_of_qemu(path: Path, name: str, socket: Path) -> list[tuple[int, int]]:
    """Return the dirty ranges that qemu-nbd tells nbdinfo."""
    server, client = qemu.find_program("qemu-nbd"), qemu.find_program("nbdinfo")
    if server is None or client is None:
        pytest.skip("needs qemu-nbd and nbdinfo (Debian: qemu-utils, libnbd-bin)")
    command = [server, "-r", "-f", "qcow2", "-B", name, "-k", str(socket), str(path)]
    with subprocess.Popen(command) as process:
        try:
            while not socket.exists():
                assert process.poll() is None
            uri = f"nbd+unix://?socket={socket}"
            done = qemu.checked([client, "--json", f"--map=qemu:dirty-bitmap:{name}", uri])
        finally:
            process.kill()
    found = [(row["offset"], row["length"]) for row in json.loads(done.stdout) if row["type"] & 1]
    return joined(found)


def joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for start, length in ranges:
        if result and sum(result[-1]) == start:
            start, length = result[-1][0], result.pop()[1] + length
        result.append((start, length))
    return result


@pytest.mark.parametrize(
    ("size", "granularity", "cluster"),
    [
        ("64M", "64k", "64k"),
        ("10M", "512", "512"),
        ("1T", "512k", "4k"),
        ("100000512", "4k", "2M"),
    ],
)
def test_as_qemu_reads_it(tmp_path: Path, size: str, granularity: str, cluster: str) -> None:
    path = create(tmp_path / "a.qcow2", size, f"cluster_size={cluster}")
    nbytes = open_qcow2(path).virtual_size
    qemu.run("bitmap", "--add", "--enable", "-g", granularity, path, "b0")
    qemu.run("bitmap", "--add", "--disable", path, "other")
    rng = random.Random(7)
    writes = [rng.randrange(nbytes // 512 - 64) * 512 for _ in range(40)]
    commands = [f"write -z {start} {rng.choice((512, 1024, 32768))}" for start in writes]
    qemu_io(path, *commands, f"write -z {nbytes - 512} 512", f"write -z {2 << 20} 4M")
    found = areas(path)
    assert len(found) > 10
    assert found == areas_of_qemu(path, "b0", tmp_path / "s")
    assert areas(path, "other") == []
    assert sum(found[-1]) == nbytes


def test_clusters_without_an_offset(tmp_path: Path) -> None:
    """All bits of such a cluster are zeros, or all are ones."""
    path = create(tmp_path / "a.qcow2", "16M", "cluster_size=512")
    qemu.run("bitmap", "--add", "--enable", "-g", "512", path, "b0")
    qemu_io(path, "write -z 0 16M")
    ones = layout.BITMAP_ALL_ONES.to_bytes(8, "big")
    poke(path, (table(path) + 8, ones * 2 + bytes(16) + ones))
    found = areas(path)
    assert found == areas_of_qemu(path, "b0", tmp_path / "s")
    assert found == [(0, 3 * MIB * 2), (5 * MIB * 2, 3 * MIB * 2)]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = create(tmp_path / "a.qcow2", "64M")
    qemu.run("bitmap", "--add", "--enable", path, "b0")
    qemu.run("bitmap", "--add", "--enable", path, "b1")
    qemu_io(path, "write -z 1M 128k", "write -z 8M 64k")
    return path


def test_an_unknown_name_lists_those_that_exist(image: Path) -> None:
    with pytest.raises(OptionError, match=r"no bitmap 'b2': the image has 'b0', 'b1'$"):
        areas(image, "b2")


def test_an_image_without_bitmaps(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", "64M")
    with pytest.raises(OptionError, match="the image has no bitmaps"):
        areas(path)


def test_a_bitmap_in_use(image: Path) -> None:
    """A program that has the image open, or was killed, has set the flag."""
    program = qemu.find_program("qemu-io")
    assert program is not None
    with subprocess.Popen([program, image], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(b"write -z 0 64k\nflush\n")
        process.stdin.flush()
        while not in_use(image):
            assert process.poll() is None
        process.kill()
    with pytest.raises(UnsupportedFeatureError, match="bitmap 'b0' is in use"):
        areas(image)


def in_use(path: Path) -> bool:
    raw = path.read_bytes()
    # While QEMU changes the directory, the autoclear bit is not set.
    return bool(raw[95] & raw[directory_of(raw) + 15] & 1)


def extension(path: Path) -> int:
    """Return where the data of the extension is."""
    return path.read_bytes().index(layout.EXTENSION_BITMAPS.to_bytes(4, "big")) + 8


def directory_of(raw: bytes) -> int:
    at = raw.index(layout.EXTENSION_BITMAPS.to_bytes(4, "big"))
    return int.from_bytes(raw[at + 24 : at + 32], "big")


def entry(image: Path) -> int:
    return directory_of(image.read_bytes())


def table(image: Path) -> int:
    raw = image.read_bytes()
    return int.from_bytes(raw[directory_of(raw) :][:8], "big")


DAMAGES: list[tuple[str, Callable[[Path], tuple[int, bytes]], type[ImgcoreError], str]] = [
    ("stale", lambda _: (88, bytes(8)), UnsupportedFeatureError, "the bitmaps are stale"),
    ("field", lambda p: (extension(p) + 7, b"\1"), UnsupportedFeatureError, "is 0x00000001"),
    ("flag", lambda p: (entry(p) + 12, b"\0\0\0\x0a"), UnsupportedFeatureError, "unknown flags"),
    ("kind", lambda p: (entry(p) + 16, b"\2"), UnsupportedFeatureError, "unknown type 2"),
    ("fine", lambda p: (entry(p) + 17, b"\x08"), LimitExceededError, "granularity of 2\\^8"),
    ("coarse", lambda p: (entry(p) + 17, b"\xff"), LimitExceededError, "granularity of 2\\^63"),
    ("entries", lambda p: (entry(p) + 8, b"\0\0\0\2"), CorruptImageError, "2 clusters, .* needs 1"),
    ("large", lambda p: (24, (1 << 46).to_bytes(8, "big")), ImgcoreError, "allowed|needs"),
    ("table", lambda p: (entry(p), b"\0\0\1"), CorruptImageError, "table of .* past the end"),
    ("unaligned", lambda p: (entry(p) + 7, b"\1"), CorruptImageError, "multiples of the cluster"),
    ("reserved", lambda p: (table(p) + 7, b"\2"), CorruptImageError, "reserved bits set"),
    ("high", lambda p: (table(p), b"\x80"), CorruptImageError, "reserved bits set"),
    ("ones", lambda p: (table(p) + 7, b"\1"), CorruptImageError, "reserved bits set"),
    ("far", lambda p: (table(p) + 2, b"\1"), CorruptImageError, "cluster 0 .* past the end"),
    ("odd", lambda p: (table(p) + 6, b"\2"), CorruptImageError, "multiples of the cluster"),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage[0])
def test_refused(
    image: Path, damage: tuple[str, Callable[[Path], tuple[int, bytes]], type, str]
) -> None:
    _, change, error, words = damage
    assert areas(image) == [(1 << 20, 128 << 10), (8 << 20, 64 << 10)]
    poke(image, change(image))
    with pytest.raises(error, match=words) as caught:
        areas(image)
    assert str(image) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_extra_data(image: Path) -> None:
    """It is passed over if its flag allows that, and refused otherwise."""
    raw = image.read_bytes()
    at = directory_of(raw)
    # The directory of one bitmap, with 8 bytes before the name.
    fixed = raw[at : at + 24]
    changed = fixed[:20] + (8).to_bytes(4, "big") + b"unknown!" + b"b0" + bytes(6)
    poke(
        image,
        (at, changed),
        (extension(image), (1).to_bytes(4, "big")),
        (extension(image) + 8, len(changed).to_bytes(8, "big")),
    )
    with pytest.raises(UnsupportedFeatureError, match="extra data that a reader must know"):
        areas(image)
    poke(image, (at + 12, b"\0\0\0\x06"))
    assert areas(image) == [(1 << 20, 128 << 10), (8 << 20, 64 << 10)]


def test_two_of_one_name(image: Path) -> None:
    raw = image.read_bytes()
    poke(image, (raw.index(b"b1", directory_of(raw)), b"b0"))
    with pytest.raises(CorruptImageError, match="2 bitmaps are named 'b0'"):
        areas(image)


def test_the_bits_after_the_disk_do_not_count(image: Path) -> None:
    raw = image.read_bytes()
    at = int.from_bytes(raw[table(image) :][:8], "big")
    # 64 MiB in 64 KiB are 1024 bits.
    for tail in (b"\x80\xff\xff", b"\x80\0\xff"):
        poke(image, (at + 127, tail))
        assert areas(image)[-1] == ((64 << 20) - 65536, 65536)
