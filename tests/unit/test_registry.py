"""Names, suffixes, detection, options."""

from __future__ import annotations

import gzip
import os
import re
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.helpers import qemu
from tests.helpers.mounts import loop_device

import imgcore
from imgcore.disk.open_options import OpenOptions
from imgcore.disk.source import open_source
from imgcore.errors import OptionError, UnsupportedFeatureError, WrongFormatError
from imgcore.files.host_file import HostFile
from imgcore.files.reference_gate import ReferenceGate
from imgcore.formats import magic, registry
from imgcore.formats.api import Driver, WriteRequest
from imgcore.formats.option_texts import options_help, parse_options
from imgcore.formats.options import FormatOptions, byte_size, choice, flag, number, text
from imgcore.formats.raw.reader import RawReader
from imgcore.formats.registry import (
    NOT_READ,
    Entry,
    canonical_name,
    format_from_suffix,
    format_names,
    get_driver,
    open_reader,
    probe,
)
from imgcore.streams.names import CODEC_OF_SUFFIX, stream_suffix

PAD = bytes(70_000 // 512 * 512)

# How a file of each format starts, and its last sector.
HEADS: dict[str, bytes] = {
    "qcow2": b"QFI\xfb\x00\x00\x00\x03",
    "qcow": b"QFI\xfb\x00\x00\x00\x01",
    "vmdk": b"KDMV\x01\x00\x00\x00",
    "vhd": b"conectix",
    "vhdx": b"vhdxfile",
    "vdi": b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe",
    "parallels": b"WithoutFreeSpace",
    "bochs": b"Bochs Virtual HD Image",
    "qed": b"QED\0",
    "luks": b"LUKS\xba\xbe\x00\x01",
    "cloop": b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop",
    "gzip": b"\x1f\x8b\x08\x00",
    "zstd": b"\x28\xb5\x2f\xfd\x20",
    "xz": b"\xfd7zXZ\x00",
    "bzip2": b"BZh91AY&SY",
    "lz4": b"\x04\x22\x4d\x18\x64",
    "zip": b"PK\x03\x04\x14",
    "7z": b"7z\xbc\xaf\x27\x1c\x00\x04",
    "tar": tarfile.TarInfo("vm.ovf").tobuf(),
    "wim": b"MSWIM\x00\x00\x00\xd0",
    "vma": b"VMA\x00\x00\x00\x00\x01",
    "ewf": b"EVF\x09\r\n\xff\x00\x01",
    "partclone": b"partclone-image0002",
    "android-sparse": b"\x3a\xff\x26\xed\x01",
    "vmware-encrypted": b'.encoding = "UTF-8"\nencryption.keySafe = "vmware:key/list/x"\n',
}
TAILS = {"vhd": b"conectix", "dmg": b"koly\x00\x00\x00\x04"}


def place(folder: Path, name: str, head: bytes = b"", tail: bytes = b"") -> Path:
    path = folder / name
    path.write_bytes(head.ljust(66 * 1024, b"\0") + (tail.ljust(512, b"\0") if tail else b""))
    return path


def found(path: Path) -> str | None:
    with HostFile.open(path) as file:
        return probe(file)


def open_as(path: Path | str, image_format: str | None = None) -> str:
    """Open and return the name of the reader's format."""
    with HostFile.open(path) as file:
        reader = open_reader(file, ReferenceGate(os.path.dirname(path)), image_format)
        try:
            return reader.format_name
        finally:
            reader.close()


class TestProbe:
    @pytest.mark.parametrize("name", HEADS)
    def test_head(self, tmp_path: Path, name: str) -> None:
        assert found(place(tmp_path, "x", HEADS[name])) == name

    @pytest.mark.parametrize("name", TAILS)
    def test_tail(self, tmp_path: Path, name: str) -> None:
        assert found(place(tmp_path, "x", tail=TAILS[name])) == name

    def test_old_footer_of_511_bytes(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_bytes(PAD + b"conectix".ljust(511, b"\0"))
        assert found(tmp_path / "x") == "vhd"

    def test_dynamic_vhd_matches_once(self, tmp_path: Path) -> None:
        assert found(place(tmp_path, "x", HEADS["vhd"], TAILS["vhd"])) == "vhd"

    @pytest.mark.parametrize("data", [b"", b"Q", b"QFI", b"conecti", PAD, b"QFI\0" + PAD])
    def test_nothing(self, tmp_path: Path, data: bytes) -> None:
        (tmp_path / "x").write_bytes(data)
        assert found(tmp_path / "x") is None

    def test_magic_at_another_place(self, tmp_path: Path) -> None:
        assert found(place(tmp_path, "x", bytes(512) + HEADS["qcow2"])) is None

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            (b"# Disk DescriptorFile\nversion=1\n", "vmdk"),
            (b"# Disk DescriptorFile\r\nversion=1\r\n", "vmdk"),
            (b"#disk descriptorfile\n", "vmdk"),
            (b"# a comment\n\n# another\nversion=3\n", "vmdk"),
            (b"version = 2\n", "vmdk"),
            (b" \t#\r\nversion=1\r\n", "vmdk"),
            (b"\r\nversion=1\n", "vmdk"),
            (b"\xef\xbb\xbf# Disk DescriptorFile\n", "vmdk"),
            (b" encryption.keySafe =", "vmware-encrypted"),
            (b"encryption.keySafe=", "vmware-encrypted"),
            (b"version=4\n", None),
            (b"# just a script\necho\n", None),
            (b"#" * 100_000, None),
            (b"\n" * 100_000, None),
        ],
    )
    def test_descriptor(self, tmp_path: Path, text: bytes, name: str | None) -> None:
        (tmp_path / "x").write_bytes(text)
        assert found(tmp_path / "x") == name

    def test_two_matches_are_an_error(self, tmp_path: Path) -> None:
        path = place(tmp_path, "x.qcow2", HEADS["qcow2"], TAILS["vhd"])
        for call in (found, open_as):
            with pytest.raises(
                WrongFormatError, match=r"\(qcow2, vhd\): state the right one with -f"
            ):
                call(path)

    @pytest.mark.parametrize("name", HEADS)
    def test_a_head_is_of_one_format(self, name: str) -> None:
        data = HEADS[name].ljust(66 * 1024, b"\0")
        assert magic.matching_formats(data[:65536], data[-1024:]) == [name]

    def test_nothing_is_of_no_format(self) -> None:
        assert magic.matching_formats(b"", b"") == []
        assert magic.matching_formats(bytes(65536), bytes(1024)) == []

    @pytest.mark.parametrize("variant", qemu.VARIANTS, ids=lambda variant: variant.name)
    def test_what_qemu_img_writes(self, tmp_path: Path, variant: qemu.Variant) -> None:
        raw = place(tmp_path, "source.raw")
        path = tmp_path / f"target{variant.suffix}"
        qemu.convert(raw, path, variant)
        assert found(path) == (None if variant.format == "raw" else variant.format)
        assert open_as(path) == variant.format

    @pytest.mark.parametrize(
        ("image_format", "options", "name"),
        [
            ("vpc", "subformat=fixed", "vhd"),
            ("vpc", "subformat=dynamic", "vhd"),
            ("vhdx", "subformat=dynamic", "vhdx"),
            ("vdi", "static=off", "vdi"),
            ("qcow2", "compat=0.10", "qcow2"),
            ("qed", "cluster_size=65536", "qed"),
            ("qcow", "encryption=off", "qcow"),
        ],
    )
    def test_what_else_qemu_img_writes(
        self, tmp_path: Path, image_format: str, options: str, name: str
    ) -> None:
        path = tmp_path / "x"
        try:
            qemu.run("create", "-f", image_format, "-o", options, path, "4M")
        except AssertionError as error:
            pytest.skip(str(error)[-100:])
        assert found(path) == name


