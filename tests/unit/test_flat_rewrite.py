"""Raw disks and fixed VHDs become each other by what follows the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.helpers.directed import rewrite
from tests.helpers.vhdx import MIB, pattern

import imgcore
from imgcore.errors import OptionError, UnsupportedFeatureError

FIXED = {"subformat": "fixed", "uuid": "6ba7b810-9dad-11d1-80b4-00c04fd430c8"}
FOOTER_NBYTES = 512


def both(folder: Path, nbytes: int, options: dict[str, str]) -> tuple[Path, Path]:
    """Return a raw disk, and the VHD that a conversion makes of it."""
    raw, vhd = folder / "a.raw", folder / "a.vhd"
    raw.write_bytes(pattern(1, nbytes))
    imgcore.convert(raw, vhd, options=options, sync=False)
    return raw, vhd


@pytest.mark.parametrize("nbytes", [2 * MIB, 2 * MIB + 77 * 512])
@pytest.mark.parametrize("size", ["current", "chs"])
def test_there_and_back(tmp_path: Path, nbytes: int, size: str) -> None:
    options = FIXED | {"size": size}
    raw, vhd = both(tmp_path, nbytes, options)
    disk, image = raw.read_bytes(), vhd.read_bytes()
    cost = rewrite(raw, "raw", "vhd", options)
    assert raw.read_bytes() == image
    assert (cost.bytes_moved, cost.bytes_overwritten, cost.bytes_tables) == (0, 0, FOOTER_NBYTES)
    cost = rewrite(raw, "vhd", "raw")
    assert raw.read_bytes() == image[:-FOOTER_NBYTES] == disk.ljust(cost.file_size, b"\0")


def test_a_larger_flat_extent(tmp_path: Path) -> None:
    """What follows the disk in its file is not seen by the guest, also if it grows."""
    raw = tmp_path / "a.raw"
    raw.write_bytes(pattern(1, 2 * MIB))
    imgcore.convert(raw, tmp_path / "a.vmdk", options={"subformat": "monolithicFlat"}, sync=False)
    flat = tmp_path / "a-flat.vmdk"
    for target, options in (("raw", {}), ("vhd", FIXED), ("vhd", FIXED | {"size": "chs"})):
        flat.write_bytes(pattern(1, 2 * MIB) + b"\x77" * 70000)
        expected = tmp_path / "expected"
        imgcore.convert(
            raw, expected, target_format=target, options=options, sync=False, force=True
        )
        rewrite(tmp_path / "a.vmdk", "vmdk", target, options, data=flat)
        assert flat.read_bytes() == expected.read_bytes()


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, vhd = both(tmp_path, MIB, FIXED)
    image = tmp_path / "a.qcow2"
    imgcore.convert(raw, image, sync=False)
    before = image.read_bytes()
    for target, options in (("raw", {}), ("vhd", FIXED)):
        with pytest.raises(UnsupportedFeatureError, match="imgcore convert writes them in order"):
            rewrite(image, "qcow2", target, options)
    for path, source, advice in (
        (image, "qcow2", "imgcore convert writes one"),
        (raw, "raw", "-o subformat=fixed makes a fixed one"),
    ):
        with pytest.raises(UnsupportedFeatureError, match=f"512 bytes before each block.*{advice}"):
            rewrite(path, source, "vhd")
    with pytest.raises(OptionError, match="keeps its space and its holes"):
        rewrite(raw, "raw", "vhd", FIXED | {"preallocation": "full"})
    monkeypatch.setattr("imgcore.formats.shared.flat_rewriter.MAX_DROPPED_NBYTES", 511)
    with pytest.raises(UnsupportedFeatureError, match="512 bytes follow .* at most 511 can be cut"):
        rewrite(vhd, "vhd", "raw")
    assert image.read_bytes() == before
    # As advised.
    imgcore.convert(image, tmp_path / "b.vhd", sync=False)
    imgcore.convert(image, tmp_path / "b.raw", sync=False)
    rewrite(raw, "raw", "vhd", FIXED)
