"""The driver of VDI."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver
from imgcore.formats.vdi.reader import VdiReader

DRIVER: Final = Driver(
    name="vdi",
    options_module="imgcore.formats.vdi.options",
    read=lambda file, gate, options, damage: VdiReader(file, gate, damage),
    writing="imgcore.formats.vdi.writer",
    rewriting="imgcore.formats.vdi.rewriter",
)
