"""Targets that are streams: ``-``, pipes, sockets and objects with ``write``."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.command import assert_one_line_error
from tests.helpers.command import imgcore as imgcore_command
from tests.helpers.images import noise, text

import imgcore

MIB = 1 << 20
NBYTES = 9 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Data, a hole, data that is less than a pipe holds, and a hole at the end."""
    path = tmp_path / "disk.raw"
    with open(path, "wb") as file:
        file.write(noise(3 * MIB))
        file.seek(6 * MIB + 4096)
        file.write(text(70_000))
        file.truncate(NBYTES)
    return path


@pytest.fixture
def content(disk: Path) -> bytes:
    return disk.read_bytes()


def command(*words: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "imgcore", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def streamed(*words: str | Path) -> bytes:
    """Return what a conversion writes to stdout, which nothing else is printed on."""
    with command("convert", *words, "-") as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, b"")
    return out


def same(written: bytes, folder: Path, content: bytes, format: str) -> bool:
    copy = folder / f"copy.{format}"
    copy.write_bytes(written)
    with imgcore.open(copy, format=format) as image:
        return image.read(0, len(content)) == content


@contextmanager
def reading(fd: int, pause: float = 0.0) -> Iterator[list[bytes]]:
    """Read a descriptor to its end on a thread."""
    pieces: list[bytes] = []

    def run() -> None:
        while piece := os.read(fd, 1 << 16):
            pieces.append(piece)
            time.sleep(pause)

    thread = threading.Thread(target=run)
    thread.start()
    yield pieces
    thread.join(60)
    assert not thread.is_alive()


