"""check -r of VDI, VHD and VHDX: problems that stay, and why; -r leaks and -r all."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.helpers import vdi, vhd, vhdx
from tests.helpers.command import imgcore as run
from tests.helpers.images import noise
from tests.helpers.reading import poke

import imgcore

MIB = 1 << 20
VHD_BLOCK = 8192
BY_ALL = "-r all repairs this, -r leaks does not"
BETWEEN = "leaked blocks between others cannot be cut off; imgcore convert writes an image"


def vdi_with(entries: list[int], n_allocated: int, n_extra: int = 0) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = vdi.make(folder / "a.vdi", entries, n_allocated=n_allocated)
        with path.open("ab") as file:
            file.write(bytes(n_extra * vdi.BLOCK))
        return path

    return write


def vhd_with(
    *changes: tuple[int, bytes], blocks: tuple[int, ...] = (0, 1, 4)
) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        stored = {number: vhd.Block(noise(VHD_BLOCK, number)) for number in blocks}
        path = vhd.dynamic(folder / "a.vhd", 6 * VHD_BLOCK, stored, block_nbytes=VHD_BLOCK)
        return poke(path, *changes)

    return write


def vhd_entry(block: int, sector: int) -> tuple[int, bytes]:
    return vhd.TABLE_OFFSET + 4 * block, vhd.be32(sector)


def fixed_vhd(folder: Path) -> Path:
    return vhd.fixed(folder / "a.vhd", bytes(VHD_BLOCK), data_offset=512)


def vhdx_with(*changes: tuple[int, bytes], n_extra: int = 0) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        blocks = {0: (vhdx.FULL, vhdx.pattern(0, MIB)), 1: (vhdx.FULL, vhdx.pattern(1, MIB))}
        path = poke(vhdx.Vhdx(4 * MIB, blocks=blocks).write(folder / "a.vhdx"), *changes)
        with path.open("ab") as file:
            file.write(bytes(n_extra * MIB))
        return path

    return write


# An image, then for each mode: corruptions and leaks that stay, words of each reason.
Case = tuple[Callable[[Path], Path], tuple[int, int, list[str]], tuple[int, int, list[str]]]
CASES: dict[str, Case] = {
    "vdi count": (vdi_with([0, 1], 1), (1, 0, [BY_ALL]), (0, 0, [])),
    "vdi count and leaks": (vdi_with([0, 1], 1, 3), (1, 0, [BY_ALL]), (0, 0, [])),
    "vdi high count": (vdi_with([0, 1], 7, 3), (0, 0, []), (0, 0, [])),
    "vdi gap": (vdi_with([0, 2], 2), (0, 1, [BETWEEN]), (0, 1, [BETWEEN])),
    "vdi gap and count": (
        vdi_with([0, 2, 4], 4),
        (1, 2, ["VirtualBox derives", BETWEEN]),
        (1, 2, ["VirtualBox derives", BETWEEN]),
    ),
    "vdi overlap": (
        vdi_with([0, 0], 2, 2),
        (1, 2, ["blocks overlap or end past"]),
        (1, 2, ["blocks overlap or end past"]),
    ),
    "vhd footer": (
        vhd_with((55 * 512 + 90, b"\1")),
        (1, 0, ["the footer or its copy: " + BY_ALL]),
        (0, 0, []),
    ),
    "vhd gap": (vhd_with(vhd_entry(1, 0xFFFFFFFF)), (0, 1, [BETWEEN]), (0, 1, [BETWEEN])),
    "vhd end": (vhd_with(vhd_entry(4, 0xFFFFFFFF)), (0, 0, []), (0, 0, [])),
    "vhd overlap": (
        vhd_with(vhd_entry(2, 4)),
        (1, 0, ["blocks overlap or end outside"]),
        (1, 0, ["blocks overlap or end outside"]),
    ),
    "vhd fixed": (fixed_vhd, (1, 0, ["a fixed disk has one"]), (1, 0, ["a fixed disk has one"])),
    "vhdx header": (
        vhdx_with((vhdx.HEADERS[1] + 100, b"x")),
        (1, 0, ["damaged copies of headers: " + BY_ALL]),
        (0, 0, []),
    ),
    "vhdx end": (vhdx_with(n_extra=3), (0, 0, []), (0, 0, [])),
    "vhdx overlap": (
        vhdx_with((vhdx.BAT_OFFSET + 16, struct.pack("<Q", 1 * MIB | 6))),
        (1, 0, ["blocks overlap, lie outside"]),
        (1, 0, ["blocks overlap, lie outside"]),
    ),
}


@pytest.mark.parametrize("mode", ["leaks", "all"])
@pytest.mark.parametrize("case", CASES)
def test_what_stays(tmp_path: Path, case: str, mode: str) -> None:
    make, leaks, everything = CASES[case]
    corruptions, n_leaks, reasons = leaks if mode == "leaks" else everything
    path = make(tmp_path)
    before = path.read_bytes()
    done = run("check", "-r", mode, path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("Not repaired: ")]
    assert len(lines) == len(reasons), done.stderr
    for line, reason in zip(lines, reasons, strict=True):
        assert reason in line
    left = imgcore.check(path)
    assert (left.corruptions, left.leaks) == (corruptions, n_leaks), left.problems
    assert done.returncode == (2 if corruptions else 3 if n_leaks else 0)
    if "Repaired" not in done.stderr:
        assert path.read_bytes() == before
    if BETWEEN in reasons:
        # The advice.
        new = tmp_path / f"new{path.suffix}"
        assert run("convert", path, new).returncode == 0
        assert imgcore.check(new).ok
        assert imgcore.compare(path, new).identical
