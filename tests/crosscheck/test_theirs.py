"""Images with random writes by qemu-io: imgcore and qemu-img must agree.

They must agree on content (as a whole and in random pieces), size, map, and the counts
of `check`.
"""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import imgcore
from tests.helpers import crosscheck, images, own, qemu
from tests.helpers.crosscheck import Case
from tests.helpers.images import KIB, MIB

QCOW2_CLUSTERS = (512, 1024, 4096, 16 * KIB, 64 * KIB, 256 * KIB, 2 * MIB)
NOISE_NBYTES = 2 * MIB


@dataclass(frozen=True)
class Kind:
    """How images of one kind are created: format, whether as a chain, and options."""

    name: str
    format: str
    has_backing: bool = False
    compress: bool = False
    block_nbytes: Sequence[int] = (64 * KIB,)

    def options(self, rng: random.Random) -> list[str]:
        """Return random ``-o`` options for qemu-img."""
        return _OPTIONS[self.name](rng)


def _qcow2_options(rng: random.Random) -> list[str]:
    compat = rng.choice(("0.10", "1.1", "1.1", "1.1"))
    options = [f"compat={compat}"]
    cluster = rng.choice(QCOW2_CLUSTERS)
    if compat == "1.1":
        options.append(f"refcount_bits={rng.choice((8, 16, 16, 16, 32, 64))}")
        if rng.random() < 0.3:
            options.append("lazy_refcounts=on")
        if rng.random() < 0.3:
            options.append("compression_type=zstd")
    options.append(f"cluster_size={cluster}")
    if rng.random() < 0.1:
        options.append(f"preallocation={rng.choice(('metadata', 'falloc', 'full'))}")
    return options


def _vhdx_options(rng: random.Random) -> list[str]:
    options = [f"block_size={rng.choice((1, 2, 8, 32))}M"]
    if rng.random() < 0.3:
        options.append("subformat=fixed")
    if rng.random() < 0.3:
        options.append("block_state_zero=off")
    return options


def _vmdk_sparse_options(rng: random.Random) -> list[str]:
    subformat = rng.choice(("monolithicSparse", "twoGbMaxExtentSparse"))
    zeroed = rng.choice(("on", "off"))
    return [f"subformat={subformat}", f"zeroed_grain={zeroed}"]


_OPTIONS: dict[str, Any] = {
    "raw": lambda rng: [],
    "qcow2": _qcow2_options,
    "vmdk-sparse": _vmdk_sparse_options,
    "vmdk-flat": lambda rng: [f"subformat={rng.choice(('monolithicFlat', 'twoGbMaxExtentFlat'))}"],
    "vmdk-stream": lambda rng: ["subformat=streamOptimized"],
    "vhd": lambda rng: (
        [f"subformat={rng.choice(('dynamic', 'fixed'))}"] + rng.choice(([], ["force_size"]))
    ),
    "vhdx": _vhdx_options,
    "vdi": lambda rng: [f"static={rng.choice(('on', 'off', 'off'))}"],
}

KINDS = (
    Kind("raw", "raw"),
    Kind("qcow2", "qcow2", has_backing=True, compress=True, block_nbytes=QCOW2_CLUSTERS),
    Kind("vmdk-sparse", "vmdk", has_backing=True),
    Kind("vmdk-flat", "vmdk"),
    Kind("vmdk-stream", "vmdk"),
    Kind("vhd", "vhd", block_nbytes=(512, 2 * MIB)),
    Kind("vhdx", "vhdx", block_nbytes=(MIB, 8 * MIB)),
    Kind("vdi", "vdi", block_nbytes=(MIB,)),
)


def qemu_name(kind: Kind) -> str:
    return {"vhd": "vpc"}.get(kind.format, kind.format)


def random_commands(kind: Kind, rng: random.Random, nbytes: int, noise: Path) -> list[str]:
    """Return qemu-io commands; a format may reject some of them."""
    commands = []
    for _ in range(rng.randrange(14)):
        block = rng.choice((*kind.block_nbytes, 4096, 512))
        length = min(nbytes, rng.choice((1, 511, 512, 4096, block, 2 * block, 70_001, 3 * 65536)))
        offset = rng.randrange(nbytes - length + 1)
        if rng.random() < 0.6:
            offset = offset // block * block
        what = rng.randrange(8)
        if what < 3:
            source = f"-s {noise}" if rng.random() < 0.4 else f"-P {rng.randrange(1, 256)}"
            commands.append(f"write {source} {offset} {length}")
        elif what < 5:
            commands.append(f"write -z {rng.choice(('', '-u '))}{offset} {length}")
        elif what < 6:
            commands.append(f"discard {offset} {length}")
        elif what < 7 and kind.compress:
            length = min(block, nbytes - offset)
            commands.append(f"write -c -s {noise} {offset} {length}")
        else:
            commands.append(f"write -P 0 {offset} {length}")
    return commands


