"""Bad input through the command: one line, exit 1, no target, the source unchanged."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from imgcore import open as open_image
from tests.helpers import images, qemu
from tests.helpers.command import assert_one_line_error, imgcore
from tests.helpers.images import RawImage

RawImages = Callable[[RawImage], Path]

TARGETS = ("out.raw", "out.qcow2", "out.vmdk")


def poke(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def be32(value: int) -> bytes:
    return struct.pack(">I", value)


def be64(value: int) -> bytes:
    return struct.pack(">Q", value)


def le64(value: int) -> bytes:
    return struct.pack("<Q", value)


def le32(value: int) -> bytes:
    return struct.pack("<I", value)


@pytest.fixture(scope="module")
def good(raw_images: RawImages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with one good image of each kind, written by qemu-img."""
    folder = tmp_path_factory.mktemp("good")
    raw = raw_images(images.DENSE)
    for variant in qemu.VARIANTS[1:]:
        qemu.convert(raw, folder / f"{variant.name}{variant.suffix}", variant)
    return folder


def assert_refused(
    source: Path,
    folder: Path,
    *options: str,
    words: tuple[str, ...] = (),
    targets: tuple[str, ...] = TARGETS,
) -> None:
    """Convert to every kind of target; each must fail cleanly."""
    before = images.sha256(source)
    files = sorted(folder.iterdir())
    for name in targets:
        done = imgcore("convert", *options, source, folder / name)
        assert_one_line_error(done, *words)
        assert sorted(folder.iterdir()) == files, name
    assert images.sha256(source) == before


# Offset and bytes to write into a good image, and a word that the message must contain.
QCOW2_POKES = {
    "version-4": (4, be32(4), "version"),
    "cluster-bits-8": (20, be32(8), "cluster"),
    "cluster-bits-22": (20, be32(22), "cluster"),
    "cluster-bits-huge": (20, be32(0xFFFFFFFF), "cluster"),
    "size-huge": (24, be64(1 << 63), ""),
    "size-beyond-l1": (24, be64(1 << 45), "L1"),
    "encrypted": (32, be32(1), "encrypt"),
    "l1-size-huge": (36, be32(0x7FFFFFFF), "L1"),
    "l1-offset-unaligned": (40, be64(0x10001), "L1"),
    "l1-offset-outside": (40, be64(1 << 40), "L1"),
    "l1-offset-wraps": (40, be64((1 << 64) - (1 << 16)), "L1"),
    "unknown-incompatible-feature": (72, be64(1 << 40), "feature"),
    "external-data-file": (72, be64(1 << 2), "data file"),
    "header-length-huge": (100, be32(0xFFFFFFF0), "header"),
    "backing-name-too-long": (16, be32(5000), "backing"),
}


@pytest.mark.parametrize("case", QCOW2_POKES)
def test_inconsistent_qcow2(case: str, good: Path, tmp_path: Path) -> None:
    offset, data, word = QCOW2_POKES[case]
    source = tmp_path / "bad.qcow2"
    shutil.copyfile(good / "qcow2.qcow2", source)
    poke(source, offset, data)
    if case == "backing-name-too-long":
        poke(source, 8, be64(512))
    assert_refused(source, tmp_path, words=("bad.qcow2", word), targets=TARGETS[:1])


def test_qcow2_marked_corrupt_is_read_with_a_warning(good: Path, tmp_path: Path) -> None:
    """The specification forbids writing to such an image, not reading it."""
    source = tmp_path / "bad.qcow2"
    shutil.copyfile(good / "qcow2.qcow2", source)
    poke(source, 72, be64(1 << 1))
    done = imgcore("convert", source, tmp_path / "out.raw")
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "corrupt" in done.stderr


