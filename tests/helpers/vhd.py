"""VHD images made without imgcore's writer, and damage with valid checksums."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imgcore.formats.vhd.reader import VhdReader
from tests.helpers.reading import open_file

SECTOR = 512
NO_OFFSET = (1 << 64) - 1
ABSENT = 0xFFFFFFFF
HEADER_OFFSET = 512
TABLE_OFFSET = 1536
UUID = bytes.fromhex("00112233445566778899aabbccddeeff")
PARENT_UUID = bytes.fromhex("f0e0d0c0b0a090807060504030201000")
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4


def open_vhd(path: Path, size: str | None = None) -> VhdReader:
    """Open one image."""
    return open_file(path, lambda file: VhdReader(file, size))


def checksum(raw: bytes, offset: int) -> bytes:
    """Return the checksum of a structure that stores it at ``offset``."""
    return struct.pack(">I", ~sum(raw[:offset] + raw[offset + 4 :]) & 0xFFFFFFFF)


def footer(virtual_size: int, disk_type: int = DYNAMIC, **fields: Any) -> bytes:
    """Return a footer sector; other fields are as in Hyper-V's disks."""
    values: dict[str, Any] = {
        "cookie": b"conectix",
        "features": 2,
        "version": 0x00010000,
        "data_offset": NO_OFFSET if disk_type == FIXED else HEADER_OFFSET,
        "timestamp": 0,
        "creator": b"win ",
        "current_size": virtual_size,
        "chs": (1, 4, 17),
        "uuid": UUID,
        "saved": 0,
    } | fields
    raw = struct.pack(
        ">8sIIQI4sI4sQQHBBII16sB",
        values["cookie"],
        values["features"],
        values["version"],
        values["data_offset"],
        values["timestamp"],
        values["creator"],
        0x000A0000,
        b"Wi2k",
        virtual_size,
        values["current_size"],
        *values["chs"],
        disk_type,
        0,
        values["uuid"],
        values["saved"],
    ).ljust(SECTOR, b"\0")
    return raw[:64] + checksum(raw, 64) + raw[68:]


def header(n_entries: int, block_nbytes: int, **fields: Any) -> bytes:
    """Return a dynamic disk header.

    ``locators`` is a list of (code, space, length, offset).
    """
    values: dict[str, Any] = {
        "cookie": b"cxsparse",
        "data_offset": NO_OFFSET,
        "table_offset": TABLE_OFFSET,
        "version": 0x00010000,
        "parent_uuid": bytes(16),
        "parent_timestamp": 0,
        "parent_name": "",
        "locators": [],
    } | fields
    raw = struct.pack(
        ">8sQQIIII16sII512s",
        values["cookie"],
        values["data_offset"],
        values["table_offset"],
        values["version"],
        n_entries,
        block_nbytes,
        0,
        values["parent_uuid"],
        values["parent_timestamp"],
        0,
        values["parent_name"].encode("utf-16-be"),
    )
    for code, space, length, offset in values["locators"]:
        raw += struct.pack(">4sIIIQ", code, space, length, 0, offset)
    raw = raw.ljust(1024, b"\0")
    return raw[:36] + checksum(raw, 36) + raw[40:]


@dataclass(frozen=True)
class Block:
    """A block's content; ``bits`` lists its present sectors, None for all."""

    data: bytes
    bits: frozenset[int] | None = None

    def bitmap(self, n_sectors: int) -> bytes:
        """Return a sector bitmap in whole sectors, the highest bit of a byte first."""
        n_bytes = -(-n_sectors // 8)
        raw = bytearray(-(-n_bytes // SECTOR) * SECTOR)
        for sector in range(n_sectors) if self.bits is None else self.bits:
            raw[sector // 8] |= 0x80 >> sector % 8
        return bytes(raw)


def dynamic(
    path: Path,
    virtual_size: int,
    blocks: Mapping[int, Block],
    *,
    block_nbytes: int = 8192,
    disk_type: int = DYNAMIC,
    footer_fields: Mapping[str, Any] | None = None,
    locators: Mapping[bytes, bytes] | None = None,
    **header_fields: Any,
) -> Path:
    """Write a dynamic or differencing disk; blocks lie in the order of ``blocks``."""
    n_entries = -(-virtual_size // block_nbytes)
    table = [ABSENT] * n_entries
    place = TABLE_OFFSET + -(-n_entries * 4 // SECTOR) * SECTOR
    body = b""
    entries = []
    for code, data in (locators or {}).items():
        entries.append((code, SECTOR, len(data), place + len(body)))
        body += data.ljust(SECTOR, b"\0")
    for index, block in blocks.items():
        table[index] = (place + len(body)) // SECTOR
        body += block.bitmap(block_nbytes // SECTOR) + block.data.ljust(block_nbytes, b"\0")
    if locators is not None:
        header_fields["locators"] = entries
    the_footer = footer(virtual_size, disk_type, **(footer_fields or {}))
    the_header = header(n_entries, block_nbytes, **header_fields)
    raw_table = struct.pack(f">{n_entries}I", *table).ljust(place - TABLE_OFFSET, b"\xff")
    path.write_bytes(the_footer + the_header + raw_table + body + the_footer)
    return path


def fixed(path: Path, content: bytes, **fields: Any) -> Path:
    """Write a fixed disk."""
    path.write_bytes(content + footer(len(content), FIXED, **fields))
    return path


def differencing(
    path: Path,
    virtual_size: int,
    blocks: Mapping[int, Block],
    locators: Mapping[bytes, bytes],
    **fields: Any,
) -> Path:
    """Write a differencing disk whose parent has `PARENT_UUID`."""
    fields = {"parent_uuid": PARENT_UUID} | fields
    return dynamic(path, virtual_size, blocks, disk_type=DIFFERENCING, locators=locators, **fields)


def poke_sound(path: Path, *changes: tuple[int, bytes]) -> Path:
    """Write bytes into both footers (0..511) or the header, with checksums."""
    raw = bytearray(path.read_bytes())
    for offset, data in changes:
        raw[offset : offset + len(data)] = data
    raw[64:68] = checksum(bytes(raw[:SECTOR]), 64)
    raw[512 + 36 : 512 + 40] = checksum(bytes(raw[512:1536]), 36)
    raw[-SECTOR:] = raw[:SECTOR]
    path.write_bytes(raw)
    return path


def be32(value: int) -> bytes:
    """Return a big-endian 32-bit number."""
    return struct.pack(">I", value)


def be64(value: int) -> bytes:
    """Return a big-endian 64-bit number."""
    return struct.pack(">Q", value)
