"""VHD: the options for writing, and the geometry for a size."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from imgcore.errors import LimitExceededError, OptionError
from imgcore.formats.options import (
    PREALLOCATION,
    Foreign,
    FormatOptions,
    byte_size,
    choice,
    flag,
    number,
    table_place,
    text,
)
from imgcore.formats.shared.identities import random_uuid
from imgcore.formats.shared.write_checks import (
    check_block_size,
    check_virtual_size,
    parse_uuid,
    refuse_compression,
    refuse_empty_disk,
    refuse_idle,
)
from imgcore.formats.vhd import layout
from imgcore.formats.vhd.layout import DiskType
from imgcore.formats.vhd.parent import ParentFields, parent_fields
from imgcore.limits import (
    MAX_VIRTUAL_NBYTES,
    SECTOR_NBYTES,
    VHD_MAX_DYNAMIC_NBYTES,
    VHD_MAX_WRITTEN_BLOCK_NBYTES,
    VHD_MIN_WRITTEN_BLOCK_NBYTES,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from uuid import UUID

    from imgcore.formats.api import WriteRequest

# "CHS Calculation": below this many sectors, 63 sectors per track suffice.
_MAX_63_NSECTORS: Final = 65535 * 16 * 63


class Options(FormatOptions):
    """The ``-o`` options."""

    foreign: ClassVar[Mapping[str, Foreign]] = {
        **FormatOptions.foreign,
        "force_size": Foreign(
            {True: {"size": "current"}, False: {"size": "chs"}},
            help="In qemu-img's words: on is size=current, off is size=chs",
        ),
    }

    subformat: str = choice(
        "dynamic",
        ("dynamic", "fixed"),
        "Kind of VHD; with -B, dynamic makes a differencing disk",
    )
    size: str = choice(
        "current",
        ("current", "chs"),
        "Keep the size, or round it up to one that a geometry states exactly (Virtual PC)",
    )
    block_size: int | None = byte_size(None, "Block size, 512k to 2M (default: 2M; dynamic only)")
    uuid: str | None = text(None, "UUID (default: random)")
    timestamp: int = number(layout.EPOCH_UNIX_SECONDS, "Time of creation in Unix seconds")
    batmap: bool = flag("Write XenServer's map of full blocks (dynamic only)")
    preallocation: str = choice("off", PREALLOCATION, "Reserve the space of a fixed disk")
    tables: str | None = table_place()


class WriteOptions(NamedTuple):
    """A verified request.

    ``guest_nbytes`` is the size of the source, ``virtual_size`` that of the new disk,
    which is larger if it is rounded up.  ``chs`` is (cylinders, heads, sectors per
    track); ``timestamp`` counts seconds from the year 2000.
    """

    disk_type: DiskType
    guest_nbytes: int
    virtual_size: int
    chs: tuple[int, int, int]
    block_nbytes: int
    uuid: bytes
    timestamp: int
    creator: tuple[bytes, int]
    batmap: bool
    preallocation: str
    sparse_nbytes: int
    parent: ParentFields | None
    target_name: str

    @classmethod
    def of(cls, request: WriteRequest[Options]) -> WriteOptions:
        """Verify a request; raises OptionError or LimitExceededError."""
        options, backing = request.options, request.backing
        refuse_compression(request, "VHD")
        check_virtual_size(request.virtual_size)
        disk_type = _disk_type(request)
        if disk_type is DiskType.FIXED:
            refuse_empty_disk(request.virtual_size, "fixed VHD")
        _refuse_idle_options(options)
        virtual_size = request.virtual_size
        if options.size == "chs":
            virtual_size = rounded_to_chs(virtual_size)
        _refuse_large(virtual_size, disk_type)
        return cls(
            disk_type=disk_type,
            guest_nbytes=request.virtual_size,
            virtual_size=virtual_size,
            chs=geometry_of(virtual_size),
            block_nbytes=_block_nbytes(options),
            uuid=_uuid(request).bytes,
            timestamp=_timestamp(options.timestamp),
            creator=_creator(options),
            batmap=options.batmap,
            preallocation=options.preallocation,
            sparse_nbytes=request.sparse_nbytes,
            parent=None if backing is None else parent_fields(backing, virtual_size),
            target_name=request.target_name,
        )


def _uuid(request: WriteRequest[Options]) -> UUID:
    stated = request.options.uuid
    return random_uuid(request, "uuid") if stated is None else parse_uuid("uuid", stated)


def geometry_of(virtual_size: int) -> tuple[int, int, int]:
    """Return (cylinders, heads, sectors per track); the disk may be larger than these.

    Source: "Virtual Hard Disk Image Format Specification" 1.0, "Appendix: CHS
    Calculation".
    """
    n_sectors = min(virtual_size // SECTOR_NBYTES, layout.MAX_CHS_NSECTORS)
    if n_sectors >= _MAX_63_NSECTORS:
        per_track, heads = layout.MAX_SECTORS_PER_TRACK, layout.MAX_HEADS
    else:
        per_track = 17
        heads = max(4, -(-(n_sectors // per_track) // 1024))
        for wider in (31, 63):
            if heads <= layout.MAX_HEADS and n_sectors // per_track < heads * 1024:
                break
            per_track, heads = wider, layout.MAX_HEADS
    return n_sectors // per_track // heads, heads, per_track


def rounded_to_chs(virtual_size: int) -> int:
    """Round a size up to one that a geometry states exactly; keep it above 127 GiB.

    As QEMU rounds: take the geometry of the first larger disk whose cylinders suffice.
    """
    n_sectors = virtual_size // SECTOR_NBYTES
    if n_sectors > layout.MAX_CHS_NSECTORS:
        return virtual_size
    wanted = n_sectors
    while True:
        cylinders, heads, per_track = geometry_of(wanted * SECTOR_NBYTES)
        held = cylinders * heads * per_track
        if held >= n_sectors:
            return held * SECTOR_NBYTES
        wanted += 1


def _disk_type(request: WriteRequest[Options]) -> DiskType:
    is_fixed = request.options.subformat == "fixed"
    if request.backing is None:
        return DiskType.FIXED if is_fixed else DiskType.DYNAMIC
    if is_fixed:
        raise OptionError(
            "a fixed VHD cannot have a parent (-B): subformat=dynamic makes a differencing disk"
        )
    return DiskType.DIFFERENCING


def _refuse_idle_options(options: Options) -> None:
    is_fixed = options.subformat == "fixed"
    refuse_idle(
        {
            "block_size": is_fixed and options.block_size is not None,
            "batmap": is_fixed and options.batmap,
            "tables": is_fixed and options.tables is not None,
            "preallocation": not is_fixed and options.preallocation != "off",
        },
        options.subformat,
    )


def _refuse_large(virtual_size: int, disk_type: DiskType) -> None:
    if disk_type is DiskType.FIXED:
        allowed = MAX_VIRTUAL_NBYTES - layout.FOOTER_NBYTES
        if virtual_size > allowed:
            raise LimitExceededError(
                f"a disk of {virtual_size} bytes, at most {allowed} are allowed"
            )
    elif virtual_size > VHD_MAX_DYNAMIC_NBYTES:
        raise LimitExceededError(
            f"a dynamic VHD of {virtual_size} bytes, at most {VHD_MAX_DYNAMIC_NBYTES} (2040 GiB) "
            "are allowed: subformat=fixed has no such limit, VHDX allows 64 TiB"
        )


def _block_nbytes(options: Options) -> int:
    if options.block_size is None:
        return VHD_MAX_WRITTEN_BLOCK_NBYTES
    low, high = VHD_MIN_WRITTEN_BLOCK_NBYTES, VHD_MAX_WRITTEN_BLOCK_NBYTES
    check_block_size("block_size", options.block_size, low, high)
    return options.block_size


def _timestamp(seconds: int) -> int:
    first, last = layout.EPOCH_UNIX_SECONDS, layout.EPOCH_UNIX_SECONDS + layout.MAX_TIMESTAMP
    if not first <= seconds <= last:
        raise OptionError(
            f"timestamp is {seconds}, allowed: Unix seconds from {first} (the year 2000) to {last}"
        )
    return seconds - first


def _creator(options: Options) -> tuple[bytes, int]:
    if options.batmap:
        return layout.CREATOR_XENSERVER
    return layout.CREATOR_VIRTUAL_PC if options.size == "chs" else layout.CREATOR_WINDOWS
