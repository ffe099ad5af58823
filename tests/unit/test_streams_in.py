"""Disks that are read from streams: objects, faults, cancelling, memory, options."""

from __future__ import annotations

import errno
import gzip
import io
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from tests.helpers.dripping import piped
from tests.helpers.images import MIB, noise

import imgcore
from imgcore.disk import late_end
from imgcore.errors import ConversionCancelled, CorruptImageError, OptionError, WrongFormatError

DISK = noise(3 * MIB) + bytes(MIB) + noise(100_352)
FORMATS = ("raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi")
IDENTITIES = {
    "vmdk": {"cid": "12345678"},
    "vdi": dict.fromkeys(("uuid", "modification_uuid"), "6f9619ff-8b86-d011-b42d-00c04fc964fe"),
}


class Faulty(io.RawIOBase):
    """Gives a stream in pieces of 100 KiB, and fails or ends at the Nth."""

    def __init__(self, stream: bytes, n: int, error: OSError | None) -> None:
        self._file = io.BytesIO(stream)
        self._left = n
        self._error = error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._left -= 1
        if self._left < 0:
            if self._error is None:
                return 0
            raise self._error
        return self._file.readinto(memoryview(buffer)[: 100 << 10])


def read(path: Path) -> bytes:
    with imgcore.open(path) as image:
        return image.read(0, image.virtual_size)