class TestRawRules:
    """Raw is stated, or follows from a suffix if there is no other magic."""

    @pytest.mark.parametrize("suffix", [".raw", ".img", ".dd", ".bin", ".RAW", ".Img"])
    def test_suffix(self, tmp_path: Path, suffix: str) -> None:
        assert open_as(place(tmp_path, f"x{suffix}")) == "raw"

    @pytest.mark.parametrize("name", ["x", "x.iso", "x.vmdk", "x.qcow2", "x.vhd", "raw", ".raw"])
    def test_no_magic_and_no_such_suffix(self, tmp_path: Path, name: str) -> None:
        path = place(tmp_path, name)
        with pytest.raises(WrongFormatError, match="use -f raw") as caught:
            open_as(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert open_as(path, "raw") == "raw"

    @pytest.mark.parametrize("name", [*HEADS, "dmg"])
    def test_suffix_and_other_magic(self, tmp_path: Path, name: str) -> None:
        path = place(tmp_path, "x.raw", HEADS.get(name, b""), TAILS.get(name, b""))
        stated = f"-f {name} or -f raw" if name in format_names() else "-f raw"
        with pytest.raises(WrongFormatError, match=f"magic of {name}: use {stated}$"):
            open_as(path)
        assert open_as(path, "raw") == "raw"

    def test_block_device(self, tmp_path: Path) -> None:
        with loop_device(place(tmp_path, "backing")) as device:
            assert open_as(device) == "raw"
            assert format_from_suffix(device) == "raw"
        with loop_device(place(tmp_path, "backing", HEADS["qcow2"])) as device:
            with pytest.raises(WrongFormatError, match="block device, but has"):
                open_as(device)
            assert open_as(device, "raw") == "raw"


class TestStatedFormat:
    @pytest.mark.parametrize(
        ("name", "stated", "words"),
        [
            ("qcow2", "vmdk", "not a vmdk image: its magic is that of qcow2"),
            ("vmdk", "qcow2", "not a qcow2 image: its magic is that of vmdk"),
            ("luks", "qcow2", "not a qcow2 image: its magic is that of luks"),
            (None, "qcow2", "not a qcow2 image: no known magic"),
        ],
    )
    def test_other_content(self, tmp_path: Path, name: str | None, stated: str, words: str) -> None:
        path = place(tmp_path, "x.raw", HEADS[name] if name else b"")
        with pytest.raises(WrongFormatError, match=words):
            open_as(path, stated)

    def test_is_final_where_detection_is_torn(self, tmp_path: Path) -> None:
        path = tmp_path / "x.qcow2"
        qemu.run("create", "-f", "qcow2", path, "1M")
        with path.open("ab") as file:
            file.write(TAILS["vhd"].ljust(512, b"\0"))
        with pytest.raises(WrongFormatError, match="more than one"):
            open_as(path)
        assert open_as(path, "qcow2") == "qcow2"

    @pytest.mark.parametrize(
        ("name", "line"),
        [
            ("qcow", "QCOW version 1 images are not read: qemu-img convert reads them"),
            ("parallels", "Parallels disks are not read: qemu-img convert reads them"),
            ("bochs", "Bochs disks are not read: qemu-img convert reads them"),
            ("qed", "QED images are not read: qemu-img convert reads them"),
            ("luks", ("LUKS containers are not read: open it with cryptsetup first, or copy it as "
             "it is with -f raw")),
            ("dmg", "Apple DMG images are not read: qemu-img convert reads them"),
            ("cloop", "cloop images are not read: qemu-img convert reads them"),
            ("vmware-encrypted", ("encrypted VMware disks are not read: decrypt the machine in "
             "VMware first")),
            ("android-sparse", ("Android sparse images are not read: simg2img makes a raw disk of "
             "one")),
            ("ewf", "EWF (EnCase) images are not read: ewfexport makes a raw disk of one"),
            ("vma", "Proxmox VMA archives are not read: vma extract unpacks their disks"),
            ("partclone", ("partclone images are not read: partclone.restore makes a raw disk of "
             "one")),
            ("wim", "WIM archives are not read: they hold files, not a disk"),
            ("zip", "zip archives are not read: extract the disk first"),
            ("7z", "7z archives are not read: extract the disk first"),
            ("tar", "tar archives (an OVA is one) are not read: extract the disk first (tar -xf)"),
            ("xz", "xz streams are not read: decompress it first (xz -d)"),
            ("bzip2", "bzip2 streams are not read: decompress it first (bzip2 -d)"),
            ("lz4", "lz4 streams are not read: decompress it first (lz4 -d)"),
        ],
    )  # fmt: skip
    def test_known_by_its_magic_only(self, tmp_path: Path, name: str, line: str) -> None:
        path = place(tmp_path, "x", HEADS.get(name, b""), TAILS.get(name, b""))
        with pytest.raises(UnsupportedFeatureError) as caught:
            open_as(path)
        assert str(caught.value) == f"{path}: {line}"
        words = line.partition(" are ")[0] + " are neither read nor written"
        with pytest.raises(OptionError, match=f"^{re.escape(words)}; known formats: qcow2, vmdk"):
            canonical_name(name)

    def test_every_magic_is_known(self) -> None:
        names = {item.format_name for item in magic.MAGICS} | {name for name, _ in magic._TESTS}
        assert names - set(format_names()) == set(NOT_READ) | set(CODEC_OF_SUFFIX.values())

    def test_unknown_name(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="unknown format 'qcow3'.*qcow2, vmdk, vhd, vhdx"):
            open_as(place(tmp_path, "x"), "qcow3")

    def test_stream_without_a_converter(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedFeatureError, match="zstd"):
            open_as(place(tmp_path, "x.raw.zst", HEADS["zstd"]))


@pytest.mark.parametrize("name", [None, *HEADS])
def test_image_in_a_stream(tmp_path: Path, name: str | None) -> None:
    path = tmp_path / "x.raw.gz"
    path.write_bytes(gzip.compress((HEADS[name] if name else b"").ljust(66 * 1024, b"\0")))
    with open_source(path, OpenOptions()) as source:
        if name is None:
            source.refuse_conversion(with_base=False)
        else:
            with pytest.raises(WrongFormatError, match=f"magic of {name}: decompress"):
                source.refuse_conversion(with_base=False)
    with open_source(path, OpenOptions(format="raw")) as source:
        source.refuse_conversion(with_base=False)


class TestNames:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("a.raw", "raw"),
            ("a.IMG", "raw"),
            ("a.raw.zst", "raw"),
            ("a.img.gz", "raw"),
            ("a.qcow2", "qcow2"),
            ("dir.vmdk/a.vmdk", "vmdk"),
            ("a.vhd", "vhd"),
            ("a.vpc", "vhd"),
            ("a.vhdx", "vhdx"),
            ("a.vdi", "vdi"),
            ("a.qcow2.zst", None),
            ("a.zst", None),
            ("a", None),
            ("raw", None),
            (".raw", None),
            ("dir.raw/a", None),
            ("", None),
        ],
    )
    def test_suffix(self, name: str, expected: str | None) -> None:
        assert format_from_suffix(name) == expected

    @pytest.mark.parametrize(
        ("name", "expected"),
        [("a.raw.zst", ".zst"), ("a.DD.GZ", ".gz"), ("a.vmdk.gz", None), ("a.raw", None)],
    )
    def test_stream_suffix(self, name: str, expected: str | None) -> None:
        assert stream_suffix(name) == expected

    def test_format_names(self) -> None:
        assert {"qcow2", "vmdk", "vdi", "raw"} <= set(format_names())
        assert format_names()[-1] == "raw"
        assert canonical_name("vpc") == "vhd"

    @pytest.mark.parametrize("name", format_names())
    def test_drivers_and_registry_tell_the_same(self, name: str) -> None:
        driver = get_driver(name)
        assert driver.name == name
        assert parse_options(driver) == driver.options()


