"""VHDX: the options of a new image, checked, and the structures that follow from them.

No NumPy here.  Source: [MS-VHDX], by section.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from imgcore import limits
from imgcore._version import __version__
from imgcore.errors import LimitExceededError, OptionError
from imgcore.formats.api import BackingReference, Option, WriteRequest
from imgcore.formats.vhdx import layout
from imgcore.formats.vhdx.header import Metadata, with_checksum
from imgcore.formats.vhdx.parent import (
    DATA_WRITE_GUID,
    LOGICAL_SECTOR_SIZE,
    PHYSICAL_SECTOR_SIZE,
    VIRTUAL_DISK_ID,
    parent_locator,
)

# What Hyper-V takes, whatever the size of the disk.
DEFAULT_BLOCK_NBYTES: Final = 32 * limits.MIB
DEFAULT_DIFFERENCING_BLOCK_NBYTES: Final = 2 * limits.MIB
DEFAULT_LOGICAL_SECTOR_NBYTES: Final = 512
DEFAULT_PHYSICAL_SECTOR_NBYTES: Final = 4096

# Layout of a new file: header section, log, metadata, BAT, then blocks.
LOG_OFFSET: Final = layout.HEADER_SECTION_NBYTES
LOG_NBYTES: Final = limits.MIB
METADATA_OFFSET: Final = LOG_OFFSET + LOG_NBYTES
METADATA_NBYTES: Final = limits.MIB
BAT_OFFSET: Final = METADATA_OFFSET + METADATA_NBYTES

OPTIONS: Final = (
    Option(
        "subformat", "choice", "dynamic", "blocks as they are needed, or all", ("dynamic", "fixed")
    ),
    Option("block_size", "size", None, "1M to 256M; 32M, or 2M with a parent, if not given"),
    Option(
        "logical_sector_size",
        "choice",
        None,
        "what the guest sees; the source's or the parent's, or 512, if not given",
        ("512", "4096"),
    ),
    Option(
        "physical_sector_size",
        "choice",
        None,
        "what the guest aligns to; the parent's or 4096 if not given",
        ("512", "4096"),
    ),
    Option("virtual_disk_id", "str", None, "GUID of the disk; the parent's or random if not given"),
    Option("data_write_guid", "str", None, "GUID that children know the disk by; random"),
    Option("file_write_guid", "str", None, "GUID of the last change to the file; random"),
)


class VhdxParams(NamedTuple):
    """What a new image has to be, checked; sizes in bytes."""

    metadata: Metadata
    file_write_guid: uuid.UUID
    data_write_guid: uuid.UUID
    backing: BackingReference | None
    target_name: str

    @property
    def is_fixed(self) -> bool:
        """Whether every block has its place from the start."""
        return self.metadata.leave_block_allocated

    @property
    def bat_nbytes(self) -> int:
        """Bytes of the BAT region."""
        return _align_up(max(1, self.metadata.n_bat_entries) * layout.BAT_ENTRY_NBYTES)

    @property
    def data_offset(self) -> int:
        """Where the first block may lie."""
        return BAT_OFFSET + self.bat_nbytes

    @property
    def fully_allocated_nbytes(self) -> int:
        """Bytes of the file with all its blocks."""
        return self.data_offset + self.metadata.n_blocks * self.metadata.block_nbytes


def _align_up(nbytes: int) -> int:
    return -(-nbytes // layout.ALIGNMENT) * layout.ALIGNMENT


def check_request(request: WriteRequest) -> VhdxParams:
    """Turn a request into checked parameters.

    Raises
    ------
    OptionError
        A value is not allowed, or two do not go together.
    LimitExceededError
        The disk is larger than 64 TiB.
    """
    options = {option.name: option.default for option in OPTIONS} | dict(request.options)
    backing = request.backing
    parent: Mapping[str, str] = {} if backing is None else backing.identities
    if request.compress:
        raise OptionError("vhdx cannot be compressed (-c)")
    is_fixed = options["subformat"] == "fixed"
    if backing is not None:
        _check_backing(backing, is_fixed)
    metadata = Metadata(
        block_nbytes=_block_nbytes(options["block_size"], has_parent=backing is not None),
        leave_block_allocated=is_fixed,
        has_parent=backing is not None,
        virtual_size=request.virtual_size,
        virtual_disk_id=_guid("virtual_disk_id", options, parent.get(VIRTUAL_DISK_ID)),
        logical_sector_nbytes=_logical_sector_nbytes(request, options, parent),
        physical_sector_nbytes=int(
            options["physical_sector_size"]
            or parent.get(PHYSICAL_SECTOR_SIZE, DEFAULT_PHYSICAL_SECTOR_NBYTES)
        ),
        locator=None,
    )
    _check_size(metadata)
    return VhdxParams(
        metadata=metadata,
        file_write_guid=_guid("file_write_guid", options),
        data_write_guid=_guid("data_write_guid", options),
        backing=backing,
        target_name=request.target_name,
    )


def _check_backing(backing: BackingReference, is_fixed: bool) -> None:
    if is_fixed:
        raise OptionError("vhdx: subformat=fixed and a parent (-B) do not go together")
    if backing.format != "vhdx" or DATA_WRITE_GUID not in backing.identities:
        raise OptionError(f"the parent of a vhdx image is vhdx, not {backing.format}")


def _block_nbytes(given: int | None, *, has_parent: bool) -> int:
    default = DEFAULT_DIFFERENCING_BLOCK_NBYTES if has_parent else DEFAULT_BLOCK_NBYTES
    nbytes = default if given is None else int(given)
    low, high = limits.VHDX_MIN_BLOCK_NBYTES, limits.VHDX_MAX_BLOCK_NBYTES
    if has_parent:
        high = limits.MAX_BASE_BLOCK_NBYTES
    if not low <= nbytes <= high or nbytes & (nbytes - 1):
        raise OptionError(
            f"vhdx option block_size is {nbytes}, allowed are powers of two from {low} to {high}"
            f"{' with a parent' if has_parent else ''}"
        )
    return nbytes


def _logical_sector_nbytes(
    request: WriteRequest, options: Mapping[str, Any], parent: Mapping[str, str]
) -> int:
    stated = options["logical_sector_size"]
    of_parent = parent.get(LOGICAL_SECTOR_SIZE)
    if of_parent is not None and stated not in (None, of_parent):
        raise OptionError(
            f"vhdx option logical_sector_size is {stated}, the parent has {of_parent}: they must "
            "be the same"
        )
    return int(
        stated or of_parent or request.logical_sector_nbytes or DEFAULT_LOGICAL_SECTOR_NBYTES
    )


def _guid(name: str, options: Mapping[str, Any], default: str | None = None) -> uuid.UUID:
    text = options[name] if options[name] is not None else default
    if text is None:
        return uuid.uuid4()
    try:
        return uuid.UUID(str(text))
    except ValueError:
        raise OptionError(f"vhdx option {name} is {text!r}, which is no GUID") from None


def _check_size(metadata: Metadata) -> None:
    size, sector_nbytes = metadata.virtual_size, metadata.logical_sector_nbytes
    if size < 0 or size % sector_nbytes:
        raise OptionError(
            f"a vhdx disk of {size} bytes is not possible, allowed are multiples of its logical "
            f"sector size {sector_nbytes}"
        )
    if size > limits.VHDX_MAX_VIRTUAL_NBYTES:
        raise LimitExceededError(
            f"a vhdx disk has up to {limits.VHDX_MAX_VIRTUAL_NBYTES} bytes, not {size}"
        )


# ------------------------------------------------------------------------- structures


def file_identifier() -> bytes:
    """Return the file type identifier (2.2.1)."""
    creator = f"imgcore {__version__}".encode("utf-16-le")
    return layout.SIGNATURE + creator.ljust(layout.CREATOR_NBYTES, b"\0")


def header(params: VhdxParams, sequence: int) -> bytes:
    """Return one of the two headers (2.2.2); the log is empty."""
    raw = layout.HEADER.pack(
        layout.HEADER_SIGNATURE,
        0,
        sequence,
        params.file_write_guid.bytes_le,
        params.data_write_guid.bytes_le,
        bytes(16),
        layout.LOG_VERSION,
        layout.VERSION,
        LOG_NBYTES,
        LOG_OFFSET,
    )
    return with_checksum(raw.ljust(layout.HEADER_NBYTES, b"\0"))


def region_table(params: VhdxParams) -> bytes:
    """Return the region table (2.2.3)."""
    regions = (
        (layout.METADATA_REGION, METADATA_OFFSET, METADATA_NBYTES),
        (layout.BAT_REGION, BAT_OFFSET, params.bat_nbytes),
    )
    raw = layout.REGION_TABLE_HEADER.pack(layout.REGION_TABLE_SIGNATURE, 0, len(regions), 0)
    for guid, offset, nbytes in regions:
        raw += layout.REGION_ENTRY.pack(guid.bytes_le, offset, nbytes, layout.REGION_REQUIRED)
    return with_checksum(raw.ljust(layout.REGION_TABLE_NBYTES, b"\0"))


def metadata_region(params: VhdxParams, target_path: str) -> bytes:
    """Return the start of the metadata region: the table (2.6.1) and its items (2.6.2)."""
    metadata = params.metadata
    flags = layout.LEAVE_BLOCK_ALLOCATED if metadata.leave_block_allocated else 0
    flags |= layout.HAS_PARENT if metadata.has_parent else 0
    of_file = layout.ITEM_IS_REQUIRED
    of_disk = layout.ITEM_IS_REQUIRED | layout.ITEM_IS_VIRTUAL_DISK
    items = [
        (
            layout.FILE_PARAMETERS_ITEM,
            of_file,
            layout.FILE_PARAMETERS.pack(metadata.block_nbytes, flags),
        ),
        (
            layout.VIRTUAL_DISK_SIZE_ITEM,
            of_disk,
            layout.VIRTUAL_DISK_SIZE.pack(metadata.virtual_size),
        ),
        (layout.VIRTUAL_DISK_ID_ITEM, of_disk, metadata.virtual_disk_id.bytes_le),
        (
            layout.LOGICAL_SECTOR_SIZE_ITEM,
            of_disk,
            layout.SECTOR_SIZE.pack(metadata.logical_sector_nbytes),
        ),
        (
            layout.PHYSICAL_SECTOR_SIZE_ITEM,
            of_disk,
            layout.SECTOR_SIZE.pack(metadata.physical_sector_nbytes),
        ),
    ]
    if params.backing is not None:
        locator = parent_locator(params.backing, target_path)
        items.append((layout.PARENT_LOCATOR_ITEM, of_file, locator))
    table = layout.METADATA_HEADER.pack(layout.METADATA_SIGNATURE, 0, len(items), bytes(20))
    data = b""
    for guid, item_flags, item in items:
        offset = layout.METADATA_TABLE_NBYTES + len(data)
        table += layout.METADATA_ENTRY.pack(guid.bytes_le, offset, len(item), item_flags, 0)
        data += item
    return table.ljust(layout.METADATA_TABLE_NBYTES, b"\0") + data
