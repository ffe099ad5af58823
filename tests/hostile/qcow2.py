"""Hostile QCOW2: headers, extensions, tables, snapshots, clusters."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.hostile.case import Case, Stage, pattern

CLUSTER = 65536
SIZE = 4 * CLUSTER
COPIED, COMPRESSED = 1 << 63, 1 << 62
# Offsets in the image that `build` makes; data clusters start at DATA.
REFTABLE, REFBLOCK, L1, L2, DATA = (n * CLUSTER for n in range(1, 6))
FIELDS = {
    "version": (4, ">I"),
    "backing_offset": (8, ">Q"),
    "backing_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_offset": (40, ">Q"),
    "reftable_offset": (48, ">Q"),
    "reftable_clusters": (56, ">I"),
    "n_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible": (72, ">Q"),
    "compatible": (80, ">Q"),
    "autoclear": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
    "compression": (104, ">B"),
}
PLAIN = {n: (DATA + n * CLUSTER) | COPIED for n in range(2)}
CONTENT = pattern(2 * CLUSTER) + bytes(2 * CLUSTER)


def build(
    entries: Mapping[int, int] = PLAIN,
    *,
    data: bytes = CONTENT[: 2 * CLUSTER],
    l1: tuple[int, ...] = (L2 | COPIED,),
    extensions: bytes = b"",
    backing: bytes = b"",
    tail: bytes = b"",
    **fields: int,
) -> bytes:
    """Return an image of four guest clusters, two of them with data."""
    image = bytearray(DATA)
    values = {
        "version": 3,
        "cluster_bits": 16,
        "size": SIZE,
        "l1_size": 1,
        "l1_offset": L1,
        "reftable_offset": REFTABLE,
        "reftable_clusters": 1,
        "refcount_order": 4,
        "header_length": 112,
    }
    image[112 : 112 + len(extensions)] = extensions
    if backing:
        at = 112 + len(extensions) + 8
        image[at : at + len(backing)] = backing
        values |= {"backing_offset": at, "backing_size": len(backing)}
    image[:4] = b"QFI\xfb"
    for name, value in (values | fields).items():
        offset, form = FIELDS[name]
        struct.pack_into(form, image, offset, value)
    struct.pack_into(">Q", image, REFTABLE, REFBLOCK)
    n_clusters = (DATA + len(data)) // CLUSTER
    struct.pack_into(f">{n_clusters}H", image, REFBLOCK, *[1] * n_clusters)
    struct.pack_into(f">{len(l1)}Q", image, L1, *l1)
    for index, entry in entries.items():
        struct.pack_into(">Q", image, L2 + 8 * index, entry)
    return bytes(image) + data + tail


def put(content: bytes, name: str = "disk.qcow2") -> Callable[[Path], Path]:
    """Return a function that writes an image into a folder."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content)
        return path

    return make


def extension(kind: int, nbytes: int, data: bytes = b"") -> bytes:
    """Return a header extension that claims ``nbytes``."""
    return struct.pack(">II", kind, nbytes) + data


def packed(offset: int, nbytes: int) -> int:
    """Return the L2 entry of a compressed cluster."""
    n_more = (offset % 512 + nbytes - 1) // 512
    return COMPRESSED | n_more << 54 | offset


def deflate(data: bytes) -> bytes:
    """Compress to raw DEFLATE."""
    codec = zlib.compressobj(9, zlib.DEFLATED, -12)
    return codec.compress(data) + codec.flush()