class TestStdout:
    def test_raw(self, disk: Path, content: bytes) -> None:
        assert streamed("-O", "raw", disk) == content

    def test_compressed(self, disk: Path, content: bytes, tmp_path: Path) -> None:
        for codec in ("zst", "gz"):
            imgcore.convert(disk, tmp_path / f"file.raw.{codec}")
            written = streamed("-O", f"raw.{codec}", disk)
            assert written == (tmp_path / f"file.raw.{codec}").read_bytes()
        assert gzip.decompress(written) == content

    @pytest.mark.parametrize("threads", ["1", "4"])
    @pytest.mark.parametrize(
        ("format", "option"),
        [
            ("vmdk", "subformat=streamOptimized,cid=12345678"),
            ("vhd", "subformat=fixed,uuid=6f9619ff-8b86-d011-b42d-00c04fc964ff"),
        ],
    )
    def test_the_bytes_of_a_file(
        self, format: str, option: str, threads: str, disk: Path, tmp_path: Path
    ) -> None:
        words = ("-O", format, "-o", option, "--threads", threads, disk)
        # A stream has no name, so the descriptor of a VMDK names disk.vmdk.
        file = tmp_path / f"disk.{format}"
        done = imgcore_command("convert", *map(str, words), str(file))
        assert done.returncode == 0, done.stderr
        written, filed = streamed(*words), file.read_bytes()
        if format == "vhd":  # it states the time
            written, filed = written[:NBYTES], filed[:NBYTES]
        assert written == filed

    def test_an_archive(self, disk: Path, tmp_path: Path) -> None:
        imgcore.convert(disk, tmp_path / "disk.tar.gz", profile="gce")
        assert streamed("--profile", "gce", disk) == (tmp_path / "disk.tar.gz").read_bytes()

    def test_many_groups(self, tmp_path: Path) -> None:
        """Each grain table follows its grains, and groups without data have none."""
        disk = tmp_path / "disk.raw"
        with open(disk, "wb") as file:
            for offset in (0, 33 * MIB, 95 * MIB, 300 * MIB - 512):
                file.seek(offset)
                file.write(text(512, offset))
            file.truncate(300 * MIB)
        words = ("-O", "vmdk", "-o", "subformat=streamOptimized,cid=12345678", disk)
        imgcore_command("convert", *map(str, words), str(tmp_path / "disk.vmdk"))
        written = streamed(*words)
        assert written == (tmp_path / "disk.vmdk").read_bytes()

    def test_an_empty_disk(self, tmp_path: Path) -> None:
        (tmp_path / "empty.raw").touch()
        assert streamed("-O", "raw", tmp_path / "empty.raw") == b""

    def test_a_regular_file_goes_on_at_its_position(
        self, disk: Path, content: bytes, tmp_path: Path
    ) -> None:
        with open(tmp_path / "out", "wb") as out:
            out.write(b"before")
            out.flush()
            words = [sys.executable, "-m", "imgcore", "convert", "-O", "raw", disk, "-"]
            subprocess.run(words, stdout=out, check=True)
        assert (tmp_path / "out").read_bytes() == b"before" + content

    def test_a_format_must_be_stated(self, disk: Path) -> None:
        done = imgcore_command("convert", str(disk), "-")
        assert_one_line_error(done, "state the format with -O", code=2)

    def test_results_are_printed_on_stderr(self, disk: Path, content: bytes) -> None:
        words = ("convert", "-O", "raw", disk, "-")
        with command(*words, "--json", "--checksum") as process:
            out, err = process.communicate(timeout=60)
        assert out == content
        assert json.loads(err)["target"] == "stdout"
        with command(*words, "--checksum") as process:
            out, err = process.communicate(timeout=60)
        assert out == content
        assert err.decode().split()[1:] == ["-"]
        with command(*words, "-p") as process:
            out, err = process.communicate(timeout=60)
        assert out == content
        assert b"100.0%" in err

    def test_progress_as_qemu_img_is_refused(self, disk: Path) -> None:
        done = imgcore_command("convert", "-O", "raw", "--progress=qemu", str(disk), "-")
        assert_one_line_error(done, "both print on stdout", code=2)

    def test_a_terminal_is_refused(self, disk: Path) -> None:
        primary, secondary = pty.openpty()
        words = [sys.executable, "-m", "imgcore", "convert", "-O", "raw", disk, "-"]
        done = subprocess.run(words, stdout=secondary, stderr=subprocess.PIPE, timeout=60)
        os.close(primary)
        os.close(secondary)
        assert done.returncode == 1
        assert b"stdout: is a terminal" in done.stderr

    def test_a_closed_stdout_is_refused(self, disk: Path) -> None:
        words = f"{sys.executable} -m imgcore convert -O raw {disk} - >&-"
        done = subprocess.run(words, shell=True, stderr=subprocess.PIPE, timeout=60)
        assert done.returncode == 1
        assert b"stdout: is closed" in done.stderr

    def test_the_source_is_refused(self, disk: Path, content: bytes) -> None:
        words = f"{sys.executable} -m imgcore convert -O raw {disk} - >> {disk}"
        done = subprocess.run(words, shell=True, stderr=subprocess.PIPE, timeout=60)
        assert b"is read by this conversion" in done.stderr
        assert disk.read_bytes() == content

    @pytest.mark.parametrize(
        "options",
        [
            ["-n"],
            ["--verify"],
            ["--reflink=always"],
            ["-o", "preallocation=full"],
            ["-B", "base.raw", "-F", "raw"],
        ],
        ids=str,
    )
    def test_what_a_stream_cannot_do(self, options: list[str], disk: Path) -> None:
        done = imgcore_command("convert", "-O", "raw", *options, str(disk), "-", cwd=disk.parent)
        assert_one_line_error(done, "", code=2)
        assert done.stdout == ""

    def test_a_flat_vmdk_is_two_files(self, disk: Path) -> None:
        words = ("convert", "-O", "vmdk", "-o", "subformat=monolithicFlat", str(disk), "-")
        assert_one_line_error(imgcore_command(*words), "stream", code=2)

    def test_a_name_states_another_codec(self, disk: Path, tmp_path: Path) -> None:
        for name in ("copy.raw", "copy.raw.gz"):
            done = imgcore_command("convert", "-O", "raw.zst", str(disk), str(tmp_path / name))
            assert_one_line_error(done, "end the name in .raw.zst", code=2)
        done = imgcore_command("convert", "-O", "raw.zst", str(disk), str(tmp_path / "a.raw.zst"))
        assert done.returncode == 0


