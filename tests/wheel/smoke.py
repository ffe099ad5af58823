"""Tries an installed imgcore, in one process and without pytest: raw there and back.

``--without NAME,NAME`` fails if a kernel of one of these names runs on this CPU.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import imgcore
from imgcore import _core

MIB = 1 << 20
STEPS = (
    ("disk.qcow2", {"compress": True}),
    ("zstd.qcow2", {"compress": True, "options": {"compression_type": "zstd"}}),
    ("stream.vmdk", {"options": {"subformat": "streamOptimized"}}),
    ("disk.vhd", {}),
    ("disk.vhdx", {}),
    ("disk.vdi", {}),
    ("back.raw", {}),
)


def content() -> bytes:
    """Return 8 MiB: text, zeros, noise."""
    generator = random.Random(1)
    text = b"".join(b"line %d\n" % generator.randrange(1000) for _ in range(200_000))
    return text[:MIB].ljust(4 * MIB, b"\0") + generator.randbytes(MIB) + bytes(3 * MIB)


# The checksum of one byte "A"; see native/tests/test_checksum.c.
CHECKSUMS = {
    "sha256": "60fb4e2bdf7dfc32f8230836f7453a77e665e4a1d3cc117944e0296d40b7800c",
    "blake3": "e545980b0c7bf3de8127683bbf1d7eeeacd0c4c9a08246d9a4635b5cf2e186aa",
}


def checksum(algorithm: str) -> str:
    """Return the checksum of one byte "A"."""
    hasher = _core.Hasher(algorithm)
    hasher.update(b"A")
    return hasher.digest().hex()


def main() -> None:
    """Convert from format to format, and compare with the source."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--without", default="")
    unwanted = set(filter(None, parser.parse_args().without.split(",")))
    running = {
        str(row["name"]) for rows in _core.variants().values() for row in rows if row["runnable"]
    }
    assert not running & unwanted, running
    assert {name: checksum(name) for name in CHECKSUMS} == CHECKSUMS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "disk.raw"
        source.write_bytes(content())
        previous = source
        for step, options in STEPS:
            imgcore.convert(previous, folder / step, **options)
            assert imgcore.compare(source, folder / step).identical, step
            previous = folder / step
        assert previous.read_bytes() == content()
    print(f"imgcore {imgcore.__version__}: {len(STEPS)} formats, kernels {sorted(running)}")


if __name__ == "__main__":
    main()
