"""VMDK: the options of a new disk."""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Option

ADAPTER_TYPES: Final = ("ide", "buslogic", "lsilogic", "legacyESX")


SUBFORMATS: Final = ("monolithicSparse", "streamOptimized", "monolithicFlat", "vmfs")


LEVELS: Final = ("fastest", "fast", "default", "best")


OPTIONS: Final = (
    Option(
        "subformat",
        "choice",
        None,
        "Kind of VMDK (monolithicSparse unless given; streamOptimized with -c)",
        SUBFORMATS,
    ),
    Option("adapter_type", "choice", "lsilogic", "Virtual disk adapter", ADAPTER_TYPES),
    Option("hwversion", "str", None, "Virtual hardware version (4 unless given)"),
    Option("toolsversion", "str", "2147483647", "Version of the guest tools"),
    Option("compat6", "bool", False, "Virtual hardware version 6"),
    Option(
        "logical_sector_size",
        "choice",
        None,
        "Sector size of the guest's disk (the source's, else 512)",
        ("512", "4096"),
    ),
    Option("zeroed_grain", "bool", False, "Mark explicit zeros in tables (monolithicSparse)"),
    Option("grain_size", "size", 65536, "Grain size, 8k to 1M (sparse kinds)"),
    Option("level", "choice", "default", "Compression level (streamOptimized)", LEVELS),
    Option("cid", "str", None, "Content ID, 8 hexadecimal digits (random unless given)"),
    Option(
        "preallocation",
        "choice",
        "off",
        "Reserve the space of flat kinds",
        ("off", "falloc", "full"),
    ),
)
