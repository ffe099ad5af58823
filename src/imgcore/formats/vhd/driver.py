"""The driver of VHD."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver
from imgcore.formats.vhd.layout import FOOTER_NBYTES
from imgcore.formats.vhd.reader import ReadOptions

DRIVER: Final = Driver(
    name="vhd",
    options_module="imgcore.formats.vhd.options",
    reading="imgcore.formats.vhd.reader",
    writing="imgcore.formats.vhd.writer",
    rewriting="imgcore.formats.vhd.rewriter",
    read_options=ReadOptions,
    reading_extents=("imgcore.formats.vhd.tables",),
    updating="imgcore.formats.vhd.updater",
    tail_copy_nbytes=FOOTER_NBYTES,
    flat_tail_nbytes=FOOTER_NBYTES,
)
