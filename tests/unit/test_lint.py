"""lint: images that break one rule each, and images that keep all rules."""

from __future__ import annotations

import gzip
import json
import os
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import images, qemu, vdi, vhd, vmdk
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as command
from tests.helpers.reading import poke

import imgcore
from imgcore.errors import OptionError, WrongFormatError
from imgcore.platforms.profiles import PROFILES, profile_names
from imgcore.platforms.rules import RULES

MIB = 1 << 20
GIB = 1 << 30
SIZE = 24 * MIB

Make = Callable[[Path], Path]


def raw_disk(folder: Path, size: int = SIZE) -> Path:
    path = folder / "disk.raw"
    images.RawImage("disk", size, lambda: [(0, images.text(200_000)), (5 * MIB, b"x" * 99)]).write(
        path
    )
    return path


def own(folder: Path, name: str, size: int = SIZE, **arguments: Any) -> Path:
    """Convert a small disk with imgcore."""
    path = folder / name
    imgcore.convert(raw_disk(folder, size), path, format="raw", sync=False, **arguments)
    return path


def broken(path: Path, profile: str, **arguments: Any) -> list[str]:
    """Return the names of the broken rules that lint finds."""
    report = imgcore.lint(path, profile=profile, **arguments)
    for finding in report.findings:
        assert finding.message
        assert finding.remedy
        assert "\n" not in finding.message + finding.remedy
    assert report.ok == (not report.findings)
    return [finding.rule for finding in report.findings]


NAMES = {
    "azure": "a.vhd",
    "hyperv": "a.vhdx",
    "xenserver": "a.vhd",
    "esxi": "a.vmdk",
    "aws": "a.vmdk",
    "gce": "a.tar.gz",
    "virtualbox": "a.vdi",
    "openstack": "a.qcow2",
}


def test_every_profile_has_rules_and_every_rule_a_name() -> None:
    assert tuple(RULES) == profile_names() == tuple(NAMES)
    for rules in RULES.values():
        assert len({rule.name for rule in rules}) == len(rules)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_what_convert_writes_breaks_no_rule(profile: Any, tmp_path: Path) -> None:
    path = own(tmp_path, NAMES[profile.name], SIZE + 512, profile=profile.name)
    assert broken(path, profile.name) == []


def test_esxi_takes_vmfs_as_well(tmp_path: Path) -> None:
    assert broken(own(tmp_path, "a.vmdk", options={"subformat": "vmfs"}), "esxi") == []


# -- by format -------------------------------------------------------------------------


def vhd_dynamic(folder: Path, **fields: Any) -> Path:
    return vhd.dynamic(folder / "a.vhd", SIZE, {}, block_nbytes=2 * MIB, **fields)


def fixed_vhd(folder: Path, size: int = SIZE, **fields: Any) -> Path:
    path = folder / "a.vhd"
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(vhd.footer(size, vhd.FIXED, **fields))
    return path


def truncated_footer(folder: Path) -> Path:
    """A footer of 511 bytes, as old Virtual PC versions wrote them."""
    path = fixed_vhd(folder)
    with path.open("r+b") as file:
        file.truncate(SIZE + 511)
    return path


def grown_by_qemu(folder: Path) -> Path:
    path = folder / "a.vhd"
    qemu.run("create", "-q", "-f", "vpc", "-o", "subformat=fixed", path, "30M")
    return path


def without_uuid(folder: Path) -> Path:
    return vhd_dynamic(folder, footer_fields={"uuid": bytes(16)})


def qemu_stream(folder: Path) -> Path:
    path = folder / "a.vmdk"
    qemu.convert(raw_disk(folder), path, qemu.VMDK_STREAM)
    return path


def longer_by(nbytes: int) -> Make:
    def make(folder: Path) -> Path:
        path = own(folder, "a.vmdk", profile="esxi")
        with path.open("ab") as file:
            file.write(bytes(nbytes))
        return path

    return make


def edited_stream(old: bytes, new: bytes) -> Make:
    """Return a maker of streamOptimized images with changed descriptors."""

    def make(folder: Path) -> Path:
        path = own(folder, "a.vmdk", profile="esxi")
        data = path.read_bytes()
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new.ljust(len(old), b"\n")))
        return path

    return make


