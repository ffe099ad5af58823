"""imgcore's conversion with the interface of the oracle's."""

from __future__ import annotations

from pathlib import Path

import imgcore
from tests.helpers.qemu import Variant


def convert(
    source: Path,
    target: Path,
    variant: Variant,
    *,
    source_format: str | None = "raw",
    threads: int | None = 2,
    options: tuple[str, ...] = (),
) -> imgcore.ConvertResult:
    """Convert with imgcore, without sync."""
    return imgcore.convert(
        str(source),
        str(target),
        format=source_format,
        target_format=variant.format,
        options=[*variant.options, *variant.own_options, *options],
        compress=variant.compress,
        threads=threads,
        sync=False,
    )
