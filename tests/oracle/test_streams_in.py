"""Disks that come through real pipes, and what other programs read of the images."""

from __future__ import annotations

import gzip
import http.server
import lzma
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from tests.helpers import qemu
from tests.helpers.command import imgcore
from tests.helpers.images import SEED, noise, text
from tests.helpers.qemu import Variant

KIB, MIB = 1 << 10, 1 << 20

VARIANTS = (
    *qemu.VARIANTS,
    qemu.QCOW2.with_options("cluster_size=512"),
    qemu.QCOW2.with_options("cluster_size=2M"),
    qemu.QCOW2.with_options("compat=0.10"),
    qemu.QCOW2_ZLIB.with_options("cluster_size=4k"),
    qemu.VMDK_SPARSE.with_options("grain_size=8k"),
    qemu.VMDK_STREAM.with_options("grain_size=128k"),
)
# Sizes of a raw disk: in whole blocks of most formats, in whole sectors, and in none.
SIZES = (32 * MIB, 32 * MIB + 3 * 512, 32 * MIB + 700)


def content(nbytes: int) -> bytes:
    """Return data of several kinds, and zeros at several places."""
    disk = bytearray(nbytes)
    for start, piece in (
        (0, text(1 * MIB + 700)),
        (3 * MIB + 4096, noise(2 * MIB)),
        (12 * MIB + 512, text(70_000)),
        (20 * MIB - 1024, noise(3 * MIB)),
        (nbytes - 5 * 512 - 100, text(2000)),
    ):
        disk[start : start + len(piece)] = piece
    return bytes(disk)


def zstd_frames(disk: bytes) -> bytes:
    """Return several frames, one of which does not state its size, and padding."""
    sized, unsized = zstandard.ZstdCompressor(), zstandard.ZstdCompressor().compressobj()
    rest = unsized.compress(disk[5 * MIB :]) + unsized.flush()
    skippable = b"\x5a\x2a\x4d\x18\x07\x00\x00\x00comment"
    return sized.compress(disk[: 5 * MIB]) + skippable + rest + bytes(1000)


ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "raw": bytes,
    "raw.zst": zstd_frames,
    "raw.gz": lambda disk: gzip.compress(disk[:MIB], 1) + gzip.compress(disk[MIB:], 1) + bytes(9),
    "raw.xz": lambda disk: (
        lzma.compress(disk[:MIB], preset=0) + bytes(8) + lzma.compress(disk[MIB:], preset=0)
    ),
}


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"size{size % MIB}")
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "disk.raw"
    path.write_bytes(content(request.param))
    return path


@pytest.fixture(scope="module")
def odd_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("odd") / "disk.raw"
    path.write_bytes(content(SIZES[2]))
    return path


