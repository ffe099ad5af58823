"""VMDK: the options of a new disk."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from imgcore.errors import OptionError, UnsupportedFeatureError
from imgcore.formats.options import (
    PREALLOCATION,
    FormatOptions,
    choice,
    flag,
    size_or_auto,
    table_place,
    text,
)
from imgcore.formats.shared.identities import random_octets
from imgcore.formats.shared.write_checks import (
    check_block_size,
    check_virtual_size,
    refuse_empty_disk,
    refuse_idle,
)
from imgcore.formats.vmdk.descriptor import LOGICAL_SECTOR_SIZES, DiskDatabase
from imgcore.formats.vmdk.layout import DEFAULT_GRAIN_NBYTES, RESERVED_CIDS
from imgcore.limits import KIB, SECTOR_NBYTES, VMDK_MAX_GRAIN_NBYTES

if TYPE_CHECKING:
    from imgcore.formats.api import WriteRequest

# Subformats with flat extents, and the type of these in descriptors.
FLAT_KINDS: Final = {"monolithicFlat": "FLAT", "vmfs": "VMFS"}

# The specification requires more than 8 sectors, and libvmdk enforces it.
_MIN_GRAIN_NBYTES: Final = 8 * KIB
# VMware's tools write 4 for "any"; hosts since ESX 4 use the VM's version instead.
_HW_VERSION: Final = "4"
_COMPAT6_HW_VERSION: Final = "6"


class Options(FormatOptions):
    """The ``-o`` options."""

    subformat: str | None = choice(
        None,
        ("monolithicSparse", "streamOptimized", *FLAT_KINDS),
        "Kind of VMDK (default: monolithicSparse, with -c streamOptimized)",
    )
    adapter_type: str = choice(
        "lsilogic", ("ide", "buslogic", "lsilogic", "legacyESX"), "Virtual disk adapter"
    )
    hwversion: str | None = text(None, "Virtual hardware version (default: 4)")
    # VMware's value for tools that the guest's distribution manages.
    toolsversion: str = text("2147483647", "Version of the guest tools")
    compat6: bool = flag("Virtual hardware version 6")
    logical_sector_size: str | None = choice(
        None,
        LOGICAL_SECTOR_SIZES,
        "Sector size that the guest sees (default: the source's, else 512)",
    )
    zeroed_grain: bool = flag("Mark explicit zeros in tables (monolithicSparse)")
    grain_size: int = size_or_auto(
        DEFAULT_GRAIN_NBYTES,
        "Grain size, 8k to 1M (sparse kinds)",
        auto=(_MIN_GRAIN_NBYTES, VMDK_MAX_GRAIN_NBYTES),
    )
    level: str | None = choice(
        None,
        ("fastest", "fast", "default", "best"),
        "Compression level (streamOptimized; if not given: default, and compressed blocks of the "
        "source are reused where possible)",
    )
    cid: str | None = text(None, "Content ID, 8 hexadecimal digits (default: random)")
    preallocation: str = choice("off", PREALLOCATION, "Reserve space in advance (flat kinds)")
    tables: str | None = table_place()


class WriteOptions(NamedTuple):
    """A verified request."""

    subformat: str
    virtual_size: int
    grain_nbytes: int
    zeroed_grain: bool
    level: str | None
    preallocation: str
    sparse_nbytes: int
    name: str
    database: DiskDatabase

    @classmethod
    def of(cls, request: WriteRequest[Options]) -> WriteOptions:
        """Verify a request; raises OptionError or UnsupportedFeatureError."""
        options = request.options
        if request.backing is not None:
            raise UnsupportedFeatureError(
                "writing a VMDK with a backing file (-B) is not supported yet"
            )
        check_virtual_size(request.virtual_size)
        refuse_empty_disk(request.virtual_size, "VMDK")
        subformat = _subformat(request)
        check_block_size("grain_size", options.grain_size, _MIN_GRAIN_NBYTES, VMDK_MAX_GRAIN_NBYTES)
        database = _database(request)
        _refuse_idle_options(options, subformat)
        return cls(
            subformat=subformat,
            virtual_size=request.virtual_size,
            grain_nbytes=options.grain_size,
            zeroed_grain=options.zeroed_grain,
            level=options.level,
            preallocation=options.preallocation,
            sparse_nbytes=request.sparse_nbytes,
            name=os.path.basename(request.target_name),
            database=database,
        )

    @property
    def n_sectors(self) -> int:
        """The disk's capacity in sectors."""
        return self.virtual_size // SECTOR_NBYTES