def stream_version_2(folder: Path) -> Path:
    path = own(folder, "a.vmdk", profile="esxi")
    return poke(path, (4, b"\x02"), (path.stat().st_size - 1024 + 4, b"\x02"))


def stream_out_of_order(folder: Path) -> Path:
    """The first two entries of the first grain table are swapped."""
    path = own(folder, "a.vmdk", profile="esxi")
    data = bytearray(path.read_bytes())
    (directory,) = struct.unpack_from("<Q", data, len(data) - 1024 + 56)
    (table,) = struct.unpack_from("<I", data, directory * 512)
    first, second = struct.unpack_from("<II", data, table * 512)
    assert 0 < first < second
    struct.pack_into("<II", data, table * 512, second, first)
    path.write_bytes(data)
    return path


def damaged_grain(folder: Path) -> Path:
    path = own(folder, "a.vmdk", profile="esxi")
    return poke(path, (128 * 512 + 100, b"\xff" * 64))


def with_backing(folder: Path) -> Path:
    base = raw_disk(folder)
    path = folder / "a.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw", path)
    return path


def with_data_file(folder: Path) -> Path:
    path = folder / "a.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", "-o", f"data_file={folder}/data.raw", path, "1M")
    return path


def child(folder: Path) -> Path:
    own(folder, "base.vhd")
    path = folder / "a.vhd"
    imgcore.create(path, backing="base.vhd", backing_format="vhd", sync=False)
    return path


def orphan(folder: Path) -> Path:
    path = child(folder)
    (folder / "base.vhd").unlink()
    return path


def bad_locator(folder: Path) -> Path:
    """A child with a locator whose name cannot be read."""
    path = child(folder)
    return poke(path, (path.read_bytes().index(b"file://./base.vhd"), b"\xff"))


def orphan_stream(folder: Path) -> Path:
    path = vmdk.stream(folder / "a.vmdk", 512, {1: b"g" * vmdk.GRAIN})
    hint = 'parentFileNameHint="gone.vmdk"'
    line = 'RDONLY 512 SPARSE "a.vmdk"'
    text = vmdk.descriptor("streamOptimized", line, extra=hint, parent="0000abcd")
    return poke(path, (512, text.ljust(20 * 512, b"\0")))


def archive(name: str = "disk.raw", form: int = tarfile.GNU_FORMAT, size: int = GIB) -> Make:
    """Return a maker of archives that are not sparse, by Python's tarfile."""

    def make(folder: Path) -> Path:
        path = folder / "a.tar.gz"
        info = tarfile.TarInfo(name)
        info.size = size
        with gzip.open(path, "wb") as file:
            # lint reads only the header.
            file.write(info.tobuf(form))
        return path

    return make


def vdi_of(**arguments: Any) -> Make:
    return lambda folder: vdi.make(folder / "a.vdi", [0], **arguments)


