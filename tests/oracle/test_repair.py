"""check -r of QCOW2 against ``qemu-img check -r``: refcounts and exit codes."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import imgcore
from imgcore.formats.qcow2 import references
from tests.helpers import qemu
from tests.helpers.command import imgcore as run
from tests.helpers.qcow2 import Structure, create, qemu_io, read_structure
from tests.helpers.reading import poke

MIB = 1 << 20
COPIED, COMPRESSED, OFFSET = 1 << 63, 1 << 62, 0x00FFFFFFFFFFFE00
DIRTY, CORRUPT = 1, 2


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


# ----------------------------------------------------------------------- the images

IMAGES: dict[str, tuple[list[str], list[str], list[str]]] = {
    # Options, what is written, and what is written after an internal snapshot.
    "plain": ([], ["write -P 1 0 1M", "write -z 2M 128k"], []),
    "version 2": (["compat=0.10"], ["write -P 1 0 1M"], ["write -P 2 512k 1M"]),
    "snapshot": ([], ["write -P 1 0 1M"], ["write -P 2 512k 1M"]),
    "compressed": ([], ["write -c -P 1 0 64k", "write -c -P 2 64k 64k", "write 1M 64k"], []),
    "1 bit": (["cluster_size=512", "refcount_bits=1"], ["write -P 1 0 700k"], []),
    "2 bits": (["cluster_size=512", "refcount_bits=2"], ["write 0 200k"], ["write 100k 200k"]),
    "4 bits": (["cluster_size=1024", "refcount_bits=4"], ["write 0 200k"], ["write 100k 200k"]),
    "8 bits": (["cluster_size=4k", "refcount_bits=8"], ["write 0 2M"], []),
    "32 bits": (["cluster_size=512", "refcount_bits=32"], ["write 0 200k"], ["write 99k 9k"]),
    "64 bits": (["cluster_size=512", "refcount_bits=64"], ["write 0 200k"], ["write 99k 9k"]),
    "2M": (["cluster_size=2M"], ["write -P 1 0 2M", "write -P 3 6M 2M"], []),
    "lazy": (["lazy_refcounts=on"], ["write -P 1 0 1M"], ["write -P 2 512k 1M"]),
}


def make(path: Path, name: str) -> Path:
    options, before, after = IMAGES[name]
    create(path, 8 * MIB, *options)
    qemu_io(path, *before)
    if after:
        qemu.run("snapshot", "-c", "first", path)
        qemu_io(path, *after)
    return path


def entries(path: Path, offset: int, n: int) -> list[tuple[int, int]]:
    """Return (host offset, value) of the table entries that are not 0."""
    raw = path.read_bytes()[offset : offset + 8 * n]
    values = struct.unpack(f">{n}Q", raw)
    return [(offset + 8 * index, value) for index, value in enumerate(values) if value]


def data_entries(path: Path, at: Structure) -> list[tuple[int, int]]:
    """Return the entries of plain clusters in the active L2 tables."""
    return [
        row
        for _, table in entries(path, at.l1_offset, at.l1_entries)
        for row in entries(path, table & OFFSET, at.cluster_size // 8)
        if not row[1] & COMPRESSED and row[1] & OFFSET
    ]


# ----------------------------------------------------------------------- the damages


def set_refcount(path: Path, at: Structure, cluster: int, count: int) -> None:
    block, index = divmod(cluster, at.cluster_size * 8 // at.refcount_bits)
    bit = index * at.refcount_bits
    offset = at.blocks[block] + bit // 8
    if at.refcount_bits >= 8:
        poke(path, (offset, count.to_bytes(at.refcount_bits // 8, "big")))
        return
    mask = (1 << at.refcount_bits) - 1
    old = path.read_bytes()[offset] & ~(mask << bit % 8)
    poke(path, (offset, bytes([old | (count & mask) << bit % 8])))


def zero_block(path: Path, at: Structure) -> None:
    poke(path, (at.blocks[0], bytes(at.cluster_size)))


def full_block(path: Path, at: Structure) -> None:
    poke(path, (at.blocks[0], b"\xff" * at.cluster_size))


def table_entry(value: Callable[[Path, Structure], int]) -> Callable[[Path, Structure], None]:
    return lambda path, at: poke(path, (at.table_offset, u64(value(path, at)))) and None


def a_data_cluster(path: Path, at: Structure) -> int:
    return data_entries(path, at)[-1][1] & OFFSET


def wrong_l2_flags(path: Path, at: Structure) -> None:
    rows = data_entries(path, at)
    poke(path, *((place, u64(value ^ COPIED)) for place, value in rows[::3]))


def wrong_l1_flag(path: Path, at: Structure) -> None:
    place, value = entries(path, at.l1_offset, at.l1_entries)[0]
    poke(path, (place, u64(value ^ COPIED)))


def leak_of_entries(path: Path, at: Structure) -> None:
    poke(path, *((place, bytes(8)) for place, _ in data_entries(path, at)[1::4]))


def lost_l2_table(path: Path, at: Structure) -> None:
    poke(path, (entries(path, at.l1_offset, at.l1_entries)[-1][0], bytes(8)))


def flags(bits: int) -> Callable[[Path, Structure], None]:
    def damage(path: Path, at: Structure) -> None:
        if at.version == 3:
            poke(path, (72, u64(bits)))

    return damage


DAMAGES: dict[str, Callable[[Path, Structure], None]] = {
    "block of zeros": zero_block,
    "block of ones": full_block,
    "header is free": lambda path, at: set_refcount(path, at, 0, 0),
    "data is free": lambda path, at: set_refcount(
        path, at, a_data_cluster(path, at) // at.cluster_size, 0
    ),
    "table is gone": table_entry(lambda path, at: 0),
    "block outside": table_entry(lambda path, at: -(-path.stat().st_size // MIB) * 2 * MIB),
    "block unaligned": table_entry(lambda path, at: at.blocks[0] + 512 * (at.cluster_size > 512)),
    "reserved bits": table_entry(lambda path, at: at.blocks[0] | 1),
    "block is data": table_entry(a_data_cluster),
    "block is L1": table_entry(lambda path, at: at.l1_offset),
    "block is the table": table_entry(lambda path, at: at.table_offset),
    "block is the header": table_entry(lambda path, at: 0),
    "L2 flags": wrong_l2_flags,
    "L1 flag": wrong_l1_flag,
    "leaks": leak_of_entries,
    "lost L2 table": lost_l2_table,
    "dirty": flags(DIRTY),
    "corrupt": flags(CORRUPT),
}


# -------------------------------------------------------------------- the comparison


def qemu_check(path: Path, *arguments: str) -> tuple[int, dict[str, int]]:
    command = [qemu.require_qemu_img(), "check", "--output=json", *arguments, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}


def guest_refcounts(structure: Structure, *others: Structure) -> dict[int, int]:
    """Return the refcounts of clusters that no refcount structure uses."""
    own = set.union(structure.own, *(other.own for other in others))
    return {place: n for place, n in structure.refcounts.items() if place not in own}


def assert_repaired(damaged: Path, folder: Path) -> bool:
    """Repair a copy of an image, and let qemu-img repair another; compare them.

    Returns whether anything was repaired.
    """
    ours, theirs = folder / "ours.qcow2", folder / "theirs.qcow2"
    shutil.copyfile(damaged, ours)
    shutil.copyfile(damaged, theirs)
    before = imgcore.check(damaged)
    result = imgcore.check(ours, repair="all")
    assert result.ok, (result.problems[:3], result.not_repaired)
    assert result.problems == []
    assert result.not_repaired == []
    assert result.corruptions_fixed == before.corruptions
    assert result.leaks_fixed == before.leaks
    qemu.assert_check_clean(ours)
    qemu.assert_same(damaged, ours, source_format="qcow2", target_format="qcow2")
    repaired = read_structure(ours)
    assert ours.read_bytes()[60:64] == damaged.read_bytes()[60:64]  # snapshots
    if repaired.version == 3:
        assert ours.read_bytes()[79] & (DIRTY | CORRUPT) == 0
    code, _ = qemu_check(theirs, "-r", "all")
    if code == 0:
        expected = read_structure(theirs)
        assert guest_refcounts(repaired, expected) == guest_refcounts(expected, repaired)
    again = imgcore.check(ours, repair="all")
    assert again.repairs == []
    return bool(result.repairs)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", IMAGES)
def test_refcounts_are_rebuilt(tmp_path: Path, name: str, damage: str) -> None:
    path = make(tmp_path / "a.qcow2", name)
    DAMAGES[damage](path, read_structure(path))
    assert_repaired(path, tmp_path)


@pytest.mark.parametrize("field", [(48, bytes(8)), (56, bytes(4))], ids=["offset", "clusters"])
@pytest.mark.parametrize("name", IMAGES)
def test_a_header_without_a_table(tmp_path: Path, name: str, field: tuple[int, bytes]) -> None:
    path = make(tmp_path / "a.qcow2", name)
    sound, theirs = tmp_path / "sound.qcow2", tmp_path / "theirs.qcow2"
    shutil.copyfile(path, sound)
    poke(path, field)
    shutil.copyfile(path, theirs)
    assert "check -r all rebuilds it" in run("info", path).stderr
    assert run("check", path).returncode == 2
    # The advice.
    done = run("check", "-r", "all", path)
    assert done.returncode == 0, done.stderr
    qemu.assert_check_clean(path)
    qemu.assert_same(sound, path, source_format="qcow2", target_format="qcow2")
    code, _ = qemu_check(theirs, "-r", "all")
    if code == 0:
        repaired, expected = read_structure(path), read_structure(theirs)
        assert guest_refcounts(repaired, expected) == guest_refcounts(expected, repaired)


@pytest.mark.parametrize("name", ["plain", "snapshot", "2 bits", "64 bits", "1 bit"])
def test_windows_do_not_change_the_repair(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "a.qcow2", name)
    at = read_structure(path)
    wrong_l2_flags(path, at)
    leak_of_entries(path, at)
    zero_block(path, at)
    table_entry(a_data_cluster)(path, at)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for target in (whole, pieces):
        shutil.copyfile(path, target)
    imgcore.check(whole, format="qcow2", repair=True)
    monkeypatch.setattr(references, "WINDOW_CLUSTERS", 64)
    assert imgcore.check(pieces, format="qcow2", repair=True).ok
    assert pieces.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", ["lazy", "snapshot", "compressed"])
def test_a_host_lost_power(tmp_path: Path, name: str) -> None:
    """qemu-io aborts with refcounts that were not written."""
    path = make(tmp_path / "a.qcow2", name)
    qemu_io(path, "write -P 9 3M 2M", "abort", check=False)
    repaired = assert_repaired(path, tmp_path)
    assert repaired == (name == "lazy")


def test_bitmaps_are_counted(tmp_path: Path) -> None:
    path = make(tmp_path / "a.qcow2", "plain")
    qemu.run("bitmap", "--add", "-g", "4k", path, "b")
    qemu_io(path, "write -P 5 4M 1M")
    zero_block(path, read_structure(path))
    assert imgcore.check(path, repair="all").ok
    qemu.assert_check_clean(path)
    assert "b" in str(qemu.info(path, "qcow2")["format-specific"])


@pytest.mark.parametrize("name", ["plain", "snapshot", "2 bits", "64 bits", "compressed"])
@pytest.mark.parametrize("damage", ["block of ones", "leaks", "L2 flags", "lost L2 table"])
def test_only_leaks(tmp_path: Path, name: str, damage: str) -> None:
    path = make(tmp_path / "a.qcow2", name)
    DAMAGES[damage](path, read_structure(path))
    theirs = tmp_path / "theirs.qcow2"
    shutil.copyfile(path, theirs)
    code, report = qemu_check(theirs, "-r", "leaks")
    done = run("check", "-r", "leaks", "--json", path)
    assert done.returncode == code == 0
    assert json.loads(done.stdout).get("leaks-fixed") == report.get("leaks-fixed")
    assert read_structure(path).refcounts == read_structure(theirs).refcounts
    qemu.assert_check_clean(path)


def test_leaks_beside_refcounts_that_are_too_low(tmp_path: Path) -> None:
    """-r leaks frees the leaks, leaves the rest, and says so."""
    path = make(tmp_path / "a.qcow2", "snapshot")
    at = read_structure(path)
    shared = next(cluster for cluster, count in at.refcounts.items() if count == 2)
    set_refcount(path, at, shared, 1)
    set_refcount(path, at, max(at.refcounts), 7)
    poke(path, (72, u64(DIRTY | CORRUPT)))
    theirs = tmp_path / "theirs.qcow2"
    shutil.copyfile(path, theirs)
    code, report = qemu_check(theirs, "-r", "leaks")
    result = imgcore.check(path, repair="leaks")
    assert code == 2
    assert report["corruptions"] > 0
    assert (result.leaks, result.leaks_fixed) == (0, 1)
    assert result.corruptions > 0
    assert result.not_repaired == [
        "1 refcounts are too low: -r all repairs this, -r leaks does not"
    ]
    assert read_structure(path).refcounts == read_structure(theirs).refcounts
    assert path.read_bytes()[79] == DIRTY | CORRUPT
    # The advice.
    done = run("check", "-r", "all", path)
    assert done.returncode == 0
    qemu.assert_check_clean(path)


# ------------------------------------------------------------------- random damages


def random_image(path: Path, rng: random.Random) -> None:
    size = rng.choice([512, 1024, 4096, 65536])
    bits = rng.choice([1, 2, 4, 8, 16, 16, 32, 64])
    options = [f"cluster_size={size}", f"refcount_bits={bits}"]
    if bits == 16 and rng.random() < 0.3:
        options[1] = "compat=0.10"
    n_clusters = rng.choice([40, 300, 900])
    create(path, size * n_clusters, *options)

    def writes(n: int) -> list[str]:
        commands = []
        for _ in range(n):
            first = rng.randrange(n_clusters)
            length = min(rng.choice([1, 3, 20, 100]), n_clusters - first)
            kind = rng.choice(["write -P 3", "write -P 4", "write -z", "write -c -P 7"])
            if kind.startswith("write -c"):
                kind, length = ("write", length) if bits < 16 else (kind, 1)
            commands.append(f"{kind} {first * size} {length * size}")
        return commands

    # QEMU cannot always compress over what exists.
    qemu_io(path, *writes(rng.randrange(1, 9)), check=False)
    if bits >= 2 and rng.random() < 0.5:
        qemu.run("snapshot", "-c", "first", path)
        qemu_io(path, *writes(rng.randrange(1, 5)), check=False)


def random_damage(path: Path, rng: random.Random) -> None:
    at = read_structure(path)
    block = rng.choice([block for block in at.blocks if block])
    n_used = min(at.cluster_size, len(path.read_bytes()) // at.cluster_size * at.refcount_bits // 8)
    for _ in range(rng.randrange(1, 30)):
        value = bytes([rng.choice([0, 1, 2, 255, rng.randrange(256)])])
        poke(path, (block + rng.randrange(max(n_used, 1)), value))
    safe = ["block of zeros", "table is gone", "block is data", "L1 flag", "L2 flags", "leaks"]
    for name in rng.sample(safe, rng.randrange(3)):
        if data_entries(path, at):
            DAMAGES[name](path, at)


@pytest.mark.parametrize(
    "seed", [*range(20), *(pytest.param(n, marks=pytest.mark.slow) for n in range(20, 400))]
)
def test_random_damages(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "a.qcow2"
    random_image(path, rng)
    random_damage(path, rng)
    assert_repaired(path, tmp_path)


# ---------------------------------------------------------------------- exit codes


def not_an_image(folder: Path) -> Path:
    path = folder / "a.qcow2"
    path.write_bytes(b"QFI\xfb" + bytes(600))
    return path


def sound(folder: Path) -> Path:
    return make(folder / "a.qcow2", "plain")


def leaking(folder: Path) -> Path:
    path = sound(folder)
    leak_of_entries(path, read_structure(path))
    return path


def corrupt(folder: Path) -> Path:
    path = sound(folder)
    zero_block(path, read_structure(path))
    return path


def not_checked(folder: Path) -> Path:
    path = folder / "a.raw"
    path.write_bytes(bytes(4096))
    return path


EXITS: dict[str, tuple[Callable[[Path], Path], dict[str, int]]] = {
    "sound": (sound, {"": 0, "leaks": 0, "all": 0}),
    "leaks": (leaking, {"": 3, "leaks": 0, "all": 0}),
    "corrupt": (corrupt, {"": 2, "all": 0}),
    "unreadable": (not_an_image, {"": 1, "leaks": 1, "all": 1}),
    "missing": (lambda folder: folder / "a.qcow2", {"": 1, "leaks": 1, "all": 1}),
    "raw": (not_checked, {"": 63, "leaks": 63, "all": 63}),
}


@pytest.mark.parametrize(
    ("case", "mode"), [(case, mode) for case, (_, codes) in EXITS.items() for mode in codes]
)
def test_exit_codes(tmp_path: Path, case: str, mode: str) -> None:
    build, codes = EXITS[case]
    path = build(tmp_path)
    theirs = tmp_path / f"theirs{path.suffix}"
    if path.exists():
        shutil.copyfile(path, theirs)
    arguments = ["-r", mode] if mode else []
    image_format = "raw" if path.suffix == ".raw" else "qcow2"
    code, _ = qemu_check(theirs, *arguments, "-f", image_format)
    done = run("check", *arguments, "-f", image_format, path)
    assert done.returncode == code == codes[mode], done.stderr
    assert "Traceback" not in done.stderr
