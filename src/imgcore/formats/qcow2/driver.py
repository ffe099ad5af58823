"""The QCOW2 driver."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver
from imgcore.formats.qcow2.reader import Qcow2Reader

DRIVER: Final = Driver(
    name="qcow2",
    options_module="imgcore.formats.qcow2.options",
    read=lambda file, gate, options, damage: Qcow2Reader(file, damage),
    writing="imgcore.formats.qcow2.writer",
    rewriting="imgcore.formats.qcow2.rewriter",
)
