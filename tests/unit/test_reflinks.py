"""Which data is reflinked unread, and the options that rule reflinks out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers.command import imgcore as imgcore_command

import imgcore
from imgcore.disk.reflinks import Reflink
from imgcore.engine.extents import EXTENT_DTYPE, Extents
from imgcore.engine.geometry import Geometry, Placing
from imgcore.engine.kinds import FLAG_UNREAD, Kind
from imgcore.engine.reflinks import ReflinkCount, ReflinkRule
from imgcore.limits import KIB, MIB

# -- rules -----------------------------------------------------------------------------


def rows(*parts: tuple[int, int, int, Kind]) -> Extents:
    """Return extents from guest offset, length, host offset and kind."""
    return np.array(
        [
            (guest, length, host, length if kind >= Kind.DATA else 0, 0, kind, 0)
            for guest, length, host, kind in parts
        ],
        dtype=EXTENT_DTYPE,
    )


def appending(block_nbytes: int = 64 * KIB, **more: Any) -> Geometry:
    return Geometry(block_nbytes, 8 * MIB, **({"stored_alignment": block_nbytes} | more))


def flat(host_base: int = 0) -> Geometry:
    return Geometry(64 * KIB, 8 * MIB, placing=Placing.IDENTITY, host_base=host_base)


DATA = rows((0, 64 * KIB, 1 * MIB, Kind.DATA), (64 * KIB, MIB, 0, Kind.ZERO))


@pytest.mark.parametrize(
    ("geometry", "part", "reflinked"),
    [
        (appending(), (0, MIB, 4 * KIB), MIB),
        (appending(), (0, MIB, 512), 0),
        # Only the offset within a block of the file system counts.
        (appending(), (512, MIB, 8 * KIB + 512), MIB - 4 * KIB),
        (appending(), (512, 4 * KIB, 512), 0),
        (appending(), (512, 8 * KIB, 512), 4 * KIB),
        (appending(), (4 * KIB, 9 * KIB, 0), 8 * KIB),
        # Where a block smaller than the file system's comes to lie is not known.
        (appending(2 * KIB), (0, MIB, 0), 0),
        (appending(stored_alignment=512), (0, MIB, 0), 0),
        (appending(stored_alignment=4 * KIB), (0, MIB, 0), MIB),
        (flat(), (0, MIB, 0), MIB),
        (flat(), (0, MIB, 512), 0),
        (flat(512), (0, MIB, 512), MIB - 4 * KIB),
        (flat(512), (0, MIB, 0), 0),
    ],
)
def test_what_is_reflinked(geometry: Geometry, part: tuple[int, int, int], reflinked: int) -> None:
    rule = ReflinkRule.of(geometry, [4096])
    batch = rows((*part, Kind.DATA))
    count = rule.measure([batch])
    assert (count.reflinked, count.copied) == (reflinked, part[1] - reflinked)
    assert bool(rule.mark(batch)["flags"][0] & FLAG_UNREAD) == (reflinked > 0)
    assert batch["flags"][0] == 0


def test_only_plain_data_of_files_with_reflinks_is_marked() -> None:
    batch = rows(
        (0, 64 * KIB, 0, Kind.DATA),
        (64 * KIB, 64 * KIB, 0, Kind.HOLE),
        (128 * KIB, 64 * KIB, 0, Kind.ZERO),
        (192 * KIB, 64 * KIB, 0, Kind.ZLIB),
        (256 * KIB, 64 * KIB, 0, Kind.DATA),
    )
    batch["file"][-1] = 1
    rule = ReflinkRule.of(appending(), [4096, 0])
    assert (rule.mark(batch)["flags"] & FLAG_UNREAD).astype(bool).tolist() == [
        True,
        *[False] * 4,
    ]
    assert rule.measure([batch]) == ReflinkCount(64 * KIB, 128 * KIB, 0, 1)


def test_no_file_or_no_reflinks_marks_nothing() -> None:
    batch = rows((0, MIB, 0, Kind.DATA))
    assert ReflinkRule.of(appending(), [0]).mark(batch) is batch


def test_the_end_of_the_disk() -> None:
    rule = ReflinkRule.of(appending(), [4096])
    ends = rows((0, 5 * KIB, 0, Kind.DATA), (5 * KIB, KIB, 5 * KIB, Kind.HOLE))
    assert rule.measure([ends]) == ReflinkCount(4 * KIB, KIB, 0, 1)
    assert rule.measure([ends[:1]]) == ReflinkCount(4 * KIB, KIB, KIB, 1)
    short = rows((8 * KIB, KIB, 0, Kind.DATA))
    assert rule.measure([short]) == ReflinkCount(0, KIB, KIB, 0)


def test_an_empty_file(tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.touch()
    assert imgcore.measure_reflink(source, "qcow2") == (0, 0)


# -- the keyword -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "member"),
    [
        (True, Reflink.AUTO),
        (False, Reflink.NEVER),
        ("auto", Reflink.AUTO),
        ("always", Reflink.ALWAYS),
        ("strict", Reflink.STRICT),
        ("never", Reflink.NEVER),
    ],
)
def test_keywords(value: bool | str, member: Reflink) -> None:
    assert Reflink.from_keyword(value) is member


def test_an_unknown_keyword() -> None:
    with pytest.raises(imgcore.OptionError, match="never, auto, always, strict is needed"):
        Reflink.from_keyword("sometimes")


@pytest.mark.parametrize("reflink", ["always", "strict"])
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("-O", "qcow2", "-c"), "with -c the target needs its own blocks"),
        (("-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2"), "with -B the target needs"),
        (("-O", "raw", "-S", "0"), "with -S 0 the target needs its own blocks"),
        (("-O", "raw", "-n"), "with -n the target needs its own blocks"),
        (("-O", "raw", "--salvage"), "with --salvage the target needs its own blocks"),
        (("-O", "vmdk", "-o", "subformat=streamOptimized"), "compressed blocks cannot be"),
        (("-O", "raw", "-o", "preallocation=falloc"), "preallocated space cannot be"),
        (("-O", "qcow2", "-o", "preallocation=full"), "preallocated space cannot be"),
        (("--profile", "gce"), "a stream has no blocks that could be reflinked"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_rule_reflinks_out(
    words: tuple[str, ...], reason: str, reflink: str, tmp_path: Path
) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(b"x" * MIB)
    target = str(tmp_path / ("disk.tar.gz" if "gce" in words else "out"))
    imgcore.create(tmp_path / "base.qcow2", MIB)
    before = sorted(os.listdir(tmp_path))
    done = imgcore_command("convert", f"--reflink={reflink}", *words, str(source), target)
    assert done.returncode == 2, done.stderr
    assert f"--reflink={reflink}: {reason}" in done.stderr
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("target", ["out.qcow2", "out.raw.gz"])
def test_streams(target: str, tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(b"x" * MIB)
    stream = tmp_path / "disk.raw.zst"
    imgcore.convert(source, stream)
    with pytest.raises(imgcore.OptionError, match="a stream has no blocks"):
        imgcore.convert(
            source if target.endswith("gz") else stream, tmp_path / target, reflink="always"
        )


# -- measure ---------------------------------------------------------------------------


def test_measure(tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(b"x" * (MIB + 512))
    assert imgcore.measure_reflink(source, "qcow2") == (MIB, 512)
    assert imgcore.measure_reflink(source, "qcow2", options={"cluster_size": 512}).reflinked < MIB
    done = imgcore_command("measure", "--reflink", "-O", "qcow2", str(source))
    assert done.stdout == f"reflinked: {MIB}\ncopied: 512\n"
    done = imgcore_command("measure", "--reflink", "--output=json", "-O", "vhd", str(source))
    assert done.stdout.split() == ["{", '"reflinked":', f"{MIB},", '"copied":', "512", "}"]


@pytest.mark.parametrize("words", [["--size", "1M"], ["-c", "disk.raw"]])
def test_measure_needs_an_image_and_plain_blocks(words: list[str]) -> None:
    done = imgcore_command("measure", "--reflink", "-O", "qcow2", *words)
    assert done.returncode == 2
    assert "--reflink measures FILE, without -c or --rewrite" in done.stderr


def test_measure_refuses_what_convert_refuses(tmp_path: Path) -> None:
    source = tmp_path / "disk.raw"
    source.write_bytes(b"x" * MIB)
    with pytest.raises(imgcore.OptionError, match="compressed blocks cannot be reflinked"):
        imgcore.measure_reflink(source, "vmdk", options={"subformat": "streamOptimized"})
