"""A block device that takes a disk's time: a loop device over a FUSE file that waits.

``dm-delay`` gives each request a delay, but knows no seeks, and few machines have it.
Here a model says when each request is served.  The file is served without a cache, so
the loop device above it has the only one, with the kernel's own reading ahead.

python -m benchmarks._slow_disk BACKING_FILE FOLDER (latency | disk)
"""

from __future__ import annotations

import ctypes
import heapq
import os
import queue
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Protocol

_LATENCY_S = 0.005
_TRANSFER_NBYTES_S = 150e6
_OVERHEAD_S = 0.0001
_HALF_TURN_S = 0.0042  # at 7200 turns a minute
_QUEUE_DEPTH = 32  # of the drive, which serves in the order that suits it

# Operations, flags and sizes of the FUSE protocol, version 7.31 (linux/fuse.h).
_LOOKUP, _GETATTR, _OPEN, _READ, _RELEASE, _INIT, _FORGET = 1, 3, 14, 15, 18, 26, 2
_INTERRUPT, _BATCH_FORGET = 36, 42
_ASYNC_READ, _ASYNC_DIO, _MAX_PAGES = 1 << 0, 1 << 15, 1 << 22
_FOPEN_DIRECT_IO = 1
_HEADER = struct.Struct("<IIQQIIII")
_ANSWER = struct.Struct("<IiQ")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ROOT, _FILE = 1, 2
_MAX_READ_NBYTES = 1 << 20
NAME = "disk"


class Request(NamedTuple):
    """One read, in the order of the head's way."""

    offset: int
    nbytes: int
    unique: int


class Model(Protocol):
    """Says how long requests take."""

    def serve(self, device: Device) -> None:
        """Answer requests for ever."""


class Latency:
    """A network disk: each request takes the same time, any number at once."""

    def serve(self, device: Device) -> None:
        """Answer each request when its time has come."""
        due: list[tuple[float, Request]] = []
        while True:
            wait = max(0.0, due[0][0] - time.monotonic()) if due else None
            try:
                request = device.requests.get(timeout=wait)
                heapq.heappush(due, (time.monotonic() + _LATENCY_S, request))
            except queue.Empty:
                pass
            while due and due[0][0] <= time.monotonic():
                device.answer(heapq.heappop(due)[1])


class Disk:
    """A disk with one head: a seek takes time by its length, and bytes by their number.

    Of the requests in its queue the next one upwards comes first.
    """

    def serve(self, device: Device) -> None:
        """Answer one request after the other."""
        head, clock = 0, time.monotonic()
        waiting: list[Request] = []
        while True:
            if not waiting:
                waiting.append(device.requests.get())
                clock = max(clock, time.monotonic())
            while len(waiting) < _QUEUE_DEPTH and not device.requests.empty():
                waiting.append(device.requests.get())
            upwards = [one for one in waiting if one.offset >= head]
            request = min(upwards or waiting)
            waiting.remove(request)
            clock += self._seconds(head, request, device.nbytes)
            head = request.offset + request.nbytes
            wait = clock - time.monotonic()
            if wait > 0.0005:
                time.sleep(wait)
            device.answer(request)

    @staticmethod
    def _seconds(head: int, request: Request, nbytes: int) -> float:
        seconds = _OVERHEAD_S + request.nbytes / _TRANSFER_NBYTES_S
        distance = request.offset - head
        # A short way forward passes below the head, a long one needs the arm.
        if 0 <= distance <= _HALF_TURN_S * _TRANSFER_NBYTES_S:
            return seconds + distance / _TRANSFER_NBYTES_S
        return seconds + _HALF_TURN_S + 0.001 + 0.007 * (abs(distance) / nbytes) ** 0.5


MODELS: dict[str, type[Model]] = {"latency": Latency, "disk": Disk}