class TestReaders:
    @pytest.mark.parametrize("format", ["raw", "raw.zst", "raw.gz"])
    @pytest.mark.parametrize("nbytes", [0, 1, 100_000])
    def test_one_that_goes(self, format: str, nbytes: int, disk: Path) -> None:
        """One line and exit code 1, although all may have fit into the pipe."""
        with command("convert", "-O", format, disk, "-") as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.read(nbytes)
            process.stdout.close()
            err = process.stderr.read().decode()
            assert process.wait(60) == 1
        assert len(err.splitlines()) == 1
        assert "stdout: the reader has closed it: Broken pipe" in err

    def test_the_last_byte_must_be_taken(self, tmp_path: Path) -> None:
        """All fits into the pipe, and nobody takes it."""
        (tmp_path / "small.raw").write_bytes(noise(4096))
        with command("convert", "-O", "raw", tmp_path / "small.raw", "-") as process:
            assert process.stdout is not None and process.stderr is not None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.stdout.close()
            assert process.wait(60) == 1
            assert b"Broken pipe" in process.stderr.read()

    @pytest.mark.parametrize("threads", ["1", "3"])
    @pytest.mark.parametrize("format", ["raw", "raw.zst", "raw.gz", "vhd"])
    def test_one_that_takes_nothing(self, format: str, threads: str, disk: Path) -> None:
        """The command waits, and a signal ends it."""
        disk.write_bytes(noise(NBYTES))
        options = ["-o", "subformat=fixed"] if format == "vhd" else []
        words = ("convert", "-O", format, *options, "--threads", threads, disk, "-")
        with command(*words) as process:
            assert process.stderr is not None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 130
            assert process.stderr.read() == b"imgcore: ended by SIGINT\n"

    def test_a_slow_one(self, disk: Path, content: bytes) -> None:
        read, write = os.pipe()
        with reading(read, 0.005) as pieces, open(write, "wb") as pipe:
            imgcore.convert(disk, pipe, target_format="raw")
        os.close(read)
        assert b"".join(pieces) == content

    def test_the_pipe_of_others_is_left_as_it_was(self, disk: Path) -> None:
        read, write = os.pipe()
        with reading(read), open(write, "wb") as pipe:
            imgcore.convert(disk, pipe, target_format="raw")
            assert os.get_blocking(write)
            pipe.write(b"more")
        os.close(read)


class Refusing(io.RawIOBase):
    """An object that takes some bytes and then raises."""

    def __init__(self, error: Exception, after: int) -> None:
        self.error = error
        self.left = after

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.left -= len(data)
        if self.left < 0:
            raise self.error
        return len(data)


class Partial(io.BytesIO):
    """Takes at most 1000 bytes at once."""

    def write(self, data: Any) -> int:
        return super().write(data[:1000])


class TestObjects:
    @pytest.mark.parametrize("make", [io.BytesIO, Partial])
    @pytest.mark.parametrize("format", ["raw", "raw.gz"])
    def test_in_memory(
        self, make: Callable[[], io.BytesIO], format: str, disk: Path, content: bytes
    ) -> None:
        target = make()
        result = imgcore.convert(disk, target, target_format=format)
        written = target.getvalue()
        assert (gzip.decompress(written) if format == "raw.gz" else written) == content
        assert result.target == f"<{make.__name__}>"
        assert result.file_size == len(written)

    def test_through_another_codec(self, disk: Path, content: bytes, tmp_path: Path) -> None:
        """An object with a descriptor must be written to by its own method."""
        with gzip.open(tmp_path / "x.gz", "wb", compresslevel=1) as target:
            imgcore.convert(disk, target, target_format="raw")
        assert gzip.decompress((tmp_path / "x.gz").read_bytes()) == content

    @pytest.mark.parametrize("after", [0, 65536, 5 * MIB, NBYTES - 1])
    @pytest.mark.parametrize("format", ["raw", "vhd"])
    def test_one_that_raises(self, after: int, format: str, disk: Path) -> None:
        error = OSError(errno.ENOSPC, "no room for this")
        options = {"options": ["subformat=fixed"]} if format == "vhd" else {}
        with pytest.raises(OSError, match="no room for this") as caught:
            imgcore.convert(disk, Refusing(error, after), target_format=format, **options)
        assert caught.value is error

    @pytest.mark.parametrize("more", [-1 << 40, 1])
    def test_one_that_counts_wrong(self, more: int, disk: Path) -> None:
        class Wrong(io.BytesIO):
            def write(self, data: Any) -> int:
                return max(super().write(data) + more, -1) if data else 0

        with pytest.raises(imgcore.ImgcoreError, match=r"its write returned .* for \d+ bytes"):
            imgcore.convert(disk, Wrong(), target_format="raw")

    def test_text_is_refused(self, disk: Path) -> None:
        with pytest.raises(TypeError):
            imgcore.convert(disk, io.StringIO(), target_format="raw")

    def test_a_socket(self, disk: Path, content: bytes) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs, reading(theirs.fileno()) as pieces:
            imgcore.convert(disk, ours, target_format="raw")
            ours.shutdown(socket.SHUT_WR)
        assert b"".join(pieces) == content

    def test_a_socket_in_both_directions(self, content: bytes) -> None:
        ours, theirs = socket.socketpair()

        def send() -> None:
            theirs.sendall(content)
            theirs.shutdown(socket.SHUT_WR)

        with ours, theirs, reading(theirs.fileno()) as pieces:
            sender = threading.Thread(target=send)
            sender.start()
            imgcore.convert(ours, ours, format="raw", target_format="raw")
            ours.shutdown(socket.SHUT_WR)
            sender.join()
        assert b"".join(pieces) == content

    def test_the_source_is_not_overwritten(self, disk: Path) -> None:
        before = disk.read_bytes()
        with disk.open("r+b") as file:
            for source in (disk, file):
                with pytest.raises(imgcore.TargetError, match="is read by this conversion"):
                    imgcore.convert(source, file, format="raw", target_format="raw.gz")
        memory = io.BytesIO(before)
        with pytest.raises(imgcore.TargetError, match="is read by this conversion"):
            imgcore.convert(memory, memory, format="raw", target_format="raw")
        assert disk.read_bytes() == memory.getvalue() == before

    def test_a_socket_whose_other_end_goes(self, disk: Path) -> None:
        ours, theirs = socket.socketpair()
        theirs.close()
        with ours, pytest.raises(OSError):
            imgcore.convert(disk, ours, target_format="raw")

    def test_a_callback_cancels_while_nobody_reads(self, disk: Path) -> None:
        read, write = os.pipe()
        disk.write_bytes(noise(NBYTES))
        stop_at = time.monotonic() + 0.5

        def stop(_: imgcore.Progress) -> None:
            if time.monotonic() > stop_at:
                raise InterruptedError

        with open(write, "wb") as pipe, pytest.raises(InterruptedError):
            imgcore.convert(disk, pipe, target_format="raw", progress=stop)
        os.close(read)

    def test_a_control_cancels_while_nobody_reads(self, disk: Path) -> None:
        read, write = os.pipe()
        disk.write_bytes(noise(NBYTES))
        control = imgcore.Control()
        threading.Timer(0.5, control.cancel).start()
        for format in ("raw", "raw.zst", "qcow2"):
            with open(write, "wb", closefd=False) as pipe:
                with pytest.raises(imgcore.ConversionCancelled):
                    imgcore.convert(disk, pipe, target_format=format, control=control)
        os.close(read)
        os.close(write)

    def test_a_result_comes_after_the_last_write(self, disk: Path) -> None:
        class Slow(io.BytesIO):
            n_done = 0

            def write(self, data: Any) -> int:
                time.sleep(0.02)
                self.n_done += len(data)
                return super().write(data)

        target = Slow()
        imgcore.convert(disk, target, target_format="raw")
        assert target.n_done == NBYTES

    def test_no_descriptor_is_left_open(self, disk: Path) -> None:
        before = os.listdir("/proc/self/fd")
        imgcore.convert(disk, io.BytesIO(), target_format="raw")
        with pytest.raises(OSError):
            imgcore.convert(disk, Refusing(OSError(5, ""), 0), target_format="raw")
        for _ in range(50):
            if len(os.listdir("/proc/self/fd")) == len(before):
                break
            time.sleep(0.1)
        assert len(os.listdir("/proc/self/fd")) == len(before)


