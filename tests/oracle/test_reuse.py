"""Compressed blocks that a conversion takes over from the source as they are.

The results must read like the source in QEMU and VirtualBox, also after guest writes.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import imgcore
from imgcore.engine.extents import Kind
from imgcore.rewriting.director import RewriteCost
from tests.helpers import command, images, qcow2, qemu, vmdk
from tests.helpers.images import KIB, MIB, RawImage
from tests.helpers.qemu import Variant
from tests.helpers.rewriting import rewritten

RawImages = Callable[[RawImage], Path]

BLOCK = 64 * KIB
# Text, noise that does not get smaller, holes, little data, an end inside a block.
DISK = RawImage(
    "reuse",
    12 * MIB + 5 * 512,
    lambda: [
        (0, images.text(3 * MIB)),
        (4 * MIB, images.noise(5 * BLOCK)),
        (5 * MIB + 512, b"\1"),
        (7 * MIB, images.text(BLOCK - 512, 9)),
        (12 * MIB - 3 * BLOCK, images.text(3 * BLOCK + 5 * 512, 10)),
    ],
)
TEXT_NBYTES = 3 * MIB + 3 * BLOCK + 2 * BLOCK  # blocks of text, and two with little
NOISE_NBYTES = 5 * BLOCK

ZLIB = qemu.QCOW2_ZLIB
ZLIB_32K = qemu.QCOW2_ZLIB.with_options("window=32k")
ZSTD = qemu.QCOW2_ZSTD
STREAM = qemu.VMDK_STREAM
# Source, target, and how many bytes of the disk are reused.  A QCOW2 has noise plain.
PAIRS = (
    (STREAM, ZLIB_32K, TEXT_NBYTES),
    (STREAM, STREAM, TEXT_NBYTES + NOISE_NBYTES),
    (ZLIB, STREAM, TEXT_NBYTES),
    (ZLIB, ZLIB_32K, TEXT_NBYTES),
    (ZSTD, ZSTD, TEXT_NBYTES),
)
each_pair = pytest.mark.parametrize(
    ("source", "target", "reused"), PAIRS, ids=[f"{a.name}-to-{b.name}" for a, b, _ in PAIRS]
)
each_producer = pytest.mark.parametrize("producer", ["qemu-img", "imgcore", "vbox-img"])
each_trust = pytest.mark.parametrize("trust", [False, True], ids=["verified", "trusted"])


def make_source(raw: Path, folder: Path, variant: Variant, producer: str = "qemu-img") -> Path:
    path = folder / f"source.{variant.format}"
    if producer == "qemu-img":
        qemu.convert(raw, path, variant)
    elif producer == "imgcore":
        convert(raw, path, variant, format="raw")
    elif variant is STREAM:
        words = ["--srcformat", "RAW", "--dstformat", "VMDK", "--variant", "Stream"]
        program = qemu.require_vbox_img()
        # VirtualBox opens its source for writing.
        copy = folder / "copy.raw"
        shutil.copyfile(raw, copy)
        qemu.checked(
            [program, "convert", "--srcfilename", str(copy), "--dstfilename", str(path), *words]
        )
    else:
        pytest.skip("VirtualBox writes no compressed QCOW2")
    return path


def convert(source: Path, target: Path, variant: Variant, **more: Any) -> imgcore.ConvertResult:
    options = [*variant.options, *variant.own_options, *more.pop("options", ())]
    more.setdefault("sync", False)
    more.setdefault("compress", variant.compress)
    return imgcore.convert(source, target, target_format=variant.format, options=options, **more)


def assert_good(raw: Path, target: Path, variant: Variant) -> None:
    qemu.assert_same(raw, target, source_format="raw", target_format=variant.format)
    assert imgcore.check(target).ok
    if variant.format == "qcow2":
        qemu.assert_check_clean(target)
    else:
        assert imgcore.lint(target, profile="esxi").ok


def write_as_a_guest(raw: Path, path: Path) -> None:
    """Write to a QCOW2 by QEMU 200 times; its check must stay clean."""
    content = bytearray(raw.read_bytes())
    rng = random.Random(images.SEED)
    commands = []
    for number in range(200):
        nbytes = 512 * rng.randrange(1, 200)
        offset = 512 * rng.randrange((len(content) - nbytes) // 512)
        content[offset : offset + nbytes] = bytes([number]) * nbytes
        commands.append(f"write -P {number} {offset} {nbytes}")
    qcow2.qemu_io(path, *commands)
    after = path.with_name("after.raw")
    after.write_bytes(content)
    qemu.assert_same(after, path, source_format="raw", target_format="qcow2")
    qemu.assert_check_clean(path)
    assert imgcore.check(path).ok


@each_trust
@each_producer
@each_pair
def test_a_target_reads_like_the_source(
    source: Variant,
    target: Variant,
    reused: int,
    producer: str,
    trust: bool,
    raw_images: RawImages,
    tmp_path: Path,
) -> None:
    raw = raw_images(DISK)
    given = make_source(raw, tmp_path, source, producer)
    ours = tmp_path / f"ours{target.suffix}"
    result = convert(given, ours, target, trust_blocks=trust)
    assert_good(raw, ours, target)
    assert result.bytes_reused == reused
    # The end and the checksum of a QCOW2's stream are known after decompressing it.
    needs_content = source is ZLIB and target is STREAM
    assert result.bytes_trusted == (reused if trust and not needs_content else 0)


@pytest.mark.parametrize(
    ("source", "target"), [(STREAM, STREAM), (ZLIB, STREAM)], ids=["stream", "zlib"]
)
def test_virtualbox_reads_the_result(
    source: Variant, target: Variant, raw_images: RawImages, tmp_path: Path
) -> None:
    raw = raw_images(DISK)
    program = qemu.require_vbox_img()
    ours, back = tmp_path / "ours.vmdk", tmp_path / "back.raw"
    convert(make_source(raw, tmp_path, source), ours, target)
    names = ["--srcfilename", str(ours), "--dstfilename", str(back)]
    qemu.checked([program, "convert", *names, "--dstformat", "RAW"])
    assert back.read_bytes() == raw.read_bytes()


@each_trust
@pytest.mark.parametrize(
    ("source", "target"),
    [(STREAM, ZLIB_32K), (ZLIB, ZLIB_32K), (ZSTD, ZSTD)],
    ids=["stream", "zlib", "zstd"],
)
def test_a_guest_writes_to_the_result(
    source: Variant, target: Variant, trust: bool, raw_images: RawImages, tmp_path: Path
) -> None:
    """QEMU frees and shares the clusters that the compressed ones lie in."""
    raw, ours = raw_images(DISK), tmp_path / "ours.qcow2"
    convert(make_source(raw, tmp_path, source), ours, target, trust_blocks=trust)
    write_as_a_guest(raw, ours)


@each_trust
@each_pair
def test_bytes_do_not_depend_on_threads(
    source: Variant,
    target: Variant,
    reused: int,
    trust: bool,
    raw_images: RawImages,
    tmp_path: Path,
) -> None:
    given = make_source(raw_images(DISK), tmp_path, source)
    found = set()
    for threads in (1, 2, 5):
        ours = tmp_path / f"ours{threads}" / f"ours{target.suffix}"
        ours.parent.mkdir()
        result = convert(given, ours, target, trust_blocks=trust, threads=threads)
        assert result.bytes_reused == reused
        found.add(images.sha256(ours))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (STREAM, ZLIB),
        (ZLIB, ZLIB),
        (STREAM, ZLIB_32K.with_options("level=default")),
        (STREAM, ZLIB_32K.with_options("cluster_size=128k")),
        (STREAM, ZSTD),
        (STREAM, STREAM.with_options("level=default")),
        (STREAM, STREAM.with_options("grain_size=32k")),
        (ZLIB, STREAM.with_options("level=best")),
        (ZSTD, STREAM),
        (ZSTD, ZLIB_32K),
        (ZLIB, ZSTD),
        (ZSTD, ZSTD.with_options("level=3")),
    ],
    ids=lambda v: v.name,
)
def test_other_options_compress_again(
    source: Variant, target: Variant, raw_images: RawImages, tmp_path: Path
) -> None:
    raw = raw_images(DISK)
    ours = tmp_path / f"ours{target.suffix}"
    result = convert(make_source(raw, tmp_path, source), ours, target, trust_blocks=True)
    assert (result.bytes_reused, result.bytes_trusted) == (0, 0)
    assert_good(raw, ours, target)


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1]))


def grain(path: Path, guest_offset: int) -> tuple[int, int]:
    """Return the offset and the size of a grain's zlib stream."""
    with imgcore.open(path) as image:
        rows = next(iter(image.extents(guest_offset, BLOCK)))
    place = int(rows[0]["host_offset"])
    with path.open("rb") as file:
        file.seek(place)
        marker = file.read(12)
    assert int.from_bytes(marker[:8], "little") == guest_offset // 512
    return place + 12, int.from_bytes(marker[8:], "little")