CASES: list[tuple[str, str, Make, list[str]]] = [
    ("azure", "sound", fixed_vhd, []),
    ("azure", "dynamic", vhd_dynamic, ["format"]),
    ("azure", "qcow2", lambda f: own(f, "a.qcow2"), ["format"]),
    ("azure", "grown-by-qemu", grown_by_qemu, ["size-unit"]),
    ("azure", "odd-size", lambda f: fixed_vhd(f, SIZE + 512), ["size-unit"]),
    ("azure", "small", lambda f: fixed_vhd(f, MIB), ["size-range"]),
    ("azure", "old-footer", truncated_footer, ["vhd-file-size", "vhd-footer"]),
    (
        "azure",
        "two-sizes",
        lambda f: fixed_vhd(f, creator=b"qemu", chs=(723, 4, 17)),
        ["vhd-size"],
    ),
    ("azure", "geometry-unused", lambda f: fixed_vhd(f, creator=b"win ", chs=(723, 4, 17)), []),
    ("hyperv", "vhd", vhd_dynamic, []),
    ("hyperv", "raw", raw_disk, ["format"]),
    ("hyperv", "child", child, []),
    ("hyperv", "orphan", orphan, ["parents"]),
    ("xenserver", "sound", vhd_dynamic, []),
    ("xenserver", "fixed", fixed_vhd, ["format"]),
    ("xenserver", "zero-uuid", without_uuid, ["vhd-uuid"]),
    ("xenserver", "odd", lambda f: vhd.dynamic(f / "a.vhd", 3 * MIB, {}), ["size-unit"]),
    (
        "xenserver",
        "large-blocks",
        lambda f: vhd.dynamic(f / "a.vhd", SIZE, {}, block_nbytes=4 * MIB),
        ["vhd-block-size"],
    ),
    ("xenserver", "header-version", lambda f: vhd_dynamic(f, version=0x00010001), ["vhd-header"]),
    ("xenserver", "header-offset", lambda f: vhd_dynamic(f, data_offset=0), ["vhd-header"]),
    (
        "xenserver",
        "footer-copy",
        lambda f: poke(vhd_dynamic(f), (70, b"\xff")),
        ["vhd-checksums"],
    ),
    (
        "xenserver",
        "no-footer-copy",
        lambda f: poke(vhd_dynamic(f), (0, bytes(512))),
        ["vhd-checksums"],
    ),
    ("xenserver", "header", lambda f: poke(vhd_dynamic(f), (512 + 30, b"\xff")), ["readable"]),
    ("xenserver", "qcow2", lambda f: own(f, "a.qcow2"), ["qcow2"]),
    ("xenserver", "child", child, []),
    ("xenserver", "orphan", orphan, ["parents"]),
    ("xenserver", "locator", bad_locator, ["vhd-locators"]),
    ("esxi", "monolithicSparse", lambda f: own(f, "a.vmdk"), ["format"]),
    ("esxi", "qemu", qemu_stream, ["stream-keys", "stream-end"]),
    ("esxi", "longer", longer_by(512), ["stream-end"]),
    ("esxi", "much-longer", longer_by(127 * 512), ["stream-end"]),
    ("esxi", "no-adapter", edited_stream(b"ddb.adapterType", b"ddb.bdapterType"), ["stream-keys"]),
    ("esxi", "no-encoding", edited_stream(b'encoding="UTF-8"', b""), ["stream-keys"]),
    (
        "esxi",
        "type",
        edited_stream(b'createType="streamOptimized"', b"createType=monolithicSparse"),
        ["stream-type"],
    ),
    ("esxi", "version", stream_version_2, ["stream-version"]),
    ("esxi", "order", stream_out_of_order, ["stream-order"]),
    ("aws", "vhd", vhd_dynamic, []),
    ("aws", "raw", raw_disk, []),
    ("aws", "qcow2", lambda f: own(f, "a.qcow2"), ["format"]),
    ("aws", "monolithicSparse", lambda f: own(f, "a.vmdk"), ["format"]),
    ("aws", "child", child, ["format", "no-parent"]),
    ("gce", "raw", lambda f: raw_disk(f, GIB), ["archive"]),
    ("gce", "odd-raw", raw_disk, ["archive", "size-unit"]),
    ("gce", "qcow2", lambda f: own(f, "a.qcow2", GIB), ["archive"]),
    ("gce", "not-sparse", archive(), ["archive-sparse"]),
    ("gce", "name", archive("other.raw"), ["archive-name", "archive-sparse"]),
    ("gce", "ustar", archive(form=tarfile.USTAR_FORMAT), ["archive-format"]),
    ("gce", "odd", archive(size=GIB + MIB), ["archive-sparse", "size-unit"]),
    ("gce", "gzip", lambda f: own(f, "a.raw.gz"), ["archive"]),
    ("virtualbox", "vmdk", lambda f: own(f, "a.vmdk"), []),
    (
        "virtualbox",
        "zeroed-grain",
        lambda f: own(f, "a.vmdk", options="zeroed_grain=on"),
        ["vmdk-version"],
    ),
    (
        "virtualbox",
        "short-grain",
        lambda f: vmdk.stream(f / "a.vmdk", 200, {1: b"g" * (72 * 512)}),
        ["stream-last-grain"],
    ),
    (
        "virtualbox",
        "cut-grain",
        lambda f: own(f, "a.vmdk", SIZE + 512, profile="esxi"),
        [],
    ),
    ("virtualbox", "orphan-stream", orphan_stream, ["stream-grains", "parents"]),
    ("virtualbox", "qcow2", lambda f: own(f, "a.qcow2"), ["format"]),
    ("virtualbox", "grain", damaged_grain, ["stream-grains"]),
    ("virtualbox", "uuid", vdi_of(uuids=[None, vdi.IDS[0], None, None]), ["vdi-uuid"]),
    ("virtualbox", "blocks", vdi_of(block=65536), ["vdi-block-size"]),
    (
        "virtualbox",
        "vmdk-uuid",
        edited_stream(
            b'ddb.toolsInstallType = "4"\nddb.toolsVersion = "2147483647"\n',
            b'ddb.uuid.image="00000000-0000-0000-0000-000000000000"',
        ),
        ["vmdk-uuid"],
    ),
    ("openstack", "backing", with_backing, ["no-parent"]),
    ("openstack", "data-file", with_data_file, ["qcow2-data-file"]),
    ("openstack", "flat", lambda f: own(f, "a.vmdk", options="subformat=vmfs"), ["vmdk-files"]),
    ("openstack", "fixed-vhd", fixed_vhd, ["format"]),
    ("openstack", "child-vhd", child, ["no-parent"]),
    ("openstack", "raw", raw_disk, []),
    ("openstack", "vdi", vdi_of(), []),
]


