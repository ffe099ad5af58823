"""Every piece of advice in a message exists on the verb that prints it, and leads on.

`test_every_message_is_listed` finds the messages in the source.  A new one must be
executed here, or name the test that does.
"""

from __future__ import annotations

import ast
import bz2
import gzip
import io
import lzma
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import zstandard
from tests.helpers import openings, qcow2, qemu, vhdx
from tests.helpers.command import imgcore as imgcore_command
from tests.helpers.mounts import loop_device
from tests.helpers.openings import VERBS, command
from tests.helpers.reading import poke

import imgcore

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "imgcore"
# An option, or a word that begins advice.
ADVICE = re.compile(
    r"(?<![\w-])(-[A-Za-z]\b|--[a-z][\w-]+)|\b(use|say|state|try|first|reads? (it|them))\b"
    r"|qemu-img|as it is with|copy it|make it"
)

# ------------------------------------------------------------------------ the scenarios


class Scenario(NamedTuple):
    """A command that fails with ``words``, and the commands that follow the advice."""

    failing: Sequence[object]
    words: str
    advised: Sequence[Sequence[object]]


def _target_exists(folder: Path) -> Scenario:
    raw = openings.disk(folder / "a.raw")
    openings.disk(folder / "b.raw")
    words = ["convert", raw, folder / "b.raw"]
    return Scenario(words, "--force replaces it", [[*words, "--force"]])


def _target_is_a_link(folder: Path) -> Scenario:
    raw = openings.disk(folder / "a.raw")
    (folder / "b.raw").symlink_to("c.raw")
    words = ["convert", raw, folder / "b.raw"]
    return Scenario(words, "--force replaces the link itself", [[*words, "--force"]])


def _no_suffix(folder: Path) -> Scenario:
    raw = openings.disk(folder / "a.raw")
    words = ["convert", raw, folder / "b"]
    return Scenario(words, "state the format with -O", [[*words, "-O", "qcow2"]])


def _no_suffix_to_create(folder: Path) -> Scenario:
    words = ["create", folder / "b", "1M"]
    return Scenario(words, "state the format with -f", [[*words, "-f", "qcow2"]])


def _options_help(folder: Path) -> Scenario:
    words = ["convert", "-o", "help"]
    return Scenario(words, "state it with -O", [[*words, "-O", "qcow2"]])


def _create_options_help(folder: Path) -> Scenario:
    words = ["create", "-o", "help"]
    return Scenario(words, "state it with -f", [[*words, "-f", "qcow2"]])


def _usage(folder: Path) -> Scenario:
    return Scenario(["info"], "try 'imgcore info --help'", [["info", "--help"]])


def _measure_nothing(folder: Path) -> Scenario:
    raw = openings.disk(folder / "a.raw")
    advised = [["measure", raw], ["measure", "--size", "1M"]]
    return Scenario(["measure"], "give either FILE or --size", advised)


def _backing_without_format(folder: Path) -> Scenario:
    openings.disk(folder / "a.raw")
    words = ["create", "-b", "a.raw", folder / "b.qcow2"]
    return Scenario(words, "state it with -F", [[*words, "-F", "raw"]])


def _no_backing_format_of_a_base(folder: Path) -> Scenario:
    images, raw = openings.chain(folder, "qcow2", 2)
    _forget_backing_format(images[1])
    qemu.run("rebase", "-u", "-b", images[0].name, "-F", "qcow2", images[1])
    good = ["convert", "-B", images[1].name, "-F", "qcow2", raw, folder / "new.qcow2"]
    assert imgcore_command(*map(str, good)).returncode == 0
    _forget_backing_format(images[1])
    (folder / "new.qcow2").unlink()
    qemu_words = ["qemu-img", "rebase", "-u", "-b", images[0], "-F", "qcow2", images[1]]
    return Scenario(good, "qemu-img rebase -u -F FORMAT stores it", [qemu_words, good])


def _forget_backing_format(path: Path) -> None:
    content = path.read_bytes()
    assert content.count(b"\xe2\x79\x2a\xca") == 1
    path.write_bytes(content.replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78"))


def _stream_holds_an_image(folder: Path) -> Scenario:
    raw = openings.disk(folder / "a.raw")
    imgcore.convert(raw, folder / "a.qcow2", sync=False)
    stream = folder / "x.raw.gz"
    stream.write_bytes(gzip.compress((folder / "a.qcow2").read_bytes()))
    words = ["convert", stream, folder / "out.raw"]
    advised = [[*words, "-f", "raw"], ["gzip", "-dk", stream], ["info", "-f", "qcow2", "x.raw"]]
    return Scenario(words, "decompress it first, or use -f raw", advised)


def _leads_out(folder: Path) -> Scenario:
    (folder / "vm").mkdir()
    images, _ = openings.chain(folder, "qcow2", 1)
    child = openings.child(folder / "vm", "qcow2", "o.qcow2", images[0])
    words = ["convert", child, folder / "out.raw"]
    return Scenario(words, f"--allow {folder} permits it", [[*words, "--allow", folder]])


def _locked(folder: Path) -> Scenario:
    raw = openings.disk(folder / "a.raw")
    imgcore.convert(raw, folder / "a.qcow2", sync=False)
    words = ["info", folder / "a.qcow2"]
    return Scenario(words, "-U reads it anyway", [[*words, "-U"]])


def _compressed_raw(folder: Path) -> Scenario:
    raw = openings.disk(folder / "a.raw")
    words = ["convert", "-c", raw, folder / "b.raw"]
    advised = [["convert", raw, folder / "b.raw.zst"]]
    return Scenario(words, "name the target .raw.zst instead", advised)


def _fixed_with_a_parent(folder: Path) -> Scenario:
    images, raw = openings.chain(folder, "vhd", 1)
    words = ["convert", "-B", images[0], "-F", "vhd", "-o", "subformat={}", raw, folder / "b.vhd"]

    def with_subformat(name: str) -> list[object]:
        return [word.format(name) if isinstance(word, str) else word for word in words]

    return Scenario(
        with_subformat("fixed"),
        "subformat=dynamic makes a differencing disk",
        [with_subformat("dynamic")],
    )


def _extended_l2(folder: Path) -> Scenario:
    raw = openings.disk(folder / "a.raw")
    image = folder / "a.qcow2"
    qemu.run("convert", "-O", "qcow2", "-o", "extended_l2=on,cluster_size=128k", raw, image)
    return _by_qemu(folder, image, "extended L2 entries: qemu-img convert reads it")


def _data_file(folder: Path) -> Scenario:
    image = folder / "a.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", "-o", f"data_file={folder / 'd.raw'}", image, "1M")
    return _by_qemu(folder, image, "external data file: qemu-img convert reads it, if the image")


def _by_qemu(folder: Path, image: Path, words: str) -> Scenario:
    copy = folder / "copy.qcow2"
    return Scenario(
        ["convert", image, folder / "out.raw"],
        words,
        [["qemu-img", "convert", "-O", "qcow2", image, copy], ["convert", copy, folder / "o.raw"]],
    )


