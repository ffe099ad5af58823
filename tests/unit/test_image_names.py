"""Names of images other than file names: ``json:`` descriptions, URLs, protocols."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import openings, qemu
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as imgcore_command
from tests.helpers.openings import VERBS, command, use
from tests.helpers.reading import poke

import imgcore
from imgcore.disk.image_names import Described, NotLocalError, parse_description
from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    OptionError,
    UnsafeReferenceError,
    UnsupportedFeatureError,
)
from imgcore.formats.registry import format_names

FILE: dict[str, Any] = {"driver": "file", "filename": "f"}

UNDERSTOOD: dict[str, tuple[dict[str, Any], str | None]] = {
    "nested": ({"driver": "qcow2", "file": FILE}, "qcow2"),
    "flat": ({"driver": "qcow2", "file.driver": "file", "file.filename": "f"}, "qcow2"),
    "half-flat": ({"driver": "qcow2", "file": {"driver": "file"}, "file.filename": "f"}, "qcow2"),
    "without-protocol": ({"driver": "vpc", "file": {"filename": "f"}}, "vpc"),
    "raw": ({"driver": "raw", "file": FILE}, "raw"),
    "raw-on-top": ({"driver": "raw", "file": {"driver": "qcow2", "file": FILE}}, "qcow2"),
    "raw-below": ({"driver": "qcow2", "file": {"driver": "raw", "file": FILE}}, "qcow2"),
    "raw-below-flat": (
        {"driver": "qcow2", "file.driver": "raw", "file.file.driver": "file",
         "file.file.filename": "f"},
        "qcow2",
    ),
    "device": ({"driver": "raw", "file": {"driver": "host_device", "filename": "f"}}, "raw"),
    "no-format": (FILE, None),
    "file-only": ({"file": FILE}, None),
    "nulls": (
        {"driver": "qcow2", "encrypt": None, "data-file": None, "backing": None,
         "file": {**FILE, "locking": None, "aio": None, "pr-manager": None}},
        "qcow2",
    ),
    "harmless": (
        {"driver": "qcow2", "node-name": "n", "read-only": True, "cache.direct": True,
         "discard": "unmap", "file": {**FILE, "aio": "io_uring", "cache": {"no-flush": False}}},
        "qcow2",
    ),
}  # fmt: skip

REJECTED: dict[str, tuple[str, str]] = {
    "empty": ("", "not valid JSON"),
    "text": ("base.qcow2", "not valid JSON"),
    "single-quotes": ("{'driver':'raw'}", "not valid JSON"),
    "list": ("[]", "not a JSON object"),
    "deep": ("[" * 900, "not valid JSON"),
    "nothing": ("{}", "does not state a filename"),
    "no-filename": ('{"driver":"file"}', "does not state a filename"),
    "filename-number": ('{"driver":"file","filename":1}', "does not state a filename"),
    "filename-empty": ('{"driver":"file","filename":""}', "does not state a filename"),
    "twice": ('{"driver":"file","filename":"a","filename":"b"}', "states an option twice"),
    "twice-deep": (
        '{"driver":"raw","file":{"driver":"file","filename":"a","filename":"b"}}',
        "states an option twice",
    ),
    "twice-flat": (
        '{"driver":"raw","file":{"driver":"file","filename":"a"},"file.filename":"b"}',
        "states an option twice",
    ),
    "nbd": ('{"driver":"nbd","host":"h"}', "driver 'nbd' does not open a local file"),
    "nbd-below": (
        '{"driver":"qcow2","file":{"driver":"nbd","server.type":"unix","server.path":"s"}}',
        "driver 'nbd' does not",
    ),
    "http": ('{"driver":"raw","file.driver":"https","file.url":"https://h/x"}', "driver 'https'"),
    "node-name": ('{"driver":"qcow2","file":"node0"}', "not a description of a file"),
    "two-formats": (
        '{"driver":"qcow2","file":{"driver":"vmdk","file":{"driver":"file","filename":"f"}}}',
        "opens 'vmdk' inside of 'qcow2'",
    ),
    "offset": (
        '{"driver":"raw","offset":512,"file":{"driver":"file","filename":"f"}}',
        "option 'offset' is not supported",
    ),
    "size": ('{"driver":"raw","size":512,"file.filename":"f"}', "option 'size'"),
    "backing": (
        '{"driver":"qcow2","backing":{"driver":"null-co"},"file.filename":"f"}',
        "option 'backing'",
    ),
    "data-file": (
        '{"driver":"qcow2","data-file":{"filename":"x"},"file.filename":"f"}',
        "option 'data-file'",
    ),
    "encrypt": ('{"driver":"qcow2","encrypt.format":"luks","file.filename":"f"}', "'encrypt'"),
    "quorum": (
        '{"driver":"quorum","children":[{"driver":"file","filename":"f"}]}',
        "driver 'quorum'",
    ),
    "filename-and-file": (
        '{"driver":"raw","filename":"g","file":{"driver":"file","filename":"f"}}',
        "not a description",
    ),
    "driver-number": ('{"driver":1,"file":{"driver":"file","filename":"f"}}', "state a driver"),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_understood(name: str) -> None:
    options, image_format = UNDERSTOOD[name]
    found = parse_description("json:" + json.dumps(options))
    assert found == Described("f", image_format, without_backing=name == "nulls")


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, as the source and as the name of a backing file."""
    text, words = REJECTED[name]
    with pytest.raises(NotLocalError, match=words):
        parse_description(f"json:{text}")
    done = imgcore_command("convert", f"json:{text}", tmp_path / "out.raw")
    assert_one_line_error(done, words, "only descriptions of one local file are read")
    for file in ("f", "a", "b", "g"):
        openings.disk(tmp_path / file)
    image = tmp_path / "o.qcow2"
    make_overlay(image, f"json:{text}", "raw")
    with pytest.raises(UnsafeReferenceError, match=words):
        imgcore.open(image)
    assert imgcore.info(image)["backing-filename"].startswith("json:")
    # The advice.
    with imgcore.open(image, parent=tmp_path / "f") as opened:
        assert opened.read(0, 1) == b"\1"