@pytest.mark.parametrize(
    ("profile", "make", "expected"),
    [(row[0], row[2], row[3]) for row in CASES],
    ids=[f"{row[0]}-{row[1]}" for row in CASES],
)
def test_rules(profile: str, make: Make, expected: list[str], tmp_path: Path) -> None:
    assert broken(make(tmp_path), profile) == expected


def test_every_rule_is_shown_to_break() -> None:
    """Every rule of every profile has a case above, or a separate test listed here."""
    elsewhere = {"plain-file", "vhd-limit"}
    shared = {"readable", "size-range", "vhd-checksums", "parents", "no-parent", "vhd-footer"}
    shown = {rule for _, _, _, rules in CASES for rule in rules}
    for rules in RULES.values():
        for rule in rules:
            assert rule.name in shown | elsewhere, rule.name
    assert shared <= shown


def test_sizes_past_a_vhd(tmp_path: Path) -> None:
    path = fixed_vhd(tmp_path, 2041 * GIB)
    assert broken(path, "hyperv") == ["vhd-limit"]
    assert broken(path, "xenserver") == ["format", "size-range"]
    assert broken(path, "azure") == []
    large = tmp_path / "a.qcow2"
    imgcore.create(large, 2042 * GIB, sync=False)
    assert broken(large, "xenserver") == []


@pytest.mark.parametrize(("bits", "words"), [(0x200, "sparse"), (0xA00, "sparse and compressed")])
def test_ntfs_attributes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, words: str
) -> None:
    path = vhd_dynamic(tmp_path)
    monkeypatch.setattr(os, "getxattr", lambda *_: (0x20 | bits).to_bytes(4, "big"))
    (finding,) = imgcore.lint(path, profile="hyperv").findings
    assert finding.rule == "plain-file"
    assert words in finding.message


def test_remedy_of_trailing_zeros_works(tmp_path: Path) -> None:
    path = qemu_stream(tmp_path)
    before = {finding.rule: finding for finding in imgcore.lint(path, profile="esxi").findings}
    words = before["stream-end"].remedy.split()
    assert words[:2] == ["truncate", "-s"]
    os.truncate(path, int(words[2]))
    assert broken(path, "esxi") == ["stream-keys"]
    qemu.assert_same(tmp_path / "disk.raw", path, source_format="raw", target_format="vmdk")


@pytest.mark.parametrize("grains", [{}, {1: b"g" * vmdk.GRAIN}], ids=["empty", "one"])
@pytest.mark.parametrize("layout", ["front", "patched", "footer"])
def test_end_of_streams_of_other_programs(
    tmp_path: Path, layout: str, grains: dict[int, bytes]
) -> None:
    """Tables, directory and footer may follow the grains if the header locates them."""
    path = vmdk.stream(tmp_path / "a.vmdk", 512, grains, layout=layout)
    whole_nbytes = path.stat().st_size
    assert broken(path, "esxi") == ["stream-keys"]
    os.truncate(path, whole_nbytes + 512)
    findings = {finding.rule: finding for finding in imgcore.lint(path, profile="esxi").findings}
    assert findings["stream-end"].remedy == f"truncate -s {whole_nbytes} fixes it"