HEADERS = [
    ("version-1", {"version": 1}, "UnsupportedFeatureError", "QCOW version 1 images are not read"),
    ("version-0", {"version": 0}, "UnsupportedFeatureError", "version 0"),
    ("version-4", {"version": 4}, "UnsupportedFeatureError", "version 4"),
    ("version-max", {"version": 0xFFFFFFFF}, "UnsupportedFeatureError", "version"),
    ("cluster-bits-0", {"cluster_bits": 0}, "CorruptImageError", "cluster bits"),
    ("cluster-bits-8", {"cluster_bits": 8}, "CorruptImageError", "cluster bits"),
    ("cluster-bits-22", {"cluster_bits": 22}, "CorruptImageError", "cluster bits"),
    ("cluster-bits-63", {"cluster_bits": 63}, "CorruptImageError", "cluster bits"),
    ("cluster-bits-64", {"cluster_bits": 64}, "CorruptImageError", "cluster bits"),
    ("cluster-bits-max", {"cluster_bits": 0xFFFFFFFF}, "CorruptImageError", "cluster bits"),
    ("size-2-63", {"size": 1 << 63}, "LimitExceededError", "virtual size"),
    ("size-max", {"size": (1 << 64) - 1}, "LimitExceededError", "virtual size"),
    ("size-over-l1-cap", {"size": (1 << 63) - 512}, "LimitExceededError", "L1 table"),
    ("size-1-pib", {"size": 1 << 50}, "CorruptImageError", "L1 table has 1 entries"),
    (
        "size-1-pib-with-l1",
        {"size": 1 << 50, "l1_size": 1 << 21},
        "CorruptImageError",
        "past the end",
    ),
    ("size-needs-l1", {"size": SIZE, "l1_size": 0}, "CorruptImageError", "L1 table has 0"),
    ("crypt-aes", {"crypt": 1}, "UnsupportedFeatureError", "AES"),
    ("crypt-luks", {"crypt": 2}, "UnsupportedFeatureError", "LUKS"),
    ("crypt-unknown", {"crypt": 3}, "CorruptImageError", "encryption method"),
    ("l1-cap", {"l1_size": 1 << 22}, "CorruptImageError", "past the end"),
    ("l1-cap-plus-1", {"l1_size": (1 << 22) + 1}, "LimitExceededError", "L1 table"),
    ("l1-size-max", {"l1_size": 0xFFFFFFFF}, "LimitExceededError", "L1 table"),
    ("l1-offset-0", {"l1_offset": 0}, "CorruptImageError", "L1 table at 0x0"),
    ("l1-misaligned", {"l1_offset": L1 + 8}, "CorruptImageError", "multiples"),
    ("l1-past-end", {"l1_offset": 1 << 40}, "CorruptImageError", "past the end"),
    ("l1-wraps", {"l1_offset": (1 << 64) - CLUSTER}, "CorruptImageError", "past the end"),
    ("reftable-misaligned", {"reftable_offset": 513}, "CorruptImageError", "refcount table"),
    ("reftable-past-end", {"reftable_offset": 1 << 50}, "CorruptImageError", "refcount table"),
    ("reftable-cap", {"reftable_clusters": 128}, "CorruptImageError", "past the end"),
    ("reftable-cap-plus-1", {"reftable_clusters": 129}, "LimitExceededError", "refcount table"),
    ("reftable-max", {"reftable_clusters": 0xFFFFFFFF}, "LimitExceededError", "refcount table"),
    (
        "snapshots-cap",
        {"n_snapshots": 65536, "snapshots_offset": L1},
        "CorruptImageError",
        "snapshot table",
    ),
    ("snapshots-cap-plus-1", {"n_snapshots": 65537}, "LimitExceededError", "snapshots"),
    ("snapshots-at-0", {"n_snapshots": 1}, "CorruptImageError", "snapshot table"),
    (
        "snapshots-past-end",
        {"n_snapshots": 1, "snapshots_offset": 1 << 62},
        "CorruptImageError",
        "snapshot table",
    ),
    ("feature-unknown", {"incompatible": 1 << 63}, "UnsupportedFeatureError", "bit 63"),
    ("feature-extended-l2", {"incompatible": 16}, "UnsupportedFeatureError", "extended L2"),
    ("refcount-order-7", {"refcount_order": 7}, "CorruptImageError", "refcount order"),
    ("refcount-order-max", {"refcount_order": 0xFFFFFFFF}, "CorruptImageError", "refcount order"),
    ("header-length-0", {"header_length": 0}, "CorruptImageError", "header length"),
    ("header-length-odd", {"header_length": 105}, "CorruptImageError", "header length"),
    ("header-length-max", {"header_length": 0xFFFFFFF8}, "CorruptImageError", "header length"),
    (
        "compression-unknown",
        {"incompatible": 8, "compression": 2},
        "UnsupportedFeatureError",
        "compression type 2",
    ),
    ("compression-without-bit", {"compression": 1}, "CorruptImageError", "compression"),
    ("bitmaps-without-extension", {"autoclear": 1}, "CorruptImageError", "bitmaps"),
]