def make_overlay(path: Path, name: str, image_format: str | None) -> None:
    """Write an overlay with any backing name, which qemu-img might refuse."""
    qemu.run("create", "-q", "-f", "qcow2", path, str(openings.SIZE))
    octets = name.encode()
    extension = b""
    if image_format is not None:
        text = image_format.encode()
        extension = struct.pack(">II8s", 0xE2792ACA, len(text), text)
    # The header's end, and the offset and length of the name.
    poke(
        path,
        (112, extension + bytes(8)),
        (4096, octets),
        (8, struct.pack(">QI", 4096, len(octets))),
    )


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("image_format", format_names())
def test_backing_files_of_every_format(image_format: str, flat: bool, tmp_path: Path) -> None:
    """qemu-img reads the same."""
    raw = openings.disk(tmp_path / "disk.raw")
    base = tmp_path / "base.bin"
    qemu_name = qemu._name(image_format)
    options = ["-o", "force_size"] if image_format == "vhd" else []
    qemu.run("convert", "-f", "raw", "-O", qemu_name, *options, raw, base)
    described: dict[str, Any] = {"driver": qemu_name, "file": {**FILE, "filename": str(base)}}
    if flat:
        described = {"driver": qemu_name, "file.driver": "file", "file.filename": str(base)}
    image = tmp_path / "o.qcow2"
    name = "json:" + json.dumps(described)
    qemu.run("create", "-q", "-f", "qcow2", "-F", qemu_name, "-b", name, image, "4M")
    qemu.run("compare", "-f", "qcow2", "-F", "raw", image, raw)
    assert imgcore.compare(image, raw).identical
    info, expected = imgcore.info(image), qemu.info(image, "qcow2")
    for key in ("backing-filename", "full-backing-filename"):
        assert info[key] == expected[key]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("image_format", format_names())
def test_sources_of_every_format(image_format: str, verb: str, tmp_path: Path) -> None:
    """The driver states the format, whatever the name; all verbs understand it."""
    raw = openings.disk(tmp_path / "disk.raw")
    base = tmp_path / "base.img"
    imgcore.convert(raw, base, target_format=image_format, sync=False)
    driver = qemu._name(image_format)
    name = "json:" + json.dumps({"driver": driver, "file": {**FILE, "filename": str(base)}})
    if verb == "check" and image_format == "raw":
        assert imgcore_command("check", name).returncode == 63
        return
    answer = use(verb, Path(name), raw)
    if verb == "info":
        assert answer["format"] == image_format
    done = imgcore_command(*command(verb, name, raw))
    assert done.returncode in (0, 1) if verb == "lint" else done.returncode == 0, done.stderr
    assert "warning" not in done.stderr