def _encrypted(folder: Path) -> Scenario:
    image, copy = folder / "a.qcow2", folder / "copy.qcow2"
    secret = ["--object", "secret,id=s0,data=abc"]
    options = "encrypt.format=aes,encrypt.key-secret=s0"
    qemu.run("create", "-q", *secret, "-f", "qcow2", "-o", options, image, "1M")
    opened = f"driver=qcow2,file.filename={image},encrypt.key-secret=s0"
    return Scenario(
        ["convert", image, folder / "out.raw"],
        "qemu-img convert decrypts it, given the secret",
        [
            ["qemu-img", "convert", *secret, "--image-opts", opened, "-O", "qcow2", copy],
            ["info", copy],
        ],
    )


def _object(folder: Path) -> Scenario:
    scenario = _encrypted(folder)
    failing = ["info", "--object", "secret,id=s0,data=abc", folder / "a.qcow2"]
    words = "encrypted images are not read: qemu-img convert decrypts them"
    return scenario._replace(failing=failing, words=words)


def _cowd(folder: Path) -> Scenario:
    """The descriptor of an ESXi delta; qemu-img reads both of its kinds."""
    import struct

    extent = struct.pack("<4sIIIIIII", b"COWD", 1, 3, 8192, 128, 4, 1, 0).ljust(2048, b"\0")
    extent += struct.pack("<I", 8).ljust(2048, b"\0") + bytes(4096 * 4)
    (folder / "a-delta.vmdk").write_bytes(extent.ljust(512 * 48, b"\0"))
    image = folder / "a.vmdk"
    image.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=87654321\nparentCID=ffffffff\n"
        'createType="vmfsSparse"\n# Extent description\nRW 8192 VMFSSPARSE "a-delta.vmdk"\n'
    )
    return _by_qemu(folder, image, "'vmfsSparse', which is not supported: qemu-img convert reads")


def _cowd_extent(folder: Path) -> Scenario:
    scenario = _cowd(folder)
    extent = folder / "a-delta.vmdk"
    return scenario._replace(
        failing=["convert", extent, folder / "out.raw"],
        words="descriptor file with another program (qemu-img convert reads it)",
    )


def _snapshots(folder: Path) -> Scenario:
    image = folder / "a.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", image, "1M")
    qcow2.qemu_io(image, "write -P 1 0 64k")
    qemu.run("snapshot", "-c", "old", image)
    copy = folder / "old.qcow2"
    return Scenario(
        ["convert", "-l", "old", image, folder / "out.raw"],
        "qemu-img convert -l NAME makes an image of one",
        [
            ["qemu-img", "convert", "-l", "old", "-O", "qcow2", image, copy],
            ["convert", copy, folder / "out.raw"],
        ],
    )


def _bitmaps(folder: Path) -> Scenario:
    image, copy = folder / "a.qcow2", folder / "copy.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", image, "1M")
    qemu.run("bitmap", "--add", image, "b0")
    return Scenario(
        ["convert", "--bitmaps", image, folder / "out.qcow2"],
        "qemu-img convert --bitmaps copies both",
        [["qemu-img", "convert", "--bitmaps", "-O", "qcow2", image, copy], ["info", copy]],
    )


def _image_opts(folder: Path) -> Scenario:
    images, _ = openings.chain(folder, "qcow2", 1)
    described = 'json:{"driver":"qcow2","file":{"driver":"file","filename":"%s"}}'
    return Scenario(
        ["info", "--image-opts", f"driver=qcow2,file.filename={images[0]}"],
        'its format with -f (or as json:{"driver":...})',
        [["info", "-f", "qcow2", images[0]], ["info", described.replace("%s", str(images[0]))]],
    )


def _target_image_opts(folder: Path) -> Scenario:
    raw = openings.disk(folder / "a.raw")
    return Scenario(
        ["convert", "--target-image-opts", raw, "driver=qcow2,file.filename=b"],
        "its format with -O",
        [["convert", "-O", "qcow2", raw, folder / "b"]],
    )


def _iso(folder: Path) -> Scenario:
    path = folder / "cd.iso"
    path.write_bytes(bytes(0x8001) + b"CD001" + bytes(0x8000 - 6))
    words = ["convert", path, folder / "out.qcow2"]
    return Scenario(
        words, "an ISO 9660 file system (a CD or DVD): use -f raw", [[*words, "-f", "raw"]]
    )


def _no_magic(folder: Path) -> Scenario:
    words = ["convert", openings.disk(folder / "disk"), folder / "out.qcow2"]
    return Scenario(words, "use -f raw if it is a raw disk", [[*words, "-f", "raw"]])


def _two_magics(folder: Path) -> Scenario:
    images, _ = openings.chain(folder, "qcow2", 1)
    content = images[0].read_bytes().ljust(1 << 20, b"\0")
    images[0].write_bytes(content + b"conectix".ljust(512, b"\0"))
    words = ["info", images[0]]
    advised = [[*words, "-f", name] for name in ("qcow2", "raw")]
    return Scenario(words, "state the right one with -f qcow2, -f vhd, -f raw", advised)


def _named_raw(folder: Path) -> Scenario:
    raw = openings.disk(folder / "a.raw")
    imgcore.convert(raw, folder / "b.vhdx", sync=False)
    openings.renamed(folder / "b.vhdx", "b.raw")
    words = ["measure", folder / "b.raw"]
    advised = [[*words, "-f", name] for name in ("vhdx", "raw")]
    return Scenario(words, "use -f vhdx or -f raw", advised)


def _luks(folder: Path) -> Scenario:
    path = folder / "volume"
    path.write_bytes(b"LUKS\xba\xbe\0\2".ljust(1 << 20, b"\0"))
    words = ["convert", path, folder / "out.qcow2"]
    return Scenario(words, "copy it as it is with -f raw", [[*words, "-f", "raw"]])


def _block_device(folder: Path) -> Scenario:
    words = ["create", "-f", "raw", "/dev/IMGCORE-LOOP", "1M"]
    return Scenario(words, "(convert -n; in_place=True", [["convert", "-n"]])


def _unpacked(name: str, pack: Callable[[Path, Path], object], unpack: Sequence[str]) -> object:
    """Return a scenario: a packed image, which a program unpacks."""

    def make(folder: Path) -> Scenario:
        images, _ = openings.chain(folder, "qcow2", 1)
        image = openings.renamed(images[0], "vm.qcow2")
        packed = folder / name
        pack(image, packed)
        image.unlink()
        return Scenario(
            ["convert", packed, folder / "out.raw"],
            "extract the disk first" if name.endswith(("tar", "zip")) else "decompress it first",
            [[*unpack, packed], ["convert", image, folder / "out.raw"]],
        )

    return make


def _written(compress: Callable[[bytes], bytes]) -> Callable[[Path, Path], object]:
    return lambda image, packed: packed.write_bytes(compress(image.read_bytes()))


def _tar(image: Path, packed: Path) -> None:
    with tarfile.open(packed, "w") as archive:
        archive.add(image, image.name)


def _zip(image: Path, packed: Path) -> None:
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(image, image.name)


PACKED: dict[str, object] = {
    "gzip": _unpacked("vm.qcow2.gz", _written(gzip.compress), ["gzip", "-d"]),
    "zstd": _unpacked("vm.qcow2.zst", _written(zstandard.compress), ["zstd", "-d"]),
    "xz": _unpacked("vm.qcow2.xz", _written(lzma.compress), ["xz", "-d"]),
    "bzip2": _unpacked("vm.qcow2.bz2", _written(bz2.compress), ["bzip2", "-d"]),
    "tar": _unpacked("vm.tar", _tar, ["tar", "-xf"]),
    "zip": _unpacked("vm.zip", _zip, ["unzip"]),
}

