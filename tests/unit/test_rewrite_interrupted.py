"""An old image that a guest uses between an interrupted conversion and its recovery."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from tests.helpers import qemu
from tests.helpers.rewrite_pairs import qemu_io
from tests.helpers.tiny import killed_after

import imgcore
from imgcore.errors import ImgcoreError
from imgcore.limits import MIB

SIZE = 8 * MIB
# Each format becomes this one.
TARGETS = {"raw": "qcow2", "qcow2": "vmdk", "vhdx": "vmdk", "vmdk": "qcow2", "vdi": "vmdk"}


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """Return a raw disk, in another folder than the images."""
    rng, path = random.Random(3), tmp_path / "original.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for offset in (0, 3 * MIB):
            file.seek(offset)
            file.write(rng.randbytes(200_000))
    return path


def interrupted(original: Path, format: str, record: str) -> Path:
    """Return an image whose conversion was killed after a record of its journal."""
    path = original.parent / "images" / f"disk.{format}"
    path.parent.mkdir()
    qemu.run("convert", "-f", "raw", "-O", format, original, path)
    killed_after(record, path, lambda path: imgcore.rewrite(path, TARGETS[format]))
    assert (path.parent / f"{path.name}.imgcore-journal").exists()
    return path


def guest_writes(offset: int, image: Path, original: Path, format: str) -> None:
    for path, name in ((image, format), (original, "raw")):
        qemu_io(path, name, [f"write -P 7 {offset} {MIB}"])


def same(image: Path | str, original: Path, nbytes: int = SIZE) -> bool:
    """Tell whether the disk, which may have got longer, is as the guest left it."""
    with imgcore.open(image) as disk, original.open("rb") as expected:
        return disk.read(0, nbytes) == expected.read(nbytes)


@pytest.mark.parametrize("record", ["appended", "armed"])
@pytest.mark.parametrize("format", TARGETS)
@pytest.mark.parametrize("offset", [0, 6 * MIB])
@pytest.mark.parametrize("action", ["rewrite", "undo"])
def test_what_a_guest_wrote_is_kept(
    action: str, offset: int, format: str, record: str, original: Path
) -> None:
    """The old image goes on from there, or the command refuses and changes nothing."""
    image = interrupted(original, format, record)
    guest_writes(offset, image, original, format)
    used, used_ns = image.read_bytes(), image.stat().st_mtime_ns
    try:
        if action == "undo":
            path = imgcore.undo_rewrite(image)
        else:
            path = imgcore.rewrite(image, TARGETS[format]).path
    except ImgcoreError as error:
        assert "another program has written to it since" in str(error)
        assert (image.read_bytes(), image.stat().st_mtime_ns) == (used, used_ns)
        assert same(image, original)
        assert format != "vhdx"
    else:
        assert same(path, original)
        assert imgcore.check(path).corruptions == 0 if format != "raw" else True
