"""QCOW2 check: the same counts as qemu-img check, on sound and damaged images."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.helpers import qemu
from tests.helpers.qcow2 import create, open_qcow2, qemu_io
from tests.helpers.reading import poke

from imgcore.files.host_file import HostFile
from imgcore.formats.qcow2 import references
from imgcore.formats.shared.check_report import CheckReport

MIB = 1 << 20
COPIED = 1 << 63


def _check(path: Path) -> CheckReport:
    reader = open_qcow2(path)
    report = reader.check()
    reader.close()
    return report


def _qemu_check(path: Path) -> dict[str, Any]:
    command = [qemu.require_qemu_img(), "check", "--output=json", "-f", "qcow2", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def _assert_same(path: Path) -> CheckReport:
    ours, theirs = _check(path), _qemu_check(path)
    assert ours.corruptions == theirs.get("corruptions", 0), ours.problems
    assert ours.leaks == theirs.get("leaks", 0), ours.problems
    assert ours.total_clusters == theirs["total-clusters"]
    assert ours.allocated_clusters == theirs.get("allocated-clusters", 0)
    assert ours.fragmented_clusters == theirs.get("fragmented-clusters", 0)
    assert ours.compressed_clusters == theirs.get("compressed-clusters", 0)
    assert ours.image_end_offset == theirs["image-end-offset"]
    return ours


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_sound_images(tmp_path: Path, cluster_size: int, refcount_bits: int) -> None:
    path = create(
        tmp_path / "a.qcow2",
        4 * MIB,
        f"cluster_size={cluster_size}",
        f"refcount_bits={refcount_bits}",
    )
    qemu_io(path, "write 1M 256k", "write 0 128k", "write -z 2M 256k", "discard 1M 64k")
    report = _assert_same(path)
    assert report.problems == []
    assert report.allocated_clusters > 0


def test_the_snapshot_table_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table may have 65536 rows, so it is also read in large pieces."""
    path = create(tmp_path / "a.qcow2", MIB)
    for number in range(3):
        qemu.run("snapshot", "-c", f"s{number}", path)
    reader = open_qcow2(path)
    start = reader._header.snapshots_offset
    table_end = start + references.read_snapshots(reader._file, reader._header)[-1].table_nbytes
    offsets: list[int] = []
    pread = HostFile.pread

    def counted(self: HostFile, offset: int, length: int) -> bytes:
        offsets.append(offset)
        return pread(self, offset, length)

    monkeypatch.setattr(HostFile, "pread", counted)
    assert reader.check().corruptions == 0
    assert len([offset for offset in offsets if start <= offset < table_end]) == 1
    reader.close()


