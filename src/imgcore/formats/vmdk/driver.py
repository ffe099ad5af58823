"""The VMDK driver.

It reads monolithicSparse, streamOptimized, monolithicFlat, vmfs, twoGbMaxExtentSparse
and twoGbMaxExtentFlat, and writes the first four.

Sources: VMware "Virtual Disk Format 5.0"; libvmdk, "VMware Virtual Disk Format (VMDK)".
"""

from __future__ import annotations

from typing import Final

from imgcore.formats.api import Driver

DRIVER: Final = Driver(
    name="vmdk",
    options_module="imgcore.formats.vmdk.options",
    reading="imgcore.formats.vmdk.reader",
    writing="imgcore.formats.vmdk.writer",
    rewriting="imgcore.formats.vmdk.rewriter",
    updating="imgcore.formats.vmdk.updater",
    streaming="imgcore.formats.vmdk.streamed",
    reading_extents=(
        "imgcore.formats.vmdk.stream_grains",
        "imgcore.formats.vmdk.stream_layout",
        "imgcore.formats.vmdk.table_size",
        "imgcore.formats.vmdk.tables",
    ),
)
