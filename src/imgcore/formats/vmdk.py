"""VMDK: the disks of VMware's products, also written by QEMU and VirtualBox.

Read are monolithicSparse, streamOptimized, monolithicFlat, vmfs, twoGbMaxExtentSparse and
twoGbMaxExtentFlat; written are the first four.

Sources: VMware "Virtual Disk Format 5.0"; libvmdk, "VMware Virtual Disk Format (VMDK)".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from imgcore.formats.api import Driver, Option, Reader

if TYPE_CHECKING:
    from collections.abc import Mapping

    from imgcore.files.gate import ReferenceGate
    from imgcore.files.host_file import HostFile

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


def _read(file: HostFile, gate: ReferenceGate, values: Mapping[str, Any]) -> Reader:
    """Open a disk by its descriptor file or its only extent."""
    from imgcore.formats._vmdk_reader import VmdkReader

    return VmdkReader(file, gate)


DRIVER: Final = Driver(
    name="vmdk",
    options=OPTIONS,
    read=_read,
    writing="imgcore.formats._vmdk_writer",
)
