"""A suffix that states another format than is written, or than an image has."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as command

import imgcore
from imgcore.formats.registry import DRIVERS, format_names, stated_format, suffix_of
from imgcore.platforms.profiles import PROFILES, profile_names

MIB = 1 << 20
SUFFIXES = [
    suffix
    for entry in DRIVERS
    for suffix in (*entry.suffixes, *entry.other_suffixes)
    if suffix != ".img"
]
FOREIGN = [
    *(".ova", ".gz", ".zst", ".xz", ".tar", ".tar.gz", ".tgz", ".zip", ".qed", ".dmg"),
    *(".bz2", ".lz4", ".7z", ".wim", ".vma", ".hdd", ".E01"),
]
PAIRS = [
    (format, suffix)
    for format in format_names()
    for suffix in (*SUFFIXES, *FOREIGN, ".VMDK", ".Vhd")
    if stated_format(f"x{suffix}") != format
]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"data" * (MIB // 4))
    return path


def others(disk: Path) -> list[Path]:
    return [path for path in disk.parent.iterdir() if path != disk]


@pytest.mark.parametrize(("format", "suffix"), PAIRS)
def test_no_image_gets_the_name_of_another_format(format: str, suffix: str, disk: Path) -> None:
    target = disk.with_name(f"x{suffix}")
    words = rf"the name states \w+, but -O states {format}: end it in \.{format}"
    with pytest.raises(imgcore.OptionError, match=words) as error:
        imgcore.convert(disk, target, target_format=format)
    assert str(error.value).count("\n") == 0
    with pytest.raises(imgcore.OptionError, match=words.replace("-O", "-f")):
        imgcore.create(target, MIB, format=format)
    assert not others(disk)
    follow_advice(str(error.value), disk, target, format)


def follow_advice(message: str, disk: Path, target: Path, format: str) -> None:
    """Do what the message says, in each way that it names."""
    suffixes = re.findall(r"in (\.[a-z0-9.]*[a-z0-9])", message)
    assert suffixes
    for suffix in suffixes:
        path = disk.with_name(f"x{suffix}")
        result = imgcore.convert(disk, path, target_format=format, force=True)
        assert result.target_format == format
    for other in re.findall(r"or use -O (\w+)", message):
        assert imgcore.convert(disk, target, target_format=other).target_format == other


@pytest.mark.parametrize("suffix", FOREIGN)
def test_a_name_of_something_else_states_no_format_to_write(suffix: str, disk: Path) -> None:
    with pytest.raises(
        imgcore.OptionError, match="which is not written: end it in one of"
    ) as error:
        imgcore.convert(disk, disk.with_name(f"x{suffix}"))
    for format in re.findall(r"\.(\w+)", str(error.value).partition("one of")[2]):
        if format != "raw":
            assert imgcore.convert(disk, disk.with_name(f"x.{format}")).target_format == format


@pytest.mark.parametrize(
    "name", ["x.img", "x", "x.vmdk.partial", "out.qcow2.new", "x.bak", "x.vhds", ".vhd", "x.vhd "]
)
@pytest.mark.parametrize("format", format_names())
def test_names_that_state_nothing(name: str, format: str, disk: Path) -> None:
    target = disk.with_name(name)
    imgcore.convert(disk, target, target_format=format)
    assert imgcore.compare(disk, target, format_b=format).identical
    imgcore.create(target, MIB, format=format, force=True)


def test_a_name_may_agree(disk: Path) -> None:
    for entry in DRIVERS:
        for suffix in (*entry.suffixes, entry.suffixes[0].upper()):
            for name in (entry.name, *entry.aliases):
                target = disk.with_name(f"x{suffix}")
                imgcore.convert(disk, target, target_format=name, force=True)
    for name in ("x.raw.gz", "x.img.zst"):
        imgcore.convert(disk, disk.with_name(name), target_format="raw")


def test_the_name_of_a_file_that_is_written_in_place(disk: Path) -> None:
    target = disk.with_name("there.qcow2")
    target.write_bytes(bytes(MIB))
    with pytest.raises(imgcore.OptionError, match="the name states qcow2, but -O states raw"):
        imgcore.convert(disk, target, target_format="raw", in_place=True)
    assert target.read_bytes() == bytes(MIB)


def test_the_name_of_a_block_device_states_nothing(tmp_path: Path) -> None:
    devices = (os.path.join("/dev", name) for name in os.listdir("/dev"))
    device = next((path for path in devices if stat.S_ISBLK(os.stat(path).st_mode)), None)
    if device is None:
        pytest.skip("there is no block device")
    link = tmp_path / "volume.qcow2"
    link.symlink_to(device)
    assert stated_format(link) is None


# -- profiles --------------------------------------------------------------------------

WRONG_NAMES = [
    (profile.name, suffix)
    for profile in PROFILES
    for suffix in (*SUFFIXES, ".ova", ".tar.gz")
    if not profile.is_archived and stated_format(f"x{suffix}") != profile.format
]


@pytest.mark.parametrize(("profile", "suffix"), WRONG_NAMES)
def test_a_profile_does_not_write_under_the_name_of_another_format(
    profile: str, suffix: str, disk: Path
) -> None:
    target = disk.with_name(f"x{suffix}")
    with pytest.raises(imgcore.OptionError, match=f"but the profile {profile} writes") as error:
        imgcore.convert(disk, target, profile=profile)
    assert not others(disk)
    message = str(error.value)
    for right in re.findall(r"end it in (\.\w+)", message):
        imgcore.convert(disk, disk.with_name(f"y{right}"), profile=profile)
    found = re.search(r"a profile that writes (\w+) \((.+)\)", message)
    for other in found[2].split(", ") if found else ():
        result = imgcore.convert(disk, target, profile=other, force=True)
        assert result.target_format == found[1] if found else False


@pytest.mark.parametrize("profile", profile_names())
def test_a_profile_writes_where_the_name_states_nothing(profile: str, disk: Path) -> None:
    target = disk.with_name("x.tar.gz" if profile == "gce" else "x.img")
    imgcore.convert(disk, target, profile=profile)


@pytest.mark.parametrize("name", ["x.raw", "x.vhd", "x.gz", "x.img", "x"])
def test_an_archive_has_the_name_of_one(name: str, disk: Path) -> None:
    with pytest.raises(imgcore.OptionError, match=r"must end in \.tar\.gz or \.tgz"):
        imgcore.convert(disk, disk.with_name(name), profile="gce")
    assert not others(disk)


# -- the command -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        ("convert", "-O", "vhdx", "disk.raw", "x.vhd"),
        ("convert", "--profile", "hyperv", "disk.raw", "x.vhd"),
        # A disk that is too small for Azure is a warning, for targets that are written.
        ("convert", "--profile", "azure", "disk.raw", "x.vhdx"),
        ("convert", "--profile", "aws", "disk.raw", "x.ova"),
        ("convert", "-O", "vpc", "disk.raw", "x.vhdx"),
        ("create", "-f", "qcow2", "x.vmdk", "1M"),
        ("create", "-f", "vpc", "x.vhdx", "1M"),
    ],
)
def test_the_command_refuses_in_one_line(line: tuple[str, ...], disk: Path) -> None:
    done = command(*line, cwd=disk.parent)
    assert_one_line_error(done, "the name states", "end it in", code=2)
    assert not others(disk)


# -- lint ------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("format", [name for name in format_names() if name != "raw"])
def test_lint_tells_a_wrong_name(format: str, profile: str, disk: Path) -> None:
    image = disk.with_name("image")
    imgcore.convert(disk, image, target_format=format)
    for suffix in (*SUFFIXES, ".ova", ".vhdx.gz"):
        named = image.with_name(f"x{suffix}")
        image.rename(named)
        report = imgcore.lint(named, profile=profile, format=format)
        found = [finding for finding in report.findings if finding.rule == "name"]
        is_wrong = stated_format(named) != format
        assert len(found) == is_wrong, (suffix, report)
        if is_wrong:
            assert found[0].message == f"is {format}, but the name states {stated_format(named)}"
            assert found[0].remedy == f"rename it: end the name in {suffix_of(format)}"
            image = named.rename(named.with_suffix(suffix_of(format)))
            again = imgcore.lint(image, profile=profile, format=format)
            assert "name" not in [finding.rule for finding in again.findings]
        else:
            image = named


@pytest.mark.parametrize("name", ["image.img", "image", "image.qcow2.old"])
def test_lint_accepts_a_name_that_states_nothing(name: str, disk: Path) -> None:
    image = disk.with_name(name)
    imgcore.convert(disk, image, target_format="qcow2")
    assert imgcore.lint(image, profile="openstack", format="qcow2").ok


def test_lint_tells_the_wrong_name_of_an_archive(disk: Path) -> None:
    archive = disk.with_name("x.tar.gz")
    imgcore.convert(disk, archive, profile="gce")
    assert imgcore.lint(archive, profile="gce").ok
    for name in ("x.gz", "x", "x.tar"):
        archive = archive.rename(disk.with_name(name))
        (found,) = imgcore.lint(archive, profile="gce").findings
        assert (found.rule, found.remedy) == ("name", "rename it: end the name in .tar.gz")
    assert imgcore.lint(archive.rename(disk.with_name("x.tgz")), profile="gce").ok
