"""The VMDK reader on images made by hand, sound and damaged."""

from __future__ import annotations

import logging
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.helpers import qemu, vmdk
from tests.helpers.images import noise, text
from tests.helpers.mounts import loop_device
from tests.helpers.reading import extent_rows, poke
from tests.helpers.vmdk import GRAIN, SECTOR, open_vmdk, read_guest

import imgcore
from imgcore.engine.extents import Kind
from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    UnsafeReferenceError,
    UnsupportedFeatureError,
    WrongFormatError,
)
from imgcore.formats.magic import matching_formats

MIB = 1 << 20
N_SECTORS = 10 * GRAIN // SECTOR + 7
TAIL = N_SECTORS * SECTOR % GRAIN


def _contents() -> dict[int, bytes]:
    return {
        0: text(GRAIN),
        1: noise(GRAIN),
        4: b"A" * GRAIN,
        5: text(GRAIN, 5),
        10: noise(GRAIN, 6),
    }


def _guest(contents: dict[int, bytes]) -> bytes:
    whole = b"".join(contents.get(i, b"").ljust(GRAIN, b"\0") for i in range(11))
    return whole[: N_SECTORS * SECTOR]


LAYOUTS = ["footer", "patched", "front"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("short_tail", [False, True], ids=["whole-tail", "short-tail"])
def test_stream_layouts(tmp_path: Path, layout: str, short_tail: bool) -> None:
    contents = _contents()
    stored = contents | ({10: contents[10][:TAIL]} if short_tail else {})
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, stored, layout=layout)
    reader = open_vmdk(path)
    assert reader.subformat == "streamOptimized"
    assert read_guest(reader) == _guest(contents)
    assert [(row[0] // GRAIN, row[5]) for row in extent_rows(reader)] == [
        (0, Kind.ZLIB),
        (1, Kind.ZLIB),
        (2, Kind.HOLE),
        (4, Kind.ZLIB),
        (5, Kind.ZLIB),
        (6, Kind.HOLE),
        (10, Kind.ZLIB),
    ]
    with imgcore.open(path) as image:
        guest = _guest(contents)
        assert image.read(0, len(guest)) == guest
        # A part of the last grain, which may be truncated.
        assert image.read(len(guest) - TAIL, SECTOR) == guest[-TAIL:][:SECTOR]
        assert image.read(len(guest) - SECTOR, SECTOR) == guest[-SECTOR:]


@pytest.mark.parametrize("trailing_sectors", [0, 1, 127, 2046])
def test_zero_sectors_after_the_end(tmp_path: Path, trailing_sectors: int) -> None:
    contents = _contents()
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, contents, trailing_sectors=trailing_sectors)
    assert read_guest(open_vmdk(path)) == _guest(contents)


def test_a_truncated_stream_is_refused(tmp_path: Path) -> None:
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, _contents())
    whole = path.read_bytes()
    for nbytes in range(0, len(whole), SECTOR):
        path.write_bytes(whole[:nbytes])
        with pytest.raises((CorruptImageError, WrongFormatError)):
            open_vmdk(path)


@pytest.mark.parametrize("layout", ["front", "patched"])
def test_a_truncated_stream_never_reads_wrong(tmp_path: Path, layout: str) -> None:
    contents = _contents()
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, contents, layout=layout)
    whole = path.read_bytes()
    for nbytes in range(0, len(whole), 7 * SECTOR):
        path.write_bytes(whole[:nbytes])
        try:
            with imgcore.open(path, format="vmdk") as image:
                assert image.read(0, image.virtual_size) == _guest(contents)
        except ImgcoreError:
            pass


def test_hosted_extents(tmp_path: Path) -> None:
    contents = _contents()
    path = vmdk.hosted(tmp_path / "renamed.vmdk", N_SECTORS, contents)
    reader = open_vmdk(path)
    assert reader.subformat == "monolithicSparse"
    assert reader.virtual_size == N_SECTORS * SECTOR
    rows = extent_rows(reader)
    # (start, length, offset); grains that are adjacent in the file are one row.
    assert [row[:3] for row in rows if row[5] == Kind.DATA] == [
        (0, 2 * GRAIN, GRAIN),
        (4 * GRAIN, 2 * GRAIN, 3 * GRAIN),
        (10 * GRAIN, TAIL, 5 * GRAIN),
    ]
    assert read_guest(reader) == _guest(contents)