_REGISTRY, _CHAIN = "formats/registry.py", "disk/chain.py"
EXECUTED: dict[tuple[str, str], Callable[[Path], Scenario]] = {
    ("files/target.py", "exists already; --force replaces it"): _target_exists,
    ("files/target.py", "; --force replaces the link itself"): _target_is_a_link,
    (
        "disk/target_format.py",
        "the name has no suffix of a known format: state the format with {}",
    ): _no_suffix,
    (
        "cli/common.py",
        "the target's format cannot be told from its name: state it with {}",
    ): _options_help,
    ("cli/main.py", "{}{}; try '{} --help'"): _usage,
    ("cli/measure.py", "give either FILE or --size"): _measure_nothing,
    (
        "disk/backing.py",
        "the backing file's format is never guessed: state it with -F",
    ): _backing_without_format,
    (_CHAIN, "qemu-img rebase -u -F FORMAT stores it"): _no_backing_format_of_a_base,
    (
        "disk/stream_source.py",
        "its content carries the magic of {}: decompress it first, or use -f {}",
    ): _stream_holds_an_image,
    (
        "files/reference_gate.py",
        (
            "names {} as its {}, which leads out of its folder; --allow {} permits it "
            "(allow=[...] in Python)"
        ),
    ): _leads_out,
    (
        "formats/raw/options.py",
        "raw cannot be compressed (-c): name the target .raw.zst instead",
    ): _compressed_raw,
    (
        "formats/vhd/options.py",
        "a fixed VHD cannot have a parent (-B): subformat=dynamic makes a differencing disk",
    ): _fixed_with_a_parent,
    ("formats/qcow2/header.py", ": qemu-img convert reads it"): _extended_l2,
    (
        "formats/qcow2/header.py",
        ": qemu-img convert reads it, if the image is trusted",
    ): _data_file,
    ("formats/vmdk/header.py", "qemu-img convert reads it"): _cowd,
    (
        "formats/qcow2/header.py",
        "{} is not supported: qemu-img convert decrypts it, given the secret",
    ): _encrypted,
    (
        "cli/qemu_flags.py",
        (
            "objects of QEMU (keys, throttle groups) do not exist here: -r limits the rate, and "
            "encrypted images are not read: qemu-img convert decrypts them"
        ),
    ): _object,
    (
        "cli/qemu_flags.py",
        (
            "snapshots inside images are listed and changed by snapshot, but not read: qemu-img "
            "convert -l NAME makes an image of one"
        ),
    ): _snapshots,
    (
        "cli/qemu_flags.py",
        (
            "bitmaps are not copied: without this flag the disk is converted; "
            "qemu-img convert --bitmaps copies both"
        ),
    ): _bitmaps,
    (
        "cli/qemu_flags.py",
        (
            "a disk is named by its file: give the file's name, and its format with -f "
            '(or as json:{"driver":...})'
        ),
    ): _image_opts,
    (
        "cli/qemu_flags.py",
        "a target is named by its file: give the file's name, and its format with -O",
    ): _target_image_opts,
    (_REGISTRY, "has {}: use {} raw if it is a raw disk"): _iso,
    (_REGISTRY, "no known format (no magic found): use {} raw if it is a raw disk"): _no_magic,
    (
        _REGISTRY,
        "has the magic of more than one format ({}): state the right one with {}",
    ): _two_magics,
    (_REGISTRY, "{}, but has the magic of {}: use {}"): _named_raw,
    (_REGISTRY, "open it with cryptsetup first"): _luks,
    (_REGISTRY, "{}, or copy it as it is with {} raw"): _luks,
}
# Scenarios of messages without a word by which they are found.
MORE = {
    "no-suffix-to-create": _no_suffix_to_create,
    "create-options-help": _create_options_help,
    "cowd-extent": _cowd_extent,
}

