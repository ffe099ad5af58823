"""VHD: a request with its options verified, geometry, and what a child says of its parent."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from imgcore.errors import LimitExceededError, OptionError
from imgcore.formats.api import BackingReference, Option
from imgcore.formats.vhd import layout
from imgcore.formats.vhd.header import SIZE_CHOICES
from imgcore.formats.vhd.layout import DiskType
from imgcore.limits import (
    MAX_VIRTUAL_NBYTES,
    SECTOR_NBYTES,
    VHD_MAX_DYNAMIC_NBYTES,
    VHD_MAX_WRITTEN_BLOCK_NBYTES,
    VHD_MIN_WRITTEN_BLOCK_NBYTES,
)

if TYPE_CHECKING:
    from imgcore.formats.api import WriteRequest

_DEFAULT_BLOCK_NBYTES: Final = VHD_MAX_WRITTEN_BLOCK_NBYTES
_MAX_TIMESTAMP: Final = 0xFFFFFFFF
# "CHS Calculation" and QEMU's table of the same: below this many sectors, 63 of a track suffice.
_MAX_63_NSECTORS: Final = 65535 * 16 * 63


class ParentPlan(NamedTuple):
    """What a differencing disk's headers say of its parent; ``timestamp`` counts from 2000."""

    uuid: bytes
    timestamp: int
    name: bytes
    locators: tuple[tuple[bytes, bytes], ...]


class VhdPlan(NamedTuple):
    """A request with its options verified.

    ``guest_nbytes`` is what is converted, ``virtual_size`` what the disk has: more if its size
    is rounded up.  ``chs`` is (cylinders, heads, sectors per track); ``timestamp`` counts from
    the year 2000.
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
    parent: ParentPlan | None
    target_name: str


def plan_request(request: WriteRequest) -> VhdPlan:
    """Verify a request.

    Raises
    ------
    OptionError
        An option's value is not allowed, or does not go with the others.
    LimitExceededError
        The disk is too large for the kind of VHD.
    """
    options = request.options
    if request.compress:
        raise OptionError("VHD cannot be compressed (-c)")
    if request.virtual_size % SECTOR_NBYTES or request.virtual_size < 0:
        raise OptionError(
            f"virtual size {request.virtual_size} is not a multiple of {SECTOR_NBYTES}"
        )
    disk_type = _disk_type(request)
    _refuse_idle_options(options, disk_type)
    virtual_size = request.virtual_size
    if options.get("size") == "chs":
        virtual_size = rounded_to_chs(virtual_size)
    _refuse_large(virtual_size, disk_type)
    batmap = bool(options.get("batmap"))
    return VhdPlan(
        disk_type=disk_type,
        guest_nbytes=request.virtual_size,
        virtual_size=virtual_size,
        chs=geometry_of(virtual_size),
        block_nbytes=_block_nbytes(options),
        uuid=_uuid(options),
        timestamp=_timestamp(options),
        creator=_creator(options, batmap),
        batmap=batmap,
        preallocation=str(options.get("preallocation") or "off"),
        sparse_nbytes=request.sparse_nbytes,
        parent=None if request.backing is None else _plan_parent(request.backing, virtual_size),
        target_name=request.target_name,
    )


def geometry_of(virtual_size: int) -> tuple[int, int, int]:
    """Return (cylinders, heads, sectors per track) of a disk; they may say less than its size.

    Source: "Virtual Hard Disk Image Format Specification" 1.0, "Appendix: CHS Calculation".
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
    """Return the next size that a geometry says exactly; the size itself above 127 GiB.

    As QEMU rounds: the geometry of the first larger disk whose cylinders hold this one.
    """
    n_sectors = virtual_size // SECTOR_NBYTES
    if n_sectors > layout.MAX_CHS_NSECTORS:
        return virtual_size
    wanted = n_sectors
    while True:
        cylinders, heads, per_track = geometry_of(wanted * SECTOR_NBYTES)
        said = cylinders * heads * per_track
        if said >= n_sectors:
            return said * SECTOR_NBYTES
        wanted += 1


def _disk_type(request: WriteRequest) -> DiskType:
    is_fixed = request.options.get("subformat") == "fixed"
    if request.backing is None:
        return DiskType.FIXED if is_fixed else DiskType.DYNAMIC
    if is_fixed:
        raise OptionError(
            "a fixed VHD has no parent (-B): subformat=dynamic makes a differencing one"
        )
    return DiskType.DIFFERENCING


def _refuse_idle_options(options: Mapping[str, Any], disk_type: DiskType) -> None:
    """Refuse options that would do nothing: the user expects something of them."""
    is_fixed = disk_type is DiskType.FIXED
    idle = {
        "block_size": is_fixed and options.get("block_size") is not None,
        "batmap": is_fixed and bool(options.get("batmap")),
        "preallocation": not is_fixed and options.get("preallocation") not in (None, "off"),
    }
    for name, is_idle in idle.items():
        if is_idle:
            kind = "fixed" if is_fixed else "dynamic"
            raise OptionError(f"option {name} does not go with subformat={kind}")


def _refuse_large(virtual_size: int, disk_type: DiskType) -> None:
    if disk_type is DiskType.FIXED:
        allowed = MAX_VIRTUAL_NBYTES - layout.FOOTER_NBYTES
        if virtual_size > allowed:
            raise LimitExceededError(f"a disk of {virtual_size} bytes, allowed are {allowed}")
    elif virtual_size > VHD_MAX_DYNAMIC_NBYTES:
        raise LimitExceededError(
            f"a dynamic VHD of {virtual_size} bytes, allowed are {VHD_MAX_DYNAMIC_NBYTES} "
            "(2040 GiB): subformat=fixed has no such limit, VHDX allows 64 TiB"
        )


