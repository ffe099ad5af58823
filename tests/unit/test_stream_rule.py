"""``format`` states the disk's format, the suffixes .zst and .gz that it is a stream.

Every verb follows this rule, with and without a stated format.
"""

from __future__ import annotations

import gzip
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.command import imgcore as command
from tests.helpers.images import MIB, noise

import imgcore

NBYTES = 1 * MIB
SUFFIXES = (".raw.zst", ".raw.gz", ".img.gz", ".dd.zst", ".BIN.GZ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams")
    raw = folder / "plain.raw"
    raw.write_bytes(noise(NBYTES - 4096) + bytes(4096))
    for suffix in SUFFIXES:
        imgcore.convert(raw, folder / f"disk{suffix}")
    return folder


def open_(path: Path, format: str | None) -> Any:
    with imgcore.open(path, format=format) as image:
        return image.read(0, 512)


def compare(path: Path, format: str | None) -> Any:
    return imgcore.compare(path, path.parent / "plain.raw", format_a=format)


def compare_second(path: Path, format: str | None) -> Any:
    return imgcore.compare(path.parent / "plain.raw", path, format_b=format)


def child(path: Path, format: str | None) -> Any:
    target = path.parent / "child.qcow2"
    return imgcore.create(target, backing=path, backing_format=format or "raw", force=True)


def over(path: Path, format: str | None) -> Any:
    raw, target = path.parent / "plain.raw", path.parent / "child.qcow2"
    return imgcore.convert(raw, target, backing=path, backing_format=format or "raw", force=True)


RANDOM: dict[str, Callable[[Path, str | None], Any]] = {
    "open": open_,
    "map": lambda path, format: list(imgcore.map(path, format=format)),
    "compare": compare,
    "compare with": compare_second,
    "create over": child,
    "convert over": over,
}


@pytest.mark.parametrize("format", [None, "raw"])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("verb", RANDOM)
def test_what_needs_random_access(verb: str, suffix: str, format: str | None, folder: Path) -> None:
    path = folder / f"disk{suffix}"
    with pytest.raises(imgcore.UnsupportedFeatureError) as caught:
        RANDOM[verb](path, format)
    codec = "zstd" if "zst" in suffix else "gzip"
    assert str(caught.value) == (
        f"{path}: a {codec} stream has no random access: only convert, info and measure "
        "read it, so decompress it first"
    )


