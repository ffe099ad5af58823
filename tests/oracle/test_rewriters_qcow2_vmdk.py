"""QCOW2 and VMDK around blocks of other images, with all options, as QEMU sees them."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import imgcore
from tests.helpers import qcow2, qemu
from tests.helpers.images import KIB, MIB
from tests.helpers.rewriting import director_for, rewritten

SIZE = 12 * MIB + 77 * 512
SECTOR = 512

Write = tuple[int, int, int]


def writes(count: int, seed: int) -> list[Write]:
    """Return writes of a guest as (offset, length, byte)."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        nbytes = rng.choice([SECTOR, 4 * KIB, 20 * KIB, 64 * KIB, 300 * KIB])
        offset = rng.randrange(0, SIZE - nbytes + 1, SECTOR)
        found.append((offset, nbytes, rng.randrange(1, 256)))
    return found


CONTENT = [
    *writes(30, seed=1),
    (0, 4 * KIB, 7),
    (5 * MIB, 2 * MIB, 8),
    (SIZE - SECTOR, SECTOR, 9),
]


def write_guest(path: Path, image_format: str, found: Iterable[Write]) -> None:
    """Write through QEMU, as a guest would."""
    commands = [f"write -P {byte} {offset} {nbytes}" for offset, nbytes, byte in found]
    flags = [word for command in commands for word in ("-c", command)]
    program = shutil.which("qemu-io")
    if program is None:
        pytest.skip("qemu-io is not installed (Debian: qemu-utils)")
    qemu.checked([program, "-f", _qemu_name(image_format), *flags, str(path)])


def write_raw(path: Path, found: Iterable[Write]) -> None:
    with path.open("r+b") as file:
        for offset, nbytes, byte in found:
            file.seek(offset)
            file.write(bytes([byte]) * nbytes)


