"""What conversions leave in the page cache, counted by fincore and mincore."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import io
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import vmdk
from tests.helpers.images import KIB, MIB, noise, text
from tests.helpers.mounts import loop_device, make_file_system, mounted

import imgcore
from imgcore.disk import batch_pieces, checkpoints
from imgcore.files import host_file, page_cache
from imgcore.files.descriptors import open_file
from imgcore.files.page_cache import CacheMode
from imgcore.files.target_file import TargetFile
from imgcore.formats.vmdk import streamed

MODES = ("drop", "direct")
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


# Sizes that are no multiples of a sector or a page, and blocks that no page begins.
ODD = noise(3 * MIB + 100) + bytes(512 * KIB + 1) + text(6 * MIB + 33) + noise(777)
ODD_TARGETS: dict[str, dict[str, Any]] = {
    "c.qcow2": {"options": {"cluster_size": "512"}},
    "d.qcow2": {"options": {"cluster_size": "2M", "compression_type": "zstd"}, "compress": True},
    "b.vhd": {"options": {"subformat": "dynamic"}},
    "b.vmdk": {"options": {"subformat": "monolithicSparse"}},
    "c.vmdk": {"options": {"subformat": "streamOptimized"}},
    "d.vmdk": {"options": {"subformat": "vmfs"}},
    "b.vhdx": {"options": {"subformat": "fixed"}},
    "b.vdi": {"options": {"subformat": "fixed"}},
    "b.raw": {"options": {"preallocation": "falloc"}},
    "c.raw": {"sparse": 0},
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TARGETS)
def test_targets(raw: Path, folder: Path, name: str, mode: str) -> None:
    target = folder / name
    result = imgcore.convert(
        raw, target, source_cache=mode, target_cache=mode, checksum="sha256", **TARGETS[name]
    )
    files = [path for path in folder.iterdir() if path.is_file() and path != raw]
    assert sum(map(cached_nbytes, files)) == 0
    assert cached_nbytes(raw) <= HEADERS_NBYTES
    # The bytes are the same.
    options = dict(TARGETS[name])
    imgcore.convert(raw, folder / f"kept-{name}", checksum="sha256", **options)
    again = imgcore.convert(raw, target, verify=True, force=True, target_cache=mode, **options)
    assert again.checksum == result.checksum
    assert cached_nbytes(target) == 0
    if name in ("a.raw", "a.qcow2", "b.qcow2", "a.raw.zst", "a.vdi"):
        length = min(target.stat().st_size, 4 * MIB)
        assert (
            target.read_bytes()[4096:length] == (folder / f"kept-{name}").read_bytes()[4096:length]
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["b.qcow2", "a.vdi", "a.vmdk", "a.raw.zst"])
def test_sources(raw: Path, folder: Path, name: str, mode: str) -> None:
    source = folder / name
    imgcore.convert(raw, source, **TARGETS[name])
    files = [path for path in folder.iterdir() if path.is_file() and path != raw]
    for path in files:
        forget(path)
    imgcore.convert(source, folder / "back.raw", source_cache=mode, threads=3)
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


@pytest.mark.parametrize("mode", MODES)
def test_what_was_cached_before_stays(raw: Path, folder: Path, mode: str) -> None:
    with raw.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(8 * MIB, 30 * MIB, 3 * MIB):
            os.pread(file.fileno(), 64 * KIB, offset)
        os.pread(file.fileno(), 10, 40 * MIB)
    before = cached_pages(raw)
    assert 100 < len(before) < 2000
    imgcore.convert(raw, folder / "a.vhdx", source_cache=mode, threads=2)
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sector_nbytes", [512, 4096])
@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")
def test_block_devices(raw: Path, tmp_path: Path, sector_nbytes: int, mode: str) -> None:
    backing = tmp_path / "device"
    with backing.open("wb") as file:
        file.truncate(-(-len(DISK) // MIB) * MIB)
    with loop_device(backing, sector_nbytes=sector_nbytes) as device:
        imgcore.convert(
            raw, device, in_place=True, target_format="raw", target_cache=mode, threads=2
        )
        assert cached_nbytes(Path(device)) <= HEADERS_NBYTES
        imgcore.convert(device, tmp_path / "back.raw", source_cache=mode, format="raw")
        assert cached_nbytes(Path(device)) <= HEADERS_NBYTES
    assert (tmp_path / "back.raw").read_bytes()[: len(DISK)] == DISK


@pytest.mark.parametrize("mode", MODES)
def test_a_parent(raw: Path, folder: Path, mode: str) -> None:
    """All files that are read count, those that the target is compared with as well."""
    base = folder / "base.qcow2"
    imgcore.convert(raw, base)
    forget(base)
    imgcore.convert(
        raw, folder / "a.qcow2", backing=base, backing_format="qcow2", source_cache=mode
    )
    assert cached_nbytes(base) <= HEADERS_NBYTES


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["a.raw", "a.qcow2", "a.vdi"])
def test_grains_that_come_late(
    folder: Path, name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed, "VMDK_MAX_SORTED_NBYTES", 8 * vmdk.GRAIN)
    grains = {number: noise(vmdk.GRAIN, seed=number) for number in reversed(range(400))}
    image = vmdk.stream(folder / "stream.vmdk", 400 * vmdk.GRAIN // vmdk.SECTOR, grains)
    imgcore.convert(
        io.BytesIO(image.read_bytes()),
        folder / name,
        format="vmdk",
        target_cache=mode,
        checksum="sha256",
    )
    assert cached_nbytes(folder / name) == 0


# -- direct requests -------------------------------------------------------------------


@pytest.fixture
def direct_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of files that were opened for direct requests, in order."""
    opened: list[str] = []

    def recording(path: str, flags: int, *arguments: Any, **keywords: Any) -> int:
        if flags & os.O_DIRECT:
            opened.append(os.readlink(path))
        return open_file(path, flags, *arguments, **keywords)

    monkeypatch.setattr(host_file, "open_file", recording)
    return opened


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_file_systems(kind: str, tmp_path: Path, direct_calls: list[str]) -> None:
    """Odd sizes and places: heads and tails of pages, short blocks, many threads."""
    image = make_file_system(kind, tmp_path / "image", 400 * MIB)
    with mounted(image, tmp_path / kind, "-o", "loop") as top:
        source = top / "disk.raw"
        source.write_bytes(ODD)
        forget(source)
        for name, keywords in {**TARGETS, **ODD_TARGETS}.items():
            target = top / name
            if name == "a.tar.gz":
                continue  # is not read as an image
            n_files = 1 + (name != "a.raw.zst")
            for threads in (1, 3):
                del direct_calls[:]
                result = imgcore.convert(
                    source,
                    target,
                    source_cache="direct",
                    target_cache="direct",
                    force=True,
                    verify=True,
                    threads=threads,
                    reflink=False,
                    **keywords,
                )
                assert result.checksum == imgcore.checksum(target)
                # The target is read back past the page cache, too.
                assert len(direct_calls) > n_files
            assert cached_nbytes(source) <= HEADERS_NBYTES
            imgcore.convert(
                target,
                top / "back.raw",
                source_cache="direct",
                target_cache="direct",
                force=True,
            )
            back = (top / "back.raw").read_bytes()
            assert back[: len(ODD)] == ODD
            assert not any(back[len(ODD) :])
            target.unlink()


