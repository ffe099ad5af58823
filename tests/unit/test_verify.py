"""``convert --checksum --verify``: the digest of the target, and its read-back."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers import blkhash
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as command
from tests.helpers.images import KIB, MIB, noise, text
from tests.helpers.mounts import loop_device, make_file_system, mounted
from tests.helpers.targets import TARGETS

import imgcore
from imgcore.files.target import Target

DISK = text(1 * MIB + 64 * KIB) + bytes(3 * MIB) + noise(900 * KIB) + bytes(124 * KIB)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(DISK)
    return path


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", TARGETS)
def test_every_target(raw: Path, tmp_path: Path, name: str, threads: int) -> None:
    target = tmp_path / name
    result = imgcore.convert(raw, target, checksum="sha256", threads=threads, **TARGETS[name])
    assert result.checksum is not None
    assert not result.verified
    disk = DISK.ljust(result.virtual_size, b"\0")
    assert result.checksum.hexdigest == blkhash.digest(disk)
    again = imgcore.convert(raw, target, verify=True, force=True, **TARGETS[name])
    assert again.verified
    assert again.checksum == result.checksum
    if not name.endswith("tar.gz"):
        assert imgcore.checksum(target) == result.checksum


@pytest.mark.parametrize("nbytes", [0, 1, 511, 64 * KIB + 513, 5 * MIB + 7])
def test_odd_sizes(tmp_path: Path, nbytes: int) -> None:
    """A raw target has the exact bytes; one of another format has whole sectors."""
    raw, disk = tmp_path / "disk.raw", (DISK + DISK)[:nbytes]
    raw.write_bytes(disk)
    whole = disk.ljust(-(-nbytes // 512) * 512, b"\0")
    for name, expected in (
        ("a.raw", disk),
        ("a.raw.zst", disk),
        ("a.raw.gz", disk),
        ("a.qcow2", whole),
    ):
        result = imgcore.convert(raw, tmp_path / name, verify=True)
        assert result.checksum is not None
        assert result.checksum.hexdigest == blkhash.digest(expected), name


def test_without_it_there_is_none(raw: Path, tmp_path: Path) -> None:
    result = imgcore.convert(raw, tmp_path / "a.qcow2")
    assert (result.checksum, result.verified) == (None, False)


def test_several_sources(raw: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.raw"
    odd.write_bytes(DISK[: 64 * KIB + 512])
    result = imgcore.convert([odd, raw, odd], tmp_path / "a.qcow2", verify=True)
    assert result.checksum is not None
    whole = odd.read_bytes() + DISK + odd.read_bytes()
    assert result.checksum.hexdigest == blkhash.digest(whole)


@pytest.mark.parametrize("format", ["qcow2", "vhd", "vhdx", "vdi"])
def test_with_a_parent(raw: Path, tmp_path: Path, format: str) -> None:
    """Blocks that the target leaves out count, and are read back from the parent."""
    base, folder = tmp_path / f"base.{format}", tmp_path / "elsewhere"
    imgcore.convert(raw, base)
    changed = DISK[:MIB] + noise(KIB, 3) + DISK[MIB + KIB :]
    raw.write_bytes(changed)
    folder.mkdir()
    for name, backing in ((f"a.{format}", base.name), (f"elsewhere/a.{format}", f"../{base.name}")):
        result = imgcore.convert(
            raw, tmp_path / name, backing=backing, backing_format=format, verify=True
        )
        assert result.checksum is not None
        assert result.checksum.hexdigest == blkhash.digest(changed)


def test_in_place(raw: Path, tmp_path: Path) -> None:
    """Of a file that is larger than the disk, the disk is read back."""
    target = tmp_path / "a.raw"
    target.write_bytes(b"x" * (len(DISK) + MIB))
    result = imgcore.convert(raw, target, in_place=True, verify=True)
    assert result.checksum is not None
    assert result.checksum.hexdigest == blkhash.digest(DISK)
    assert target.read_bytes() == DISK + b"x" * MIB
    for name in ("a.vdi", "a.qcow2", "a.vhdx"):
        target = tmp_path / name
        target.write_bytes(b"x" * (len(DISK) + MIB))
        assert imgcore.convert(raw, target, in_place=True, verify=True).verified


def test_salvaged(raw: Path, tmp_path: Path) -> None:
    """What is lost is zeros in the target, and in its digest."""
    image = tmp_path / "a.vdi"
    imgcore.convert(raw, image)
    with open(image, "r+b") as file:
        file.truncate(image.stat().st_size - 400 * KIB)
    result = imgcore.convert(image, tmp_path / "b.raw", salvage=True, verify=True)
    assert result.bad_ranges
    assert result.checksum is not None
    assert result.checksum.hexdigest == blkhash.digest((tmp_path / "b.raw").read_bytes())


def test_trusted_blocks_are_read(raw: Path, tmp_path: Path) -> None:
    imgcore.convert(raw, tmp_path / "a.qcow2", compress=True)
    result = imgcore.convert(
        tmp_path / "a.qcow2", tmp_path / "b.qcow2", compress=True, trust_blocks=True, verify=True
    )
    assert result.checksum is not None
    assert result.checksum.hexdigest == blkhash.digest(DISK)


def test_verify_needs_the_sync(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(imgcore.OptionError, match="--no-sync"):
        imgcore.convert(raw, tmp_path / "a.qcow2", verify=True, sync=False)


# ---------------------------------------------------------------- what goes wrong


def flip(path: str, fd: int, offset: int) -> None:
    byte = os.pread(fd, 1, offset)
    assert byte, f"{path} has no byte at {offset}"
    os.pwrite(fd, bytes([byte[0] ^ 1]), offset)


@pytest.fixture
def damaged_after_sync(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[bytes], int]], None]:
    """Return a function that has a byte of the next targets changed after the sync.

    Its argument finds the offset in the file's content.
    """

    def prepare_damage(find: Callable[[bytes], int]) -> None:
        prepare = Target.prepare

        def damage(self: Target) -> None:
            prepare(self)
            fd = self.main.fd
            flip(self.path, fd, find(os.pread(fd, 1 << 30, 0)))

        monkeypatch.setattr(Target, "prepare", damage)

    return prepare_damage


MARK = noise(64, 9)


@pytest.fixture
def marked(raw: Path) -> Path:
    raw.write_bytes(DISK[:MIB] + MARK + DISK[MIB + len(MARK) :])
    return raw


@pytest.mark.parametrize(
    "name", ["a.raw", "a.qcow2", "a.vmdk", "a.vhd", "b.vhd", "a.vhdx", "a.vdi"]
)
def test_a_changed_block_is_noticed(
    marked: Path,
    tmp_path: Path,
    name: str,
    damaged_after_sync: Callable[[Callable[[bytes], int]], None],
) -> None:
    damaged_after_sync(lambda content: content.index(MARK))
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(imgcore.ChecksumError, match="does not read as it was written") as raised:
        imgcore.convert(marked, tmp_path / name, verify=True, **TARGETS[name])
    assert raised.value.path == str(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("name", ["b.qcow2", "b.vmdk", "a.raw.zst", "a.raw.gz", "a.tar.gz"])
def test_a_changed_compressed_byte_is_noticed(
    raw: Path,
    tmp_path: Path,
    name: str,
    damaged_after_sync: Callable[[Callable[[bytes], int]], None],
) -> None:
    damaged_after_sync(lambda content: len(content) // 2)
    with pytest.raises(imgcore.ImgcoreError):
        imgcore.convert(raw, tmp_path / name, verify=True, **TARGETS[name])
    assert os.listdir(tmp_path) == ["disk.raw"]


def test_a_changed_table_is_noticed(
    raw: Path, tmp_path: Path, damaged_after_sync: Callable[[Callable[[bytes], int]], None]
) -> None:
    """The first entry of the L1 table of a QCOW2, which is in the header's field."""
    damaged_after_sync(lambda content: int.from_bytes(content[40:48], "big") + 5)
    with pytest.raises(imgcore.ImgcoreError):
        imgcore.convert(raw, tmp_path / "a.qcow2", verify=True)
    assert os.listdir(tmp_path) == ["disk.raw"]