@pytest.mark.parametrize("format", [None, "raw"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_reads_in_order(suffix: str, format: str | None, folder: Path, tmp_path: Path) -> None:
    path, target = folder / f"disk{suffix}", tmp_path / "out.raw"
    done = imgcore.convert(path, target, format=format)
    assert (done.source_format, done.virtual_size) == ("raw", NBYTES)
    assert target.read_bytes() == (folder / "plain.raw").read_bytes()
    described = imgcore.info(path, format=format)
    assert (described["format"], described["virtual-size"]) == ("raw", NBYTES)
    assert imgcore.info(path, format=format, chain=True) == [described]
    assert imgcore.measure(path, format=format).required == NBYTES


@pytest.mark.parametrize("format", [None, "raw"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_check_and_lint(suffix: str, format: str | None, folder: Path) -> None:
    path = folder / f"disk{suffix}"
    for keywords in ({}, {"parent": folder / "plain.raw"}, {"repair": True}):
        with pytest.raises(imgcore.UnsupportedFeatureError, match="has no tables to check"):
            imgcore.check(path, format=format, **keywords)  # type: ignore[arg-type]
    flags = [] if format is None else ["-f", format]
    assert command("check", *flags, path).returncode == 63
    report = imgcore.lint(path, profile="openstack", format=format)
    assert report.format == ("zstd" if "zst" in suffix else "gzip")
    assert report == imgcore.lint(path, profile="openstack")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_targets(suffix: str, folder: Path, tmp_path: Path) -> None:
    raw, target = folder / "plain.raw", tmp_path / f"new{suffix}"
    for format in (None, "raw"):
        imgcore.convert(raw, target, target_format=format, force=True)
        assert target.read_bytes() == (folder / f"disk{suffix}").read_bytes()
        with pytest.raises(imgcore.OptionError, match="only convert writes compressed raw disks"):
            imgcore.create(target, NBYTES, format=format, force=True)
    with pytest.raises(imgcore.OptionError, match="only raw can be written as a compressed"):
        imgcore.convert(raw, target, target_format="qcow2", force=True)


def test_the_advice_to_decompress(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "disk.raw.gz"
    packed.write_bytes((folder / "disk.raw.gz").read_bytes())
    subprocess.run(["gzip", "-d", packed], check=True)
    for verb in ("open", "map", "compare", "compare with", "create over", "convert over"):
        (tmp_path / "plain.raw").write_bytes((folder / "plain.raw").read_bytes())
        RANDOM[verb](tmp_path / "disk.raw", "raw")


CONTENTS = ["raw", "qcow2", "empty"]


@pytest.mark.parametrize("format", [None, "raw"])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_stream_by_its_name_only(
    content: str, suffix: str, format: str | None, folder: Path, tmp_path: Path
) -> None:
    """No verb takes such a file for a plain raw disk; renamed, all do."""
    path, image = tmp_path / f"named{suffix}", tmp_path / f"plain.{content}"
    if content == "qcow2":
        imgcore.convert(folder / "plain.raw", image)
    else:
        image = tmp_path / "renamed.raw"
        image.write_bytes(noise(4096) if content == "raw" else b"")
    path.write_bytes(image.read_bytes())
    (tmp_path / "plain.raw").write_bytes(noise(4096))
    for verb in RANDOM.values():
        with pytest.raises(imgcore.WrongFormatError, match="neither a zstd nor a gzip stream"):
            verb(path, format)
    calls: list[Callable[[], Any]] = [
        lambda: imgcore.info(path, format=format),
        lambda: imgcore.measure(path, format=format),
        lambda: imgcore.convert(path, tmp_path / "out.raw", format=format),
    ]
    for call in calls:
        with pytest.raises(imgcore.WrongFormatError, match="neither a zstd nor a gzip stream"):
            call()
    if content != "empty":
        renamed = path.rename(tmp_path / f"again.{content}")
        open_(renamed, None)
        if content == "qcow2":
            # A stated format other than raw is final, as for any name.
            open_(renamed.rename(path), "qcow2")


def test_a_stream_that_starts_with_a_skippable_frame(folder: Path, tmp_path: Path) -> None:
    """What convert reads as a stream is one for the other verbs."""
    path = tmp_path / "disk.raw.zst"
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"  # RFC 8878 section 3.1.2
    path.write_bytes(skippable + (folder / "disk.raw.zst").read_bytes())
    imgcore.convert(path, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == (folder / "plain.raw").read_bytes()
    for format in (None, "raw"):
        with pytest.raises(imgcore.UnsupportedFeatureError, match="a zstd stream has no random"):
            imgcore.open(path, format=format)


def test_a_gzip_of_an_image_is_no_raw_disk(folder: Path, tmp_path: Path) -> None:
    """The suffix says what the stream holds; its content is not asked."""
    imgcore.convert(folder / "plain.raw", tmp_path / "a.qcow2")
    path = tmp_path / "a.raw.gz"
    path.write_bytes(gzip.compress((tmp_path / "a.qcow2").read_bytes(), 1))
    with pytest.raises(imgcore.WrongFormatError, match="carries the magic of qcow2"):
        imgcore.convert(path, tmp_path / "b.raw")
    imgcore.convert(path, tmp_path / "b.raw", format="raw")
    assert (tmp_path / "b.raw").read_bytes() == (tmp_path / "a.qcow2").read_bytes()
