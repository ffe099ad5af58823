"""Raw images: holes are found, zeros left out, odd sizes filled up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.helpers import images
from tests.helpers.mounts import loop_device
from tests.helpers.reading import open_file

import imgcore.errors
from imgcore._core import Job
from imgcore.engine.extents import EXTENT_DTYPE, PLACEMENT_DTYPE, Kind
from imgcore.engine.geometry import Placing, ZeroPolicy
from imgcore.errors import (
    OptionError,
    TargetError,
)
from imgcore.files import host_file
from imgcore.files.target import Target
from imgcore.formats.api import BackingReference, WriteRequest
from imgcore.formats.raw.driver import DRIVER
from imgcore.formats.raw.options import Options
from imgcore.formats.raw.reader import RawReader
from imgcore.formats.shared.check_report import CheckReport

MIB = 1 << 20


def make(path: Path, virtual_size: int, *pieces: tuple[int, int]) -> Path:
    with path.open("wb") as file:
        for offset, nbytes in pieces:
            os.pwrite(file.fileno(), b"x" * nbytes, offset)
        file.truncate(virtual_size)
    return path


def open_raw(path: Path | str) -> RawReader:
    return open_file(path, RawReader)


Row = tuple[int, int, Kind]


def rows(reader: RawReader, start: int = 0, length: int | None = None) -> list[Row]:
    """Verify the form of rows, and return them with neighbours of one kind joined."""
    found: list[Row] = []
    position = start
    length = reader.virtual_size - start if length is None else length
    for batch in reader.extents(start, length):
        assert batch.dtype == EXTENT_DTYPE
        assert batch.flags.c_contiguous
        assert 1 <= len(batch) <= 1 << 17
        for row in batch:
            kind = Kind(int(row["kind"]))
            assert row["guest_offset"] == position
            assert row["length"] > 0
            data = kind is Kind.DATA
            assert row["host_offset"] == (position if data else 0)
            assert row["host_length"] == (row["length"] if data else 0)
            position += int(row["length"])
            if found and found[-1][2] is kind:
                found[-1] = (found[-1][0], position - found[-1][0], kind)
            else:
                found.append((int(row["guest_offset"]), int(row["length"]), kind))
    assert position == start + length
    return found


class TestExtents:
    @pytest.mark.parametrize(
        ("virtual_size", "pieces", "expected"),
        [
            (MIB, [], [(0, MIB, Kind.HOLE)]),
            (MIB, [(0, MIB)], [(0, MIB, Kind.DATA)]),
            (
                MIB,
                [(65536, 65536)],
                [
                    (0, 65536, Kind.HOLE),
                    (65536, 65536, Kind.DATA),
                    (131072, MIB - 131072, Kind.HOLE),
                ],
            ),
            (MIB, [(0, 4096)], [(0, 4096, Kind.DATA), (4096, MIB - 4096, Kind.HOLE)]),
            (
                MIB,
                [(MIB - 4096, 4096)],
                [(0, MIB - 4096, Kind.HOLE), (MIB - 4096, 4096, Kind.DATA)],
            ),
            (512, [(0, 512)], [(0, 512, Kind.DATA)]),
            (512, [], [(0, 512, Kind.HOLE)]),
            (0, [], []),
            (8 << 40, [(5 << 40, 4096)], None),
        ],
        ids=[
            "empty",
            "full",
            "middle",
            "front",
            "back",
            "sector",
            "empty-sector",
            "nothing",
            "far",
        ],
    )
    def test_whole(
        self,
        tmp_path: Path,
        virtual_size: int,
        pieces: Sequence[tuple[int, int]],
        expected: list[Row] | None,
    ) -> None:
        reader = open_raw(make(tmp_path / "a.raw", virtual_size, *pieces))
        if expected is None:
            expected = [
                (0, 5 << 40, Kind.HOLE),
                (5 << 40, 4096, Kind.DATA),
                ((5 << 40) + 4096, (3 << 40) - 4096, Kind.HOLE),
            ]
        assert reader.virtual_size == virtual_size
        assert rows(reader) == expected
        reader.close()

    def test_pieces_equal_the_whole(self, tmp_path: Path) -> None:
        pieces = [(i * 16384, 4096) for i in range(50)]
        reader = open_raw(make(tmp_path / "a.raw", MIB, *pieces))
        whole = np.zeros(MIB // 512, dtype=np.uint8)
        for start, length, kind in rows(reader):
            whole[start // 512 : (start + length) // 512] = kind
        for step in (512, 1536, 65536, 3 * 65536 + 512):
            found = np.zeros_like(whole)
            for offset in range(0, MIB, step):
                for start, length, kind in rows(reader, offset, min(step, MIB - offset)):
                    found[start // 512 : (start + length) // 512] = kind
            assert np.array_equal(found, whole)
        reader.close()

    def test_bounded_batches(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("imgcore.formats.shared.flat_reader._BATCH_ROWS", 8)
        pieces = [(i * 16384, 4096) for i in range(50)]
        reader = open_raw(make(tmp_path / "a.raw", MIB, *pieces))
        batches = list(reader.extents(0, MIB))
        assert len(batches) > 10
        assert max(map(len, batches)) <= 9
        assert len(rows(reader)) == 100
        reader.close()

    def test_unaligned_blocks_of_the_file_system(self, tmp_path: Path) -> None:
        """Data is widened to whole sectors, never cut."""
        reader = open_raw(make(tmp_path / "a.raw", 8192))

        class Core:
            def next_data(self, offset: int) -> tuple[int, int]:
                return (max(offset, 700), 1300) if offset < 1300 else (8192, 8192)

            def close(self) -> None:
                pass

        reader.file._core = Core()  # type: ignore[assignment]
        expected = [(0, 512, Kind.HOLE), (512, 1024, Kind.DATA), (1536, 6656, Kind.HOLE)]
        assert rows(reader) == expected
        assert rows(reader, 1024, 512) == [(1024, 512, Kind.DATA)]
        reader.close()

    def test_block_device(self, tmp_path: Path) -> None:
        with loop_device(make(tmp_path / "backing", MIB, (0, 4096))) as device:
            reader = open_raw(device)
            assert reader.virtual_size == MIB
            assert sum(length for _, length, _ in rows(reader)) == MIB
            reader.close()


@pytest.mark.parametrize(
    ("pieces", "on_xfs", "n_synced"),
    [([(0, 4096)], True, 1), ([(0, 4096)], False, 0), ([(0, MIB)], True, 0)],
    ids=["holes-on-xfs", "holes-elsewhere", "no-holes"],
)
def test_holes_are_not_trusted_before_a_sync(
    tmp_path: Path,
    pieces: Sequence[tuple[int, int]],
    on_xfs: bool,
    n_synced: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = make(tmp_path / "a.raw", MIB, *pieces)
    with path.open("rb") as file:
        os.fsync(file.fileno())  # blocks are counted only when they are allocated
    synced: list[int] = []
    monkeypatch.setattr(host_file, "is_on_xfs", lambda fd: on_xfs)
    monkeypatch.setattr(os, "fdatasync", synced.append)
    reader = open_raw(path)
    for _ in range(2):
        rows(reader)
    assert len(synced) == n_synced
    reader.close()


@pytest.mark.parametrize("nbytes", [1, 511, 513, MIB + 100])
def test_odd_size(tmp_path: Path, nbytes: int) -> None:
    path = make(tmp_path / "a.raw", nbytes, (nbytes - 1, 1))
    reader = open_raw(path)
    assert reader.virtual_size == -(-nbytes // 512) * 512
    start = nbytes // 512 * 512
    assert rows(reader, start, 512) == [
        (start, nbytes - start, Kind.DATA),
        (nbytes, reader.virtual_size - nbytes, Kind.HOLE),
    ]
    reader.close()


def test_reader_facts(tmp_path: Path) -> None:
    reader = open_raw(make(tmp_path / "a.raw", MIB))
    assert (reader.format_name, reader.block_nbytes, reader.backing) == ("raw", 512, None)
    assert reader.info() == {}
    assert reader.check() == CheckReport()
    assert not DRIVER.has_tables
    reader.close()
    reader.close()


def test_info_needs_no_numpy(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from imgcore.formats.registry import open_reader\n"
        "from imgcore.files.reference_gate import ReferenceGate\n"
        "from imgcore.files.host_file import HostFile\n"
        "file = HostFile.open(sys.argv[1])\n"
        "open_reader(file, ReferenceGate('.'))\n"
        "print([name for name in ('numpy', 'zstandard', 'imgcore.formats.vmdk.driver', 'ctypes')\n"
        "       if name in sys.modules])\n"
    )
    # The package itself may import more: only the layers below count here.
    bare = "import sys, types\nsys.modules['imgcore'] = p = types.ModuleType('imgcore')\n"
    bare += f"p.__path__ = [{str(Path(imgcore.errors.__file__).parent)!r}]\n"
    path = make(tmp_path / "a.raw", MIB)
    done = subprocess.run(
        [sys.executable, "-c", bare + script, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def request(virtual_size: int = MIB, **changes: Any) -> WriteRequest[Any]:
    return WriteRequest(virtual_size, Options(**changes.pop("options", {})), **changes)


class TestWriter:
    @pytest.mark.parametrize(
        ("sparse_nbytes", "in_place", "policy", "block_nbytes", "sparse"),
        [
            (4096, False, ZeroPolicy.SKIP, 65536, 4096),
            (512, False, ZeroPolicy.SKIP, 65536, 512),
            (65536, False, ZeroPolicy.SKIP, 65536, 65536),
            (100 * 1024, False, ZeroPolicy.SKIP, 131072, 100 * 1024),
            (64 << 20, False, ZeroPolicy.SKIP, 2 << 20, 64 << 20),
            (0, False, ZeroPolicy.STORE, 65536, 0),
            (4096, True, ZeroPolicy.EXPLICIT, 65536, 0),
            (0, True, ZeroPolicy.STORE, 65536, 0),
        ],
    )
    def test_geometry(
        self,
        tmp_path: Path,
        sparse_nbytes: int,
        in_place: bool,
        policy: ZeroPolicy,
        block_nbytes: int,
        sparse: int,
    ) -> None:
        path = tmp_path / "a.raw"
        if in_place:
            make(path, MIB)
        writer = DRIVER.writer(request(sparse_nbytes=sparse_nbytes))
        with Target(path, in_place=in_place) as target:
            assert writer.begin(target) is target.main
            assert target.main.reads_as_zeros == (not in_place)
            geometry = writer.geometry.over_old_bytes if in_place else writer.geometry
            assert geometry.placing is Placing.IDENTITY
            assert (geometry.zero_policy, geometry.block_nbytes) == (policy, block_nbytes)
            assert (geometry.sparse_nbytes, geometry.guest_nbytes) == (sparse, MIB)
            assert writer.first_offset == 0

    @pytest.mark.parametrize("virtual_size", [0, 512, MIB, 3 << 40])
    def test_empty_disk(self, tmp_path: Path, virtual_size: int) -> None:
        writer = DRIVER.writer(request(virtual_size))
        with Target(tmp_path / "a.raw") as target:
            writer.begin(target)
            assert writer.place(0, np.empty(0, dtype=PLACEMENT_DTYPE), 0) == 0
            writer.finish(0)
            target.commit()
        status = os.stat(tmp_path / "a.raw")
        assert (status.st_size, status.st_blocks) == (virtual_size, 0)

    @pytest.mark.parametrize("mode", ["falloc", "full"])
    def test_preallocation(self, tmp_path: Path, mode: str) -> None:
        writer = DRIVER.writer(request(options={"preallocation": mode}))
        with Target(tmp_path / "a.raw") as target:
            writer.begin(target)
            writer.finish(0)
            target.commit()
        status = os.stat(tmp_path / "a.raw")
        assert status.st_size == MIB
        assert status.st_blocks * 512 >= MIB

    def test_preallocation_needs_space(self, tmp_path: Path) -> None:
        writer = DRIVER.writer(request(1 << 50, options={"preallocation": "full"}))
        with (
            pytest.raises(OSError, match="1 PiB needed"),
            Target(tmp_path / "a.raw") as target,
        ):
            writer.begin(target)
        assert os.listdir(tmp_path) == []

    def test_in_place_too_small(self, tmp_path: Path) -> None:
        path = make(tmp_path / "a.raw", MIB - 512)
        with (
            Target(path, in_place=True) as target,
            pytest.raises(TargetError, match="fewer than"),
        ):
            DRIVER.writer(request()).begin(target)
        assert path.stat().st_size == MIB - 512

    def test_in_place_keeps_what_lies_behind(self, tmp_path: Path) -> None:
        path = make(tmp_path / "a.raw", 2 * MIB, (MIB, MIB))
        with Target(path, in_place=True) as target:
            writer = DRIVER.writer(request())
            writer.begin(target)
            writer.finish(0)
            target.commit()
        assert path.read_bytes() == bytes(MIB) + b"x" * MIB

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"virtual_size": 1000}, "multiple of 512"),
            ({"virtual_size": -512}, "multiple of 512"),
            ({"virtual_size": 1 << 63}, "9223372036854775808 is too large: at most"),
            ({"compress": True}, "raw.zst"),
            ({"backing": BackingReference("base.raw", "raw")}, "backing"),
            ({"sparse_nbytes": 1000}, "-S"),
            ({"sparse_nbytes": -512}, "-S"),
        ],
    )
    def test_refused(self, changes: dict[str, Any], words: str) -> None:
        for function in (DRIVER.writer, lambda request: DRIVER.measure(request, 0)):
            with pytest.raises(OptionError, match=words):
                function(request(**changes))

    def test_measure(self) -> None:
        measured = DRIVER.measure(request(), 65536)
        assert (measured.required, measured.fully_allocated) == (MIB, MIB)


@pytest.mark.parametrize("in_place", [False, True], ids=["new", "in-place"])
@pytest.mark.parametrize("image", images.RAW_IMAGES[:-1], ids=lambda image: image.name)
def test_copy_through_the_engine(tmp_path: Path, image: images.RawImage, in_place: bool) -> None:
    """Reader, engine and writer together, also in place over old data."""
    source, path = tmp_path / "source.raw", tmp_path / "target.raw"
    image.write(source)
    if in_place:
        path.write_bytes(b"\xff" * image.virtual_size)
    reader = open_raw(source)
    writer = DRIVER.writer(request(image.virtual_size))
    with Target(path, in_place=in_place) as target:
        data_file = writer.begin(target)
        job = Job(
            sources=[(reader.file.core, reader.file.nbytes, 0, 0)],
            geometry=writer.geometry.over_old_bytes if in_place else writer.geometry,
            target=data_file.core,
            threads=2,
        )
        for batch in reader.extents(0, image.virtual_size):
            start = int(batch["guest_offset"][0])
            end = int(batch["guest_offset"][-1] + batch["length"][-1])
            job.run(start, end, batch)
        job.close()
        writer.finish(0)
        target.commit()
    reader.close()
    assert path.read_bytes() == source.read_bytes()
