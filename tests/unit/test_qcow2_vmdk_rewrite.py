"""QCOW2 and VMDK around blocks that stay: refcounts, limits, and what is refused."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.helpers import qcow2
from tests.helpers.rewriting import open_target

import imgcore
from imgcore import LimitExceededError, OptionError, UnsupportedFeatureError, limits
from imgcore.engine.extents import EXTENT_DTYPE, PLACEMENT_DTYPE, BlockState
from imgcore.files.staged_file import StagedFile
from imgcore.formats.api import Rewriter, Survey, WriteRequest
from imgcore.formats.option_texts import parse_options
from imgcore.formats.qcow2.options import WriteOptions
from imgcore.formats.qcow2.refcounts import RefcountMap, decode_refcounts
from imgcore.formats.registry import get_driver

KIB, MIB, GIB, TIB = limits.KIB, limits.MIB, limits.GIB, limits.TIB


def request(target: str, size: int, *options: str, name: str = "a") -> WriteRequest[Any]:
    parsed = parse_options(get_driver(target), options)
    return WriteRequest(size, parsed, target_name=name)


def survey(file_nbytes: int, *, is_flat: bool = False) -> Survey:
    return Survey(file_nbytes, is_flat, np.zeros(0, EXTENT_DTYPE))


def rewriter_for(
    target: str, size: int, *options: str, file_nbytes: int = 0, is_flat: bool = False
) -> Rewriter:
    found = survey(file_nbytes or size, is_flat=is_flat)
    return get_driver(target).rewriter(request(target, size, *options), found)


# -- refcounts -------------------------------------------------------------------------


def options_of(*options: str) -> WriteOptions:
    return WriteOptions.of(request("qcow2", 64 * MIB, *options))


def all_counts(refcounts: RefcountMap, order: int, n: int) -> list[int]:
    blocks = np.arange(len(refcounts.used_blocks()))
    return decode_refcounts(refcounts.encoded(blocks).tobytes(), order).tolist()[:n]


@pytest.mark.parametrize("bits", [4, 8, 16, 32, 64])
def test_references_in_any_order(bits: int) -> None:
    """Counts agree with those of a list, however they are added."""
    rng = random.Random(bits)
    refcounts = RefcountMap(options_of("cluster_size=512", f"refcount_bits={bits}"), 100)
    expected = [0] * 5000
    for _ in range(30):
        if rng.random() < 0.5:
            first, n = rng.randrange(4000), rng.randrange(1000)
            refcounts.add_range(first, n)
            added = list(range(first, first + n))
        else:
            added = [rng.choice([rng.randrange(5000), 7]) for _ in range(rng.randrange(9))]
            refcounts.add(np.array(added, dtype=np.int64))
        for cluster in added:
            expected[cluster] += 1
        if max(expected) > 10:
            break
    assert max(expected) > 3
    found = all_counts(refcounts, bits.bit_length() - 1, 5000)
    assert found == expected[: len(found)]
    assert not any(expected[len(found) :])
    per_block = 512 * 8 // bits
    used = [any(expected[i : i + per_block]) for i in range(0, 5000, per_block)]
    assert refcounts.used_blocks().tolist()[: len(used)] == used[: len(refcounts.used_blocks())]


@pytest.mark.parametrize(("bits", "most"), [(1, 1), (2, 3), (8, 255)])
def test_more_references_than_a_refcount_holds(bits: int, most: int) -> None:
    refcounts = RefcountMap(options_of(f"refcount_bits={bits}"), 100)
    refcounts.add(np.full(most, 9))
    assert all_counts(refcounts, bits.bit_length() - 1, 11) == [0] * 9 + [most, 0]
    with pytest.raises(LimitExceededError, match="host cluster 9 has more references"):
        refcounts.add(np.array([9]))


def test_many_references_at_once() -> None:
    """Only the highest bit of the first count is set."""
    refcounts = RefcountMap(options_of(), 100)
    refcounts.add(np.full(8, 9))
    assert all_counts(refcounts, 4, 11) == [0] * 9 + [8, 0]
    with pytest.raises(LimitExceededError, match="host cluster 9 has more references"):
        RefcountMap(options_of("refcount_bits=1"), 100).add(np.full(4, 9))


def test_refcounts_of_a_large_file_take_little_memory() -> None:
    """A bit for each cluster makes 128 MiB for a file of 64 TiB."""
    tracemalloc.start()
    try:
        refcounts = RefcountMap(options_of(), 64 * TIB // (64 * KIB))
        clusters = np.arange(1 << 20, dtype=np.int64)
        np.random.default_rng(1).shuffle(clusters)
        for start in range(0, len(clusters), 1 << 16):
            refcounts.add(clusters[start : start + (1 << 16)])
        assert tracemalloc.get_traced_memory()[1] < 160 * MIB
    finally:
        tracemalloc.stop()
    assert np.flatnonzero(refcounts.used_blocks()).tolist() == list(range(32))


# -- QCOW2 -----------------------------------------------------------------------------


def built(
    path: Path, rewriter: Rewriter, file_nbytes: int, batches: Sequence[tuple[int, NDArray[Any]]]
) -> list[tuple[int, int]]:
    """Rewrite a file of holes; return what of it was overwritten."""
    with path.open("wb") as file:
        file.truncate(file_nbytes)
    with closing(open_target(path)) as target:
        with closing(StagedFile(target, file_nbytes, rewriter.overwrites)) as staged:
            offset = rewriter.begin(staged, file_nbytes)
            for first, rows in batches:
                offset = rewriter.place(first, rows, offset)
            rewriter.finish(offset)
            staged.apply()
            return [(offset, len(data)) for offset, data in staged.change.pieces]


def stored(hosts: NDArray[Any], nbytes: int) -> NDArray[Any]:
    rows = np.zeros(len(hosts), PLACEMENT_DTYPE)
    rows["host_offset"], rows["length"], rows["state"] = hosts, nbytes, BlockState.STORED
    return rows


def test_shuffled_clusters_with_tables_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PENDING_TABLE_NBYTES", 4 * KIB)
    n, size = 4096, 512
    hosts = np.random.default_rng(1).permutation(n) * size + size
    rewriter = rewriter_for("qcow2", n * size, "cluster_size=512", file_nbytes=(n + 1) * size)
    rows = stored(hosts, size)
    rows["state"][100:300] = BlockState.ABSENT
    batches = [(first, rows[first : first + 300]) for first in range(0, n, 300)]
    path = tmp_path / "a.qcow2"
    built(path, rewriter, (n + 1) * size, batches)
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems
    assert report.allocated_clusters == n - 200
    reader = qcow2.open_qcow2(path)
    found = np.concatenate(list(reader.extents(0, n * size)))
    data = found[found["kind"] == 2]
    places = {
        int(row["guest_offset"]) // size + k: int(row["host_offset"]) + k * size
        for row in data
        for k in range(int(row["length"]) // size)
    }
    expected = {k: int(hosts[k]) for k in range(n) if not 100 <= k < 300}
    assert places == expected


def test_compressed_clusters_share_host_clusters(tmp_path: Path) -> None:
    """The refcount is the number of compressed clusters that touch the host cluster."""
    rewriter = rewriter_for("qcow2", 4 * MIB, file_nbytes=MIB)
    rows = np.zeros(5, PLACEMENT_DTYPE)
    rows["state"] = BlockState.COMPRESSED
    rows["host_offset"] = [65536 + 14, 65536 + 1000, 2 * 65536 - 10, 3 * 65536, 5 * 65536 - 1]
    rows["length"] = [900, 30_000, 20, 65536, 2]
    path = tmp_path / "a.qcow2"
    built(path, rewriter, MIB, [(3, rows)])
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems
    assert report.compressed_clusters == 5


def test_sparse_refcounts_of_a_huge_file(tmp_path: Path) -> None:
    """Only refcount blocks with references are written."""
    far = 8 * TIB
    rewriter = rewriter_for("qcow2", 16 * TIB, file_nbytes=far)
    path = tmp_path / "a.qcow2"
    hosts = np.array([far - 65536, 65536, far // 2])
    built(path, rewriter, far, [(7, stored(hosts, 65536))])
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems
    assert path.stat().st_size < far + 2 * MIB
    assert path.stat().st_blocks * 512 < 2 * MIB


def test_a_file_that_nearly_fills_the_refcount_table(tmp_path: Path) -> None:
    """Its 127 GiB have room for the new tables; 128 GiB have not."""
    for file_nbytes, fits in ((127 * GIB, True), (128 * GIB, False)):
        rewriter = rewriter_for("qcow2", MIB, "cluster_size=512", file_nbytes=file_nbytes)
        path = tmp_path / "a.qcow2"
        rows = stored(np.array([file_nbytes - 512]), 512)
        if fits:
            built(path, rewriter, file_nbytes, [(0, rows)])
            assert imgcore.check(path).ok
        else:
            with pytest.raises(LimitExceededError, match="a refcount table for"):
                built(path, rewriter, file_nbytes, [(0, rows)])


@pytest.mark.parametrize(
    ("target", "option", "nbytes"),
    [
        *(("qcow2", f"cluster_size={size}", 512) for size in ("512", "1k", "4k", "64k", "2M")),
        *(("vmdk", f"grain_size={size}", 21 * 512) for size in ("8k", "1M")),
    ],
)
def test_what_is_overwritten(tmp_path: Path, target: str, option: str, nbytes: int) -> None:
    """The header sector, and the descriptor of a VMDK with the zeros behind it."""
    rewriter = rewriter_for(target, MIB, option, file_nbytes=4 * MIB)
    assert list(rewriter.overwrites) == [(0, nbytes)]
    rows = stored(np.array([2 * MIB]), 512)
    assert built(tmp_path / "a", rewriter, 4 * MIB, [(0, rows)]) == [(0, nbytes)]


@pytest.mark.parametrize(
    ("options", "file_nbytes", "words"),
    [
        # The refcount table would be too large, or the memory.
        (("cluster_size=512",), 256 * GIB, "the refcount table needs"),
        (("cluster_size=2M", "refcount_bits=64"), 1 << 62, "the refcount table needs"),
        (("cluster_size=64k",), 1 << 50, "too many to count"),
    ],
)
def test_files_too_large_for_qcow2(options: tuple[str, ...], file_nbytes: int, words: str) -> None:
    with pytest.raises(LimitExceededError, match=words):
        rewriter_for("qcow2", MIB, *options, file_nbytes=file_nbytes)


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
def test_preallocation_is_refused(mode: str) -> None:
    with pytest.raises(OptionError, match=f"preallocation={mode}"):
        rewriter_for("qcow2", MIB, f"preallocation={mode}")


# -- VMDK ------------------------------------------------------------------------------


def test_a_file_too_large_for_vmdk() -> None:
    """All tables must lie below 2 TiB, which is known before anything is written."""
    rewriter_for("vmdk", TIB, file_nbytes=2 * TIB - 129 * MIB)
    with pytest.raises(LimitExceededError, match="at most 2199023255552 bytes"):
        rewriter_for("vmdk", TIB, file_nbytes=2 * TIB - 128 * MIB)


def test_a_grain_too_far_for_vmdk(tmp_path: Path) -> None:
    rewriter = rewriter_for("vmdk", MIB)
    rows = stored(np.array([2 * TIB]), 65536)
    with pytest.raises(LimitExceededError, match="data at 0x20000000000"):
        built(tmp_path / "a.vmdk", rewriter, MIB, [(0, rows)])


def test_compressed_vmdk_is_refused() -> None:
    with pytest.raises(UnsupportedFeatureError, match="imgcore convert writes"):
        rewriter_for("vmdk", MIB, "subformat=streamOptimized")


def test_flat_vmdk_needs_a_flat_disk() -> None:
    with pytest.raises(UnsupportedFeatureError, match="this image has blocks"):
        rewriter_for("vmdk", MIB, "subformat=monolithicFlat")
    with pytest.raises(OptionError, match="does not go with rewriting"):
        rewriter_for("vmdk", MIB, "subformat=monolithicFlat", "preallocation=full", is_flat=True)


def test_a_name_that_no_descriptor_holds() -> None:
    driver = get_driver("vmdk")
    wanted = request("vmdk", MIB, "subformat=monolithicFlat", name='a"b.vmdk')
    with pytest.raises(OptionError, match="a name with quotes"):
        driver.rewriter(wanted, survey(MIB, is_flat=True))


def test_unused_tables_are_holes(tmp_path: Path) -> None:
    """QEMU needs every table, and a large disk has many without data."""
    path = tmp_path / "a.vmdk"
    rewriter = rewriter_for("vmdk", TIB, file_nbytes=MIB)
    built(path, rewriter, MIB, [(1 << 23, stored(np.array([512 * 100]), 65536))])
    assert path.stat().st_size > 128 * MIB
    assert path.stat().st_blocks * 512 < MIB
    report = imgcore.check(path)
    assert (report.corruptions, report.leaks) == (0, 0), report.problems
    assert report.allocated_clusters == 1
