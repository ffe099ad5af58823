"""QCOW2 tables to extents: equal to qemu-img map, and bad entries refused."""

from __future__ import annotations

import contextlib
import itertools
import random
import struct
from pathlib import Path

import pytest
from tests.helpers import qemu
from tests.helpers.images import noise, text
from tests.helpers.qcow2 import create, merged, open_qcow2, qemu_io, qemu_map, read_guest
from tests.helpers.reading import extent_rows, poke

from imgcore import limits
from imgcore.engine.extents import Kind
from imgcore.errors import CorruptImageError, ImgcoreError

MIB, TIB = 1 << 20, 1 << 40


def _scribble(path: Path, size: int, cluster_size: int, seed: int) -> None:
    """Write, compress, zero and discard at random places."""
    rng = random.Random(seed)
    commands = []
    for number in range(40):
        start = rng.randrange(size // cluster_size) * cluster_size
        length = min(rng.randrange(1, 9) * cluster_size, size - start)
        verb = rng.choice(["write", "write", "write -c", "write -z", "write -z -u", "discard"])
        if verb == "write -c":
            length = min(cluster_size, length)
            if length < cluster_size:
                continue
        pattern = f" -P {number + 1}" if verb in ("write", "write -c") else ""
        commands.append(f"{verb}{pattern} {start} {length}")
    # Compressing over allocated clusters fails; that does not matter here.
    qemu_io(path, *commands, check=False)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("cluster_size", [512, 1024, 4096, 65536, 2 << 20])
def test_extents_equal_qemu_img_map(tmp_path: Path, cluster_size: int, compat: str) -> None:
    size = max(cluster_size * 50, 2 * MIB) + 512
    path = create(tmp_path / "a.qcow2", size, f"cluster_size={cluster_size}", f"compat={compat}")
    _scribble(path, size, cluster_size, cluster_size)
    reader = open_qcow2(path)
    rows = extent_rows(reader)
    assert merged(rows) == qemu_map(path)
    assert sum(row[1] for row in rows) == size
    raw = tmp_path / "a.raw"
    qemu.run("convert", "-f", "qcow2", "-O", "raw", path, raw)
    assert read_guest(path) == raw.read_bytes()
    reader.close()


@pytest.mark.parametrize("options", [(), ("compression_type=zstd",)], ids=["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 65536, 2 << 20])
def test_compressed_images(tmp_path: Path, cluster_size: int, options: tuple[str, ...]) -> None:
    raw = tmp_path / "a.raw"
    content = text(300_000) + bytes(700_000) + noise(200_192 + 512) + text(400_000 - 192)
    content += bytes(-len(content) % 512)
    raw.write_bytes(content)
    path = tmp_path / "a.qcow2"
    texts = ",".join((f"cluster_size={cluster_size}", *options))
    qemu.run("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", texts, raw, path)
    assert read_guest(path) == content
    reader = open_qcow2(path)
    for row in extent_rows(reader):
        if row[5] >= Kind.DEFLATE:
            assert row[2] + row[3] <= path.stat().st_size
    report = reader.check()
    theirs = qemu.assert_check_clean(path)
    assert (report.corruptions, report.leaks) == (0, 0)
    assert report.compressed_clusters == theirs["compressed-clusters"]
    reader.close()


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_pieces_equal_the_whole(tmp_path: Path, cluster_size: int) -> None:
    size = max(cluster_size * 50, 2 * MIB) + 512
    path = create(tmp_path / "a.qcow2", size, f"cluster_size={cluster_size}")
    _scribble(path, size, cluster_size, 7)
    reader = open_qcow2(path)
    whole = extent_rows(reader)
    rng = random.Random(3)
    cuts = sorted({0, size, *(rng.randrange(size // 512) * 512 for _ in range(30))})
    pieces = [
        row
        for start, end in itertools.pairwise(cuts)
        for row in extent_rows(reader, start, end - start)
    ]
    assert merged(pieces) == merged(whole)
    for row in pieces:
        if row[5] >= Kind.DEFLATE:
            assert any(
                other[2:] == row[2:] and other[0] <= row[0] < row[0] + row[1] <= other[0] + other[1]
                for other in whole
            )
    reader.close()


def test_no_extents(tmp_path: Path) -> None:
    reader = open_qcow2(create(tmp_path / "a.qcow2", 0))
    assert extent_rows(reader) == []
    reader.close()


def test_empty_64_tib_is_one_row(tmp_path: Path) -> None:
    reader = open_qcow2(create(tmp_path / "a.qcow2", 64 * TIB))
    assert extent_rows(reader) == [(0, 64 * TIB, 0, 0, 0, Kind.HOLE, 0)]
    reader.close()


def test_batches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create(tmp_path / "a.qcow2", 8 * MIB, "cluster_size=512", "preallocation=metadata")
    reader = open_qcow2(path)
    whole = merged(extent_rows(reader))
    # First less than a table at once, then several tables.
    for rows in (10, 200):
        monkeypatch.setattr(limits, "MAX_BATCH_ROWS", rows)
        batches = list(reader.extents(0, 8 * MIB))
        assert max(map(len, batches)) <= rows
        assert merged([row for batch in batches for row in batch.tolist()]) == whole
    reader.close()


def test_far_apart_tables(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", TIB)
    qemu_io(path, "write 0 64k", f"write {TIB // 2} 64k", f"write {TIB - 65536} 64k")
    reader = open_qcow2(path)
    rows = extent_rows(reader)
    assert [row[0] for row in rows if row[5] == Kind.DATA] == [0, TIB // 2, TIB - 65536]
    assert merged(rows) == qemu_map(path)
    reader.close()


COPIED, COMPRESSED = 1 << 63, 1 << 62
# End of the image below.
END = 0x80000
BAD_L2 = [
    ("past-end", COPIED | END, "past the end of the file"),
    ("far-past-end", COPIED | (1 << 55), "past the end of the file"),
    ("misaligned", COPIED | 0x50200, "not a multiple of the cluster size"),
    ("reserved-low", COPIED | 0x50002, "reserved bits"),
    ("reserved-high", COPIED | 0x50000 | 1 << 56, "reserved bits"),
    ("reserved-only", 1 << 60, "reserved bits"),
    ("packed-past-end", COMPRESSED | END, "past the end of the file"),
    ("packed-far", COMPRESSED | ((1 << 54) - 1), "past the end of the file"),
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an image with its L2 table at 0x40000 and three data clusters after it."""
    path = create(tmp_path / "a.qcow2", MIB)
    qemu_io(path, "write -P 7 0 192k")
    raw = path.read_bytes()
    assert len(raw) == END
    assert raw[0x30000:0x30008] == struct.pack(">Q", COPIED | 0x40000)
    return path


@pytest.mark.parametrize(("entry", "message"), [r[1:] for r in BAD_L2], ids=[r[0] for r in BAD_L2])
def test_bad_l2_entry(image: Path, entry: int, message: str) -> None:
    poke(image, (0x40008, struct.pack(">Q", entry)))
    reader = open_qcow2(image)
    with pytest.raises(CorruptImageError, match=message) as caught:
        extent_rows(reader)
    assert "guest offset 0x10000" in str(caught.value)
    # Other ranges are not affected.
    assert [row[5] for row in extent_rows(reader, 0, 65536)] == [Kind.DATA]
    assert reader.check().corruptions > 0
    reader.close()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (COPIED | END, "past the end of the file"),
        (COPIED | 1 << 55, "past the end of the file"),
        (COPIED | 0x40200, "not a multiple of the cluster size"),
        (COPIED | 0x40001, "reserved bits"),
        (COPIED | 0x40000 | 1 << 60, "reserved bits"),
    ],
)
def test_bad_l1_entry(image: Path, entry: int, message: str) -> None:
    poke(image, (0x30000, struct.pack(">Q", entry)))
    reader = open_qcow2(image)
    with pytest.raises(CorruptImageError, match=message):
        extent_rows(reader)
    assert reader.check().corruptions > 0
    reader.close()


@pytest.mark.parametrize(
    ("entry", "kind"),
    [
        (0, Kind.HOLE),
        (COPIED, Kind.HOLE),
        (1, Kind.ZERO),
        (COPIED | 0x50000 | 1, Kind.ZERO),
        (0x50000, Kind.DATA),
    ],
)
def test_l2_entry(image: Path, entry: int, kind: Kind) -> None:
    poke(image, (0x40000, struct.pack(">Q", entry)))
    reader = open_qcow2(image)
    assert extent_rows(reader, 0, 65536)[0][5] == kind
    reader.close()


def test_zero_flag_in_version_2_is_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "a.qcow2", MIB, "compat=0.10")
    qemu_io(path, "write 0 64k")
    poke(path, (0x40000, struct.pack(">Q", COPIED | 0x50001)))
    reader = open_qcow2(path)
    with pytest.raises(CorruptImageError, match="which version 2 does not have"):
        extent_rows(reader)
    assert reader.check().corruptions > 0
    reader.close()


def test_truncated_data_is_refused(image: Path) -> None:
    raw = image.read_bytes()
    image.write_bytes(raw[:-1])
    reader = open_qcow2(image)
    with pytest.raises(CorruptImageError, match="guest offset 0x20000.*ends at 0x80000"):
        extent_rows(reader)
    assert reader.check().corruptions > 0
    reader.close()


def test_any_byte_of_the_tables_may_be_wrong(tmp_path: Path) -> None:
    """Any tables give an answer or an ImgcoreError."""
    path = create(tmp_path / "a.qcow2", MIB, "cluster_size=1024")
    qemu_io(path, "write 0 60k", "write -c 200k 1k", "write -c 201k 1k", "write -z 512k 64k")
    qemu.run("snapshot", "-c", "first", path)
    sound = path.read_bytes()
    places = [i for i in range(1024, len(sound)) if sound[i] and sound[i] != 0xCD]
    rng = random.Random(11)
    for _ in range(300):
        damaged = bytearray(sound)
        place = rng.choice(places)
        damaged[place : place + 2] = rng.randbytes(2)
        path.write_bytes(damaged)
        reader = open_qcow2(path)
        for verb in (reader.info, lambda reader=reader: extent_rows(reader), reader.check):
            with contextlib.suppress(ImgcoreError):
                verb()
        reader.close()