def test_zeroed_grains(tmp_path: Path) -> None:
    path = vmdk.hosted(
        tmp_path / "a.vmdk", N_SECTORS, {0: text(GRAIN), 2: 1, 3: 1}, version=2, flags=7
    )
    kinds = [(row[0] // GRAIN, row[5]) for row in extent_rows(open_vmdk(path))]
    assert kinds == [(0, Kind.DATA), (1, Kind.HOLE), (2, Kind.ZERO), (4, Kind.HOLE)]
    # The directory entry makes all grains zero.
    poke(path, (26 * SECTOR, struct.pack("<I", 1)))
    assert [row[5] for row in extent_rows(open_vmdk(path))] == [Kind.ZERO]


def test_the_redundant_directory_serves_if_the_primary_cannot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = _contents()
    path = vmdk.hosted(tmp_path / "a.vmdk", N_SECTORS, contents, gd=1 << 40)
    assert read_guest(open_vmdk(path)) == _guest(contents)
    assert "redundant" in caplog.text


def test_unclean_shutdown_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = vmdk.hosted(tmp_path / "a.vmdk", N_SECTORS, _contents(), dirty=1)
    with caplog.at_level(logging.WARNING):
        assert imgcore.info(path)["dirty-flag"] is True
    assert "not closed cleanly" in caplog.text


@pytest.mark.parametrize("fields", [{"flags": 0x10000, "compression": 1}])
def test_compressed_without_markers(tmp_path: Path, fields: dict[str, int]) -> None:
    import zlib

    packed = zlib.compress(text(GRAIN))
    path = vmdk.hosted(tmp_path / "a.vmdk", 4 * GRAIN // SECTOR, {1: packed}, version=3, **fields)
    assert read_guest(open_vmdk(path)) == (bytes(GRAIN) + text(GRAIN)).ljust(4 * GRAIN, b"\0")


def test_descriptor_and_header_may_differ_on_compression(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, _contents(), create_type="monolithicSparse")
    reader = open_vmdk(path)
    assert reader.subformat == "streamOptimized"
    assert read_guest(reader) == _guest(_contents())
    assert "compressed" in caplog.text


# Fields of the hosted header: (offset, bytes, error, part of its message).
BAD_HEADERS = [
    (0, b"KDMX", WrongFormatError, "neither"),
    (0, b"COWD", UnsupportedFeatureError, "vmfsSparse"),
    (0, b"\xbe\xba\xfe\xca\0\0\0\0", UnsupportedFeatureError, "seSparse"),
    (4, struct.pack("<I", 0), UnsupportedFeatureError, "version 0"),
    (4, struct.pack("<I", 4), UnsupportedFeatureError, "version 4"),
    (8, struct.pack("<I", 0x40003), UnsupportedFeatureError, "flags 0x40000"),
    (8, struct.pack("<I", 0x20003), CorruptImageError, "markers"),
    (8, struct.pack("<I", 0x10003), UnsupportedFeatureError, "compression algorithm 0"),
    (12, struct.pack("<Q", 0), CorruptImageError, "sectors"),
    (12, struct.pack("<Q", (1 << 64) - 1), LimitExceededError, "capacity"),
    (12, struct.pack("<Q", (1 << 41) + 1), LimitExceededError, "directory entries"),
    (12, struct.pack("<Q", 1 << 38), CorruptImageError, "grain directory"),
    (12, struct.pack("<Q", N_SECTORS - 1), CorruptImageError, "sectors"),
    (12, struct.pack("<Q", N_SECTORS + 128), CorruptImageError, "sectors"),
    (20, struct.pack("<Q", 0), LimitExceededError, "grain of 0"),
    (20, struct.pack("<Q", 4), LimitExceededError, "grain of 2048"),
    (20, struct.pack("<Q", 127), LimitExceededError, "grain of"),
    (20, struct.pack("<Q", 4096), LimitExceededError, "grain of 2097152"),
    (20, struct.pack("<Q", 1 << 63), LimitExceededError, "grain of"),
    (28, struct.pack("<Q", 0), UnsupportedFeatureError, "without a descriptor"),
    (28, struct.pack("<Q", 1 << 60), CorruptImageError, "descriptor ends"),
    (36, struct.pack("<Q", 2049), LimitExceededError, "descriptor of 1049088"),
    (36, struct.pack("<Q", 2048), CorruptImageError, "descriptor ends"),
    (44, struct.pack("<I", 0), LimitExceededError, "grain table of 0"),
    (44, struct.pack("<I", 513), LimitExceededError, "grain table of 513"),
    (44, struct.pack("<I", 1024), LimitExceededError, "grain table of 1024"),
    (73, b"\n\n\r\n", CorruptImageError, "end-of-line"),
    (SECTOR, b"# Disk DescriptorFile\nversion=9\n", UnsupportedFeatureError, "version"),
    (SECTOR, b"# Disk DescriptorFile\nversion=1\n\0", UnsupportedFeatureError, "0 extents"),
    (SECTOR, bytes(1024), UnsupportedFeatureError, "without a descriptor"),
]


@pytest.mark.parametrize(
    ("offset", "data", "error", "word"), BAD_HEADERS, ids=[f"{b[0]}-{b[3]}" for b in BAD_HEADERS]
)
def test_bad_headers(
    tmp_path: Path, offset: int, data: bytes, error: type[ImgcoreError], word: str
) -> None:
    path = poke(vmdk.hosted(tmp_path / "a.vmdk", N_SECTORS, _contents()), (offset, data))
    with pytest.raises(error, match=word) as caught:
        open_vmdk(path)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_both_directories_outside(tmp_path: Path) -> None:
    path = vmdk.hosted(tmp_path / "a.vmdk", N_SECTORS, _contents(), gd=1 << 40, rgd=1 << 40)
    with pytest.raises(CorruptImageError, match="grain directory ends at"):
        open_vmdk(path)


@pytest.mark.parametrize(
    ("offset", "word"), [(26 * SECTOR, "grain table 0 ends"), (27 * SECTOR + 16, "0x40000 is at")]
)
def test_entries_outside_the_file(tmp_path: Path, offset: int, word: str) -> None:
    path = vmdk.hosted(tmp_path / "a.vmdk", N_SECTORS, _contents())
    poke(path, (offset, struct.pack("<I", 0xFFFFFF)))
    reader = open_vmdk(path)
    with pytest.raises(CorruptImageError, match=word):
        extent_rows(reader)


def test_a_footer_that_contradicts_the_header(tmp_path: Path) -> None:
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, _contents())
    nbytes = path.stat().st_size
    for offset, data, word in (
        (12, struct.pack("<Q", N_SECTORS + 1), "capacity"),
        (56, struct.pack("<Q", vmdk.GD_AT_END), "does not say where"),
        (-SECTOR + 12, struct.pack("<I", 2), "truncated"),
    ):
        damaged = tmp_path / "b.vmdk"
        damaged.write_bytes(path.read_bytes())
        poke(damaged, (nbytes - 2 * SECTOR + offset, data))
        with pytest.raises(CorruptImageError, match=word):
            open_vmdk(damaged)


def test_a_marker_of_another_grain_is_noticed(tmp_path: Path) -> None:
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, _contents())
    poke(path, (128 * SECTOR, struct.pack("<Q", 128)))
    with imgcore.open(path) as image, pytest.raises(CorruptImageError):
        image.read(0, GRAIN)


# -- disks of several files ------------------------------------------------------------


def _described(folder: Path, *extents: str, create_type: str = "custom", **more: str) -> Path:
    path = folder / "disk.vmdk"
    path.write_bytes(vmdk.descriptor(create_type, *extents, **more))
    return path


def test_flat_sparse_and_zero_extents(tmp_path: Path) -> None:
    (tmp_path / "flat.bin").write_bytes(b"x" * SECTOR + text(3 * SECTOR))
    contents = _contents()
    vmdk.hosted(tmp_path / "sparse.vmdk", N_SECTORS, contents)
    path = _described(
        tmp_path,
        'RW 3 FLAT "flat.bin" 1',
        "RW 5 ZERO",
        f'RDONLY {N_SECTORS} SPARSE "sparse.vmdk"',
        'RW 4 VMFS "flat.bin"',
    )
    expected = (
        text(3 * SECTOR) + bytes(5 * SECTOR) + _guest(contents) + b"x" * SECTOR + text(3 * SECTOR)
    )
    reader = open_vmdk(path)
    assert read_guest(reader) == expected
    for start in range(0, 20 * SECTOR, SECTOR):
        assert read_guest(reader, start, 3 * SECTOR) == expected[start : start + 3 * SECTOR]
    with imgcore.open(path) as image:
        assert image.read(0, len(expected)) == expected
    data = imgcore.info(path)["format-specific"]["data"]
    assert [item["format"] for item in data["extents"]] == ["FLAT", "ZERO", "SPARSE", "VMFS"]


def test_compressed_extents_count_from_their_own_start(tmp_path: Path) -> None:
    contents = _contents()
    vmdk.stream(tmp_path / "s.vmdk", N_SECTORS, contents)
    line = f'RW {N_SECTORS} SPARSE "s.vmdk"'
    path = _described(tmp_path, "RW 3 ZERO", line, line)
    expected = bytes(3 * SECTOR) + _guest(contents) * 2
    assert read_guest(open_vmdk(path)) == expected
    with imgcore.open(path) as image:
        assert image.read(0, len(expected)) == expected


def test_holes_of_a_flat_file_are_zeros(tmp_path: Path) -> None:
    with open(tmp_path / "flat.bin", "wb") as file:
        file.truncate(8 << 20)
        file.seek(4 << 20)
        file.write(b"x" * 4096)
    path = _described(tmp_path, f'RW {(8 << 20) // SECTOR} FLAT "flat.bin" 0')
    rows = extent_rows(open_vmdk(path))
    assert {row[5] for row in rows} <= {Kind.ZERO, Kind.DATA}
    assert sum(row[1] for row in rows if row[5] == Kind.DATA) < 1 << 20


@pytest.mark.parametrize(
    ("extent", "error", "word"),
    [
        ('RW 4 FLAT "missing.vmdk" 0', FileNotFoundError, "missing"),
        ('RW 40 FLAT "flat.bin" 0', CorruptImageError, "past the end"),
        ('RW 4 FLAT "flat.bin" 1', CorruptImageError, "past the end"),
        ('RW 4 FLAT "disk.vmdk" 0', CorruptImageError, "itself"),
        ('RW 4 FLAT "../flat.bin" 0', UnsafeReferenceError, "leads out"),
        ('RW 4 FLAT "/etc/hostname" 0', UnsafeReferenceError, "leads out"),
        ('RW 4 FLAT "json:{}" 0', UnsafeReferenceError, "json"),
        ('RW 4 FLAT "folder" 0', ImgcoreError, "folder"),
        ('RW 4 FLAT "" 0', CorruptImageError, "has no file name"),
        ("RW 4 FLAT", CorruptImageError, "has no file name"),
        ("RW 4 FLAT flat.bin 0", CorruptImageError, "is not an extent"),
        ('RW -4 FLAT "flat.bin" 0', CorruptImageError, "is not an extent"),
        ('RW 4 SPARSE "flat.bin"', WrongFormatError, "magic"),
        ('NOACCESS 4 FLAT "flat.bin" 0', UnsupportedFeatureError, "NOACCESS"),
        ('RW 4 VMFSSPARSE "flat.bin"', UnsupportedFeatureError, "VMFSSPARSE"),
        ('RW 4 SESPARSE "flat.bin"', UnsupportedFeatureError, "SESPARSE"),
        ('RW 4 VMFSRDM "flat.bin"', UnsupportedFeatureError, "VMFSRDM"),
        ('RW 18446744073709551615 FLAT "flat.bin"', LimitExceededError, "sectors"),
        ("RW 18014398509481983 ZERO\nRW 9 ZERO", LimitExceededError, "together"),
        ("", CorruptImageError, "lists no extent"),
    ],
)
def test_bad_extent_lines(tmp_path: Path, extent: str, error: type[Exception], word: str) -> None:
    (tmp_path / "flat.bin").write_bytes(bytes(4 * SECTOR))
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=word) as caught:
        open_vmdk(_described(tmp_path, extent))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "create_type",
    ["vmfsSparse", "seSparse", "fullDevice", "partitionedDevice", "vmfsRawDeviceMap", "new"],
)
def test_types_that_are_not_read(tmp_path: Path, create_type: str) -> None:
    path = _described(tmp_path, 'RW 4 FLAT "missing" 0', create_type=create_type)
    with pytest.raises(UnsupportedFeatureError, match=create_type):
        open_vmdk(path)


