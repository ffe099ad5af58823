"""Mutates images by their fields and tables, and corrects their checksums.

A fuzzer that flips bits does not get past the first checksum.  This one changes fields,
and then corrects the checksums.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from imgcore._core import crc32c
from imgcore.formats.qcow2 import layout as qcow2_layout
from imgcore.formats.vdi import layout as vdi_layout
from imgcore.formats.vhd import layout as vhd_layout
from imgcore.formats.vhdx import layout as vhdx_layout
from imgcore.formats.vmdk import layout as vmdk_layout
from tests.fuzz.pieces import Pieces

MIB = 1 << 20
MAX_ENTRIES = 64


class Field(NamedTuple):
    """A number in the file."""

    offset: int
    nbytes: int
    byteorder: str


def of_struct(form: struct.Struct, base: int) -> Iterator[Field]:
    """Yield the fields of a structure at ``base``."""
    order = "big" if form.format[0] == ">" else "little"
    at = 0
    for count, code in re.findall(r"(\d*)([a-zA-Z])", form.format):
        size = struct.calcsize(f"{form.format[0]}{code}")
        if code == "s":
            yield Field(base + at, min(int(count or 1), 16), order)
            at += int(count or 1)
            continue
        for _ in range(int(count or 1)):
            yield Field(base + at, size, order)
            at += size


def of_table(base: int, n: int, nbytes: int, order: str) -> Iterator[Field]:
    """Yield the entries of a table."""
    for index in range(min(n, MAX_ENTRIES)):
        yield Field(base + index * nbytes, nbytes, order)


def number(image: Pieces, field: Field) -> int:
    """Return a field's value."""
    return int.from_bytes(image.read(field.offset, field.nbytes), field.byteorder)  # type: ignore[arg-type]


def _qcow2(image: Pieces) -> Iterator[Field]:
    layout = qcow2_layout
    yield from of_struct(layout.HEADER_V2, 0)
    yield from of_struct(layout.HEADER_V3_TAIL, layout.HEADER_V2_NBYTES)
    yield Field(layout.COMPRESSION_TYPE_OFFSET, 1, "big")
    yield from of_table(112, 16, 4, "big")
    for offset in (40, 48, 64):
        table = number(image, Field(offset, 8, "big"))
        yield from of_table(table, 8, 8, "big")
        second = number(image, Field(table, 8, "big")) & layout.OFFSET_MASK
        yield from of_table(second, 32, 8, "big")


def _vmdk(image: Pieces) -> Iterator[Field]:
    layout = vmdk_layout
    for base in (0, image.nbytes - 1024):
        yield from of_struct(layout.SPARSE_HEADER, base)
        for offset in (48, 56):
            table = number(image, Field(base + offset, 8, "little")) * 512
            yield from of_table(table, 4, 4, "little")
            second = number(image, Field(table, 4, "little")) * 512
            yield from of_table(second, 16, 4, "little")
            grain = number(image, Field(second, 4, "little")) * 512
            yield from of_struct(layout.GRAIN_MARKER, grain)
    yield from of_struct(layout.MARKER, image.nbytes - 1536)


def _vhd(image: Pieces) -> Iterator[Field]:
    layout = vhd_layout
    yield from of_struct(layout.FOOTER, 0)
    yield from of_struct(layout.FOOTER, image.nbytes - 512)
    header = number(image, Field(16, 8, "big"))
    yield from of_struct(layout.HEADER, header)
    for index in range(layout.N_LOCATORS):
        at = header + layout.LOCATORS_OFFSET + index * layout.LOCATOR.size
        yield from of_struct(layout.LOCATOR, at)
    yield from of_table(number(image, Field(header + 16, 8, "big")), 16, 4, "big")


def _vdi(image: Pieces) -> Iterator[Field]:
    layout = vdi_layout
    yield from of_struct(layout.PRE_HEADER, 0)
    yield from of_struct(layout.HEADER, layout.PRE_HEADER.size)
    yield from of_struct(layout.GEOMETRY, layout.PRE_HEADER.size + layout.HEADER.size)
    yield from of_table(number(image, Field(0x154, 4, "little")), 16, 4, "little")


