"""A read takes the memory of its result once."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from tests.helpers.images import MIB, noise
from tests.helpers.images import text as text_bytes

import imgcore

NBYTES = 16 * MIB

IMAGES = {
    "disk.raw": {},
    "disk.qcow2": {},
    "small.qcow2": {"compress": True},
    "stream.vmdk": {"compress": True},
    "disk.vhd": {},
    "disk.vhdx": {},
    "disk.vdi": {},
}
RANGES = [(0, NBYTES), (1, NBYTES - 2), (512, NBYTES - 512), (300, 9 * MIB), (513, 8 * MIB - 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    raw = folder / "disk.raw"
    raw.write_bytes(noise(2 * MIB) + text_bytes(12 * MIB) + bytes(2 * MIB))
    for name, keywords in IMAGES.items():
        if name != raw.name:
            imgcore.convert(raw, folder / name, **keywords)  # type: ignore[arg-type]
    return folder


def peak_of(call: object) -> int:
    assert callable(call)
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("offset", "length"), RANGES)
@pytest.mark.parametrize("name", IMAGES)
def test_reads_take_their_size_once(name: str, offset: int, length: int, folder: Path) -> None:
    expected = (folder / "disk.raw").read_bytes()[offset : offset + length]
    with imgcore.open(folder / name) as image:
        assert image.read(offset, length) == expected
        assert peak_of(lambda: image.read(offset, length)) < length + MIB
        buffer = bytearray(length)
        assert peak_of(lambda: image.readinto(offset, buffer)) < MIB
        assert buffer == expected


SCRIPT = """
import sys
import imgcore

def peak():  # the rusage of a child starts with that of its parent
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if "VmHWM" in line)

path, offset, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with imgcore.open(path) as image:
    image.read(0, 8 << 20)
    before = peak()
    for threads in (1, 4):
        content = bytearray(1)
        image.readinto(0, content, threads=threads)
    content = image.read(offset, length)
    print(peak() - before)
"""


@pytest.mark.skipif(
    "asan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer takes memory of its own"
)
@pytest.mark.parametrize("offset", [0, 1, 511])
@pytest.mark.parametrize("huge_nbytes", [256 * MIB, 1 << 42])
def test_the_peak_of_a_process(offset: int, huge_nbytes: int, tmp_path: Path) -> None:
    path, length = tmp_path / "huge.qcow2", 200 * MIB
    imgcore.create(path, huge_nbytes)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, path, str(offset), str(length)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert length - 16 * MIB < int(done.stdout) < length + 32 * MIB


@pytest.mark.parametrize("name", IMAGES)
def test_ranges_of_all_alignments(name: str, folder: Path) -> None:
    """Each byte of the range is written, none outside of it."""
    data = (folder / "disk.raw").read_bytes()
    places = [0, 1, 511, 512, 513, 1023, 4096, 65535, 65536, 2 * MIB - 1, 14 * MIB, NBYTES - 513]
    places += [NBYTES - 512, NBYTES - 1, NBYTES]
    with imgcore.open(folder / name) as image:
        for start in places:
            for end in (*places, start + 1, start + 700):
                if not start <= end <= NBYTES:
                    continue
                if end - start > MIB and (start, end) not in ((1, NBYTES - 1), (0, NBYTES)):
                    continue
                assert image.read(start, end - start) == data[start:end]
                buffer = bytearray(b"\xee" * (end - start + 20))
                image.readinto(start, memoryview(buffer)[10:-10])
                assert buffer[10:-10] == data[start:end]
                assert buffer[:10] + buffer[-10:] == b"\xee" * 20


def test_the_result_is_new_each_time(folder: Path) -> None:
    with imgcore.open(folder / "disk.raw") as image:
        first, second = image.read(0, 1), image.read(1, 1)
        assert first + second == image.read(0, 2)
        assert image.read(5, 0) == b""
        results = [image.read(at, 1) for at in range(2000)]
        assert b"".join(results) == image.read(0, 2000)


@pytest.mark.parametrize("cache", [0, 100_000, 2 * MIB])
@pytest.mark.parametrize("name", ["disk.qcow2", "small.qcow2", "stream.vmdk"])
def test_no_more_is_kept_than_the_cache_allows(name: str, cache: int, folder: Path) -> None:
    data = (folder / "disk.raw").read_bytes()
    with imgcore.open(folder / name, cache=cache) as image:
        for _ in range(2):
            for at in range(0, NBYTES, 50_000):
                assert image.read(at, 1000) == data[at : at + 1000]
                assert image._disk is not None
                n_entries, nbytes, _, _ = image._disk.stats
                assert nbytes <= cache
        assert (n_entries > 0) == (cache > 0)
        if cache == 2 * MIB and name != "disk.qcow2":
            assert nbytes > cache // 2


def test_blocks_and_tables_are_read_once(folder: Path) -> None:
    with imgcore.open(folder / "small.qcow2") as image:
        image.read(3 * MIB, 1)
        assert image._disk is not None
        before = image._disk.stats
        for offset in range(3 * MIB, 3 * MIB + 65536, 100):
            image.read(offset, 1)
        after = image._disk.stats
        assert (before[0], before[3]) == (after[0], after[3])
        image.refresh()
        assert image._disk is None