def test_a_delta_names_its_parent(tmp_path: Path) -> None:
    (tmp_path / "flat.bin").write_bytes(bytes(4 * SECTOR))
    hint = 'parentFileNameHint="base.vmdk"'
    path = _described(tmp_path, 'RW 4 FLAT "flat.bin" 0', parent="0000abcd", extra=hint)
    backing = open_vmdk(path).backing
    assert backing is not None
    assert (backing.name, backing.format) == ("base.vmdk", "vmdk")


def test_a_delta_without_its_parents_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "flat.bin").write_bytes(bytes(4 * SECTOR))
    path = _described(tmp_path, 'RW 4 FLAT "flat.bin" 0', parent="0000abcd")
    with pytest.raises(CorruptImageError, match="0000abcd"):
        open_vmdk(path)


def test_a_delta_reads_through_its_parent(tmp_path: Path) -> None:
    base, top = tmp_path / "base.vmdk", tmp_path / "top.vmdk"
    qemu.run("create", "-q", "-f", "vmdk", base, "1M")
    subprocess.run(
        ["qemu-io", "-f", "vmdk", "-c", "write -P 7 64k 128k", str(base)],
        check=True,
        capture_output=True,
    )
    qemu.run("create", "-q", "-f", "vmdk", "-b", base.name, "-F", "vmdk", top)
    with imgcore.open(top) as image:
        assert image.read(0, 1 << 20) == bytes(65536) + b"\7" * 131072 + bytes((1 << 20) - 196608)


