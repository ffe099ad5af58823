"""Change what the header of a monolithicSparse file states, in one step.

Size, directories and descriptor must agree, and the header's sector alone is written
whole or not at all.  So a new descriptor is put after the file's end first, and the
header refers to it; then it is put in its usual place, where QEMU looks for it.

Source: Virtual Disk Format 5.0, "Hosted Sparse Extent Header".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imgcore.errors import LimitExceededError, OptionError
from imgcore.files.update_file import Step
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.vmdk.check import survey_space
from imgcore.formats.vmdk.header import open_sparse
from imgcore.formats.vmdk.layout import (
    DESCRIPTOR_SECTOR,
    ENTRY_NBYTES,
    HEADER_NBYTES,
    SPARSE_HEADER,
    SparseHeader,
)
from imgcore.formats.vmdk.sparse_structures import too_large
from imgcore.limits import (
    SECTOR_NBYTES,
    VMDK_MAX_DIRECTORY_ENTRIES,
    VMDK_MAX_SPARSE_FILE_NBYTES,
)

if TYPE_CHECKING:
    from imgcore.files.update_file import UpdateFile
    from imgcore.formats.vmdk.sparse_updater import SparseUpdater

_HOME: Final = DESCRIPTOR_SECTOR * SECTOR_NBYTES


def is_descriptor_away(updater: SparseUpdater) -> bool:
    """Tell whether a change of the header was interrupted."""
    extent = updater.extent
    is_home_free = _HOME + extent.descriptor_nbytes <= updater.first_used
    return extent.descriptor_offset != _HOME and is_home_free


def change_header(updater: SparseUpdater, text: bytes, **fields: int) -> None:
    """Exchange the descriptor and fields of the header; a crash leaves all or none.

    Parameters
    ----------
    updater : SparseUpdater
        What nothing refers to yet was written before.
    text : bytes
        The new descriptor.
    **fields : int
        Of the header, in sectors.

    Raises
    ------
    OptionError
        The descriptor has no room for the text.
    """
    file, extent, space = updater.file, updater.extent, updater.space
    room = extent.descriptor_nbytes
    if len(text) > room:
        raise OptionError(
            f"the descriptor would have {len(text)} bytes, and there is room for {room}",
            path=file.path,
        )
    padded = text.ljust(room, b"\0")
    old = extent.descriptor_offset
    home = _HOME if is_descriptor_away(updater) else old
    away = space.end
    # Reserved for as long as the header may refer to it.
    space.end = align_up(away + room, extent.grain_nbytes)
    file.pwrite(away, padded)
    _put_header(file, descriptor_offset=away // SECTOR_NBYTES, **fields)
    file.write_steps()
    file.pwrite(home, padded)
    _put_header(file, descriptor_offset=home // SECTOR_NBYTES)
    file.write_steps()
    updater.extent = extent._replace(descriptor_offset=home)
    space.end = away
    file.cut(away)
    if old != home:
        file.punch(old, room)


def _put_header(file: UpdateFile, **fields: int) -> None:
    raw = bytearray(file.pread(0, HEADER_NBYTES))
    header = SparseHeader._make(SPARSE_HEADER.unpack_from(raw))
    SPARSE_HEADER.pack_into(raw, 0, *SparseHeader(**header._asdict() | fields))
    file.put(0, raw, Step.REFERENCE)


def resize(updater: SparseUpdater, nbytes: int, text: bytes) -> None:
    """Change the size of an extent without a parent, and its descriptor.

    Raises
    ------
    LimitExceededError
        The directory or the file would be too large.
    OptionError
        As for `change_header`.
    """
    n_sectors = nbytes // SECTOR_NBYTES
    if nbytes >= updater.nbytes:
        change_header(updater, text, capacity=n_sectors, **_grown(updater, nbytes))
        return
    change_header(updater, text, capacity=n_sectors)
    updater.clear_table_after(nbytes)
    updater.file.write_steps()
    _give_back_unused(updater.file, nbytes)


def _give_back_unused(file: UpdateFile, nbytes: int) -> None:
    """Give the file system what nothing refers to any more."""
    survey = survey_space(open_sparse(file), nbytes)
    for start, stop in survey.gaps:
        file.punch(start * SECTOR_NBYTES, (stop - start) * SECTOR_NBYTES)
    file.cut(survey.end * SECTOR_NBYTES)


def _grown(updater: SparseUpdater, nbytes: int) -> dict[str, int]:
    """Make the tables for a larger disk; return fields of the header."""
    extent, file = updater.extent, updater.file
    n_old = extent.n_directory_entries
    n_new = -(-nbytes // extent.gt_reach_nbytes)
    if n_new > VMDK_MAX_DIRECTORY_ENTRIES:
        raise LimitExceededError(
            f"{nbytes} bytes need {n_new} grain directory entries, allowed up to "
            f"{VMDK_MAX_DIRECTORY_ENTRIES}",
            path=file.path,
        )
    updater.complete_last_grain()
    updater.clear_table_after(updater.nbytes)
    file.write_steps()
    if n_new == n_old:
        return {}
    fields: dict[str, int] = {}
    has_room = n_new * ENTRY_NBYTES <= align_up(n_old * ENTRY_NBYTES, SECTOR_NBYTES)
    tables_nbytes = (n_new - n_old) * updater.table_nbytes
    directory_nbytes = 0 if has_room else align_up(n_new * ENTRY_NBYTES, SECTOR_NBYTES)
    offset = updater.space.end
    end = offset + len(updater.directories) * (directory_nbytes + tables_nbytes)
    if end > VMDK_MAX_SPARSE_FILE_NBYTES:
        raise too_large(end, file.path)
    updater.space.end = align_up(end, extent.grain_nbytes)
    if offset < file.nbytes:
        file.zero(offset, file.nbytes - offset)
    file.grow(updater.space.end)
    for name, directory in zip(("gd_offset", "rgd_offset"), updater.directories, strict=False):
        tables = updater.table_entries(offset + directory_nbytes, n_new - n_old)
        if has_room:
            file.pwrite(directory + n_old * ENTRY_NBYTES, tables)
        else:
            file.pwrite(offset, file.pread(directory, n_old * ENTRY_NBYTES) + tables)
            fields[name] = offset // SECTOR_NBYTES
        offset += directory_nbytes + tables_nbytes
    return fields
