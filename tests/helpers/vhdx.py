"""VHDX images made only from the specification, without imgcore's writer.

Blocks are placed from the end of the file backwards, so that no order is assumed.
Source: [MS-VHDX], by section.
"""

from __future__ import annotations

import struct
import uuid
from dataclasses import dataclass, field
from pathlib import Path

MIB = 1 << 20
KIB = 1 << 10
NIL = uuid.UUID(int=0)

BAT = uuid.UUID("2dc27766-f623-4200-9d64-115e9bfd4a08")
METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e")
FILE_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b")
DISK_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8")
DISK_ID = uuid.UUID("beca12ab-b2e6-4523-93ef-c309e000c746")
LOGICAL = uuid.UUID("8141bf1d-a96f-4709-ba47-f233a8faab5f")
PHYSICAL = uuid.UUID("cda348c7-445d-4471-9cc9-e9885251c556")
LOCATOR = uuid.UUID("a8d35f2d-b30b-454d-abf7-d3d84834ab0c")
LOCATOR_TYPE = uuid.UUID("b04aefb7-d19e-4a81-b789-25b8e9445913")

NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, FULL, PARTIAL = 0, 1, 2, 3, 6, 7

# Where the parts are.
HEADERS = (64 * KIB, 128 * KIB)
REGION_TABLES = (192 * KIB, 256 * KIB)
LOG_OFFSET, LOG_NBYTES = 1 * MIB, 1 * MIB
BAT_OFFSET, BAT_NBYTES = 2 * MIB, 1 * MIB
METADATA_OFFSET = 3 * MIB
ITEMS_OFFSET = METADATA_OFFSET + 64 * KIB
BLOCKS_OFFSET = 4 * MIB

_TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = _byte >> 1 ^ (0x82F63B78 if _byte & 1 else 0)
    _TABLE.append(_byte)


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli), bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def sealed(raw: bytes) -> bytes:
    """Return a structure with its checksum, which is in bytes 4 to 8."""
    blank = raw[:4] + bytes(4) + raw[8:]
    return raw[:4] + struct.pack("<I", crc32c(blank)) + raw[8:]


def seal(path: Path, offset: int, nbytes: int) -> Path:
    """Correct the checksum of a structure in a file."""
    with open(path, "r+b") as file:
        file.seek(offset)
        raw = sealed(file.read(nbytes))
        file.seek(offset)
        file.write(raw)
    return path


def guid(number: int) -> uuid.UUID:
    """Return a GUID that is recognised in a dump."""
    return uuid.UUID(int=(0xA0 << 120) + number)


PARENT_GUID = guid(1)


