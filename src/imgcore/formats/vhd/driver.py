"""The driver of VHD."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver
from imgcore.formats.vhd.options import OPTIONS, READ_OPTIONS
from imgcore.formats.vhd.reader import VhdReader

DRIVER: Final = Driver(
    name="vhd",
    options=OPTIONS,
    read=lambda file, gate, values: VhdReader(file, values["size"]),
    writing="imgcore.formats.vhd.writer",
    read_options=READ_OPTIONS,
)
