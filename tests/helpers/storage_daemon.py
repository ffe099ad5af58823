"""Runs qemu-storage-daemon, which is a QEMU without a machine, and commands it."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class StorageDaemon:
    """A running daemon that serves NBD.

    Parameters
    ----------
    folder : Path
        For its sockets.
    """

    def __init__(self, folder: Path) -> None:
        self._nbd = folder / "nbd.sock"
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(60)
        self._connection.connect(str(folder / "qmp.sock"))
        self._file = self._connection.makefile("rw")
        self._file.readline()
        self.call("qmp_capabilities")

    def call(self, command: str, **arguments: Any) -> Any:
        """Run a command of QMP; underscores in arguments are hyphens."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._file.write(json.dumps({"execute": command, "arguments": named}) + "\n")
        self._file.flush()
        while True:
            answer = json.loads(self._file.readline())
            if "error" in answer:
                raise AssertionError(f"{command} {named}: {answer['error']}")
            if "return" in answer:
                return answer["return"]

    def url(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self._nbd}"

    def guest_writes(self, export: str, *commands: str) -> None:
        """Let qemu-io run commands over NBD, as a guest would write."""
        words = [word for command in commands for word in ("-c", command)]
        subprocess.run(
            ["qemu-io", "-f", "raw", *words, self.url(export)],
            check=True,
            capture_output=True,
            timeout=60,
        )

    def close(self) -> None:
        self._file.close()
        self._connection.close()


@contextmanager
def storage_daemon(folder: Path, *options: str) -> Iterator[StorageDaemon]:
    """Run a daemon, or skip the test."""
    program = shutil.which("qemu-storage-daemon")
    if program is None or shutil.which("qemu-io") is None:
        pytest.skip("qemu-storage-daemon is not installed (Debian: qemu-system-common)")
    command = [
        program,
        "--chardev",
        f"socket,path={folder}/qmp.sock,server=on,wait=off,id=qmp",
        "--monitor",
        "chardev=qmp",
        "--nbd-server",
        f"addr.type=unix,addr.path={folder}/nbd.sock",
        *options,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while not (folder / "qmp.sock").exists() and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None:
            assert process.stderr is not None
            raise AssertionError(process.stderr.read())
        daemon = StorageDaemon(folder)
        try:
            yield daemon
            daemon.call("quit")
        finally:
            daemon.close()
    finally:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(10)
        assert process.stderr is not None
        process.stderr.close()
