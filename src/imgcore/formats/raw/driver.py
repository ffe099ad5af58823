"""The driver of raw."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver

DRIVER: Final = Driver(
    name="raw",
    options_module="imgcore.formats.raw.options",
    reading="imgcore.formats.raw.reader",
    writing="imgcore.formats.raw.writer",
    rewriting="imgcore.formats.raw.rewriter",
    has_tables=False,
    updating="imgcore.formats.raw.updater",
)
