"""VDIs whose unused slots got blocks of zeros, written to, compacted and resized."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest

import imgcore
from tests.helpers import qcow2, qemu, vhdx
from tests.helpers.directed import content, rewrite
from tests.helpers.reading import poke
from tests.helpers.vhdx import FULL, MIB, Vhdx, pattern

SECTOR = 512


def _with_gaps(folder: Path) -> tuple[Path, str]:
    """Return a VHDX that has lost two of its blocks."""
    path = folder / "a"
    Vhdx(12 * MIB, blocks={n: (FULL, pattern(n + 1, MIB)) for n in range(10)}).write(path)
    poke(path, *((vhdx.BAT_OFFSET + 8 * n, bytes(8)) for n in (3, 7)))
    return path, "vhdx"


def _without_free_blocks(folder: Path) -> tuple[Path, str]:
    """Return a fixed VHD of which each block has data; one moves."""
    return _fixed(folder, 6 * MIB), "vhd"


def _with_a_footer_in_the_last_block(folder: Path) -> tuple[Path, str]:
    return _fixed(folder, 6 * MIB + 77 * SECTOR), "vhd"


def _fixed(folder: Path, nbytes: int) -> Path:
    raw, path = folder / "d.raw", folder / "a"
    raw.write_bytes(pattern(1, nbytes))
    options = {"subformat": "fixed"}
    imgcore.convert(raw, path, target_format="vhd", options=options, sync=False)
    return path


class Disk:
    """A VDI, and the bytes that its disk must have."""

    def __init__(self, path: Path, disk: bytes) -> None:
        self.path, self.disk = path, bytearray(disk)

    def guest_writes(self, seed: int) -> None:
        """Write some sectors through QEMU."""
        rng = random.Random(seed)
        commands = []
        n_sectors = len(self.disk) // SECTOR
        for value in range(1, 41):
            first = rng.randrange(n_sectors)
            count = min(rng.randrange(1, 300), n_sectors - first)
            start, nbytes = first * SECTOR, count * SECTOR
            commands.append(f"write -P {value} {start} {nbytes}")
            self.disk[start : start + nbytes] = bytes([value]) * nbytes
        qcow2.qemu_io(self.path, *commands)

    def assert_same(self) -> None:
        """QEMU, VirtualBox and imgcore read the same and find nothing wrong."""
        raw = self.path.with_suffix(".raw")
        raw.write_bytes(self.disk)
        qemu.assert_same(raw, self.path, source_format="raw", target_format="vdi")
        qemu.run("check", "-f", "vdi", self.path)
        assert content(self.path, "vdi") == self.disk
        assert imgcore.check(self.path).ok
        if qemu.find_program("vbox-img") is None:
            return
        out = self.path.with_suffix(".vbox.raw")
        vbox("convert", "--srcfilename", self.path, "--dstfilename", out, "--dstformat", "RAW")
        assert out.read_bytes() == self.disk
        out.unlink()


def vbox(*words: str | Path) -> None:
    subprocess.run([qemu.require_vbox_img(), *words], check=True, capture_output=True)


@pytest.mark.parametrize(
    "make", [_with_gaps, _without_free_blocks, _with_a_footer_in_the_last_block]
)
def test_slots_stay_without_gaps(tmp_path: Path, make) -> None:  # type: ignore[no-untyped-def]
    source, source_format = make(tmp_path)
    before = content(source, source_format)
    rewrite(source, source_format, "vdi")
    disk = Disk(source.rename(tmp_path / "a.vdi"), before)
    disk.assert_same()
    disk.guest_writes(1)
    disk.assert_same()
    # The rest needs VirtualBox.
    vbox("compact", "--filename", disk.path)
    disk.assert_same()
    larger = len(disk.disk) + 9 * MIB
    vbox("resize", "--filename", disk.path, "--size", str(larger))
    disk.disk += bytes(larger - len(disk.disk))
    disk.assert_same()
    disk.guest_writes(2)
    disk.assert_same()