@pytest.mark.parametrize(
    "hint",
    [
        "base.vmdk",
        r"C:\Virtual Machines\base.vmdk",
        r"..\there\base.vmdk",
        r".\base.vmdk",
        "/vmfs/volumes/old/base.vmdk",
    ],
)
def test_parents_by_the_path_of_another_machine(tmp_path: Path, hint: str) -> None:
    """As the content ID identifies the parent, it is found by name beside the child."""
    vmdk.hosted(tmp_path / "base.vmdk", 128, {0: b"B" * GRAIN})
    fields = {"extra": f'parentFileNameHint="{hint}"'}
    top = tmp_path / "top.vmdk"
    for parent, is_known in (("12345678", True), ("12345679", False), ("ffffffff", False)):
        vmdk.hosted(top, 128, {})
        text = vmdk.descriptor("monolithicSparse", 'RW 128 SPARSE "x"', parent=parent, **fields)
        poke(top, (SECTOR, text.ljust(20 * SECTOR, b"\0")))
        if is_known or (parent == "ffffffff" and hint == "base.vmdk"):
            with imgcore.open(top) as image:
                assert image.read(0, GRAIN) == b"B" * GRAIN
        else:
            with pytest.raises((imgcore.ImgcoreError, FileNotFoundError)):
                imgcore.open(top)


