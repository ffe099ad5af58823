"""Damage to a VHDX that its checksums do not reveal, and arbitrary logs."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

import imgcore
from tests.helpers import vhdx
from tests.helpers.arbitrary import relaxed, use
from tests.helpers.vhdx import FULL, HEADERS, KIB, MIB, PARTIAL, REGION_TABLES, ZERO, Vhdx, pattern

# Each example writes a file of some MiB.
fewer = settings(relaxed, max_examples=100)

SECTOR = 4096
GUID = vhdx.guid(0x106)
# Offsets of numbers that readers follow.
PLACES = st.one_of(
    st.integers(HEADERS[0], HEADERS[0] + 80),
    st.integers(REGION_TABLES[0], REGION_TABLES[0] + 80),
    st.integers(MIB, MIB + 160),
    st.integers(vhdx.BAT_OFFSET, vhdx.BAT_OFFSET + 80),
    st.integers(vhdx.METADATA_OFFSET, vhdx.METADATA_OFFSET + 240),
    st.integers(vhdx.ITEMS_OFFSET, vhdx.ITEMS_OFFSET + 240),
)
NUMBERS = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.integers(0, 7).map(lambda n: bytes([n])),
    st.integers(0, 63).map(lambda n: struct.pack("<Q", 1 << n)),
    st.integers(0, 63).map(lambda n: struct.pack("<Q", (1 << 64) - (1 << n))),
    st.integers(0, 12).map(lambda n: struct.pack("<I", n * MIB)),
)


def seed(log: bytes) -> Vhdx:
    return Vhdx(
        9 * MIB,
        locator=vhdx.child_locator(),
        blocks={0: (PARTIAL, pattern(1, MIB)), 1: (FULL, pattern(2, MIB)), 2: (ZERO, b"")},
        own_sectors={0: set(range(0, 2048, 5))},
        log_guid=GUID if log else vhdx.NIL,
        log=log,
    )


@fewer
@given(
    edits=st.lists(st.tuples(PLACES, NUMBERS), min_size=1, max_size=3),
    has_log=st.booleans(),
)
def test_sealed_damage(
    edits: list[tuple[int, bytes]], has_log: bool, tmp_path_factory: object
) -> None:
    folder = tmp_path_factory.mktemp("vhdx")  # type: ignore[attr-defined]
    parent = Vhdx(9 * MIB, blocks={3: (FULL, pattern(9, MIB))})
    parent.write(folder / "parent.vhdx")
    log = vhdx.log_entry(1, 0, [(8 * MIB, SECTOR)], log_guid=GUID) if has_log else b""
    path = seed(log).write(folder / "image.vhdx")
    with open(path, "r+b") as file:
        for offset, data in edits:
            file.seek(offset)
            file.write(data)
        # Both copies get the same damage, so that neither can replace the other.
        for places, nbytes in ((HEADERS, 4096), (REGION_TABLES, 64 * KIB)):
            file.seek(places[0])
            raw = vhdx.sealed(file.read(nbytes))
            for place in places:
                file.seek(place)
                file.write(raw)
    if has_log:
        vhdx.seal(path, MIB, len(log))
    use(path, "vhdx")
    for name in ("image.vhdx", "parent.vhdx"):
        (folder / name).unlink()


WRITES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 24), st.integers(0, 6).map(lambda n: n * SECTOR)),
        st.tuples(st.integers(0, 24), st.integers(0, 255).map(lambda n: bytes([n]) * SECTOR)),
    ),
    max_size=12,
)


@fewer
@given(entries=st.lists(WRITES, min_size=1, max_size=4))
def test_any_log_is_replayed_in_its_order(
    entries: list[list[tuple[int, int | bytes]]], tmp_path_factory: object
) -> None:
    """The reference writes entry after entry into a copy of the payload."""
    folder: Path = tmp_path_factory.mktemp("log")  # type: ignore[attr-defined]
    base = 4 * MIB  # block 0, which has everything that is written
    payload = bytearray(pattern(7, MIB))
    log = b""
    for sequence, writes in enumerate(entries, 1):
        placed = [(base + number * SECTOR, what) for number, what in writes]
        log += vhdx.log_entry(sequence, 0, list(placed), log_guid=GUID)
        for number, what in writes:
            data = bytes(what) if isinstance(what, int) else what
            payload[number * SECTOR : number * SECTOR + len(data)] = data
    disk = Vhdx(MIB, blocks={0: (FULL, pattern(7, MIB))}, log_guid=GUID, log=log)
    path = disk.write(folder / "image.vhdx")
    with imgcore.open(path) as image:
        found = image.read(0, MIB)
        for offset in range(0, 30 * SECTOR, 1536):
            assert image.read(offset, 5120) == payload[offset : offset + 5120]
    path.unlink()
    assert hashlib.sha256(found).digest() == hashlib.sha256(payload).digest()
