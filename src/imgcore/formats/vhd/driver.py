"""The driver of VHD."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver
from imgcore.formats.vhd.options import Options, ReadOptions
from imgcore.formats.vhd.reader import VhdReader

DRIVER: Final = Driver(
    name="vhd",
    options=Options,
    read=lambda file, gate, options: VhdReader(file, options.size),
    writing="imgcore.formats.vhd.writer",
    read_options=ReadOptions,
)