def test_formats_that_contradict(tmp_path: Path) -> None:
    openings.disk(tmp_path / "f.raw")
    name = "json:" + json.dumps(
        {"driver": "raw", "file": {**FILE, "filename": str(tmp_path / "f.raw")}}
    )
    with imgcore.open(name, format="raw"):
        pass
    with pytest.raises(OptionError, match="the description states raw"):
        imgcore.open(name, format="qcow2")
    image = tmp_path / "o.qcow2"
    make_overlay(image, name, "qcow2")
    with pytest.raises(CorruptImageError, match="states the format qcow2 of its parent"):
        imgcore.open(image)
    make_overlay(image, name, None)
    assert len(imgcore.info(image, chain=True)) == 2


def test_a_description_passes_the_gate(tmp_path: Path) -> None:
    outside = openings.disk(tmp_path / "outside.raw")
    image = tmp_path / "vm" / "o.qcow2"
    image.parent.mkdir()
    name = "json:" + json.dumps({"driver": "raw", "file": {**FILE, "filename": str(outside)}})
    make_overlay(image, name, "raw")
    with pytest.raises(UnsafeReferenceError, match="--allow"):
        imgcore.open(image)
    imgcore.open(image, allow=[tmp_path]).close()
    for inner in ("nbd://h/x", "C:\\x", "json:{}", "a\0b"):
        name = "json:" + json.dumps({"driver": "raw", "file": {**FILE, "filename": inner}})
        make_overlay(image, name, "raw")
        with pytest.raises(UnsafeReferenceError, match="as its parent, which"):
            imgcore.open(image)


def test_no_backing_file(tmp_path: Path) -> None:
    """``"backing": null`` is understood where it changes nothing."""
    images, raw = openings.chain(tmp_path, "qcow2", 2)
    for image, is_read in zip(images, (True, False), strict=True):
        described = {"driver": "qcow2", "backing": None, "file": {**FILE, "filename": str(image)}}
        name = "json:" + json.dumps(described)
        top = tmp_path / "top.qcow2"
        make_overlay(top, name, "qcow2")
        for path in (name, top):
            if is_read:
                with imgcore.open(path) as opened:
                    assert opened.read(0, 1) in (b"\1", opened.read(0, 1))
            else:
                with pytest.raises(UnsupportedFeatureError, match="leaves out its backing file"):
                    imgcore.open(path)
    assert imgcore.compare(images[1], raw).identical


# --------------------------------------------------------------------------------- URLs

