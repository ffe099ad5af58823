"""Changes of the header of a QCOW2 image that is written in place.

A sector is written whole or not at all.  So everything that must change at once is in
the first sector of the file.

Source: QEMU docs/interop/qcow2.rst, "Header", "Header extensions".
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from imgcore import limits
from imgcore.errors import OptionError
from imgcore.files.update_file import Step
from imgcore.formats.qcow2 import layout

if TYPE_CHECKING:
    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.api import BackingReference
    from imgcore.formats.qcow2.header import Qcow2Header


def clear_autoclear(file: UpdateFile, header: Qcow2Header) -> None:
    """Clear the bits of features that a writer does not keep up."""
    kept = header.autoclear & layout.AUTOCLEAR_BITMAPS
    if header.version >= 3 and kept != header.autoclear:
        place, field = layout.AUTOCLEAR_FIELD
        file.put(place, field.pack(kept), Step.NEW)
        header.autoclear = kept


def put_l1(
    file: UpdateFile, header: Qcow2Header, offset: int, n_entries: int, virtual_size: int
) -> None:
    """Change the place of the L1 table, and the size of the disk, at once."""
    place, fields = layout.L1_FIELDS
    data = bytearray(file.pread(0, limits.SECTOR_NBYTES))
    fields.pack_into(data, place, n_entries, offset)
    place, fields = layout.VIRTUAL_SIZE_FIELD
    fields.pack_into(data, place, virtual_size)
    file.put(0, data, Step.REFERENCE)
    header.l1_offset, header.l1_entries, header.virtual_size = offset, n_entries, virtual_size


def put_snapshots(file: UpdateFile, header: Qcow2Header, offset: int, n: int) -> None:
    """Change the place and number of snapshots."""
    place, fields = layout.SNAPSHOT_FIELDS
    file.put(place, fields.pack(n, offset), Step.REFERENCE)
    header.snapshots_offset, header.n_snapshots = offset, n


def put_backing(file: UpdateFile, header: Qcow2Header, reference: BackingReference | None) -> None:
    """Change the name and format of the backing file."""
    raise OptionError("not yet", path=file.path)


__all__ = ["clear_autoclear", "os", "put_backing", "put_l1", "put_snapshots"]
