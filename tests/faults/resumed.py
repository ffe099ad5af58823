"""The kinds of targets of conversions that go on after a break."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import imgcore
from tests.faults.harness import VARIANTS
from tests.helpers import images
from tests.helpers.qemu import Variant

KIB, MIB = images.KIB, images.MIB

DISK = images.RawImage(
    "resumed",
    12 * MIB,
    lambda: [
        (0, images.text(3 * MIB)),
        (4 * MIB, images.noise(3 * MIB, 2)),
        (8 * MIB + 5 * KIB, images.text(2 * MIB, 3)),
        (12 * MIB - 4096, images.noise(4096)),
    ],
)


class Kind(NamedTuple):
    """A kind of target: its name, keywords of `imgcore.convert`, and a file name."""

    name: str
    arguments: Mapping[str, Any]
    target: str = "disk"

    @classmethod
    def of(cls, variant: Variant) -> Kind:
        words = {
            "target_format": variant.format,
            "options": list(variant.options),
            "compress": variant.compress,
        }
        return cls(variant.name, words)


def parent_of(source: Path, format: str) -> str:
    """Make an older state of a disk, beside it, and return the name of the image."""
    path = source.with_name(f"parent.{format}")
    content = bytearray(source.read_bytes())
    for offset in range(0, len(content), 1 * MIB + 64 * KIB):
        content[offset : offset + 200 * KIB] = bytes(len(content[offset : offset + 200 * KIB]))
    older = source.with_name("older.raw")
    older.write_bytes(content)
    imgcore.convert(older, path, target_format=format, force=True)
    return str(path)


KINDS = (
    *(Kind.of(variant) for variant in VARIANTS),
    Kind("raw-zst", {"target_format": "raw.zst"}, "disk.raw.zst"),
    Kind("raw-gz", {"target_format": "raw.gz"}, "disk.raw.gz"),
    Kind("gce", {"profile": "gce"}, "disk.tar.gz"),
    Kind("qcow2-front", {"target_format": "qcow2", "options": ["tables=front"]}),
    Kind(
        "qcow2-front-zlib",
        {"target_format": "qcow2", "options": ["tables=front"], "compress": True},
    ),
    Kind("vhd-front", {"target_format": "vhd", "options": ["tables=front", "subformat=dynamic"]}),
    *(
        Kind(f"{format}-child", {"target_format": format, "backing_format": format, "backing": ""})
        for format in ("vhd", "vhdx", "qcow2")
    ),
)
