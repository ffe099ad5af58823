"""Sparse files in old GNU tar archives, read by Python's tarfile and GNU tar."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from tests.helpers import images

from imgcore.streams.tar import Member, archive_end, parse_header, sparse_header

GIB = 1 << 30
KIB64 = 1 << 16


def archive(nbytes: int, segments: list[tuple[int, int]]) -> tuple[bytes, dict[int, bytes]]:
    """Return an archive, and the content of its segments by offset."""
    data = {offset: images.noise(length, offset + 1) for offset, length in segments}
    body = sparse_header("disk.raw", nbytes, segments) + b"".join(data.values())
    return body + archive_end(len(body)), data


CASES = {
    "empty": (GIB, []),
    "whole": (KIB64, [(0, KIB64)]),
    "start": (GIB, [(0, KIB64)]),
    "end": (GIB, [(GIB - KIB64, KIB64)]),
    "three": (GIB, [(i * KIB64 * 2, KIB64) for i in range(3)]),
    "four-and-end": (GIB, [(i * KIB64 * 2, 512) for i in range(4)]),
    "full-extension": (GIB, [(i * KIB64 * 2, 512) for i in range(24)]),
    "extensions": (GIB, [(i * KIB64 * 2, 512) for i in range(70)]),
    "base-256": (20 * GIB, [(9 * GIB, KIB64), (19 * GIB, 512)]),
}
each_case = pytest.mark.parametrize(("nbytes", "segments"), CASES.values(), ids=list(CASES))


@each_case
def test_tarfile_reads_it(nbytes: int, segments: list[tuple[int, int]]) -> None:
    raw, data = archive(nbytes, segments)
    assert len(raw) % 10240 == 0
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        (member,) = tar.getmembers()
        assert (member.name, member.size, member.type) == ("disk.raw", nbytes, b"S")
        assert (member.mtime, member.uid, member.uname) == (0, 0, "")
        content = tar.extractfile(member)
        assert content is not None
        for offset, piece in data.items():
            content.seek(offset)
            assert content.read(len(piece)) == piece


@each_case
def test_gnu_tar_unpacks_it(nbytes: int, segments: list[tuple[int, int]], tmp_path: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("tar is not installed")
    raw, data = archive(nbytes, segments)
    (tmp_path / "a.tar").write_bytes(raw)
    done = subprocess.run(
        ["tar", "-xf", "a.tar"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    path = tmp_path / "disk.raw"
    assert path.stat().st_size == nbytes
    assert path.stat().st_blocks * 512 <= sum(length for _, length in segments) + (1 << 20)
    with path.open("rb") as file:
        for offset, piece in data.items():
            file.seek(offset)
            assert file.read(len(piece)) == piece


@each_case
def test_header_there_and_back(nbytes: int, segments: list[tuple[int, int]]) -> None:
    header = sparse_header("disk.raw", nbytes, segments)
    assert parse_header(header[:512]) == Member("disk.raw", nbytes, True, True)


@pytest.mark.parametrize(
    ("form", "is_old_gnu"), [(tarfile.GNU_FORMAT, True), (tarfile.USTAR_FORMAT, False)]
)
def test_header_of_tarfile(form: int, is_old_gnu: bool) -> None:
    info = tarfile.TarInfo("other.raw")
    info.size = 12345
    assert parse_header(info.tobuf(form)) == Member("other.raw", 12345, is_old_gnu, False)


@pytest.mark.parametrize("block", [b"", bytes(512), b"x" * 512, b"\xff" * 512, bytes(511)])
def test_no_header(block: bytes) -> None:
    assert parse_header(block) is None


def test_damaged_header() -> None:
    header = bytearray(sparse_header("disk.raw", GIB, []))
    header[0] ^= 1
    assert parse_header(bytes(header[:512])) is None
