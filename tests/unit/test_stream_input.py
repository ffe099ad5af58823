"""Sources that are read once, in order."""

from __future__ import annotations

import io
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from imgcore.errors import (
    ConversionCancelled,
    CorruptImageError,
    ImgcoreError,
    LimitExceededError,
    UnsupportedFeatureError,
)
from imgcore.files import stream_input
from imgcore.files.stream_input import (
    StreamInput,
    descriptor_stream,
    is_named_pipe,
    is_seekable_start,
    is_stream_object,
    named_stream,
    object_stream,
)
from imgcore.files.stream_target import StreamTarget
from imgcore.limits import MAX_KEPT_NBYTES, MIB

CONTENT = bytes(range(256)) * 1024


class Slow(io.RawIOBase):
    """Gives a few bytes at a time."""

    def __init__(self, content: bytes, step: int) -> None:
        self._file = io.BytesIO(content)
        self._step = step

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        return self._file.readinto(memoryview(buffer)[: self._step])


def piped(content: bytes, step: int = 0) -> StreamInput:
    """Return a stream of a pipe that another thread writes."""
    r, w = os.pipe()

    def write() -> None:
        with suppress(BrokenPipeError), os.fdopen(w, "wb", buffering=0) as file:
            for at in range(0, len(content), step or len(content) or 1):
                file.write(content[at : at + (step or len(content))])

    threading.Thread(target=write, daemon=True).start()
    try:
        return descriptor_stream(r, "pipe")
    finally:
        os.close(r)


STREAMS: dict[str, Callable[[bytes], StreamInput]] = {
    "pipe": piped,
    "pipe-in-small-pieces": lambda content: piped(content, 1000),
    "object": lambda content: object_stream(io.BytesIO(content)),
    "slow-object": lambda content: object_stream(Slow(content, 7777)),
}


@pytest.fixture(params=STREAMS)
def stream(request: pytest.FixtureRequest) -> Iterator[StreamInput]:
    with STREAMS[request.param](CONTENT) as opened:
        yield opened


class TestOrder:
    def test_all_bytes_are_taken_once(self, stream: StreamInput) -> None:
        assert stream.read(10) == CONTENT[:10]
        assert stream.position == 10
        assert stream.read(1 << 20) == CONTENT[10:]
        assert stream.position == len(CONTENT)
        assert stream.read(1) == b""

    def test_peek_loses_nothing(self, stream: StreamInput) -> None:
        assert stream.peek(100_000) == CONTENT[:100_000]
        assert stream.position == 0
        assert stream.peek(10) == CONTENT[:10]
        assert stream.read(150_000) == CONTENT[:150_000]
        assert stream.peek(1 << 20) == CONTENT[150_000:]
        assert stream.read(1 << 20) == CONTENT[150_000:]

    def test_the_end_is_known_once_it_was_met(self, stream: StreamInput) -> None:
        assert stream.end is None
        assert stream.nbytes == (1 << 63) - 1
        stream.peek(len(CONTENT) + 1)
        assert stream.end == stream.nbytes == len(CONTENT)
        stream.skip(5)
        assert stream.end == len(CONTENT)

    def test_skip_beyond_the_end_fails(self, stream: StreamInput) -> None:
        stream.skip(len(CONTENT) - 5)
        with pytest.raises(CorruptImageError, match=f"after {len(CONTENT)} bytes, but"):
            stream.skip(6)

    def test_pread_looks_ahead_and_takes_nothing(self, stream: StreamInput) -> None:
        assert stream.pread(1000, 24) == CONTENT[1000:1024]
        assert stream.pread(0, 4) == CONTENT[:4]
        stream.skip(500)
        assert stream.pread(1000, 24) == CONTENT[1000:1024]
        with pytest.raises(CorruptImageError, match="ends too early"):
            stream.pread(len(CONTENT), 1)
        assert stream.read(1) == CONTENT[500:501]

    def test_bytes_that_were_taken_are_gone(self, stream: StreamInput) -> None:
        stream.skip(500)
        with pytest.raises(UnsupportedFeatureError, match="save it to a file first"):
            stream.pread(499, 2)
        with pytest.raises(ValueError, match="start is gone"):
            stream.keep(10)

    def test_kept_bytes_stay(self, stream: StreamInput) -> None:
        stream.keep(600)
        stream.skip(500)
        assert stream.pread(10, 20) == CONTENT[10:30]
        assert stream.pread(490, 200) == CONTENT[490:690]
        stream.keep(1000)
        stream.skip(1000)
        assert stream.pread(900, 100) == CONTENT[900:1000]
        with pytest.raises(UnsupportedFeatureError):
            stream.pread(900, 101)
        buffer = bytearray(9)
        stream.pread_into(1, buffer)
        assert buffer == CONTENT[1:10]

    def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stream_input, "MAX_AHEAD_NBYTES", 1000)
        with object_stream(io.BytesIO(CONTENT)) as stream:
            assert len(stream.pread(999, 1)) == 1
            with pytest.raises(UnsupportedFeatureError, match="save it to a file first"):
                stream.pread(1000, 1)
            with pytest.raises(LimitExceededError):
                stream.keep(MAX_KEPT_NBYTES + 1)


