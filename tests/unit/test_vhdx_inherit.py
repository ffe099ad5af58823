"""The metadata items that a child takes over from its parent.

Source: [MS-VHDX] 2.6.1.2, IsVirtualDisk: forking a file copies the items that have it,
and leaves the others.
"""

from __future__ import annotations

import struct
import uuid
from pathlib import Path

import pytest
from tests.helpers import vhdx
from tests.helpers.other_readers import assert_libvhdi_reads
from tests.helpers.vhdx import FULL, Vhdx, guid, log_entry, pattern

import imgcore
from imgcore.limits import VHDX_MAX_INHERITED_NBYTES

MIB = 1 << 20
USER, DISK, REQUIRED = 1, 2, 4
OWN = {
    vhdx.FILE_PARAMETERS,
    vhdx.DISK_SIZE,
    vhdx.DISK_ID,
    vhdx.LOGICAL,
    vhdx.PHYSICAL,
    vhdx.LOCATOR,
}

Items = list[tuple[uuid.UUID, int, bytes]]


def items_of(path: Path) -> Items:
    """Return the items that the specification does not know, read by its text alone."""
    raw = path.read_bytes()
    (n_regions,) = struct.unpack_from("<I", raw, vhdx.REGION_TABLES[0] + 8)
    at = vhdx.REGION_TABLES[0] + 16
    regions = dict(struct.unpack_from("<16sQ", raw, at + 32 * i) for i in range(n_regions))
    table = regions[vhdx.METADATA.bytes_le]
    (n_items,) = struct.unpack_from("<H", raw, table + 10)
    items: Items = []
    for i in range(n_items):
        name, offset, nbytes, flags = struct.unpack_from("<16sIII", raw, table + 32 + 32 * i)
        assert (offset == 0) == (nbytes == 0)
        found = uuid.UUID(bytes_le=name)
        if found not in OWN or flags & USER:
            items.append((found, flags, raw[table + offset : table + offset + nbytes]))
    return items


def parent_with(path: Path, items: Items) -> Path:
    blocks = {0: (FULL, pattern(1, MIB)), 2: (FULL, pattern(2, MIB))}
    return Vhdx(4 * MIB, blocks=blocks, extra_items=items).write(path)


def child_of(parent: Path, name: str, how: str = "convert") -> Path:
    path = parent.with_name(name)
    if how == "create":
        imgcore.create(path, backing=parent.name, backing_format="vhdx", sync=False)
        return path
    raw = parent.with_name(f"{name}.raw")
    imgcore.convert(parent, raw, sync=False)
    with open(raw, "r+b") as file:
        file.seek(MIB)
        file.write(pattern(9, MIB))
    imgcore.convert(raw, path, backing=parent.name, backing_format="vhdx", sync=False)
    return path


ITEMS: Items = [
    (guid(20), USER | DISK, b"notes of a user"),
    (guid(21), DISK, b"system metadata that this program does not know"),
    (guid(22), USER | DISK, b""),
    # The GUID of a known item, but in the user's name space.
    (vhdx.DISK_SIZE, USER | DISK, b"\0" * 8),
    (guid(23), USER, b"of the file"),
    (guid(24), 0, b"of the file, system"),
]


@pytest.mark.parametrize("how", ["convert", "create"])
def test_a_child_has_the_items_of_the_disk_and_not_those_of_the_file(
    how: str, tmp_path: Path
) -> None:
    parent = parent_with(tmp_path / "base.vhdx", ITEMS)
    child = child_of(parent, "top.vhdx", how)
    assert items_of(child) == ITEMS[:4]
    assert imgcore.check(child).ok
    # A child of the child, which has its own and those of its parent's parent.
    grandchild = child_of(child, "leaf.vhdx", how)
    assert items_of(grandchild) == ITEMS[:4]
    assert imgcore.info(grandchild)["virtual-size"] == 4 * MIB


def test_other_readers_take_the_child(tmp_path: Path) -> None:
    # libvhdi rejects items without bytes, and overlooks IsUser.
    simple = [item for item in ITEMS if item[2] and item[0] not in OWN]
    parent = parent_with(tmp_path / "base.vhdx", simple)
    child = child_of(parent, "top.vhdx")
    assert items_of(child) == simple[:2]
    raw = tmp_path / "expected.raw"
    imgcore.convert(child, raw, sync=False)
    assert_libvhdi_reads(raw, child, parent)