def qemu_io(kind: Kind, path: Path, commands: Sequence[str]) -> None:
    """Run commands; qemu-io may reject some of them, but must not crash."""
    program = qemu.find_program("qemu-io")
    if program is None:
        pytest.skip("qemu-io is not installed")
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(
        [program, "-d", "unmap", "-f", qemu_name(kind), *words, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode in (0, 1), (commands, done.stdout, done.stderr)


def make_layer(kind: Kind, rng: random.Random, folder: Path, name: str, base: str | None) -> Path:
    """Create an image, by conversion or empty, and let qemu-io write to it."""
    path = folder / name
    options = kind.options(rng)
    nbytes = crosscheck.random_size(rng)
    if kind.name == "vmdk-stream" or (base is None and rng.random() < 0.4):
        raw = folder / f"{name}.raw"
        crosscheck.write_sparse(raw, crosscheck.random_content(rng, nbytes), rng)
        variant = qemu.Variant(kind.name, kind.format, tuple(options))
        if kind.compress and rng.random() < 0.5 and not _is_preallocated(options):
            variant = qemu.Variant(kind.name, kind.format, tuple(options), compress=True)
        qemu.convert(raw, path, variant)
    else:
        words: list[str] = ["create", "-q", "-f", qemu_name(kind)]
        if options and base is not None:
            options = [option for option in options if "preallocation" not in option]
        if options:
            words += ["-o", ",".join(options)]
        if base is not None:
            words += ["-b", base, "-F", qemu_name(kind)]
            nbytes = qemu.info(folder / base, kind.format)["virtual-size"]
            if kind.format == "qcow2" and rng.random() < 0.5:
                nbytes = crosscheck.random_size(rng)
        qemu.run(*words, path, str(nbytes))
    if kind.name != "vmdk-stream":
        operate(kind, rng, path, folder)
    return path


def _is_preallocated(options: Sequence[str]) -> bool:
    return any(option.startswith("preallocation") for option in options)


def operate(kind: Kind, rng: random.Random, path: Path, folder: Path) -> None:
    """Write at random, with a snapshot in between if the format has snapshots."""
    nbytes = qemu.info(path, kind.format)["virtual-size"]
    noise = folder / "noise"
    if not noise.exists():
        noise.write_bytes(images.noise(NOISE_NBYTES, rng.getrandbits(32)))
    for _ in range(rng.choice((1, 1, 2, 3))):
        qemu_io(kind, path, random_commands(kind, rng, nbytes, noise))
        if kind.format == "qcow2" and rng.random() < 0.3:
            qemu.run("snapshot", "-c", f"s{rng.getrandbits(20)}", path)


def make_image(kind: Kind, rng: random.Random, folder: Path) -> Path:
    """Create an image of the kind, or a chain of up to three."""
    path = make_layer(kind, rng, folder, f"a.{kind.format}", None)
    if not kind.has_backing:
        return path
    for name in ("b", "c")[: rng.choice((0, 0, 1, 1, 2))]:
        path = make_layer(kind, rng, folder, f"{name}.{kind.format}", path.name)
    return path


# ---------------------------------------------------------------------------- judgement


def assert_same_view(kind: Kind, rng: random.Random, path: Path) -> None:
    flat = path.with_name("flat")
    qemu.run("convert", "-f", qemu_name(kind), "-O", "raw", path, flat)
    with imgcore.open(path, format=kind.format) as image:
        assert image.virtual_size == flat.stat().st_size
        assert_random_reads(image, flat, rng)
    verdict = imgcore.compare(path, flat, format_a=kind.format, format_b="raw")
    assert verdict.identical, verdict
    assert_same_map(kind, path)
    assert_same_check(kind, path)
    ours = path.with_name("ours")
    target = rng.choice(qemu.VARIANTS)
    if image.virtual_size % 512 and target is not qemu.RAW:
        target = qemu.RAW
    own.convert(path, ours, target, source_format=kind.format, threads=rng.choice((1, 2, 5)))
    qemu.assert_same(flat, ours, source_format="raw", target_format=target.format)


def assert_random_reads(image: imgcore.Image, flat: Path, rng: random.Random) -> None:
    nbytes = image.virtual_size
    with open(flat, "rb") as plain:
        for _ in range(12):
            length = min(nbytes, rng.choice((1, 513, 4096, 65537)))
            offset = rng.randrange(nbytes - length + 1)
            plain.seek(offset)
            assert image.read(offset, length) == plain.read(length), (offset, length)


def assert_same_map(kind: Kind, path: Path) -> None:
    """Compare maps piece by piece: the two may join rows differently."""
    if kind.format == "vhdx":
        return  # QEMU cannot map it and reports data only
    theirs = qemu.map_entries(path, kind.format)
    ours = list(imgcore.map(path, format=kind.format))
    their_end = theirs[-1]["start"] + theirs[-1]["length"]
    assert ours[-1].start + ours[-1].length == their_end
    edges = {row["start"] for row in theirs} | {entry.start for entry in ours}
    i = j = 0
    for start in sorted(edges):
        while theirs[i]["start"] + theirs[i]["length"] <= start:
            i += 1
        while ours[j].start + ours[j].length <= start:
            j += 1
        problem = _difference(kind, start, theirs[i], ours[j])
        assert problem is None, f"{problem} at {start}: qemu-img {theirs[i]}, imgcore {ours[j]}"


def _difference(
    kind: Kind, start: int, theirs: dict[str, Any], ours: imgcore.MapEntry
) -> str | None:
    """Return how two rows about one place differ; None if they agree."""
    if theirs["data"] and theirs["zero"]:
        # A hole of the file in stored blocks is data or zeros to imgcore.
        return None
    if theirs["data"] != ours.data or theirs["zero"] != ours.zero:
        return "data or zero"
    if theirs["depth"] != ours.depth and (theirs["data"] or theirs.get("present")):
        return "depth"
    if theirs["data"] and theirs.get("compressed", ours.compressed) != ours.compressed:
        return "compressed"
    if theirs["data"] and "offset" in theirs and ours.offset is not None:
        their_place = theirs["offset"] + start - theirs["start"]
        if their_place != ours.offset + start - ours.start:
            return "offset"
    return None


def assert_same_check(kind: Kind, path: Path) -> None:
    if kind.format not in ("qcow2", "vhdx", "vdi"):
        if kind.format != "raw":
            # QEMU does not free a grain that became zeros, so leaks are expected.
            assert imgcore.check(path, format=kind.format).corruptions == 0
        return
    program = qemu.require_qemu_img()
    done = subprocess.run(
        [program, "check", "--output=json", "-f", kind.format, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    ours = imgcore.check(path, format=kind.format)
    assert (ours.corruptions == 0) == (done.returncode != 2), (done.stdout, ours)
    if kind.format == "qcow2":
        assert (ours.leaks == 0) == (done.returncode != 3), (done.stdout, ours)


# -------------------------------------------------------------------------------- cases


def _case(kind: Kind) -> Case:
    def case(rng: random.Random, folder: Path) -> None:
        assert_same_view(kind, rng, make_image(kind, rng, folder))

    return case


def killed_case(rng: random.Random, folder: Path) -> None:
    """imgcore reads the image of a killed writer, with its log or wrong refcounts.

    qemu-img repairs such images.
    """
    kind = rng.choice([kind for kind in KINDS if kind.name in ("qcow2", "vhdx")])
    path = make_layer(kind, rng, folder, "a", None)
    nbytes = qemu.info(path, kind.format)["virtual-size"]
    commands = random_commands(kind, rng, nbytes, folder / "noise")
    program = qemu.find_program("qemu-io")
    assert program is not None
    words = [word for command in (*commands, "flush", "sigraise 9") for word in ("-c", command)]
    subprocess.run(
        [program, "-f", qemu_name(kind), *words, str(path)],
        capture_output=True,
        check=False,
        timeout=120,
    )
    repaired = folder / "repaired"
    shutil.copyfile(path, repaired)
    repair = [qemu.require_qemu_img(), "check", "-q", "-r", "all", "-f", kind.format, str(repaired)]
    subprocess.run(repair, capture_output=True, check=False, timeout=120)
    flat = folder / "flat"
    qemu.run("convert", "-f", kind.format, "-O", "raw", repaired, flat)
    verdict = imgcore.compare(path, flat, format_a=kind.format, format_b="raw")
    assert verdict.identical, verdict


CASES: dict[str, Case] = {kind.name: _case(kind) for kind in KINDS} | {"killed": killed_case}


@pytest.mark.parametrize("seed", crosscheck.seeds(3))
@pytest.mark.parametrize("name", CASES)
def test_imgcore_sees_what_qemu_sees(name: str, seed: int, tmp_path: Path) -> None:
    qemu.require_qemu_img()
    crosscheck.run(name, CASES[name], seed, tmp_path)


@pytest.mark.crosscheck
@pytest.mark.slow
def test_imgcore_sees_what_qemu_sees_for_a_while(tmp_path: Path) -> None:
    qemu.require_qemu_img()
    assert crosscheck.run_for_a_while(CASES, tmp_path, crosscheck.SECONDS / 3)
