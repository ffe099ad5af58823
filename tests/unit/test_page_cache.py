"""What conversions leave in the page cache, counted by fincore and mincore."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.images import KIB, MIB, noise, text
from tests.helpers.mounts import loop_device, make_file_system, mounted

import imgcore
from imgcore.files.descriptors import open_file
from imgcore.files.page_cache import CacheMode
from imgcore.files.target_file import TargetFile

PAGE = mmap.PAGESIZE
# What is read of headers before the pages are counted, with the kernel's read-ahead.
HEADERS_NBYTES = 1 * MIB
DISK = (noise(5 * MIB) + text(3 * MIB) + bytes(2 * MIB)) * 6 + noise(513 * KIB) + b"end"

TARGETS: dict[str, dict[str, Any]] = {
    "a.raw": {},
    "a.qcow2": {},
    "b.qcow2": {"compress": True},
    "a.vmdk": {"options": {"subformat": "monolithicFlat"}},
    "a.vhd": {"options": {"subformat": "fixed"}},
    "a.vhdx": {},
    "a.vdi": {},
    "a.raw.zst": {},
    "a.tar.gz": {"profile": "gce"},
}


def cached_pages(path: Path) -> set[int]:
    """Return the numbers of the pages that are in memory, by mincore."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), file.seek(0, os.SEEK_END)) as view:
        n_pages = -(-len(view) // PAGE)
        found = (ctypes.c_ubyte * n_pages)()
        start = (ctypes.c_char * len(view)).from_buffer(view)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.byref(start), ctypes.c_size_t(len(view)), found)
        del start
        assert failed == 0
    return {number for number, one in enumerate(found) if one & 1}


def cached_nbytes(path: Path) -> int:
    """Return the same as bytes, as fincore counts them."""
    nbytes = len(cached_pages(path)) * PAGE
    if shutil.which("fincore") is not None:
        done = subprocess.run(
            ["fincore", "--bytes", "--noheadings", "--output", "RES", path],
            capture_output=True,
            check=True,
        )
        assert int(done.stdout) == nbytes
    return nbytes


def forget(path: Path) -> None:
    """Have nothing of a file in memory."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert cached_nbytes(path) == 0


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on ext4, whatever the file system of temporary files is."""
    if os.geteuid() != 0:
        yield tmp_path
        return
    image = make_file_system("ext4", tmp_path / "ext4.img", 400 * MIB)
    with mounted(image, tmp_path / "ext4", "-o", "loop") as found:
        yield found


@pytest.fixture
def raw(folder: Path) -> Path:
    path = folder / "disk.raw"
    path.write_bytes(DISK)
    forget(path)
    return path


@pytest.mark.parametrize("name", TARGETS)
def test_targets(raw: Path, folder: Path, name: str) -> None:
    target = folder / name
    result = imgcore.convert(
        raw, target, source_cache="drop", target_cache="drop", checksum="sha256", **TARGETS[name]
    )
    files = [path for path in folder.iterdir() if path.is_file() and path != raw]
    assert sum(map(cached_nbytes, files)) == 0
    assert cached_nbytes(raw) <= HEADERS_NBYTES
    # The bytes are the same.
    options = dict(TARGETS[name])
    imgcore.convert(raw, folder / f"kept-{name}", checksum="sha256", **options)
    again = imgcore.convert(raw, target, verify=True, force=True, target_cache="drop", **options)
    assert again.checksum == result.checksum
    assert cached_nbytes(target) == 0
    if name in ("a.raw", "a.qcow2", "b.qcow2", "a.raw.zst", "a.vdi"):
        length = min(target.stat().st_size, 4 * MIB)
        assert (
            target.read_bytes()[4096:length] == (folder / f"kept-{name}").read_bytes()[4096:length]
        )


@pytest.mark.parametrize("name", ["b.qcow2", "a.vdi", "a.vmdk", "a.raw.zst"])
def test_sources(raw: Path, folder: Path, name: str) -> None:
    source = folder / name
    imgcore.convert(raw, source, **TARGETS[name])
    files = [path for path in folder.iterdir() if path.is_file() and path != raw]
    for path in files:
        forget(path)
    imgcore.convert(source, folder / "back.raw", source_cache="drop", threads=3)
    assert sum(map(cached_nbytes, files)) <= HEADERS_NBYTES
    assert (folder / "back.raw").read_bytes()[: len(DISK)] == DISK
    # Without it, most of the source stays.
    imgcore.convert(source, folder / "back.raw", force=True)
    assert sum(map(cached_nbytes, files)) > sum(path.stat().st_size for path in files) // 2