def _qemu_name(image_format: str) -> str:
    return {"vhd": "vpc"}.get(image_format, image_format)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a raw disk with holes, of an odd number of sectors."""
    path = tmp_path_factory.mktemp("raw") / "disk.raw"
    path.touch()
    with path.open("r+b") as file:
        file.truncate(SIZE)
    write_raw(path, CONTENT)
    return path


def copied(raw: Path, path: Path) -> None:
    qemu.checked(["cp", "--sparse=always", str(raw), str(path)])


def by_qemu(image_format: str, *options: str) -> Callable[[Path, Path], None]:
    flags = [word for option in options for word in ("-o", option)]
    return lambda raw, path: qemu.checked(
        [qemu.require_qemu_img(), "convert", "-f", "raw", "-O", image_format, *flags,
         str(raw), str(path)]
    ) and None  # fmt: skip


def by_imgcore(*options: str) -> Callable[[Path, Path], None]:
    return lambda raw, path: imgcore.convert(raw, path, options=options) and None


def aged(image_format: str, *options: str) -> Callable[[Path, Path], None]:
    """Return what lets a guest write the disk bit by bit, so that blocks are shuffled.

    Later writes overwrite earlier ones, so their order stays.
    """

    def make(raw: Path, path: Path) -> None:
        flags = [word for option in options for word in ("-o", option)]
        qemu.run("create", "-f", image_format, *flags, path, str(SIZE))
        pieces = [
            (offset + at, min(64 * KIB, nbytes - at), byte)
            for offset, nbytes, byte in CONTENT
            for at in range(0, nbytes, 64 * KIB)
        ]
        first = [(offset // (64 * KIB) * 64 * KIB, SECTOR, 1) for offset, _, _ in pieces]
        random.Random(2).shuffle(first)
        write_guest(path, image_format, first)
        # These clusters are zeros again.
        zeros = [(offset, nbytes, 0) for offset, nbytes, _ in first]
        write_guest(path, image_format, [*zeros, *pieces])

    return make


SOURCES: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "raw": ("raw", copied),
    "vhdx": ("vhdx", aged("vhdx", "block_size=1M")),
    "vhdx-32M": ("vhdx", by_imgcore()),
    "vdi": ("vdi", by_imgcore()),
    "vdi-of-qemu": ("vdi", by_qemu("vdi")),
    "vmdk": ("vmdk", aged("vmdk")),
    "qcow2": ("qcow2", aged("qcow2")),
    "qcow2-4k": ("qcow2", aged("qcow2", "cluster_size=4k")),
    "qcow2-512": ("qcow2", aged("qcow2", "cluster_size=512")),
    "qcow2-2M": ("qcow2", aged("qcow2", "cluster_size=2M")),
    "vhd": ("vhd", by_imgcore("subformat=dynamic", "block_size=512k")),
    "fixed-vhd": ("vhd", by_imgcore("subformat=fixed")),
}

OPTIONS = {
    "qcow2": [
        ("cluster_size=512",),
        ("cluster_size=4k",),
        ("cluster_size=2M",),
        ("compat=0.10",),
        ("refcount_bits=1", "cluster_size=4k"),
        ("refcount_bits=64", "cluster_size=1k"),
        ("lazy_refcounts=on",),
        ("compression_type=zstd",),
    ],
    "vmdk": [("grain_size=8k",), ("grain_size=1M",), ("zeroed_grain=on",)],
}
CASES = [
    *((source, target, ()) for target in OPTIONS for source in SOURCES),
    *(
        (source, target, options)
        for target, several in OPTIONS.items()
        for options in several
        for source in ("raw", "vhdx", "qcow2-4k")
    ),
]


def assert_good(raw: Path, path: Path, image_format: str) -> None:
    """Both read the same disk, and the tables are right."""
    qemu.assert_same(raw, path, source_format="raw", target_format=image_format)
    if image_format == "qcow2":
        qemu.assert_check_clean(path)
    assert imgcore.compare(raw, path, format_b=image_format).identical
    report = imgcore.check(path, format=image_format)
    assert report.corruptions == 0, report.problems
    if image_format == "qcow2":
        assert report.leaks == 0, report.problems


@pytest.mark.parametrize(("source", "target", "options"), CASES, ids=str)
def test_rewritten(
    source: str, target: str, options: tuple[str, ...], raw: Path, tmp_path: Path
) -> None:
    source_format, make = SOURCES[source]
    path = tmp_path / f"disk.{source_format}"
    make(raw, path)
    cost = rewritten(path, source_format, target, *options)
    assert cost.file_size == path.stat().st_size
    assert_good(raw, path, target)
    later = tmp_path / "later.raw"
    shutil.copy(raw, later)
    write_raw(later, writes(40, seed=3))
    write_guest(path, target, writes(40, seed=3))
    assert_good(later, path, target)


def test_nothing_moves_where_everything_fits(raw: Path, tmp_path: Path) -> None:
    for source, target, options in (
        ("vhdx", "qcow2", ("cluster_size=1M",)),
        ("vhdx", "vmdk", ()),
        ("vmdk", "qcow2", ()),
        ("qcow2", "vmdk", ()),
        ("qcow2-2M", "qcow2", ()),
        ("vdi", "qcow2", ()),
    ):
        source_format, make = SOURCES[source]
        path = tmp_path / f"{source}.{source_format}"
        make(raw, path)
        with imgcore.open(path) as image:
            director = director_for(image, target, *options)
            assert director.rewriter.rule is not None
            # What follows the disk in its last block could be anything.
            cut = SIZE % director.rewriter.rule.block_nbytes
            assert director.moved_nbytes in (0, cut), (source, target)


def test_what_qemu_does_with_a_new_qcow2(raw: Path, tmp_path: Path) -> None:
    """Snapshots need refcounts of 2, and a larger disk a longer L1 table."""
    path = tmp_path / "disk.raw"
    copied(raw, path)
    rewritten(path, "raw", "qcow2", "cluster_size=4k")
    qemu.run("snapshot", "-c", "one", path)
    write_guest(path, "qcow2", writes(10, seed=4))
    qemu.run("snapshot", "-a", "one", path)
    qemu.run("snapshot", "-d", "one", path)
    assert_good(raw, path, "qcow2")
    qemu.run("resize", "-f", "qcow2", path, "1G")
    qemu.run("bitmap", "--add", path, "changed")
    qemu.assert_check_clean(path)


@pytest.mark.parametrize("kind", ["monolithicFlat", "vmfs"])
@pytest.mark.parametrize("source", ["raw", "fixed-vhd"])
def test_flat_vmdk(source: str, kind: str, raw: Path, tmp_path: Path) -> None:
    from imgcore.formats.api import Described

    source_format, make = SOURCES[source]
    path = tmp_path / f"disk.{source_format}"
    make(raw, path)
    rewritten(path, source_format, "vmdk", f"subformat={kind}", name="disk.vmdk")
    with imgcore.open(raw) as image:
        rewriter = director_for(image, "vmdk", f"subformat={kind}", name="disk.vmdk").rewriter
    assert isinstance(rewriter, Described)
    assert rewriter.data_name == "disk-flat.vmdk"
    path.rename(tmp_path / rewriter.data_name)
    descriptor = tmp_path / "disk.vmdk"
    descriptor.write_bytes(rewriter.description)
    assert (tmp_path / rewriter.data_name).read_bytes() == raw.read_bytes()
    assert_good(raw, descriptor, "vmdk")
    rewritten(descriptor, "vmdk", "qcow2")
    assert_good(raw, tmp_path / rewriter.data_name, "qcow2")


def test_vbox_reads_a_new_vmdk(raw: Path, tmp_path: Path) -> None:
    program = qemu.require_vbox_img()
    for source in ("raw", "vhdx", "qcow2-4k", "vdi-of-qemu"):
        source_format, make = SOURCES[source]
        path = tmp_path / f"{source}.{source_format}"
        make(raw, path)
        rewritten(path, source_format, "vmdk")
        path = path.rename(path.with_suffix(".vmdk"))
        theirs = tmp_path / f"{source}.raw"
        qemu.checked(
            [program, "convert", "--srcfilename", str(path), "--srcformat", "VMDK",
             "--dstfilename", str(theirs), "--dstformat", "RAW"]
        )  # fmt: skip
        assert theirs.read_bytes() == raw.read_bytes()


def test_the_header_is_one_sector(raw: Path, tmp_path: Path) -> None:
    """Nothing else of the old image changes before the commit, and zeros follow."""
    for size in ("512", "4k", "2M"):
        path = tmp_path / f"{size}.raw"
        copied(raw, path)
        rewritten(path, "raw", "qcow2", f"cluster_size={size}")
        nbytes = qcow2.open_qcow2(path).block_nbytes
        front = path.read_bytes()[SECTOR : max(nbytes, MIB)]
        assert front == bytes(len(front))