def _vhdx(image: Pieces) -> Iterator[Field]:
    layout = vhdx_layout
    for base in layout.HEADER_OFFSETS:
        yield from of_struct(layout.HEADER, base)
    for base in layout.REGION_TABLE_OFFSETS:
        yield from of_struct(layout.REGION_TABLE_HEADER, base)
        for index in range(3):
            at = base + layout.REGION_TABLE_HEADER.size + index * layout.REGION_ENTRY.size
            yield from of_struct(layout.REGION_ENTRY, at)
    base = layout.REGION_TABLE_OFFSETS[0] + layout.REGION_TABLE_HEADER.size
    bat = number(image, Field(base + 16, 8, "little"))
    metadata = number(image, Field(base + layout.REGION_ENTRY.size + 16, 8, "little"))
    yield from of_table(bat, 16, 8, "little")
    yield from of_struct(layout.METADATA_HEADER, metadata)
    for index in range(7):
        at = metadata + layout.METADATA_HEADER.size + index * layout.METADATA_ENTRY.size
        yield from of_struct(layout.METADATA_ENTRY, at)
    yield from of_table(metadata + layout.METADATA_TABLE_NBYTES, 48, 4, "little")
    for entry in log_entries(image):
        yield from of_struct(layout.LOG_ENTRY, entry)
        for index in range(4):
            at = entry + layout.LOG_ENTRY.size + index * layout.LOG_DESCRIPTOR.size
            yield from of_struct(layout.LOG_DESCRIPTOR, at)


def log_entries(image: Pieces) -> list[int]:
    """Return the offsets of entries of a VHDX log."""
    found = []
    for start, chunk in image.chunks:
        at = chunk.find(b"loge")
        while at >= 0 and len(found) < 16:
            if (start + at) % 4096 == 0:
                found.append(start + at)
            at = chunk.find(b"loge", at + 1)
    return found


_FIELDS: dict[str, Callable[[Pieces], Iterator[Field]]] = {
    "qcow2": _qcow2,
    "vmdk": _vmdk,
    "vhd": _vhd,
    "vdi": _vdi,
    "vhdx": _vhdx,
}


def fields(image: Pieces) -> list[Field]:
    """Return the fields of an image that are inside the file."""
    find = _FIELDS.get(image.format or "")
    if find is None:
        return []
    return [f for f in find(image) if 0 <= f.offset <= image.nbytes - f.nbytes]


# --------------------------------------------------------------------------- checksums


def make_sound(image: Pieces) -> None:
    """Correct the checksums that readers verify before anything else."""
    if image.format == "vhd":
        _sound_vhd(image)
    elif image.format == "vhdx":
        _sound_vhdx(image)


def _sound_vhd(image: Pieces) -> None:
    def seal(base: int, nbytes: int, at: int) -> None:
        raw = image.read(base, nbytes)
        total = ~(sum(raw) - sum(raw[at : at + 4])) & 0xFFFFFFFF
        image.write(base + at, struct.pack(">I", total))

    for base in (0, image.nbytes - 512):
        if base >= 0 and image.read(base, 8) == vhd_layout.FOOTER_COOKIE:
            header = number(image, Field(base + 16, 8, "big"))
            if image.read(header, 8) == vhd_layout.HEADER_COOKIE:
                seal(header, 1024, vhd_layout.HEADER_CHECKSUM_OFFSET)
            seal(base, 512, vhd_layout.FOOTER_CHECKSUM_OFFSET)


