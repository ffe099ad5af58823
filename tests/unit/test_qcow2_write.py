"""The QCOW2 writer without the engine: qemu-img reads and checks its images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers import qemu
from tests.helpers.images import noise, text
from tests.helpers.qcow2 import open_qcow2, read_guest, request, write_image
from tests.helpers.reading import extent_rows

import imgcore
from imgcore import limits
from imgcore.engine.extents import PLACEMENT_DTYPE, BlockState
from imgcore.errors import LimitExceededError, OptionError
from imgcore.files.target import Target
from imgcore.formats.api import BackingReference
from imgcore.formats.qcow2.driver import DRIVER
from imgcore.formats.qcow2.refcounts import encode_refcounts

KIB, MIB, GIB, TIB = limits.KIB, limits.MIB, limits.GIB, limits.TIB


def _content(nbytes: int) -> bytes:
    """Return text, noise, zeros and long runs in turn, each of an odd length."""
    pieces = [text(70_001), bytes(150_000), noise(90_003), b"A" * 200_000, noise(513), bytes(9_000)]
    whole = b"".join(pieces)
    return (whole * (nbytes // len(whole) + 1))[:nbytes]


def _assert_clean(path: Path, content: bytes) -> None:
    raw = path.with_suffix(".raw")
    raw.write_bytes(content)
    report = qemu.assert_check_clean(path)
    qemu.assert_same(raw, path, source_format="raw", target_format="qcow2")
    file_size = path.stat().st_size
    reader = open_qcow2(path)
    assert report["image-end-offset"] == file_size
    assert file_size % reader.block_nbytes == 0
    own = reader.check()
    assert (own.corruptions, own.leaks, own.problems) == (0, 0, [])
    reader.close()


@pytest.mark.parametrize("mode", ["plain", "zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 1024, 4096, 65536, 1 << 20, 2 << 20])
def test_content_and_refcounts(tmp_path: Path, cluster_size: int, mode: str) -> None:
    content = _content(3 * MIB + 512)
    options: dict[str, Any] = {"cluster_size": cluster_size}
    if mode == "zstd":
        options["compression_type"] = "zstd"
    wanted = request(len(content), options, compress=mode != "plain")
    path = write_image(tmp_path / "a.qcow2", content, wanted, batch=max(1, 70_000 // cluster_size))
    _assert_clean(path, content)
    assert read_guest(path) == content
    assert qemu.info(path, "qcow2")["format-specific"]["data"]["compression-type"] == (
        "zstd" if mode == "zstd" else "zlib"
    )


@pytest.mark.parametrize("cluster_size", [512, 65536])
@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
def test_refcount_widths(tmp_path: Path, refcount_bits: int, cluster_size: int) -> None:
    content = _content(1 * MIB)
    wanted = request(len(content), {"refcount_bits": refcount_bits, "cluster_size": cluster_size})
    path = write_image(tmp_path / "a.qcow2", content, wanted)
    _assert_clean(path, content)
    assert qemu.info(path, "qcow2")["format-specific"]["data"]["refcount-bits"] == refcount_bits


@pytest.mark.parametrize("compress", [False, True])
def test_version_2(tmp_path: Path, compress: bool) -> None:
    content = _content(1 * MIB)
    path = write_image(
        tmp_path / "a.qcow2", content, request(len(content), {"compat": "0.10"}, compress=compress)
    )
    _assert_clean(path, content)
    assert qemu.info(path, "qcow2")["format-specific"]["data"]["compat"] == "0.10"


def test_lazy_refcounts_is_stated(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.qcow2", b"", request(MIB, {"lazy_refcounts": True}))
    data = qemu.info(path, "qcow2")["format-specific"]["data"]
    assert data["lazy-refcounts"] is True
    assert data["corrupt"] is False


@pytest.mark.parametrize("virtual_size", [0, 512, 65536, 65536 + 512])
@pytest.mark.parametrize("fill", [0, 1])
def test_tiny(tmp_path: Path, virtual_size: int, fill: int) -> None:
    content = bytes([fill]) * virtual_size
    path = write_image(tmp_path / "a.qcow2", content, request(virtual_size))
    _assert_clean(path, content)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("cluster_size", [512, 65536, 2 << 20])
def test_preallocation(tmp_path: Path, mode: str, cluster_size: int) -> None:
    content = _content(2 * MIB + 512)
    wanted = request(len(content), {"preallocation": mode, "cluster_size": cluster_size})
    path = write_image(tmp_path / "a.qcow2", content, wanted)
    _assert_clean(path, content)
    reader = open_qcow2(path)
    rows = extent_rows(reader)
    assert len(rows) == 1
    assert reader.check().allocated_clusters == -(-len(content) // cluster_size)
    reader.close()
    allocated = path.stat().st_blocks * 512
    if mode != "metadata":
        assert allocated >= len(content)


def test_metadata_preallocation_is_sparse(tmp_path: Path) -> None:
    wanted = request(64 * GIB, {"preallocation": "metadata", "cluster_size": 2 << 20})
    path = write_image(tmp_path / "a.qcow2", b"", wanted)
    assert path.stat().st_blocks * 512 < 8 * MIB
    qemu.assert_check_clean(path)


def test_empty_64_tib_is_written_at_once(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.qcow2", b"", request(64 * TIB))
    assert path.stat().st_blocks * 512 < 256 * KIB
    qemu.assert_check_clean(path)
    reader = open_qcow2(path)
    assert [row[:2] for row in extent_rows(reader)] == [(0, 64 * TIB)]
    reader.close()


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_tables_are_flushed_between_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster_size: int, compress: bool
) -> None:
    monkeypatch.setattr(limits, "MAX_PENDING_TABLE_NBYTES", 2000)
    content = _content(8 * MIB)
    wanted = request(len(content), {"cluster_size": cluster_size}, compress=compress)
    path = write_image(tmp_path / "a.qcow2", content, wanted, batch=37)
    _assert_clean(path, content)


def test_result_does_not_depend_on_batches(tmp_path: Path) -> None:
    content = _content(2 * MIB)
    wanted = request(len(content), {"cluster_size": 4096}, compress=True)
    images = [
        write_image(tmp_path / f"{n}.qcow2", content, wanted, batch=n).read_bytes()
        for n in (1, 13, 512, 100_000)
    ]
    assert len(set(images)) == 1


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_backing_file(tmp_path: Path, compat: str) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"B" * MIB)
    content = b"B" * 65536 + bytes(65536) + noise(65536)
    content += b"B" * (MIB - len(content))
    wanted = request(MIB, {"compat": compat}, backing=BackingReference("base.raw", "raw"))
    same = {index for index in range(16) if index not in (1, 2)}
    path = write_image(tmp_path / "a.qcow2", content, wanted, absent=same)
    raw = tmp_path / "a.raw"
    raw.write_bytes(content)
    qemu.assert_same(raw, path, source_format="raw", target_format="qcow2")
    qemu.assert_check_clean(path)
    info = qemu.info(path, "qcow2")
    assert info["backing-filename"] == "base.raw"
    assert info["backing-filename-format"] == "raw"
    kinds = [row[2] for row in _own_rows(path)]
    assert kinds == (
        ["hole", "zero", "data", "hole"] if compat == "1.1" else ["hole", "data", "hole"]
    )


def _own_rows(path: Path) -> list[tuple[int, int, str, int | None]]:
    from tests.helpers.qcow2 import merged

    reader = open_qcow2(path)
    rows = merged(extent_rows(reader))
    reader.close()
    return rows


def test_zeros_are_stored_on_request(tmp_path: Path) -> None:
    content = bytes(256 * KIB)
    path = write_image(tmp_path / "a.qcow2", content, request(len(content), sparse_nbytes=0))
    _assert_clean(path, content)
    assert [row[2] for row in _own_rows(path)] == ["data"]


def test_far_placements(tmp_path: Path) -> None:
    """Blocks at 60 TiB of the guest, and far into the file."""
    writer = DRIVER.writer(request(64 * TIB))
    path = tmp_path / "a.qcow2"
    with Target(path, sync=False) as target:
        file = writer.begin(target)
        n_blocks = 16_384
        placements = np.zeros(n_blocks, dtype=PLACEMENT_DTYPE)
        first = writer.first_offset
        placements["host_offset"] = np.arange(n_blocks, dtype=np.uint64) * 65536 + first
        placements["length"] = 65536
        placements["state"] = BlockState.STORED
        end = first + n_blocks * 65536
        assert writer.place(60 * TIB // 65536 + 5, placements, end) == end
        writer.finish(end)
        assert file.nbytes > end
        target.commit()
    assert qemu.assert_check_clean(path)["allocated-clusters"] == n_blocks
    reader = open_qcow2(path)
    rows = [row[:3] for row in extent_rows(reader) if row[5] == 2]
    assert rows == [(60 * TIB + 5 * 65536, n_blocks * 65536, first)]
    reader.close()


def test_an_entry_that_cannot_hold_its_placement(tmp_path: Path) -> None:
    """Refcounts that far out would take terabytes of memory."""
    writer = DRIVER.writer(request(MIB))
    rows = np.array([(1 << 56, 65536, BlockState.STORED)], dtype=PLACEMENT_DTYPE)
    with Target(tmp_path / "a.qcow2", sync=False) as target:
        writer.begin(target)
        with pytest.raises(LimitExceededError, match="does not fit in an L2 entry"):
            writer.place(0, rows, (1 << 56) + 65536)


def test_more_clusters_in_one_than_a_refcount_holds(tmp_path: Path) -> None:
    writer = DRIVER.writer(request(MIB, {"refcount_bits": 1}))
    rows = np.array([(1 << 20, 9, 2), ((1 << 20) + 9, 9, 2)], dtype=PLACEMENT_DTYPE)
    rows["state"] = BlockState.COMPRESSED
    with Target(tmp_path / "a.qcow2", sync=False) as target:
        writer.begin(target)
        with pytest.raises(LimitExceededError, match="holds 2 compressed clusters"):
            writer.place(0, rows, 2 << 20)


def test_placement_beyond_the_entry_is_refused(tmp_path: Path) -> None:
    writer = DRIVER.writer(request(MIB))
    with Target(tmp_path / "a.qcow2", sync=False) as target:
        writer.begin(target)
        placements = np.array([(1 << 56, 65536, BlockState.STORED)], dtype=PLACEMENT_DTYPE)
        with pytest.raises((LimitExceededError, MemoryError)):
            writer.place(0, placements, (1 << 56) + 65536)


@pytest.mark.parametrize(
    ("options", "compress", "backing", "message"),
    [
        ({"cluster_size": 256}, False, False, "cluster_size is 256"),
        ({"cluster_size": 4 << 20}, False, False, "cluster_size is 4194304"),
        ({"cluster_size": 3000}, False, False, "cluster_size is 3000"),
        ({"refcount_bits": 0}, False, False, "refcount_bits is 0"),
        ({"refcount_bits": 3}, False, False, "refcount_bits is 3"),
        ({"refcount_bits": 128}, False, False, "refcount_bits is 128"),
        ({"compat": "2.0"}, False, False, "compat of qcow2 is '2.0'"),
        ({"compression_type": "lzma"}, False, False, "compression_type of qcow2 is 'lzma'"),
        ({"preallocation": "some"}, False, False, "preallocation of qcow2 is 'some'"),
        ({"level": "5"}, True, False, "level '5': allowed are fastest, fast, default, best$"),
        ({"level": "high"}, True, False, "level 'high': allowed are fastest"),
        ({"compression_type": "zstd", "level": "20"}, True, False, "a number from -7 to 19"),
        ({"compression_type": "zstd", "level": "high"}, True, False, "a number from -7 to 19"),
        ({"window": "8k"}, True, False, "window of qcow2 is '8k', allowed: 4k, 32k"),
        ({"compat": "0.10", "compression_type": "zstd"}, True, False, "needs compat=1.1"),
        ({"compat": "0.10", "lazy_refcounts": True}, False, False, "needs compat=1.1"),
        ({"compat": "0.10", "refcount_bits": 8}, False, False, "needs compat=1.1"),
        ({"preallocation": "full"}, True, False, "cannot be combined"),
        ({"preallocation": "metadata"}, False, True, "cannot be combined"),
        ({"refcount_bits": 1}, True, False, "too small for compression"),
        ({"refcount_bits": 8}, True, False, "too small for compression"),
        ({"extended_l2": True}, False, False, "subclusters are not written"),
        ({"encryption": "on"}, False, False, "encrypted images are not written"),
        ({"data_file": "x.raw"}, False, False, "data files are not written"),
    ],
)
def test_options_refused(
    options: dict[str, Any], compress: bool, backing: bool, message: str
) -> None:
    reference = BackingReference("base.raw", "raw") if backing else None
    with pytest.raises(OptionError, match=message):
        DRIVER.writer(request(MIB, options, compress=compress, backing=reference))


@pytest.mark.parametrize(("level", "number"), [("fast", 1), ("-7", -7), ("19", 19)])
def test_levels_of_zstd(level: str, number: int) -> None:
    options = {"compression_type": "zstd", "level": level}
    assert DRIVER.writer(request(MIB, options, compress=True)).geometry.codec.level == number


@pytest.mark.parametrize("nbytes", [1024, 490])
def test_backing_name_has_to_fit(nbytes: int) -> None:
    backing = BackingReference("b" * nbytes, "raw")
    with pytest.raises(OptionError, match="backing file's name"):
        DRIVER.writer(request(MIB, {"cluster_size": 512}, backing=backing))


@pytest.mark.parametrize("name", ["a:b.qcow2", "1:b.qcow2", "nbd:x", "json:{}", "web 01:/b"])
def test_backing_name_that_qemu_takes_for_a_protocol(name: str) -> None:
    with pytest.raises(OptionError, match="with ./ before it"):
        DRIVER.writer(request(MIB, backing=BackingReference(name, "raw")))
    DRIVER.writer(request(MIB, backing=BackingReference(f"./{name}", "raw")))


def test_backing_format_is_called_what_qemu_calls_it(tmp_path: Path) -> None:
    imgcore.create(tmp_path / "base.vhd", MIB, format="vhd")
    path = tmp_path / "a.qcow2"
    imgcore.create(path, backing="base.vhd", backing_format="vhd")
    assert qemu.info(path, "qcow2")["backing-filename-format"] == "vpc"
    qemu.run("map", path)
    with imgcore.open(path) as image:
        assert [layer.format_name for layer in image.layers] == ["qcow2", "vhd"]


@pytest.mark.parametrize("virtual_size", [1, 511, 1000])
def test_odd_sizes_are_refused(virtual_size: int) -> None:
    with pytest.raises(OptionError, match="not a multiple of 512"):
        DRIVER.writer(request(virtual_size))


@pytest.mark.parametrize(
    ("cluster_size", "virtual_size", "advice"),
    [
        (512, 128 * GIB, None),
        (512, 128 * GIB + 512, "cluster_size=1k"),
        (65536, 2048 * TIB, None),
        (65536, 2048 * TIB + 512, "cluster_size=128k"),
        (2 << 20, (1 << 61) + 512, "no cluster size"),
    ],
)
def test_l1_limit(cluster_size: int, virtual_size: int, advice: str | None) -> None:
    wanted = request(virtual_size, {"cluster_size": cluster_size})
    if advice is None:
        assert DRIVER.writer(wanted).geometry.block_nbytes == cluster_size
        return
    with pytest.raises(LimitExceededError, match=advice):
        DRIVER.writer(wanted)


def test_refcount_table_limit() -> None:
    options = {"cluster_size": 512, "refcount_bits": 64, "preallocation": "metadata"}
    with pytest.raises(LimitExceededError, match="refcount table"):
        DRIVER.writer(request(64 * GIB, options))


@pytest.mark.parametrize("order", range(7))
def test_refcounts_encoded(order: int) -> None:
    width = 1 << order
    counts = (np.arange(64, dtype=np.uint16) * 7) % min(1 << width, 1000)
    number = int.from_bytes(encode_refcounts(counts.astype(np.uint16), order).tobytes(), "big")
    raw = number.to_bytes(64 * width // 8, "big")
    for index, count in enumerate(counts.tolist()):
        if width >= 8:
            cell = int.from_bytes(raw[index * width // 8 : (index + 1) * width // 8], "big")
        else:
            cell = raw[index * width // 8] >> (index * width % 8) & ((1 << width) - 1)
        assert cell == count


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cluster_size": 512},
        {"cluster_size": 2 << 20},
        {"refcount_bits": 1},
        {"refcount_bits": 64, "cluster_size": 4096},
        {"preallocation": "metadata"},
        {"preallocation": "falloc"},
        {"preallocation": "full"},
        {"compat": "0.10"},
    ],
    ids=str,
)
@pytest.mark.parametrize("virtual_size", [0, 512, 1 << 20, (1 << 30) + 512, 1 << 36])
def test_measure_equals_qemu_img(virtual_size: int, options: dict[str, Any]) -> None:
    texts = [f"{name}={value}" for name, value in options.items()]
    arguments = ["-o", ",".join(texts)] if texts else []
    done = qemu.run(
        "measure", "--output=json", "-O", "qcow2", "--size", str(virtual_size), *arguments
    )
    theirs = json.loads(done.stdout)
    ours = DRIVER.measure(request(virtual_size, options), 0)
    assert (ours.required, ours.fully_allocated) == (theirs["required"], theirs["fully-allocated"])


def test_measure_of_data_equals_qemu_img(tmp_path: Path) -> None:
    raw = tmp_path / "a.raw"
    with open(raw, "wb") as file:
        file.write(noise(200_000))
        file.truncate(10 * MIB)
    done = qemu.run("measure", "--output=json", "-f", "raw", "-O", "qcow2", raw)
    ours = DRIVER.measure(request(10 * MIB), 4 * 65536)
    assert ours.required == json.loads(done.stdout)["required"]
