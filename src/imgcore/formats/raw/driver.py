"""The driver of raw."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver
from imgcore.formats.raw.reader import RawReader

DRIVER: Final = Driver(
    name="raw",
    options_module="imgcore.formats.raw.options",
    read=lambda file, gate, options, damage: RawReader(file),
    writing="imgcore.formats.raw.writer",
    rewriting="imgcore.formats.raw.rewriter",
    has_tables=False,
)