def test_nothing_waits_in_memory_at_the_end_of_a_long_write(folder: Path) -> None:
    """Most of it is dropped before the sync, not by it."""
    path = folder / "a"
    with closing(TargetFile(open_file(str(path), os.O_RDWR | os.O_CREAT), str(path))) as file:
        file.use_cache(CacheMode.DROP)
        for offset in range(0, 128 * MIB, MIB):
            file.pwrite(offset, noise(1 * MIB))
            assert cached_nbytes(path) <= 32 * MIB
        file.sync()
    assert cached_nbytes(path) == 0


def test_what_was_cached_before_stays(raw: Path, folder: Path) -> None:
    with raw.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(8 * MIB, 30 * MIB, 3 * MIB):
            os.pread(file.fileno(), 64 * KIB, offset)
        os.pread(file.fileno(), 10, 40 * MIB)
    before = cached_pages(raw)
    assert 100 < len(before) < 2000
    imgcore.convert(raw, folder / "a.vhdx", source_cache="drop", threads=2)
    after = cached_pages(raw)
    assert before <= after
    assert (len(after) - len(before)) * PAGE <= HEADERS_NBYTES


def test_what_was_cached_before_stays_in_place(raw: Path, folder: Path) -> None:
    target = folder / "a.raw"
    target.write_bytes(noise(len(DISK), seed=5))
    forget(target)
    with target.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(file.fileno(), 5 * MIB, 20 * MIB)
    before = cached_pages(target)
    imgcore.convert(raw, target, in_place=True, target_cache="drop")
    after = cached_pages(target)
    assert before <= after
    assert (len(after) - len(before)) * PAGE <= HEADERS_NBYTES
    assert target.read_bytes() == DISK


@pytest.mark.parametrize("sector_nbytes", [512, 4096])
@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")
def test_block_devices(raw: Path, tmp_path: Path, sector_nbytes: int) -> None:
    backing = tmp_path / "device"
    with backing.open("wb") as file:
        file.truncate(-(-len(DISK) // MIB) * MIB)
    with loop_device(backing, sector_nbytes=sector_nbytes) as device:
        imgcore.convert(
            raw, device, in_place=True, target_format="raw", target_cache="drop", threads=2
        )
        assert cached_nbytes(Path(device)) <= HEADERS_NBYTES
        imgcore.convert(device, tmp_path / "back.raw", source_cache="drop", format="raw")
        assert cached_nbytes(Path(device)) <= HEADERS_NBYTES
    assert (tmp_path / "back.raw").read_bytes()[: len(DISK)] == DISK


def test_a_parent(raw: Path, folder: Path) -> None:
    """All files that are read count, those that the target is compared with as well."""
    base = folder / "base.qcow2"
    imgcore.convert(raw, base)
    forget(base)
    imgcore.convert(
        raw, folder / "a.qcow2", backing=base, backing_format="qcow2", source_cache="drop"
    )
    assert cached_nbytes(base) <= HEADERS_NBYTES


def test_other_words(raw: Path, tmp_path: Path) -> None:
    for name in ("source_cache", "target_cache"):
        with pytest.raises(imgcore.OptionError, match=f"{name} is 'none', allowed: keep, drop"):
            imgcore.convert(raw, tmp_path / "a.raw", **{name: "none"})


@pytest.mark.parametrize("sync", ["sync", "datasync"])
def test_a_failure_to_write_back(
    sync: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports it once, to whoever waited for it: a sync says so too."""
    path = tmp_path / "a"
    with closing(TargetFile(open_file(str(path), os.O_RDWR | os.O_CREAT), str(path))) as file:
        file.use_cache(CacheMode.DROP)

        def failing(offset: int, length: int) -> None:
            assert (offset, length) == (0, 0)
            raise OSError(5, "I/O error")

        monkeypatch.setattr(file, "_note_written", failing)
        with pytest.raises(OSError, match="I/O error"):
            getattr(file, sync)()
