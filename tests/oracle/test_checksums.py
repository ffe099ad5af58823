"""Digests of disks in every format, against the definition and nbdcopy."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from imgcore.disk.open_options import OpenOptions
from imgcore.disk.source import open_source
from imgcore.engine.hashing import digest_disk, digest_geometry
from tests.helpers import qemu
from tests.helpers.images import MIB, noise, text

BLOCK = 64 << 10


def digest_of(content: bytes) -> str:
    """Return the checksum as it is defined."""
    blocks = (content[at : at + BLOCK] for at in range(0, len(content), BLOCK))
    leaves = b"".join(hashlib.sha256(block).digest() for block in blocks)
    return hashlib.sha256(leaves + len(content).to_bytes(8, "little")).hexdigest()


def ours(path: Path, image_format: str | None = None, threads: int = 2) -> str:
    with open_source(path, OpenOptions(format=image_format)) as source:
        nbytes = source.exact_nbytes
        with source.supply(digest_geometry(nbytes), None) as supply:
            return digest_disk(supply, nbytes, "sha256", threads=threads, variants={}).hex()


def scattered() -> bytes:
    """Return data at odd sectors, zeros as data, and text that compresses."""
    content = bytearray(24 * MIB + 3 * 512)
    content[0 : 2 * MIB] = noise(2 * MIB)
    content[5 * MIB + 1536 : 5 * MIB + 70_000] = noise(70_000 - 1536, 5)
    content[8 * MIB : 12 * MIB] = text(4 * MIB)
    content[20 * MIB - 1] = 1
    content[-512:] = noise(512, 7)
    return bytes(content)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("checksums") / "disk.raw"
    content = scattered()
    path.write_bytes(content)
    return path, digest_of(content)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("variant", qemu.VARIANTS, ids=lambda variant: variant.name)
def test_every_format_has_the_digest_of_its_content(
    raw: tuple[Path, str], variant: qemu.Variant, threads: int, tmp_path: Path
) -> None:
    target = tmp_path / f"disk.{variant.format}"
    qemu.convert(raw[0], target, variant)
    assert ours(target, variant.format, threads) == raw[1]


def odd(path: Path) -> None:
    path.write_bytes(noise(3 * BLOCK) + bytes(2 * BLOCK) + b"end")


def with_a_short_zero_block(path: Path) -> None:
    path.write_bytes(noise(BLOCK))
    with path.open("ab") as file:
        file.truncate(5 * BLOCK + 100)


def zeros_as_data(path: Path) -> None:
    path.write_bytes(bytes(4 * BLOCK) + noise(5) + bytes(BLOCK))


def empty(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 << 30)


@pytest.mark.peers
@pytest.mark.parametrize("make", [odd, with_a_short_zero_block, zeros_as_data, empty])
def test_nbdcopy_prints_the_same(make: Callable[[Path], None], tmp_path: Path) -> None:
    """libnbd 1.22 or newer has it."""
    nbdcopy = qemu.find_program("nbdcopy")
    if (
        nbdcopy is None
        or "--blkhash"
        not in subprocess.run(
            [nbdcopy, "--help"], capture_output=True, text=True, check=True
        ).stdout
    ):
        pytest.skip("there is no nbdcopy with --blkhash in $IMGCORE_PEERS or on PATH")
    path = tmp_path / "disk.raw"
    make(path)
    done = subprocess.run(
        [nbdcopy, "--blkhash=sha256", "--", path, "null:"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[0] == ours(path, "raw")
