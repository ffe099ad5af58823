"""A disk for tests of reflinks, and conversions of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imgcore
from tests.helpers import images, qemu
from tests.helpers.images import KIB, MIB, RawImage
from tests.helpers.qemu import Variant

# Long data, zeros inside, data across boundaries, and an end inside a block.
DISK = RawImage(
    "reflink",
    12 * MIB + 5 * 512,
    lambda: [
        (0, images.text(3 * MIB)),
        (4 * MIB + 512, images.noise(300 * KIB)),
        (6 * MIB, images.noise(200 * KIB) + bytes(64 * KIB) + images.noise(120 * KIB)),
        (12 * MIB - 70 * KIB, images.text(70 * KIB + 5 * 512)),
    ],
)
# Bytes of whole 4 KiB blocks with data, in runs of at least 64 KiB.
SHARABLE_NBYTES = 3 * MIB + (304 + 200 + 120 + 72) * KIB
PLAIN = tuple(
    v for v in qemu.VARIANTS if not v.compress and "subformat=streamOptimized" not in v.options
)


def make_source(folder: Path, variant: Variant = qemu.RAW) -> tuple[Path, Path]:
    """Write the disk as raw and as an image by imgcore."""
    raw = folder / "disk.raw"
    DISK.write(raw)
    if variant is qemu.RAW:
        return raw, raw
    path = folder / f"source{variant.suffix}"
    imgcore.convert(
        raw, path, format="raw", target_format=variant.format, options=list(variant.options)
    )
    return raw, path


def convert(source: Path, target: Path, variant: Variant, **more: Any) -> imgcore.ConvertResult:
    options = [*variant.options, *variant.own_options, *more.pop("options", ())]
    more.setdefault("format", {".raw": "raw"}.get(source.suffix))
    more.setdefault("sync", False)
    return imgcore.convert(source, target, target_format=variant.format, options=options, **more)
