"""Images that are written as streams, through real pipes, read by other programs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.command import imgcore
from tests.helpers.images import noise
from tests.helpers.mounts import loop_device

MIB = 1 << 20


def test_a_block_device_is_refused(tmp_path: Path) -> None:
    """The message's advice works: the device as the target, with -n."""
    disk, medium = tmp_path / "disk.raw", tmp_path / "medium"
    disk.write_bytes(noise(MIB))
    medium.write_bytes(bytes(MIB))
    with loop_device(medium) as device:
        with open(device, "wb") as stdout:
            done = subprocess.run(
                [sys.executable, "-m", "imgcore", "convert", "-O", "raw", str(disk), "-"],
                stdout=stdout,
                stderr=subprocess.PIPE,
                timeout=60,
            )
        assert done.returncode == 1
        assert b"name it as the target instead, with -n" in done.stderr
        written = imgcore("convert", "-n", "-O", "raw", disk, device)
        assert written.returncode == 0, written.stderr
        with open(device, "rb") as file:
            assert file.read() == disk.read_bytes()