def test_the_old_target_stays(
    marked: Path, tmp_path: Path, damaged_after_sync: Callable[[Callable[[bytes], int]], None]
) -> None:
    target = tmp_path / "a.qcow2"
    target.write_bytes(b"old")
    damaged_after_sync(lambda content: content.index(MARK))
    with pytest.raises(imgcore.ChecksumError):
        imgcore.convert(marked, target, verify=True, force=True)
    assert target.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["a.qcow2", "disk.raw"]


def test_a_second_file_is_read_as_well(
    marked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Target.prepare

    def damage(self: Target) -> None:
        prepare(self)
        flip(self.path, self._companions[0].fd, MIB)

    monkeypatch.setattr(Target, "prepare", damage)
    with pytest.raises(imgcore.ChecksumError):
        imgcore.convert(marked, tmp_path / "c.vmdk", verify=True, **TARGETS["c.vmdk"])
    assert os.listdir(tmp_path) == ["disk.raw"]


@pytest.mark.parametrize("name", ["c.vmdk", "nbd:c.qcow2"])
def test_names_that_start_here(
    marked: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old files of these names are not read in the place of the new ones."""
    monkeypatch.chdir(tmp_path)
    options = TARGETS["c.vmdk"] if name.endswith("vmdk") else {}
    for content in (bytes(len(DISK)), marked.read_bytes()):
        marked.write_bytes(content)
        result = imgcore.convert("disk.raw", name, verify=True, force=True, **options)
        assert result.checksum is not None
        assert result.checksum.hexdigest == blkhash.digest(content)
        assert result.target == name


def test_in_place_it_stays_with_a_warning(
    marked: Path,
    tmp_path: Path,
    damaged_after_sync: Callable[[Callable[[bytes], int]], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = tmp_path / "a.raw"
    target.write_bytes(bytes(len(DISK)))
    damaged_after_sync(lambda content: content.index(MARK))
    with caplog.at_level(logging.WARNING), pytest.raises(imgcore.ChecksumError):
        imgcore.convert(marked, target, in_place=True, verify=True)
    assert "is now incomplete" in caplog.text


def test_cancelled_while_it_is_read_back(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress is called, and may cancel."""
    prepared: list[Target] = []
    prepare = Target.prepare
    monkeypatch.setattr(Target, "prepare", lambda self: (prepare(self), prepared.append(self))[0])

    def stop(_: imgcore.Progress) -> None:
        if prepared:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        imgcore.convert(raw, tmp_path / "a.qcow2", verify=True, progress=stop)
    assert os.listdir(tmp_path) == ["disk.raw"]


# -------------------------------------------------------------------- the command


def test_the_command_prints_a_line_to_check(raw: Path, tmp_path: Path) -> None:
    done = command("convert", "--checksum", "disk.raw", "a.qcow2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{blkhash.digest(DISK)}  a.qcow2\n"
    (tmp_path / "list").write_text(done.stdout)
    assert command("checksum", "--check", "list", cwd=tmp_path).stdout == "a.qcow2: OK\n"
    done = command("convert", "disk.raw", "--verify", "--json", "b.qcow2", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert found["verified"] is True
    assert found["checksum"] == {
        "algorithm": "sha256",
        "block_size": 65536,
        "digest": blkhash.digest(DISK),
    }
    done = command("convert", "--json", "disk.raw", "c.qcow2", cwd=tmp_path)
    assert json.loads(done.stdout)["checksum"] is None
    done = command("convert", "--checksum=sha256", "-q", "disk.raw", "d.qcow2", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    wrong = command("convert", "--checksum=md5", "disk.raw", "e.qcow2", cwd=tmp_path)
    assert_one_line_error(wrong, "md5", code=2)


# Runs the command, with a byte of the target changed between sync and read-back.
DAMAGING = """
import os, sys
from imgcore.files.target import Target
prepare = Target.prepare

def damage(target):
    prepare(target)
    byte = os.pread(target.main.fd, 1, {offset})
    os.pwrite(target.main.fd, bytes([byte[0] ^ 1]), {offset})

Target.prepare = damage
from imgcore.cli.main import run
run()
"""


def test_by_the_command(raw: Path, tmp_path: Path) -> None:
    script = DAMAGING.format(offset=MIB)
    words = ["convert", "disk.raw", "a.raw"]
    for flags, code in (([], 0), (["--verify", "--force"], 1), (["--verify"], 1)):
        (tmp_path / "a.raw").unlink(missing_ok="--force" not in flags)
        done = subprocess.run(
            [sys.executable, "-c", script, *words, *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        if code:
            assert_one_line_error(done, "a.raw: does not read as it was written")
            assert done.stdout == ""
            assert os.listdir(tmp_path) == ["disk.raw"]
        else:
            assert (tmp_path / "a.raw").read_bytes() != DISK


def test_the_medium_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes below the file system is noticed, though the page cache is right."""
    disk = make_file_system("ext4", tmp_path / "disk", 16 * MIB)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(DISK[:MIB] + MARK + DISK[MIB + len(MARK) :])
    prepare = Target.prepare

    def damage(self: Target) -> None:
        prepare(self)
        assert os.pread(self.main.fd, len(MARK), MIB) == MARK
        content = disk.read_bytes()
        with open(disk, "r+b") as file:
            for found in re.finditer(re.escape(MARK), content):
                file.seek(found.start())
                file.write(bytes(len(MARK)))
        assert os.pread(self.main.fd, len(MARK), MIB) == MARK

    monkeypatch.setattr(Target, "prepare", damage)
    with loop_device(disk) as device, mounted(device, tmp_path / "mounted") as folder:
        result = imgcore.convert(raw, folder / "a.raw", checksum="sha256")
        assert result.checksum is not None
        (folder / "a.raw").unlink()
        with pytest.raises(imgcore.ChecksumError, match="does not read as it was written"):
            imgcore.convert(raw, folder / "a.raw", verify=True)
        assert os.listdir(folder) == ["lost+found"]
