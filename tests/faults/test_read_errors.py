"""A source of which a part cannot be read.

A lasting error ends the conversion and names the place; a passing one has no effect.
With ``salvage`` the rest is saved, and the lost ranges are listed.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import imgcore
from tests.faults.harness import VARIANTS, Calls, Mode, Place, Source, params
from tests.helpers import images, qemu
from tests.helpers.qemu import Variant

READABLE = [v for v in VARIANTS if v.name != "raw-falloc"]


@pytest.mark.parametrize("variant", params(READABLE))
def test_every_read_fails_for_good(variant: Variant, source: Callable[[Variant], Source]) -> None:
    here = source(variant)
    for nth in range(1, 500):
        answer = here.read(arm=(Calls.READ, nth, errno.EIO, Mode.FAIL_ON))
        if not answer["hits"]:
            assert answer["outcome"] == "ok"
            assert here.out.read_bytes() == here.content
            assert nth > 2
            return
        assert answer["outcome"] == "error", answer
        assert not here.out.exists()
        if answer["type"] == "OSError":
            assert answer["errno"] == errno.EIO
            assert "0x" in answer["text"], answer
            assert Path(answer["path"]).parent == here.image.parent, answer
    raise AssertionError("no end of the reads")


@pytest.mark.parametrize("code", [errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR])
@pytest.mark.parametrize("variant", READABLE[:4], ids=lambda v: v.name)
def test_a_read_that_fails_once_is_repeated(
    variant: Variant, code: int, source: Callable[[Variant], Source]
) -> None:
    here = source(variant)
    for nth in range(1, 500):
        answer = here.read(arm=(Calls.READ, nth, code, Mode.FAIL_ONCE))
        assert answer["outcome"] == "ok", answer
        assert here.out.read_bytes() == here.content
        if not answer["hits"]:
            assert nth > 2
            return
        here.out.unlink()


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EINTR])
def test_a_write_that_was_not_tried_is_repeated(
    code: int, place: Callable[[Variant], Place]
) -> None:
    here = place(qemu.QCOW2)
    for nth in range(1, 500):
        here.reset()
        answer = here.convert(arm=(Calls.WRITE, nth, code, Mode.FAIL_ONCE))
        assert answer["outcome"] == "ok", answer
        assert here.files() == here.new
        if not answer["hits"]:
            assert nth > 2
            return


def test_there_is_an_end_to_repeating(source: Callable[[Variant], Source]) -> None:
    answer = source(qemu.RAW).read(arm=(Calls.READ, 1, errno.EIO, Mode.FAIL_ON))
    assert answer["outcome"] == "error"
    # Each of two threads may have started a read.
    assert 5 <= answer["hits"] <= 10


@pytest.mark.parametrize(
    "variant",
    [qemu.RAW, qemu.QCOW2, qemu.VMDK_SPARSE, qemu.VMDK_FLAT, qemu.VHD_DYNAMIC, qemu.VDI],
    ids=lambda v: v.name,
)
def test_salvage_of_plain_data(variant: Variant, source: Callable[[Variant], Source]) -> None:
    here = source(variant)
    guest = images.MIB + 128 * images.KIB
    at = here.find(guest)
    assert at > 0
    bad = here.bad(at, at + 10_000)
    answer = here.read(bad=bad)
    assert (answer["outcome"], answer["errno"]) == ("error", errno.EIO), answer
    assert not here.out.exists()
    answer = here.read(bad=bad, more={"salvage": True})
    assert answer["outcome"] == "ok", answer
    lost = answer["result"]["bad_ranges"]
    assert_lost(here, lost)
    first, *_ = lost[0]
    last = lost[-1][0] + lost[-1][1]
    assert first <= guest
    assert guest + 10_000 <= last <= guest + 10_000 + 2 * 4096
    assert here.image.parent.name in lost[0][2]
    assert "output error" in lost[0][3]


def assert_lost(here: Source, lost: list[list[Any]]) -> None:
    """Fail unless the listed ranges are zeros, and all else is the source's bytes."""
    expected = bytearray(here.content)
    for offset, length, *_ in lost:
        expected[offset : offset + length] = bytes(length)
    assert expected != here.content
    assert here.out.read_bytes() == expected


