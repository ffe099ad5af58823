"""The driver of VHDX."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver
from imgcore.formats.vhdx.reader import VhdxReader

DRIVER: Final = Driver(
    name="vhdx",
    options_module="imgcore.formats.vhdx.options",
    read=lambda file, gate, options, damage: VhdxReader(file, damage),
    writing="imgcore.formats.vhdx.writer",
    rewriting="imgcore.formats.vhdx.rewriter",
)
