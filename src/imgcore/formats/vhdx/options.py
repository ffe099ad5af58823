"""VHDX: the options for writing, and the layout of a new file.

Nothing here imports NumPy.

Source: [MS-VHDX], by section.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from imgcore import limits
from imgcore.errors import LimitExceededError, OptionError
from imgcore.formats.options import (
    NO_EFFECT,
    Foreign,
    FormatOptions,
    choice,
    size_or_auto,
    table_place,
    text,
)
from imgcore.formats.shared.alignment import align_up
from imgcore.formats.shared.identities import random_uuid
from imgcore.formats.shared.write_checks import (
    check_block_size,
    parse_uuid,
    refuse_compression,
    refuse_empty_disk,
)
from imgcore.formats.vhdx import layout
from imgcore.formats.vhdx.header import Metadata, MetadataItem
from imgcore.formats.vhdx.parent import (
    DATA_WRITE_GUID,
    LOGICAL_SECTOR_SIZE,
    PHYSICAL_SECTOR_SIZE,
    VIRTUAL_DISK_ID,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from imgcore.formats.api import BackingReference, WriteRequest

# The defaults of Hyper-V, for disks of any size.
DEFAULT_BLOCK_NBYTES: Final = 32 * limits.MIB
DEFAULT_DIFFERENCING_BLOCK_NBYTES: Final = 2 * limits.MIB
DEFAULT_LOGICAL_SECTOR_NBYTES: Final = 512
DEFAULT_PHYSICAL_SECTOR_NBYTES: Final = 4096
_SECTOR_SIZES: Final = tuple(str(nbytes) for nbytes in layout.SECTOR_SIZES)

LOG_NBYTES: Final = limits.MIB
# Those of 2.6.2.
_N_OWN_ITEMS: Final = 6
# The metadata table, and more than the largest locator and the other items of a child.
_OWN_METADATA_NBYTES: Final = layout.METADATA_TABLE_NBYTES + 2 * limits.VHDX_MAX_PATH_NBYTES


class Options(FormatOptions):
    """The ``-o`` options."""

    foreign: ClassVar[Mapping[str, Foreign]] = {
        **FormatOptions.foreign,
        "block_state_zero": NO_EFFECT,
        "log_size": Foreign(reason="the log has 1 MiB: leave it out"),
    }

    subformat: str = choice(
        "dynamic", ("dynamic", "fixed"), "Allocate blocks when they are needed, or all of them"
    )
    block_size: int | None = size_or_auto(
        None,
        "Block size, 1M to 256M (default: 32M, or 2M with a parent)",
        auto=(limits.VHDX_MIN_BLOCK_NBYTES, limits.VHDX_MAX_BLOCK_NBYTES),
    )
    logical_sector_size: str | None = choice(
        None,
        _SECTOR_SIZES,
        "Sector size that the guest sees (default: that of the parent or source, or 512)",
    )
    physical_sector_size: str | None = choice(
        None,
        _SECTOR_SIZES,
        "Sector size that the guest aligns to (default: that of the parent, or 4096)",
    )
    virtual_disk_id: str | None = text(
        None, "GUID of the disk (default: that of the parent, or random)"
    )
    data_write_guid: str | None = text(
        None, "GUID by which children identify the disk (default: random)"
    )
    file_write_guid: str | None = text(
        None, "GUID of the last change to the file (default: random)"
    )
    tables: str | None = table_place()


class WriteOptions(NamedTuple):
    """A verified request; offsets and sizes in bytes.

    Log, metadata and BAT follow each other, from ``log_offset`` on.
    """

    metadata: Metadata
    file_write_guid: uuid.UUID
    data_write_guid: uuid.UUID
    backing: BackingReference | None
    sparse_nbytes: int
    inherited: tuple[MetadataItem, ...] = ()
    log_offset: int = layout.HEADER_SECTION_NBYTES

    @classmethod
    def of(cls, request: WriteRequest[Options]) -> WriteOptions:
        """Verify a request; raises OptionError or LimitExceededError."""
        options, backing = request.options, request.backing
        parent: Mapping[str, str] = {} if backing is None else backing.identities
        refuse_compression(request, "VHDX")
        refuse_empty_disk(request.virtual_size, "VHDX")
        is_fixed = options.subformat == "fixed"
        if backing is not None:
            check_backing(backing, is_fixed)
        metadata = Metadata(
            block_nbytes=_block_nbytes(options.block_size, has_parent=backing is not None),
            leave_block_allocated=is_fixed,
            has_parent=backing is not None,
            virtual_size=request.virtual_size,
            virtual_disk_id=_guid(
                request,
                "virtual_disk_id",
                options.virtual_disk_id,
                parent.get(VIRTUAL_DISK_ID),
            ),
            logical_sector_nbytes=_logical_sector_nbytes(request, parent),
            physical_sector_nbytes=int(
                options.physical_sector_size
                or parent.get(PHYSICAL_SECTOR_SIZE)
                or DEFAULT_PHYSICAL_SECTOR_NBYTES
            ),
            locator=None,
        )
        check_size(metadata)
        inherited: tuple[MetadataItem, ...] = () if backing is None else backing.inherited
        _check_inherited(inherited)
        return cls(
            metadata=metadata,
            file_write_guid=_guid(request, "file_write_guid", options.file_write_guid),
            data_write_guid=_guid(request, "data_write_guid", options.data_write_guid),
            backing=backing,
            sparse_nbytes=request.sparse_nbytes,
            inherited=inherited,
        )

    @property
    def is_fixed(self) -> bool:
        """Whether every block is allocated from the start."""
        return self.metadata.leave_block_allocated

    @property
    def metadata_offset(self) -> int:
        """Host offset of the metadata region."""
        return self.log_offset + LOG_NBYTES

    @property
    def metadata_nbytes(self) -> int:
        """Bytes of the metadata region."""
        inherited = sum(len(item.data) for item in self.inherited)
        return align_up(_OWN_METADATA_NBYTES + inherited, layout.ALIGNMENT)

    @property
    def bat_offset(self) -> int:
        """Host offset of the BAT region."""
        return self.metadata_offset + self.metadata_nbytes

    @property
    def bat_nbytes(self) -> int:
        """Bytes of the BAT region."""
        nbytes = max(1, self.metadata.n_bat_entries) * layout.BAT_ENTRY_NBYTES
        return align_up(nbytes, layout.ALIGNMENT)

    @property
    def data_offset(self) -> int:
        """Host offset where the BAT ends: blocks are appended from here on."""
        return self.bat_offset + self.bat_nbytes

    @property
    def fully_allocated_nbytes(self) -> int:
        """Size of the file with all its blocks, in bytes."""
        return self.data_offset + self.metadata.n_blocks * self.metadata.block_nbytes


def check_backing(backing: BackingReference, is_fixed: bool) -> None:
    """Raise OptionError if an image cannot have this parent."""
    if is_fixed:
        raise OptionError("a vhdx disk with subformat=fixed cannot have a parent (-B)")
    if backing.format != "vhdx" or DATA_WRITE_GUID not in backing.identities:
        raise OptionError(f"the parent of a vhdx image must be vhdx, not {backing.format}")


def _block_nbytes(given: int | None, *, has_parent: bool) -> int:
    default = DEFAULT_DIFFERENCING_BLOCK_NBYTES if has_parent else DEFAULT_BLOCK_NBYTES
    nbytes = default if given is None else given
    high = limits.MAX_BASE_BLOCK_NBYTES if has_parent else limits.VHDX_MAX_BLOCK_NBYTES
    note = " with a parent" if has_parent else ""
    check_block_size("block_size", nbytes, limits.VHDX_MIN_BLOCK_NBYTES, high, note)
    return nbytes


def _logical_sector_nbytes(request: WriteRequest[Options], parent: Mapping[str, str]) -> int:
    stated = request.options.logical_sector_size
    of_parent = parent.get(LOGICAL_SECTOR_SIZE)
    if of_parent is not None and stated not in (None, of_parent):
        raise OptionError(
            f"vhdx option logical_sector_size is {stated}, but the parent has {of_parent}: they "
            "must be the same"
        )
    of_source = request.logical_sector_nbytes
    if of_source not in layout.SECTOR_SIZES:
        of_source = None
    return int(stated or of_parent or of_source or DEFAULT_LOGICAL_SECTOR_NBYTES)


def _guid(
    request: WriteRequest[Options], name: str, given: str | None, default: str | None = None
) -> uuid.UUID:
    text = default if given is None else given
    if text is None:
        return random_uuid(request, name)
    return parse_uuid(name, text, allow_null=True)


def _check_inherited(items: Sequence[MetadataItem]) -> None:
    """Check that the metadata table (2.6.1) has room for the parent's items."""
    room = layout.MAX_TABLE_ENTRIES - _N_OWN_ITEMS
    for what, found, allowed in (
        ("metadata items", len(items), room),
        (
            "user metadata items",
            sum(item.flags & layout.ITEM_IS_USER for item in items),
            layout.MAX_USER_ITEMS,
        ),
    ):
        if found > allowed:
            raise LimitExceededError(
                f"the parent has {found} {what}, at most {allowed} fit into its child: "
                "convert without -B"
            )


def check_size(metadata: Metadata) -> None:
    """Raise OptionError or LimitExceededError if a disk cannot have its size."""
    size, sector_nbytes = metadata.virtual_size, metadata.logical_sector_nbytes
    if size < 0 or size % sector_nbytes:
        raise OptionError(
            f"a vhdx disk of {size} bytes is not possible, allowed: multiples of its logical "
            f"sector size {sector_nbytes}"
        )
    if size > limits.VHDX_MAX_VIRTUAL_NBYTES:
        raise LimitExceededError(
            f"a vhdx disk of {size} bytes, at most {limits.VHDX_MAX_VIRTUAL_NBYTES} are allowed"
        )