def test_qcow2_l2_entry_outside_the_file(good: Path, tmp_path: Path) -> None:
    source = tmp_path / "bad.qcow2"
    shutil.copyfile(good / "qcow2.qcow2", source)
    data = source.read_bytes()
    l1_offset = struct.unpack(">Q", data[40:48])[0]
    l2_offset = struct.unpack(">Q", data[l1_offset : l1_offset + 8])[0] & 0x00FFFFFFFFFFFE00
    poke(source, l2_offset + 8, be64((1 << 63) | (1 << 40)))
    assert_refused(source, tmp_path, words=("bad.qcow2",))
    poke(source, l1_offset, be64((1 << 63) | (1 << 40)))
    assert_refused(source, tmp_path, words=("bad.qcow2",))


VMDK_POKES = {
    "version-9": (4, le32(9), "version"),
    "capacity-huge": (12, le64(1 << 62), ""),
    "grain-zero": (20, le64(0), "grain"),
    "grain-not-a-power": (20, le64(100), "grain"),
    "grain-huge": (20, le64(1 << 40), "grain"),
    "descriptor-outside": (28, le64(1 << 40), "descriptor"),
    "descriptor-huge": (36, le64(1 << 40), "descriptor"),
    "gtes-zero": (44, le32(0), ""),
    "gtes-huge": (44, le32(1 << 31), ""),
    "directory-outside": (56, le64(1 << 40), ""),
    "compression-unknown": (77, b"\x07\x00", "compress"),
}


@pytest.mark.parametrize("case", VMDK_POKES)
def test_inconsistent_vmdk(case: str, good: Path, tmp_path: Path) -> None:
    offset, data, word = VMDK_POKES[case]
    source = tmp_path / "bad.vmdk"
    kind = "streamOptimized" if case == "compression-unknown" else "monolithicSparse"
    shutil.copyfile(good / f"vmdk-{kind}.vmdk", source)
    poke(source, offset, data)
    if case == "directory-outside":
        poke(source, 48, data)
    assert_refused(source, tmp_path, words=("bad.vmdk", word), targets=TARGETS[:1])


