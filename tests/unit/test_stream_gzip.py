"""gzip written by several threads is one member, which zlib and gzip can read."""

from __future__ import annotations

import gzip
import threading
import zlib
from pathlib import Path

import pytest
from tests.helpers import images, qemu

import imgcore
from imgcore.files.target import Target
from imgcore.streams import gzip as gzip_stream
from imgcore.streams.gzip import GzipEncoder

MIB = 1 << 20


def written(path: Path, pieces: list[bytes], threads: int = 2) -> bytes:
    with Target(path, sync=False) as target:
        with GzipEncoder(target.main, threads) as sink:
            for piece in pieces:
                sink.write(piece)
            sink.finish()
        target.commit()
    return path.read_bytes()


@pytest.mark.parametrize("nbytes", [0, 1, MIB - 1, MIB, MIB + 1, 5 * MIB + 777])
def test_there_and_back(tmp_path: Path, nbytes: int) -> None:
    data = images.text(nbytes)
    raw = written(tmp_path / "a.gz", [data])
    assert gzip.decompress(raw) == data
    member = zlib.decompressobj(31)
    member.decompress(raw)
    assert member.eof
    assert not member.unused_data, "more than one member"


@pytest.mark.parametrize("cut", [1, 1000, MIB - 1, MIB, 3 * MIB])
def test_neither_cuts_nor_threads_change_a_byte(tmp_path: Path, cut: int) -> None:
    data = images.text(4 * MIB) if cut > 1 else images.text(5000)
    pieces = [data[i : i + cut] for i in range(0, len(data), cut)]
    found = {written(tmp_path / f"{n}.gz", pieces, n) for n in (1, 2, 7)}
    assert found == {written(tmp_path / "whole.gz", [data], 2)}


def test_nearly_as_small_as_in_one_piece(tmp_path: Path) -> None:
    data = images.text(6 * MIB)
    assert len(written(tmp_path / "a.gz", [data])) < 1.01 * len(gzip.compress(data, 6))


def test_leaving_in_the_middle_ends_the_threads(tmp_path: Path) -> None:
    with Target(tmp_path / "a.gz", sync=False) as target:
        with pytest.raises(KeyboardInterrupt), GzipEncoder(target.main, 2) as sink:
            sink.write(images.noise(8 * MIB))
            raise KeyboardInterrupt
        assert not [t for t in threading.enumerate() if t.name.startswith("imgcore-gzip")]
    assert not (tmp_path / "a.gz").exists()


def test_failure_in_a_thread_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(gzip_stream, "_deflate", fail)
    with pytest.raises(MemoryError):
        written(tmp_path / "a.gz", [bytes(3 * MIB)])


def test_raw_gz_is_gzip(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    images.SPARSE.write(raw)
    target = tmp_path / "disk2.raw.gz"
    imgcore.convert(raw, target, format="raw", sync=False)
    assert gzip.decompress(target.read_bytes()) == raw.read_bytes()
    back = tmp_path / "back.qcow2"
    imgcore.convert(target, back, sync=False)
    qemu.assert_same(raw, back, source_format="raw", target_format="qcow2")