# Messages whose advice another test executes.
_REPAIRED = "-r all repairs this, -r leaks does not"
_REFUSALS = "unit/test_rewrite_cli.py::test_refusals"
ELSEWHERE = {
    ("disk/image_names.py", (
        "only convert and checksum read the standard input: save it to a file first"
    )):
    "unit/test_streams_in.py::TestAdvice",
    ("disk/late_end.py", (
        "an image that is written in place (-n)"
    )):
    "unit/test_streams_in.py::TestAdvice",
    ("disk/late_end.py", (
        "the size of the stream's disk is not known before its end, and {} needs it: give"
        " it (--size)"
    )):
    "unit/test_streams_in.py::TestAdvice",
    ("disk/once_source.py", (
        "a stream cannot be compared with a parent (-B): save it to a file first"
    )):
    "unit/test_streams_in.py::TestAdvice",
    ("streams/once.py", (
        "holds more than {} bytes, the most that the target has room for if the size is "
        "not known from the start: give it (--size)"
    )):
    "unit/test_streams_in.py::test_more_than_there_is_room_for",
    ("disk/streamed.py", (
        "--size is about a stream: an image that is a file has its size"
    )):
    "unit/test_streams_in.py::test_a_size_is_for_streams_only",
    ("disk/streamed.py", (
        "a stream cannot have a parent: save it to a file first"
    )):
    "unit/test_streams_in.py::test_what_streams_refuse",
    ("disk/streamed.py", (
        "a stream is read once, and is not salvaged: save it to a file first"
    )):
    "unit/test_streams_in.py::TestAdvice",
    ("disk/streamed.py", (
        "the stream ends after {} bytes without the footer of a {} image: it is not "
        "complete (if zeros follow the footer, --size states the disk's size)"
    )):
    "unit/test_streams_in.py::TestAdvice",
    ("formats/registry.py", (
        "a {} stream: use {} {} if it holds a raw disk, or decompress it first ({} -dc)"
    )):
    "unit/test_streams_in.py::test_a_compressed_stream_must_be_stated",
    ("formats/shared/flat_writer.py", (
        "preallocation={} needs the size of the disk, which a stream states at its end: "
        "give it (--size)"
    )):
    "unit/test_streams_in.py::TestAdvice",
    ("formats/vmdk/sparse_writer.py", (
        "the header of streamOptimized comes first and states the disk's size, which is "
        "not known before the end of the source: give it (--size)"
    )):
    "unit/test_streams_in.py::TestAdvice",
    ("verbs/checksum.py", (
        "a stream has no tree: save it to a file first"
    )):
    "unit/test_streams_in.py::TestAdvice",
    ("files/stream_input.py", (
        "a stream is read in order, but bytes at 0x{} are needed after those before 0x{}:"
        " save it to a file first"
    )):
    "unit/test_stream_input.py::TestOrder",
    ("files/stream_input.py", (
        "a stream is read in order, but bytes at 0x{} are needed before those at 0x{}: "
        "save it to a file first"
    )):
    "unit/test_stream_input.py::TestOrder",
    ("files/stream_input.py", (
        "the stream's first {} bytes would have to stay in memory, allowed are {}: save "
        "it to a file first"
    )):
    "unit/test_stream_input.py::TestOrder",
    ("disk/batch_journal.py",
     ("what was written of it before the break has changed, between {} and {} of the disk: start "
     "again (imgcore jobs --remove)")): "unit/test_resume.py::TestRefused",
    ("disk/stream_journal.py",
     ("what was written of it before the break has changed, from {} on: start again (imgcore "
     "jobs --remove)")): "unit/test_resume.py::TestGoesOn",
    ("streams/zstd.py",
     "no thread can be made, without which it cannot go on: try again later"):
    "unit/test_resume.py::test_no_thread",
    ("disk/resuming.py",
     ("is the journal of another conversion: {}: repeat that one, or give it up (imgcore jobs "
     "--remove)")): "unit/test_resume.py::TestRefused",
    ("files/resume_journal.py",
     "{}: give it up (imgcore jobs --remove), and start again"): "unit/test_resume.py::TestJobs",
    ("disk/resuming.py",
     ("is the journal of {}: repeat that conversion, give it up (imgcore jobs --remove), or state "
      "another journal")): "unit/test_resume.py::TestRefused",
    ("disk/resuming.py", "a journal cannot be beside a block device: state a file with --journal"):
    "unit/test_resume.py::TestRefused",
    ("files/fingerprint.py",
     "a stream cannot be read again after a break (--resume): save it to a file first"):
    "unit/test_resume.py::TestRefused",
    ("files/target.py",
     ("%s: what is done of it is kept for the same command, until imgcore jobs --remove gives "
     "it up")): "unit/test_resume.py::TestJobs",
    ("files/stream_target.py", ("is a block device: name it as the target instead, with -n "
     "(in_place=True)")): "oracle/test_streams_out.py::test_a_block_device_is_refused",
    ("disk/front_sink.py", ("the tables of the target come first, but a stream shows its data "
     "only when it is read: save the source to a file first")):
    "unit/test_front_sink.py::test_a_stream_as_source_is_refused",
    **{
        ("disk/streamed_source.py", text): "unit/test_streamed_images.py::TestAdvice"
        for text in (
            "a stream cannot be compared with a parent (-B): save it to a file first",
            "it has a parent, which a stream cannot name: save it to a file first",
            "some of its data is in another file or in a log: save it to a file first",
        )
    },
    ("disk/streamed_source.py", "a {} image states its size: --size is not for it"):
    "unit/test_streamed_images.py::test_a_size_is_refused",
    **{
        ("disk/streamed_window.py", text): "unit/test_streamed_images.py::TestAdvice"
        for text in (
            ("a stream is read in order, but blocks at {} and at {} are close on the disk: save it "
            "to a file first"),
            ("a stream is read in order, but bytes at {} are needed after those at {}: save it to "
            "a file first"),
            ("a stream is read in order, but bytes at {} are needed before those at {}: save it to "
            "a file first"),
            ("{} bytes come before the first block of the disk, and would stay in memory; allowed "
            "are {}: save it to a file first"),
        )
    },
    **{
        ("formats/vmdk/streamed.py", text): "unit/test_streamed_images.py::TestAdvice"
        for text in (
            ("grains of more than {} grain tables come before these: save the stream to a file "
            "first"),
            ("the grain for sector {} at {} comes long after others that follow it on the disk: "
            "save the stream to a file first"),
            ("the last grain has {} bytes, expected {} or {}: save the stream to a file first"),
        )
    },
    ("formats/api.py", "tables=front needs a copy: use imgcore convert"):
    "unit/test_front_sink.py::test_rewriting_leaves_tables_in_front_to_a_copy",
    ("formats/vhd/updater.py", ("one of its footers is missing or damaged: imgcore check --repair "
     "restores it from the other one")):
    "unit/test_vhd_update.py::test_a_damaged_footer_is_refused",
    ("formats/vhd/updater.py", ("a machine in a saved state uses this VHD, and would be wrong "
     "about the disk if it were written to: let the machine go on and shut it down first")):
    "unit/test_vhd_update.py::test_a_saved_state_is_refused",
    ("verbs/rebase.py", ("has no backing file, so that all of its disk is its own: imgcore convert "
     "-B FILE -F FMT writes what differs from a backing file to a new image")):
    "oracle/test_rebase.py::test_refusals",
    ("formats/qcow2/updater.py", ("the image {} and is not written to: imgcore check -r all "
     "repairs it")):
    "unit/test_qcow2_update.py::test_a_marked_image_is_refused_until_it_is_repaired",
    ("formats/qcow2/allocation.py", ("clusters {} to {} are used, but have refcounts of 0: imgcore "
     "check -r all corrects them")):
    "unit/test_qcow2_update.py::test_a_cluster_without_a_refcount_is_not_written_to",
    ("formats/qcow2/active_tables.py", ("the L2 table at {} has a refcount of 0: imgcore check "
     "-r all corrects it")):
    "unit/test_qcow2_update.py::test_an_l2_table_without_a_refcount_is_not_written_to",
    ("verbs/sync.py", ("its disk has {} bytes, and that of the source {}: state that it may grow "
     "(--resize)")): "unit/test_sync.py::test_the_command",
    ("cli/snapshot.py", "give one of -l, -c, -a and -d"):
    "unit/test_snapshots.py::test_the_command",
    ("cli/snapshot.py", "-U is for -l: no other program may write meanwhile"):
    "unit/test_snapshots.py::test_the_command",
    ("formats/qcow2/allocation.py", ("cluster {} has the refcount {}, fewer than its references: "
     "imgcore check -r all corrects it")):
    "unit/test_snapshots.py::test_damaged_refcounts_are_found_before_anything_changes",
    ("disk/image.py", ("the disk has {} bytes and would lose those after {}: state that it may "
     "shrink (--shrink; shrink=True in Python)")):
    "unit/test_writing.py::test_a_disk_that_shrinks_must_be_meant_to",
    ("disk/reflinks.py", ("--reflink=strict: {} of {} would have to be copied; --reflink=always "
     "copies them")):
    "oracle/test_reflink_always.py::test_strict_refuses_copies_before_anything_is_written",
    ("disk/reflinks.py", ("--reflink={}: its blocks cannot be reflinked to {} ({}); "
     "--reflink=auto copies what cannot be reflinked")):
    "oracle/test_reflink_always.py::test_ext4_is_refused_not_copied",
    ("areas/reading.py", ("a change tracking file of VMware, whose layout is not public: use the "
     "JSON of QueryChangedDiskAreas")): "unit/test_areas.py::test_a_change_tracking_file",
    ("cli/measure.py", "--rewrite measures FILE, not --size"):
    "unit/test_rewrite_cli.py::test_measure_rewrite_has_its_own_options",
    ("cli/rewrite.py", "give either --undo or --finish"): _REFUSALS,
    ("cli/rewrite.py", "state the new format with -O"): _REFUSALS,
    ("disk/children.py", ("more than {} files are beside it, any of which may be its child: "
     "move it to another folder first")): "unit/test_rewrite_cli.py::test_too_many_files",
    ("rewriting/director.py", ("only {} of {} could stay in place: another block size may fit "
     "better (imgcore measure --rewrite), or imgcore convert writes a new image")): _REFUSALS,
    ("rewriting/director.py", ("{} of its disk are compressed, and {} cannot refer to these "
     "blocks: --inflate stores them decompressed, or imgcore convert writes a new image")):
    _REFUSALS,
    ("rewriting/naming.py", "--name and --keep-name are both given: give one of them"): _REFUSALS,
    ("rewriting/naming.py", "--name {}: the image stays in its folder: give a name without one"):
    _REFUSALS,
    ("rewriting/refusals.py", "{}; --drop rewrites it without"): _REFUSALS,
    ("rewriting/refusals.py", ("its tables contradict each other ({}): imgcore check -r all mends "
     "some images, and imgcore convert makes a new one of what it reads")): _REFUSALS,
    ("verbs/rewrite.py", "one of the two files of a disk is {}: --name states another name"):
    _REFUSALS,
    ("disk/source.py", ("a compressed raw disk cannot be one of several sources: decompress it "
     "first (imgcore convert {} {})")):
    "oracle/test_concatenation.py::test_the_advice_for_streams_works",
    ("files/target.py", "; -n (in_place=True) writes into the existing file"):
    "unit/test_target.py::TestReplaceable",
    ("files/replacing.py", ("its folder {} is append-only, where no file can be renamed; chattr -a "
     "{} permits it")): "unit/test_target.py::TestReplaceable",
    ("files/replacing.py", ("is immutable or append-only and cannot be replaced; chattr -i -a {} "
     "permits it")): "unit/test_target.py::TestReplaceable",
    ("files/descriptors.py", "root may raise it: prlimit --nofile=N COMMAND"):
    "faults/test_descriptors.py::test_many_extents",
    ("cli/diff.py", ("give two images, or one image and one of --since, --bitmap, --areas and "
     "--tree")): "unit/test_changes.py::test_diff",
    ("cli/progress.py", ("--progress=qemu and the result both print on stdout: use "
     "--progress=json, which prints on stderr")):
    "unit/test_qemu_flags.py::test_progress_leaves_stdout_to_json",
    ("formats/options.py", "state the backing file with -b FILE -F FMT"):
    "unit/test_qemu_flags.py::test_a_backing_file_is_stated_as_advised",
    ("formats/options.py", "state the format of the backing file with -F FMT"):
    "unit/test_qemu_flags.py::test_a_backing_file_is_stated_as_advised",
    ("formats/vhdx/header.py", ("its metadata for children has {} bytes, at most {} are copied: "
     "convert without -B")): "unit/test_advice.py::test_other_commands",
    ("formats/vhdx/options.py", ("the parent has {} {}, at most {} fit into its child: convert "
     "without -B")): "unit/test_advice.py::test_other_commands",
    **{
        ("cli/qemu_flags.py", text): "unit/test_advice.py::test_other_commands"
        for text in (
            "convert writes a new image with other options (-o)",
            "imgcore has no {}: {}; see imgcore --help",
            "the backing file is opened to verify it: make the backing file first",
        )
    },
    ("disk/target_format.py", ", or use a profile that writes {} ({})"):
    "unit/test_names.py::test_a_profile_does_not_write_under_the_name_of_another_format",
    **{
        (module, f"{what}: {_REPAIRED}"): "unit/test_not_repaired.py::test_what_stays"
        for module, what in (
            ("formats/vdi/check.py", "the count of blocks"),
            ("formats/vhd/check.py", "the footer or its copy"),
            ("formats/vhdx/check.py", "damaged copies of headers"),
        )
    },
    ("formats/qcow2/repair.py", f"{{}} {{}}: {_REPAIRED}"):
    "unit/test_repair.py::test_a_copied_flag_of_a_compressed_cluster",
    ("formats/vdi/check.py", ("the count of blocks: VirtualBox derives from it where the next "
     "block goes, and would overwrite one in use, because there are leaked blocks between them; "
     "imgcore convert writes an image without these")):
    "unit/test_not_repaired.py::test_what_stays",
    ("formats/vhdx/check.py", ("the log must be replayed first, by the program that wrote it; "
     "imgcore convert writes an image with an empty log")):
    "unit/test_advice.py::test_an_image_with_a_log",
    ("formats/vdi/rewriter.py", ("the first block would be at {} of the file, in a VDI it is at "
     "most at {}: imgcore convert writes one")):
    "unit/test_vdi_rewrite.py::test_the_first_block_lies_below_4_gib",
    ("formats/vhd/rewriter.py", "-o subformat=fixed makes a fixed one"):
    "unit/test_flat_rewrite.py::test_refusals",
    ("formats/vhdx/rewriter.py", ("a VHDX with subformat=fixed has all its blocks, which another "
     "image need not have: leave subformat out, or use imgcore convert")):
    "unit/test_vhdx_rewrite.py::test_options",
    ("formats/vmdk/reader.py", "copy it there"):
    "unit/test_references.py::test_who_asked_for_the_file",
    ("files/reference_gate.py", "make it and its folders readable"):
    "unit/test_references.py::test_a_file_that_may_not_be_read",
    (_CHAIN, "state it with {}"): "unit/test_references.py::"
    "test_the_advice_for_a_missing_parent_works",
    (_CHAIN, "state it with {}, given once for each level from the first parent on"):
    "unit/test_references.py::test_the_advice_for_a_missing_parent_works",
    (_CHAIN, "state it ({})"): "unit/test_advice.py::test_the_backing_files_format",
    (_CHAIN, ": qemu-img convert reads the whole chain"):
    "unit/test_advice.py::test_a_backing_file_of_a_format_that_is_not_read",
    ("disk/image_names.py", ("URLs and protocols are not read: copy the disk to a file first "
     "(qemu-img convert reads most of them)")):
    "unit/test_image_names.py::test_qemu_img_reads_a_url",
    ("files/locks.py",
     "in use by {}, which writes to it (QEMU's image lock); -U reads it anyway"):
    "unit/test_advice.py::test_an_image_that_is_in_use",
    ("files/reference_gate.py",
     ("names {} as its {}, which is not opened, because only the content says what the image is: "
     "state its format ({})")): "unit/test_by_content.py::test_parents_stay_closed",
    ("files/target.py",
     ("is a block device: what is on it is overwritten only on request (convert -n; in_place=True "
     "in Python)")): "unit/test_advice.py::test_a_block_device",
    ("files/target_folder.py", "has appeared meanwhile; --force replaces it"):
    "unit/test_target.py::TestExisting",
    ("formats/qcow2/reader.py",
     "internal snapshots ({}) are left out; qemu-img convert -l NAME makes an image of one"):
    "unit/test_advice.py::test_what_a_conversion_leaves_out",
    ("formats/qcow2/reader.py",
     ("persistent bitmaps ({}) are left out: the next incremental backup of the target must be a "
     "full one; qemu-img convert --bitmaps keeps them")):
    "unit/test_advice.py::test_what_a_conversion_leaves_out",
    ("formats/qcow2/reader.py", "%s: the image has no refcount table; check -r all rebuilds it"):
    "oracle/test_repair.py::test_a_header_without_a_table",
    (_REGISTRY, "the name does not state the format; the content is that of {} ({} {} states it)"):
    "unit/test_by_content.py::test_the_content_decides",
    (_REGISTRY, "{} to read it"): "unit/test_by_content.py::test_info_answers_against_the_name",
    ("disk/image_names.py", ("URLs and protocols are not written: write a file and copy it from "
     "there (qemu-img convert writes most of them)")):
    "unit/test_image_names.py::test_urls_as_targets",
    (_REGISTRY, ("a {} stream has no random access: only convert, info and measure read it, so "
     "decompress it first")): "unit/test_advice.py::test_a_stream",
    (_REGISTRY, "qemu-img convert reads them"): "unit/test_advice.py::test_formats_of_qemu",
    **{
        (_REGISTRY, text): "unit/test_advice.py::test_packed"
        for text in (
            "extract the disk first", "decompress it first", "{} (xz -d)", "{} (bzip2 -d)",
            "{} (lz4 -d)",
            ("a {} stream: only raw disks are read compressed, by names such as disk.raw{}; {} "
            "({} -d)"),
        )
    },
    ("formats/vhd/header.py",
     "no VHD footer at the end or the start (-f raw reads what is left of a fixed disk)"):
    "unit/test_salvage.py::test_what_is_left_of_a_fixed_vhd",
    ("streams/zstd.py",
     "the zstd stream is followed by {} other bytes (truncate -s {} of a copy removes them)"):
    "unit/test_stream.py::test_the_advice_for_what_follows_zstd",
    ("files/update_file.py",
     "is immutable or append-only; chattr -i -a {} permits writing to it"):
    "oracle/test_locks.py::TestWhatCannotBeWritten",
    ("files/in_place_job.py",
     "is immutable or append-only; chattr -i -a {} permits rewriting it"):
    "unit/test_in_place.py::test_immutable",
    ("files/in_place.py",
     ("its last conversion can still be undone ({}): imgcore rewrite --finish keeps the image as "
      "it is, --undo restores the one before")):
    "unit/test_in_place.py::test_a_conversion_that_can_be_undone_is_kept",
    ("formats/vhd/lint.py", "imgcore check --repair, or convert"):
    "unit/test_advice.py::test_remedies_of_lint",
    ("formats/vmdk/lint.py", "truncate -s {} fixes it"):
    "unit/test_advice.py::test_remedies_of_lint",
    ("platforms/rules.py", "pack it with tar --format=oldgnu -Sczf IMAGE.tar.gz disk.raw"):
    "unit/test_advice.py::test_remedies_of_lint",
    ("platforms/rules.py", "convert it with imgcore convert --profile {}"):
    "unit/test_advice.py::test_remedies_of_lint",
}  # fmt: skip