@pytest.mark.parametrize("format", FORMATS)
def test_objects(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"disk.{format}"
    result = imgcore.convert(io.BytesIO(DISK), path, format="raw", checksum="sha256")
    assert read(path) == DISK
    assert result.virtual_size == len(DISK)
    assert result.bytes_data + result.bytes_zero == len(DISK)
    assert result.checksum == imgcore.checksum(path)
    assert imgcore.checksum(io.BytesIO(DISK), format="raw") == result.checksum


@pytest.mark.parametrize("nbytes", [1, 511, 65_536, 65_537, 2 * MIB, 2 * MIB + 1, 4 * MIB])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_the_digest_of_any_size(format: str, nbytes: int, tmp_path: Path) -> None:
    source, path = tmp_path / "source.raw", tmp_path / f"disk.{format}"
    source.write_bytes(DISK[:nbytes])
    digest = imgcore.convert(source, tmp_path / f"file.{format}", checksum="sha256").checksum
    result = imgcore.convert(
        io.BytesIO(DISK[:nbytes]), path, format="raw", checksum="sha256", verify=True
    )
    assert result.checksum == digest
    assert result.verified


def test_a_file_object_at_its_start_is_an_image(tmp_path: Path) -> None:
    source = tmp_path / "disk.qcow2"
    imgcore.convert(io.BytesIO(DISK), source, format="raw")
    with open(source, "rb") as file:
        imgcore.convert(file, tmp_path / "disk.raw", format="qcow2")
        assert not file.closed
    assert (tmp_path / "disk.raw").read_bytes() == DISK


def test_python_decompresses_as_well(tmp_path: Path) -> None:
    (tmp_path / "disk.gz").write_bytes(gzip.compress(DISK, 1))
    with gzip.open(tmp_path / "disk.gz") as file:
        imgcore.convert(file, tmp_path / "disk.raw", format="raw")
    assert (tmp_path / "disk.raw").read_bytes() == DISK


def test_a_socket(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:

        def send() -> None:
            theirs.sendall(DISK)
            theirs.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        imgcore.convert(ours, tmp_path / "disk.qcow2", format="raw")
        thread.join()
    assert read(tmp_path / "disk.qcow2") == DISK


@pytest.mark.parametrize("target", ["raw", "qcow2", "raw.zst", "vmdk"])
@pytest.mark.parametrize("form", ["raw", "raw.zst", "raw.gz"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ECONNRESET, errno.EPIPE])
def test_faults_at_every_read(number: int, form: str, target: str, tmp_path: Path) -> None:
    packed = {"raw": bytes, "raw.zst": zstandard.compress, "raw.gz": gzip.compress}[form](DISK)
    path = tmp_path / f"disk.{target}"
    path.write_bytes(b"old")
    n_reads = len(packed) // (100 << 10) + 1
    for n in (0, 1, 2, n_reads // 2, n_reads - 1, n_reads):
        source = Faulty(packed, n, OSError(number, os.strerror(number)))
        with pytest.raises(OSError, match="<Faulty>") as caught:
            imgcore.convert(source, path, format=form, force=True)
        assert caught.value.errno == number
        assert os.listdir(tmp_path) == [path.name]
        assert path.read_bytes() == b"old"


@pytest.mark.parametrize("form", ["raw.zst", "raw.gz"])
def test_an_end_at_every_read(form: str, tmp_path: Path) -> None:
    packed = {"raw.zst": zstandard.compress, "raw.gz": gzip.compress}[form](DISK)
    for n in range(len(packed) // (100 << 10)):
        with pytest.raises(CorruptImageError):
            imgcore.convert(Faulty(packed, n, None), tmp_path / "a.qcow2", format=form)
        with pytest.raises(CorruptImageError):
            imgcore.checksum(Faulty(packed, n, None), format=form)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("taken", [0, 100_000, 5 * MIB])
def test_a_writer_that_stops_sending_is_cancelled(taken: int, tmp_path: Path) -> None:
    r, w = os.pipe()
    control = imgcore.Control()

    def write() -> None:
        sent = 0
        while sent < taken:
            sent += os.write(w, bytes(min(65_536, taken - sent)))
        time.sleep(0.1)
        control.cancel()

    thread = threading.Thread(target=write)
    thread.start()
    started = time.monotonic()
    with open(r, "rb", buffering=0) as file, pytest.raises(ConversionCancelled):
        # Its descriptor, as the command has it.
        imgcore.convert(
            f"/dev/fd/{file.fileno()}", tmp_path / "a.qcow2", format="raw", control=control
        )
    assert time.monotonic() - started < 30
    thread.join()
    os.close(w)
    assert os.listdir(tmp_path) == []
    names = {thread.name for thread in threading.enumerate()}
    assert "imgcore-stream" not in names


def test_an_object_that_waits_is_left_alone(tmp_path: Path) -> None:
    class Waiting:
        def __init__(self) -> None:
            self.goes_on = threading.Event()

        def read(self, nbytes: int) -> bytes:
            self.goes_on.wait()
            return b""

    source, control = Waiting(), imgcore.Control()
    threading.Timer(0.2, control.cancel).start()
    with pytest.raises(ConversionCancelled):
        imgcore.convert(source, tmp_path / "a.raw", format="raw", control=control)
    assert os.listdir(tmp_path) == []
    source.goes_on.set()
    for thread in threading.enumerate():
        if thread.name == "imgcore-stream":
            thread.join()


def test_the_rate_counts(tmp_path: Path) -> None:
    started = time.monotonic()
    imgcore.convert(io.BytesIO(DISK), tmp_path / "a.qcow2", format="raw", rate="10M")
    assert time.monotonic() - started > 0.3


@pytest.mark.parametrize("form", ["raw.zst", "raw.gz", "raw.xz"])
def test_other_content(form: str, tmp_path: Path) -> None:
    with pytest.raises(imgcore.ImgcoreError):
        imgcore.convert(io.BytesIO(noise(100_000)), tmp_path / "a.raw", format=form)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({}, "use -f raw if it is a raw disk"),
        ({"format": "qcow2"}, "not a qcow2 image: no known magic"),
        ({"format": "raw", "salvage": True}, "is not salvaged"),
        ({"format": "raw", "parent": "a"}, "cannot have a parent"),
        ({"format": "raw", "read_options": {"size": "chs"}}, "has no options for reading"),
        ({"format": "raw", "profile": "gce"}, "--size"),
        ({"format": "raw", "options": ["preallocation=full"], "target_format": "raw"}, "--size"),
        (
            {"format": "raw", "options": ["preallocation=metadata"], "target_format": "qcow2"},
            "--size",
        ),
    ],
)
def test_what_streams_refuse(keywords: dict[str, object], words: str, tmp_path: Path) -> None:
    name = "a.tar.gz" if keywords.get("profile") == "gce" else "a.qcow2"
    name = "a.raw" if keywords.get("target_format") == "raw" else name
    with pytest.raises(imgcore.ImgcoreError, match=words):
        imgcore.convert(io.BytesIO(DISK), tmp_path / name, **keywords)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("codec", [zstandard.compress, gzip.compress])
def test_a_compressed_stream_must_be_stated(
    codec: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    stream = codec(DISK)
    with pytest.raises(imgcore.UnsupportedFeatureError, match="use -f raw"):
        imgcore.convert(io.BytesIO(stream), tmp_path / "a.qcow2")


def test_a_size_is_for_streams_only(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(DISK)
    with pytest.raises(OptionError, match="--size is about a stream"):
        imgcore.convert(tmp_path / "a.raw", tmp_path / "a.qcow2", size="10M")


def test_a_stream_over_a_file(tmp_path: Path) -> None:
    target = tmp_path / "a.raw"
    target.write_bytes(b"\xff" * (len(DISK) + MIB))
    imgcore.convert(io.BytesIO(DISK), target, format="raw", in_place=True)
    assert target.read_bytes() == DISK + b"\xff" * MIB
    with pytest.raises(imgcore.ImgcoreError, match="holds more than"):
        imgcore.convert(io.BytesIO(DISK * 3), target, format="raw", in_place=True)


def test_more_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_end, "_MAX_NBYTES", MIB)
    for name in ("a.raw", "a.qcow2"):
        with pytest.raises(imgcore.LimitExceededError, match="--size"):
            imgcore.convert(io.BytesIO(DISK), tmp_path / name, format="raw")
        imgcore.convert(io.BytesIO(DISK), tmp_path / name, format="raw", size=len(DISK))
        assert read(tmp_path / name) == DISK


def test_profiles_round_up(tmp_path: Path) -> None:
    disk, path = DISK.ljust(20 * MIB + 512, b"\0"), tmp_path / "a.vhd"
    imgcore.convert(io.BytesIO(disk), path, format="raw", profile="azure")
    assert path.stat().st_size == 21 * MIB + 512
    assert path.read_bytes()[: 21 * MIB] == disk.ljust(21 * MIB, b"\0")
    assert not imgcore.lint(path, profile="azure").findings


class TestADescriptor:
    """The engine reads it itself; what it writes is what it writes from an object."""

    @pytest.mark.parametrize("nbytes", [1, 513, 2 * MIB, 3 * MIB + 70_000, len(DISK)])
    @pytest.mark.parametrize("format", FORMATS)
    def test_the_bytes_are_those_from_an_object(
        self, format: str, nbytes: int, tmp_path: Path
    ) -> None:
        content = DISK[len(DISK) - nbytes :]
        keywords: dict[str, Any] = {
            "format": "raw",
            "checksum": "sha256",
            "options": [f"{name}={value}" for name, value in IDENTITIES.get(format, {}).items()],
        }
        theirs = tmp_path / "theirs" / f"a.{format}"
        theirs.parent.mkdir()
        result = imgcore.convert(io.BytesIO(content), theirs, **keywords)
        for threads in (1, 3):
            ours = tmp_path / str(threads) / f"a.{format}"
            ours.parent.mkdir()
            with piped(content) as file:
                name = f"/dev/fd/{file.fileno()}"
                found = imgcore.convert(name, ours, threads=threads, **keywords)
            if format in ("vhd", "vhdx"):
                # They have the time or other random numbers in them.
                assert ours.stat().st_size == theirs.stat().st_size
                assert read(ours) == read(theirs)
            else:
                assert ours.read_bytes() == theirs.read_bytes()
            assert found.checksum == result.checksum
            assert found.virtual_size == result.virtual_size
            assert found.bytes_data + found.bytes_zero == found.virtual_size
            assert found.bytes_read == result.bytes_read == nbytes

    @pytest.mark.parametrize("nbytes", [0, 1, 512, 513, 1024, 70_000 // 512 * 512, 3 * MIB])
    @pytest.mark.parametrize("size", [None, "stated"])
    def test_fixed_vhd(self, nbytes: int, size: str | None, tmp_path: Path) -> None:
        disk = DISK[: nbytes // 512 * 512]
        stated = None if size is None or not disk else len(disk)
        stream = bytes(nbytes)
        if disk:
            vhd = io.BytesIO()
            imgcore.convert(
                io.BytesIO(disk),
                vhd,
                format="raw",
                target_format="vhd",
                options=["subformat=fixed"],
            )
            stream = vhd.getvalue()
        path = tmp_path / "a.qcow2"
        for content in (stream, stream[:-100], stream[: len(stream) // 2]):
            with piped(content) as file:
                name = f"/dev/fd/{file.fileno()}"
                if disk and content is stream:
                    imgcore.convert(name, path, format="vhd", size=stated)
                    assert read(path) == disk
                    path.unlink()
                    continue
                with pytest.raises((CorruptImageError, WrongFormatError)):
                    imgcore.convert(name, path, format="vhd", size=stated)
            assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("in_place", [False, True])
    def test_more_than_there_is_room_for(
        self, in_place: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(late_end, "_MAX_NBYTES", 2 * MIB)
        path = tmp_path / "a.raw"
        for nbytes in (2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 4 * MIB):
            if in_place:
                path.write_bytes(b"x" * 2 * MIB)
            with piped(DISK[:nbytes]) as file:
                name = f"/dev/fd/{file.fileno()}"
                keywords: dict[str, Any] = {"format": "raw", "in_place": in_place}
                keywords["force"] = not in_place
                if nbytes > 2 * MIB:
                    with pytest.raises(imgcore.LimitExceededError, match="--size"):
                        imgcore.convert(name, path, **keywords)
                    continue
                imgcore.convert(name, path, **keywords)
            expected = DISK[:nbytes].ljust(2 * MIB, b"x") if in_place else DISK[:nbytes]
            assert path.read_bytes() == expected

    @pytest.mark.parametrize("threads", [1, 2])
    def test_the_size_is_stated(self, threads: int, tmp_path: Path) -> None:
        path, size = tmp_path / "a.qcow2", 3 * MIB
        for n_zeros, rest in ((0, b""), (5 * MIB, b""), (100, b"x")):
            with piped(DISK[:size] + bytes(n_zeros) + rest) as file:
                name = f"/dev/fd/{file.fileno()}"
                keywords: dict[str, Any] = {"format": "raw", "size": size, "threads": threads}
                if rest:
                    with pytest.raises(CorruptImageError, match=f"at {size + 100:#x}"):
                        imgcore.convert(name, path, **keywords)
                    continue
                imgcore.convert(name, path, **keywords)
            assert read(path) == DISK[:size]
            path.unlink()
        for nbytes in (0, 1, size - 1):
            with (
                piped(DISK[:nbytes]) as file,
                pytest.raises(
                    CorruptImageError, match=f"ends after {nbytes} bytes .* stated as {size}"
                ),
            ):
                imgcore.convert(f"/dev/fd/{file.fileno()}", path, format="raw", size=size)
        assert os.listdir(tmp_path) == []

    def test_pauses_and_rates(self, tmp_path: Path) -> None:
        control = imgcore.Control(rate="20M")
        control.pause()
        threading.Timer(0.3, control.resume).start()
        started = time.monotonic()
        with piped(DISK) as file:
            name = f"/dev/fd/{file.fileno()}"
            imgcore.convert(name, tmp_path / "a.raw", format="raw", control=control)
        assert time.monotonic() - started > 0.4
        assert (tmp_path / "a.raw").read_bytes() == DISK

    def test_a_reset_connection(self, tmp_path: Path) -> None:
        ours, theirs = socket.socketpair()
        with ours:
            # What was sent and never read resets it.
            ours.send(b"x")
            theirs.sendall(DISK[:70_000])
            theirs.close()
            with pytest.raises(ConnectionResetError, match="socket"):
                imgcore.convert(ours, tmp_path / "a.raw", format="raw")
        assert os.listdir(tmp_path) == []


class TestAdvice:
    """What the messages advise works."""

    @pytest.mark.parametrize(
        ("name", "keywords"),
        [
            ("a.raw", {"options": ["preallocation=full"]}),
            ("a.qcow2", {"options": ["preallocation=metadata"]}),
            ("a.vmdk", {"options": ["subformat=monolithicFlat", "preallocation=falloc"]}),
            ("old.qcow2", {"in_place": True}),
            ("a.tar.gz", {"profile": "gce"}),
        ],
    )
    def test_give_the_size(self, name: str, keywords: dict[str, Any], tmp_path: Path) -> None:
        (tmp_path / "old.qcow2").write_bytes(b"old")
        with pytest.raises(OptionError, match=r"give it \(--size\)"):
            imgcore.convert(io.BytesIO(DISK), tmp_path / name, format="raw", **keywords)
        size = len(DISK)
        imgcore.convert(io.BytesIO(DISK), tmp_path / name, format="raw", size=size, **keywords)

    def test_the_size_of_a_stream_from_a_stream(self) -> None:
        sink, keywords = io.BytesIO(), {"target_format": "vmdk", "compress": True}
        with pytest.raises(OptionError, match=r"give it \(--size\)"):
            imgcore.convert(io.BytesIO(DISK), sink, format="raw", **keywords)
        assert not sink.getvalue()
        imgcore.convert(io.BytesIO(DISK), sink, format="raw", size=len(DISK), **keywords)
        with open(sink_file := os.memfd_create("sink"), "wb", closefd=False) as file:
            file.write(sink.getvalue())
        with imgcore.open(sink_file, format="vmdk") as image:
            assert image.read(0, len(DISK)) == DISK
        os.close(sink_file)

    @pytest.mark.parametrize(
        "arguments",
        [
            ("info", "-"),
            ("compare", "-", "a.raw"),
            ("measure", "-f", "raw", "-"),
            ("checksum", "-f", "raw", "--tree", "t", "-"),
            ("convert", "-f", "raw", "--salvage", "-", "b.qcow2"),
            ("convert", "-f", "raw", "-B", "base.qcow2", "-F", "qcow2", "-", "b.qcow2"),
        ],
        ids=lambda words: "-".join(words[:4]),
    )
    def test_save_it_to_a_file(self, arguments: tuple[str, ...], tmp_path: Path) -> None:
        (tmp_path / "a.raw").write_bytes(DISK)
        imgcore.create(tmp_path / "base.qcow2", len(DISK))
        command = [sys.executable, "-m", "imgcore", *arguments]
        done = subprocess.run(command, input=DISK, capture_output=True, cwd=tmp_path, check=False)
        assert done.returncode in (1, 2)
        assert b"save it to a file first" in done.stderr
        where = len(arguments) - 1 - arguments[::-1].index("-")
        saved = [*command[:3], *arguments[:where], "a.raw", *arguments[where + 1 :]]
        subprocess.run(saved, cwd=tmp_path, check=True, capture_output=True)

    def test_zeros_behind_the_footer(self, tmp_path: Path) -> None:
        vhd = io.BytesIO()
        imgcore.convert(
            io.BytesIO(DISK), vhd, format="raw", target_format="vhd", options=["subformat=fixed"]
        )
        stream = vhd.getvalue() + bytes(1000)
        with pytest.raises(CorruptImageError, match="if zeros follow the footer, --size states"):
            imgcore.convert(io.BytesIO(stream), tmp_path / "a.raw", format="vhd")
        size = len(DISK)
        imgcore.convert(io.BytesIO(stream), tmp_path / "a.raw", format="vhd", size=size)
        assert (tmp_path / "a.raw").read_bytes() == DISK


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_the_name_of_a_pipe_is_any_kind_of_path(kind: Any, tmp_path: Path) -> None:
    pipe, disk = tmp_path / "pipe", noise(MIB)
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(disk,), daemon=True)
    writer.start()
    imgcore.convert(kind(pipe), tmp_path / "o.raw", format="raw")
    writer.join(30)
    assert (tmp_path / "o.raw").read_bytes() == disk
