"""VMDK: the disks of VMware's products, also written by QEMU and VirtualBox.

Read are monolithicSparse, streamOptimized, monolithicFlat, vmfs, twoGbMaxExtentSparse and
twoGbMaxExtentFlat; written are the first four.

Sources: VMware "Virtual Disk Format 5.0"; libvmdk, "VMware Virtual Disk Format (VMDK)".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from imgcore.formats.api import Driver, Reader
from imgcore.formats.vmdk.options import OPTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from imgcore.files.byte_source import ByteSource
    from imgcore.files.gate import ReferenceGate


def _read(file: ByteSource, gate: ReferenceGate, values: Mapping[str, Any]) -> Reader:
    """Open a disk by its descriptor file or its only extent."""
    from imgcore.formats.vmdk.reader import VmdkReader

    return VmdkReader(file, gate)


DRIVER: Final = Driver(
    name="vmdk",
    options=OPTIONS,
    read=_read,
    writing="imgcore.formats.vmdk.writer",
)