# Messages about options in use: the verbs that have them.
NAMED = {
    ("disk/resuming.py", "%s: an unfinished conversion (--resume) of it is given up"):
    ("convert",),
    ("disk/resuming.py", "--resume keeps what is on stable storage: it contradicts --no-sync"):
    ("convert",),
    ("disk/resuming.py", "-o {}"): ("convert",),
    ("disk/resuming.py", "the digest (--checksum, --verify, --receipt)"): ("convert",),
    ("disk/resuming.py",
     "a stream cannot be written again after a break: name a file, or leave out --resume"):
    ("convert",),
    ("disk/resuming.py", "it copies nothing that a break could cost: leave out --resume"):
    ("convert",),
    ("disk/resuming.py",
     "the list of what is lost cannot be kept after a break: leave out --resume"): ("convert",),
    ("disk/resuming.py", "--journal is about --resume, which is not given"): ("convert",),
    ("cli/commit.py", "--remove contradicts -d and -b"): ("commit",),
    ("verbs/convert.py", "--base and -B both state the target's backing file"): ("convert",),
    ("verbs/convert.py", "--verify reads the target back, which is not possible for a stream"):
    ("convert",),
    ("disk/sink_options.py",
     "a stream has no folder, in which its parent (-B) could be found"): ("convert",),
    ("disk/sink_options.py",
     "a stream is not written in place (-n): name a file or a block device"): ("convert",),
    ("cli/convert.py", "--no-reflink contradicts --reflink={}"): ("convert",),
    ("cli/measure.py", "--reflink measures FILE, without -c or --rewrite"): ("measure",),
    ("disk/reflinks.py", "--reflink={}: {}"): ("convert",),
    ("disk/sink_options.py", "-S 0"): ("convert",),
    ("cli/measure.py", "--rewrite goes with -f, -O, -o, --allow and -U only"): ("measure",),
    ("disk/backing.py", "a format of the backing file is given (-F), but no backing file"):
    ("convert", "create"),
    ("disk/image_sink.py", ("blocks of {} bytes are too large to be compared with a parent (-B): "
     "at most {} are allowed")): ("convert",),
    ("disk/concatenated_source.py", "several sources cannot be combined with -B"): ("convert",),
    ("disk/profile_fitting.py", "the profile {} does not allow a parent (-B)"): ("convert",),
    ("disk/profile_fitting.py", "the profile {} does not allow -n or -c"): ("convert",),
    ("disk/sink.py", "a compressed raw stream cannot be written in place (-n)"): ("convert",),
    ("disk/sink.py", "a compressed raw stream does not allow -c, -B or -o"): ("convert",),
    ("disk/sink_options.py", "--target-is-zero is about an existing target: it needs -n"):
    ("convert",),
    ("disk/sink_options.py", "--target-is-zero: with a parent (-B) the target's disk is not zeros"):
    ("convert",),
    ("disk/sink_options.py", "-S {}: it must be a multiple of {}, at most {}"): ("convert",),
    ("disk/sink_options.py", "salvaged data cannot be compared with a parent (-B)"): ("convert",),
    ("disk/sink_options.py", "blocks that are salvaged cannot be trusted (--trust-blocks)"):
    ("convert",),
    ("disk/stream_source.py", "a compressed raw source cannot be combined with -B"): ("convert",),
    ("formats/raw/options.py", "raw cannot have a backing file (-B)"): ("convert",),
    ("formats/raw/options.py", "-S is {}: a multiple of {} bytes is needed"): ("convert",),
    ("formats/shared/write_checks.py", "{} cannot be compressed (-c)"): ("convert", "measure"),
    ("formats/vdi/options.py", "a fixed VDI cannot have a parent (-B)"): ("convert",),
    ("formats/vdi/options.py", "the parent (-B) of a VDI must be a VDI, not {}"): ("convert",),
    ("formats/vhdx/options.py", "a vhdx disk with subformat=fixed cannot have a parent (-B)"):
    ("convert",),
    ("formats/vmdk/options.py", "-c writes streamOptimized, not subformat={}"):
    ("convert", "measure"),
    ("formats/vmdk/options.py", "writing a VMDK with a backing file (-B) is not supported yet"):
    ("convert",),
    ("disk/target_format.py", ", or use {} {}"): ("convert",),
    ("verbs/check.py", "an image that another process may write to cannot be repaired (-U)"):
    ("check",),
    ("verbs/convert.py", "--verify reads what is on stable storage: it contradicts --no-sync"):
    ("convert",),
    ("cli/checksum.py", "--check takes the names of the images from LIST"): ("checksum",),
    ("cli/checksum.py", "--tree is the tree of one FILE"): ("checksum",),
    ("cli/compare.py", "--{}: with --tree, A's options are for the image"): ("compare",),
    ("cli/compare.py", "--strict compares images, and --tree a tree"): ("compare",),
}  # fmt: skip

