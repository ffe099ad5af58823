"""Conversions by reflinks that read no data: ``--reflink=always`` and ``strict``.

The content must be that of qemu-img, and so must what it finds in the tables.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import imgcore
from tests.helpers import images, qcow2, qemu
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as imgcore_command
from tests.helpers.images import KIB, MIB
from tests.helpers.mounts import make_file_system, mounted
from tests.helpers.qemu import Variant
from tests.helpers.reflinks import DISK, PLAIN, SHARABLE_NBYTES, convert, make_source

each_source = pytest.mark.parametrize("source", PLAIN, ids=lambda v: f"from-{v.name}")
each_target = pytest.mark.parametrize("target", PLAIN, ids=lambda v: f"to-{v.name}")


def convert_always(source: Path, target: Path, variant: Variant) -> imgcore.ConvertResult:
    """Convert, and compare the result with what was measured before."""
    source_format = {".raw": "raw", ".vhd": "vhd"}.get(source.suffix)
    measured = imgcore.measure_reflink(
        source, variant.format, format=source_format, options=list(variant.options)
    )
    result = convert(source, target, variant, format=source_format, reflink="always")
    assert result.bytes_shared == measured.reflinked
    return result


def assert_sound(raw: Path, source: Path, target: Path, variant: Variant) -> None:
    """Fail unless the target has the disk, and tables without fault."""
    # First of all: once a hole has been read, XFS may take it for data until a sync.
    if variant is not qemu.RAW:
        assert imgcore.check(str(target), format=variant.format).ok
    qemu.assert_same(raw, target, source_format="raw", target_format=variant.format)
    assert imgcore.compare(
        source, target, format_a={".raw": "raw"}.get(source.suffix), format_b=variant.format
    ).identical
    if variant.format in ("qcow2", "vdi", "vhdx"):
        qemu.assert_check_clean(target, variant.format)


@each_source
@each_target
def test_every_pair(source: Variant, target: Variant, here: Path) -> None:
    raw, path = make_source(here, source)
    out = here / f"out{target.suffix}"
    result = convert_always(path, out, target)
    # A clone may move the blocks that are in the way of the new headers.
    assert result.bytes_read <= 2 * MIB
    assert result.bytes_shared >= SHARABLE_NBYTES - 2 * MIB
    assert_sound(raw, path, out, target)


@each_source
@each_target
def test_every_pair_from_qemu(source: Variant, target: Variant, here: Path) -> None:
    raw = here / "disk.raw"
    DISK.write(raw)
    path = here / f"source{source.suffix}"
    if source is not qemu.RAW:
        qemu.convert(raw, path, source)
        # qemu-img rounds the size of some disks up.
        imgcore.convert(path, raw, format=source.format, force=True, sync=False)
    out = here / f"out{target.suffix}"
    convert_always(raw if source is qemu.RAW else path, out, target)
    qemu.assert_same(raw, out, source_format="raw", target_format=target.format)


class Pair(NamedTuple):
    """A conversion range by range, or of the whole file at once."""

    source: Variant
    target: Variant


BY_RANGES = Pair(qemu.QCOW2, qemu.RAW)
AT_ONCE = Pair(qemu.VHDX_DYNAMIC, qemu.QCOW2)
each_way = pytest.mark.parametrize("pair", [BY_RANGES, AT_ONCE], ids=["ranges", "at-once"])


def many_blocks(folder: Path) -> Path:
    """Write a raw disk of which every fourth MiB has data, 32 MiB in all."""
    raw = folder / "disk.raw"
    with open(raw, "wb") as file:
        file.truncate(128 * MIB)
        for index in range(32):
            file.seek(4 * index * MIB)
            file.write(images.noise(MIB, index))
    return raw


def image_of(raw: Path, variant: Variant) -> Path:
    path = raw.with_name(f"source{variant.suffix}")
    imgcore.convert(raw, path, format="raw", target_format=variant.format, reflink=False)
    return path


class Calls(NamedTuple):
    """What a conversion asks of the system, by strace."""

    read_nbytes: int
    n_clones: int
    holes_after_sync: bool


def calls_of(source: Path, target: Path) -> Calls:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed (Debian: strace)")
    log = target.with_name("strace.log")
    program = [sys.executable, "-m", "imgcore"]
    words = ["convert", "-q", "--no-sync", "--reflink=always", str(source), str(target)]
    traced = "read,pread64,preadv,preadv2,copy_file_range,ioctl,mmap,fdatasync,lseek"
    command = [strace, "-f", "-y", "-qq", "-e", f"trace={traced}", "-o", str(log)]
    done = subprocess.run([*command, *program, *words], capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr:
        pytest.skip(f"strace cannot run here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    lines = [line for line in log.read_text().splitlines() if str(source) in line]
    assert not any("mmap(" in line or "copy_file_range(" in line for line in lines)
    reads = [re.search(r"read\w*\(.*= (\d+)$", line) for line in lines]
    log.unlink()
    before_holes = "\n".join(lines).partition("SEEK_DATA")[0]
    return Calls(
        sum(int(found[1]) for found in reads if found),
        sum("FICLONE" in line for line in lines),
        "fdatasync(" in before_holes,
    )


def test_a_clone_takes_one_call_and_reads_tables_only(here: Path) -> None:
    source = image_of(many_blocks(here), qemu.VHDX_DYNAMIC)
    calls = calls_of(source, here / "out.qcow2")
    # The first call asks whether the file system has reflinks.
    assert calls.n_clones == 2
    assert 0 < calls.read_nbytes < MIB


def test_ranges_take_a_call_each_and_tables_only_are_read(here: Path) -> None:
    source = image_of(many_blocks(here), qemu.QCOW2)
    calls = calls_of(source, here / "out.raw")
    assert calls.n_clones == 1 + 32
    assert 0 < calls.read_nbytes < MIB


@each_way
def test_neither_sees_what_is_written_to_the_other(pair: Pair, here: Path) -> None:
    raw = many_blocks(here)
    source, target = image_of(raw, pair.source), here / f"out{pair.target.suffix}"
    assert convert_always(source, target, pair.target).bytes_shared >= 32 * MIB
    qcow2.qemu_io(source, "write -P 33 4M 1M")
    qemu.assert_same(raw, target, source_format="raw", target_format=pair.target.format)
    after = here / "after.raw"
    imgcore.convert(source, after, format=pair.source.format)
    qcow2.qemu_io(target, "write -P 34 8M 1M")
    qemu.assert_same(after, source, source_format="raw", target_format=pair.source.format)


@each_way
def test_nothing_else_of_the_source_is_in_the_target(pair: Pair, here: Path) -> None:
    """A snapshot's clusters, which the disk no longer has, are freed."""
    source = image_of(many_blocks(here), qemu.QCOW2)
    secret = b"secret" * 8
    place = 4 * 20 * MIB
    text = here / "secret"
    text.write_bytes((secret * 2000)[: 64 * KIB])
    qcow2.qemu_io(source, f"write -s {text} {place} 64k")
    qemu.run("snapshot", "-c", "before", source)
    qcow2.qemu_io(source, f"write -z {place} 64k")
    assert secret in source.read_bytes()
    target = here / f"out{pair.target.suffix}"
    result = convert_always(source, target, pair.target)
    assert result.bytes_shared >= 31 * MIB
    assert secret not in target.read_bytes()