class Device:
    """The server of one file in a folder."""

    def __init__(self, backing: Path, folder: Path) -> None:
        self._backing = os.open(backing, os.O_RDONLY)
        self.nbytes = os.fstat(self._backing).st_size
        self.requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._fuse = os.open("/dev/fuse", os.O_RDWR)
        libc = ctypes.CDLL(None, use_errno=True)
        options = f"fd={self._fuse},rootmode=40000,user_id=0,group_id=0,allow_other"
        if libc.mount(b"slow", os.fsencode(folder), b"fuse", 0, options.encode()):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), folder)

    def serve(self, model: Model) -> None:
        """Answer the kernel until the folder is unmounted."""
        threading.Thread(target=model.serve, args=(self,), daemon=True).start()
        while True:
            try:
                message = os.read(self._fuse, _MAX_READ_NBYTES + 4096)
            except OSError:
                return
            self._take(message)

    def answer(self, request: Request) -> None:
        """Send the bytes of a request."""
        self._reply(request.unique, os.pread(self._backing, request.nbytes, request.offset))

    def _reply(self, unique: int, data: bytes = b"", errno: int = 0) -> None:
        header = _ANSWER.pack(_ANSWER.size + len(data), -errno, unique)
        os.writev(self._fuse, (header, data))

    def _take(self, message: bytes) -> None:
        _, operation, unique, node, *_ = _HEADER.unpack_from(message)
        body = message[_HEADER.size :]
        if operation == _READ:
            _, offset, nbytes = struct.unpack_from("<QQI", body)
            self.requests.put(Request(offset, nbytes, unique))
        elif operation == _INIT:
            flags = _ASYNC_READ | _ASYNC_DIO | _MAX_PAGES
            answer = struct.pack(
                "<IIIIHHIIHHI", 7, 31, 1 << 20, flags, 1024, 1024, 1 << 20, 1,
                _MAX_READ_NBYTES // 4096, 0, 0,
            )  # fmt: skip
            self._reply(unique, answer + bytes(28))
        elif operation == _GETATTR:
            self._reply(unique, struct.pack("<QII", 3600, 0, 0) + self._attributes(node))
        elif operation == _LOOKUP and body.rstrip(b"\0") == NAME.encode():
            entry = struct.pack("<QQQQII", _FILE, 0, 3600, 3600, 0, 0)
            self._reply(unique, entry + self._attributes(_FILE))
        elif operation == _OPEN:
            self._reply(unique, struct.pack("<QII", 1, _FOPEN_DIRECT_IO, 0))
        elif operation == _RELEASE:
            self._reply(unique)
        elif operation not in (_FORGET, _BATCH_FORGET, _INTERRUPT):
            self._reply(unique, errno=2 if operation == _LOOKUP else 38)

    def _attributes(self, node: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if node == _ROOT else stat.S_IFREG | 0o444
        nbytes = 0 if node == _ROOT else self.nbytes
        return _ATTR.pack(node, nbytes, nbytes // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


class NoSlowDiskError(Exception):
    """No slow disk can be made here."""


class SlowDisk:
    """A read-only loop device with a model's times, while the context lasts."""

    path: Path

    def __init__(self, backing: Path, folder: Path, model: str) -> None:
        self._backing, self._folder, self._model = backing, folder, model
        self._stack = ExitStack()

    def __enter__(self) -> SlowDisk:
        if os.geteuid() != 0:
            raise NoSlowDiskError("needs root")
        self._folder.mkdir(exist_ok=True)
        words = ("-m", "benchmarks._slow_disk", str(self._backing), str(self._folder), self._model)
        with self._stack:
            server = self._stack.enter_context(subprocess.Popen((sys.executable, *words)))
            unmount = ("umount", "-q", "-l", str(self._folder))
            self._stack.callback(subprocess.run, unmount, check=False)
            file = self._folder / NAME
            while not file.exists():
                if server.poll() is not None:
                    raise NoSlowDiskError("FUSE cannot be used here")
                time.sleep(0.05)
            made = ("losetup", "--find", "--show", "--read-only", "--direct-io=on", str(file))
            done = subprocess.run(made, check=False, capture_output=True, text=True)
            if done.returncode != 0:
                raise NoSlowDiskError(f"no loop device: {done.stderr.strip()}")
            self.path = Path(done.stdout.strip())
            self._stack.callback(subprocess.run, ("losetup", "-d", str(self.path)), check=True)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    @contextmanager
    def mounted(self, folder: Path) -> Iterator[Path]:
        """Mount the file system on the device, with nothing of it cached."""
        folder.mkdir(exist_ok=True)
        subprocess.run(("blockdev", "--flushbufs", str(self.path)), check=True)
        subprocess.run(("mount", "-o", "ro", str(self.path), str(folder)), check=True)
        try:
            yield folder
        finally:
            subprocess.run(("umount", str(folder)), check=True)


if __name__ == "__main__":
    Device(Path(sys.argv[1]), Path(sys.argv[2])).serve(MODELS[sys.argv[3]]())
