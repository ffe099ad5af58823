"""One extent of a VMDK disk: its part of the guest, and its file."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from imgcore.files.byte_source import ByteSource
    from imgcore.formats.vmdk.header import SparseExtent


class DiskExtent(NamedTuple):
    """One piece of the disk, in bytes.

    ``sparse`` is None for a flat extent, and ``file`` too for an extent of zeros, or
    for one that is lost when salvaging.
    """

    kind: str
    guest_base: int
    nbytes: int
    file: ByteSource | None = None
    file_offset: int = 0
    sparse: SparseExtent | None = None
    file_index: int = 0
    short_nbytes: int = 0
    is_lost: bool = False
