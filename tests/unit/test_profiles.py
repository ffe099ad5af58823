"""Profiles: the images for each platform, examined by other tools if possible."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import images, qemu
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as command

import imgcore
from imgcore.disk import archive_sink
from imgcore.errors import LimitExceededError, OptionError
from imgcore.formats.option_texts import parse_options
from imgcore.formats.registry import format_names, get_driver
from imgcore.platforms.profiles import PROFILES, get_profile, profile_names

MIB = 1 << 20
GIB = 1 << 30


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A disk that does not end at a whole MiB; its last sector is not zeros."""
    path = tmp_path / "disk.raw"
    size = 21 * MIB + 3 * 512
    pieces = [(0, images.text(70_000)), (5 * MIB, images.noise(99_000)), (size - 9, b"last word")]
    images.RawImage("odd", size, lambda: pieces).write(path)
    return path


def convert(raw: Path, target: str, profile: str, **arguments: Any) -> Path:
    path = raw.parent / target
    imgcore.convert(raw, path, format="raw", profile=profile, sync=False, **arguments)
    return path


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_the_table_is_sound(profile: Any) -> None:
    assert profile.size_unit % 512 == 0
    assert profile.min_virtual_nbytes < profile.max_virtual_nbytes
    if profile.format not in format_names():
        pytest.skip(f"{profile.format} is not supported yet")
    for key, values in profile.options.items():
        for value in values:
            parsed = parse_options(get_driver(profile.format), {key: value})
            assert getattr(parsed, key) == value


def test_names() -> None:
    assert len(set(profile_names())) == len(PROFILES)
    with pytest.raises(OptionError, match="unknown profile 'acme'; known profiles: azure, hyperv"):
        get_profile("acme")


# For each profile the suffix, the size in bytes, and the format's name in qemu-img
# and imgcore.
SIZE = 21 * MIB + 3 * 512
WRITTEN = [
    ("azure", "a.vhd", 22 * MIB, "vhd", "fixed"),
    ("hyperv", "a.vhdx", SIZE, "vhdx", "dynamic"),
    ("xenserver", "a.vhd", 22 * MIB, "vhd", "dynamic"),
    ("esxi", "a.vmdk", SIZE, "vmdk", "streamOptimized"),
    ("aws", "a.vmdk", SIZE, "vmdk", "streamOptimized"),
    ("virtualbox", "a.vdi", SIZE, "vdi", "dynamic"),
    ("openstack", "a.qcow2", SIZE, "qcow2", None),
]


@pytest.mark.parametrize(
    ("name", "target", "size", "image_format", "subformat"), WRITTEN, ids=[w[0] for w in WRITTEN]
)
def test_what_is_written(
    raw: Path, name: str, target: str, size: int, image_format: str, subformat: str | None
) -> None:
    if image_format not in format_names():
        pytest.skip(f"{image_format} is not supported yet")
    path = convert(raw, target, name)
    with imgcore.open(path) as image:
        assert (image.format, image.subformat, image.virtual_size) == (
            image_format,
            subformat,
            size,
        )
    qemu_name = {"vhd": "vpc"}.get(image_format, image_format)
    assert qemu.info(path, qemu_name)["virtual-size"] == size
    qemu.run("compare", "-f", "raw", "-F", qemu_name, raw, path)


def test_azure(raw: Path) -> None:
    path = convert(raw, "a.vhd", "azure")
    assert path.stat().st_size == 22 * MIB + 512
    footer = path.read_bytes()[-512:]
    assert footer.startswith(b"conectix")
    (current,) = struct.unpack_from(">Q", footer, 48)
    assert current == 22 * MIB


@pytest.mark.parametrize("name", ["azure", "xenserver"])
def test_an_aligned_disk_does_not_grow(tmp_path: Path, name: str) -> None:
    path = tmp_path / "disk.raw"
    images.RawImage("aligned", 24 * MIB, lambda: [(24 * MIB - 512, images.noise(512))]).write(path)
    with imgcore.open(convert(path, "a.vhd", name)) as image:
        assert image.virtual_size == 24 * MIB


