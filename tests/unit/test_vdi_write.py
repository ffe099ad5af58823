"""Writing VDI: structures byte by byte, and requests that are rejected."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from tests.helpers import images, vdi
from tests.helpers.vdi import FREE, ZERO

import imgcore
from imgcore import limits
from imgcore.errors import LimitExceededError, OptionError

MIB = 1 << 20
GIVEN = UUID("6f9619ff-8b86-d011-b42d-00c04fc964ff")


def field(path: Path, offset: int, form: str = "<I") -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])


def uuid_at(path: Path, offset: int) -> UUID:
    with path.open("rb") as file:
        file.seek(offset)
        return UUID(bytes_le=file.read(16))


def block_map(path: Path) -> list[int]:
    with path.open("rb") as file:
        file.seek(field(path, vdi.OFF_MAP))
        n_blocks = field(path, vdi.N_BLOCKS)
        return list(struct.unpack(f"<{n_blocks}I", file.read(4 * n_blocks)))


def write(path: Path, raw: Path, **options: Any) -> Path:
    imgcore.convert(raw, path, format="raw", target_format="vdi", options=options, sync=False)
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Data in blocks 1 and 4 of six, the last one a single sector."""
    path = tmp_path / "disk.raw"
    pieces = [(MIB + 4096, images.noise(8192)), (4 * MIB, images.noise(512))]
    images.RawImage("six", 5 * MIB + 512, lambda: pieces).write(path)
    return path