@pytest.mark.parametrize(
    "variant", [qemu.QCOW2_ZLIB, qemu.QCOW2_ZSTD, qemu.VMDK_STREAM], ids=lambda v: v.name
)
@pytest.mark.parametrize("how", ["unreadable", "broken"])
def test_salvage_of_compressed_data(
    variant: Variant, how: str, source: Callable[[Variant], Source]
) -> None:
    here = source(variant)
    whole = here.place.new[here.data]
    job: dict[str, Any] = {}
    if how == "unreadable":
        job["bad"] = here.bad(len(whole) // 2, len(whole) // 2 + 1)
    else:
        break_a_block(here)
    assert here.read(**job)["outcome"] == "error"
    assert not here.out.exists()
    answer = here.read(more={"salvage": True}, **job)
    assert answer["outcome"] == "ok", answer
    lost = answer["result"]["bad_ranges"]
    assert_lost(here, lost)
    assert sum(length for _, length, *_ in lost) <= 4 * 65536
    assert ("decompress" in lost[0][3]) == (how == "broken")


def break_a_block(source: Source) -> None:
    """Damage compressed data of the image, and nothing else."""
    whole = source.place.new[source.data]
    for at in range(4096, len(whole), 8192):
        damaged = bytearray(whole)
        damaged[at : at + 1000] = images.noise(1000, 5)
        (source.image.parent / source.data).write_bytes(damaged)
        answer = source.read()
        if answer["outcome"] == "error" and "decompress" in answer["text"]:
            return
        source.out.unlink(missing_ok=True)
    raise AssertionError("no compressed block was hit")


def test_nothing_is_salvaged_where_nothing_is_lost(source: Callable[[Variant], Source]) -> None:
    here = source(qemu.QCOW2)
    answer = here.read(more={"salvage": True})
    assert answer["result"]["bad_ranges"] == []
    assert here.out.read_bytes() == here.content


def test_a_header_is_not_salvaged(source: Callable[[Variant], Source]) -> None:
    here = source(qemu.QCOW2)
    answer = here.read(bad=here.bad(0, 512), more={"salvage": True})
    assert (answer["outcome"], answer["errno"]) == ("error", errno.EIO)


@pytest.mark.parametrize(
    "variant",
    [qemu.QCOW2, qemu.VMDK_SPARSE, qemu.VMDK_STREAM, qemu.VHD_DYNAMIC, qemu.VHDX_DYNAMIC, qemu.VDI],
    ids=lambda v: v.name,
)
def test_salvage_of_tables(variant: Variant, source: Callable[[Variant], Source]) -> None:
    """What an unreadable part of a table would tell is lost, and the rest is saved."""
    here = source(variant)
    whole = (here.image.parent / here.data).read_bytes()
    n_salvaged = n_lost = 0
    for start in [*range(4096, 64 * 1024, 4096), *range(64 * 1024, len(whole), 256 * 1024)]:
        bad = here.bad(start, start + 4096)
        answer = here.read(bad=bad, more={"salvage": True})
        if answer["outcome"] == "error":
            # The header, the metadata, or all that there is of the tables.
            assert answer["errno"] == errno.EIO or "salvaged" in answer["text"], answer
            assert not here.out.exists()
            continue
        n_salvaged += 1
        expected = bytearray(here.content)
        for offset, length, *_ in answer["result"]["bad_ranges"]:
            expected[offset : offset + length] = bytes(length)
            n_lost += length
        assert here.out.read_bytes() == expected, start
        here.out.unlink()
    assert n_salvaged > 2
    assert n_lost


def test_salvage_by_the_command(shim: Path, tmp_path: Path) -> None:
    """Exit code 3, a line for each lost range on stderr, and the rows in the JSON."""
    source = tmp_path / "source.raw"
    content = images.noise(images.MIB)
    source.write_bytes(content)
    spec = f"{tmp_path}|0|0|0|0|{source.stat().st_ino}|8192|12288"
    command = [sys.executable, "-m", "imgcore", "convert", "-q", "--json", "-f", "raw"]
    environment = {**os.environ, "LD_PRELOAD": str(shim), "FAULT_SPEC": spec}

    def run(*words: str, name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *words, str(source), str(tmp_path / name)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )

    done = run(name="plain.qcow2")
    assert done.returncode == 1
    assert "source.raw: Input/output error" in done.stderr
    assert "0x" in done.stderr
    assert not (tmp_path / "plain.qcow2").exists()
    done = run("--salvage", name="saved.raw")
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.splitlines()
    assert "lost: 4096 bytes of the disk at 0x2000" in line
    (row,) = json.loads(done.stdout)["bad_ranges"]
    assert (row["guest_offset"], row["length"]) == (8192, 4096)
    saved = (tmp_path / "saved.raw").read_bytes()
    assert saved == content[:8192] + bytes(4096) + content[12288:]


@pytest.mark.parametrize("name", ["out.raw.gz", "out.raw.zst"])
def test_streams_are_not_salvaged(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(images.noise(65536))
    with pytest.raises(imgcore.OptionError, match="salvage"):
        imgcore.convert(source, tmp_path / name, salvage=True)