def test_a_merged_image_is_a_new_disk(tmp_path: Path) -> None:
    parent = parent_with(tmp_path / "base.vhdx", ITEMS)
    child = child_of(parent, "top.vhdx")
    imgcore.convert(child, tmp_path / "merged.vhdx", sync=False)
    assert items_of(tmp_path / "merged.vhdx") == []


def test_items_that_need_a_larger_region(tmp_path: Path) -> None:
    """Items of 1 MiB each do not fit into the usual region of 1 MiB."""
    large: Items = [(guid(40 + n), USER | DISK, pattern(n, MIB)) for n in range(3)]
    parent = tmp_path / "base.vhdx"
    imgcore.create(parent, 4 * MIB, sync=False)
    with_items(parent, large)
    child = child_of(parent, "top.vhdx")
    assert items_of(child) == large
    assert imgcore.check(child).ok
    with imgcore.open(child) as image:
        assert image.read(MIB, MIB) == pattern(9, MIB)
    assert items_of(child_of(child, "leaf.vhdx")) == large


def with_items(path: Path, items: Items) -> None:
    """Move the metadata region of an image to its end, with further items."""
    raw = bytearray(path.read_bytes())
    at = -(-len(raw) // MIB) * MIB
    raw += bytes(at - len(raw))
    region = bytearray(raw[2 * MIB : 3 * MIB])
    (n_items,) = struct.unpack_from("<H", region, 10)
    for n, (name, flags, data) in enumerate(items, n_items):
        entry = struct.pack("<16sIII", name.bytes_le, len(region), len(data), flags)
        region[32 + 32 * n : 32 + 32 * n + len(entry)] = entry
        region += data
    struct.pack_into("<H", region, 10, n_items + len(items))
    region += bytes(-len(region) % MIB)
    raw += region
    for table in vhdx.REGION_TABLES:
        for entry_at in (table + 16, table + 48):
            if raw[entry_at : entry_at + 16] == vhdx.METADATA.bytes_le:
                struct.pack_into("<QI", raw, entry_at + 16, at, len(region))
    path.write_bytes(raw)
    for table in vhdx.REGION_TABLES:
        vhdx.seal(path, table, 64 * 1024)


def test_items_past_the_limit_are_refused(tmp_path: Path) -> None:
    n_most = VHDX_MAX_INHERITED_NBYTES // MIB
    for n, is_taken in ((n_most, True), (n_most + 1, False)):
        parent = tmp_path / f"base{n}.vhdx"
        imgcore.create(parent, 4 * MIB, sync=False)
        with_items(parent, [(guid(40 + i), DISK, bytes(MIB)) for i in range(n)])
        if is_taken:
            assert len(items_of(child_of(parent, "top.vhdx"))) == n
            continue
        refused(parent, "at most 16777216 are copied")


def refused(parent: Path, words: str) -> None:
    """A child is refused, and the advice (to convert without -B) works."""
    for how in ("create", "convert"):
        with pytest.raises(imgcore.LimitExceededError, match=words) as error:
            child_of(parent, "no.vhdx", how)
        assert not parent.with_name("no.vhdx").exists()
    assert "convert without -B" in str(error.value)
    imgcore.convert(parent, parent.with_name("alone.vhdx"), sync=False)


@pytest.mark.parametrize(
    ("flags", "n_most", "words"),
    [
        (USER | DISK, 1024, "1025 user metadata items, at most 1024"),
        (DISK, 2041, "2042 metadata items, at most 2041"),
    ],
)
def test_more_items_than_a_table_holds_are_refused(
    flags: int, n_most: int, words: str, tmp_path: Path
) -> None:
    for n, is_taken in ((n_most, True), (n_most + 1, False)):
        parent = parent_with(
            tmp_path / f"{n}.vhdx", [(guid(100 + i), flags, b"x") for i in range(n)]
        )
        if is_taken:
            assert len(items_of(child_of(parent, f"top{n}.vhdx"))) == n
        else:
            refused(parent, words)


def test_items_are_read_through_the_log(tmp_path: Path) -> None:
    disk = Vhdx(4 * MIB, extra_items=[(guid(20), USER | DISK, b"old" * 1000)])
    at = disk.item_offset(guid(20)) // 4096 * 4096
    path = disk.write(tmp_path / "base.vhdx")
    sector = bytearray(path.read_bytes()[at : at + 4096].replace(b"old", b"new"))
    disk.log_guid = guid(9)
    disk.log = log_entry(
        1, 0, [(at, bytes(sector))], log_guid=guid(9), flushed=4 * MIB, last=4 * MIB
    )
    disk.write(path)
    ((_, _, data),) = items_of(child_of(path, "top.vhdx"))
    assert data == b"new" * 1000