def test_a_stream_without_its_end(tmp_path: Path) -> None:
    path = vmdk.stream(tmp_path / "a.vmdk", 512, {1: b"g" * vmdk.GRAIN}, layout="patched")
    os.truncate(path, path.stat().st_size - 512)
    findings = {finding.rule: finding for finding in imgcore.lint(path, profile="esxi").findings}
    assert "without an end-of-stream marker" in findings["stream-end"].message
    assert "truncate" not in findings["stream-end"].remedy


def test_parent_given(tmp_path: Path) -> None:
    path = child(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "base.vhd").rename(elsewhere / "base.vhd")
    assert broken(path, "hyperv") == ["parents"]
    assert broken(path, "hyperv", parent=elsewhere / "base.vhd") == []
    assert broken(path, "hyperv", allow=[elsewhere]) == ["parents"]


def test_errors(tmp_path: Path) -> None:
    path = tmp_path / "unknown"
    path.write_bytes(b"what is this" * 1000)
    with pytest.raises(WrongFormatError):
        imgcore.lint(path, profile="azure")
    with pytest.raises(OptionError, match="unknown profile"):
        imgcore.lint(path, profile="acme")
    with pytest.raises(FileNotFoundError):
        imgcore.lint(tmp_path / "missing", profile="azure")


def test_damage_on_the_way_is_a_finding(tmp_path: Path) -> None:
    """The rule that reads tables finds a grain table past the end; opening does not."""
    path = own(tmp_path, "a.vmdk", profile="esxi")
    n_bytes = path.stat().st_size
    poke(path, (n_bytes - 2048, b"\xff\xff\xff\x7f"))
    found = {
        finding.rule: finding.message for finding in imgcore.lint(path, profile="esxi").findings
    }
    assert "cannot be verified" in found["stream-order"]


# -- the command -----------------------------------------------------------------------


def test_command(tmp_path: Path) -> None:
    good, bad = fixed_vhd(tmp_path), own(tmp_path, "b.qcow2")
    done = command("lint", "--profile", "azure", good)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "No rule of Microsoft Azure is broken.\n"
    assert command("lint", "-q", "--profile", "azure", good).stdout == ""
    done = command("lint", "--profile", "azure", bad)
    assert done.returncode == 1
    (line,) = done.stdout.splitlines()
    assert line.startswith("format: is qcow2; Microsoft Azure accepts fixed vhd: convert it")


def test_command_json(tmp_path: Path) -> None:
    path = own(tmp_path, "b.qcow2")
    done = command("lint", "--json", "--profile", "aws", path)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert {key: report[key] for key in ("filename", "format", "profile")} == {
        "filename": str(path),
        "format": "qcow2",
        "profile": "aws",
    }
    assert [finding["rule"] for finding in report["findings"]] == ["format"]
    assert set(report["findings"][0]) == {"rule", "message", "remedy"}


def test_command_failures(tmp_path: Path) -> None:
    path = fixed_vhd(tmp_path)
    assert_one_line_error(command("lint", path), "--profile", code=2)
    assert_one_line_error(command("lint", "--profile", "acme", path), "unknown profile", code=2)
    missing = tmp_path / "missing"
    assert_one_line_error(command("lint", "--profile", "gce", missing), str(missing), code=2)


def test_a_format_that_is_stated(tmp_path: Path) -> None:
    path = own(tmp_path, "a.qcow2")
    assert imgcore.lint(path, profile="openstack", format="qcow2").format == "qcow2"
    with pytest.raises(OptionError):
        imgcore.lint(path, profile="openstack", format="floppy")


def test_a_qcow2_without_a_whole_header(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(own(tmp_path, "whole.qcow2").read_bytes()[:100])
    assert broken(path, "openstack") == ["readable"]
