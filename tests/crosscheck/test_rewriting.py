"""Random images change their format in place, or are refused and stay as they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import imgcore
from tests.helpers import crosscheck, qemu
from tests.helpers import rewrite_pairs as pairs
from tests.helpers.crosscheck import Case
from tests.helpers.images import KIB, MIB

Options = list[str]
REFUSALS = (imgcore.UnsupportedFeatureError, imgcore.OptionError, imgcore.LimitExceededError)


def _qcow2(rng: random.Random) -> Options:
    size = rng.choice((512, 4 * KIB, 64 * KIB, 64 * KIB, MIB, 2 * MIB))
    refcount_bits = rng.choice((1, 8, 16, 16, 16, 64))
    return [f"cluster_size={size}", f"refcount_bits={refcount_bits}"]


def _qcow2_target(rng: random.Random) -> Options:
    compat = rng.choice(("1.1", "1.1", "0.10"))
    return _qcow2(rng) if compat == "1.1" else [_qcow2(rng)[0], "compat=0.10"]


def _vmdk(rng: random.Random) -> Options:
    grain = rng.choice((8 * KIB, 64 * KIB, 64 * KIB, MIB))
    kind = rng.choice(("monolithicSparse", "monolithicSparse", "monolithicFlat"))
    return [f"subformat={kind}", *([f"grain_size={grain}"] if "Sparse" in kind else [])]


def _vhd(rng: random.Random) -> Options:
    return [f"subformat={rng.choice(('fixed', 'dynamic'))}"]


def _vhdx(rng: random.Random) -> Options:
    return [f"block_size={rng.choice((1, 2, 8, 32))}M"]


def _none(rng: random.Random) -> Options:
    return []


SOURCES: dict[str, Callable[[random.Random], Options]] = {
    "raw": _none,
    "qcow2": _qcow2,
    "vmdk": _vmdk,
    "vhd": _vhd,
    "vhdx": _vhdx,
    "vdi": _none,
}
TARGETS = {**SOURCES, "qcow2": _qcow2_target}
# To raw and VHD only flat disks can go.
ALL_PAIRS = [(a, b) for a in SOURCES for b in TARGETS if a != b] + [
    (a, b) for a in SOURCES for b in ("qcow2", "vmdk", "vhdx", "vdi") for _ in range(3) if a != b
]


def _compressed(rng: random.Random) -> tuple[str, Options]:
    if rng.random() < 0.6:
        return "vmdk", ["subformat=streamOptimized"]
    return "qcow2", [f"compression_type={rng.choice(('zlib', 'zstd'))}", "cluster_size=64k"]


def _grow_old(rng: random.Random, path: Path, image_format: str, nbytes: int) -> None:
    """Write to random places as a guest does."""
    commands = []
    for _ in range(rng.choice((0, 0, 10, 60))):
        length = min(nbytes, 512 * rng.choice((1, 8, 100, 700))) // 512 * 512
        offset = rng.randrange((nbytes - length) // 512 + 1) * 512
        how = rng.choice((f"-P {rng.randrange(1, 256)}", "-z", "-P 0"))
        commands.append(f"write {how} {offset} {length}")
    pairs.qemu_io(path, image_format, commands or ["length"])


def _case(rng: random.Random, folder: Path) -> None:
    content = crosscheck.random_content(rng, crosscheck.random_size(rng))
    is_compressed = rng.random() < 0.2
    source, target = rng.choice(ALL_PAIRS)
    options = SOURCES[source](rng)
    if is_compressed:
        source, options = _compressed(rng)
        target = rng.choice([name for name in TARGETS if name != source])
    target_options = TARGETS[target](rng)
    print(source, options, len(content), "->", target, target_options)
    raw, beside = folder / "disk.raw", folder / "images"
    beside.mkdir()
    crosscheck.write_sparse(raw, content, rng)
    path = beside / f"disk.{source}"
    imgcore.convert(
        raw,
        path,
        format="raw",
        target_format=source,
        options=options,
        compress=is_compressed and source == "qcow2",
        sparse=rng.choice((0, 4096, 4096, 4096)),
        sync=False,
    )
    if "subformat=streamOptimized" not in options:
        _grow_old(rng, path, source, len(content))
    expected = folder / "expected.raw"
    imgcore.convert(path, expected, format=source, sync=False)
    before = pairs.digests(beside)
    inflate = rng.random() < 0.5
    try:
        result = imgcore.rewrite(
            path, target, options=target_options, format=source, name="new", inflate=inflate
        )
    except REFUSALS as error:
        print("refused:", error)
        assert pairs.digests(beside) == before
        return
    pairs.assert_reads_as(expected, Path(result.path), target, leaks=True)
    imgcore.undo_rewrite(result.path)
    assert pairs.digests(beside) == before
    again = imgcore.rewrite(
        path,
        target,
        options=target_options,
        format=source,
        name="new",
        inflate=inflate,
        keep_undo=False,
    )
    pairs.write_as_guest(expected, Path(again.path), target, n_writes=40)
    pairs.assert_reads_as(expected, Path(again.path), target, leaks=True)


CASES: dict[str, Case] = {"rewrite": _case}


@pytest.mark.parametrize("seed", crosscheck.seeds(6))
def test_rewritten_or_refused(seed: int, tmp_path: Path) -> None:
    qemu.require_qemu_img()
    crosscheck.run("rewrite", _case, seed, tmp_path)


@pytest.mark.crosscheck
@pytest.mark.slow
def test_rewritten_or_refused_for_a_while(tmp_path: Path) -> None:
    qemu.require_qemu_img()
    assert crosscheck.run_for_a_while(CASES, tmp_path, crosscheck.SECONDS / 6)
