"""qemu-img and vbox-img as oracles: find them, and make the calls that tests need."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest


@cache
def find_program(name: str) -> str | None:
    """Return the path of a program in ``$IMGCORE_PEERS/bin``, or on PATH."""
    peers = os.environ.get("IMGCORE_PEERS")
    if peers:
        candidate = os.path.join(peers, "bin", name)
        if os.access(candidate, os.X_OK):
            return candidate
    return shutil.which(name)


def require_qemu_img() -> str:
    """Return qemu-img's path.

    Without it skip the test, or fail if IMGCORE_REQUIRE_QEMU is set.
    """
    return _require("qemu-img", "qemu-utils")


def require_vbox_img() -> str:
    """Return vbox-img's path, or skip the test."""
    program = find_program("vbox-img")
    if program is None:
        pytest.skip("vbox-img is not installed (set IMGCORE_PEERS)")
    return program


def _require(name: str, package: str) -> str:
    program = find_program(name)
    if program is None:
        message = f"{name} is not installed (Debian: {package})"
        if os.environ.get("IMGCORE_REQUIRE_QEMU"):
            pytest.fail(message)
        pytest.skip(message)
    return program


def run(*arguments: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    """Run qemu-img; a failure shows its output."""
    return checked([require_qemu_img(), *map(os.fspath, arguments)])


def checked(command: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command; a failure shows its output."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, cwd=cwd
    )
    if done.returncode != 0:
        raise AssertionError(
            f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done


@contextmanager
def held_open(*arguments: str | Path) -> Iterator[None]:
    """Keep an image open in qemu-io while the block runs, or skip the test."""
    program = shutil.which("qemu-io")
    if program is None:
        pytest.skip("qemu-io is not installed (Debian: qemu-utils)")
    process = subprocess.Popen(
        [program, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    # An answer means that the image is open.
    process.stdin.write(b"length\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    try:
        yield
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=10)


@dataclass(frozen=True)
class Variant:
    """A target that both tools can write: ``-O`` name, ``-o`` options, ``-c``."""

    name: str
    format: str
    options: tuple[str, ...] = ()
    compress: bool = False
    # Only for imgcore: makes its output the same on every run.
    own_options: tuple[str, ...] = ()
    # Only for qemu-img.
    qemu_options: tuple[str, ...] = ()

    @property
    def suffix(self) -> str:
        return f".{self.format}"

    def with_options(self, *options: str) -> Variant:
        """Return this variant with more options."""
        name = "-".join((self.name, *(option.replace("=", "_") for option in options)))
        return replace(self, name=name, options=(*self.options, *options))


RAW = Variant("raw", "raw")
QCOW2 = Variant("qcow2", "qcow2")
QCOW2_ZLIB = Variant("qcow2-zlib", "qcow2", (), True)
QCOW2_ZSTD = Variant("qcow2-zstd", "qcow2", ("compression_type=zstd",), True)
VMDK_SPARSE = Variant(
    "vmdk-monolithicSparse", "vmdk", ("subformat=monolithicSparse",), False, ("cid=1a2b3c4d",)
)
VMDK_STREAM = Variant(
    "vmdk-streamOptimized", "vmdk", ("subformat=streamOptimized",), False, ("cid=1a2b3c4d",)
)
VMDK_FLAT = Variant(
    "vmdk-monolithicFlat", "vmdk", ("subformat=monolithicFlat",), False, ("cid=1a2b3c4d",)
)
_VHD_UUID = ("uuid=8a1f0c6e-4d5b-4f5e-9d54-2b6f3c1a7e90",)
VHD_DYNAMIC = Variant(
    "vhd-dynamic", "vhd", ("subformat=dynamic",), False, _VHD_UUID, ("force_size",)
)
VHD_FIXED = Variant("vhd-fixed", "vhd", ("subformat=fixed",), False, _VHD_UUID, ("force_size",))
_VDI_UUID = ("uuid=6f9619ff-8b86-d011-b42d-00c04fc964ff",)
VDI = Variant("vdi", "vdi", (), False, _VDI_UUID)
VDI_FIXED = Variant("vdi-fixed", "vdi", ("static=on",), False, _VDI_UUID)
_VHDX_GUIDS = tuple(
    f"{name}=8a1f0c6e-4d5b-4f5e-9d54-2b6f3c1a7e90"
    for name in ("virtual_disk_id", "data_write_guid", "file_write_guid")
)
VHDX_DYNAMIC = Variant(
    "vhdx-dynamic", "vhdx", ("subformat=dynamic", "block_size=8M"), False, _VHDX_GUIDS
)
VHDX_FIXED = Variant("vhdx-fixed", "vhdx", ("subformat=fixed",), False, _VHDX_GUIDS)
VARIANTS = (
    RAW,
    QCOW2,
    QCOW2_ZLIB,
    QCOW2_ZSTD,
    VMDK_SPARSE,
    VMDK_STREAM,
    VMDK_FLAT,
    VHD_DYNAMIC,
    VHD_FIXED,
    VDI,
    VDI_FIXED,
    VHDX_DYNAMIC,
    VHDX_FIXED,
)


def _name(image_format: str) -> str:
    """Return qemu-img's name of a format."""
    return {"vhd": "vpc"}.get(image_format, image_format)


def convert(source: Path, target: Path, variant: Variant, *, source_format: str = "raw") -> None:
    """Convert with qemu-img, in its default order of writes."""
    arguments: list[str | Path] = ["convert", "-f", _name(source_format)]
    arguments += ["-O", _name(variant.format)]
    if variant.compress:
        arguments.append("-c")
    options = (*variant.options, *variant.qemu_options)
    if options:
        arguments += ["-o", ",".join(options)]
    run(*arguments, source, target)


def assert_same(source: Path, target: Path, *, source_format: str, target_format: str) -> None:
    """Fail unless the two images are identical for ``qemu-img compare``."""
    run("compare", "-f", _name(source_format), "-F", _name(target_format), source, target)


def assert_check_clean(path: Path, image_format: str = "qcow2") -> dict[str, Any]:
    """Fail if ``qemu-img check`` finds corruption or leaks; return its report."""
    done = run("check", "--output=json", "-f", _name(image_format), path)
    report: dict[str, Any] = json.loads(done.stdout)
    assert report.get("corruptions", 0) == 0, report
    assert report.get("leaks", 0) == 0, report
    assert report.get("check-errors", 0) == 0, report
    return report


def map_entries(path: Path, image_format: str) -> list[dict[str, Any]]:
    """Return the rows of ``qemu-img map``."""
    done = run("map", "--output=json", "-f", _name(image_format), path)
    entries: list[dict[str, Any]] = json.loads(done.stdout)
    return entries


def data_nbytes(path: Path, image_format: str) -> int:
    """Return how many guest bytes are data for ``qemu-img map``."""
    return sum(row["length"] for row in map_entries(path, image_format) if row["data"])


def info(path: Path, image_format: str) -> dict[str, Any]:
    """Return ``qemu-img info``."""
    done = run("info", "--output=json", "-f", _name(image_format), path)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def disk_nbytes(path: Path) -> int:
    """Return the bytes that an image takes on disk, with a flat extent beside it."""
    files = [path, path.with_name(f"{path.stem}-flat{path.suffix}")]
    return sum(os.stat(file).st_blocks * 512 for file in files if file.exists())
