"""Parsing arbitrary bytes ends with success or an ImgcoreError, and soon."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import images, qemu, vhd
from tests.helpers.arbitrary import relaxed, use
from tests.helpers.qemu import VARIANTS, Variant

FORMATS = ("raw", "qcow2", "vmdk", "vhd", "vhdx", "vdi")


class Seeds:
    """Small valid images of every kind, as bytes, with a short repr for reports."""

    def __init__(self, folder: Path) -> None:
        self.images = seeds(folder)

    def __repr__(self) -> str:
        return "Seeds()"


def seeds(folder: Path) -> dict[str, bytes]:
    """Return small valid images of every kind, as bytes."""
    raw = folder / "seed.raw"
    rows = [(0, images.text(70_000)), (400_000, images.noise(3000))]
    images.RawImage("seed", 600 * 1024, lambda: rows).write(raw)
    found: dict[str, bytes] = {}
    for variant in VARIANTS[1:]:
        path = folder / f"{variant.name}{variant.suffix}"
        qemu.convert(raw, path, variant)
        found[variant.name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def seed_images(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    return Seeds(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize("image_format", [None, *FORMATS])
@relaxed
@given(data=st.binary(max_size=4096))
def test_noise(image_format: str | None, data: bytes) -> None:
    magics = {
        "qcow2": b"QFI\xfb\x00\x00\x00\x03",
        "vmdk": b"KDMV\x01\x00\x00\x00",
        "vdi": bytes(64) + b"\x7f\x10\xda\xbe\x01\x00\x01\x00",
        "vhdx": b"vhdxfile",
    }
    check_bytes(magics.get(image_format or "", b"") + data, image_format)


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=lambda v: v.name)
@relaxed
@given(
    edits=st.lists(
        st.tuples(
            st.one_of(st.integers(0, 600), st.integers(0, 1 << 20)),
            st.one_of(
                st.binary(min_size=1, max_size=16),
                st.sampled_from([b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7, b"\x80"]),
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    cut=st.one_of(st.none(), st.floats(0, 1)),
)
def test_damaged_images(
    variant: Variant,
    edits: list[tuple[int, bytes]],
    cut: float | None,
    seed_images: Seeds,
) -> None:
    data = bytearray(seed_images.images[variant.name])
    for offset, piece in edits:
        place = offset % len(data)
        data[place : place + len(piece)] = piece
    if cut is not None:
        del data[int(len(data) * cut) :]
    check_bytes(bytes(data), variant.format)


@pytest.mark.parametrize("variant", [qemu.VHD_DYNAMIC, qemu.VHD_FIXED], ids=lambda v: v.name)
@relaxed
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, 1600),
            st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, bytes(8)])),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_damaged_vhd_with_sound_checksums(
    variant: Variant, edits: list[tuple[int, bytes]], seed_images: Seeds
) -> None:
    """Damage that a checksum would reveal is tried with a correct checksum."""
    data = bytearray(seed_images.images[variant.name])
    base = 0 if variant is qemu.VHD_DYNAMIC else len(data) - 512
    for offset, piece in edits:
        place = base + offset % (len(data) - base)
        data[place : place + len(piece)] = piece[: len(data) - place]
    data[base + 64 : base + 68] = vhd.checksum(bytes(data[base : base + 512]), 64)
    if variant is qemu.VHD_DYNAMIC:
        data[512 + 36 : 512 + 40] = vhd.checksum(bytes(data[512:1536]), 36)
        data[-512:] = data[:512]
    check_bytes(bytes(data), variant.format)


def check_bytes(data: bytes, image_format: str | None) -> None:
    """Write ``data`` to a new file and use it."""
    with tempfile.TemporaryDirectory(prefix="imgcore-bytes-") as name:
        path = Path(name) / "image.bin" if image_format == "raw" else Path(name) / "image"
        path.write_bytes(data)
        use(path, image_format)