def test_padding_of_a_stream(raw: Path) -> None:
    packed = raw.parent / "packed.raw.zst"
    imgcore.convert(raw, packed, format="raw", sync=False)
    path = raw.parent / "a.vhd"
    imgcore.convert(packed, path, profile="azure", sync=False)
    with imgcore.open(path) as image:
        assert image.virtual_size == 22 * MIB
    qemu.run("compare", "-f", "raw", "-F", "vpc", raw, path)


def test_padding_with_stored_zeros(raw: Path) -> None:
    path = convert(raw, "a.vhd", "azure", sparse=0)
    assert os.stat(path).st_blocks * 512 >= 22 * MIB
    qemu.run("compare", "-f", "raw", "-F", "vpc", raw, path)


def test_esxi_also_writes_vmfs(raw: Path) -> None:
    path = convert(raw, "a.vmdk", "esxi", options={"subformat": "vmfs"})
    with imgcore.open(path) as image:
        assert image.subformat == "vmfs"


CONTRADICTIONS: list[tuple[str, dict[str, Any], str]] = [
    ("azure", {"target_format": "vmdk"}, "profile azure writes vhd, not vmdk"),
    ("azure", {"options": ["subformat=dynamic"]}, "requires subformat=fixed, not subformat=dy"),
    ("azure", {"options": {"size": "chs"}}, "requires size=current, not size=chs"),
    ("azure", {"compress": True}, "cannot be compressed"),
    ("xenserver", {"options": ["block_size=1M"]}, "requires block_size=2097152, not"),
    ("aws", {"options": ["subformat=monolithicSparse"]}, "requires subformat=streamOptimized"),
    ("esxi", {"options": ["subformat=monolithicSparse"]}, "streamOptimized or subformat=vmfs"),
    ("openstack", {"backing": "b.qcow2", "backing_format": "qcow2"}, "does not allow a parent"),
    ("gce", {"options": ["preallocation=full"]}, "requires preallocation=off"),
    ("gce", {"in_place": True}, "does not allow -n"),
    ("gce", {"compress": True}, "does not allow -n or -c"),
]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    CONTRADICTIONS,
    ids=[f"{c[0]}-{c[2][:12]}" for c in CONTRADICTIONS],
)
def test_contradictions(raw: Path, name: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        convert(raw, "a.tar.gz" if name == "gce" else "a.img", name, **arguments)
    assert [path for path in raw.parent.iterdir() if path.stem == "a"] == []


def test_agreement_is_no_contradiction(raw: Path) -> None:
    path = convert(
        raw, "a.vhd", "xenserver", target_format="vpc", options="subformat=dynamic,batmap=on"
    )
    with imgcore.open(path) as image:
        assert image.subformat == "dynamic"


def test_other_options_are_kept(raw: Path) -> None:
    given = "6f9619ff-8b86-d011-b42d-00c04fc964ff"
    path = convert(raw, "a.vhd", "azure", options={"uuid": given})
    assert imgcore.info(path)["format-specific"]["data"]["uuid"] == given


def test_a_disk_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(2041 * GIB)
    with pytest.raises(LimitExceededError, match="bytes is too large for XenServer and XCP-ng"):
        convert(path, "a.vhd", "xenserver")
    assert not (tmp_path / "a.vhd").exists()


def test_a_disk_that_is_too_small(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(MIB))
    convert(path, "a.vhd", "azure")
    words = "a disk of 1048576 bytes is too small for Microsoft Azure: at least 20971520 are needed"
    assert words in caplog.text


# -- Compute Engine --------------------------------------------------------------------


def test_gce(raw: Path) -> None:
    path = convert(raw, "a.tar.gz", "gce")
    with tarfile.open(path) as tar:
        (member,) = tar.getmembers()
        assert (member.name, member.size, member.type) == ("disk.raw", GIB, b"S")
    unpacked = unpack(path)
    assert unpacked.stat().st_blocks * 512 < 2 * MIB
    assert_padded_copy(raw, unpacked, GIB)


def unpack(path: Path) -> Path:
    if shutil.which("tar") is None:
        pytest.skip("tar is not installed")
    folder = path.parent / "unpacked"
    folder.mkdir()
    done = subprocess.run(
        ["tar", "-xzf", path, "-C", folder], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert [entry.name for entry in folder.iterdir()] == ["disk.raw"]
    return folder / "disk.raw"


def assert_padded_copy(raw: Path, copy: Path, size: int) -> None:
    data = raw.read_bytes()
    assert copy.stat().st_size == size
    with copy.open("rb") as file:
        assert file.read(len(data)) == data
        for start, end in data_ranges(file.fileno(), len(data), size):
            assert not os.pread(file.fileno(), end - start, start).strip(b"\0")


def data_ranges(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the data of a file in pieces; reading the holes would take long."""
    while start < end:
        try:
            start = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            return
        hole = os.lseek(fd, start, os.SEEK_HOLE)
        while start < min(hole, end):
            yield start, min(start + 16 * MIB, hole)
            start = min(start + 16 * MIB, hole)


@pytest.mark.parametrize("source", ["disk.qcow2", "disk2.raw.gz", "disk.vdi"])
def test_gce_from_other_sources(raw: Path, source: str) -> None:
    given = raw.parent / source
    imgcore.convert(raw, given, format="raw", sync=False)
    path = raw.parent / "a.tgz"
    imgcore.convert(given, path, profile="gce", sync=False)
    assert_padded_copy(raw, unpack(path), GIB)


def test_gce_of_an_empty_disk(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(3 * GIB)
    target = convert(path, "a.tar.gz", "gce")
    assert target.stat().st_size < 1000
    with tarfile.open(target) as tar:
        assert tar.getmembers()[0].size == 3 * GIB


def test_gce_is_the_same_with_any_number_of_threads(raw: Path) -> None:
    found = {convert(raw, f"{n}.tar.gz", "gce", threads=n).read_bytes() for n in (1, 2, 5)}
    assert len(found) == 1


def test_gce_of_scattered_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a header cannot hold all parts, parts are joined with the holes between."""
    path = tmp_path / "disk.raw"
    pieces = [(i * 256 * 1024, images.noise(512, i + 1)) for i in range(60)]
    images.RawImage("scattered", 16 * MIB, lambda: pieces).write(path)
    for limit in (60, 59, 4, 1):
        monkeypatch.setattr(archive_sink, "MAX_TAR_SEGMENTS", limit)
        target = convert(path, f"{limit}.tar.gz", "gce")
        with tarfile.open(target) as tar:
            (member,) = tar.getmembers()
            content = tar.extractfile(member)
            assert content is not None
            assert content.read(16 * MIB) == path.read_bytes()
            # The last entry states that the file ends in a hole; unused ones are zeros.
            parts = [part for part in member.sparse or () if part[1]]
            assert len(parts) <= limit


def test_gce_wants_the_name_of_an_archive(raw: Path) -> None:
    with pytest.raises(OptionError, match=r"a\.raw: .*name must end in \.tar\.gz or \.tgz"):
        convert(raw, "a.raw", "gce")


def test_progress_reaches_the_rounded_size(raw: Path) -> None:
    for name, target, size in (("azure", "a.vhd", 22 * MIB), ("gce", "a.tar.gz", GIB)):
        seen: list[imgcore.Progress] = []
        convert(raw, target, name, progress=seen.append)
        assert {step.total for step in seen} == {size}
        assert seen[-1].done == size
        assert all(a.done <= b.done and a.data <= b.data for a, b in itertools.pairwise(seen))


# -- the command -----------------------------------------------------------------------


def test_command(raw: Path) -> None:
    target = raw.parent / "a.vhd"
    done = command("convert", "--profile", "azure", "-f", "raw", raw, target)
    assert done.returncode == 0, done.stderr
    assert target.stat().st_size == 22 * MIB + 512
    wrong = command("convert", "--profile", "acme", raw, target)
    assert_one_line_error(wrong, "unknown profile 'acme'", code=2)
    options = command("convert", "--profile", "azure", "-o", "help")
    assert "Options of the vhd format" in options.stdout
