"""Writing VMDK disks: options, the choice of the kind, and the kinds with flat extents."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from imgcore.engine.geometry import ZeroPolicy
from imgcore.errors import OptionError, UnsupportedFeatureError
from imgcore.formats.api import Measurement
from imgcore.formats.shared.flat import flat_geometry
from imgcore.formats.vmdk.descriptor import DiskDatabase, compose_descriptor
from imgcore.formats.vmdk.layout import DEFAULT_GRAIN_NBYTES, RESERVED_CIDS
from imgcore.limits import KIB, SECTOR_NBYTES, VMDK_MAX_GRAIN_NBYTES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from imgcore.engine.extents import Placements
    from imgcore.files.target import Target
    from imgcore.files.target_file import TargetFile
    from imgcore.formats.api import Writer, WriteRequest

# VMware's own tools write 4 for "any"; hosts since ESX 4 take the version from the VM instead.
DEFAULT_HW_VERSION: Final = "4"
COMPAT6_HW_VERSION: Final = "6"
# Tools that are managed by the guest's distribution.
DEFAULT_TOOLS_VERSION: Final = "2147483647"
# The specification asks for more than 8 sectors, and libvmdk insists on it.
_MIN_GRAIN_NBYTES: Final = 8 * KIB
_FLAT_KINDS: Final = {"monolithicFlat": "FLAT", "vmfs": "VMFS"}
_DESCRIPTOR_NBYTES: Final = 1024


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


def writer_for(request: WriteRequest) -> Writer:
    """Return the writer for the request's subformat.

    Raises
    ------
    OptionError
        An option's value is not allowed, or does not go with the others.
    LimitExceededError
        The disk is too large for the subformat.
    UnsupportedFeatureError
        The request has a backing file.
    """
    from imgcore.formats.vmdk.sparse_writer import SparseWriter, StreamWriter

    plan = _plan(request)
    if plan.subformat == "streamOptimized":
        return StreamWriter(plan)
    if plan.subformat == "monolithicSparse":
        return SparseWriter(plan)
    return FlatWriter(plan)


def measure(request: WriteRequest, data_nbytes: int) -> Measurement:
    """Return the bytes of all files with ``data_nbytes`` of data, and with a full disk.

    Of streamOptimized both are upper bounds, as if nothing could be compressed.
    """
    from imgcore.formats.vmdk import sparse_writer as sparse

    plan = _plan(request)
    if plan.subformat == "streamOptimized":
        nbytes = sparse.stream_bound_nbytes
        return Measurement(nbytes(plan, data_nbytes), nbytes(plan, plan.virtual_size))
    if plan.subformat == "monolithicSparse":
        nbytes = sparse.sparse_file_nbytes
        return Measurement(nbytes(plan, data_nbytes), nbytes(plan, plan.virtual_size))
    full = _DESCRIPTOR_NBYTES + plan.virtual_size
    if plan.preallocation != "off":
        return Measurement(full, full)
    return Measurement(_DESCRIPTOR_NBYTES + min(data_nbytes, plan.virtual_size), full)


def refuse_in_place(target: Target) -> None:
    """Raise UnsupportedFeatureError unless the target is a new file."""
    if target.in_place or target.is_block_device:
        raise UnsupportedFeatureError(
            "VMDK is written to a new file only, not in place (-n) nor to a block device",
            path=target.path,
        )


class FlatWriter:
    """Writes monolithicFlat and vmfs: a descriptor, and beside it the disk as it is."""

    format_name: ClassVar[str] = "vmdk"

    def __init__(self, plan: VmdkPlan) -> None:
        self._plan = plan
        self._target: Target | None = None
        self._companion: TargetFile | None = None
        self.logical_sector_nbytes = plan.database.logical_sector_nbytes
        self.first_offset = 0
        self.geometry = flat_geometry(plan.virtual_size, plan.sparse_nbytes)

    @property
    def companion_name(self) -> str:
        """Name of the file with the data."""
        stem, suffix = os.path.splitext(self._plan.name)
        return f"{stem if suffix.lower() == '.vmdk' else self._plan.name}-flat.vmdk"

    def begin(self, target: Target) -> TargetFile:
        """Make the file for the data at its full size and return it."""
        refuse_in_place(target)
        _refuse_odd_name(self._plan.name, target.path)
        companion = target.companion(self.companion_name)
        if self._plan.preallocation != "off":
            target.require_space(self._plan.virtual_size)
        companion.truncate(self._plan.virtual_size)
        companion.preallocate(self._plan.preallocation, self._plan.virtual_size)
        self._target, self._companion = target, companion
        return companion

    def place(self, first_block: int, placements: Placements, next_offset: int) -> int:
        """Do nothing: every block has its place."""
        return next_offset

    def finish(self, next_offset: int) -> None:
        """Write the descriptor."""
        assert self._target is not None
        assert self._companion is not None
        kind = _FLAT_KINDS[self._plan.subformat]
        line = f'RW {self._plan.n_sectors} {kind} "{self.companion_name}"'
        if kind == "FLAT":
            line += " 0"
        text = compose_descriptor(
            self._plan.subformat, line, self._plan.n_sectors, self._plan.database
        )
        self._companion.truncate(self._plan.virtual_size)
        self._target.main.pwrite(0, text)
        self._target.main.truncate(len(text))


def extent_name(plan: VmdkPlan) -> str:
    """Return the name a sparse file gives itself; readers go by the file, not by this."""
    return plan.name if _is_plain_name(plan.name) else "disk.vmdk"


def _is_plain_name(name: str) -> bool:
    """Tell whether readers take a name for a file: what stands before a colon is a protocol."""
    return bool(name) and name.isprintable() and not {'"', ":"} & set(name)


def _refuse_odd_name(name: str, path: str) -> None:
    if not _is_plain_name(name):
        raise OptionError(
            "a name with quotes, colons, control characters or bytes that are not UTF-8 cannot "
            "stand in a VMDK descriptor",
            path=path,
        )


def _plan(request: WriteRequest) -> VmdkPlan:
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
    is_flat = plan.subformat in _FLAT_KINDS
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