URLS = [
    "nbd://localhost/x",
    "nbd+unix:///?socket=/tmp/no.sock",
    "http://localhost/disk.qcow2",
    "https://user:hunter2@localhost/disk.raw.gz",
    "ssh://host/disk.raw",
    "rbd:pool/disk",
    "iscsi://host/target/0",
    "file:///etc/hosts",
    "fd:3",
    "JSON:{}",
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("url", URLS)
def test_urls(url: str, verb: str, tmp_path: Path) -> None:
    raw = openings.disk(tmp_path / "disk.raw")
    with pytest.raises(UnsupportedFeatureError, match="URLs and protocols are not read"):
        # A Path would change the slashes.
        use(verb, url, raw)  # type: ignore[arg-type]
    if url == URLS[3]:
        code = 2 if verb.startswith(("compare", "diff", "lint")) else 1
        done = imgcore_command(*command(verb, url, raw))
        assert_one_line_error(done, "URLs and protocols are not read", code=code)
        assert "hunter2" not in done.stderr


@pytest.mark.parametrize("url", URLS)
def test_urls_as_backing_files(url: str, tmp_path: Path) -> None:
    image = tmp_path / "o.qcow2"
    make_overlay(image, url, "raw")
    with pytest.raises(UnsafeReferenceError, match="only file names are followed; state it with"):
        imgcore.open(image)
    expected = qemu.info(image, "qcow2") if url != URLS[3] else None
    if expected is not None:
        for key in ("backing-filename", "full-backing-filename"):
            assert imgcore.info(image)[key] == expected[key]
    with imgcore.open(image, parent=openings.disk(tmp_path / "copy")) as opened:
        assert opened.read(0, 1) == b"\1"


TARGETS = [url for url in URLS if "/" in url and not url.endswith(".gz")] + [
    'json:{"driver":"null-co"}'
]


@pytest.mark.parametrize("options", [[], ["--force"]], ids=str)
@pytest.mark.parametrize("format", [None, "raw", "qcow2"])
def test_create_does_not_write_to_stdout(
    options: list[str], format: str | None, tmp_path: Path
) -> None:
    stated = [] if format is None else ["-f", format]
    done = imgcore_command("create", *stated, *options, "-", "1M", cwd=tmp_path)
    assert_one_line_error(done, "stdout is not written to: give the name of a file (./- is one")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("verb", ["convert", "create"])
def test_a_file_of_that_name(verb: str, tmp_path: Path) -> None:
    openings.disk(tmp_path / "disk.raw")
    words = ["-O", "raw", "disk.raw", "./-"] if verb == "convert" else ["-f", "raw", "./-", "1M"]
    done = imgcore_command(verb, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["-", "disk.raw"]


@pytest.mark.parametrize("verb", ["convert", "create"])
@pytest.mark.parametrize("url", TARGETS)
def test_urls_as_targets(url: str, verb: str, tmp_path: Path) -> None:
    raw = openings.disk(tmp_path / "disk.raw")
    words = ["convert", "-O", "raw", str(raw), url] if verb == "convert" else []
    words = words or ["create", "-f", "qcow2", url, "1M"]
    done = imgcore_command(*words, cwd=tmp_path)
    assert_one_line_error(done, "URLs and protocols are not written")
    assert os.listdir(tmp_path) == ["disk.raw"]
    # The advice, with a protocol that needs no server.
    done = imgcore_command("convert", raw, tmp_path / "copy.raw")
    assert done.returncode == 0
    copied = tmp_path / "copied.raw"
    qemu.run("convert", "-f", "raw", "-O", "raw", tmp_path / "copy.raw", f"file:{copied}")
    assert copied.read_bytes() == raw.read_bytes()


@pytest.mark.parametrize("verb", ["convert", "create"])
@pytest.mark.parametrize("url", [url for url in URLS if url != URLS[3]])
def test_urls_as_backing_files_of_targets(url: str, verb: str, tmp_path: Path) -> None:
    raw = openings.disk(tmp_path / "disk.raw")
    target = tmp_path / "below" / "t.qcow2"
    target.parent.mkdir()
    options = {"convert": ["-B", url, "-F", "raw", raw], "create": ["-b", url, "-F", "raw"]}
    size = ["1M"] if verb == "create" else []
    done = imgcore_command(verb, *options[verb], target, *size)
    assert_one_line_error(done, "URLs and protocols are not read")
    assert not target.exists()


def test_a_new_file_with_a_colon(tmp_path: Path) -> None:
    raw = openings.disk(tmp_path / "disk.raw")
    assert imgcore_command("convert", raw, "ab:c.raw", cwd=tmp_path).returncode == 0
    assert imgcore_command("convert", raw, tmp_path / "ab:d.raw").returncode == 0


def test_a_file_whose_name_looks_like_a_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    openings.disk(Path("ab:c.raw"))
    assert imgcore.info("ab:c.raw")["virtual-size"] == openings.SIZE
    with pytest.raises(FileNotFoundError):
        imgcore.info("d:c.raw")
    with pytest.raises(ImgcoreError):
        imgcore.info("de:c.raw")


def test_qemu_img_reads_a_url(tmp_path: Path) -> None:
    """The advice leads on."""
    raw = openings.disk(tmp_path / "disk.raw")
    server = ["qemu-nbd", "-r", "-t", "-f", "raw", "-k", str(tmp_path / "s"), str(raw)]
    if shutil.which(server[0]) is None:
        pytest.skip("no qemu-nbd")
    url = f"nbd+unix:///?socket={tmp_path / 's'}"
    with subprocess.Popen(server) as process:
        try:
            while not (tmp_path / "s").exists():
                assert process.poll() is None
                time.sleep(0.05)
            qemu.run("convert", "-O", "raw", url, tmp_path / "copy.raw")
        finally:
            process.terminate()
    assert imgcore.compare(raw, tmp_path / "copy.raw").identical
