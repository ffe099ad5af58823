"""Programs that read ranges of a disk, behind one interface: ours and its peers."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import imgcore

# Where Debian has libnbd's module.
_DEBIAN_MODULES = "/usr/lib/python3/dist-packages"
_TICKS = os.sysconf("SC_CLK_TCK")


class Unavailable(Exception):
    """A peer is not installed, or does not read this format."""


class RangeReader(ABC):
    """An open disk; ``read`` is what is measured."""

    @abstractmethod
    def read(self, offset: int, buffer: bytearray) -> Any:
        """Read as many bytes as the buffer has, in the way the program is used."""

    @abstractmethod
    def close(self) -> None:
        """Close the disk."""

    def more_cpu_seconds(self) -> float:
        """Return the processor time of other processes that serve the disk."""
        return 0.0


class Preadv(RangeReader):
    """`os.preadv` on a raw file: what the system call itself takes."""

    def __init__(self, chain: Sequence[Path], format: str) -> None:
        if format != "raw":
            raise Unavailable
        self.fd = os.open(chain[0], os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, buffer: bytearray) -> Any:
        return os.preadv(self.fd, (buffer,), offset)

    def close(self) -> None:
        os.close(self.fd)


class Imgcore(RangeReader):
    """`imgcore.Image.readinto`."""

    def __init__(self, chain: Sequence[Path], format: str, **keywords: Any) -> None:
        self.image = imgcore.open(chain[0], format=format, **keywords)
        self.readinto = self.image.readinto

    def read(self, offset: int, buffer: bytearray) -> Any:
        return self.readinto(offset, buffer)

    def close(self) -> None:
        self.image.close()


class Libyal(RangeReader):
    """The Python modules of libqcow, libvmdk and libvhdi."""

    _MODULES: ClassVar = {"qcow2": "pyqcow", "vmdk": "pyvmdk", "vhd": "pyvhdi", "vhdx": "pyvhdi"}

    def __init__(self, chain: Sequence[Path], format: str) -> None:
        if format not in self._MODULES:
            raise Unavailable
        try:
            module = import_module(self._MODULES[format])
        except ImportError as error:
            raise Unavailable from error
        self.files: list[Any] = []
        for path in chain:
            file = module.handle() if format == "vmdk" else module.file()
            file.open(str(path))
            if format == "vmdk":
                file.open_extent_data_files()
            if self.files:
                self.files[-1].set_parent(file)
            self.files.append(file)
        self.at = self.files[0].read_buffer_at_offset

    def read(self, offset: int, buffer: bytearray) -> Any:
        return self.at(len(buffer), offset)

    def close(self) -> None:
        del self.at
        for file in self.files:
            file.close()


class Dissect(RangeReader):
    """dissect.hypervisor, in Python."""

    _CLASSES: ClassVar = {
        "qcow2": ("qcow2", "QCow2"),
        "vmdk": ("vmdk", "VMDK"),
        "vhd": ("vhd", "VHD"),
        "vhdx": ("vhdx", "VHDX"),
        "vdi": ("vdi", "VDI"),
    }

    def __init__(self, chain: Sequence[Path], format: str) -> None:
        if format not in self._CLASSES:
            raise Unavailable
        module, name = self._CLASSES[format]
        try:
            disk = getattr(import_module(f"dissect.hypervisor.disk.{module}"), name)
        except ImportError as error:
            raise Unavailable from error
        self.file = open(chain[0], "rb") if format == "vhd" else None  # noqa: SIM115
        opened = disk(self.file or chain[0])
        self.stream = opened.open() if hasattr(opened, "open") else opened

    def read(self, offset: int, buffer: bytearray) -> Any:
        self.stream.seek(offset)
        return self.stream.read(len(buffer))

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


class Nbd(RangeReader):
    """qemu-nbd and libnbd, each thread with its connection; both sides' time counts."""

    _NAMES: ClassVar = {"vhd": "vpc"}

    def __init__(self, chain: Sequence[Path], format: str, *, n_connections: int = 1) -> None:
        program = find_qemu_nbd()
        if program is None or len(chain) > 1:  # QEMU reads no VHDX with a parent
            raise Unavailable
        nbd = libnbd()
        self.socket = chain[0].with_name(f"nbd-{chain[0].name}.socket")
        words = [program, "-r", "-e", str(n_connections), "-k", str(self.socket)]
        words += ["-f", self._NAMES.get(format, format), str(chain[0])]
        self.server = subprocess.Popen(words)
        self.handles = []
        while not self.socket.exists():
            if self.server.poll() is not None:
                raise Unavailable
            time.sleep(0.01)
        for _ in range(n_connections):
            handle = nbd.NBD()
            handle.connect_unix(str(self.socket))
            self.handles.append(handle)
        self.free = list(self.handles)
        self.of_thread = threading.local()
        self.of_thread.pread = self.free.pop().pread

    def read(self, offset: int, buffer: bytearray) -> Any:
        try:
            pread = self.of_thread.pread
        except AttributeError:
            pread = self.of_thread.pread = self.free.pop().pread
        return pread(len(buffer), offset)

    def more_cpu_seconds(self) -> float:
        stat = Path(f"/proc/{self.server.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / _TICKS

    def close(self) -> None:
        for handle in self.handles:
            handle.shutdown()
        self.server.terminate()
        self.server.wait()
        self.socket.unlink(missing_ok=True)


def find_qemu_nbd() -> str | None:
    """Return the qemu-nbd beside the qemu-img that is compared with."""
    from benchmarks._environment import find_qemu_img

    beside = os.path.join(os.path.dirname(find_qemu_img()), "qemu-nbd")
    return beside if os.access(beside, os.X_OK) else None


def libnbd() -> Any:
    """Import libnbd's module, which is of Debian and not of PyPI."""
    try:
        return import_module("nbd")
    except ImportError:
        sys.path.append(_DEBIAN_MODULES)
        try:
            return import_module("nbd")
        except ImportError as error:
            raise Unavailable from error
        finally:
            sys.path.remove(_DEBIAN_MODULES)


READERS = {
    "preadv": Preadv,
    "imgcore": Imgcore,
    "libyal": Libyal,
    "dissect": Dissect,
    "nbd": Nbd,
}