@pytest.mark.parametrize("target", [ZLIB_32K, STREAM], ids=lambda v: v.name)
def test_a_damaged_block_is_found(target: Variant, raw_images: RawImages, tmp_path: Path) -> None:
    """Only its Adler-32 shows a grain that decompresses to other bytes."""
    raw = raw_images(DISK)
    given = make_source(raw, tmp_path, STREAM)
    place, nbytes = grain(given, 2 * BLOCK)
    flip_byte(given, place + nbytes - 1)
    ours = tmp_path / f"ours{target.suffix}"
    with pytest.raises(imgcore.CorruptImageError, match=f"{place - 12:x}"):
        convert(given, ours, target)
    assert not ours.exists()
    saved = convert(given, ours, target, salvage=True)
    assert [(r.guest_offset, r.length) for r in saved.bad_ranges] == [(2 * BLOCK, BLOCK)]
    assert saved.bytes_reused >= TEXT_NBYTES - BLOCK
    # Who trusts the source takes the damage over.
    trusting = tmp_path / f"trusting{target.suffix}"
    assert convert(given, trusting, target, trust_blocks=True).bad_ranges == ()
    if target is STREAM:
        with pytest.raises(imgcore.CorruptImageError):
            imgcore.compare(raw, trusting, format_a="raw")