def _block_nbytes(options: Mapping[str, Any]) -> int:
    nbytes = int(options.get("block_size") or _DEFAULT_BLOCK_NBYTES)
    low, high = VHD_MIN_WRITTEN_BLOCK_NBYTES, VHD_MAX_WRITTEN_BLOCK_NBYTES
    if nbytes & (nbytes - 1) or not low <= nbytes <= high:
        raise OptionError(f"block_size is {nbytes}: allowed are powers of two from {low} to {high}")
    return nbytes


def _uuid(options: Mapping[str, Any]) -> bytes:
    text = options.get("uuid")
    if text is None:
        return uuid.uuid4().bytes
    try:
        value = uuid.UUID(str(text))
    except ValueError:
        value = uuid.UUID(int=0)
    if not value.int:
        raise OptionError(
            f"uuid is {str(text)[:40]!r}: 32 hexadecimal digits are expected, not all of them zero"
        )
    return value.bytes


def _timestamp(options: Mapping[str, Any]) -> int:
    seconds = int(options.get("timestamp", layout.EPOCH_UNIX_SECONDS))
    first = layout.EPOCH_UNIX_SECONDS
    if not first <= seconds <= first + _MAX_TIMESTAMP:
        raise OptionError(
            f"timestamp is {seconds}: Unix seconds from {first} (the year 2000) to "
            f"{first + _MAX_TIMESTAMP} are expected"
        )
    return seconds - first


def _creator(options: Mapping[str, Any], batmap: bool) -> tuple[bytes, int]:
    if batmap:
        return layout.CREATOR_XENSERVER
    return layout.CREATOR_VIRTUAL_PC if options.get("size") == "chs" else layout.CREATOR_WINDOWS


def _plan_parent(backing: BackingReference, virtual_size: int) -> ParentPlan:
    """Return what a child says of its parent: the names that Windows and XenServer look for."""
    if backing.format != "vhd":
        raise OptionError(f"the parent of a VHD has to be a VHD, not {backing.format}")
    if backing.virtual_size != virtual_size:
        raise OptionError(
            f"a differencing VHD has the size of its parent: {backing.name} has "
            f"{backing.virtual_size} bytes, the disk {virtual_size}"
        )
    parent_uuid = uuid.UUID(backing.identities["UUID"])
    if not parent_uuid.int:
        raise OptionError(
            f"the parent {backing.name} has no UUID that a differencing VHD could know it by"
        )
    relative, windows_name = _windows_names(backing.name)
    last = windows_name.rpartition("\\")[2].encode("utf-16-be")
    if len(last) > layout.PARENT_NAME_NBYTES - 2:
        raise OptionError(f"the parent's name has {len(last) // 2} characters, 255 are allowed")
    modified = (backing.modified or 0) - layout.EPOCH_UNIX_SECONDS
    return ParentPlan(
        uuid=parent_uuid.bytes,
        timestamp=min(max(modified, 0), _MAX_TIMESTAMP),
        name=last,
        locators=(
            (layout.FILE_URL, _file_url(backing.name)),
            (layout.ABSOLUTE_PATH, windows_name.encode("utf-16-le")),
            (layout.RELATIVE_PATH, relative.encode("utf-16-le")),
        ),
    )


def _windows_names(name: str) -> tuple[str, str]:
    r"""Return a parent's relative name for Windows, such as ``.\parent.vhd``, and the full one.

    The folder of a relative name is not written: it would be the one of this machine.
    """
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise OptionError(f"the parent's name {name!r} is not UTF-8") from None
    # What stands before a colon is a drive or a protocol to readers, ours among them.
    has_colon = ":" in name.removeprefix("./").partition("/")[0]
    if "\\" in name or has_colon or not name.rpartition("/")[2]:
        raise OptionError(f"the parent's name {name!r} cannot be said in a VHD")
    windows_name = name.removeprefix("./").replace("/", "\\")
    if windows_name.startswith("\\"):
        return ".\\" + windows_name.rpartition("\\")[2], windows_name
    prefix = "" if windows_name.startswith("..\\") else ".\\"
    return prefix + windows_name, prefix + windows_name


def _file_url(name: str) -> bytes:
    from urllib.parse import quote

    path = name if name.startswith(("/", "./", "../")) else f"./{name}"
    return f"file://{quote(path)}".encode("ascii")


OPTIONS: Final = (
    Option(
        "subformat",
        "choice",
        "dynamic",
        "Kind of VHD (with -B, a dynamic one is a differencing one)",
        ("dynamic", "fixed"),
    ),
    Option(
        "size",
        "choice",
        "current",
        "Keep the size, or round it up to what cylinders, heads and sectors can say (Virtual PC)",
        ("current", "chs"),
    ),
    Option("block_size", "size", None, "Block size, 512k to 2M (2M unless given; dynamic)"),
    Option("uuid", "str", None, "UUID (random unless given)"),
    Option("timestamp", "int", layout.EPOCH_UNIX_SECONDS, "Time of creation, Unix seconds"),
    Option("batmap", "bool", False, "Write XenServer's map of full blocks (dynamic)"),
    Option(
        "preallocation",
        "choice",
        "off",
        "Reserve the space of a fixed disk",
        ("off", "falloc", "full"),
    ),
)


READ_OPTIONS: Final = (
    Option("size", "choice", None, "Which size counts, whatever the creator", SIZE_CHOICES),
)
