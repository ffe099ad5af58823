"""Compressed raw disks as streams."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from tests.helpers import images

from imgcore.errors import (
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    WrongFormatError,
)
from imgcore.files.target import Target
from imgcore.streams.feeder import MIN_BUFFERS
from imgcore.streams.reader import StreamReader
from imgcore.streams.zstd import ZstdDecoder, ZstdEncoder

DATA = images.noise(300_032) + bytes(1 << 20) + images.text(700_928) + bytes(512)
CHUNKS = [512, 65536, 1_000_000, 64 << 20]

PIECES = [DATA[:300_032], DATA[300_032:1_000_000], b"", DATA[1_000_000:]]


def zstd(data: bytes, *, size: bool = True, checksum: bool = True, level: int = 3) -> bytes:
    compressor = zstandard.ZstdCompressor(
        level=level, write_content_size=size, write_checksum=checksum
    )
    if size:
        return compressor.compress(data)
    stream = compressor.compressobj()
    return stream.compress(data) + stream.flush()


SKIPPABLE = b"\x5a\x2a\x4d\x18\x07\x00\x00\x00comment"

ENCODINGS: dict[str, Callable[[], bytes]] = {
    "zstd": lambda: zstd(DATA),
    "zstd-unknown-size": lambda: zstd(DATA, size=False),
    "zstd-no-checksum": lambda: zstd(DATA, checksum=False),
    "zstd-frames": lambda: b"".join(map(zstd, PIECES)),
    "zstd-frames-mixed": lambda: zstd(PIECES[0] + PIECES[1]) + zstd(PIECES[3], size=False),
    "zstd-skippable": lambda: (
        SKIPPABLE + zstd(DATA[:512]) + SKIPPABLE + zstd(DATA[512:]) + SKIPPABLE
    ),
    "zstd-size-of-2-bytes": lambda: zstd(DATA[:1024]) + zstd(DATA[1024:]),
    "gzip": lambda: gzip.compress(DATA, 1),
    "gzip-members": lambda: b"".join(map(gzip.compress, PIECES)),
    "gzip-padded": lambda: gzip.compress(DATA, 1) + bytes(1000),
}


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "imgcore-stream"]


def digest(source: StreamReader, chunk_nbytes: int) -> str:
    total = hashlib.sha256()
    for chunk in source.read_chunks(chunk_nbytes):
        total.update(chunk)
    return total.hexdigest()


@pytest.mark.parametrize("chunk_nbytes", CHUNKS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_read(tmp_path: Path, encoding: str, chunk_nbytes: int) -> None:
    path = tmp_path / "disk.raw.zst"
    path.write_bytes(ENCODINGS[encoding]())
    with StreamReader.open(path) as source:
        assert source.virtual_size == len(DATA)
        assert source.codec == encoding[:4]
        for _ in range(2):  # each reading starts from the first byte
            assert digest(source, chunk_nbytes) == hashlib.sha256(DATA).hexdigest()


def test_chunks_have_the_size_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.raw.zst").write_bytes(zstd(DATA))
    with StreamReader.open(tmp_path / "a.raw.zst") as source:
        sizes = [len(chunk) for chunk in source.read_chunks(65536)]
    assert set(sizes[:-1]) == {65536}
    assert sizes[-1] == len(DATA) % 65536
    with StreamReader.open(tmp_path / "a.raw.zst") as source, pytest.raises(ValueError):
        next(source.read_chunks(0))


@pytest.mark.parametrize("encode", [zstd, gzip.compress], ids=["zstd", "gzip"])
def test_empty(tmp_path: Path, encode: Callable[[bytes], bytes]) -> None:
    (tmp_path / "a").write_bytes(encode(b""))
    with StreamReader.open(tmp_path / "a") as source:
        assert source.virtual_size == 0
        assert list(source.read_chunks(4096)) == []


@pytest.mark.parametrize("tail", [bytes(5000), b"x"])
def test_the_advice_for_what_follows_zstd(tmp_path: Path, tail: bytes) -> None:
    packed = zstd(DATA)
    path = tmp_path / "a.raw.zst"
    path.write_bytes(packed + tail)
    with pytest.raises(CorruptImageError) as error:
        StreamReader.open(path)
    assert f"is followed by {len(tail)} other bytes" in str(error.value)
    advice = str(error.value).split("(")[1].split(" of a copy")[0]
    subprocess.run([*advice.split(), str(path)], check=True)
    assert path.read_bytes() == packed


class TestBroken:
    def refuse(
        self,
        path: Path,
        data: bytes,
        words: str = ": ",
        error: type[ImgcoreError] = CorruptImageError,
    ) -> None:
        path.write_bytes(data)
        with pytest.raises(error, match=words) as caught, StreamReader.open(path) as source:
            digest(source, 65536)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_truncated(self, tmp_path: Path, encoding: str) -> None:
        data = ENCODINGS[encoding]()
        whole = len(data.rstrip(b"\0")) if encoding == "gzip-padded" else len(data)
        for cut in (whole - 1, whole - 5, whole // 2, 300_000, 20, 5):
            path = tmp_path / "disk.raw.zst"
            path.write_bytes(data[:cut])
            # A cut between two frames leaves a valid, shorter stream.
            with pytest.raises(CorruptImageError), StreamReader.open(path) as source:
                digest(source, 1 << 20)

    @pytest.mark.parametrize("encoding", ["zstd", "zstd-unknown-size", "gzip"])
    @pytest.mark.parametrize("tail", [b"x", b"garbage " * 1000, b"\0\0\0x"])
    def test_garbage_behind(self, tmp_path: Path, encoding: str, tail: bytes) -> None:
        self.refuse(
            tmp_path / "a.raw.gz", ENCODINGS[encoding]() + tail, "garbage|too early|followed by"
        )

    def test_garbage_after_padding(self, tmp_path: Path) -> None:
        data = gzip.compress(DATA) + bytes(10) + gzip.compress(DATA)
        self.refuse(tmp_path / "a.raw.gz", data, "garbage")

    @pytest.mark.parametrize("encoding", ["zstd", "zstd-unknown-size", "gzip"])
    def test_flipped_bit(self, tmp_path: Path, encoding: str) -> None:
        data = bytearray(ENCODINGS[encoding]())
        data[250_000] ^= 1  # in stored noise: only the checksum finds it
        self.refuse(tmp_path / "a", bytes(data), "stream is broken")

    @pytest.mark.parametrize("data", [b"", b"\x28\xb5", b"plain text", bytes(4096)])
    def test_no_stream(self, tmp_path: Path, data: bytes) -> None:
        self.refuse(tmp_path / "a.raw.zst", data, "neither a zstd nor a gzip", WrongFormatError)

    def test_only_skippable(self, tmp_path: Path) -> None:
        self.refuse(tmp_path / "a.raw.zst", SKIPPABLE, "no frame")

    @pytest.mark.parametrize("encode", [zstd, gzip.compress], ids=["zstd", "gzip"])
    def test_odd_size(self, tmp_path: Path, encode: Callable[[bytes], bytes]) -> None:
        path = tmp_path / "a.raw.zst"
        path.write_bytes(encode(b"x" * 1000))
        with StreamReader.open(path) as reader:
            assert reader.virtual_size == 1000
            assert b"".join(map(bytes, reader.read_chunks(512))) == b"x" * 1000

    def test_claims_more_than_it_can_hold(self, tmp_path: Path) -> None:
        data = bytearray(zstd(DATA, checksum=False))
        assert data[4] >> 6 == 2  # a size of four bytes, after the window descriptor
        place = 5 if data[4] & 0x20 else 6
        data[place : place + 4] = (0xFFFFFE00).to_bytes(4, "little")
        self.refuse(tmp_path / "a.raw.zst", bytes(data), "claims 4294966784 bytes")

    def test_claims_another_size(self, tmp_path: Path) -> None:
        data = bytearray(zstd(DATA, checksum=False))
        place = 5 if data[4] & 0x20 else 6
        data[place : place + 4] = (len(DATA) - 512).to_bytes(4, "little")
        self.refuse(tmp_path / "a.raw.zst", bytes(data))

    @pytest.mark.parametrize(
        ("place", "value", "words"),
        [(4, 0x28, "reserved bit"), (6, 0x07, "no known type")],
    )
    def test_reserved(self, tmp_path: Path, place: int, value: int, words: str) -> None:
        data = bytearray(b"\x28\xb5\x2f\xfd\x20\x00\x01\x00\x00")
        data[place] = value
        self.refuse(tmp_path / "a.raw.zst", bytes(data), words)

    def test_window_too_large(self, tmp_path: Path) -> None:
        parameters = zstandard.ZstdCompressionParameters(
            window_log=28, write_content_size=False, write_checksum=False
        )
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        data = stream.compress(bytes(4096)) + stream.flush()
        self.refuse(tmp_path / "a.raw.zst", data, "128 MiB", LimitExceededError)

    def test_window_as_large_as_allowed(self, tmp_path: Path) -> None:
        parameters = zstandard.ZstdCompressionParameters(window_log=27, write_content_size=False)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        (tmp_path / "a").write_bytes(stream.compress(DATA) + stream.flush())
        with StreamReader.open(tmp_path / "a") as source:
            assert source.virtual_size == len(DATA)

    def test_fifo(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.raw.zst")
        with pytest.raises(ImgcoreError, match="is a pipe"):
            StreamReader.open(tmp_path / "a.raw.zst")

    def test_file_changes_between_count_and_reading(self, tmp_path: Path) -> None:
        path = tmp_path / "a.raw.gz"
        path.write_bytes(gzip.compress(DATA))
        with StreamReader.open(path) as source:
            path.write_bytes(gzip.compress(DATA[:-512])[: source.file.nbytes])
            with pytest.raises(ImgcoreError):
                digest(source, 65536)
            with pytest.raises(ImgcoreError, match="changed"):
                source.file.check_unchanged()

    def test_more_than_the_size_says(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(zstd(DATA))
        with StreamReader.open(tmp_path / "a") as source:
            source.virtual_size -= 512
            with pytest.raises(CorruptImageError, match="more than"):
                digest(source, 65536)
            source.virtual_size += 1024
            with pytest.raises(CorruptImageError, match="fewer than"):
                digest(source, 65536)


class TestThread:
    """It always ends, whatever the consumer does (the fixture checks it, too)."""

    def test_closed_early(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(zstd(DATA * 4))
        with StreamReader.open(tmp_path / "a") as source:
            for n_taken in range(4):
                chunks = source.read_chunks(65536)
                for _ in range(n_taken):
                    next(chunks)
                chunks.close()

    def test_consumer_fails(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(zstd(DATA * 4))
        with StreamReader.open(tmp_path / "a") as source:
            with pytest.raises(KeyboardInterrupt):
                for _ in source.read_chunks(65536):
                    raise KeyboardInterrupt

    def test_at_most_its_buffers_ahead(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a").write_bytes(zstd(DATA))
        filled: list[int] = []
        fill = ZstdDecoder.fill

        def count(decoder: ZstdDecoder, view: memoryview) -> int:
            filled.append(len(view))
            return fill(decoder, view)

        monkeypatch.setattr(ZstdDecoder, "fill", count)
        with StreamReader.open(tmp_path / "a") as source:
            for i, _ in enumerate(source.read_chunks(65536)):
                assert len(filled) <= i + MIN_BUFFERS


class TestSink:
    def write(self, path: Path, data: bytes, step: int = 100_000, **options: int) -> None:
        with Target(path, force=True, sync=False) as target:
            sink = ZstdEncoder(target.main, len(data), **options)
            for start in range(0, len(data), step):
                sink.write(memoryview(data)[start : start + step])
            sink.finish()
            assert target.main.nbytes == sink.written_nbytes
            target.commit()

    @pytest.mark.parametrize("data", [DATA, b"", bytes(512)], ids=["data", "empty", "sector"])
    def test_round_trip(self, tmp_path: Path, data: bytes) -> None:
        path = tmp_path / "disk.raw.zst"
        self.write(path, data)
        with StreamReader.open(path) as source:
            assert source.virtual_size == len(data)
            assert digest(source, 65536) == hashlib.sha256(data).hexdigest()
        parameters = zstandard.get_frame_parameters(path.read_bytes())
        assert (parameters.content_size, parameters.has_checksum) == (len(data), True)

    def test_same_bytes_for_any_number_of_threads(self, tmp_path: Path) -> None:
        data = images.text(20 << 20)
        found = set()
        for threads, step in ((1, 1 << 20), (2, 3 << 20), (8, 777_777)):
            self.write(tmp_path / "a", data, step, threads=threads)
            found.add((tmp_path / "a").read_bytes())
        assert len(found) == 1

    def test_wrong_amount(self, tmp_path: Path) -> None:
        with Target(tmp_path / "a") as target:
            sink = ZstdEncoder(target.main, 1024)
            sink.write(bytes(512))
            with pytest.raises(ValueError, match="512 of 1024"):
                sink.finish()
            with pytest.raises(ValueError, match="more than"):
                sink.write(bytes(513))

    def test_write_error_names_the_target(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(OSError) as caught:
            self.write(tmp_path / "a", DATA)
        assert caught.value.filename == str(tmp_path / "a")
        assert os.listdir(tmp_path) == []