def pattern(seed: int, nbytes: int) -> bytes:
    """Return bytes that differ for each sector and each seed."""
    sectors = (struct.pack("<II", seed, number) * 64 for number in range(-(-nbytes // 512)))
    return b"".join(sectors)[:nbytes]


# ---------------------------------------------------------------------------- log (2.3)

Write = tuple[int, bytes | int]  # 4096 bytes at an offset, or a number of zeros


def log_entry(
    sequence: int,
    tail: int,
    writes: list[Write],
    *,
    log_guid: uuid.UUID,
    flushed: int = 0,
    last: int = 0,
    pad_sectors: int = 0,
) -> bytes:
    """Return one entry; ``tail`` is the log offset of the sequence's first one."""
    descriptors, sectors = b"", b""
    for offset, what in writes:
        if isinstance(what, int):
            descriptors += struct.pack("<4sIQQQ", b"zero", 0, what, offset, sequence)
            continue
        head, tail_bytes = what[:8], what[-4:]
        descriptors += struct.pack("<4s4s8sQQ", b"desc", tail_bytes, head, offset, sequence)
        sectors += struct.pack("<4sI", b"data", sequence >> 32) + what[8:-4]
        sectors += struct.pack("<I", sequence & 0xFFFFFFFF)
    front = -(-(64 + len(descriptors)) // 4096) * 4096
    nbytes = front + len(sectors) + pad_sectors * 4096
    header = struct.pack(
        "<4sIIIQII16sQQ",
        b"loge",
        0,
        nbytes,
        tail,
        sequence,
        len(writes),
        0,
        log_guid.bytes_le,
        flushed,
        last,
    )
    return sealed((header + descriptors).ljust(front, b"\0") + sectors + bytes(pad_sectors * 4096))


# ------------------------------------------------------------------------------- image


@dataclass
class Vhdx:
    """The description of an image; `write` makes it."""

    virtual_size: int
    block_nbytes: int = MIB
    logical: int = 512
    physical: int = 4096
    leave_allocated: bool = False
    # Block number: state, content (a whole block; none for states without).
    blocks: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    # Partially present block: numbers of the sectors that it stores.
    own_sectors: dict[int, set[int]] = field(default_factory=dict)
    locator: dict[str, str] | None = None
    data_guid: uuid.UUID = PARENT_GUID
    log_guid: uuid.UUID = NIL
    log: bytes = b""
    extra_regions: list[tuple[uuid.UUID, int, int, int]] = field(default_factory=list)
    extra_items: list[tuple[uuid.UUID, int, bytes]] = field(default_factory=list)

    @property
    def ratio(self) -> int:
        return (1 << 23) * self.logical // self.block_nbytes

    def bat_index(self, block: int) -> int:
        return block + block // self.ratio

    def bitmap_index(self, block: int) -> int:
        return (block // self.ratio) * (self.ratio + 1) + self.ratio

    def write(self, path: Path) -> Path:
        """Write the image."""
        bat, data = self._bat_and_data()
        with open(path, "wb") as file:
            for offset, piece in (
                (0, b"vhdxfile" + "made by hand".encode("utf-16-le")),
                *((offset, self.header(7 - n)) for n, offset in enumerate(HEADERS)),
                *((offset, self.region_table()) for offset in REGION_TABLES),
                (LOG_OFFSET, self.log),
                (BAT_OFFSET, struct.pack(f"<{len(bat)}Q", *bat)),
                (METADATA_OFFSET, self.metadata()),
                *data,
            ):
                file.seek(offset)
                file.write(piece)
            end = max([BLOCKS_OFFSET, *(offset + len(piece) for offset, piece in data)])
            file.truncate(-(-end // MIB) * MIB)
        return path

    def header(self, sequence: int) -> bytes:
        """Return a header (2.2.2)."""
        raw = struct.pack(
            "<4sIQ16s16s16sHHIQ",
            b"head",
            0,
            sequence,
            guid(2).bytes_le,
            self.data_guid.bytes_le,
            self.log_guid.bytes_le,
            0,
            1,
            LOG_NBYTES,
            LOG_OFFSET,
        )
        return sealed(raw.ljust(4096, b"\0"))

    def region_table(self) -> bytes:
        """Return a region table (2.2.3)."""
        regions = [
            (BAT, BAT_OFFSET, BAT_NBYTES, 1),
            (METADATA, METADATA_OFFSET, MIB, 1),
            *self.extra_regions,
        ]
        raw = struct.pack("<4sIII", b"regi", 0, len(regions), 0)
        for name, offset, nbytes, required in regions:
            raw += struct.pack("<16sQII", name.bytes_le, offset, nbytes, required)
        return sealed(raw.ljust(64 * KIB, b"\0"))

    def items(self) -> list[tuple[uuid.UUID, int, bytes]]:
        """Return the metadata items (2.6.2): GUID, flags, content."""
        flags = int(self.leave_allocated) | (2 if self.locator is not None else 0)
        items = [
            (FILE_PARAMETERS, 4, struct.pack("<II", self.block_nbytes, flags)),
            (DISK_SIZE, 6, struct.pack("<Q", self.virtual_size)),
            (DISK_ID, 6, guid(3).bytes_le),
            (LOGICAL, 6, struct.pack("<I", self.logical)),
            (PHYSICAL, 6, struct.pack("<I", self.physical)),
        ]
        if self.locator is not None:
            items.append((LOCATOR, 4, self.parent_locator(self.locator)))
        return items + self.extra_items

    @staticmethod
    def parent_locator(pairs: dict[str, str]) -> bytes:
        """Return a parent locator (2.6.2.6)."""
        raw = struct.pack("<16sHH", LOCATOR_TYPE.bytes_le, 0, len(pairs))
        at, texts = len(raw) + 12 * len(pairs), b""
        for key, value in pairs.items():
            k, v = key.encode("utf-16-le"), value.encode("utf-16-le")
            raw += struct.pack("<IIHH", at + len(texts), at + len(texts + k), len(k), len(v))
            texts += k + v
        return raw + texts

    def item_offset(self, wanted: uuid.UUID) -> int:
        """Return the host offset of an item."""
        at = ITEMS_OFFSET
        for name, _, item in self.items():
            if name == wanted:
                return at
            at += len(item)
        raise KeyError(wanted)

    def metadata(self) -> bytes:
        """Return the metadata region (2.6.1)."""
        items = self.items()
        table = struct.pack("<8sHH20s", b"metadata", 0, len(items), b"")
        data = b""
        for name, flags, item in items:
            offset = 64 * KIB + len(data) if item else 0
            table += struct.pack("<16sIIII", name.bytes_le, offset, len(item), flags, 0)
            data += item
        return table.ljust(64 * KIB, b"\0") + data

    def _bat_and_data(self) -> tuple[list[int], list[tuple[int, bytes]]]:
        n_blocks = -(-self.virtual_size // self.block_nbytes)
        bat = [0] * (self.bitmap_index(max(n_blocks - 1, 0)) + 1)
        data: list[tuple[int, bytes]] = []
        chunks = sorted({block // self.ratio for block in self.own_sectors})
        place = BLOCKS_OFFSET + len(chunks) * MIB
        for chunk, at in zip(chunks, range(BLOCKS_OFFSET, place, MIB), strict=True):
            bat[chunk * (self.ratio + 1) + self.ratio] = at | 6
            data.append((at, self._bitmap(chunk)))
        for block in sorted(self.blocks, reverse=True):
            state, content = self.blocks[block]
            bat[self.bat_index(block)] = state
            if content:
                bat[self.bat_index(block)] |= place
                data.append((place, content))
                place += self.block_nbytes
        return bat[: BAT_NBYTES // 8], data

    def _bitmap(self, chunk: int) -> bytes:
        """Return a sector bitmap block (2.4): the lowest bit is the first sector."""
        bitmap = bytearray(MIB)
        per_block = self.block_nbytes // self.logical
        for block, sectors in self.own_sectors.items():
            if block // self.ratio == chunk:
                for sector in sectors:
                    bit = block % self.ratio * per_block + sector
                    bitmap[bit // 8] |= 1 << bit % 8
        return bytes(bitmap)

    def expected(self, parent: bytes = b"") -> bytes:
        """Return the content of the disk over that of its parent."""
        disk = bytearray(self.virtual_size)
        disk[: min(len(parent), len(disk))] = parent[: len(disk)]
        for block, (state, content) in self.blocks.items():
            start = block * self.block_nbytes
            end = min(start + self.block_nbytes, self.virtual_size)
            if state in (UNDEFINED, ZERO, UNMAPPED):
                disk[start:end] = bytes(end - start)
            elif state == FULL:
                disk[start:end] = content[: end - start]
            elif state == PARTIAL:
                for sector in self.own_sectors.get(block, ()):
                    low = start + sector * self.logical
                    high = min(low + self.logical, end)
                    if low < high:
                        disk[low:high] = content[low - start : high - start]
        return bytes(disk)


def child_locator(
    parent: str = r".\parent.vhdx", linkage: uuid.UUID = PARENT_GUID
) -> dict[str, str]:
    """Return the locator of a child of an image that `Vhdx` made."""
    return {"parent_linkage": f"{{{linkage}}}", "relative_path": parent}
