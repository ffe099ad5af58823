"""Converts virtual disk images, six formats, in parallel, with nothing lost silently."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from imgcore._version import __version__
from imgcore.errors import (
    ConversionCancelled,
    CorruptImageError,
    FormatError,
    ImgcoreError,
    LimitExceededError,
    OptionError,
    TargetError,
    UnsafeReferenceError,
    UnsupportedFeatureError,
    WrongFormatError,
)

if TYPE_CHECKING:
    from imgcore._check import CheckResult, check
    from imgcore._compare import CompareResult, compare
    from imgcore._convert import ConvertResult, Progress, convert
    from imgcore._create import CreateResult, create
    from imgcore._info import info
    from imgcore._lint import LintReport, lint
    from imgcore._map import MapEntry, map
    from imgcore._measure import measure
    from imgcore.disk.image import Image, open
    from imgcore.engine.bad_ranges import BadRange

__all__ = [
    "BadRange",
    "CheckResult",
    "CompareResult",
    "ConversionCancelled",
    "ConvertResult",
    "CorruptImageError",
    "CreateResult",
    "FormatError",
    "Image",
    "ImgcoreError",
    "LimitExceededError",
    "LintReport",
    "MapEntry",
    "OptionError",
    "Progress",
    "TargetError",
    "UnsafeReferenceError",
    "UnsupportedFeatureError",
    "WrongFormatError",
    "__version__",
    "check",
    "compare",
    "convert",
    "create",
    "info",
    "lint",
    "map",
    "measure",
    "open",
]

# The verbs load on first use: NumPy alone costs more time than `imgcore info` does.
_HOMES = {
    "BadRange": "engine.bad_ranges",
    "CheckResult": "_check",
    "CompareResult": "_compare",
    "ConvertResult": "_convert",
    "CreateResult": "_create",
    "Image": "disk.image",
    "LintReport": "_lint",
    "MapEntry": "_map",
    "Progress": "_convert",
    "check": "_check",
    "compare": "_compare",
    "convert": "_convert",
    "create": "_create",
    "info": "_info",
    "lint": "_lint",
    "map": "_map",
    "measure": "_measure",
    "open": "disk.image",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'imgcore' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"imgcore.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
