"""VMDK without imgcore's writer: small images made by hand, and a plain reader."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from imgcore.engine.extents import FLAG_GRAIN_MARKER, Kind
from imgcore.files.reference_gate import ReferenceGate
from imgcore.formats.vmdk.reader import VmdkReader
from tests.helpers.reading import extent_rows, open_file

SECTOR = 512
GRAIN = 65536
GD_AT_END = (1 << 64) - 1
HOSTED_FLAGS = 0x3
STREAM_FLAGS = 0x30001


def open_vmdk(path: Path) -> VmdkReader:
    """Open a single VMDK layer."""
    return open_file(path, lambda file: VmdkReader(file, ReferenceGate(str(path.parent))))


def header(n_sectors: int, **fields: int) -> bytes:
    """Return a header sector; fields not given are those of a hosted extent."""
    values = {
        "version": 1,
        "flags": HOSTED_FLAGS,
        "grain": GRAIN // SECTOR,
        "descriptor": 1,
        "descriptor_size": 20,
        "gtes": 512,
        "rgd": 21,
        "gd": 26,
        "overhead": 128,
        "dirty": 0,
        "compression": 0,
    } | fields
    raw = struct.pack(
        "<4sIIQQQQIQQQB4sH",
        b"KDMV",
        values["version"],
        values["flags"],
        n_sectors,
        values["grain"],
        values["descriptor"],
        values["descriptor_size"],
        values["gtes"],
        values["rgd"],
        values["gd"],
        values["overhead"],
        values["dirty"],
        b"\n \r\n",
        values["compression"],
    )
    return raw.ljust(SECTOR, b"\0")


def descriptor(create_type: str, *extents: str, extra: str = "", parent: str = "ffffffff") -> bytes:
    """Return a descriptor in VMware's form."""
    lines = [
        "# Disk DescriptorFile",
        "version=1",
        "CID=12345678",
        f"parentCID={parent}",
        f'createType="{create_type}"',
        extra,
        "# Extent description",
        *extents,
        "",
        "# The Disk Data Base ",
        "#DDB",
        "",
        'ddb.adapterType = "lsilogic"',
    ]
    return "\n".join(lines).encode()


def put(image: bytearray, sector: int, data: bytes) -> None:
    """Put bytes at a sector; the image grows in whole sectors as needed."""
    end = sector * SECTOR + len(data)
    end += -end % SECTOR
    image.extend(bytes(max(0, end - len(image))))
    image[sector * SECTOR : sector * SECTOR + len(data)] = data


def hosted(path: Path, n_sectors: int, grains: Mapping[int, bytes | int], **fields: int) -> Path:
    """Make a monolithicSparse image with one grain table; an int is a raw entry."""
    image = bytearray()
    put(image, 0, header(n_sectors, **fields))
    put(image, 1, descriptor("monolithicSparse", f'RW {n_sectors} SPARSE "other-name.vmdk"'))
    put(image, 21, struct.pack("<I", 22))
    put(image, 26, struct.pack("<I", 27))
    table = [0] * 512
    sector = 128
    put(image, 127, bytes(SECTOR))
    for number, content in grains.items():
        if isinstance(content, int):
            table[number] = content
            continue
        table[number] = sector
        put(image, sector, content.ljust(GRAIN, b"\0"))
        sector += GRAIN // SECTOR
    for place in (22, 27):
        put(image, place, struct.pack("<512I", *table))
    path.write_bytes(image)
    return path


def marked(lba: int, content: bytes) -> bytes:
    """Return a compressed grain after its marker."""
    packed = zlib.compress(content)
    return struct.pack("<QI", lba, len(packed)) + packed


def marker(n_sectors: int, kind: int) -> bytes:
    """Return a marker sector."""
    return struct.pack("<QII", n_sectors, 0, kind).ljust(SECTOR, b"\0")