# Texts without advice, help of options, and advice that needs a huge disk or a program
# of another system.
OTHERS = frozenset(
    {
        "its first record is not as imgcore writes it",
        "no first record",
        (
            "front: tables precede all data, as in streams; data is what the source's tables "
            "state, zeros included"
        ),
        "it does not state a {}",
        "-F, --parent-b and --read-options-b are for a second image",
        "--json and --bmap are two kinds of output",
        "in use by {} (QEMU's image lock)",
        "The block device is in use or mounted",
        "is in use: a program has it open, or did not close it, and it may lack changes",
        (
            "backing file name at {} to {}, allowed after the header ({}) and inside the first "
            "cluster ({})"
        ),
        "the block map ends at {}, after the start of the first block ({})",
        "Kind of VHD; with -B, dynamic makes a differencing disk",
        "The size to use, regardless of the creator",
        "Kind of VMDK (default: monolithicSparse, with -c streamOptimized)",
        "{} has a state or bits that are reserved",
        "the two region tables differ: the first one is used",
        "has the reserved state {}",
        "{} of its blocks of {} bytes {} of {}, the first at 0x{}",
        "the footer does not say where the grain directory is",
        "the first file is named {}, not {}",
        (
            "the refcount table needs {} bytes, allowed up to {}: use larger clusters or fewer "
            "refcount_bits"
        ),
        (
            "{} clusters of {} bytes are too many to count, allowed up to {}: use a larger "
            "cluster_size"
        ),
        "data at {}: a sparse VMDK file holds at most {} bytes (use a flat subformat)",
        "{} bytes need {} grain directory entries, allowed up to {}: use a larger grain_size",
        "copy it to a file that is neither",
        "no image becomes {} without copying: use imgcore convert",
        "decrypt the machine in VMware first",
        "the disk is encrypted (ddb.iofilters): decrypt it in vSphere first",
        "the digest (--checksum, --verify, --receipt)",
    }
)