def poured(stream: bytes, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run imgcore with a stream on its stdin, in pieces of random sizes."""
    chance = random.Random(SEED + len(stream))
    command = [sys.executable, "-m", "imgcore", *map(os.fspath, words)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None

        def pour() -> None:
            at, writer = 0, process.stdin.fileno()  # type: ignore[union-attr]
            try:
                while at < len(stream):
                    piece = chance.choice((1, 511, 4096, 65_536, 300_000, MIB))
                    at += os.write(writer, stream[at : at + piece])
            except BrokenPipeError:
                pass
            finally:
                process.stdin.close()  # type: ignore[union-attr]

        thread = threading.Thread(target=pour)
        thread.start()
        assert process.stdout is not None
        assert process.stderr is not None
        out, err = process.stdout.read(), process.stderr.read()
        thread.join()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def words_of(variant: Variant) -> list[str]:
    words = ["-O", variant.format, *(["-c"] if variant.compress else [])]
    for option in (*variant.options, *variant.own_options):
        words += ["-o", option]
    return words


def assert_reads_the_same(disk: Path, image: Path, variant: Variant) -> None:
    nbytes = disk.stat().st_size
    padded = image.with_name("padded.raw")
    shutil.copyfile(disk, padded)
    os.truncate(padded, nbytes + -nbytes % 512)
    if variant.format == "raw":
        assert image.read_bytes() == disk.read_bytes()
        return
    qemu.assert_same(padded, image, source_format="raw", target_format=variant.format)
    if variant.format in ("qcow2", "vmdk", "vhdx", "vdi") and "Flat" not in variant.name:
        qemu.assert_check_clean(image, variant.format)
    if "lat" not in variant.name and variant.name != "vhd-fixed":
        checked = imgcore("check", "-f", variant.format, image)
        assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_raw_from_a_pipe(variant: Variant, disk: Path, tmp_path: Path) -> None:
    image = tmp_path / f"disk{variant.suffix}"
    done = poured(disk.read_bytes(), "convert", "-f", "raw", "-q", *words_of(variant), "-", image)
    assert done.returncode == 0, done.stderr
    assert_reads_the_same(disk, image, variant)
    assert os.listdir(tmp_path) != []


@pytest.mark.parametrize(("encoding", "threads"), list(zip(ENCODINGS, "1231", strict=True)))
@pytest.mark.parametrize(
    "variant", [qemu.RAW, qemu.QCOW2, qemu.QCOW2_ZSTD, qemu.VMDK_STREAM], ids=lambda v: v.name
)
def test_compressed_streams(
    variant: Variant, encoding: str, threads: str, odd_disk: Path, tmp_path: Path
) -> None:
    image = tmp_path / f"disk{variant.suffix}"
    stream = ENCODINGS[encoding](odd_disk.read_bytes())
    words = ["convert", "-f", encoding, "-q", "--threads", threads, *words_of(variant)]
    done = poured(stream, *words, "-", image)
    assert done.returncode == 0, done.stderr
    assert_reads_the_same(odd_disk, image, variant)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_a_stated_size_gives_the_bytes_of_a_file(
    variant: Variant, odd_disk: Path, tmp_path: Path
) -> None:
    image, same = tmp_path / f"disk{variant.suffix}", tmp_path / "same" / f"disk{variant.suffix}"
    same.parent.mkdir()
    words = ["convert", "-f", "raw", "-q", *words_of(variant)]
    if variant.format == "vdi":
        words += ["-o", "modification_uuid=6f9619ff-8b86-d011-b42d-00c04fc964fe"]
    size = str(odd_disk.stat().st_size)
    done = poured(odd_disk.read_bytes() + bytes(5000), *words, "--size", size, "-", image)
    assert done.returncode == 0, done.stderr
    assert imgcore(*words, odd_disk, same).returncode == 0
    assert image.read_bytes() == same.read_bytes()


@pytest.mark.parametrize("variant", [qemu.RAW, qemu.QCOW2, qemu.VHD_FIXED], ids=lambda v: v.name)
def test_fixed_vhd(variant: Variant, tmp_path: Path) -> None:
    disk, vhd = tmp_path / "disk.raw", tmp_path / "source.vhd"
    disk.write_bytes(content(SIZES[1]))
    qemu.convert(disk, vhd, qemu.VHD_FIXED)
    image = tmp_path / f"disk{variant.suffix}"
    stream = vhd.read_bytes()
    assert len(stream) == SIZES[1] + 512
    words = ["convert", "-f", "vhd", "-q", "--force", *words_of(variant)]
    done = poured(stream, *words, "-", image)
    assert done.returncode == 0, done.stderr
    assert_reads_the_same(disk, image, variant)
    done = poured(stream + bytes(MIB), *words, "--size", str(SIZES[1]), "-", image)
    assert done.returncode == 0, done.stderr
    assert_reads_the_same(disk, image, variant)


@pytest.mark.parametrize("suffix", ["zst", "gz"])
def test_from_stream_to_stream(suffix: str, odd_disk: Path, tmp_path: Path) -> None:
    packed, image = tmp_path / f"disk.raw.{suffix}", tmp_path / "disk.raw"
    stream = ENCODINGS["raw.xz"](odd_disk.read_bytes())
    done = poured(stream, "convert", "-f", "raw.xz", "-q", "-", packed)
    assert done.returncode == 0, done.stderr
    program = {"zst": "zstd", "gz": "gzip"}[suffix]
    with open(image, "wb") as file, open(packed, "rb") as source:
        subprocess.run([program, "-dc"], stdin=source, stdout=file, check=True)
    assert image.read_bytes() == odd_disk.read_bytes()
    assert imgcore("checksum", "-f", "raw", odd_disk).stdout.split()[0] in (
        poured(packed.read_bytes(), "checksum", "-f", f"raw.{suffix}", "-").stdout
    )


class TestShort:
    """What ends too early, or goes on, is never a success."""

    @pytest.mark.parametrize("target", ["qcow2", "raw.zst"])
    @pytest.mark.parametrize("encoding", ["raw.zst", "raw.gz", "raw.xz"])
    def test_every_truncation(self, encoding: str, target: str, tmp_path: Path) -> None:
        stream = ENCODINGS[encoding](content(6 * MIB)).rstrip(b"\0")
        chance = random.Random(SEED)
        cuts = [1, 5, len(stream) - 1, *(chance.randrange(len(stream)) for _ in range(3))]
        for cut in cuts:
            done = poured(
                stream[:cut], "convert", "-f", encoding, "-q", "-", tmp_path / f"a.{target}"
            )
            assert done.returncode == 1, (cut, done.stderr)
            assert done.stderr.startswith("imgcore: stdin: "), done.stderr
            assert len(done.stderr.splitlines()) == 1
            assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("encoding", ["raw.zst", "raw.gz", "raw.xz"])
    def test_more_than_zeros_behind_it(self, encoding: str, tmp_path: Path) -> None:
        stream = ENCODINGS[encoding](content(6 * MIB)).rstrip(b"\0")
        for tail in (b"x", bytes(12_000) + b"x", b"text" * 100_000):
            done = poured(stream + tail, "convert", "-f", encoding, "-q", "-", tmp_path / "a.raw")
            assert done.returncode == 1, (tail[-4:], done.stderr)
            assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("cut", [-1, -511, -512, -513, -MIB])
    def test_fixed_vhd(self, cut: int, tmp_path: Path) -> None:
        disk, vhd = tmp_path / "disk.raw", tmp_path / "source.vhd"
        disk.write_bytes(content(SIZES[1]))
        qemu.convert(disk, vhd, qemu.VHD_FIXED)
        stream = vhd.read_bytes()[:cut]
        done = poured(stream, "convert", "-f", "vhd", "-q", "-", tmp_path / "a.qcow2")
        assert done.returncode == 1
        # Old programs wrote footers of 511 bytes.
        assert ("the footer states" if cut == -1 else "without the footer") in done.stderr
        assert sorted(os.listdir(tmp_path)) == ["disk.raw", "source.vhd"]

    @pytest.mark.parametrize("target", ["raw", "qcow2", "raw.gz", "vdi"])
    @pytest.mark.parametrize(
        ("nbytes", "words"),
        [(MIB - 1, "ends after 1048575 bytes"), (MIB + 1, "goes on after its end, at 0x100000")],
    )
    def test_against_a_stated_size(
        self, nbytes: int, words: str, target: str, tmp_path: Path
    ) -> None:
        stream = noise(nbytes)
        path = tmp_path / f"a.{target}"
        done = poured(stream, "convert", "-f", "raw", "-q", "--size", "1M", "-", path)
        assert done.returncode == 1
        assert words in done.stderr
        assert os.listdir(tmp_path) == []

    def test_nothing(self, tmp_path: Path) -> None:
        done = poured(b"", "convert", "-f", "raw", "-q", "-", tmp_path / "a.qcow2")
        assert (done.returncode, os.listdir(tmp_path)) == (1, [])
        assert "the stream is empty" in done.stderr

    def test_less_than_a_footer(self, tmp_path: Path) -> None:
        done = poured(b"abcd", "convert", "-f", "vhd", "-q", "-", tmp_path / "a.qcow2")
        assert (done.returncode, os.listdir(tmp_path)) == (1, [])
        assert "the stream ends before its disk begins" in done.stderr

    def test_a_closed_standard_input(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "imgcore", "convert", "-f", "raw", "-", "a.raw"]
        line = ["sh", "-c", '"$@" <&-', "sh", *command]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, os.listdir(tmp_path)) == (1, [])
        assert "stdin: is closed" in done.stderr


class TestFiles:
    """A file as the standard input."""

    def test_from_its_start(self, odd_disk: Path, tmp_path: Path) -> None:
        source, image = tmp_path / "a.qcow2", tmp_path / "a.vmdk"
        assert imgcore("convert", "-f", "raw", odd_disk, source).returncode == 0
        command = [sys.executable, "-m", "imgcore", "convert", "-f", "qcow2", "-", str(image)]
        with open(source, "rb") as file:
            subprocess.run(command, stdin=file, check=True)
        assert_reads_the_same(odd_disk, image, qemu.VMDK_SPARSE)

    @pytest.mark.parametrize("form", ["raw", "raw.zst"])
    def test_from_its_position(self, form: str, odd_disk: Path, tmp_path: Path) -> None:
        source, image = tmp_path / "a", tmp_path / "a.qcow2"
        source.write_bytes(b"h" * 1234 + ENCODINGS[form](odd_disk.read_bytes()))
        command = [sys.executable, "-m", "imgcore", "convert", "-f", form, "-", str(image)]
        with open(source, "rb") as file:
            os.lseek(file.fileno(), 1234, os.SEEK_SET)
            subprocess.run(command, stdin=file, check=True)
        assert_reads_the_same(odd_disk, image, qemu.QCOW2)


class Server(http.server.ThreadingHTTPServer):
    """Serves one body on loopback, and may break off."""

    body = b""
    sent_nbytes: int | None = None


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        self.send_response(200)
        self.send_header("Content-Length", str(len(server.body)))
        self.end_headers()
        self.wfile.write(server.body[: server.sent_nbytes])

    def log_message(self, *_: object) -> None:
        """Keep the output of the tests clean."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
class TestDownloads:
    def download(self, server: Server, words: str) -> subprocess.CompletedProcess[str]:
        url = f"http://127.0.0.1:{server.server_address[1]}/disk"
        line = f"set -o pipefail; curl -sS {url} | {sys.executable} -m imgcore {words}"
        return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)

    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_a_body(self, encoding: str, server: Server, odd_disk: Path, tmp_path: Path) -> None:
        server.body = ENCODINGS[encoding](odd_disk.read_bytes())
        done = self.download(server, f"convert -q -f {encoding} - {tmp_path / 'disk.qcow2'}")
        assert done.returncode == 0, done.stderr
        assert_reads_the_same(odd_disk, tmp_path / "disk.qcow2", qemu.QCOW2)

    @pytest.mark.parametrize("encoding", ["raw.zst", "raw.gz", "raw.xz"])
    def test_a_broken_one(
        self, encoding: str, server: Server, odd_disk: Path, tmp_path: Path
    ) -> None:
        server.body = ENCODINGS[encoding](odd_disk.read_bytes())
        server.sent_nbytes = len(server.body) * 9 // 10
        done = self.download(server, f"convert -q -f {encoding} - {tmp_path / 'disk.qcow2'}")
        assert done.returncode != 0
        assert "ends too early" in done.stderr
        assert os.listdir(tmp_path) == []
