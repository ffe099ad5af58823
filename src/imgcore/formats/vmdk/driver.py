"""The VMDK driver.

It reads monolithicSparse, streamOptimized, monolithicFlat, vmfs, twoGbMaxExtentSparse
and twoGbMaxExtentFlat, and writes the first four.

Sources: VMware "Virtual Disk Format 5.0"; libvmdk, "VMware Virtual Disk Format (VMDK)".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.formats.api import Driver, Reader

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource
    from imgcore.files.reference_gate import ReferenceGate
    from imgcore.formats.options import FormatOptions
    from imgcore.formats.shared.damage import Damage


def _read(file: ByteSource, gate: ReferenceGate, options: FormatOptions, damage: Damage) -> Reader:
    """Open a disk from its descriptor file or its only extent."""
    from imgcore.formats.vmdk.reader import VmdkReader

    return VmdkReader(file, gate, damage)


DRIVER: Final = Driver(
    name="vmdk",
    options_module="imgcore.formats.vmdk.options",
    read=_read,
    writing="imgcore.formats.vmdk.writer",
    rewriting="imgcore.formats.vmdk.rewriter",
)
