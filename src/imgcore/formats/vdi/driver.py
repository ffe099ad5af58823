"""The driver of VDI."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver

DRIVER: Final = Driver(
    name="vdi",
    options_module="imgcore.formats.vdi.options",
    reading="imgcore.formats.vdi.reader",
    writing="imgcore.formats.vdi.writer",
    rewriting="imgcore.formats.vdi.rewriter",
    reading_extents=("imgcore.formats.vdi.tables",),
    updating="imgcore.formats.vdi.updater",
)
