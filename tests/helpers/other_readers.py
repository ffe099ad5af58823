"""Readers other than QEMU, each in a separate process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers import images, qemu

# The library leaves files open, which is an error in the tests' process.
DISSECT = """
import hashlib, pathlib, sys
from dissect.hypervisor.disk.{module} import {name}
disk = {name}({argument})
stream = disk.open() if hasattr(disk, "open") else disk
digest = hashlib.sha256()
while piece := stream.read({piece_nbytes}):  # of a VDI, it reads no two blocks at once right
    digest.update(piece)
print(stream.size, digest.hexdigest())
"""
DISSECT_PIECE_NBYTES = 128 * images.KIB


def assert_dissect_reads(raw: Path, ours: Path, module: str, name: str, argument: str) -> None:
    """Fail unless dissect.hypervisor reads the raw disk's bytes from an image."""
    pytest.importorskip("dissect.hypervisor")
    code = DISSECT.format(
        module=module, name=name, argument=argument, piece_nbytes=DISSECT_PIECE_NBYTES
    )
    done = qemu.checked([sys.executable, "-c", code, str(ours)], cwd=ours.parent)
    assert done.stdout.split() == [str(raw.stat().st_size), images.sha256(raw)]


# A library in C without code of QEMU.
LIBVHDI = """
import hashlib, sys, pyvhdi
files, piece = [], int(sys.argv[1])
for path in sys.argv[2:]:
    file = pyvhdi.file()
    file.open(path)
    if files:
        files[-1].set_parent(file)
    files.append(file)
disk = files[0]
sha, size = hashlib.sha256(), disk.get_media_size()
for offset in range(0, size, piece):
    sha.update(disk.read_buffer_at_offset(min(piece, size - offset), offset))
print(size, sha.hexdigest())
"""


def assert_libvhdi_reads(raw: Path, *chain: Path, piece_nbytes: int = images.MIB) -> None:
    """Fail unless libvhdi reads the raw disk's bytes from a chain, the child first.

    It does not read pieces right in which a VHD's sector bitmap changes.
    """
    pytest.importorskip("pyvhdi")
    words = [str(piece_nbytes), *map(str, chain)]
    done = qemu.checked([sys.executable, "-c", LIBVHDI, *words])
    assert done.stdout.split() == [str(raw.stat().st_size), images.sha256(raw)]
