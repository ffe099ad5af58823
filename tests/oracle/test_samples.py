"""Images by other programs, read in full and compared with the manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import imgcore
from tests.helpers import qemu
from tests.helpers.samples import SHARED, unpacked_samples

FORMATS = {"raw", "qcow2", "vmdk", "vpc", "vhdx", "vdi"}
READ_NBYTES = 8 << 20


def _entries() -> list[dict[str, Any]]:
    manifest = SHARED / "manifest.json"
    if not manifest.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(manifest.read_text())
    return [row for row in rows if row.get("format") in FORMATS]


@pytest.fixture(scope="session")
def samples() -> Path:
    return unpacked_samples()


def digest(path: Path, image_format: str) -> tuple[int, str]:
    """Return the virtual size and the SHA-256 of the whole guest content."""
    sha = hashlib.sha256()
    with imgcore.open(str(path), format=image_format) as image:
        buffer = bytearray(READ_NBYTES)
        view = memoryview(buffer)
        for offset in range(0, image.virtual_size, READ_NBYTES):
            length = min(READ_NBYTES, image.virtual_size - offset)
            image.readinto(offset, view[:length])
            sha.update(view[:length])
        return image.virtual_size, sha.hexdigest()


@pytest.mark.parametrize("entry", _entries(), ids=lambda entry: entry["path"])
def test_sample(entry: dict[str, Any], samples: Path) -> None:
    path = samples / entry["path"]
    if entry["role"].startswith("negative"):
        with pytest.raises(imgcore.ImgcoreError):
            digest(path, entry["format"])
        return
    assert digest(path, entry["format"]) == (entry["virtual_size"], entry["sha256_raw"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("virtualpc-dynamic.vhd", (136_363_130_880, "chs", "creator")),
        ("hyperv2012r2-dynamic.vhd", (136_365_211_648, "current", "creator")),
        ("d2v-zerofilled.vhd", (263_454_720, "current", "geometry")),
    ],
)
def test_vhd_size_by_its_creator(name: str, expected: tuple[int, str, str], samples: Path) -> None:
    path = samples / "qemu-iotests" / name
    info = imgcore.info(str(path))
    size = info["format-specific"]["data"]["size"]
    assert (info["virtual-size"], size["from"], size["because"]) == expected
    assert qemu.info(path, "vhd")["virtual-size"] == expected[0]
