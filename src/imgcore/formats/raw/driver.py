"""The driver of raw."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver
from imgcore.formats.raw.options import OPTIONS
from imgcore.formats.raw.reader import RawReader

DRIVER: Final = Driver(
    name="raw",
    options=OPTIONS,
    read=lambda file, gate, values: RawReader(file),
    writing="imgcore.formats.raw.writer",
    writes_in_place=True,
    has_tables=False,
)
