"""Images whose tables come first: the order of bytes, and what refuses it."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as imgcore_command
from tests.helpers.images import noise, text

import imgcore
from imgcore._core import Places
from imgcore.disk import front_sink
from imgcore.disk.block_table import BlockTable
from imgcore.engine.extents import PLACEMENT_DTYPE, BlockState, Kind, single
from imgcore.engine.geometry import Codec, CodecId, Geometry

MIB = 1 << 20
UUID = "6f9619ff-8b86-d011-b42d-00c04fc964ff"
OPTIONS: dict[str, dict[str, Any]] = {
    "qcow2": {"cluster_size": "4k"},
    "vhd": {"uuid": UUID},
    "vhdx": {"virtual_disk_id": UUID, "data_write_guid": UUID, "file_write_guid": UUID},
    "vdi": {"uuid": UUID},
    "vmdk": {"cid": "12345678"},
}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        file.write(noise(3 * MIB))
        file.seek(6 * MIB + 4096)
        file.write(bytes(2 * MIB))  # stored, though it is zeros
        file.write(text(70_000))
        file.truncate(50 * MIB)
    return path


@pytest.mark.parametrize("format", OPTIONS)
def test_windows_of_the_front(
    format: str, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their size changes nothing."""
    images = []
    for nbytes in (64 * MIB, 4097):
        monkeypatch.setattr(front_sink, "_WINDOW_NBYTES", nbytes)
        target = io.BytesIO()
        imgcore.convert(disk, target, target_format=format, options=OPTIONS[format])
        images.append(target.getvalue())
    assert images[0] == images[1]
    (tmp_path / f"copy.{format}").write_bytes(images[0])
    assert imgcore.compare(disk, tmp_path / f"copy.{format}").identical


@pytest.mark.parametrize("format", OPTIONS)
def test_allocated_zeros_stay_allocated(format: str, disk: Path, tmp_path: Path) -> None:
    target = tmp_path / f"copy.{format}"
    imgcore.convert(disk, target, options=OPTIONS[format] | {"tables": "front"})
    listed = json.loads(imgcore_command("map", "--output=json", str(target)).stdout)
    at = next(r for r in listed if r["start"] <= 7 * MIB < r["start"] + r["length"])
    assert at["data"]


@pytest.mark.parametrize(
    "options",
    [
        ["-n"],
        ["--salvage"],
        ["--reflink=always"],
        ["-B", "base.raw", "-F", "raw"],
        ["-o", "subformat=streamOptimized", "-O", "vmdk"],
        ["-o", "subformat=fixed", "-O", "vhd"],
    ],
    ids=str,
)
def test_what_it_does_not_go_with(options: list[str], disk: Path, tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(MIB))
    (tmp_path / "copy").write_bytes(bytes(MIB))
    words = ["convert", "--force", "-O", "qcow2", "-o", "tables=front", *options, disk.name, "copy"]
    done = imgcore_command(*words, cwd=tmp_path)
    assert_one_line_error(done, "", code=2)
    assert (tmp_path / "copy").read_bytes() == bytes(MIB)


def test_a_stream_as_source_is_refused(disk: Path, tmp_path: Path) -> None:
    imgcore.convert(disk, tmp_path / "disk.raw.gz")
    with pytest.raises(imgcore.UnsupportedFeatureError, match="save the source to a file first"):
        imgcore.convert(tmp_path / "disk.raw.gz", io.BytesIO(), target_format="qcow2")