@pytest.mark.parametrize("trust", [False, True], ids=["verified", "trusted"])
@pytest.mark.parametrize("changed", [(0, 0x79), (0, 0x88), (1, 0xBB)], ids=str)
def test_a_bad_zlib_header_is_found(
    changed: tuple[int, int], trust: bool, raw_images: RawImages, tmp_path: Path
) -> None:
    """CM, CINFO, FDICT: also found where blocks are trusted."""
    given = make_source(raw_images(DISK), tmp_path, STREAM)
    place, _ = grain(given, 2 * BLOCK)
    with given.open("r+b") as file:
        file.seek(place + changed[0])
        file.write(bytes([changed[1]]))
    with pytest.raises(imgcore.CorruptImageError):
        convert(given, tmp_path / "ours.qcow2", ZLIB_32K, trust_blocks=trust)


def test_an_overlay_over_compressed_blocks(raw_images: RawImages, tmp_path: Path) -> None:
    """A block of which another layer has a part is compressed again."""
    raw = raw_images(DISK)
    base = make_source(raw, tmp_path, ZSTD)
    over = tmp_path / "over.qcow2"
    qemu.run("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", over)
    qcow2.qemu_io(over, f"write -P 7 {BLOCK + 512} 1024", f"write -z {4 * BLOCK} {BLOCK}")
    ours = tmp_path / "ours.qcow2"
    result = convert(over, ours, ZSTD, trust_blocks=True)
    assert result.bytes_reused == TEXT_NBYTES - 2 * BLOCK
    qemu.run("compare", over, ours)
    # Blocks that the target's own parent has are left out, and must be compared.
    child = tmp_path / "child.qcow2"
    result = convert(
        over, child, ZSTD, trust_blocks=True, backing=base.name, backing_format="qcow2"
    )
    assert (result.bytes_reused, result.bytes_trusted) == (0, 0)
    qemu.run("compare", over, child)
    qemu.assert_check_clean(child)


