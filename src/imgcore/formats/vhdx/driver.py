"""The driver of VHDX."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver

DRIVER: Final = Driver(
    name="vhdx",
    options_module="imgcore.formats.vhdx.options",
    reading="imgcore.formats.vhdx.reader",
    writing="imgcore.formats.vhdx.writer",
    rewriting="imgcore.formats.vhdx.rewriter",
    updating="imgcore.formats.vhdx.updater",
    reading_extents=("imgcore.formats.vhdx.tables",),
)