ENTRIES = [
    ("l2-data-past-end", {0: 1 << 40}, "past the end"),
    ("l2-data-at-2-56", {0: 0x00FFFFFFFFFF0000}, "past the end"),
    ("l2-data-misaligned", {0: DATA + 512}, "multiple"),
    ("l2-reserved-bits", {0: DATA | 1 << 60}, "reserved"),
    ("l2-packed-past-end", {0: packed(1 << 40, 512)}, "past the end"),
]


def cases() -> Iterator[Case]:
    """Yield the cases."""
    for name, fields, error, word in HEADERS:
        yield Case(f"qcow2-{name}", put(build(**fields)), error, word)
    for name, entries, word in ENTRIES:
        image = build(PLAIN | entries)
        yield Case(f"qcow2-{name}", put(image), "CorruptImageError", word, Stage.TABLES)
    for name, l1, word in (
        ("l1-entry-past-end", 1 << 50, "past the end"),
        ("l1-entry-misaligned", L2 + 512, "multiple"),
        ("l1-entry-reserved-bits", L2 | 1, "reserved"),
        ("l1-entry-at-2-56", 0x00FFFFFFFFFF0000, "past the end"),
    ):
        image = build(l1=(l1,))
        yield Case(f"qcow2-{name}", put(image), "CorruptImageError", word, Stage.TABLES)
    yield from _extensions()
    yield from _clusters()
    yield from _readable()
    yield from _truncated()
    yield Case(
        "qcow2-v2-zero-flag",
        put(build({0: 1}, version=2)),
        "CorruptImageError",
        "zero flag",
        Stage.TABLES,
    )


def _extensions() -> Iterator[Case]:
    for name, data, word in (
        ("past-the-cluster", extension(0x12345678, CLUSTER), "header extension"),
        ("length-max", extension(0xE2792ACA, 0xFFFFFFFF), "header extension"),
        ("second-past", extension(1, 8, bytes(8)) + extension(2, CLUSTER), "header extension"),
    ):
        image = build(extensions=data)
        yield Case(f"qcow2-extension-{name}", put(image), "CorruptImageError", word)
    bitmaps = {
        "directory-past-end": (struct.pack(">IIQQ", 1, 0, 64, 1 << 40), "past the end"),
        "directory-at-0": (struct.pack(">IIQQ", 1, 0, 64, 0), "bitmap directory"),
    }
    for name, (data, word) in bitmaps.items():
        image = build(extensions=extension(0x23852875, 24, data), autoclear=1)
        yield Case(f"qcow2-bitmaps-{name}", put(image), "CorruptImageError", word)
    too_many = struct.pack(">IIQQ", 65536, 0, 64, DATA)
    image = build(extensions=extension(0x23852875, 24, too_many), autoclear=1)
    yield Case("qcow2-bitmaps-cap-plus-1", put(image), "LimitExceededError", "bitmaps")
    short = struct.pack(">IIQQ", 1000, 0, 64, DATA)
    image = build(extensions=extension(0x23852875, 24, short), autoclear=1)
    yield Case(
        "qcow2-bitmaps-outside-directory",
        put(image),
        "CorruptImageError",
        "outside its directory",
        Stage.INFO,
        CONTENT,
    )
    at = DATA + 2 * CLUSTER
    for name, snapshot, error, word in (
        ("extra-huge", (0, 0, 0, 0, 0, 0, 0, 0, 0xFFFFFFFF), "LimitExceededError", "extra data"),
        ("name-past-end", (0, 0, 0xFFFF, 0xFFFF, 0, 0, 0, 0, 0), "CorruptImageError", "past"),
    ):
        tail = struct.pack(">QIHHIIQII", *snapshot).ljust(512, b"\0")
        image = build(tail=tail, n_snapshots=1, snapshots_offset=at)
        yield Case(f"qcow2-snapshot-{name}", put(image), error, word, Stage.INFO, CONTENT)


def _clusters() -> Iterator[Case]:
    whole = pattern(CLUSTER)
    streams = {
        "garbage": b"\xff" * 700,
        "bomb": deflate(bytes(64 * CLUSTER)),
        "short": deflate(whole[: CLUSTER - 1]),
        "cut": deflate(whole)[:300],
        "stored-block-wrong": b"\x01\xff\xff\xff\xff" + bytes(600),
    }
    for name, stream in streams.items():
        data = stream.ljust(CLUSTER, b"\0")
        # The format allows longer output: readers take only the bytes they need.
        image = build({0: packed(DATA, len(stream))}, data=data)
        if name == "bomb":
            content = bytes(SIZE)
            yield Case(f"qcow2-deflate-{name}", put(image), *_BOMB, content=content)
            continue
        yield Case(
            f"qcow2-deflate-{name}", put(image), "CorruptImageError", "compressed", Stage.DATA
        )
    image = build({0: packed(DATA, 700)}, data=bytes(CLUSTER), incompatible=8, compression=1)
    yield Case("qcow2-zstd-garbage", put(image), "CorruptImageError", "compressed", Stage.DATA)