def test_disks_that_follow_each_other(raw_images: RawImages, tmp_path: Path) -> None:
    """The second disk starts inside a block of the target."""
    raw = raw_images(DISK)
    given = make_source(raw, tmp_path, STREAM)
    ours, both = tmp_path / "ours.vmdk", tmp_path / "both.raw"
    result = imgcore.convert(
        [given, given], ours, target_format="vmdk", compress=True, trust_blocks=True, sync=False
    )
    assert result.bytes_reused == TEXT_NBYTES + NOISE_NBYTES
    both.write_bytes(raw.read_bytes() * 2)
    assert_good(both, ours, STREAM)


@pytest.mark.parametrize("cluster_size", ["4k", "2M"])
def test_other_cluster_sizes(cluster_size: str, raw_images: RawImages, tmp_path: Path) -> None:
    raw = raw_images(DISK)
    variant = ZSTD.with_options(f"cluster_size={cluster_size}")
    given, ours = make_source(raw, tmp_path, variant), tmp_path / "ours.qcow2"
    for trust in (False, True):
        result = convert(given, ours, variant, trust_blocks=trust, force=True)
        assert result.bytes_reused > 2 * MIB
        assert_good(raw, ours, variant)


def test_the_receipt(raw_images: RawImages, tmp_path: Path) -> None:
    given = make_source(raw_images(DISK), tmp_path, STREAM)
    for more, trusted in (((), 0), (("--trust-blocks",), TEXT_NBYTES)):
        ours = tmp_path / "ours.qcow2"
        done = command.imgcore(
            "convert", "--json", "--force", "-c", "-o", "window=32k", *more, given, ours
        )
        receipt = json.loads(done.stdout)
        assert receipt["bytes_reused"] == TEXT_NBYTES
        assert receipt["bytes_trusted"] == trusted


def test_salvage_trusts_nothing(tmp_path: Path) -> None:
    with pytest.raises(imgcore.OptionError, match=r"cannot be trusted \(--trust-blocks\)"):
        imgcore.convert(tmp_path / "a.vmdk", tmp_path / "b.qcow2", salvage=True, trust_blocks=True)


# ------------------------------------------------------------------------ in place


def vmdk_rows(path: Path) -> list[tuple[int, int]]:
    """Return (guest offset, host offset) of the grains."""
    with imgcore.open(path) as image:
        batches = [batch[batch["kind"] > Kind.DATA] for batch in image.extents()]
    return [
        (int(row["guest_offset"]), int(row["host_offset"])) for batch in batches for row in batch
    ]


def as_qcow2(path: Path, *options: str, **more: Any) -> RewriteCost:
    """Make a streamOptimized disk a QCOW2 in its own file, with a name that says so."""
    cost = rewritten(path, "vmdk", "qcow2", *options, **more)
    path.rename(path.with_suffix(".qcow2"))
    return cost


@each_trust
@each_producer
def test_grains_become_clusters_where_they_are(
    producer: str, trust: bool, raw_images: RawImages, tmp_path: Path
) -> None:
    raw = raw_images(DISK)
    path = make_source(raw, tmp_path, STREAM, producer)
    grains = dict(vmdk_rows(path))
    cost = as_qcow2(path, trust_blocks=trust)
    ours = path.with_suffix(".qcow2")
    assert_good(raw, ours, ZLIB)
    # qemu-img cuts the last grain, which becomes a plain cluster; that of others is
    # part of a block, too.
    assert cost.bytes_moved == 5 * 512
    assert cost.bytes_stayed == TEXT_NBYTES + NOISE_NBYTES
    assert cost.bytes_written < 1 * MIB
    clusters = dict(vmdk_rows(ours))
    assert len(clusters) == (TEXT_NBYTES + NOISE_NBYTES) // BLOCK
    assert {guest: host - 14 for guest, host in clusters.items()} == {
        guest: grains[guest] for guest in clusters
    }
    write_as_a_guest(raw, ours)