def stream(
    path: Path,
    n_sectors: int,
    grains: Mapping[int, bytes],
    *,
    layout: str = "footer",
    trailing_sectors: int = 0,
    create_type: str = "streamOptimized",
) -> Path:
    """Make a streamOptimized image with one grain table.

    ``layout`` is ``footer``, ``patched`` (footer, and the header names the directory)
    or ``front`` (directory and table before the grains, no footer).
    """
    image = bytearray()
    put(image, 1, descriptor(create_type, f'RDONLY {n_sectors} SPARSE "generated-stream.vmdk"'))
    put(image, 127, bytes(SECTOR))
    table = [0] * 512
    sector = 128
    for number, content in grains.items():
        table[number] = sector
        put(image, sector, marked(number * (GRAIN // SECTOR), content))
        sector = len(image) // SECTOR
    raw_table = struct.pack("<512I", *table)
    fields = {"version": 3, "flags": STREAM_FLAGS, "rgd": 0, "compression": 1}
    if layout == "front":
        put(image, 0, header(n_sectors, gd=21, **fields))
        put(image, 21, struct.pack("<I", 22))
        put(image, 22, raw_table)
    else:
        gd = sector + 1 + 4 + 1
        put(image, 0, header(n_sectors, gd=gd if layout == "patched" else GD_AT_END, **fields))
        put(image, sector, marker(4, 1) + raw_table)
        put(image, sector + 5, marker(1, 2) + struct.pack("<I", sector + 1).ljust(SECTOR, b"\0"))
        put(image, sector + 7, marker(1, 3) + header(n_sectors, gd=gd, **fields))
    put(image, len(image) // SECTOR, bytes(SECTOR * (1 + trailing_sectors)))
    path.write_bytes(image)
    return path


def reordered(image: bytes, arrange: Callable[[list[tuple[int, bytes]]], object]) -> bytes:
    """Return a streamOptimized image with its grains rearranged, tables last."""
    n_sectors, at = struct.unpack_from("<Q", image, 12)[0], struct.unpack_from("<Q", image, 64)[0]
    head = bytearray(image[: at * SECTOR])
    struct.pack_into("<Q", head, 56, GD_AT_END)
    at *= SECTOR
    grains: list[tuple[int, bytes]] = []
    while True:
        lba, nbytes, kind = struct.unpack_from("<QII", image, at)
        if nbytes:
            end = at + 12 + nbytes + -(12 + nbytes) % SECTOR
            grains.append((lba // (GRAIN // SECTOR), image[at:end]))
            at = end
        elif kind:
            at += SECTOR + lba * SECTOR
        else:
            break
    arrange(grains)
    new, tables = bytearray(head), {}
    for number, content in grains:
        table = tables.setdefault(number // 512, [0] * 512)
        table[number % 512] = len(new) // SECTOR
        new += content
    directory = [0] * -(-n_sectors // (512 * GRAIN // SECTOR))
    for index, table in tables.items():
        directory[index] = len(new) // SECTOR + 1
        new += marker(4, 1) + struct.pack("<512I", *table)
    raw_directory = struct.pack(f"<{len(directory)}I", *directory)
    raw_directory += bytes(-len(raw_directory) % SECTOR)
    struct.pack_into("<Q", head, 56, len(new) // SECTOR + 1)
    new += marker(len(raw_directory) // SECTOR, 2) + raw_directory
    return bytes(new + marker(1, 3) + head[:SECTOR] + bytes(SECTOR))


def read_guest(reader: VmdkReader, start: int = 0, length: int | None = None) -> bytes:
    """Read extents in plain Python; check that the rows have no gaps."""
    pieces = []
    position = start
    for guest_offset, n, host_offset, host_length, index, kind, flags in extent_rows(
        reader, start, length
    ):
        assert guest_offset == position
        position += n
        if kind in (Kind.HOLE, Kind.ZERO):
            pieces.append(bytes(n))
            continue
        source = reader.sources[index]
        raw = source.file.pread(host_offset, host_length)
        if kind == Kind.ZLIB:
            within = (guest_offset - source.guest_base) % source.block_nbytes
            if flags & FLAG_GRAIN_MARKER:
                lba, stored = struct.unpack_from("<QI", raw)
                assert lba * SECTOR == guest_offset - within - source.guest_base
                raw = raw[12 : 12 + stored]
            block = zlib.decompressobj().decompress(raw)
            assert len(block) == source.block_nbytes
            raw = block[within : within + n]
        pieces.append(raw)
    assert position == (reader.virtual_size if length is None else start + length)
    return b"".join(pieces)
