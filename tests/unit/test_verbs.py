"""info, map, check, measure and create, compared with qemu-img."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers import qemu
from tests.helpers.command import assert_one_line_error
from tests.helpers.reading import poke

import imgcore
from imgcore import _core
from imgcore.cli import main as cli
from imgcore.cli.progress import reporter
from imgcore.disk.data_ranges import count_blocks
from imgcore.engine.extents import EXTENT_DTYPE, Kind
from imgcore.verbs import compare
from imgcore.verbs.map import MapEntry

MIB = 1 << 20


def command(
    *arguments: str | os.PathLike[str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which has the modules imported already."""
    out, errors = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(errors),
        contextlib.chdir(cwd or "."),
    ):
        code = cli.main([os.fspath(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), errors.getvalue())


def qemu_json(verb: str, *arguments: str | os.PathLike[str]) -> Any:
    done = subprocess.run(
        [qemu.require_qemu_img(), verb, "--output=json", *map(os.fspath, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def write(path: Path, image_format: str, *commands: str) -> None:
    """Write into an image with qemu-io, which is in the folder of qemu-img."""
    program = qemu.find_program("qemu-io")
    if program is None:
        pytest.skip("qemu-io is not installed (Debian: qemu-utils)")
    arguments = [word for line in commands for word in ("-c", line)]
    subprocess.run([program, "-f", image_format, *arguments, path], capture_output=True, check=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder of small images by qemu-img, one of each kind and state."""
    folder = tmp_path_factory.mktemp("verbs")
    raw = folder / "disk.raw"
    qemu.run("create", "-q", "-f", "raw", raw, "10M")
    write(raw, "raw", "write -P 1 1M 128k", "write -P 2 5M 4k")
    for variant in (*qemu.VARIANTS[1:], qemu.QCOW2.with_options("cluster_size=512")):
        qemu.convert(raw, folder / f"{variant.name}{variant.suffix}", variant)
    base = folder / "base.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", base, "10M")
    write(base, "qcow2", "write 1M 128k", "write 1280k 64k", "write -z 3M 64k")
    top = folder / "top.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top, "12M")
    write(top, "qcow2", "write 2M 64k", "write -z 1M 64k")
    for name, place in (("on-raw", "5M"), ("tail", "10752k"), ("grown", "")):
        path = folder / f"{name}.qcow2"
        qemu.run("create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", path, "11M")
        if place:
            write(path, "qcow2", f"write {place} 64k")
    qemu.run("create", "-q", "-f", "qcow2", folder / "empty.qcow2", "1G")
    qemu.run("create", "-q", "-f", "qcow2", folder / "snapshot.qcow2", "1M")
    qemu.run("snapshot", "-c", "before update", folder / "snapshot.qcow2")
    return folder


IMAGES = (
    "disk.raw",
    "qcow2.qcow2",
    "qcow2-cluster_size_512.qcow2",
    "qcow2-zlib.qcow2",
    "qcow2-zstd.qcow2",
    "vmdk-monolithicSparse.vmdk",
    "vmdk-streamOptimized.vmdk",
    "vmdk-monolithicFlat.vmdk",
    "base.qcow2",
    "top.qcow2",
    "on-raw.qcow2",
    "empty.qcow2",
    "snapshot.qcow2",
)


def image_format(name: str) -> str:
    return {".raw": "raw", ".qcow2": "qcow2", ".vmdk": "vmdk"}[Path(name).suffix]


@pytest.mark.parametrize("name", IMAGES)
def test_info_is_that_of_qemu_img(name: str, folder: Path) -> None:
    path = folder / name
    ours = imgcore.info(path)
    theirs = qemu_json("info", "-f", image_format(name), path)
    keys = {key for key in theirs if key not in ("children", "format-specific")}
    assert {key: ours.get(key) for key in keys} == {key: theirs[key] for key in keys}
    expected = theirs.get("format-specific", {}).get("data", {})
    found = ours.get("format-specific", {}).get("data", {})
    for key in expected.keys() - {"extents"}:
        assert found[key] == expected[key]
    for mine, other in zip(found.get("extents", ()), expected.get("extents", ()), strict=True):
        # qemu-img leaves the format of sparse extents empty.
        keys = {key for key in other if other[key] != ""}
        assert {key: mine[key] for key in keys} == {key: other[key] for key in keys}


@pytest.mark.parametrize("name", ["disk.raw", "qcow2.qcow2", "top.qcow2", "empty.qcow2"])
def test_info_for_people_reads_like_qemu_img(name: str, folder: Path) -> None:
    ours = command("info", folder / name).stdout.splitlines()
    theirs = qemu.run("info", "-f", image_format(name), folder / name).stdout
    # Newer versions add a section on the file.
    expected = theirs.split("Child node")[0].splitlines()
    assert sorted(ours) == sorted(expected)


def test_info_for_people_lists_snapshots(folder: Path) -> None:
    lines = command("info", folder / "snapshot.qcow2").stdout.splitlines()
    at = lines.index("Snapshot list:")
    assert lines[at + 1].split() == ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]
    assert lines[at + 2].startswith("1       before update")
    assert "00:00:00.000" in lines[at + 2]


def test_info_of_an_image_in_use(tmp_path: Path) -> None:
    """The dirty bit is set, since a program has the image open."""
    path = tmp_path / "a.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", path, "1M")
    poke(path, (72, (1).to_bytes(8, "big")))
    assert "cleanly shut down: no" in command("info", path).stdout.splitlines()


def test_info_of_a_chain(folder: Path) -> None:
    chain = imgcore.info(folder / "top.qcow2", chain=True)
    assert [os.path.basename(layer["filename"]) for layer in chain] == ["top.qcow2", "base.qcow2"]
    assert [layer["virtual-size"] for layer in chain] == [12 * MIB, 10 * MIB]
    done = command("info", "--backing-chain", "--json", folder / "on-raw.qcow2")
    assert [layer["format"] for layer in json.loads(done.stdout)] == ["qcow2", "raw"]
    done = command("info", "--backing-chain", folder / "on-raw.qcow2")
    assert done.stdout.count("image: ") == 2


def test_info_of_one_image_opens_no_backing_file(tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", "-u", "-b", "gone.qcow2", "-F", "qcow2", top, "1M")
    assert imgcore.info(top)["backing-filename"] == "gone.qcow2"
    assert_one_line_error(command("info", "--backing-chain", top), "gone.qcow2")


def test_chain_that_does_not_state_a_format(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", base, "1M")
    qemu.run("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top)
    # The header extension for the format gets an unknown type.
    top.write_bytes(top.read_bytes().replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78", 1))
    with pytest.raises(imgcore.WrongFormatError, match=r"base\.qcow2"):
        imgcore.info(top, chain=True)
    assert len(imgcore.info(top, chain=True, backing_format="qcow2")) == 2


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
def test_info_of_a_compressed_raw_disk(suffix: str, tmp_path: Path) -> None:
    import gzip

    import zstandard

    path = tmp_path / f"disk.raw{suffix}"
    data = bytes(MIB)
    path.write_bytes(zstandard.compress(data) if suffix == ".zst" else gzip.compress(data))
    answer = imgcore.info(path)
    assert (answer["format"], answer["virtual-size"]) == ("raw", MIB)


def normalised(rows: list[dict[str, Any]], *, flat: bool) -> list[dict[str, Any]]:
    """Remove differences that are intended.

    Older versions of qemu-img do not report ``compressed``.  They report a hole in the
    flat file of a VMDK as ``data``, with its offset.
    """
    kept = []
    for row in rows:
        row = {key: value for key, value in row.items() if key != "compressed"}
        if flat and row["zero"]:
            row.pop("offset", None)
            row["data"] = False
        kept.append(row)
    return kept


@pytest.mark.parametrize("name", IMAGES)
def test_map_is_that_of_qemu_img(name: str, folder: Path) -> None:
    done = command("map", "--output=json", folder / name)
    assert done.returncode == 0, done.stderr
    theirs = qemu.run("map", "--output=json", "-f", image_format(name), folder / name).stdout
    flat = "Flat" in name
    assert normalised(json.loads(done.stdout), flat=flat) == normalised(
        json.loads(theirs), flat=flat
    )
    if not flat and '"compressed"' in theirs:
        assert done.stdout == theirs


@pytest.mark.parametrize("name", ["disk.raw", "qcow2.qcow2", "vmdk-monolithicSparse.vmdk"])
@pytest.mark.parametrize(
    ("start", "length"), [(MIB, 100), (100, MIB), (MIB + 1, 10 * MIB), (0, 1), (10 * MIB - 1, 9)]
)
def test_map_of_a_range(name: str, start: int, length: int, folder: Path) -> None:
    options = [f"--start-offset={start}", f"--max-length={length}"]
    done = command("map", "--json", *options, folder / name)
    theirs = qemu_json("map", "-f", image_format(name), *options, folder / name)
    assert normalised(json.loads(done.stdout), flat=False) == normalised(theirs, flat=False)


def test_map_of_a_range_past_the_end(folder: Path) -> None:
    assert command("map", "--json", "--start-offset=1T", folder / "qcow2.qcow2").stdout == "[]\n"


@pytest.mark.parametrize(
    "name", ["disk.raw", "qcow2.qcow2", "top.qcow2", "vmdk-monolithicFlat.vmdk"]
)
def test_map_table_is_that_of_qemu_img(name: str, folder: Path) -> None:
    ours = command("map", name, cwd=folder)
    theirs = subprocess.run(
        [qemu.require_qemu_img(), "map", "-f", image_format(name), name],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    # imgcore names the layers below the first by their full paths.
    assert ours.stdout.replace(f"{folder}/", "") == theirs.stdout


def test_map_table_names_what_is_compressed(folder: Path) -> None:
    done = command("map", folder / "qcow2-zlib.qcow2")
    assert done.returncode == 0
    assert done.stdout.splitlines()[1].split()[:3] == ["0x100000", "0x20000", "compressed"]


def test_map_yields_named_entries(folder: Path) -> None:
    entries = list(imgcore.map(folder / "disk.raw", start=MIB, length=128 * 1024))
    path = str(folder / "disk.raw")
    assert entries == [MapEntry(MIB, 131072, 0, True, False, True, False, MIB, path)]


def test_map_joins_over_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from imgcore.disk import image
    from imgcore.verbs import map

    with image.open(folder / "top.qcow2") as image:
        whole = list(map.map_image(image, 0, image.virtual_size))
        layer_extents = image.layer_extents

        def split(start: int, length: int) -> Iterator[Any]:
            for batch, depths in layer_extents(start, length):
                for row in range(len(batch)):
                    yield batch[row : row + 1].copy(), depths[row : row + 1].copy()

        monkeypatch.setattr(image, "layer_extents", split)
        assert list(map.map_image(image, 0, image.virtual_size)) == whole


@pytest.mark.parametrize("name", [name for name in IMAGES if name.endswith(".qcow2")])
def test_check_counts_as_qemu_img(name: str, folder: Path) -> None:
    ours = imgcore.check(folder / name).as_dict()
    theirs = qemu_json("check", folder / name)
    assert ours == theirs
    done = command("check", folder / name)
    assert done.stdout == qemu.run("check", folder / name).stdout


@pytest.mark.parametrize("name", ["vmdk-monolithicSparse.vmdk", "vmdk-streamOptimized.vmdk"])
def test_check_of_a_vmdk(name: str, folder: Path) -> None:
    assert imgcore.check(folder / name).ok


@pytest.mark.parametrize("kind", ["leak", "corruption"])
def test_check_finds_what_qemu_img_finds(kind: str, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.qcow2"
    data = bytearray((folder / "qcow2.qcow2").read_bytes())
    table = int.from_bytes(data[48:56], "big")
    block = int.from_bytes(data[table : table + 8], "big")
    if kind == "leak":
        last = len(data) // 65536
        data += bytes(65536)
        data[block + 2 * last : block + 2 * last + 2] = b"\0\1"
    else:
        data[block + 2 * 5 : block + 2 * 5 + 2] = b"\0\0"
    path.write_bytes(data)
    done = command("check", "--output=json", path)
    assert done.returncode == (3 if kind == "leak" else 2)
    theirs = qemu_json("check", path)
    ours = json.loads(done.stdout)
    assert ours.pop("problems")
    assert {key: ours.get(key, 0) for key in ("leaks", "corruptions")} == {
        key: theirs.get(key, 0) for key in ("leaks", "corruptions")
    }


def test_check_of_raw(folder: Path) -> None:
    assert_one_line_error(command("check", folder / "disk.raw"), "disk.raw", code=63)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("options", [(), ("cluster_size=2M",), ("cluster_size=512",)], ids=str)
def test_measure_is_that_of_qemu_img(name: str, options: tuple[str, ...], folder: Path) -> None:
    arguments = [word for option in options for word in ("-o", option)]
    ours = imgcore.measure(folder / name, target_format="qcow2", options=options)
    theirs = qemu_json(
        "measure", "-f", image_format(name), "-O", "qcow2", *arguments, folder / name
    )
    assert (ours.required, ours.fully_allocated) == (theirs["required"], theirs["fully-allocated"])


@pytest.mark.parametrize("size", ["0", "512", "1M", "10G", "3T"])
def test_measure_of_a_size(size: str) -> None:
    done = command("measure", "--json", "-O", "qcow2", "--size", size)
    theirs = qemu_json("measure", "-O", "qcow2", "--size", size)
    theirs.pop("bitmaps", None)
    assert json.loads(done.stdout) == theirs


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_measure_of_what_is_allocated_before(mode: str, folder: Path) -> None:
    options = ["subformat=monolithicFlat", f"preallocation={mode}"]
    found = imgcore.measure(folder / "disk.raw", target_format="vmdk", options=options)
    assert found.required == found.fully_allocated > 10 * MIB


def test_measure_takes_one_source() -> None:
    with pytest.raises(imgcore.OptionError):
        imgcore.measure()
    with pytest.raises(imgcore.OptionError):
        imgcore.measure("a", size=1)


def test_count_blocks_by_hand() -> None:
    rows = [
        (0, 512, Kind.DATA),
        (512, 512, Kind.HOLE),
        (1024, 512, Kind.ZLIB),
        (1536, 2560, Kind.DATA),
        (4096, 4096, Kind.ZERO),
        (8192, 4096, Kind.DATA),
    ]
    batch = np.zeros(len(rows), dtype=EXTENT_DTYPE)
    for name, column in zip(
        ("guest_offset", "length", "kind"), zip(*rows, strict=True), strict=True
    ):
        batch[name] = column
    for size, expected in ((512, 15), (4096, 2), (8192, 2), (65536, 1)):
        assert count_blocks([batch], size) == expected
        assert count_blocks([batch[i : i + 1] for i in range(len(batch))], size) == expected


@pytest.mark.parametrize("size", ["0", "512", "64k", "10M", "3G", "1T"])
@pytest.mark.parametrize("suffix", ["raw", "qcow2", "vmdk"])
def test_create_makes_what_qemu_img_reads(suffix: str, size: str, tmp_path: Path) -> None:
    if suffix == "vmdk" and size == "0":
        pytest.skip("a VMDK has at least one sector")
    path = tmp_path / f"new.{suffix}"
    done = command("create", "--no-sync", path, size)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Formatting '{path}', fmt={suffix} size=")
    theirs = qemu.info(path, suffix)
    assert theirs["virtual-size"] == imgcore.info(path)["virtual-size"]
    assert path.stat().st_blocks * 512 < 2 * MIB
    if suffix == "qcow2":
        qemu.assert_check_clean(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_create_on_a_backing_file(folder: Path) -> None:
    path = folder / "overlay.qcow2"
    result = imgcore.create(path, backing="base.qcow2", backing_format="qcow2", sync=False)
    try:
        assert (result.virtual_size, result.backing) == (10 * MIB, "base.qcow2")
        theirs = qemu.info(path, "qcow2")
        assert theirs["backing-filename"] == "base.qcow2"
        assert theirs["backing-filename-format"] == "qcow2"
        qemu.assert_same(folder / "base.qcow2", path, source_format="qcow2", target_format="qcow2")
    finally:
        path.unlink()


def test_create_tells_what_it_made(folder: Path, tmp_path: Path) -> None:
    base = str(folder / "base.qcow2")
    words = ("create", "--no-sync", "--allow", folder, "-b", base, "-F", "qcow2")
    done = command(*words, tmp_path / "a.qcow2")
    assert done.returncode == 0, done.stderr
    assert f"size={10 * MIB} backing_file={base} backing_fmt=qcow2 " in done.stdout
    done = command(*words, "--json", tmp_path / "b.qcow2")
    answer = json.loads(done.stdout)
    assert (answer["virtual_size"], answer["backing"]) == (10 * MIB, base)


CREATE_ERRORS = {
    "no-size": ((), {"format": "qcow2"}, imgcore.OptionError),
    "no-format": ((MIB,), {}, imgcore.OptionError),
    "odd-size": ((1000,), {"format": "raw"}, imgcore.OptionError),
    "unknown-option": ((MIB,), {"format": "raw", "options": ["x=1"]}, imgcore.OptionError),
    "unknown-format": ((MIB,), {"format": "x"}, imgcore.OptionError),
    "backing-without-format": ((MIB,), {"format": "qcow2", "backing": "b"}, imgcore.OptionError),
    "format-without-backing": (
        (MIB,),
        {"format": "qcow2", "backing_format": "raw"},
        imgcore.OptionError,
    ),
    "too-large-for-a-fixed-vhd": (
        ((1 << 63) - 512,),
        {"format": "vhd", "options": ["subformat=fixed"]},
        imgcore.LimitExceededError,
    ),
    "backing-missing": (
        (MIB,),
        {"format": "qcow2", "backing": "gone", "backing_format": "raw"},
        FileNotFoundError,
    ),
}


@pytest.mark.parametrize("case", CREATE_ERRORS)
def test_create_refuses(case: str, tmp_path: Path) -> None:
    arguments, options, error = CREATE_ERRORS[case]
    with pytest.raises(error):
        imgcore.create(tmp_path / "new", *arguments, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [{"backing": "b"}, {"backing_format": "raw"}, {"format": ""}])
def test_create_does_not_guess_formats(words: dict[str, str], tmp_path: Path) -> None:
    path = str(tmp_path / "new.qcow2")
    with pytest.raises(imgcore.OptionError, match="format") as caught:
        imgcore.create(path, MIB, **words)
    assert caught.value.path == (None if "format" in words else path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["new.raw.zst", "new.img.gz"])
def test_create_makes_no_stream(name: str, tmp_path: Path) -> None:
    with pytest.raises(imgcore.OptionError, match="only convert writes"):
        imgcore.create(tmp_path / name, MIB)
    assert list(tmp_path.iterdir()) == []


def test_create_replaces_only_by_force(tmp_path: Path) -> None:
    path = tmp_path / "new.qcow2"
    path.write_bytes(b"precious")
    with pytest.raises(imgcore.TargetError):
        imgcore.create(path, MIB)
    assert path.read_bytes() == b"precious"
    imgcore.create(path, MIB, force=True, sync=False)
    with pytest.raises(imgcore.TargetError):
        imgcore.create(path, backing=path, backing_format="qcow2", force=True)
    qemu.assert_check_clean(path)


COMPARISONS = {
    "same-content": ("disk.raw", "qcow2-zstd.qcow2"),
    "other-content": ("disk.raw", "base.qcow2"),
    "larger-with-zeros": ("disk.raw", "grown.qcow2"),
    "larger-with-data": ("tail.qcow2", "disk.raw"),
    "larger-and-other": ("base.qcow2", "top.qcow2"),
    "strict-same": ("-s", "qcow2.qcow2", "qcow2.qcow2"),
    "strict-sizes": ("-s", "base.qcow2", "top.qcow2"),
    "strict-allocation": ("-s", "qcow2.qcow2", "qcow2-cluster_size_512.qcow2"),
}


@pytest.mark.parametrize("case", COMPARISONS)
def test_compare_says_what_qemu_img_says(case: str, folder: Path) -> None:
    *options, a, b = COMPARISONS[case]
    ours = command("compare", *options, a, b, cwd=folder)
    line = [qemu.require_qemu_img(), "compare", *options, "-f", image_format(a)]
    line += ["-F", image_format(b), a, b]
    theirs = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)


def test_compare_reports_its_progress(tmp_path: Path) -> None:
    for name in ("a.raw", "b.raw"):
        (tmp_path / name).write_bytes(b"x" * 8192)
    states: list[tuple[int, int]] = []
    imgcore.compare(
        tmp_path / "a.raw",
        tmp_path / "b.raw",
        progress=lambda state: states.append((state.done, state.total)),
    )
    assert states[-1] == (8192, 8192)


def test_compare_of_empty_disks_takes_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[tuple[int, int]] = []

    class CountingJob(_core.Job):
        def start(self, start: int, end: int, *rows: Any) -> None:
            starts.append((start, end))
            super().start(start, end, *rows)

    monkeypatch.setattr(compare, "Job", CountingJob)
    nbytes = 8 << 40
    for name in ("a.raw", "b.raw"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(nbytes)
    assert imgcore.compare(tmp_path / "a.raw", tmp_path / "b.raw").identical
    assert starts == [(0, nbytes)]


@pytest.mark.parametrize("format", ["raw", "vpc", "vdi", "vmdk"])
def test_a_disk_that_becomes_shorter_is_no_hole(tmp_path: Path, format: str) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(os.urandom(4 << 20))
    path = tmp_path / f"a.{format}"
    flat = {"raw": (), "vmdk": ("subformat=monolithicFlat",)}.get(format, ("subformat=fixed",))
    imgcore.convert(disk, path, target_format=format, options=flat, sync=False)
    stored = path.with_name("a-flat.vmdk") if format == "vmdk" else path
    with imgcore.open(path) as image:
        os.truncate(stored, 3 << 20)
        with pytest.raises(imgcore.CorruptImageError, match="ends before"):
            image.read(0, image.virtual_size)


def test_allow_is_a_sequence(folder: Path) -> None:
    image = folder / "disk.raw"
    for call in (imgcore.info, imgcore.open, imgcore.check):
        with pytest.raises(imgcore.OptionError, match="sequence of folders, not '/'"):
            call(image, allow="/")  # type: ignore[operator]
    with pytest.raises(imgcore.OptionError, match="sequence of folders"):
        imgcore.convert(image, folder / "no.qcow2", allow=folder)  # type: ignore[arg-type]


def test_compare_with_what_cannot_be_read(folder: Path) -> None:
    done = command("compare", folder / "disk.raw", folder / "gone.raw")
    assert_one_line_error(done, "gone.raw", code=2)


PARENT_LINES = {
    "info": "info --backing-chain {top} --parent {base}",
    "map": "map {top} --parent {base}",
    "check": "check {top} --parent {base}",
    "measure": "measure {top} --parent {base}",
    "convert": "convert {top} {out} --parent {base}",
    "compare": "compare {top} {whole} --parent {base}",
    "compare-b": "compare {whole} {top} --parent-b {base}",
}


@pytest.mark.parametrize("case", PARENT_LINES)
def test_a_given_parent(case: str, folder: Path, tmp_path: Path) -> None:
    """It replaces the file that the image names, and is verified in the same way."""
    names = {name: tmp_path / f"{name}.vmdk" for name in ("top", "base", "whole", "other")}
    (tmp_path / "elsewhere").mkdir()
    for name in ("base", "other"):
        qemu.convert(folder / "disk.raw", names[name], qemu.VMDK_SPARSE)
    qemu.run("create", "-q", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", names["top"])
    write(names["top"], "vmdk", "write -P 3 2M 64k")
    qemu.run("convert", "-O", "vmdk", names["top"], names["whole"])
    names["base"] = names["base"].rename(tmp_path / "elsewhere" / "moved.vmdk")
    words = PARENT_LINES[case].format(out=tmp_path / "out.raw", **names).split()
    done = command(*words)
    assert (done.returncode, done.stderr) == (0, "")
    code = 2 if case.startswith("compare") else 1
    other = str(names["other"])
    assert_one_line_error(
        command(*words[:-1], other, "--force" if case == "convert" else "-U"),
        "created from a parent with content ID",
        other,
        code=code,
    )
    if case != "check":
        assert_one_line_error(command(*words[:-2]), "base.vmdk", "no such file", code=code)


def test_a_parent_of_an_image_without_one(folder: Path) -> None:
    base = folder / "base.qcow2"
    assert_one_line_error(command("map", "--parent", base, base), "the image has none", code=2)
    done = command("info", "--parent", base, folder / "top.qcow2")
    assert_one_line_error(done, "only the image itself", code=2)


@pytest.fixture(scope="module")
def long_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a raw disk that takes seconds to compress."""
    path = tmp_path_factory.mktemp("long") / "source.raw"
    chunk = np.random.default_rng(0).integers(0, 64, 8 * MIB, np.uint8).tobytes()
    with open(path, "wb") as file:
        for _ in range(24):
            file.write(chunk)
    return path


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_leaves_no_target(number: int, code: int, long_job: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "imgcore", "convert", "-c", "-m", "1", "-o", "level=best"]
    line += ["--progress=json", "--no-sync", str(long_job), str(tmp_path / "out.qcow2")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        assert job.stderr is not None
        assert '"done"' in job.stderr.readline()
        started = time.monotonic()
        job.send_signal(number)
        _, errors = job.communicate(timeout=30)
        seconds = time.monotonic() - started
    assert job.returncode == code
    assert seconds < 1
    assert errors.splitlines()[-1] == f"imgcore: ended by {signal.Signals(number).name}"
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_error(folder: Path) -> None:
    line = [sys.executable, "-m", "imgcore", "info", str(folder / "qcow2.qcow2")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        assert job.stdout is not None
        job.stdout.close()
        assert job.stderr is not None
        errors = job.stderr.read()
    assert (job.returncode, errors) == (141, b"")


@pytest.mark.parametrize("redirections", ["", ">&-", "2>&-", ">&- 2>&-", ">/dev/full"])
def test_closed_and_full_streams(redirections: str, tmp_path: Path) -> None:
    script = f'exec "$0" -m imgcore create --no-sync new-é.raw 1M {redirections}'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == (1 if "full" in redirections else 0)
    assert len(done.stderr.splitlines()) == ("full" in redirections)
    assert [path.name for path in tmp_path.iterdir()] == ["new-é.raw"]
    assert (tmp_path / "new-é.raw").read_bytes() == bytes(MIB)


@pytest.mark.parametrize("stream", ["full", "closed-pipe"])
@pytest.mark.parametrize("flag", ["-p", "--progress=json", "--progress=bar"])
def test_a_job_does_not_fail_for_its_reports(flag: str, stream: str, tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(MIB))
    if stream == "full":
        errors = os.open("/dev/full", os.O_WRONLY)
    else:
        end, errors = os.pipe()
        os.close(end)
    line = [sys.executable, "-m", "imgcore", "convert", "--no-sync", flag, "a.raw", "b.raw"]
    try:
        done = subprocess.run(
            line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=errors, check=False
        )
    finally:
        os.close(errors)
    assert done.returncode == 0
    assert re.fullmatch(rb"( +\([0-9.]+/100%\)\r)+\n" if flag == "-p" else b"", done.stdout)
    assert (tmp_path / "b.raw").read_bytes() == bytes(MIB)


@pytest.mark.parametrize("line", ["check", "measure -O vhdx", "measure --rewrite -O vhdx"])
def test_progress_of_verbs_that_read_tables(line: str, folder: Path) -> None:
    words = [*line.split(), "--progress=json", "--rate=64M", str(folder / "qcow2.qcow2")]
    done = subprocess.run(
        [sys.executable, "-m", "imgcore", *words], capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert (done.returncode, lines[-1]["phase"], lines[-1]["percent"]) == (0, "done", 100.0)
    assert lines[-1]["done"] == lines[-1]["total"] > 0


def test_progress_towards_an_unknown_total(capsys: pytest.CaptureFixture[str]) -> None:
    """A stream that has not ended, or tables."""
    state = imgcore.Progress(3 * MIB, 0, 3 * MIB, 0, 0)
    for mode, text in {
        "json": '"percent": null, "rate": ',
        "plain": "3 MiB, ",
        "qemu": "(0.00/100%)\r    (100.00/100%)\r\n",
    }.items():
        report = reporter(mode, wanted=True, quiet=False, label="", as_json=False)
        with report:
            assert report.rate_and_seconds_left(state)[1] is None
            report.update(state)
            report.show(state)
        assert text in "".join(capsys.readouterr())


def test_a_warning_that_nobody_can_read_is_no_failure(folder: Path) -> None:
    script = """if True:
        import sys
        from imgcore.cli import main as cli
        from imgcore.log import log
        import imgcore.verbs.info as verb
        plain = verb.info
        def info(*args, **kwargs):
            log.warning("odd")
            return plain(*args, **kwargs)
        verb.info = info
        sys.exit(cli.main())
    """
    line = 'exec "$0" -c "$1" info "$2" 2>/dev/full'
    name = str(folder / "qcow2.qcow2")
    done = subprocess.run(
        ["sh", "-c", line, sys.executable, script, name], capture_output=True, check=False
    )
    assert done.returncode == 0
    assert done.stdout.startswith(b"image: ")
