"""VMDK: the options of a new disk."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore.engine.geometry import ZeroPolicy
from imgcore.errors import OptionError, UnsupportedFeatureError
from imgcore.formats.api import Option
from imgcore.formats.vmdk.descriptor import DiskDatabase
from imgcore.formats.vmdk.layout import DEFAULT_GRAIN_NBYTES, RESERVED_CIDS
from imgcore.limits import KIB, SECTOR_NBYTES, VMDK_MAX_GRAIN_NBYTES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from imgcore.files.target import Target
    from imgcore.formats.api import WriteRequest


ADAPTER_TYPES: Final = ("ide", "buslogic", "lsilogic", "legacyESX")


SUBFORMATS: Final = ("monolithicSparse", "streamOptimized", "monolithicFlat", "vmfs")


LEVELS: Final = ("fastest", "fast", "default", "best")


OPTIONS: Final = (
    Option(
        "subformat",
        "choice",
        None,
        "Kind of VMDK (monolithicSparse unless given; streamOptimized with -c)",
        SUBFORMATS,
    ),
    Option("adapter_type", "choice", "lsilogic", "Virtual disk adapter", ADAPTER_TYPES),
    Option("hwversion", "str", None, "Virtual hardware version (4 unless given)"),
    Option("toolsversion", "str", "2147483647", "Version of the guest tools"),
    Option("compat6", "bool", False, "Virtual hardware version 6"),
    Option(
        "logical_sector_size",
        "choice",
        None,
        "Sector size of the guest's disk (the source's, else 512)",
        ("512", "4096"),
    ),
    Option("zeroed_grain", "bool", False, "Mark explicit zeros in tables (monolithicSparse)"),
    Option("grain_size", "size", 65536, "Grain size, 8k to 1M (sparse kinds)"),
    Option("level", "choice", "default", "Compression level (streamOptimized)", LEVELS),
    Option("cid", "str", None, "Content ID, 8 hexadecimal digits (random unless given)"),
    Option(
        "preallocation",
        "choice",
        "off",
        "Reserve the space of flat kinds",
        ("off", "falloc", "full"),
    ),
)

# VMware's own tools write 4 for "any"; hosts since ESX 4 take the version from the VM instead.
DEFAULT_HW_VERSION: Final = "4"


COMPAT6_HW_VERSION: Final = "6"


# Tools that are managed by the guest's distribution.
DEFAULT_TOOLS_VERSION: Final = "2147483647"


# The specification asks for more than 8 sectors, and libvmdk insists on it.
_MIN_GRAIN_NBYTES: Final = 8 * KIB


FLAT_KINDS: Final = {"monolithicFlat": "FLAT", "vmfs": "VMFS"}


class VmdkPlan(NamedTuple):
    """A request with its options verified."""

    subformat: str
    virtual_size: int
    grain_nbytes: int
    zeroed_grain: bool
    level: str
    preallocation: str
    sparse_nbytes: int
    name: str
    database: DiskDatabase

    @property
    def n_sectors(self) -> int:
        """The disk's capacity in sectors."""
        return self.virtual_size // SECTOR_NBYTES

    @property
    def zero_policy(self) -> ZeroPolicy:
        """Zeros are written only where ``-S 0`` asks for it: a new file reads as zeros."""
        return ZeroPolicy.SKIP if self.sparse_nbytes else ZeroPolicy.STORE


def refuse_in_place(target: Target) -> None:
    """Raise UnsupportedFeatureError unless the target is a new file."""
    if target.in_place or target.is_block_device:
        raise UnsupportedFeatureError(
            "VMDK is written to a new file only, not in place (-n) nor to a block device",
            path=target.path,
        )


def extent_name(plan: VmdkPlan) -> str:
    """Return the name a sparse file gives itself; readers go by the file, not by this."""
    return plan.name if is_plain_name(plan.name) else "disk.vmdk"


def is_plain_name(name: str) -> bool:
    """Tell whether readers take a name for a file: what stands before a colon is a protocol."""
    return bool(name) and name.isprintable() and not {'"', ":"} & set(name)