def messages() -> Iterator[tuple[str, str]]:
    """Yield module and text of each string in the source that may hold advice."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        skipped: set[ast.AST] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                skipped.add(node.value)  # a docstring
            if isinstance(node, ast.keyword) and node.arg in ("help", "metavar"):
                skipped.update(ast.walk(node.value))
            if isinstance(node, ast.Dict):
                skipped.update(
                    value
                    for key, value in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant) and key.value in ("help", "metavar")
                )
            if isinstance(node, ast.JoinedStr):
                skipped.update(part for part in node.values if isinstance(part, ast.Constant))
        for node in ast.walk(tree):
            text = None if node in skipped else _text_of(node)
            if text is not None and " " in text and ADVICE.search(text):
                yield str(path.relative_to(PACKAGE)), text


def _text_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
        )
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def test_every_message_is_listed() -> None:
    listed = {*EXECUTED, *ELSEWHERE, *NAMED}
    found = set(messages())
    assert {item for item in found - listed if item[1] not in OTHERS} == set()
    assert listed - found == set()
    assert {text for _, text in found} >= OTHERS


@pytest.mark.parametrize("test", sorted(set(ELSEWHERE.values())))
def test_the_tests_exist(test: str) -> None:
    file, _, name = test.partition("::")
    text = (ROOT / "tests" / file).read_text()
    assert re.search(rf"^(def|class) {name}\b", text, re.MULTILINE), test


def flags_of(verb: str) -> set[str]:
    found = import_module(f"imgcore.cli.{verb}").command
    return {flag for param in found.params for flag in (*param.opts, *param.secondary_opts)}


@pytest.mark.parametrize(("message", "verbs"), NAMED.items(), ids=lambda item: str(item)[:60])
def test_options_in_messages_exist(message: tuple[str, str], verbs: tuple[str, ...]) -> None:
    for flag in re.findall(r"(?<![\w-])(-[A-Za-z]\b|--[a-z][\w-]+)", message[1]):
        for verb in verbs:
            assert flag in flags_of(verb), (flag, verb)


# ------------------------------------------------------------------------ the execution

SCENARIOS = {
    **{f"{module}: {text[:50]}": make for (module, text), make in EXECUTED.items()},
    **MORE,
}


def run(words: Sequence[object], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run imgcore's verb, or another program, in a folder."""
    texts = [str(word) for word in words]
    if (PACKAGE / "cli" / f"{texts[0]}.py").exists():
        return imgcore_command(*texts, cwd=folder)
    if shutil.which(texts[0]) is None:
        pytest.skip(f"no {texts[0]}")
    return subprocess.run(texts, cwd=folder, capture_output=True, text=True, check=False)


def follow(scenario: Scenario, folder: Path) -> None:
    """Fail unless the message appears, and each piece of advice works."""
    done = run(scenario.failing, folder)
    assert done.returncode in (1, 2), done.stderr
    line = done.stderr.splitlines()[-1]
    assert scenario.words in line, line
    for words in scenario.advised:
        (folder / "out.qcow2").unlink(missing_ok=True)
        (folder / "out.raw").unlink(missing_ok=True)
        done = run(words, folder)
        assert done.returncode == 0, (words, done.stderr)


@pytest.mark.parametrize("name", [name for name in SCENARIOS if "in use" not in name])
def test_advice_leads_on(name: str, tmp_path: Path) -> None:
    follow(SCENARIOS[name](tmp_path), tmp_path)


