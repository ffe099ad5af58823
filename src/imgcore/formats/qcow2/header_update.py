"""Changes of the header of a QCOW2 image that is written in place.

A sector is written whole or not at all.  So everything that must change at once is in
the first sector of the file.

Source: QEMU docs/interop/qcow2.rst, "Header", "Header extensions".
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from imgcore.errors import OptionError
from imgcore.files.update_file import Step
from imgcore.formats.qcow2 import layout
from imgcore.formats.qcow2.options import backing_format, check_backing_name, extension
from imgcore.formats.shared.alignment import align_up
from imgcore.limits import SECTOR_NBYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

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


def put_virtual_size(file: UpdateFile, header: Qcow2Header, nbytes: int) -> None:
    """Change the size of the disk."""
    place, field = layout.VIRTUAL_SIZE_FIELD
    file.put(place, field.pack(nbytes), Step.REFERENCE)
    header.virtual_size = nbytes


def put_l1(file: UpdateFile, header: Qcow2Header, offset: int, n_entries: int) -> None:
    """Change the place and the length of the L1 table."""
    place, fields = layout.L1_FIELDS
    file.put(place, fields.pack(n_entries, offset), Step.REFERENCE)
    header.l1_offset, header.l1_entries = offset, n_entries


def put_refcount_table(file: UpdateFile, header: Qcow2Header, offset: int, n_clusters: int) -> None:
    """Change the place and the length of the refcount table."""
    place, fields = layout.REFCOUNT_TABLE_FIELDS
    file.put(place, fields.pack(offset, n_clusters), Step.ALLOCATION)
    header.refcount_table_offset, header.refcount_table_clusters = offset, n_clusters


def put_snapshots(file: UpdateFile, header: Qcow2Header, offset: int, n: int) -> None:
    """Change the place and the number of snapshots."""
    place, fields = layout.SNAPSHOT_FIELDS
    file.put(place, fields.pack(n, offset), Step.REFERENCE)
    header.snapshots_offset, header.n_snapshots = offset, n


def put_backing(file: UpdateFile, header: Qcow2Header, reference: BackingReference | None) -> None:
    """Change the name and the format of the backing file, and write that.

    What is in later sectors is durable before the first one changes, and is where the
    old header has nothing.  If the names of features are in the way, they are left out:
    they serve messages only.
    """
    if reference is not None:
        check_backing_name(reference)
    old = file.pread(0, min(header.cluster_size, file.nbytes)).ljust(header.cluster_size, b"\0")
    used_end = _end_of_extensions(old, header)
    name_end = header.backing_offset + header.backing_nbytes if header.backing_offset else 0
    used = (range(used_end), range(header.backing_offset, name_end))
    for new in _new_headers(old, header, reference, max(used_end, name_end)):
        different = [at for at in range(SECTOR_NBYTES, len(new)) if new[at] != old[at]]
        if not any(at in place for place in used for at in different):
            break
    else:
        raise OptionError(
            "the header has no room for the backing file's name beside the present one",
            path=file.path,
        )
    file.write_steps()
    if different:
        first, last = different[0], different[-1] + 1
        file.put(first, new[first:last], Step.NEW)
    file.put(0, new[:SECTOR_NBYTES], Step.REFERENCE)
    file.write_steps()


def _end_of_extensions(old: bytes, header: Qcow2Header) -> int:
    """Return where the header extensions end."""
    end = min(header.backing_offset or header.cluster_size, header.cluster_size)
    offset = header.header_nbytes
    while offset + layout.EXTENSION.size <= end:
        kind, nbytes = layout.EXTENSION.unpack_from(old, offset)
        offset += layout.EXTENSION.size
        if kind == layout.EXTENSION_END:
            return offset
        offset += align_up(nbytes, 8)
    return end


def _new_headers(
    old: bytes, header: Qcow2Header, reference: BackingReference | None, used_end: int
) -> Iterator[bytes]:
    """Yield possible contents of the first cluster, better ones first."""
    name = b"" if reference is None else os.fsencode(reference.name)
    others = dict(header.extensions)
    others.pop(layout.EXTENSION_BACKING_FORMAT, None)
    for is_short in (False, True):
        if is_short:
            others.pop(layout.EXTENSION_FEATURE_NAMES, None)
        area = b""
        if reference is not None and reference.format is not None:
            area = backing_format(reference.format)
        area += b"".join(extension(kind, data) for kind, data in others.items())
        area = old[: header.header_nbytes] + area + layout.EXTENSION.pack(layout.EXTENSION_END, 0)
        for place in (len(area), max(len(area), used_end)):
            end = place + len(name)
            if end > header.cluster_size:
                continue
            new = bytearray(old)
            new[: len(area)] = area
            new[place:end] = name
            field, fields = layout.BACKING_FIELDS
            fields.pack_into(new, field, place if name else 0, len(name))
            yield bytes(new[: max(end, SECTOR_NBYTES)])