def plan_request(request: WriteRequest) -> VmdkPlan:
    options = request.options
    if request.backing is not None:
        raise UnsupportedFeatureError("VMDK with a backing file (-B) is not written yet")
    if request.virtual_size % SECTOR_NBYTES or request.virtual_size < 0:
        raise OptionError(
            f"virtual size {request.virtual_size} is not a multiple of {SECTOR_NBYTES}"
        )
    subformat = options.get("subformat")
    if request.compress:
        if subformat not in (None, "streamOptimized"):
            raise OptionError(f"-c asks for streamOptimized, not for subformat={subformat}")
        subformat = "streamOptimized"
    plan = VmdkPlan(
        subformat=subformat or "monolithicSparse",
        virtual_size=request.virtual_size,
        grain_nbytes=_grain_nbytes(options),
        zeroed_grain=bool(options.get("zeroed_grain")),
        level=str(options.get("level") or "default"),
        preallocation=str(options.get("preallocation") or "off"),
        sparse_nbytes=request.sparse_nbytes,
        name=os.path.basename(request.target_name),
        database=_database(request),
    )
    _refuse_idle_options(plan)
    return plan


def _refuse_idle_options(plan: VmdkPlan) -> None:
    """Refuse options that would do nothing: the user expects something of them."""
    is_flat = plan.subformat in FLAT_KINDS
    idle = {
        "zeroed_grain": plan.zeroed_grain and plan.subformat != "monolithicSparse",
        "level": plan.level != "default" and plan.subformat != "streamOptimized",
        "grain_size": plan.grain_nbytes != DEFAULT_GRAIN_NBYTES and is_flat,
        "preallocation": plan.preallocation != "off" and not is_flat,
    }
    for name, is_idle in idle.items():
        if is_idle:
            raise OptionError(f"option {name} does not go with subformat={plan.subformat}")


def _grain_nbytes(options: Mapping[str, Any]) -> int:
    nbytes = int(options.get("grain_size") or DEFAULT_GRAIN_NBYTES)
    if nbytes & (nbytes - 1) or not _MIN_GRAIN_NBYTES <= nbytes <= VMDK_MAX_GRAIN_NBYTES:
        raise OptionError(
            f"grain_size is {nbytes}: allowed are powers of two from "
            f"{_MIN_GRAIN_NBYTES} to {VMDK_MAX_GRAIN_NBYTES}"
        )
    return nbytes


def _database(request: WriteRequest) -> DiskDatabase:
    options = request.options
    hw_version = options.get("hwversion")
    if options.get("compat6"):
        if hw_version is not None:
            raise OptionError("compat6 and hwversion do not go together")
        hw_version = COMPAT6_HW_VERSION
    cid, long_content_id = _content_ids(options.get("cid"))
    return DiskDatabase(
        adapter_type=str(options.get("adapter_type") or "lsilogic"),
        hw_version=_number("hwversion", hw_version, DEFAULT_HW_VERSION),
        tools_version=_number("toolsversion", options.get("toolsversion"), DEFAULT_TOOLS_VERSION),
        cid=cid,
        long_content_id=long_content_id,
        logical_sector_nbytes=_logical_sector_nbytes(request),
    )


def _logical_sector_nbytes(request: WriteRequest) -> int:
    """Return the option's value, else what the source states: a guest sees no change."""
    nbytes = int(
        request.options.get("logical_sector_size") or request.logical_sector_nbytes or SECTOR_NBYTES
    )
    if request.virtual_size % nbytes:
        raise OptionError(
            f"virtual size {request.virtual_size} is not a multiple of the logical sector size "
            f"{nbytes}"
        )
    return nbytes


def _number(name: str, value: object, default: str) -> str:
    text = default if value is None else str(value)
    if not re.fullmatch(r"[0-9]{1,10}", text):
        raise OptionError(f"{name} is {text[:40]!r}: a number is expected")
    return text


def _content_ids(given: object) -> tuple[int, str]:
    """Return the content ID and the long one, which ends with it, as VMware makes them.

    Random, unless the short one is given: then both follow from it.
    """
    if given is None:
        cid = secrets.randbelow(min(RESERVED_CIDS))
        return cid, f"{secrets.token_hex(12)}{cid:08x}"
    text = str(given)
    if not re.fullmatch(r"(0x)?[0-9A-Fa-f]{1,8}", text) or int(text, 16) in RESERVED_CIDS:
        raise OptionError(
            f"cid is {text[:40]!r}: 8 hexadecimal digits are expected, other than "
            + " and ".join(f"{cid:08x}" for cid in RESERVED_CIDS)
        )
    cid = int(text, 16)
    digest = hashlib.sha256(b"imgcore vmdk longContentID" + cid.to_bytes(4, "big"))
    return cid, f"{digest.hexdigest()[:24]}{cid:08x}"