@pytest.mark.parametrize("name", PACKED)
def test_packed(name: str, tmp_path: Path) -> None:
    make = PACKED[name]
    assert callable(make)
    follow(make(tmp_path), tmp_path)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("suffix", ["", ".img"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_images_of_any_name(name: str, suffix: str, verb: str, tmp_path: Path) -> None:
    """Each verb says in one line what the file is and what to do."""
    make = PACKED[name]
    assert callable(make)
    packed = Path(str(make(tmp_path).failing[1]))
    image = openings.renamed(packed, f"disk{suffix}")
    done = imgcore_command(*command(verb, image, tmp_path / "disk.raw"))
    assert done.returncode
    text = done.stdout + done.stderr
    assert name in text
    assert re.search(r"decompress it first|extract the disk first", text) or verb == "lint"
    assert "-f raw" not in text
    assert len(done.stderr.splitlines()) <= 1


@pytest.mark.parametrize("image_format", ["qed", "qcow", "parallels"])
def test_formats_of_qemu(image_format: str, tmp_path: Path) -> None:
    raw = openings.disk(tmp_path / "a.raw")
    image = tmp_path / f"a.{image_format}"
    qemu.run("convert", "-O", image_format, raw, image)
    follow(_by_qemu(tmp_path, image, "are not read: qemu-img convert reads them"), tmp_path)


def test_a_backing_file_of_a_format_that_is_not_read(tmp_path: Path) -> None:
    raw = openings.disk(tmp_path / "a.raw")
    qemu.run("convert", "-O", "qed", raw, tmp_path / "a.qed")
    image = tmp_path / "o.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", "-F", "qed", "-b", "a.qed", image)
    follow(_by_qemu(tmp_path, image, "not supported: qemu-img convert reads the whole"), tmp_path)


# Verbs that open the chain.
CHAIN_VERBS = ("convert", "map", "measure", "compare-a", "compare-b")


@pytest.mark.parametrize("verb", [*CHAIN_VERBS, "check", "lint", "info"])
def test_the_backing_files_format(verb: str, tmp_path: Path) -> None:
    """It can be stated by an option of each verb that needs it."""
    images, raw = openings.chain(tmp_path, "qcow2", 2)
    _forget_backing_format(images[1])
    options = {"check": ["--parent", str(images[0])], "info": ["--backing-chain"]}.get(verb, [])
    done = imgcore_command(*command(verb, images[1], raw, *options))
    assert done.returncode
    (flag,) = re.findall(r"never guessed: state it \((--[\w-]+)\)", done.stdout + done.stderr)
    done = imgcore_command(*command(verb, images[1], raw, *options, flag, "qcow2"))
    assert done.returncode == 0 or verb == "lint", done.stderr
    assert "never guessed" not in done.stdout + done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_an_image_that_is_in_use(verb: str, tmp_path: Path) -> None:
    images, raw = openings.chain(tmp_path, "qcow2", 1)
    with qemu.held_open("-f", "qcow2", images[0]):
        done = imgcore_command(*command(verb, images[0], raw))
        assert "; -U reads it anyway" in done.stderr
        done = imgcore_command(*command(verb, images[0], raw, "-U"))
        assert done.returncode == 0 or verb == "lint", done.stderr


def test_a_block_device(tmp_path: Path) -> None:
    raw = openings.disk(tmp_path / "a.raw")
    with loop_device(openings.disk(tmp_path / "b", seed=7)) as device:
        done = imgcore_command("convert", "-O", "raw", raw, device)
        assert "(convert -n; in_place=True in Python)" in done.stderr
        done = imgcore_command("convert", "-n", "-O", "raw", raw, device)
        assert done.returncode == 0, done.stderr


def test_a_stream(tmp_path: Path) -> None:
    raw = openings.disk(tmp_path / "a.raw")
    content = gzip.compress(raw.read_bytes())
    (tmp_path / "b.raw.gz").write_bytes(content)
    done = imgcore_command("map", tmp_path / "b.raw.gz")
    assert "only convert, info and measure read it" in done.stderr
    for verb in ("convert", "info", "measure"):
        done = imgcore_command(*command(verb, tmp_path / "b.raw.gz", raw))
        assert done.returncode == 0, done.stderr


def test_an_odd_raw_disk(tmp_path: Path) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(1000))
    done = imgcore_command("info", raw)
    for size in re.findall(r"truncate -s (\d+)", done.stderr):
        with raw.open("r+b") as file:
            file.truncate(int(size))
    assert imgcore_command("info", raw).returncode == 0


def test_what_a_conversion_leaves_out(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", image, "1M")
    done = imgcore_command("convert", image, tmp_path / "b.qcow2")
    assert (done.returncode, done.stderr) == (0, "")
    qemu.run("snapshot", "-c", "old", image)
    qemu.run("bitmap", "--add", image, "b0")
    done = imgcore_command("convert", image, tmp_path / "c.vmdk")
    assert done.returncode == 0
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == ["warning"] * 2
    assert "internal snapshots (1) are left out" in done.stderr
    assert "persistent bitmaps (1) are left out" in done.stderr
    assert imgcore_command("convert", "-q", image, tmp_path / "d.vmdk").stderr == ""


def test_remedies_of_lint(tmp_path: Path) -> None:
    raw = openings.disk(tmp_path / "disk.raw")
    # A damaged footer, of which there is a copy.
    vhd = tmp_path / "a.vhd"
    imgcore.convert(raw, vhd, sync=False)
    content = bytearray(vhd.read_bytes())
    content[-500] ^= 1
    vhd.write_bytes(content)
    words = ["lint", "--profile", "hyperv", vhd]
    done = run(words, tmp_path)
    assert "imgcore check --repair, or convert" in done.stdout
    assert run(["check", "--repair", vhd], tmp_path).returncode == 0
    assert run(words, tmp_path).returncode == 0
    # Zeros after the end of a stream.
    vmdk = tmp_path / "a.vmdk"
    imgcore.convert(raw, vmdk, compress=True, sync=False)
    with vmdk.open("ab") as file:
        file.write(bytes(512))
    words = ["lint", "--profile", "esxi", vmdk]
    (remedy,) = re.findall(r"truncate -s \d+", run(words, tmp_path).stdout)
    assert run([*remedy.split(), vmdk], tmp_path).returncode == 0
    assert run(words, tmp_path).returncode == 0
    # An image in another format, and an archive of another kind.
    words = ["lint", "--profile", "hyperv", vmdk]
    (profile,) = re.findall(r"imgcore convert --profile (\w+)", run(words, tmp_path).stdout)[:1]
    assert run(["convert", "--profile", profile, vmdk, "b.vhdx"], tmp_path).returncode == 0
    assert run([*words[:-1], "b.vhdx"], tmp_path).returncode == 0
    with raw.open("r+b") as file:
        file.truncate(1 << 30)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("disk.raw"))
    words = ["lint", "--profile", "gce", "x.tar.gz"]
    (remedy,) = set(re.findall(r"pack it with (tar .*)$", run(words, tmp_path).stdout, re.M))
    done = run(remedy.replace("IMAGE", "x").split(), tmp_path)
    assert done.returncode == 0, done.stderr
    assert run(words, tmp_path).returncode == 0, run(words, tmp_path).stdout


def test_an_image_with_a_log(tmp_path: Path) -> None:
    mib = 1 << 20
    guid = vhdx.guid(7)
    entry = vhdx.log_entry(1, 0, [(6 * mib, bytes(4096))], log_guid=guid)
    blocks = {0: (vhdx.FULL, vhdx.pattern(0, mib))}
    log = entry.ljust(mib, b"\0")
    path = vhdx.Vhdx(4 * mib, blocks=blocks, log_guid=guid, log=log).write(tmp_path / "a.vhdx")
    poke(path, (vhdx.HEADERS[1] + 100, b"x"))
    done = run(["check", "-r", path], tmp_path)
    assert "imgcore convert writes an image with an empty log" in done.stderr
    assert run(["convert", path, "b.vhdx"], tmp_path).returncode == 0
    assert run(["check", "b.vhdx"], tmp_path).returncode == 0


def test_other_commands(tmp_path: Path) -> None:
    """What is advised in place of qemu-img's commands works."""
    images, raw = openings.chain(tmp_path, "qcow2", 1)
    for words in (
        ["--help"],
        ["convert", "-o", "cluster_size=4k", images[0], "a.qcow2"],
        ["convert", "-B", images[0], "-F", "qcow2", raw, "b.qcow2"],
        ["create", "-b", "b.qcow2", "-F", "qcow2", "c.qcow2"],
        ["convert", raw, "d.vhdx"],
    ):
        done = imgcore_command(*map(str, words), cwd=tmp_path)
        assert done.returncode == 0, (words, done.stderr)


def test_a_vhd_set(tmp_path: Path) -> None:
    path = tmp_path / "a.vhds"
    path.write_bytes(io.BytesIO(bytes(4096)).read())
    assert "open the .avhdx file" in imgcore_command("info", path).stderr
