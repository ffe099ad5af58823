"""The driver of raw."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver
from imgcore.formats.raw.options import Options
from imgcore.formats.raw.reader import RawReader

DRIVER: Final = Driver(
    name="raw",
    options=Options,
    read=lambda file, gate, options: RawReader(file),
    writing="imgcore.formats.raw.writer",
)