def test_a_damaged_grain_is_found_before_anything_is_changed(
    raw_images: RawImages, tmp_path: Path
) -> None:
    path = make_source(raw_images(DISK), tmp_path, STREAM)
    place, nbytes = grain(path, 2 * BLOCK)
    flip_byte(path, place + nbytes - 1)
    before = images.sha256(path)
    with pytest.raises(imgcore.CorruptImageError, match=f"{place - 12:x}"):
        as_qcow2(path)
    assert images.sha256(path) == before
    # Who trusts the source takes the damage over.
    as_qcow2(path, trust_blocks=True)


def test_grains_of_zeros_are_left_out(tmp_path: Path) -> None:
    content = images.text(2 * BLOCK) + bytes(BLOCK) + images.text(BLOCK, 3)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(content)
    grains = {number: content[number * BLOCK :][:BLOCK] for number in range(4)}
    path = vmdk.stream(tmp_path / "disk.vmdk", 4 * BLOCK // 512, grains)
    assert len(vmdk_rows(path)) == 4
    cost = as_qcow2(path)
    assert cost.bytes_stayed == 3 * BLOCK
    assert_good(raw, path.with_suffix(".qcow2"), ZLIB)


def test_other_clusters_need_decompressed_data(raw_images: RawImages, tmp_path: Path) -> None:
    raw = raw_images(DISK)
    path = make_source(raw, tmp_path, STREAM)
    cost = as_qcow2(path, "cluster_size=128k")
    assert cost.bytes_stayed == 0
    assert_good(raw, path.with_suffix(".qcow2"), ZLIB)


@each_trust
@pytest.mark.parametrize("options", [(), ("cluster_size=auto",)], ids=["default", "auto"])
def test_rewrite_and_undo(
    options: tuple[str, ...], trust: bool, raw_images: RawImages, tmp_path: Path
) -> None:
    raw = raw_images(DISK)
    path = make_source(raw, tmp_path, STREAM, "imgcore")
    before = path.read_bytes()
    result = imgcore.rewrite(path, "qcow2", options=options, trust_blocks=trust)
    assert_good(raw, Path(result.path), ZLIB)
    assert result.bytes_moved == 5 * 512
    assert imgcore.undo_rewrite(result.path) == str(path)
    assert path.read_bytes() == before
    result = imgcore.rewrite(path, "qcow2", options=options, trust_blocks=trust, keep_undo=False)
    # Unused space was given back, but none of the clusters.
    assert_good(raw, Path(result.path), ZLIB)


def test_measure_of_a_rewrite(raw_images: RawImages, tmp_path: Path) -> None:
    path = make_source(raw_images(DISK), tmp_path, STREAM)
    found = imgcore.measure_rewrite(path, "qcow2")
    stayed = {cost.block_size: cost.bytes_stayed for cost in found.costs}
    assert stayed.pop(BLOCK) == TEXT_NBYTES + NOISE_NBYTES
    assert set(stayed.values()) == {0}


@each_trust
@each_producer
def test_grains_become_clusters_by_reflinks(
    producer: str, trust: bool, raw_images: RawImages, here: Path
) -> None:
    raw = raw_images(DISK)
    given, ours = make_source(raw, here, STREAM, producer), here / "ours.qcow2"
    before = images.sha256(given)
    measured = imgcore.measure_reflink(given, "qcow2")
    result = convert(given, ours, qemu.QCOW2, reflink="always", trust_blocks=trust)
    assert result.bytes_shared == measured.reflinked
    assert given.stat().st_size * 4 // 5 < result.bytes_shared < given.stat().st_size
    assert result.bytes_reused == TEXT_NBYTES + NOISE_NBYTES
    assert result.bytes_trusted == (result.bytes_reused if trust else 0)
    assert result.bytes_written < 1 * MIB
    assert_good(raw, ours, ZLIB)
    write_as_a_guest(raw, ours)
    assert images.sha256(given) == before


def test_a_damaged_grain_is_not_reflinked(raw_images: RawImages, here: Path) -> None:
    given, ours = make_source(raw_images(DISK), here, STREAM), here / "ours.qcow2"
    place, nbytes = grain(given, 2 * BLOCK)
    flip_byte(given, place + nbytes - 1)
    with pytest.raises(imgcore.CorruptImageError, match=f"{place - 12:x}"):
        convert(given, ours, qemu.QCOW2, reflink="always")
    assert not ours.exists()
