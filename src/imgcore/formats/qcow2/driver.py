"""The QCOW2 driver."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver

DRIVER: Final = Driver(
    name="qcow2",
    options_module="imgcore.formats.qcow2.options",
    reading="imgcore.formats.qcow2.reader",
    writing="imgcore.formats.qcow2.writer",
    rewriting="imgcore.formats.qcow2.rewriter",
    reading_extents=("imgcore.formats.qcow2.tables",),
    updating="imgcore.formats.qcow2.updater",
)
