"""Extents in holes of host files are found and cut; no other bytes change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.helpers import qemu, vdi, vmdk
from tests.helpers.images import noise
from tests.helpers.qcow2 import create, qemu_io
from tests.helpers.reading import poke

import imgcore
from imgcore.disk import host_holes
from imgcore.disk.host_holes import HostHoles
from imgcore.engine.extents import EXTENT_DTYPE, Kind
from imgcore.engine.source_file import SourceFile
from imgcore.files.host_file import HostFile
from imgcore.formats.shared.flat_reader import HostData

if TYPE_CHECKING:
    from imgcore.engine.extents import Extents

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[HostFile]:
    """8 MiB, with data at 1 MiB and 4 MiB, 64 KiB each."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(8 * MIB)
        for offset in (MIB, 4 * MIB):
            file.seek(offset)
            file.write(noise(64 * KIB))
    with HostFile.open(path) as opened:
        yield opened


def _rows(*rows: tuple[int, int, int, int, int, Kind]) -> Extents:
    return np.array([(*row, 0) for row in rows], dtype=EXTENT_DTYPE)


def _cut(file: HostFile, rows: Extents) -> list[tuple[int, int, int, Kind]]:
    pieces = np.concatenate(list(HostHoles([SourceFile(file)]).cut(rows)))
    columns = (pieces[name].tolist() for name in ("guest_offset", "length", "host_offset", "kind"))
    return [(a, b, c, Kind(d)) for a, b, c, d in zip(*columns, strict=True)]


@pytest.mark.parametrize("max_rows", [2, 3, 1000])
def test_long_rows_are_cut(
    sparse: HostFile, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_holes, "MAX_BATCH_ROWS", max_rows)
    rows = _rows(
        (0, 4096, 0, 0, 0, Kind.HOLE),
        (4096, 4 * MIB, 512 * KIB, 4 * MIB, 0, Kind.DATA),
        (4096 + 4 * MIB, MIB, 0, 9, 0, Kind.DEFLATE),
        (4096 + 5 * MIB, 64 * KIB, 0, 64 * KIB, 0, Kind.DATA),
        (4096 + 5 * MIB + 64 * KIB, 2 * MIB, 6 * MIB, 2 * MIB, 0, Kind.DATA),
    )
    batches = list(HostHoles([SourceFile(sparse)]).cut(rows))
    assert max(map(len, batches)) <= max_rows
    assert _cut(sparse, rows) == [
        (0, 4096, 0, Kind.HOLE),
        (4096, 512 * KIB, 0, Kind.ZERO),
        (4096 + 512 * KIB, 64 * KIB, MIB, Kind.DATA),
        (4096 + 576 * KIB, 3 * MIB - 64 * KIB, 0, Kind.ZERO),
        (4096 + 3 * MIB + 512 * KIB, 64 * KIB, 4 * MIB, Kind.DATA),
        (4096 + 3 * MIB + 576 * KIB, 448 * KIB, 0, Kind.ZERO),
        (4096 + 4 * MIB, MIB, 0, Kind.DEFLATE),
        (4096 + 5 * MIB, 64 * KIB, 0, Kind.DATA),
        (4096 + 5 * MIB + 64 * KIB, 2 * MIB, 0, Kind.ZERO),
    ]


def test_what_is_cut_off_later_is_no_hole(sparse: HostFile, tmp_path: Path) -> None:
    rows = _rows((0, 2 * MIB, 6 * MIB, 2 * MIB, 0, Kind.DATA))
    with (tmp_path / "file").open("r+b") as file:
        file.truncate(7 * MIB)
    assert _cut(sparse, rows) == [(0, 2 * MIB, 6 * MIB, Kind.DATA)]


def test_a_file_without_holes_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(noise(2 * MIB))
    monkeypatch.setattr(HostData, "next", None)
    with HostFile.open(tmp_path / "file") as file:
        assert len(_cut(file, _rows((0, 2 * MIB, 0, 2 * MIB, 0, Kind.DATA)))) == 1


def test_preallocated_metadata(tmp_path: Path) -> None:
    """100 GiB of empty clusters are read at once, and hide the backing file."""
    path = create(tmp_path / "a.qcow2", 100 * GIB, "preallocation=metadata")
    qemu_io(path, "write -P 7 50G 3M", "write -P 8 99G 64k")
    result = imgcore.convert(path, tmp_path / "b.qcow2")
    assert result.bytes_read < 16 * MIB
    assert imgcore.compare(path, tmp_path / "b.qcow2").identical
    qemu.assert_same(path, tmp_path / "b.qcow2", source_format="qcow2", target_format="qcow2")
    wanted = qemu.run("measure", "-O", "qcow2", path).stdout.splitlines()[0].split()[-1]
    assert imgcore.measure(path, target_format="qcow2").required == int(wanted)


def test_a_disk_without_files(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(vmdk.descriptor("custom", "RW 256 ZERO"))
    result = imgcore.convert(path, tmp_path / "b.raw")
    assert (result.virtual_size, result.bytes_read) == (128 * KIB, 0)
    assert (tmp_path / "b.raw").read_bytes() == bytes(128 * KIB)


@pytest.mark.parametrize("image_type", [1, 2])
@pytest.mark.parametrize("shift", [1, 100, 511, 513, 4095])
def test_blocks_at_odd_offsets(tmp_path: Path, image_type: int, shift: int) -> None:
    """Rows are cut at the guest's sectors, which are not sectors of the file."""
    path = vdi.make(tmp_path / "a.vdi", [1, vdi.FREE, 0, 2], image_type=image_type)
    poke(path, (vdi.OFF_DATA, (vdi.DATA_OFFSET + shift).to_bytes(4, "little")))
    disk = bytearray(4 * MIB)
    with path.open("r+b") as file:
        file.truncate(vdi.DATA_OFFSET)
        for guest, host in ((0, MIB), (2 * MIB, 0), (3 * MIB, 2 * MIB)):
            for offset, nbytes in ((0, 3), (300 * KIB + 200, 70 * KIB), (MIB - 5, 5)):
                piece = noise(nbytes, guest + offset)
                disk[guest + offset : guest + offset + nbytes] = piece
                file.seek(vdi.DATA_OFFSET + shift + host + offset)
                file.write(piece)
    for name in ("b.raw", "b.qcow2", "b.vhd"):
        imgcore.convert(path, tmp_path / name)
        with imgcore.open(tmp_path / name) as image:
            assert image.read(0, 4 * MIB) == disk
    assert imgcore.compare(path, tmp_path / "b.qcow2").identical
    with imgcore.open(path) as image:
        assert all((rows["guest_offset"] % 512 == 0).all() for rows in image.data_extents())
    assert sum(entry.length for entry in imgcore.map(path)) == 4 * MIB