class TestEnd:
    @pytest.mark.parametrize("n_zeros", [0, 1, 3 * MIB])
    def test_zeros_are_accepted(self, n_zeros: int) -> None:
        with piped(b"disk" + bytes(n_zeros)) as stream:
            stream.skip(4)
            stream.require_end()
            assert stream.end == 4 + n_zeros

    def test_other_bytes_are_an_error_with_their_offset(self) -> None:
        with piped(b"disk" + bytes(2 * MIB) + b"x\0\0") as stream:
            stream.skip(4)
            with pytest.raises(CorruptImageError, match="0x200004") as caught:
                stream.require_end()
            assert caught.value.offset == 4 + 2 * MIB


class TestWhereTheyComeFrom:
    def test_objects_for_text_are_refused(self) -> None:
        with pytest.raises(TypeError, match="a binary file object is needed"):
            object_stream(io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))

    def test_sockets(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, object_stream(ours) as stream:
            theirs.sendall(b"bytes")
            theirs.close()
            assert stream.read(10) == b"bytes"

    def test_a_named_pipe_is_opened_before_its_writer(self, tmp_path: os.PathLike[str]) -> None:
        path = os.path.join(tmp_path, "pipe")
        os.mkfifo(path)
        assert is_named_pipe(path)
        assert not is_named_pipe(os.fspath(tmp_path))
        with named_stream(path) as stream:

            def write() -> None:
                time.sleep(0.05)
                with open(path, "wb") as file:
                    file.write(CONTENT)

            thread = threading.Thread(target=write)
            thread.start()
            assert stream.read(1 << 20) == CONTENT
            thread.join()

    def test_a_file_is_read_from_its_position(self, tmp_path: os.PathLike[str]) -> None:
        path = os.path.join(tmp_path, "file")
        with open(path, "wb") as file:
            file.write(CONTENT)
        with open(path, "rb") as file:
            assert is_seekable_start(file.fileno())
            os.lseek(file.fileno(), 100, os.SEEK_SET)
            assert not is_seekable_start(file.fileno())
            with descriptor_stream(file.fileno(), "file") as stream:
                assert stream.read(1 << 20) == CONTENT[100:]

    def test_the_callers_descriptor_and_object_stay_open(self) -> None:
        source = io.BytesIO(b"bytes")
        with object_stream(source) as stream:
            assert stream.read(2) == b"by"
        assert source.read() == b"tes"

    @pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
    def test_sockets_for_messages_are_refused(self, kind: int) -> None:
        """A read that is shorter than a message would drop its rest."""
        ours, theirs = socket.socketpair(type=kind)
        with ours, theirs:
            with pytest.raises(ImgcoreError, match="a socket for messages"):
                object_stream(ours)
            with pytest.raises(ImgcoreError, match="a socket for messages"):
                StreamTarget(ours, waiting=lambda: None)

    def test_what_never_has_bytes_is_refused(self) -> None:
        event = os.eventfd(1)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            with pytest.raises(ImgcoreError, match="waits for connections"):
                object_stream(listening)
        with pytest.raises(ImgcoreError, match="no file with content"):
            descriptor_stream(event, "stdin")
        os.close(event)

    def test_terminals_and_folders_are_refused(self, tmp_path: os.PathLike[str]) -> None:
        ours, theirs = os.openpty()
        folder = os.open(tmp_path, os.O_RDONLY)
        try:
            with pytest.raises(ImgcoreError, match="terminal"):
                descriptor_stream(theirs, "stdin")
            with pytest.raises(ImgcoreError, match="a folder"):
                descriptor_stream(folder, "stdin")
        finally:
            for fd in (ours, theirs, folder):
                os.close(fd)

    def test_a_descriptor_that_is_not_open(self) -> None:
        with pytest.raises(OSError, match="stdin"):
            descriptor_stream(12345, "stdin")

    def test_objects_that_break_the_rules(self) -> None:
        class Wrong:
            def __init__(self, data: object) -> None:
                self.data = data

            def read(self, nbytes: int) -> object:
                return self.data

        assert is_stream_object(Wrong(b""))
        assert not is_stream_object("name")
        for data, error in [("text", TypeError), (b"x" * 99, ImgcoreError), (None, ImgcoreError)]:
            with object_stream(Wrong(data)) as stream, pytest.raises(error):
                stream.read(10)

    def test_errors_name_the_stream(self) -> None:
        class Broken:
            name = "broken"

            def read(self, nbytes: int) -> bytes:
                raise OSError(5, "Input/output error")

        with object_stream(Broken()) as stream, pytest.raises(OSError, match="broken"):
            stream.read(1)


def test_a_read_that_waits_is_cancelled() -> None:
    r, w = os.pipe()
    with descriptor_stream(r, "pipe") as stream:
        threading.Timer(0.05, stream.cancel).start()
        with pytest.raises(ConversionCancelled):
            stream.read(1)
        with pytest.raises(ConversionCancelled):
            stream.read(1)
    os.close(r)
    os.close(w)


def test_read_now_does_not_wait() -> None:
    r, w = os.pipe()
    view = memoryview(bytearray(10))
    with descriptor_stream(r, "pipe") as stream:
        os.close(r)
        assert stream.read_now(view) is None
        os.write(w, b"abcdef")
        assert stream.peek(2) == b"ab"
        assert stream.read_now(view[:4]) == 4
        assert (bytes(view[:4]), stream.position) == (b"abcd", 4)
        assert stream.read_now(view) == 2
        assert stream.read_now(view) is None
        os.close(w)
        assert stream.read_now(view) == 0
        assert (stream.end, stream.read_now(view)) == (6, 0)


def test_what_can_be_read_without_waiting() -> None:
    with object_stream(io.BytesIO(b"abc")) as stream, piped(b"abc") as pipe:
        assert (stream.reads_now, pipe.reads_now) == (False, True)