@pytest.mark.parametrize(
    "name",
    [v.name + v.suffix for v in qemu.VARIANTS[1:] if v is not qemu.VMDK_FLAT],
)
@pytest.mark.parametrize("share", [0.001, 0.03, 0.5, 0.97])
def test_truncated(name: str, share: float, good: Path, tmp_path: Path) -> None:
    source = tmp_path / name
    shutil.copyfile(good / name, source)
    nbytes = _guest_data_end(source) if source.suffix == ".vhdx" else source.stat().st_size
    os.truncate(source, int(nbytes * share) // 512 * 512 + 100)
    assert_refused(source, tmp_path, words=(name,))


def _guest_data_end(path: Path) -> int:
    """Return the offset in a VHDX file at which the guest's last byte ends."""
    with open_image(path, format="vhdx") as image:
        return max(int((b["host_offset"] + b["host_length"]).max()) for b in image.extents())


@pytest.mark.parametrize("name", [v.name + v.suffix for v in qemu.VARIANTS if v.format == "vhdx"])
def test_cut_behind_the_disks_end(name: str, good: Path, tmp_path: Path) -> None:
    """A VHDX block extends past the disk; qemu-img omits that part of fixed disks."""
    source, target = tmp_path / name, tmp_path / "out.raw"
    shutil.copyfile(good / name, source)
    end = _guest_data_end(source)
    assert end < source.stat().st_size
    os.truncate(source, end)
    done = imgcore("convert", source, target)
    assert done.returncode == 0, done.stderr
    qemu.assert_same(good / name, target, source_format="vhdx", target_format="raw")


def test_truncated_flat_extent(good: Path, tmp_path: Path) -> None:
    for path in good.glob("vmdk-monolithicFlat*"):
        shutil.copyfile(path, tmp_path / path.name)
    os.truncate(tmp_path / "vmdk-monolithicFlat-flat.vmdk", 1 << 20)
    assert_refused(tmp_path / "vmdk-monolithicFlat.vmdk", tmp_path)
    (tmp_path / "vmdk-monolithicFlat-flat.vmdk").unlink()
    assert_refused(tmp_path / "vmdk-monolithicFlat.vmdk", tmp_path)


@pytest.mark.parametrize(
    "name", ["qcow2-zlib.qcow2", "qcow2-zstd.qcow2", "vmdk-streamOptimized.vmdk"]
)
def test_damaged_compressed_data(name: str, good: Path, tmp_path: Path) -> None:
    """Some bytes are replaced every half MiB, so that compressed data is damaged."""
    source = tmp_path / name
    shutil.copyfile(good / name, source)
    start = 400_000
    for offset in range(start, source.stat().st_size - 70_000, 1 << 19):
        poke(source, offset, images.noise(3000, offset))
    assert_refused(source, tmp_path, words=(name,))


def test_looping_backing_chain(tmp_path: Path) -> None:
    a, b = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    qemu.run("create", "-f", "qcow2", a, "1M")
    qemu.run("create", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", b, "1M")
    qemu.run("rebase", "-u", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", a)
    assert_refused(b, tmp_path, words=("b.qcow2",))


def test_backing_file_outside_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret.raw").write_bytes(images.text(1 << 20))
    inner = tmp_path / "inner"
    inner.mkdir()
    for name in ("../secret.raw", str(tmp_path / "secret.raw"), "json:{}", "nbd://localhost/x"):
        top = inner / "top.qcow2"
        qemu.run("create", "-f", "qcow2", "-u", "-b", name, "-F", "raw", top, "1M")
        assert_refused(top, inner, targets=TARGETS[:1])
        top.unlink()
    (inner / "link.raw").symlink_to("../secret.raw")
    qemu.run(
        "create", "-f", "qcow2", "-u", "-b", "link.raw", "-F", "raw", inner / "top.qcow2", "1M"
    )
    assert_refused(inner / "top.qcow2", inner)


def test_backing_file_that_is_missing(tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    qemu.run("create", "-f", "qcow2", "-u", "-b", "gone.raw", "-F", "raw", top, "1M")
    assert_refused(top, tmp_path, words=("gone.raw",))


def test_vmdk_delta_on_a_changed_parent(tmp_path: Path) -> None:
    """A delta is read only with the parent that it was created from."""
    base, top, out = tmp_path / "base.vmdk", tmp_path / "top.vmdk", tmp_path / "out.raw"
    qemu.convert(_small_raw(tmp_path), base, qemu.VMDK_SPARSE)
    qemu.run("create", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", top)
    assert imgcore("convert", top, out).returncode == 0
    qemu.assert_same(top, out, source_format="vmdk", target_format="raw")
    # qemu-img omits leading zeros.
    digits = re.search(rb"\nCID=([0-9a-f]+)\n", base.read_bytes())
    assert digits is not None
    other = int(digits[1], 16) ^ 1
    poke(base, digits.start(1), f"{other:0{len(digits[1])}x}".encode())
    assert_refused(top, tmp_path, words=("top.vmdk", f"{other:08x}"), targets=("new.raw",))


def _small_raw(folder: Path) -> Path:
    path = folder / "small.raw"
    path.write_bytes(images.text(1 << 20))
    return path


def test_unknown_content(tmp_path: Path) -> None:
    source = tmp_path / "data.xyz"
    source.write_bytes(images.text(1 << 20))
    assert_refused(source, tmp_path, words=("data.xyz", "-f"))


def test_raw_suffix_over_another_format(good: Path, tmp_path: Path) -> None:
    """A .raw file with a magic is rejected; -f raw reads it."""
    source = tmp_path / "disk.raw"
    shutil.copyfile(good / "qcow2.qcow2", source)
    assert_refused(source, tmp_path, words=("disk.raw", "-f"))
    done = imgcore("convert", "-f", "raw", source, tmp_path / "copy.img")
    assert done.returncode == 0, done.stderr
    assert images.sha256(tmp_path / "copy.img") == images.sha256(source)


@pytest.mark.parametrize("name", ["qcow2.qcow2", "vmdk-streamOptimized.vmdk"])
def test_wrong_format_given(name: str, good: Path, tmp_path: Path) -> None:
    source = tmp_path / name
    shutil.copyfile(good / name, source)
    wrong = "vmdk" if name.endswith("qcow2") else "qcow2"
    assert_refused(source, tmp_path, "-f", wrong, words=(name,))


@pytest.mark.parametrize("make", ["missing", "folder", "socket", "empty"])
def test_source_that_is_no_image(make: str, tmp_path: Path) -> None:
    source = tmp_path / "source.qcow2"
    if make == "folder":
        source.mkdir()
    elif make == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(os.fspath(source))
    elif make == "empty":
        source.touch()
    for name in TARGETS:
        assert_one_line_error(imgcore("convert", source, tmp_path / name), "source.qcow2")
        assert not (tmp_path / name).exists()


@pytest.fixture
def source(good: Path, tmp_path: Path) -> Path:
    path = tmp_path / "source.qcow2"
    shutil.copyfile(good / "qcow2.qcow2", path)
    return path


def test_target_folder_missing(source: Path, tmp_path: Path) -> None:
    done = imgcore("convert", source, tmp_path / "no" / "out.raw")
    assert_one_line_error(done, str(tmp_path / "no"))


@contextmanager
def mounted_tmpfs(folder: Path, options: str) -> Iterator[None]:
    """Mount a small file system, or skip the test if that is not allowed."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("mount is not installed")
    if done.returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of 2 MiB."""
    with mounted_tmpfs(tmp_path / "small", "size=2m"):
        yield tmp_path / "small"


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Iterator[Path]:
    """Give a read-only mount: unlike file modes, it applies to root as well."""
    folder = tmp_path / "locked"
    if os.geteuid() != 0:
        folder.mkdir(mode=0o555)
        yield folder
    else:
        with mounted_tmpfs(folder, "ro"):
            yield folder


def test_target_folder_read_only(source: Path, read_only_folder: Path) -> None:
    for name in TARGETS:
        done = imgcore("convert", source, read_only_folder / name)
        assert_one_line_error(done, str(read_only_folder))
    assert not list(read_only_folder.iterdir())


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("options", [(), ("-c",)], ids=["plain", "compressed"])
def test_target_disk_full(
    name: str, options: tuple[str, ...], source: Path, small_disk: Path
) -> None:
    if options and not name.endswith("qcow2"):
        pytest.skip("-c is for QCOW2")
    before = images.sha256(source)
    old = small_disk / name
    old.write_bytes(b"old content")
    done = imgcore("convert", "--force", *options, source, old)
    assert_one_line_error(done, name, "space")
    assert [path.name for path in small_disk.iterdir()] == [name]
    assert old.read_bytes() == b"old content"
    assert images.sha256(source) == before


@pytest.mark.parametrize("way", ["path", "dotted", "symlink", "hardlink", "extent", "backing"])
@pytest.mark.parametrize("force", [(), ("--force",)], ids=["plain", "force"])
def test_source_equals_target(way: str, force: tuple[str, ...], good: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.qcow2"
    shutil.copyfile(good / "qcow2.qcow2", source)
    touched, target = source, source
    if way == "dotted":
        (tmp_path / "x").mkdir()
        target = tmp_path / "x" / ".." / "source.qcow2"
    elif way == "symlink":
        target = tmp_path / "link.qcow2"
        target.symlink_to("source.qcow2")
    elif way == "hardlink":
        target = tmp_path / "hard.qcow2"
        target.hardlink_to(source)
    elif way == "extent":
        for path in good.glob("vmdk-monolithicFlat*"):
            shutil.copyfile(path, tmp_path / path.name)
        source = tmp_path / "vmdk-monolithicFlat.vmdk"
        touched = target = tmp_path / "vmdk-monolithicFlat-flat.vmdk"
    elif way == "backing":
        source = tmp_path / "top.qcow2"
        qemu.run("create", "-f", "qcow2", "-b", "source.qcow2", "-F", "qcow2", source)
    before = images.sha256(touched), images.sha256(source)
    names = sorted(path.name for path in tmp_path.iterdir())
    done = imgcore("convert", *force, "-O", "qcow2", source, target)
    if way == "symlink" and force:
        # --force replaces the link itself, so the source is unchanged either way.
        assert done.returncode in (0, 1), done.stderr
    else:
        assert_one_line_error(done)
    assert (images.sha256(touched), images.sha256(source)) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_existing_target_needs_force(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.raw"
    target.write_bytes(b"precious")
    assert_one_line_error(imgcore("convert", source, target), "out.raw", "--force")
    assert target.read_bytes() == b"precious"
    assert imgcore("convert", "--force", source, target).returncode == 0
    assert target.stat().st_size == images.DENSE.virtual_size


@pytest.mark.parametrize(
    "arguments",
    [
        ("convert",),
        ("convert", "--no-such-flag", "a", "b"),
        ("no-such-verb",),
        ("convert", "-m", "none", "a", "b"),
    ],
    ids=" ".join,
)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...]) -> None:
    done = imgcore(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ("-O", "qed"),
        ("-O", "nonsense"),
        ("-o", "nonsense=1"),
        ("-o", "cluster_size=1000"),
        ("-o", "cluster_size=4M"),
        ("-o", "compression_type=lzma"),
    ],
    ids=" ".join,
)
def test_bad_options(options: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = imgcore("convert", *options, source, tmp_path / "out.qcow2")
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_within_a_second(number: int, code: int, tmp_path: Path) -> None:
    """A long job that is stopped in the middle."""
    source = tmp_path / "noise.raw"
    chunk = images.text(8 << 20)
    with open(source, "wb") as file:
        for _ in range(48):
            file.write(chunk)
    target = tmp_path / "out.vmdk"
    command = [sys.executable, "-m", "imgcore", "convert", "-m", "1", "-o"]
    command += ["subformat=streamOptimized,level=best", "--progress=json", str(source), str(target)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        deadline = time.monotonic() + 20
        while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert job.poll() is None, "the job was over before the signal"
        job.send_signal(number)
        sent = time.monotonic()
        _, errors = job.communicate(timeout=10)
        assert time.monotonic() - sent < 1.0
        assert job.returncode == code, errors
    assert "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["noise.raw"]


def test_a_killed_job_leaves_no_target_and_can_be_repeated(tmp_path: Path) -> None:
    source = tmp_path / "text.raw"
    chunk = images.text(8 << 20)
    with open(source, "wb") as file:
        for _ in range(16):
            file.write(chunk)
    target = tmp_path / "out.vmdk"
    words = ["-o", "subformat=streamOptimized,level=best", str(source), str(target)]
    with subprocess.Popen([sys.executable, "-m", "imgcore", "convert", "-q", *words]) as job:
        while len(list(tmp_path.iterdir())) < 2 and job.poll() is None:
            time.sleep(0.01)
        job.kill()
    assert not target.exists()
    again = imgcore(
        "convert", "-q", "-o", "subformat=streamOptimized,level=fastest", source, target
    )
    assert again.returncode == 0, again.stderr
    qemu.assert_same(source, target, source_format="raw", target_format="vmdk")


@pytest.mark.parametrize("verb", ["info", "map", "check", "compare", "measure"])
def test_other_verbs_refuse_in_one_line(verb: str, good: Path, tmp_path: Path) -> None:
    source = tmp_path / "bad.qcow2"
    shutil.copyfile(good / "qcow2.qcow2", source)
    poke(source, 36, be32(0x7FFFFFFF))
    arguments: list[str | Path] = [verb, source]
    if verb == "compare":
        arguments.append(good / "qcow2.qcow2")
    if verb == "measure":
        arguments[1:1] = ["-O", "qcow2"]
    # As with qemu-img, 1 means "different" to compare.
    assert_one_line_error(imgcore(*arguments), "bad.qcow2", code=2 if verb == "compare" else 1)


def test_compare_tells_the_first_difference(good: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.raw"
    qemu.run("convert", "-f", "qcow2", "-O", "raw", good / "qcow2.qcow2", other)
    assert imgcore("compare", good / "qcow2.qcow2", other).returncode == 0
    poke(other, 3_000_000, b"\xff\xfe\xfd\xfc")
    done = imgcore("compare", "--output=json", good / "qcow2.qcow2", other)
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert answer["identical"] is False
    assert answer["first_difference"] // 512 == 3_000_000 // 512