def test_dynamic(raw: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.vdi", raw)
    assert block_map(path) == [FREE, 0, FREE, FREE, 1, FREE]
    assert field(path, vdi.TYPE) == 1
    assert field(path, vdi.N_ALLOCATED) == 2
    assert field(path, vdi.DISK_SIZE, "<Q") == 5 * MIB + 512
    assert field(path, vdi.OFF_DATA) == MIB
    assert path.stat().st_size == 3 * MIB
    # Zeros inside a block are not written.
    assert os.stat(path).st_blocks * 512 < 200 * 1024


def test_last_block_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(images.noise(MIB + 512))
    target = write(tmp_path / "a.vdi", path)
    assert block_map(target) == [0, 1]
    assert target.stat().st_size == 3 * MIB


@pytest.mark.parametrize("options", [{"subformat": "fixed"}, {"static": True}, {"static": "on"}])
def test_fixed(raw: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    path = write(tmp_path / "a.vdi", raw, **options)
    assert field(path, vdi.TYPE) == 2
    assert block_map(path) == [0, 1, 2, 3, 4, 5]
    assert field(path, vdi.N_ALLOCATED) == 6
    assert path.stat().st_size == 7 * MIB
    assert os.stat(path).st_blocks * 512 < 200 * 1024
    assert imgcore.info(path)["format-specific"]["data"]["subformat"] == "fixed"


@pytest.mark.parametrize("mode", ["falloc", "full"])
def test_preallocation(raw: Path, tmp_path: Path, mode: str) -> None:
    path = write(tmp_path / "a.vdi", raw, subformat="fixed", preallocation=mode)
    assert os.stat(path).st_blocks * 512 >= 7 * MIB
    assert imgcore.compare(raw, path, format_a="raw").identical


def test_all_zeros_are_stored_on_request(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    imgcore.convert(raw, path, format="raw", sparse=0, sync=False)
    assert block_map(path) == [0, 1, 2, 3, 4, 5]


def test_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.vdi"
    imgcore.create(path, 3 * MIB, sync=False)
    assert block_map(path) == [FREE] * 3
    assert path.stat().st_size == MIB
    assert imgcore.check(path).ok


@pytest.mark.parametrize("nbytes", ["128k", "2M", "128M"])
def test_block_size(raw: Path, tmp_path: Path, nbytes: str) -> None:
    path = write(tmp_path / "a.vdi", raw, block_size=nbytes)
    assert imgcore.compare(raw, path, format_a="raw").identical
    assert imgcore.check(path).ok
    block = field(path, vdi.BLOCK_SIZE)
    assert field(path, vdi.OFF_DATA) % max(block, MIB) == 0
    assert (path.stat().st_size - field(path, vdi.OFF_DATA)) % block == 0


def test_uuids_are_random_and_never_null(raw: Path, tmp_path: Path) -> None:
    paths = [write(tmp_path / name, raw) for name in ("a.vdi", "b.vdi")]
    found = {
        uuid_at(path, offset)
        for path in paths
        for offset in (vdi.CREATION_UUID, vdi.MODIFICATION_UUID)
    }
    assert len(found) == 4
    assert UUID(int=0) not in found
    for path in paths:
        assert uuid_at(path, vdi.PARENT_UUID) == UUID(int=0)


def test_uuids_given(raw: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "a.vdi", raw, uuid=str(GIVEN))
    second = write(tmp_path / "b.vdi", raw, uuid=f"{{{GIVEN}}}")
    assert uuid_at(first, vdi.CREATION_UUID) == GIVEN
    assert first.read_bytes() == second.read_bytes()
    third = write(tmp_path / "c.vdi", raw, uuid=str(GIVEN), modification_uuid=str(GIVEN))
    assert uuid_at(third, vdi.MODIFICATION_UUID) == GIVEN


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"uuid": "xyz"}, "uuid is 'xyz'"),
    ({"uuid": str(UUID(int=0))}, "not all of them zero"),
    ({"modification_uuid": str(UUID(int=0))}, "modification_uuid is .*, not all of them zero"),
    ({"block_size": "64k"}, "block_size is 65536, allowed: powers of two from 131072"),
    ({"block_size": "256M"}, "block_size is 268435456"),
    ({"block_size": "3M"}, "block_size is 3145728"),
    ({"subformat": "sparse"}, "allowed: dynamic, fixed"),
    ({"subformat": "dynamic", "static": "on"}, "static=on means subformat=fixed"),
    ({"preallocation": "full"}, "preallocation does not go with subformat=dynamic"),
]


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=[row[1][:30] for row in OPTIONS])
def test_options_are_refused(
    raw: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        write(tmp_path / "a.vdi", raw, **options)
    assert not (tmp_path / "a.vdi").exists()


def test_other_refusals(raw: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.vdi"
    with pytest.raises(OptionError, match="cannot be compressed"):
        imgcore.convert(raw, target, format="raw", compress=True)


def test_map_at_its_limit() -> None:
    """The place of the first block is a 32-bit number."""
    n_blocks = (limits.VDI_MAX_DATA_OFFSET // MIB * MIB - 4096) // 4
    assert imgcore.measure(size=n_blocks * MIB, target_format="vdi").required == 4095 * MIB
    with pytest.raises(LimitExceededError, match="a larger block_size helps"):
        imgcore.measure(size=(n_blocks + 1) * MIB, target_format="vdi")
    larger = {"block_size": "2M"}
    assert imgcore.measure(size=n_blocks * MIB + MIB, target_format="vdi", options=larger)


def test_measure(raw: Path, tmp_path: Path) -> None:
    for options, target in (({}, "a.vdi"), ({"static": "on"}, "b.vdi")):
        path = write(tmp_path / target, raw, **options)
        nbytes = path.stat().st_size
        found = imgcore.measure(raw, format="raw", target_format="vdi", options=options)
        assert found.required == nbytes
        assert found.fully_allocated == 7 * MIB


# -- with a parent ---------------------------------------------------------------------


def test_child(raw: Path, tmp_path: Path) -> None:
    base = write(tmp_path / "base.vdi", raw)
    changed = tmp_path / "changed.raw"
    data = bytearray(raw.read_bytes())
    data[4 * MIB : 4 * MIB + 512] = bytes(512)
    data[3 * MIB + 512] = 7
    changed.write_bytes(data)
    child = tmp_path / "child.vdi"
    imgcore.convert(changed, child, format="raw", backing="base.vdi", backing_format="vdi")
    assert field(child, vdi.TYPE) == 4
    assert block_map(child) == [FREE, FREE, FREE, 0, ZERO, FREE]
    assert uuid_at(child, vdi.PARENT_UUID) == uuid_at(base, vdi.CREATION_UUID)
    assert uuid_at(child, vdi.PARENT_MODIFICATION) == uuid_at(base, vdi.MODIFICATION_UUID)
    assert imgcore.compare(changed, child, format_a="raw").identical
    assert imgcore.check(child).ok


def test_empty_child(raw: Path, tmp_path: Path) -> None:
    write(tmp_path / "base.vdi", raw)
    child = tmp_path / "child.vdi"
    imgcore.create(child, backing="base.vdi", backing_format="vdi", sync=False)
    assert block_map(child) == [FREE] * 6
    assert imgcore.compare(raw, child, format_a="raw").identical


def test_parents_that_cannot_be(raw: Path, tmp_path: Path) -> None:
    write(tmp_path / "base.vdi", raw)
    with pytest.raises(OptionError, match="must be a VDI, not raw"):
        imgcore.create(tmp_path / "a.vdi", backing="disk.raw", backing_format="raw")
    with pytest.raises(OptionError, match="a fixed VDI cannot have a parent"):
        imgcore.create(
            tmp_path / "a.vdi",
            backing="base.vdi",
            backing_format="vdi",
            options={"static": True},
        )