def test_two_passes_are_said(disk: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    done = imgcore_command(
        "convert", "-c", "-O", "qcow2", "-o", "tables=front", str(disk), str(tmp_path / "c.qcow2")
    )
    assert done.returncode == 0
    assert "take two passes, and twice the time" in done.stderr


def test_two_passes_are_two_halves(disk: Path) -> None:
    control, seen = imgcore.Control(), []

    def note(progress: imgcore.Progress) -> None:
        seen.append((progress, control.progress().phase))

    imgcore.convert(
        disk,
        io.BytesIO(),
        target_format="qcow2",
        compress=True,
        progress=note,
        control=control,
        options={"cluster_size": 4096},
    )
    total = disk.stat().st_size
    first = [progress for progress, phase in seen if phase == "measuring"]
    assert 0 < max(progress.done for progress in first) <= total // 2
    assert {progress.written for progress in first} == {0}
    assert seen[-1][0].done == total
    for (before, _), (after, _) in itertools.pairwise(seen):
        assert all(a <= b for a, b in zip(before, after, strict=True))
        assert after.data + after.zero == after.done


@pytest.mark.parametrize("format", OPTIONS)
def test_an_empty_image(format: str, tmp_path: Path) -> None:
    """`create` makes what a conversion of an empty disk makes."""
    empty, options = tmp_path / "empty.raw", {**OPTIONS[format], "tables": "front"}
    empty.touch()
    os.truncate(empty, 100 * MIB)
    created, converted = tmp_path / f"a.{format}", tmp_path / f"b.{format}"
    imgcore.create(created, 100 * MIB, options=options)
    imgcore.convert(empty, converted, options=options)
    one, other = created.read_bytes(), converted.read_bytes()
    if format in ("vmdk", "vhd"):  # names and times are in them
        assert len(one) == len(other)
    else:
        assert one == other
    assert imgcore.compare(created, empty).identical


def test_an_empty_image_with_a_parent(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(imgcore.OptionError, match="cannot have its tables in front"):
        imgcore.create(
            tmp_path / "child.qcow2",
            backing=disk,
            backing_format="raw",
            options={"tables": "front"},
        )
    assert not (tmp_path / "child.qcow2").exists()


@pytest.mark.parametrize("compress", [False, True])
def test_a_source_that_changes(compress: bool, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables are written when it changes: there is an error, no wrong image."""
    rehearse = front_sink.FrontSink._rehearse

    def changing(*arguments: Any) -> Any:
        with open(disk, "r+b") as file:
            file.seek(30 * MIB)
            file.write(noise(100_000))
        return rehearse(*arguments)

    monkeypatch.setattr(front_sink.FrontSink, "_rehearse", changing)
    with pytest.raises(imgcore.ImgcoreError, match="changed while it was read"):
        imgcore.convert(disk, io.BytesIO(), target_format="qcow2", compress=compress)


def test_checksums_and_results(disk: Path) -> None:
    target = io.BytesIO()
    result = imgcore.convert(disk, target, target_format="qcow2", checksum="sha256")
    assert result.checksum == imgcore.checksum(disk)
    assert result.file_size == len(target.getvalue())
    assert result.bytes_written <= result.file_size


def test_an_empty_disk_of_64_tib(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.touch()
    os.truncate(disk, 1 << 43)
    target = tmp_path / "disk.qcow2"
    imgcore.convert(disk, target, options={"tables": "front"})
    assert target.stat().st_size < 16 * MIB
    assert imgcore.check(target).corruptions == 0


# -- blocks and places -----------------------------------------------------------------


@pytest.mark.parametrize("packs_in_order", [False, True])
def test_places_are_those_of_a_job(packs_in_order: bool) -> None:
    """STORED and COMPRESSED blocks mix; a job gives out the same offsets."""
    from imgcore._core import File, Job
    from imgcore.engine.extents import EXTENT_DTYPE

    chance = random.Random(5)
    size, n = 4096, 2000
    parts = [noise(size, i) if chance.random() < 0.5 else text(size, i) for i in range(n)]
    content = b"".join(parts)
    geometry = Geometry(
        block_nbytes=size,
        guest_nbytes=len(content),
        stored_alignment=size,
        compressed_alignment=1,
        store_incompressible=True,
        codec=Codec(CodecId.ZSTD, level=1),
        packs_in_order=packs_in_order,
    )
    file = File.from_memory(content)
    job = Job(
        sources=[(file, len(content), 0, 0)],
        geometry=geometry,
        target=File.null(),
        next_offset=size,
        threads=3,
    )
    rows = np.zeros(n, dtype=PLACEMENT_DTYPE)
    extents = single(0, len(content), Kind.DATA)
    assert extents.dtype == EXTENT_DTYPE
    job.run(0, len(content), extents, placements=rows)
    assert set(rows["state"]) == {BlockState.STORED, BlockState.COMPRESSED}
    table = BlockTable(geometry)
    for first in range(0, n, 700):
        table.add(first, rows[first : first + 700])
    places = Places(geometry, size)
    ((first, ours),) = table.chunks()
    places.give(first, ours)
    assert np.array_equal(ours, rows)
    assert places.next_offset == job.next_offset
    assert packs_in_order == bool((np.diff(rows["host_offset"].astype(np.int64)) > 0).all())
    job.close()


@pytest.mark.parametrize("seed", range(20))
def test_blocks_of_extents(seed: int) -> None:
    chance = random.Random(seed)
    block, nbytes = 1 << 16, (1 << 16) * 400_000
    geometry = Geometry(block_nbytes=block, guest_nbytes=nbytes)
    expected: set[int] = set()
    batches, at = [], 0
    while at < nbytes:
        length = min(
            chance.choice((512, 65536, 1 << 20, 1 << 34)) * chance.randint(1, 9), nbytes - at
        )
        if chance.random() < 0.5 and length < 1 << 28:
            batches.append(single(at, length, Kind.DATA))
            expected.update(range(at // block, -(-(at + length) // block)))
        at += length
    joined = [np.concatenate(batches[i : i + 3]) for i in range(0, len(batches), 3)]
    table = BlockTable.of_data(geometry, joined)
    found = {
        int(first + i) for first, rows in table.chunks() for i in np.flatnonzero(rows["state"])
    }
    assert found == expected


def test_rewriting_leaves_tables_in_front_to_a_copy(tmp_path: Path) -> None:
    raw = tmp_path / "small.raw"
    raw.write_bytes(noise(MIB))
    options = ("-O", "qcow2", "-o", "tables=front", str(raw))
    done = imgcore_command("rewrite", *options)
    assert_one_line_error(done, "tables=front needs a copy: use imgcore convert", code=2)
    done = imgcore_command("convert", *options, str(tmp_path / "copy.qcow2"))
    assert done.returncode == 0, done.stderr
    assert imgcore.compare(raw, tmp_path / "copy.qcow2").identical