class TestNamedPipes:
    def test_one(self, disk: Path, content: bytes, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with command("convert", "-O", "raw", disk, tmp_path / "pipe") as process:
            time.sleep(0.3)  # it waits for a reader
            assert (tmp_path / "pipe").read_bytes() == content
            assert process.wait(60) == 0

    def test_without_a_reader_it_can_be_cancelled(self, disk: Path, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with command("convert", "-O", "raw", disk, tmp_path / "pipe") as process:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 143

    def test_its_suffix_states_the_format(self, disk: Path, content: bytes, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.raw.gz")
        with command("convert", disk, tmp_path / "pipe.raw.gz") as process:
            assert gzip.decompress((tmp_path / "pipe.raw.gz").read_bytes()) == content
            assert process.wait(60) == 0


class TestFromStreams:
    """A stream becomes a stream where no table must come first."""

    @pytest.mark.parametrize("format", ["raw", "raw.gz", "vhd"])
    @pytest.mark.parametrize("size", [[], ["--size", str(NBYTES)]], ids=["unknown", "known"])
    def test_one_pass(self, format: str, size: list[str], disk: Path, content: bytes) -> None:
        options = ["-o", "subformat=fixed"] if format == "vhd" else []
        words = ["convert", "-f", "raw", *size, "-O", format, *options, "-", "-"]
        done = subprocess.run(
            [sys.executable, "-m", "imgcore", *words],
            input=disk.read_bytes(),
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        written = gzip.decompress(done.stdout) if format == "raw.gz" else done.stdout
        assert written[:NBYTES] == content

    @pytest.mark.parametrize("format", ["qcow2", "vhdx", "vdi", "vmdk"])
    def test_tables_in_front_need_a_file(self, format: str, disk: Path) -> None:
        words = ["convert", "-f", "raw", "--size", str(NBYTES), "-O", format, "-", "-"]
        done = subprocess.run(
            [sys.executable, "-m", "imgcore", *words],
            input=disk.read_bytes(),
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert b"save the source to a file first" in done.stderr