def test_the_bytes_are_the_same(raw: Path, folder: Path) -> None:
    for name, keywords in {
        "a.raw": {},
        "a.qcow2": {"options": {"cluster_size": "512"}},
        "b.qcow2": {"compress": True},
        "a.vhd": {"options": {"subformat": "dynamic"}},
        "a.vmdk": {"options": {"cid": "12345678"}},
    }.items():
        outputs = []
        for mode in ("keep", "direct"):
            target = folder / mode / name
            target.parent.mkdir(exist_ok=True)
            keywords = {**keywords, "source_cache": mode, "target_cache": mode}
            imgcore.convert(raw, target, **keywords)
            content = target.read_bytes()
            if name == "a.vhd":  # with a UUID and a time in header and footer
                content = content[2048:-512]
            outputs.append(content)
            target.unlink()
        assert outputs[0] == outputs[1], name


def test_chains_and_several_sources(raw: Path, folder: Path) -> None:
    """The files of a chain, split extents, and disks that follow each other."""
    base, child, split = folder / "base.qcow2", folder / "child.qcow2", folder / "s.vmdk"
    imgcore.convert(raw, base)
    changed = folder / "changed.raw"
    changed.write_bytes(DISK[: 20 * MIB] + noise(3 * MIB + 512, seed=8) + DISK[23 * MIB + 512 :])
    imgcore.convert(changed, child, backing=base, backing_format="qcow2")
    imgcore.convert(raw, split, options={"subformat": "monolithicFlat"})
    for path in folder.iterdir():
        if path.is_file():
            forget(path)
    both = folder / "both.raw"
    imgcore.convert([child, split], both, source_cache="direct", target_cache="direct", threads=3)
    files = [path for path in folder.iterdir() if path.is_file()]
    assert sum(map(cached_nbytes, files)) <= 2 * HEADERS_NBYTES
    size = imgcore.info(base)["virtual-size"]
    content = both.read_bytes()
    assert content[: len(DISK)] == changed.read_bytes()
    assert content[size : size + len(DISK)] == DISK


