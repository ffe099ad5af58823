"""Streams that are written onto a block device with less room than the whole disk."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
from tests.helpers.images import MIB, noise
from tests.helpers.mounts import loop_device

import imgcore
from imgcore.errors import TargetError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")

NBYTES = 64 * MIB
DATA = noise(3 * MIB)
TARGETS: dict[str, dict[str, Any]] = {
    "qcow2": {"target_format": "qcow2"},
    "qcow2, compressed": {"target_format": "qcow2", "compress": True},
    "vdi": {"target_format": "vdi"},
    "vhd": {"target_format": "vhd"},
    "vhdx": {"target_format": "vhdx", "options": {"block_size": MIB}},
    "vmdk": {"target_format": "vmdk"},
}


@pytest.fixture(params=["vmdk", "raw"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Return the keywords of a conversion from a stream with 3 MiB of data."""
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.vmdk"
    raw.write_bytes(DATA)
    os.truncate(raw, NBYTES)
    if request.param == "raw":
        return {"source": io.BytesIO(raw.read_bytes()), "format": "raw", "size": NBYTES}
    imgcore.convert(raw, image, options={"subformat": "streamOptimized"}, sync=False)
    return {"source": io.BytesIO(image.read_bytes()), "format": "vmdk"}


@pytest.mark.parametrize("target", TARGETS)
def test_it_fits(source: dict[str, Any], target: str, tmp_path: Path) -> None:
    device_file, keywords = tmp_path / "device", TARGETS[target]
    device_file.write_bytes(noise(20 * MIB))
    with loop_device(device_file) as device:
        imgcore.convert(target=device, in_place=True, **source, **keywords)
        result = imgcore.compare(
            tmp_path / "disk.raw",
            device,
            format_a="raw",
            format_b=keywords["target_format"],
        )
    assert result.identical


@pytest.mark.parametrize("target", TARGETS)
def test_it_does_not_fit(source: dict[str, Any], target: str, tmp_path: Path) -> None:
    device_file, keywords = tmp_path / "device", TARGETS[target]
    device_file.write_bytes(noise(2 * MIB))
    with loop_device(device_file) as device:
        with pytest.raises((OSError, TargetError)) as caught:
            imgcore.convert(target=device, in_place=True, **source, **keywords)
        with pytest.raises(imgcore.ImgcoreError):
            imgcore.info(device, format=keywords["target_format"])
    if isinstance(caught.value, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, device)