def test_a_descriptor_file_over_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(vmdk.descriptor("monolithicFlat").ljust((1 << 20) + 1, b"\n"))
    with pytest.raises(LimitExceededError, match="descriptor of 1048577 bytes"):
        open_vmdk(path)


def test_a_header_without_a_directory(tmp_path: Path) -> None:
    path = vmdk.hosted(tmp_path / "a.vmdk", N_SECTORS, {}, flags=1, gd=0)
    with pytest.raises(CorruptImageError, match="the header has no grain directory"):
        open_vmdk(path)


def _cut_after(nbytes: int) -> Callable[[Path], object]:
    return lambda path: os.truncate(path, 128 * SECTOR + nbytes)


@pytest.mark.parametrize(
    "damage",
    [
        _cut_after(8),
        lambda path: poke(path, (128 * SECTOR, struct.pack("<Q", 1))),
        lambda path: poke(path, (128 * SECTOR + 12, b"\xff" * 8)),
        lambda path: poke(path, (21 * SECTOR, struct.pack("<I", 1 << 30))),
    ],
    ids=["cut", "lba", "data", "table"],
)
def test_a_damaged_last_grain_is_found_when_it_is_read(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    """The disk ends within its last grain, which opening the image looks at."""
    path = vmdk.stream(tmp_path / "a.vmdk", 2 * 128 - 3, {1: noise(GRAIN)}, layout="front")
    damage(path)
    with imgcore.open(path) as image, pytest.raises(CorruptImageError):
        image.read(0, image.virtual_size)


@pytest.mark.parametrize("held", [1, 12])
def test_a_stream_that_is_cut_in_a_marker(tmp_path: Path, held: int) -> None:
    path = vmdk.stream(tmp_path / "a.vmdk", 2 * 128, {1: noise(GRAIN)}, layout="front")
    _cut_after(held)(path)
    with (
        imgcore.open(path) as image,
        pytest.raises(CorruptImageError, match="offset 0x10000 is at 0x10000, without data"),
    ):
        image.read(0, image.virtual_size)


def test_other_data_after_the_grains_ends_the_search(tmp_path: Path) -> None:
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, {0: noise(GRAIN)}, layout="patched")
    reader = open_vmdk(path)
    end = reader.stream_layout.end
    reader.close()
    assert end == path.stat().st_size
    marker = 128 * SECTOR + -(-len(vmdk.marked(0, noise(GRAIN))) // SECTOR) * SECTOR
    reader = open_vmdk(poke(path, (marker + 8, struct.pack("<I", 1))))
    assert reader.stream_layout.end is None
    reader.close()


# -- large disks, pieces, probing ------------------------------------------------------


def _huge(path: Path, nbytes: int) -> Path:
    """Make an empty hosted extent whose directory is a hole in the file."""
    n_sectors = nbytes // SECTOR
    head = vmdk.header(n_sectors, gd=128)
    text_ = vmdk.descriptor("monolithicSparse", f'RW {n_sectors} SPARSE "x.vmdk"')
    path.write_bytes(head + text_)
    with open(path, "r+b") as file:
        file.truncate(128 * SECTOR + nbytes // (512 * GRAIN) * 4)
    return path


def test_an_empty_disk_of_64_tib_is_covered_at_once(tmp_path: Path) -> None:
    reader = open_vmdk(_huge(tmp_path / "a.vmdk", 64 << 40))
    extent_rows(reader, 0, GRAIN)
    started = time.monotonic()
    rows = extent_rows(reader)
    assert time.monotonic() - started < 0.5
    assert {row[5] for row in rows} == {Kind.HOLE}
    assert sum(row[1] for row in rows) == 64 << 40
    assert len(rows) <= 32


def test_a_grain_far_out_is_found(tmp_path: Path) -> None:
    path = _huge(tmp_path / "a.vmdk", 64 << 40)
    nbytes = path.stat().st_size
    table = -(-nbytes // GRAIN) * GRAIN
    index = 63 << 40
    entry = index // GRAIN % 512
    poke(
        path,
        (128 * SECTOR + index // (512 * GRAIN) * 4, struct.pack("<I", table // SECTOR)),
        (table + entry * 4, struct.pack("<I", table // SECTOR + 128)),
        (table + GRAIN, text(GRAIN)),
    )
    rows = [row for row in extent_rows(open_vmdk(path)) if row[5] != Kind.HOLE]
    assert [row[:4] for row in rows] == [(index, GRAIN, table + GRAIN, GRAIN)]


def test_an_extent_on_a_block_device(tmp_path: Path) -> None:
    content = noise(64 * SECTOR)
    (tmp_path / "content").write_bytes(content)
    path = tmp_path / "a.vmdk"
    with loop_device(tmp_path / "content") as device:
        line = f'RW 64 FLAT "{device}" 0'
        path.write_bytes(vmdk.descriptor("monolithicFlat", line))
        with pytest.raises(UnsupportedFeatureError, match="is a block device"):
            imgcore.open(path, allow=["/dev"])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_extents_in_pieces_equal_those_at_once(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    numbers = data.draw(st.sets(st.integers(0, 10)))
    contents = {i: bytes([i + 1]) * GRAIN for i in numbers}
    make = vmdk.stream if data.draw(st.booleans()) else vmdk.hosted
    reader = open_vmdk(make(folder / "a.vmdk", N_SECTORS, contents))
    cuts = sorted(data.draw(st.sets(st.integers(1, N_SECTORS - 1), max_size=8)))
    edges = [0, *cuts, N_SECTORS]
    whole = read_guest(reader)
    assert whole == _guest(contents)
    pieces = [
        read_guest(reader, low * SECTOR, (high - low) * SECTOR) for low, high in pairwise(edges)
    ]
    assert b"".join(pieces) == whole
    reader.close()


@settings(max_examples=150, deadline=None)
@given(
    offset=st.one_of(st.integers(0, 1200), st.integers(0, 140 * SECTOR)),
    value=st.binary(min_size=1, max_size=9),
    is_stream=st.booleans(),
)
def test_damage_is_an_imgcore_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, offset: int, value: bytes, is_stream: bool
) -> None:
    make = vmdk.stream if is_stream else vmdk.hosted
    path = make(tmp_path_factory.mktemp("damage") / "a.vmdk", N_SECTORS, {1: text(GRAIN)})
    poke(path, (offset, value))
    try:
        reader = open_vmdk(path)
    except (ImgcoreError, FileNotFoundError):
        return
    try:
        for _ in reader.extents(0, min(reader.virtual_size, 1 << 40)):
            pass
        reader.info()
        reader.check()
    except ImgcoreError:
        pass
    finally:
        reader.close()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"KDMV" + bytes(508), True),
        (b"COWD" + bytes(508), True),
        (b"# Disk DescriptorFile\n", True),
        (b"\xef\xbb\xbf# disk descriptorfile\r\n", True),
        (b"\n# made by hand\n\nversion=1\nCID=0\n", True),
        (b"version=1\n", True),
        (b"# a comment\nkey=value\n", False),
        (b"#!/bin/sh\n", False),
        (b"", False),
        (bytes(512), False),
    ],
)
def test_magic(head: bytes, expected: bool) -> None:
    assert (matching_formats(head, b"") == ["vmdk"]) is expected


def test_info_does_without_numpy(tmp_path: Path) -> None:
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, _contents())
    code = "import sys, imgcore; imgcore.info(sys.argv[1]); sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


@pytest.mark.parametrize("n_sectors", [1, 200, 4099])
@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized"])
def test_odd_sizes_of_other_programs(tmp_path: Path, n_sectors: int, subformat: str) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(text(n_sectors * SECTOR))
    path = tmp_path / "q.vmdk"
    qemu.run("convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={subformat}", raw, path)
    assert read_guest(open_vmdk(path)) == raw.read_bytes()
    vbox = qemu.find_program("vbox-img")
    if vbox is not None:
        path = tmp_path / "v.vmdk"
        variant = ["--variant", "stream"] if subformat == "streamOptimized" else []
        command = [vbox, "convert", "--srcfilename", str(raw), "--srcformat", "RAW"]
        command += ["--dstfilename", str(path), "--dstformat", "VMDK", *variant]
        subprocess.run(command, check=True, capture_output=True)
        assert read_guest(open_vmdk(path)) == raw.read_bytes()


# ------------------------------------------------------------- bytes after the stream


@pytest.mark.parametrize("producer", ["made", "qemu", "imgcore"])
@pytest.mark.parametrize("padding", ["hole", "zeros", "noise", "noise-and-zeros", "sector"])
def test_what_follows_a_stream(
    producer: str, padding: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The end-of-stream marker is found from the stream itself."""
    disk = _guest(_contents())
    path = tmp_path / "a.vmdk"
    (tmp_path / "d.raw").write_bytes(disk)
    if producer == "made":
        vmdk.stream(path, N_SECTORS, _contents())
    elif producer == "qemu":
        qemu.convert(tmp_path / "d.raw", path, qemu.VMDK_STREAM)
    else:
        imgcore.convert(tmp_path / "d.raw", path, compress=True)
    end = path.stat().st_size
    more = {
        "hole": b"",
        "zeros": bytes(3 << 20),
        "noise": noise(3000),
        "noise-and-zeros": noise(3 << 20) + bytes(3 << 20),
        "sector": b"x" * SECTOR,
    }[padding]
    with path.open("ab") as file:
        file.write(more)
        file.truncate(end + (3 << 20 if padding == "hole" else len(more)))
    with imgcore.open(path) as image:
        assert image.read(0, len(disk)) == disk
    # The header of qemu-img's streams names the directory: no footer is searched for.
    ignored = [r.getMessage() for r in caplog.records if "after the end of the stream" in r.msg]
    assert bool(ignored) == (padding != "hole" and producer != "qemu")
    if ignored:
        assert f"{len(more)} bytes after the end of the stream are ignored" in ignored[0]
    assert imgcore.check(path).ok
    (finding,) = [f for f in imgcore.lint(path, profile="esxi").findings if f.rule == "stream-end"]
    assert finding.remedy is not None
    subprocess.run([*finding.remedy.split()[:3], path], check=True)
    assert abs(path.stat().st_size - end) < (1 << 17)
    with imgcore.open(path) as image:
        assert image.read(0, len(disk)) == disk


def test_a_padded_stream_on_a_block_device(tmp_path: Path) -> None:
    backing = tmp_path / "disk"
    vmdk.stream(backing, N_SECTORS, _contents())
    os.truncate(backing, 16 << 20)
    with loop_device(backing) as device:
        imgcore.convert(device, tmp_path / "a.raw", format="vmdk")
    assert (tmp_path / "a.raw").read_bytes() == _guest(_contents())


def test_a_stream_without_footer_before_zeros_is_truncated(tmp_path: Path) -> None:
    path = vmdk.stream(tmp_path / "a.vmdk", N_SECTORS, _contents())
    raw = path.read_bytes()
    for end in (len(raw) - SECTOR, len(raw) - 2 * SECTOR, len(raw) - 3 * SECTOR):
        path.write_bytes(raw[:end] + bytes(2 << 20))
        if end == len(raw) - SECTOR:
            # The zeros have an end-of-stream marker in them.
            assert open_vmdk(path).virtual_size == N_SECTORS * SECTOR
            continue
        with pytest.raises(CorruptImageError, match="truncated"):
            open_vmdk(path)


# ----------------------------------------------------------------- unusual descriptors


def test_extents_of_no_sectors_are_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As by QEMU; their files need not exist."""
    (tmp_path / "a.bin").write_bytes(noise(MIB))
    path = tmp_path / "a.vmdk"
    path.write_bytes(
        vmdk.descriptor(
            "custom",
            'RW 0 FLAT "missing.bin" 0',
            'RW 2048 FLAT "a.bin" 0',
            'RW 0 SPARSE "missing.vmdk"',
            "RW 0 ZERO",
            "RW 8 ZERO",
        )
    )
    with imgcore.open(path) as image:
        assert image.read(0, image.virtual_size) == noise(MIB) + bytes(8 * SECTOR)
    assert "3 extents of 0 sectors are ignored" in caplog.text


def test_a_parent_content_id_of_zero(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without a name, it means that there is no parent, as for QEMU."""
    path = vmdk.hosted(tmp_path / "a.vmdk", N_SECTORS, _contents())
    text = vmdk.descriptor("monolithicSparse", f'RW {N_SECTORS} SPARSE "a"', parent="00000000")
    poke(path, (SECTOR, text.ljust(20 * SECTOR, b"\0")))
    imgcore.convert(path, tmp_path / "a.raw")
    assert (tmp_path / "a.raw").read_bytes() == _guest(_contents())
    assert "content ID 0" in caplog.text
    qemu.assert_same(tmp_path / "a.raw", path, source_format="raw", target_format="vmdk")
    # With a name, it is the parent's identity.
    named = vmdk.descriptor(
        "monolithicSparse",
        f'RW {N_SECTORS} SPARSE "a"',
        parent="00000000",
        extra='parentFileNameHint="b.vmdk"',
    )
    poke(path, (SECTOR, named.ljust(20 * SECTOR, b"\0")))
    with pytest.raises(FileNotFoundError):
        imgcore.convert(path, tmp_path / "b.raw")


# ---------------------------------------------------------- grain tables of other sizes


def _with_tables(path: Path, n_gtes: int, spacing: int, n_grains: int, *, claims: int = 0) -> Path:
    """Make a disk with small grains and tables of ``n_gtes`` entries.

    Tables are ``spacing`` sectors apart; the header states ``claims`` entries.
    """
    grain, n_tables = 8, -(-n_grains // n_gtes)
    image = bytearray()
    n_sectors = n_grains * grain
    first = 30
    first_grain = first + n_tables * spacing
    first_grain += -first_grain % grain
    fields = {"grain": grain, "gtes": claims or n_gtes, "rgd": 0, "flags": 1}
    vmdk.put(image, 0, vmdk.header(n_sectors, gd=26, overhead=first_grain, **fields))
    vmdk.put(image, 1, vmdk.descriptor("monolithicSparse", f'RW {n_sectors} SPARSE "a.vmdk"'))
    tables = [first + number * spacing for number in range(n_tables)]
    vmdk.put(image, 26, struct.pack(f"<{n_tables}I", *tables).ljust(4 * SECTOR, b"\0"))
    for number, table in enumerate(tables):
        low = number * n_gtes
        entries = [first_grain + grain * n for n in range(low, min(low + n_gtes, n_grains))]
        vmdk.put(image, table, struct.pack(f"<{len(entries)}I", *entries))
    vmdk.put(image, first_grain, noise(n_grains * grain * SECTOR))
    path.write_bytes(image)
    return path


@pytest.mark.parametrize(("n_gtes", "spacing"), [(512, 4), (256, 2), (256, 4), (128, 1), (100, 1)])
def test_tables_of_other_sizes(tmp_path: Path, n_gtes: int, spacing: int) -> None:
    n_grains = 1100
    path = _with_tables(tmp_path / "a.vmdk", n_gtes, spacing, n_grains)
    imgcore.convert(path, tmp_path / "a.raw")
    assert (tmp_path / "a.raw").read_bytes() == noise(n_grains * 8 * SECTOR)
    qemu.assert_same(tmp_path / "a.raw", path, source_format="raw", target_format="vmdk")


@pytest.mark.parametrize(
    ("n_gtes", "spacing", "claims"),
    [(512, 4, 256), (512, 4, 128), (512, 4, 506), (256, 2, 500), (128, 1, 511), (512, 4, 1)],
)
def test_a_table_size_that_the_layout_contradicts(
    tmp_path: Path, n_gtes: int, spacing: int, claims: int
) -> None:
    path = _with_tables(tmp_path / "a.vmdk", n_gtes, spacing, 1100, claims=claims)
    with pytest.raises(CorruptImageError, match=f"grain tables of {claims} entries, but"):
        imgcore.convert(path, tmp_path / "a.raw")
    assert not (tmp_path / "a.raw").exists()