@pytest.mark.parametrize("name", ["a.qcow2", "a.vhdx"])
@pytest.mark.parametrize("sector_nbytes", [512, 4096])
@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")
def test_images_on_block_devices(raw: Path, tmp_path: Path, sector_nbytes: int, name: str) -> None:
    backing = tmp_path / "device"
    backing.write_bytes(noise(len(DISK) + 20 * MIB, seed=3)[: (len(DISK) // MIB + 20) * MIB])
    target_format = name.partition(".")[2]
    with loop_device(backing, sector_nbytes=sector_nbytes) as device:
        imgcore.convert(
            raw,
            device,
            in_place=True,
            target_format=target_format,
            source_cache="direct",
            target_cache="direct",
            verify=True,
            threads=3,
        )
        assert cached_nbytes(Path(device)) <= HEADERS_NBYTES
        imgcore.convert(device, tmp_path / "back.raw", source_cache="direct", format=target_format)
        assert cached_nbytes(Path(device)) <= 2 * HEADERS_NBYTES
    assert (tmp_path / "back.raw").read_bytes()[: len(DISK)] == DISK


def test_going_on_directly(raw: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that goes on has the same bytes, whichever way each part went."""
    monkeypatch.setattr(checkpoints, "_DUE_NBYTES", 0)
    for name in ("_MIN_NBYTES", "_MAX_NBYTES"):
        monkeypatch.setattr(batch_pieces, name, 8 * MIB)
    expected = folder / "expected.qcow2"
    imgcore.convert(raw, expected)
    modes = iter(["direct", "keep", "direct", "drop", "direct", "auto", *["direct"] * 20])
    target = folder / "a.qcow2"
    first: int | None = None
    n_breaks = 0

    def stop(state: imgcore.Progress) -> None:
        nonlocal first
        first = state.done if first is None else first
        if state.done - first >= 12 * MIB:
            raise InterruptedError

    while not target.exists():
        mode, first = next(modes), None
        try:
            imgcore.convert(
                raw,
                target,
                resume="verify",
                source_cache=mode,
                target_cache=mode,
                progress=stop,
                threads=1,
                rate="200M",
            )
        except InterruptedError:
            n_breaks += 1
    assert n_breaks > 0
    assert target.read_bytes() == expected.read_bytes()


def test_a_source_by_its_descriptor(raw: Path, folder: Path, direct_calls: list[str]) -> None:
    """The caller's open file keeps its flags."""
    with raw.open("rb") as file:
        source = f"/proc/self/fd/{file.fileno()}"
        before = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
        imgcore.convert(source, folder / "a.qcow2", format="raw", source_cache="direct")
        assert fcntl.fcntl(file.fileno(), fcntl.F_GETFL) == before
    assert direct_calls == [str(raw)]


@pytest.mark.parametrize("mode", ["direct", "auto"])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES])
def test_file_systems_that_refuse(
    mode: str,
    code: int,
    raw: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are dropped from the page cache then; one warning for each side says so."""

    def refusing(path: str, flags: int, *arguments: Any, **keywords: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code), path)
        return open_file(path, flags, *arguments, **keywords)

    monkeypatch.setattr(host_file, "open_file", refusing)
    monkeypatch.setattr(page_cache, "free_memory_nbytes", lambda: 0)
    target = folder / "a.vmdk"
    imgcore.convert(
        [raw, raw],
        target,
        options={"subformat": "vmfs"},
        source_cache=mode,
        target_cache=mode,
    )
    files = [path for path in folder.iterdir() if path.is_file()]
    assert len(files) == 3
    assert sum(map(cached_nbytes, files)) <= HEADERS_NBYTES
    text = f"no direct requests are possible ({os.strerror(code)})"
    warnings = [message for message in caplog.messages if "direct" in message]
    assert len(warnings) == (0 if mode == "auto" else 2)
    assert all(text in message for message in warnings)


def test_files_in_memory_have_no_cache(
    tmp_path: Path, direct_calls: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for kind in ("tmpfs", "ramfs"):
        with mounted("none", tmp_path / kind, "-t", kind) as top:
            (top / "disk.raw").write_bytes(ODD)
            imgcore.convert(
                top / "disk.raw", top / "a.vdi", source_cache="direct", target_cache="direct"
            )
            assert imgcore.compare(top / "disk.raw", top / "a.vdi").identical
    assert not direct_calls
    assert not [message for message in caplog.messages if "direct" in message]


def test_auto(
    raw: Path,
    folder: Path,
    direct_calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A job that is small for the memory keeps its files there; others do not."""
    target = folder / "a.qcow2"

    def convert() -> None:
        del direct_calls[:]
        imgcore.convert(raw, target, source_cache="auto", target_cache="auto", force=True)

    monkeypatch.setattr(page_cache, "free_memory_nbytes", lambda: 32 * len(DISK))
    convert()
    assert not direct_calls
    assert cached_nbytes(target) > target.stat().st_size // 2
    monkeypatch.setattr(page_cache, "free_memory_nbytes", lambda: 8 * len(DISK))
    # The source is in memory already: it is read from there, and stays.
    convert()
    assert len(direct_calls) == 1
    assert cached_nbytes(raw) > len(DISK) // 2
    forget(raw)
    convert()
    assert len(direct_calls) == 2
    assert cached_nbytes(raw) <= HEADERS_NBYTES
    assert cached_nbytes(target) == 0


@pytest.mark.parametrize(
    ("magic", "mode"),
    [
        (0xEF53, CacheMode.DIRECT),
        (0x58465342, CacheMode.DIRECT),
        (0x9123683E, CacheMode.DIRECT),
        (0x01021994, CacheMode.KEEP),
        (0x858458F6, CacheMode.KEEP),
        (0x6969, CacheMode.DROP),  # NFS
        (None, CacheMode.DROP),
    ],
)
def test_auto_by_file_system(
    magic: int | None, mode: CacheMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_cache, "free_memory_nbytes", lambda: 16 * 10 * MIB)
    for stated in (CacheMode.DROP, CacheMode.DIRECT):
        expected = CacheMode.KEEP if mode is CacheMode.KEEP else stated
        assert stated.for_file(magic, 0) is expected
    assert CacheMode.AUTO.for_file(magic, 10 * MIB) is mode
    assert CacheMode.AUTO.for_file(magic, 10 * MIB - 1) is CacheMode.KEEP


def test_free_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert 16 * MIB < page_cache.free_memory_nbytes() < 1 << 50
    # A system that does not say what is free has little.
    for content in ("", "MemAvailable:\n", "MemAvailable: many kB\n"):
        (tmp_path / "meminfo").write_text(content)
        monkeypatch.setattr(page_cache, "_MEMINFO", str(tmp_path / "meminfo"))
        assert page_cache.free_memory_nbytes() == 0
    monkeypatch.setattr(page_cache, "_MEMINFO", str(tmp_path / "absent"))
    assert page_cache.free_memory_nbytes() == 0


def open_names() -> list[str]:
    """Return the names of this process' open files."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return names


def test_children_do_not_keep_a_target_open(folder: Path) -> None:
    path = folder / "a"
    with closing(TargetFile(open_file(str(path), os.O_RDWR | os.O_CREAT), str(path))) as file:
        assert file.use_cache(CacheMode.DIRECT)
        assert open_names().count(str(path)) == 2
        child = os.fork()
        if child == 0:
            os._exit(str(path) in open_names())
        assert os.waitpid(child, 0)[1] == 0
    assert str(path) not in open_names()


def test_other_words(raw: Path, tmp_path: Path) -> None:
    for name in ("source_cache", "target_cache"):
        with pytest.raises(
            imgcore.OptionError, match=f"{name} is 'none', allowed: keep, drop, direct, auto"
        ):
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