def is_plain_name(name: str) -> bool:
    """Tell whether readers accept a file name; a colon would mean a protocol."""
    return bool(name) and name.isprintable() and not {'"', ":"} & set(name)


def _subformat(request: WriteRequest[Options]) -> str:
    stated = request.options.subformat
    if not request.compress:
        return stated or "monolithicSparse"
    if stated not in (None, "streamOptimized"):
        raise OptionError(f"-c writes streamOptimized, not subformat={stated}")
    return "streamOptimized"


def _refuse_idle_options(options: Options, subformat: str) -> None:
    is_flat = subformat in FLAT_KINDS
    refuse_idle(
        {
            "zeroed_grain": options.zeroed_grain and subformat != "monolithicSparse",
            "level": options.level not in (None, "default") and subformat != "streamOptimized",
            "grain_size": options.grain_size != Options.grain_size and is_flat,
            "preallocation": options.preallocation != "off" and not is_flat,
            "tables": options.tables is not None and subformat != "monolithicSparse",
        },
        subformat,
    )


def _database(request: WriteRequest[Options]) -> DiskDatabase:
    options = request.options
    hw_version = options.hwversion
    if options.compat6:
        if hw_version is not None:
            raise OptionError("compat6 and hwversion cannot be combined")
        hw_version = _COMPAT6_HW_VERSION
    cid, long_content_id = _content_ids(request)
    return DiskDatabase(
        adapter_type=options.adapter_type,
        hw_version=_number("hwversion", _HW_VERSION if hw_version is None else hw_version),
        tools_version=_number("toolsversion", options.toolsversion),
        cid=cid,
        long_content_id=long_content_id,
        logical_sector_nbytes=_logical_sector_nbytes(request),
    )


def _logical_sector_nbytes(request: WriteRequest[Options]) -> int:
    """Return the option's value, else the source's."""
    of_source = str(request.logical_sector_nbytes)
    if of_source not in LOGICAL_SECTOR_SIZES:
        of_source = str(SECTOR_NBYTES)
    nbytes = int(request.options.logical_sector_size or of_source)
    if request.virtual_size % nbytes:
        raise OptionError(
            f"virtual size {request.virtual_size} is not a multiple of the logical sector size "
            f"{nbytes}"
        )
    return nbytes


def _number(name: str, text: str) -> str:
    if not re.fullmatch(r"[0-9]{1,10}", text):
        raise OptionError(f"{name} is {text[:40]!r}, expected a number of up to 10 digits")
    return text


def _content_ids(request: WriteRequest[Options]) -> tuple[int, str]:
    """Return the content ID and the long content ID, which ends with it as VMware's do.

    Both are random, or computed from the short one if it is given.
    """
    import hashlib

    given = request.options.cid
    if given is None:
        drawn = int.from_bytes(random_octets(request, "cid", 16), "big")
        cid = drawn % min(RESERVED_CIDS)
        return cid, f"{random_octets(request, 'long content ID', 12).hex()}{cid:08x}"
    if not re.fullmatch(r"(0x)?[0-9A-Fa-f]{1,8}", given) or int(given, 16) in RESERVED_CIDS:
        raise OptionError(
            f"cid is {given[:40]!r}, expected 8 hexadecimal digits other than "
            + " and ".join(f"{cid:08x}" for cid in RESERVED_CIDS)
        )
    cid = int(given, 16)
    digest = hashlib.sha256(b"imgcore vmdk longContentID" + cid.to_bytes(4, "big"))
    return cid, f"{digest.hexdigest()[:24]}{cid:08x}"