def test_snapshots_bitmaps_and_compression(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", 4 * MIB)
    qemu_io(path, "write 0 1M", "write -c 2M 64k", "write -c 2112k 64k")
    qemu.run("snapshot", "-c", "first", path)
    qemu_io(path, "write 0 256k", "write 3M 256k")
    qemu.run("snapshot", "-c", "second", path)
    qemu.run("bitmap", "--add", path, "b0")
    qemu_io(path, "write 0 64k")
    report = _assert_same(path)
    assert (report.corruptions, report.leaks) == (0, 0)


def test_a_bitmaps_table_outside_the_file(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", 4 * MIB)
    qemu.run("bitmap", "--add", path, "b0")
    raw = path.read_bytes()
    at = raw.index(struct.pack(">II", 0x23852875, 24), 104) + 8
    directory = int.from_bytes(raw[at + 16 : at + 24], "big")
    poke(path, (directory, struct.pack(">Q", 1 << 40)))
    assert "ERROR bitmap 'b0': table is outside the file" in _check(path).problems


def test_bitmaps_that_share_a_table(tmp_path: Path) -> None:
    # Reading one table for the largest allowed number of bitmaps would take days.
    path = create(tmp_path / "a.qcow2", 4 * MIB)
    for name in ("b0", "b1"):
        qemu.run("bitmap", "--add", path, name)
    raw = path.read_bytes()
    at = raw.index(struct.pack(">II", 0x23852875, 24), 104) + 8
    directory = int.from_bytes(raw[at + 16 : at + 24], "big")
    poke(path, (directory + 32, raw[directory : directory + 8]))
    report = _check(path)
    assert _qemu_check(path)["corruptions"] > 0
    assert report.corruptions == 1
    assert report.problems[0] == "ERROR bitmap 'b1': its table overlaps another one"


def test_snapshots_that_share_a_table(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    for name in ("first", "second"):
        qemu.run("snapshot", "-c", name, path)
    raw = path.read_bytes()
    first = int.from_bytes(raw[64:72], "big")
    reader = open_qcow2(path)
    second = first + references.read_snapshots(reader._file, reader._header)[0].table_nbytes
    reader.close()
    poke(path, (second, raw[first : first + 8]))
    report = _check(path)
    assert report.corruptions == 1
    assert "snapshot 2: its L1 table" in report.problems[0]
    assert "overlaps another one" in report.problems[0]


@pytest.mark.parametrize("window", [1, 3, 64])
def test_windows_do_not_change_the_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    path = create(tmp_path / "a.qcow2", 4 * MIB, "cluster_size=4096")
    qemu_io(path, "write 0 1M", "write -c 2M 4k")
    qemu.run("snapshot", "-c", "first", path)
    qemu_io(path, "write 0 256k")
    poke(path, (4096 * 2 + 2 * 100, b"\0\0"), (4096 * 2 + 2 * 200, b"\0\7"))
    whole = _check(path)
    assert whole.corruptions > 0
    assert whole.leaks > 0
    monkeypatch.setattr(references, "WINDOW_CLUSTERS", window * 8)
    pieces = _check(path)
    assert sorted(pieces.problems) == sorted(whole.problems)
    assert (pieces.corruptions, pieces.leaks) == (whole.corruptions, whole.leaks)
    assert pieces.image_end_offset == whole.image_end_offset


def _three_clusters(folder: Path) -> Path:
    """Make an image with three data clusters.

    Refcount table at 0x10000, block at 0x20000, L1 at 0x30000, L2 at 0x40000, data from
    0x50000 to 0x80000.
    """
    path = create(folder / "a.qcow2", MIB)
    qemu_io(path, "write -P 7 0 192k")
    return path


DAMAGE: list[tuple[str, int, bytes, str]] = [
    ("refcount-too-low", 0x20000 + 2 * 5, struct.pack(">H", 0), "cluster 5 refcount=0 reference=1"),
    ("refcount-too-high", 0x20000 + 2 * 5, struct.pack(">H", 2), "cluster 5 refcount=2"),
    ("header-is-free", 0x20000, struct.pack(">H", 0), "cluster 0 refcount=0 reference=1"),
    ("entry-is-gone", 0x40000, struct.pack(">Q", 0), "Leaked cluster 5 refcount=1 reference=0"),
    ("table-is-gone", 0x30000, struct.pack(">Q", 0), "Leaked cluster 4 refcount=1 reference=0"),
    ("shared", 0x40000, struct.pack(">Q", COPIED | 0x60000), "cluster 6 refcount=1 reference=2"),
    ("on-metadata", 0x40000, struct.pack(">Q", COPIED | 0x10000), "cluster 1 refcount=1"),
    ("not-copied-data", 0x40000, struct.pack(">Q", 0x50000), "copied flag of data cluster"),
    ("not-copied-l2", 0x30000, struct.pack(">Q", 0x40000), "copied flag of L2 table"),
]


@pytest.mark.parametrize(
    ("offset", "data", "line"), [d[1:] for d in DAMAGE], ids=[d[0] for d in DAMAGE]
)
def test_damage_is_found_as_qemu_img_finds_it(
    tmp_path: Path, offset: int, data: bytes, line: str
) -> None:
    path = _three_clusters(tmp_path)
    poke(path, (offset, data))
    report = _assert_same(path)
    assert any(line in problem for problem in report.problems), report.problems


def test_unaligned_entry_takes_two_clusters(tmp_path: Path) -> None:
    path = _three_clusters(tmp_path)
    poke(path, (0x40000, struct.pack(">Q", COPIED | 0x50200)))
    report = _assert_same(path)
    assert (report.corruptions, report.leaks) == (2, 0)
    assert "not cluster aligned" in report.problems[0]


def test_l1_entry_of_flags_alone_is_a_corruption(tmp_path: Path) -> None:
    # The offset is lost: its clusters seem leaked, but must not be freed.
    path = _three_clusters(tmp_path)
    poke(path, (0x30000, struct.pack(">Q", COPIED)))
    report = _check(path)
    assert _qemu_check(path)["corruptions"] > 0
    assert (report.corruptions, report.leaks) == (1, 4)
    assert "L1 entry 0 (0x8000000000000000) has flags but no L2 table" in report.problems[0]


def test_compressed_cluster_that_reaches_far_past_the_end(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    qemu_io(path, "write -c -P 7 0 64k")
    raw = path.read_bytes()
    entry = int.from_bytes(raw[0x40000:0x40008], "big")
    # The largest number of sectors: 128 KiB.
    poke(path, (0x40000, struct.pack(">Q", entry | 0xFF << 54)))
    path.write_bytes(path.read_bytes()[:0x50200])
    report = _assert_same(path)
    assert (report.corruptions, report.leaks) == (1, 1)
    assert "points past the end of the file" in report.problems[0]


def test_a_cluster_that_is_cut_short_is_no_leak(tmp_path: Path) -> None:
    path = _three_clusters(tmp_path)
    with path.open("r+b") as file:
        file.truncate(0x80000 - 512)
    report = _check(path)
    # qemu-img reads the missing bytes as zeros.
    assert (report.corruptions, report.leaks) == (1, 0)
    assert "points past the end of the file" in report.problems[0]


def test_overlap_that_refcounts_allow_is_found(tmp_path: Path) -> None:
    path = _three_clusters(tmp_path)
    # A guest cluster at the refcount table, with a matching refcount.
    poke(
        path,
        (0x40000, struct.pack(">Q", 0x10000)),
        (0x20000 + 2 * 1, struct.pack(">H", 2)),
        (0x20000 + 2 * 5, struct.pack(">H", 0)),
    )
    report = _check(path)
    assert report.problems == ["ERROR cluster 1 holds both metadata and guest data"]


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (0x20200, "not cluster aligned"),
        (1 << 40, "outside the file"),
        (0x20001, "reserved bits"),
    ],
)
def test_bad_refcount_table(tmp_path: Path, entry: int, line: str) -> None:
    path = create(tmp_path / "a.qcow2", MIB)
    poke(path, (0x10000, struct.pack(">Q", entry)))
    report = _check(path)
    assert report.corruptions > 0
    assert any(line in problem for problem in report.problems)


def test_problem_lines_are_bounded(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", 8 * MIB, "cluster_size=512", "preallocation=metadata")
    raw = path.read_bytes()
    table = int.from_bytes(raw[48:56], "big")
    # Remove every second refcount block.
    poke(path, *((table + 16 * index, bytes(8)) for index in range(40)))
    report = _check(path)
    assert report.corruptions > CheckReport.MAX_PROBLEM_LINES
    assert len(report.problems) == CheckReport.MAX_PROBLEM_LINES