def test_the_clone_is_no_larger_than_what_it_needs(here: Path) -> None:
    source = image_of(many_blocks(here), qemu.VHDX_DYNAMIC)
    target = here / "out.qcow2"
    convert_always(source, target, qemu.QCOW2)
    assert qemu.disk_nbytes(target) <= 33 * MIB


def test_places_that_do_not_fit_stay_in_a_clone(here: Path) -> None:
    """QEMU puts a bitmap of 512 bytes before each block of a VHD."""
    raw, source, target = many_blocks(here), here / "theirs.vhd", here / "out.vmdk"
    qemu.convert(raw, source, qemu.VHD_DYNAMIC)
    result = convert_always(source, target, qemu.VMDK_SPARSE)
    assert result.bytes_shared >= 32 * MIB
    assert result.bytes_written <= MIB
    qemu.assert_same(raw, target, source_format="raw", target_format="vmdk")
    assert convert_always(source, here / "out.raw", qemu.RAW).bytes_shared <= 8 * MIB


def stream_of(raw: Path) -> Path:
    """Write a streamOptimized VMDK of text."""
    raw.write_bytes(images.text(8 * MIB))
    source = raw.with_name("stream.vmdk")
    options = ["subformat=streamOptimized"]
    imgcore.convert(raw, source, options=options, sync=False)
    return source