def _sound_vhdx(image: Pieces) -> None:
    layout = vhdx_layout

    def seal(base: int, nbytes: int, signature: bytes) -> None:
        raw = image.read(base, nbytes)
        if raw.startswith(signature):
            crc = crc32c(raw[8:], crc32c(bytes(4), crc32c(raw[:4])))
            image.write(base + 4, struct.pack("<I", crc))

    for base in log_entries(image):
        nbytes = number(image, Field(base + 8, 4, "little"))
        if 64 <= nbytes <= MIB:
            seal(base, nbytes, layout.LOG_ENTRY_SIGNATURE)
    for base in layout.HEADER_OFFSETS:
        seal(base, layout.HEADER_NBYTES, layout.HEADER_SIGNATURE)
    for base in layout.REGION_TABLE_OFFSETS:
        seal(base, layout.REGION_TABLE_NBYTES, layout.REGION_TABLE_SIGNATURE)


# --------------------------------------------------------------------------- mutations


def _value(rng: random.Random, image: Pieces, field: Field) -> int:
    """Return a number that may be wrong in this field."""
    old, bits = number(image, field), 8 * field.nbytes
    choices = (
        lambda: 0,
        lambda: 1,
        lambda: (1 << bits) - 1,
        lambda: 1 << (bits - 1),
        lambda: 1 << rng.randrange(bits),
        lambda: old ^ 1 << rng.randrange(bits),
        lambda: old + rng.choice((-1, 1, 2, -512, 512, 65536)),
        lambda: old * 2,
        lambda: old // 2,
        lambda: image.nbytes + rng.choice((-512, -1, 0, 1, 512)),
        lambda: image.nbytes // 512 + rng.choice((-1, 0, 1)),
        lambda: rng.getrandbits(bits),
        lambda: rng.randrange(16) << rng.choice((0, 9, 16, 20)),
    )
    return rng.choice(choices)() % (1 << bits)


def _change_field(rng: random.Random, image: Pieces) -> None:
    found = fields(image)
    if not found:
        _change_bytes(rng, image)
        return
    field = rng.choice(found)
    if rng.random() < 0.15:
        value = image.read(rng.choice(found).offset, field.nbytes)
    else:
        value = _value(rng, image, field).to_bytes(field.nbytes, field.byteorder)  # type: ignore[arg-type]
    image.write(field.offset, value)


def _change_bytes(rng: random.Random, image: Pieces) -> None:
    if not image.chunks:
        image.write(0, rng.randbytes(16))
        return
    start, chunk = rng.choice(image.chunks)
    at = start + rng.randrange(len(chunk))
    image.write(at, rng.choice((rng.randbytes(1), rng.randbytes(4), b"\xff" * 8, bytes(8))))


def _change_size(rng: random.Random, image: Pieces) -> None:
    ends = [start + len(chunk) for start, chunk in image.chunks] or [0]
    image.resize(
        rng.choice(
            (
                rng.choice(ends),
                rng.randrange(max(1, image.nbytes)),
                image.nbytes - rng.choice((1, 512, 513, 4096)),
                image.nbytes + rng.choice((1, 512, 65536, MIB)),
                image.nbytes * 2,
                1 << rng.randrange(44),
            )
        )
    )


def _copy(rng: random.Random, image: Pieces) -> None:
    if image.chunks:
        start, chunk = rng.choice(image.chunks)
        at = rng.randrange(len(chunk))
        target, _ = rng.choice(image.chunks)
        offset = rng.choice((target, start + 4096, target + 512 * rng.randrange(16)))
        image.write(offset, bytes(chunk[at : at + rng.choice((4, 8, 64, 512))]))


def _drop(rng: random.Random, image: Pieces) -> None:
    if len(image.chunks) > 1:
        del image.chunks[rng.randrange(len(image.chunks))]


_MUTATIONS = (_change_field,) * 8 + (_change_bytes,) * 2 + (_change_size, _copy, _drop)


def mutate(data: bytes, max_nbytes: int, seed: int) -> bytes:
    """Return a changed packed image, in most cases with valid checksums."""
    rng = random.Random(seed)
    image = Pieces.unpack(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        rng.choice(_MUTATIONS)(rng, image)
    if rng.random() < 0.95:
        make_sound(image)
    packed = image.pack()
    return packed if len(packed) <= max_nbytes else data