class ToyReader(RawReader):
    """Reads a file as if it were raw; there is no writer."""

    format_name = "toy"


@pytest.fixture
def read_only_format(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register a format that is only read, as any format is registered."""
    driver = get_driver("raw")._replace(name="toy", reading="toy_reader", writing=None)
    entry = Entry("toy", "toy_driver", (".toy",))
    reader_for = cast("Any", lambda file, gate, values, damage: ToyReader(file))
    monkeypatch.setitem(sys.modules, "toy_reader", SimpleNamespace(reader_for=reader_for))
    monkeypatch.setitem(sys.modules, "toy_driver", cast("Any", SimpleNamespace(DRIVER=driver)))
    monkeypatch.setattr(registry, "DRIVERS", (*registry.DRIVERS, entry))
    monkeypatch.setitem(registry._ENTRIES, "toy", entry)
    monkeypatch.setattr(magic, "MAGICS", (*magic.MAGICS, magic.Magic("toy", 0, b"TOY!")))
    return "toy"


class TestReadOnlyFormat:
    def test_is_read(self, tmp_path: Path, read_only_format: str) -> None:
        path = place(tmp_path, "x.toy", b"TOY!")
        assert imgcore.info(path)["format"] == read_only_format
        assert imgcore.convert(path, tmp_path / "x.qcow2").source_format == read_only_format
        assert imgcore.compare(path, tmp_path / "x.qcow2").identical

    @pytest.mark.parametrize("verb", ["convert", "create", "measure"])
    def test_is_not_written(self, tmp_path: Path, read_only_format: str, verb: str) -> None:
        source, target = place(tmp_path, "x.raw"), tmp_path / "y.toy"
        with pytest.raises(OptionError, match="^toy images can be read, but not written$"):
            if verb == "convert":
                imgcore.convert(source, target)
            elif verb == "create":
                imgcore.create(target, 1 << 20)
            else:
                imgcore.measure(source, target_format=read_only_format)
        assert [path.name for path in tmp_path.iterdir()] == ["x.raw"]


@pytest.mark.parametrize(
    ("name", "subformat"),
    [("raw", None), ("qcow2", None), ("vhd", "fixed"), ("vdi", "fixed"), ("vmdk", "vmfs")],
)
def test_preallocated_disks_need_their_own_blocks(name: str, subformat: str | None) -> None:
    """Their blocks are not reflinks; preallocated tables do not count."""
    driver = get_driver(name)
    kind = {} if subformat is None else {"subformat": subformat}
    modes = {"off": False, "falloc": True, "full": True}
    for mode, needed in (modes | ({"metadata": False} if name == "qcow2" else {})).items():
        options = parse_options(driver, kind | {"preallocation": mode})
        assert driver.writer(WriteRequest(1 << 20, options)).needs_own_blocks is needed
    growing = driver.writer(WriteRequest(1 << 20, parse_options(driver)))
    assert not growing.needs_own_blocks


class Options(FormatOptions):
    cluster_size: int = byte_size(65536, "bytes of a cluster")
    level: int = number(3, "effort")
    lazy: bool = flag("later")
    mode: str = choice("off", ("off", "full"), "how")
    comment: str | None = text(None, "any text")


DRIVER = cast("Driver", SimpleNamespace(name="toy", options=Options))
DEFAULTS = {"cluster_size": 65536, "level": 3, "lazy": False, "mode": "off", "comment": None}


class TestOptions:
    @pytest.mark.parametrize(
        ("texts", "changes"),
        [
            (None, {}),
            ([], {}),
            ([""], {}),
            (["cluster_size=2M"], {"cluster_size": 2 << 20}),
            (["cluster_size=64k,level=0x9,lazy=on", "mode=full"],
             {"cluster_size": 65536, "level": 9, "lazy": True, "mode": "full"}),
            (["lazy"], {"lazy": True}),
            (["lazy=YES"], {"lazy": True}),
            (["lazy=true,lazy=off"], {"lazy": False}),
            (["comment=a,,b=c,level=-1"], {"comment": "a,b=c", "level": -1}),
            (["comment="], {"comment": ""}),
            ("level=4", {"level": 4}),
            ({"level": 5, "lazy": True, "cluster_size": 512}, {"level": 5, "lazy": True,
             "cluster_size": 512}),
            ({"level": "6", "cluster_size": "1k", "lazy": "on"}, {"level": 6, "lazy": True,
             "cluster_size": 1024}),
        ],
    )  # fmt: skip
    def test_parse(self, texts: Any, changes: dict[str, Any]) -> None:
        assert parse_options(DRIVER, texts).as_dict() == DEFAULTS | changes

    @pytest.mark.parametrize(
        ("texts", "words"),
        [
            (
                ["colour=red"],
                "unknown option 'colour' for toy; known options: cluster_size, level, lazy",
            ),
            (["=red"], "unknown option ''"),
            (["cluster_size"], "needs a value"),
            (["cluster_size=big"], "cluster_size of toy: invalid size 'big'"),
            (["level=high"], "level of toy is 'high': a whole number"),
            (["lazy=maybe"], "allowed: on, off"),
            (["mode=half"], "allowed: off, full"),
            ({"cluster_size": -1}, "not negative"),
        ],
    )
    def test_refused(self, texts: Sequence[str], words: str) -> None:
        with pytest.raises(OptionError, match=words):
            parse_options(DRIVER, texts)

    def test_help(self) -> None:
        rows = options_help(DRIVER)
        assert rows[0] == ("cluster_size", "size", "65536", "bytes of a cluster")
        assert rows[2:] == [
            ("lazy", "on|off", "off", "later"),
            ("mode", "off|full", "off", "how"),
            ("comment", "text", "", "any text"),
        ]


def test_each_name_stands_for_one_format() -> None:
    names = [name for entry in registry.DRIVERS for name in (entry.name, *entry.aliases)]
    assert len(names) == len(set(names))