_BOMB = ("CorruptImageError", "compressed", Stage.DATA)


def _readable() -> Iterator[Case]:
    """Yield images that contradict themselves but are readable as their tables say."""
    shared = {0: DATA | COPIED, 1: DATA | COPIED}
    twice = CONTENT[:CLUSTER] * 2 + bytes(2 * CLUSTER)
    yield Case("qcow2-shared-cluster", put(build(shared)), None, stage=Stage.CHECK, content=twice)
    in_l2 = build({0: L2})
    content = in_l2[L2 : L2 + CLUSTER] + bytes(3 * CLUSTER)
    yield Case("qcow2-data-in-l2-table", put(in_l2), None, stage=Stage.CHECK, content=content)
    for name, bits in (("dirty", 1), ("corrupt", 2)):
        image = build(incompatible=bits)
        yield Case(f"qcow2-marked-{name}", put(image), None, stage=Stage.NONE, content=CONTENT)
    for name, field in (("0", "reftable_offset"), ("empty", "reftable_clusters")):
        image = build(**{field: 0})
        yield Case(f"qcow2-reftable-{name}", put(image), None, stage=Stage.CHECK, content=CONTENT)
    image = build(size=SIZE, autoclear=1 << 63, compatible=1 << 63)
    yield Case("qcow2-unknown-harmless-bits", put(image), None, stage=Stage.NONE, content=CONTENT)
    # 1 PiB in clusters of 2 MiB: an L1 table of 2048 entries, all unused.
    huge = bytearray(6 << 21)
    huge[: len(build()[:4096])] = build(
        cluster_bits=21, size=1 << 50, l1_size=2048, l1_offset=3 << 21, reftable_offset=1 << 21
    )[:4096]
    struct.pack_into(">Q", huge, 1 << 21, 2 << 21)
    yield Case("qcow2-empty-pebibyte", put(bytes(huge)), None, stage=Stage.NONE)
    # Every snapshot names the active L1 table: check must not walk it for each one.
    row = struct.pack(">QIHHIIQII", L1, 1, 0, 0, 0, 0, 0, 0, 0)
    at = DATA + 2 * CLUSTER
    image = build(tail=row * 65536, n_snapshots=65536, snapshots_offset=at)
    yield Case("qcow2-snapshots-share-l1", put(image), None, stage=Stage.CHECK, content=CONTENT)
    yield Case("qcow2-sparse-8-tib", _sparse, None, stage=Stage.CHECK)


def _sparse(folder: Path) -> Path:
    """Make a file of 2^34 clusters, nearly all unused, which check must skip."""
    path = folder / "disk.qcow2"
    head = build(cluster_bits=9, size=2048, l1_offset=1536, reftable_offset=512)[:112]
    with open(path, "wb") as file:
        file.write(head.ljust(512, b"\0") + struct.pack(">Q", 1024))
        file.seek(1536)
        file.write(struct.pack(">Q", 2048))
        file.truncate(1 << 43)
    return path


def _truncated() -> Iterator[Case]:
    whole = build()
    for nbytes, error, word in (
        (0, "WrongFormatError", "no known format"),
        (3, "WrongFormatError", "no known format"),
        (8, "CorruptImageError", "header ends"),
        (71, "CorruptImageError", "header ends"),
        (103, "CorruptImageError", "header ends"),
        (CLUSTER, "CorruptImageError", "past the end"),
        (L1, "CorruptImageError", "past the end"),
    ):
        yield Case(f"qcow2-cut-at-{nbytes}", put(whole[:nbytes]), error, word)
    for name, nbytes in (("l2", L2 + 512), ("data", DATA + CLUSTER), ("last-byte", len(whole) - 1)):
        yield Case(
            f"qcow2-cut-in-{name}",
            put(whole[:nbytes]),
            "CorruptImageError",
            "past the end",
            Stage.TABLES,
        )