@pytest.mark.parametrize("trusts", [False, True])
def test_compressed_blocks_stay_compressed(trusts: bool, here: Path) -> None:
    raw = here / "disk.raw"
    source, target = stream_of(raw), here / "out.qcow2"
    result = imgcore.convert(source, target, reflink="always", trust_blocks=trusts)
    assert 0 < result.bytes_shared < result.bytes_reused == 8 * MIB
    assert result.bytes_trusted == (8 * MIB if trusts else 0)
    assert (result.bytes_read == 0) is trusts
    assert result.file_size < source.stat().st_size + 4 * MIB
    qemu.assert_same(raw, target, source_format="raw", target_format="qcow2")
    qemu.assert_check_clean(target)
    assert imgcore.check(target).ok


def test_damaged_compressed_blocks_are_not_taken_over(here: Path) -> None:
    source, target = stream_of(here / "disk.raw"), here / "out.qcow2"
    with open(source, "r+b") as file:
        file.seek(source.stat().st_size // 2)
        file.write(images.noise(64))
    with pytest.raises(imgcore.CorruptImageError):
        imgcore.convert(source, target, reflink="always")
    assert sorted(os.listdir(here)) == ["disk.raw", source.name]


def test_zeros_are_data(here: Path) -> None:
    """What the source has allocated is allocated in the target."""
    raw = here / "disk.raw"
    raw.write_bytes(bytes(4 * MIB))
    assert convert(raw, here / "a.qcow2", qemu.QCOW2).bytes_data == 0
    result = convert(raw, here / "b.qcow2", qemu.QCOW2, reflink="always")
    assert result.bytes_data == result.bytes_shared == 4 * MIB
    assert qemu.data_nbytes(here / "b.qcow2", "qcow2") == 4 * MIB


def test_the_source_is_written_back_before_its_holes_are_asked_for(here: Path) -> None:
    """XFS can report holes where a reflinked file has data that is not on the disk."""
    source = many_blocks(here)
    assert calls_of(source, here / "out.qcow2").holes_after_sync


# -- pieces that do not fit ------------------------------------------------------------


def test_a_chain(here: Path) -> None:
    _, base = make_source(here, qemu.QCOW2)
    overlay = here / "overlay.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(overlay))
    qcow2.qemu_io(overlay, "write -P 7 8M 1M")
    result = convert(overlay, here / "out.raw", qemu.RAW, reflink="always")
    assert result.bytes_read <= 4 * KIB
    assert result.bytes_shared > SHARABLE_NBYTES + MIB
    qemu.assert_same(overlay, here / "out.raw", source_format="qcow2", target_format="raw")


def test_compressed_blocks_are_copied(here: Path) -> None:
    raw, _ = make_source(here)
    source = here / "source.qcow2"
    imgcore.convert(raw, source, compress=True, sync=False)
    qcow2.qemu_io(source, "write -P 7 8M 1M")
    imgcore.convert(source, raw, force=True)
    result = convert_always(source, here / "out.vhdx", qemu.VHDX_DYNAMIC)
    assert result.bytes_shared >= MIB
    assert result.bytes_written >= 3 * MIB
    assert_sound(raw, source, here / "out.vhdx", qemu.VHDX_DYNAMIC)


def test_several_sources_of_two_file_systems(here: Path, tmp_path: Path) -> None:
    raw, _ = make_source(here)
    source, other = here / "a.raw", tmp_path / "b.raw"
    source.write_bytes(images.noise(2 * MIB))
    other.write_bytes(images.noise(3 * MIB, 2))
    target = here / "out.qcow2"
    for reflink in ("always", "strict"):
        words = ["convert", f"--reflink={reflink}", source, raw, "--no-sync", target]
        assert imgcore_command(*map(str, words)).returncode == 0
        target.unlink()
    # Alone it is refused, as one of several it is copied.
    words = ["convert", "--reflink=strict", source, other, target]
    done = imgcore_command(*map(str, words))
    assert_one_line_error(done)
    assert "3 MiB of 5 MiB would have to be copied; --reflink=always copies them" in done.stderr
    assert not target.exists()
    words[1] = "--reflink=always"
    assert imgcore_command(*map(str, words)).returncode == 0
    together = tmp_path / "together.raw"
    together.write_bytes(source.read_bytes() + other.read_bytes())
    qemu.assert_same(together, target, source_format="raw", target_format="qcow2")


def test_strict_refuses_copies_before_anything_is_written(here: Path) -> None:
    raw, _ = make_source(here)
    source, target = here / "theirs.vdi", here / "out.raw"
    qemu.convert(raw, source, qemu.VDI)
    before = sorted(os.listdir(here))
    words = ["convert", "--reflink=strict", str(source), str(target)]
    done = imgcore_command(*words)
    assert_one_line_error(done)
    assert "--reflink=always copies them" in done.stderr
    assert sorted(os.listdir(here)) == before
    assert imgcore_command(*words[:1], "--reflink=always", *words[2:]).returncode == 0
    qemu.assert_same(raw, target, source_format="raw", target_format="raw")


def test_strict_allows_an_incomplete_block_at_the_end(here: Path) -> None:
    raw, _ = make_source(here)
    assert DISK.virtual_size % 4096 != 0
    result = convert(raw, here / "out.qcow2", qemu.QCOW2, reflink="strict")
    assert result.bytes_read == DISK.virtual_size % 4096
    qemu.assert_same(raw, here / "out.qcow2", source_format="raw", target_format="qcow2")


def test_strict_allows_data_in_an_incomplete_block_alone(here: Path) -> None:
    raw, target = here / "disk.raw", here / "out.raw"
    with raw.open("wb") as file:
        file.write(b"a" * 64 * KIB)
        file.seek(MIB)
        file.write(b"z" * 512)
    result = imgcore.convert(raw, target, format="raw", reflink="strict")
    assert (result.bytes_shared, result.bytes_written) == (64 * KIB, 512)
    assert target.read_bytes() == raw.read_bytes()


@pytest.mark.parametrize("where", ["another cluster", "the L2 table"])
@pytest.mark.parametrize("target", ["out.vmdk", "out.raw"])
def test_tables_that_contradict_each_other(target: str, where: str, here: Path) -> None:
    """Nothing is reflinked, at once or range by range: no data is read."""
    raw, image = here / "four.raw", here / "disk.qcow2"
    raw.write_bytes(b"".join(bytes([n]) * (64 * KIB) for n in b"abcd"))
    imgcore.convert(raw, image)
    qcow2.put_second_cluster(image, where)
    before = sorted(os.listdir(here))
    for do in (
        lambda: imgcore.convert(image, here / target, reflink="always"),
        lambda: imgcore.measure_reflink(image, target[4:]),
    ):
        with pytest.raises(imgcore.CorruptImageError, match="its tables contradict each other"):
            do()
    assert sorted(os.listdir(here)) == before


# -- no reflinks -----------------------------------------------------------------------


@pytest.mark.parametrize("reflink", ["always", "strict"])
def test_ext4_is_refused_not_copied(reflink: str, tmp_path: Path) -> None:
    image = make_file_system("ext4", tmp_path / "image", 64 * MIB)
    with mounted(image, tmp_path / "mounted", "-o", "loop") as folder:
        raw, _ = make_source(folder)
        words = ["convert", f"--reflink={reflink}", str(raw), str(folder / "out.qcow2")]
        done = imgcore_command(*words)
        assert_one_line_error(done)
        assert "(Operation not supported); --reflink=auto copies what cannot be" in done.stderr
        assert not [name for name in os.listdir(folder) if name.startswith(("out", ".out"))]
        assert imgcore_command("convert", "--reflink=auto", *words[2:]).returncode == 0
        qemu.assert_same(raw, folder / "out.qcow2", source_format="raw", target_format="qcow2")


def test_another_file_system_is_refused(here: Path, tmp_path: Path) -> None:
    raw, _ = make_source(tmp_path)
    with pytest.raises(imgcore.UnsupportedFeatureError, match=os.strerror(errno.EXDEV)):
        convert(raw, here / "out.qcow2", qemu.QCOW2, reflink="always")
    assert os.listdir(here) == []


def flagged_folder(here: Path) -> Path:
    """Make a folder whose files are not copied on write, or skip the test."""
    if shutil.which("chattr") is None:
        pytest.skip("chattr is not installed (Debian: e2fsprogs)")
    flagged = here / "flagged"
    flagged.mkdir()
    if subprocess.run(["chattr", "+C", flagged], capture_output=True, check=False).returncode:
        pytest.skip("the file system has no flag C")
    return flagged


@pytest.mark.parametrize("of_folder", [False, True], ids=["source", "folder"])
def test_files_without_copy_on_write(of_folder: bool, here: Path) -> None:
    """Btrfs reflinks between files only if both or neither have the flag."""
    raw, flagged = make_source(here)[0], flagged_folder(here)
    source, target = here / "disk.raw", flagged / "out.qcow2"
    if not of_folder:
        source, target = flagged / "disk.raw", here / "out.qcow2"
        source.write_bytes(raw.read_bytes())
    result = convert(source, target, qemu.QCOW2, reflink="always")
    assert result.bytes_shared > SHARABLE_NBYTES
    qemu.assert_same(raw, target, source_format="raw", target_format="qcow2")


@pytest.mark.parametrize("flagged_first", [False, True])
def test_one_of_two_files_without_copy_on_write(flagged_first: bool, here: Path) -> None:
    """The first one decides the target's flag; the other is known to be copied."""
    raw, target = make_source(here)[0], here / "out.raw"
    os.truncate(raw, 12 * MIB)  # so that both disks are on block boundaries
    flagged = flagged_folder(here) / "flagged.raw"
    subprocess.run(["cp", raw, flagged], check=True)
    alone = imgcore.convert(raw, here / "alone.raw", format="raw", reflink="strict")
    sources = [flagged, raw] if flagged_first else [raw, flagged]
    with pytest.raises(imgcore.UnsupportedFeatureError, match="would have to be copied"):
        imgcore.convert(sources, target, format="raw", reflink="strict")
    assert not target.exists()
    result = imgcore.convert(sources, target, format="raw", reflink="always")
    assert 0 < result.bytes_shared <= alone.bytes_shared
    assert target.read_bytes() == 2 * raw.read_bytes()


# -- interrupted -----------------------------------------------------------------------


@each_way
def test_a_source_that_changes(pair: Pair, here: Path) -> None:
    source, target = image_of(many_blocks(here), pair.source), here / f"out{pair.target.suffix}"

    def change(progress: imgcore.Progress) -> None:
        os.utime(source, ns=(0, 0))

    with pytest.raises(imgcore.ImgcoreError, match="changed while it was read"):
        convert(source, target, pair.target, reflink="always", progress=change)
    assert sorted(os.listdir(here)) == ["disk.raw", source.name]


@each_way
def test_progress_only_grows(pair: Pair, here: Path) -> None:
    raw = many_blocks(here)
    source, target = image_of(raw, pair.source), here / f"out{pair.target.suffix}"
    seen: list[imgcore.Progress] = []
    result = convert(source, target, pair.target, reflink="always", progress=seen.append)
    assert seen[-1].done == seen[-1].total == 128 * MIB
    assert seen[-1].data == result.bytes_data
    for name in ("done", "data", "zero", "written"):
        values = [getattr(one, name) for one in seen]
        assert values == sorted(values), name


@each_way
def test_a_cancelled_job_leaves_nothing(pair: Pair, here: Path) -> None:
    source, target = image_of(many_blocks(here), pair.source), here / f"out{pair.target.suffix}"

    def cancel(progress: imgcore.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, pair.target, reflink="always", progress=cancel)
    assert sorted(os.listdir(here)) == ["disk.raw", source.name]
